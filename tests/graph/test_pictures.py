"""Which nodes are drawn where and in which colour, and whether the pictures can be read."""

import itertools

import numpy as np
import pytest
from matplotlib import colors as colors_lib
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from graph import pictures
from tests.graph import embedded


@pytest.fixture
def figures(monkeypatch):
  drawn, savefig = [], Figure.savefig
  monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: (
      drawn.append(self), savefig(self, *args, **kwargs))[1])
  return drawn


@pytest.fixture
def fast(monkeypatch):
  """The first two numbers of each vector take the place of t-SNE."""
  monkeypatch.setattr(pictures, 'tsne', lambda vectors, seed: vectors[:, :2])


def key(place):
  return tuple(np.round(np.float64(place), 4).tolist())


def marks(axes):
  """Every node that is drawn: place -> (colour, marker size)."""
  found = {}
  for some in axes.collections:
    points, faces = some.get_offsets(), some.get_facecolor()
    for i, point in enumerate(points):
      found[key(point)] = (
          colors_lib.to_hex(faces[i % len(faces)]), some.get_sizes()[0])
  return found


def legend(axes):
  return [text.get_text() for text in axes.get_legend().get_texts()]


def hex_of(*names):
  return [colors_lib.to_hex(name) for name in names]


def draw(task, tmp_path, writes=True):
  evaluator = pictures.Projection(task)
  assert evaluator.every == 'end'
  assert evaluator(embedded.run(tmp_path, writes), None, 0) == {}


def test_evenly():
  nodes = {'a': np.arange(100), 'b': np.arange(100, 105), 'c': np.arange(200, 240)}
  drawn = pictures.evenly(nodes, 65, 0)
  assert list(drawn) == ['a', 'b', 'c'] and [len(ids) for ids in drawn.values()] == [30, 5, 30]
  for type, ids in drawn.items():
    assert set(ids) <= set(nodes[type]) and (np.diff(ids) > 0).all()
  assert (pictures.evenly(nodes, 65, 0)['a'] == drawn['a']).all()
  assert (pictures.evenly(nodes, 65, 1)['a'] != drawn['a']).any()
  assert sum(map(len, pictures.evenly(nodes, 1000, 0).values())) == 145


@pytest.mark.parametrize('n, dim', [(40, 5), (4, 9), (7, 1)])
def test_principal_components_are_those_of_scikit_learn(n, dim):
  vectors = np.random.default_rng(0).normal(3, size=(n, dim)) * np.arange(1, dim + 1)
  places, shares = pictures.principal(vectors)
  model = PCA(min(2, dim))
  want = model.fit_transform(vectors)
  assert places.shape == (n, 2) and shares.shape == (2,)
  np.testing.assert_allclose(np.abs(places[:, :dim]), np.abs(want), atol=1e-9)
  np.testing.assert_allclose(shares[:dim], model.explained_variance_ratio_, atol=1e-9)
  if dim == 1:
    np.testing.assert_allclose(places[:, 1], 0, atol=1e-9)


def test_tsne_keeps_clusters_whatever_the_lengths_of_vectors():
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  x = (np.eye(4)[labels] + .05 * rng.normal(size=(60, 4))) * np.exp(3 * rng.normal(size=(60, 1)))
  places = pictures.tsne(x.astype(np.float32), seed=2 ** 32 + 1)
  distances = np.linalg.norm(places[:, None] - places, axis=-1) + np.diag(np.full(60, np.inf))
  assert (labels[distances.argmin(axis=1)] == labels).all()
  for few in 2, 3:
    assert pictures.tsne(x[:few].astype(np.float32), 0).shape == (few, 2)


def test_projection_by_label(tmp_path, monkeypatch, figures, fast):
  vectors = np.random.default_rng(0).normal(size=(73, 6))
  vectors[60:] *= .08  # So near each other that names would cover each other.
  vectors[60, 0] = 4  # Its name has no room on the right.
  task = embedded.task(vectors=vectors, silent=[0, 61, 70])
  monkeypatch.setattr(pictures, '_SMALL', 10)
  draw(task, tmp_path)
  assert (tmp_path / 'pictures/projection.png').read_bytes().startswith(b'\x89PNG')
  left, right = figures[0].axes
  vectors, there = task.vectors(None), task.occurs(None)
  ids = np.flatnonzero(there)
  blue, orange, green = hex_of('C0', 'C1', 'C2')
  places, _ = pictures.principal(vectors[ids])
  found = marks(left)
  assert len(found) == 70 and legend(left) == ['author', 'venue', 'term']
  for id, place in zip(ids, places):
    color, size = found[key(place)]
    assert color == [blue, orange, green][task.graph.type_of(id)] and (size > 20) == (id >= 60)
  found = marks(right)  # Types of few nodes are there without labels, too.
  assert len(found) == 70
  assert legend(right) == ['author', 'venue', 'term', 'a', 'b', 'c']
  for id in ids:
    color, size = found[key(vectors[id, :2])]
    assert color == ('#000000' if id >= 68 else
                     [blue, orange, green][id % 3 if id < 60 else id % 2])
  names = [text.get_text() for text in right.texts]
  counts = task.counts(None)
  most = sorted(ids[ids >= 60], key=lambda id: -counts[id])
  assert 3 <= len(names) <= 12 and {*names} <= {task.graph.names[id] for id in most[:12]}
  assert names[0] == task.graph.names[most[0]]
  boxes = [text.get_window_extent() for text in right.texts]
  assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
  for box in boxes:
    assert right.bbox.x0 <= box.x0 and box.x1 <= right.bbox.x1
    assert not box.count_contains(right.transData.transform(vectors[ids[ids >= 60], :2]))


