"""F1 and NMI against scikit-learn and by hand, which nodes are used, and the picture."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier

from core.config import RunFailed, UserError
from graph import evaluation
from tests.graph import embedded


def blobs(n=90, classes=3, dim=5, spread=1., seed=0):
  """Vectors off zero, longer in some directions, and the classes around whose means they lie."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(classes, size=n)
  vectors = rng.normal(size=(classes, dim))[labels] + spread * rng.normal(size=(n, dim))
  return (vectors * 2. ** rng.integers(-1, 2, dim) + .7).astype(np.float32), labels


@pytest.mark.parametrize('classes', [2, 5])
def test_f1_is_that_of_scikit_learn(classes):
  rng = np.random.default_rng(classes)
  truth, predicted = rng.integers(classes, size=(2, 40))
  columns = np.arange(classes + 3)  # The last classes are neither true nor predicted.
  got = evaluation.f1(truth[:, None] == columns, predicted[:, None] == columns)
  np.testing.assert_allclose(got, [f1_score(truth, predicted, average=kind)
                                   for kind in ('macro', 'micro')])
  truth, predicted = rng.random((2, 30, classes)) < .4
  np.testing.assert_allclose(evaluation.f1(truth, predicted), [
      f1_score(truth, predicted, average=kind) for kind in ('macro', 'micro')])


def splits(n, share, repeats, seed):
  for repeat in range(repeats):
    order = np.random.default_rng((seed, repeat)).permutation(n)
    yield order[:round(share * n)], order[round(share * n):]


@pytest.mark.parametrize('classes', [2, 3])
def test_classification_is_scikit_learn_s(classes):
  vectors, labels = blobs(classes=classes)
  got = evaluation.classification(vectors, labels + 5, (.1, .5), 4, seed=3)
  assert list(got) == [f'{kind}@{share}%' for share in (10, 50)
                       for kind in ('macro_f1', 'macro_f1_std', 'micro_f1', 'micro_f1_std')]
  for share in .1, .5:
    for kind in 'macro', 'micro':
      found = []
      for train, test in splits(90, share, 4, 3):
        model = LogisticRegression(max_iter=1000)
        predicted = model.fit(vectors[train], labels[train]).predict(vectors[test])
        found.append(f1_score(labels[test], predicted, average=kind))
      assert len(set(found)) > 1
      assert got[f'{kind}_f1@{100 * share:g}%'] == pytest.approx(np.mean(found), abs=1e-6)
      assert got[f'{kind}_f1_std@{100 * share:g}%'] == pytest.approx(np.std(found), abs=1e-6)


def test_of_several_labels_as_many_as_a_node_has_are_predicted():
  vectors, labels = blobs(classes=4)
  has = (np.random.default_rng(1).random((90, 4)) < .3) | (labels[:, None] == np.arange(4))
  got = evaluation.classification(vectors, has, (.4,), 2, seed=0)
  found = []
  for train, test in splits(90, .4, 2, 0):
    model = OneVsRestClassifier(LogisticRegression(max_iter=1000))
    likely = model.fit(vectors[train], has[train]).predict_proba(vectors[test])
    predicted = np.zeros_like(has[test])
    for row, chances, true in zip(predicted, likely, has[test]):
      row[sorted(range(4), key=lambda c: -chances[c])[:true.sum()]] = True
    found.append(f1_score(has[test], predicted, average='macro'))
  assert got['macro_f1@40%'] == pytest.approx(np.mean(found), abs=1e-6)
  assert got['macro_f1@40%'] > .5


@pytest.mark.parametrize('several', [False, True])
def test_a_class_that_is_missing_in_training_is_never_predicted(several):
  has = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], bool)
  if several:
    has[:, 2] = [0, 0, 1, 0]
  x = np.float32([[1, 0], [2, 0], [0, 1], [0, 2]])
  scores = evaluation._scores(x, has, x, several)
  assert (scores.argmax(axis=1) == [0, 0, 1, 1]).all()
  assert (scores[:, 2] == -np.inf).all() != several
  # Of one class there is nothing to learn, and of a single node no deviation.
  scores = evaluation._scores(x, np.array([[0, 1, 0]] * 4, bool), x, several)
  assert (scores.argmax(axis=1) == 1).all() and (scores[:, [0, 2]] == -np.inf).all()
  labels = np.array([0, 1, 2, 3])
  truth = labels[:, None] == labels if several else labels
  found = evaluation.classification(np.eye(4, dtype=np.float32), truth, (.01, .99), 5, seed=0)
  assert set(found.values()) == {0}


