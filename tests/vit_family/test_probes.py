"""Few-shot and nearest-neighbour probes against scikit-learn and plain linear algebra."""

import types

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from core import few_labels
from core.config import UserError
from vit_family import probes


def clusters(n, width=6, classes=4, spread=1.5, seed=0):
  """Overlapping clusters: no probe gets all of them right, so that a wrong one shows."""
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(99).normal(size=(classes, width))
  labels = rng.permutation(np.arange(n) % classes)
  scale = np.geomspace(.01, 30, width)  # Dimensions of unlike size, off zero.
  features = (centres[labels] + spread * rng.normal(size=(n, width)) + 3) * scale
  return features.astype(np.float32), labels


def oracle(x, y, test, classes, l2):
  """scikit-learn's ridge on whitened features with the constant appended."""
  mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-5
  prepare = lambda f: np.c_[(f.astype(np.float64) - mean) / std, np.full(len(f), 100.)]
  model = Ridge(alpha=l2, fit_intercept=False, solver='cholesky')
  model.fit(prepare(x), np.eye(classes)[y] * 2 - 1)
  return model.coef_.T, model.predict(prepare(test)).argmax(-1)


@pytest.mark.parametrize('n, width', [(80, 6), (12, 6), (7, 6), (6, 30), (20, 30)])
def test_linear_probe_is_ridge_regression(n, width):
  """More examples than dimensions (the bias is one) takes one form, fewer the other."""
  (x, y), (test, _) = clusters(n, width), clusters(50, width, seed=1)
  probe = probes.LinearProbe(x, y, 4)
  assert len(probe._values) == min(n, width + 1)  # The smaller problem is the one solved.
  for l2 in (1e-2, 1., 2. ** 10):
    weights, predicted = oracle(x, y, test, 4, l2)
    np.testing.assert_allclose(probe.weights(l2), weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(probe.predict(test, l2), predicted)


def test_the_two_forms_agree_and_classes_permute():
  x, y = clusters(9, 8)  # As many examples as dimensions, so either form is within reach.
  primal = probes.LinearProbe(x, y, 4)
  white = primal._prepare(x)
  dual = white.T @ np.linalg.solve(white @ white.T + 5 * np.eye(9), np.eye(4)[y] * 2 - 1)
  np.testing.assert_allclose(primal.weights(5.), dual, rtol=1e-6, atol=1e-10)
  order = np.array([2, 0, 3, 1])
  permuted = probes.LinearProbe(x, order[y], 4)
  np.testing.assert_allclose(permuted.weights(5.)[:, order], primal.weights(5.), rtol=1e-8,
                             atol=1e-10)


def test_linear_probe_by_hand():
  """One dimension, two classes: whitened -1 and 1; X'X = diag(2, 2e4), X'Y = [[-2, 2], [0, 0]]."""
  probe = probes.LinearProbe(np.array([[3.], [5.]], np.float32), np.array([0, 1]), 2)
  np.testing.assert_allclose(probe.weights(2.), [[-.5, .5], [0, 0]], rtol=1e-4, atol=1e-9)
  np.testing.assert_array_equal(probe.predict(np.array([[3.9], [4.1]]), 2.), [0, 1])


def test_blocks_change_nothing(monkeypatch):
  (x, y), (test, _) = clusters(40), clusters(33, seed=1)
  whole = (probes.LinearProbe(x, y, 4).predict(test, 1.),
           probes.nearest_neighbours(x, y, test, 4, 5, .07))
  monkeypatch.setattr(probes, '_BLOCK', 100)
  np.testing.assert_array_equal(probes.LinearProbe(x, y, 4).predict(test, 1.), whole[0])
  np.testing.assert_array_equal(probes.nearest_neighbours(x, y, test, 4, 5, .07), whole[1])


@pytest.mark.parametrize('k', [1, 5, 20])
@pytest.mark.parametrize('temperature', [None, .07, .5])
def test_neighbours_vote_as_in_scikit_learn(k, temperature):
  (x, y), (test, _) = clusters(90), clusters(70, seed=1)
  weights = 'uniform' if temperature is None else lambda d: np.exp((1 - d) / temperature)
  model = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=weights)
  want = model.fit(x.astype(np.float64), y).predict(test.astype(np.float64))
  got = probes.nearest_neighbours(x, y, test, 4, k, temperature)
  np.testing.assert_array_equal(got, want)
  assert len(set(got)) > 2


def test_a_near_neighbour_outvotes_two_far_ones():
  train = np.array([[1, 0], [.6, .8], [.6, -.8]])  # Cosines 1, .6, .6.
  labels, test = np.array([1, 0, 0]), np.array([[9., 0]])
  vote = lambda t: probes.nearest_neighbours(train, labels, test, 2, 3, t)
  assert vote(None) == [0]
  assert vote(.5) == [1]    # exp(.4 / .5) is 2.2: more than two votes.
  assert vote(.65) == [0]   # exp(.4 / .65) is 1.9: fewer.
  assert vote(1e-4) == [1]  # exp(1e4) is no number.


class Run:
  """What a probe asks of a `core.evaluate.EvalRun`."""

  def __init__(self, splits, classes=4):
    self._splits = splits
    self.plan = types.SimpleNamespace(task=types.SimpleNamespace(
        num_classes=classes, features=lambda params, batch: batch['image'] * params))

  def map(self, fn, params, split):
    x, y = self._splits[split]
    for start in range(0, len(x), 32):
      rows = slice(start, start + 32)
      yield fn(params, {'image': x[rows], 'label': y[rows]})


def test_few_shot_evaluator():
  run = Run({'pool': clusters(200), 'test': clusters(100, seed=1)})
  found = probes.FewShot('pool', 'test', shots=(1, 5, 25), l2=1., seeds=2)(run, np.float64(2.), 0)
  (x, y), (test, truth) = clusters(200), clusters(100, seed=1)
  for k in (1, 5, 25):
    accuracies = []
    for seed in (0, 1):
      rows = few_labels.draw_support(y, 4, (1, 5, 25), seed)[k]
      predicted = oracle(2 * x[rows], y[rows], 2 * test, 4, 1.)[1]
      accuracies.append(np.mean(predicted == truth))
    assert found.pop(f'{k}shot') == np.mean(accuracies)
  assert not found


def test_knn_evaluator():
  run = Run({'train': clusters(90), 'test': clusters(70, seed=1)})
  model = KNeighborsClassifier(20, metric='cosine', algorithm='brute',
                               weights=lambda d: np.exp((1 - d) / .07))
  (x, y), (test, truth) = clusters(90), clusters(70, seed=1)
  want = model.fit(x, y).score(test, truth)
  assert probes.KNN('train', 'test')(run, np.float32(1), 0) == {'accuracy': want}
  assert .3 < want < .99
  with pytest.raises(UserError, match="k=91 is not between 1 and the 90 examples of split 'train'"):
    probes.KNN('train', 'test', k=91)(run, np.float32(1), 0)