def test_large_types_without_labels_are_on_the_left_alone(tmp_path, monkeypatch, figures, fast):
  monkeypatch.setattr(pictures, '_SMALL', 4)
  monkeypatch.setattr(pictures, '_POINTS', (40, 20))
  draw(embedded.task(), tmp_path)
  left, right = figures[0].axes
  assert len(marks(left)) == 40 and len(marks(right)) == 20
  assert legend(left) == ['author', 'venue', 'term']
  assert legend(right) == ['author', 'venue', 'a', 'b', 'c'] and not right.texts


def test_without_labels_all_are_coloured_by_type(tmp_path, figures, fast):
  task = embedded.task(embedded.graph({}))
  draw(task, tmp_path)
  _, right = figures[0].axes
  found, vectors = marks(right), task.vectors(None)
  assert legend(right) == ['author', 'venue', 'term'] and len(found) == 73
  for id in range(73):
    assert found[key(vectors[id, :2])][0] == hex_of('C0', 'C1', 'C2')[
        task.graph.type_of(id)]
  assert right.get_title() == 't-SNE of author, venue, term, by type'


def test_of_many_and_several_labels_the_most_frequent_have_a_colour(tmp_path, monkeypatch, figures,
                                                                   fast):
  monkeypatch.setattr(pictures, '_COLORS', 3)
  labels = {id: [id % 2, 4] if id < 40 else [4, 5] if id < 59 else [2] for id in range(60)}
  labels[59], labels[58] = [2], [3]
  labels[57] = [3]
  task = embedded.task(embedded.graph(labels))
  draw(task, tmp_path)
  _, right = figures[0].axes
  assert legend(right)[3:] == ['a', 'b', 'e', 'other']
  found, vectors = marks(right), task.vectors(None)
  of = lambda id: found[key(vectors[id, :2])][0]
  assert [of(id) for id in (0, 1, 40, 58, 59)] == hex_of('C0', 'C1', 'C2', 'lightgrey',
                                                         'lightgrey')


def test_long_labels_fit_beneath_the_axes(tmp_path, figures, fast):
  labels = {id: [id % 6] for id in range(60)}
  task = embedded.task(embedded.graph(labels, label_names=[
      f'{letter}: Proceedings of the $\\frac{{$ Conference' for letter in 'abcdef']))
  draw(task, tmp_path)
  figure, = figures
  left, right = (axes.get_legend().get_window_extent() for axes in figure.axes)
  assert not left.overlaps(right) and right.x1 <= figure.get_window_extent().x1
  assert min(left.y0, right.y0) >= 0 and figure.axes[1].bbox.height > 400


def test_little_to_draw(tmp_path, figures):
  draw(embedded.task(silent=range(2, 73)), tmp_path)
  draw(embedded.task(), tmp_path, writes=False)
  assert not figures
  draw(embedded.task(vectors=np.ones((73, 1)), silent=range(3, 73)), tmp_path)
  assert (tmp_path / 'pictures/projection.png').exists()


# Names that are long, mathematics to matplotlib, in several lines, or of no letters.
NAMES = ['$5 & $10', 'Proceedings of the Conference on Graphs', 'two\nlines', ' ', '$\\frac{$']


@pytest.mark.parametrize('sizes', [{'author': 10, 'venue': 10, 'paper': 3}, {'author': 1}])
def test_bars_can_be_read(tmp_path, figures, sizes):
  record = {'node': '$\\frac{$', 'type': 'paper', 'neighbours': {
      type: [{'node': NAMES[i % 5], 'similarity': .95 - .12 * i} for i in range(size)]
      for type, size in sizes.items()}}
  pictures.bars(record, tmp_path / 'a.png')
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  figure, = figures
  canvas = figure.get_window_extent()
  assert figure.get_suptitle() == 'nearest to $\\frac{$ (paper)'
  for axes, (type, size) in zip(figure.axes, sizes.items()):
    assert axes.get_title() == type
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches],
                               .95 - .12 * np.arange(size))
    texts = [text.get_text() for text in axes.get_yticklabels()]
    assert texts[:2] == ['$5 & $10', 'Proceedings of the Conferen…'][:size]
    assert [text.get_text() for text in axes.texts] == [
        f'{.95 - .12 * i:.2f}' for i in range(size)]
    boxes = [text.get_window_extent() for text in (*axes.get_yticklabels(), *axes.texts, axes.title)
             if text.get_text().strip()]
    for box in boxes:
      assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and box.y1 <= canvas.y1
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    heights = [text.get_window_extent().y0 for text in axes.texts]
    assert heights == sorted(heights, reverse=True)  # The best is on top.