def test_labels_that_vectors_do_not_tell_are_guessed():
  vectors, labels = blobs(n=400, classes=2)
  found = evaluation.classification(vectors, np.random.default_rng(1).permutation(labels), (.5,),
                                    5, seed=0)
  assert .4 < found['micro_f1@50%'] < .6


def mutual_information(a, b):
  """Normalised by the arithmetic mean of both entropies."""
  entropy = lambda *columns: -sum(p * np.log(p) for p in (
      np.unique(np.stack(columns), axis=1, return_counts=True)[1] / len(a)))
  return (entropy(a) + entropy(b) - entropy(a, b)) / ((entropy(a) + entropy(b)) / 2)


def test_clustering_is_nmi_of_k_means():
  vectors, labels = blobs(spread=.8)
  got = evaluation.clustering(vectors, labels, 4, 3, seed=7)
  for name, x in ('nmi', vectors), ('nmi_normalised', vectors / np.sqrt(
      (vectors.astype(float) ** 2).sum(axis=1, keepdims=True)).astype(np.float32)):
    found = [mutual_information(labels, KMeans(4, n_init=10, random_state=seed).fit_predict(x))
             for seed in (7, 8, 9)]
    assert got[name] == pytest.approx(np.mean(found), abs=1e-6)
    assert got[f'{name}_std'] == pytest.approx(np.std(found), abs=1e-6)
    assert 0 < got[name] < 1


def test_length_hides_clusters_until_it_is_one():
  rng = np.random.default_rng(0)
  labels = rng.integers(3, size=120)
  directions = np.eye(3)[labels] + .05 * rng.normal(size=(120, 3))
  lengths = np.exp(3 * rng.normal(size=(120, 1)))
  found = evaluation.clustering((lengths * directions).astype(np.float32), labels, 3, 8, seed=0)
  assert found['nmi_normalised'] > .9 > .3 > found['nmi']


def test_labelled_nodes_that_occur():
  occurs = np.ones(73, bool)
  occurs[[0, 1, 4, 61]] = False
  authors, venues = evaluation.labelled(embedded.graph(), occurs)
  assert (authors.type, venues.type) == ('author', 'venue')
  assert authors.coverage == 57 / 60 and venues.coverage == 7 / 8
  np.testing.assert_array_equal(authors.ids, [2, 3, *range(5, 60)])
  np.testing.assert_array_equal(authors.labels, authors.ids % 3)
  np.testing.assert_array_equal(venues.ids, [60, 62, 63, 64, 65, 66, 67])
  assert authors.classes == ('a', 'b', 'c') and venues.classes == ('a', 'b')
  few, _ = evaluation.labelled(embedded.graph(), occurs, most=20, seed=1)
  assert len(few.ids) == 20 and set(few.ids) < set(authors.ids) and (np.diff(few.ids) > 0).all()
  np.testing.assert_array_equal(few.labels, few.ids % 3)
  assert few.coverage == 57 / 60
  again, other = (evaluation.labelled(embedded.graph(), occurs, 20, s)[0].ids for s in (1, 2))
  assert (again == few.ids).all() and (other != few.ids).any()


def test_several_labels_and_types_without_two_classes(caplog):
  labels = {0: [1, 4], 1: [4], 5: [0, 1, 4], 60: [2], 61: [2], 62: [3], 68: [5]}
  occurs = np.ones(73, bool)
  occurs[62] = False
  with caplog.at_level('WARNING', 'absl'):
    authors, = evaluation.labelled(embedded.graph(labels), occurs)
  assert authors.classes == ('a', 'b', 'e') and authors.ids.tolist() == [0, 1, 5]
  assert authors.labels.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
  assert 'venue is not evaluated: its 2 labelled nodes' in caplog.text
  assert 'term is not evaluated: its 1 labelled nodes' in caplog.text


def test_evaluators(tmp_path, monkeypatch):
  task = embedded.task(silent=[0, 7, 66, 72], shares=(.055, .5))
  drawn = []
  monkeypatch.setattr(evaluation, 'draw', lambda *args: drawn.append(args))
  classify = evaluation.Classification(task)
  found = classify(embedded.run(tmp_path), None, 3)
  assert set(found) == {f'{type}/{name}' for type in ('author', 'venue') for name in (
      'coverage', *(f'{kind}_f1{std}@{share}%' for kind in ('macro', 'micro')
                    for std in ('', '_std') for share in ('5.5', '50')))}
  assert found['author/coverage'] == 58 / 60 and found['venue/coverage'] == 7 / 8
  (panels, shares, path), = drawn
  assert set(panels) == {'author', 'venue'} and path == tmp_path / 'pictures/classification.png'
  assert classify(embedded.run(tmp_path, writes=False), None, 3) == found and len(drawn) == 1
  ids = np.setdiff1d(np.arange(60), [0, 7])
  want = evaluation.classification(task.vectors(None)[ids], ids % 3, (.055, .5), 3, 3)
  assert want.items() <= {k.removeprefix('author/'): v for k, v in found.items()}.items()

  cluster = evaluation.Clustering(task)
  found = cluster(embedded.run(tmp_path), None, 3)
  assert {f'author/{name}': value for name, value in evaluation.clustering(
      task.vectors(None)[ids], ids % 3, 3, 4, 3).items()}.items() <= found.items()
  assert {name.split('/')[0] for name in found} == {'author', 'venue'}
  assert classify.every == cluster.every == 'end'


def test_max_nodes_and_several_labels(tmp_path, monkeypatch):
  sizes = []
  monkeypatch.setattr(evaluation, 'classification', lambda vectors, labels, *args: (
      sizes.append(labels.shape), {})[1])
  monkeypatch.setattr(evaluation, 'draw', lambda *args: None)
  labels = {id: [id % 2, 2 + id % 4] for id in range(60)} | {60: [0], 61: [1], 62: [0]}
  task = embedded.task(embedded.graph(labels), max_nodes=11)
  evaluation.Classification(task)(embedded.run(tmp_path), None, 0)
  assert sizes == [(11, 6), (3,)]
  found = evaluation.Clustering(task)(embedded.run(tmp_path), None, 0)
  assert {name.split('/')[0] for name in found} == {'venue'}


def test_nothing_to_evaluate(tmp_path):
  task = embedded.task(embedded.graph({}))
  assert evaluation.Classification(task)(embedded.run(tmp_path), None, 0) == {}
  assert evaluation.Clustering(task)(embedded.run(tmp_path), None, 0) == {}
  assert not list((tmp_path / 'pictures').iterdir())


@pytest.mark.parametrize('evaluator, settings, match', [
    (evaluation.Classification, {'shares': (.5, 1.)}, 'config.eval.shares has 1.0'),
    (evaluation.Classification, {'shares': (0, .5)}, 'config.eval.shares has 0'),
    (evaluation.Classification, {'repeats': 0}, 'config.eval.repeats is 0'),
    (evaluation.Clustering, {'clusterings': 0}, 'config.eval.clusterings is 0')])
def test_settings_without_a_meaning(evaluator, settings, match):
  with pytest.raises(UserError, match=match):
    evaluator(embedded.task(**settings))


def test_vectors_that_are_not_finite(tmp_path):
  vectors = np.ones((73, 2))
  vectors[[4, 70], 1] = np.inf
  with pytest.raises(RunFailed, match="vectors of 2 of 73 nodes, such as 'author 4', are not"):
    evaluation.Clustering(embedded.task(vectors=vectors))(embedded.run(tmp_path), None, 0)


def test_picture(tmp_path, monkeypatch):
  figures, savefig = [], Figure.savefig
  monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: (
      figures.append(self), savefig(self, *args, **kwargs))[1])
  shares = (.5, .05, .2)
  panels = {type: {f'{kind}_f1{std}@{100 * share:g}%': value for kind in ('macro', 'micro')
                   for share, value in zip(shares, values) for std in ('', '_std')}
            for type, values in {'$\\frac{$': (.9, .1, .4), 'venue': (.8, .5, .6)}.items()}
  evaluation.draw(panels, shares, tmp_path / 'a.png')
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  figure, = figures
  assert [axes.get_title() for axes in figure.axes] == ['$\\frac{$', 'venue']
  for axes, want in zip(figure.axes, ([.1, .4, .9], [.5, .6, .8])):
    for line in axes.lines:
      np.testing.assert_allclose(line.get_xydata(), np.transpose([[5, 20, 50], want]))
    assert 0 <= axes.get_ylim()[0] and axes.get_ylim()[1] <= 1.01
    texts = [axes.title, axes.xaxis.label, *axes.get_xticklabels()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['Micro-F1', 'Macro-F1']
