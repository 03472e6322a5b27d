"""What frozen features are worth: a linear few-shot probe and nearest neighbours.

Both are evaluators that ask the task for `features(params, batch)`, float `[batch, width]`, run it
over a training and a test split, and classify on the host. Nothing is trained by gradients.
"""

import numpy as np
import scipy.linalg

from core import few_labels
from core.config import UserError

_BIAS = 100.  # So large that the ridge leaves the bias as good as free.
_BLOCK = 2 ** 25  # Numbers in a block of intermediate results: bounds memory, changes no result.


class _Frozen:
  """Features and labels of whole splits, computed with one compiled function."""

  def __init__(self):
    self._fn = None

  def __call__(self, run, params, split: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[examples, width]` and int `[examples]`, in the order of the split."""
    if self._fn is None:
      task = run.plan.task
      self._fn = lambda params, batch: {
          'features': task.features(params, batch).astype('float32'), 'label': batch['label']}
    parts = list(run.map(self._fn, params, split))
    return tuple(np.concatenate([part[k] for part in parts]) for k in ('features', 'label'))


def _blocks(rows: int, columns: int):
  """Slices of `rows` such that rows x columns of a block stay within memory."""
  size = max(_BLOCK // columns, 1)
  return (slice(start, start + size) for start in range(0, rows, size))


# --- Few-shot ------------------------------------------------------------------------------------


class LinearProbe:
  """Ridge regression to {-1, 1} targets in closed form (ViT section 4.1, "Metrics").

  Features are whitened a dimension at a time by the support's mean and standard deviation + 1e-5,
  and a constant 100 is appended for the bias. Everything is float64. One eigendecomposition serves
  every strength of regularisation: of X'X when there are at least as many examples as dimensions,
  else of XX' (the dual form, which gives the same weights).
  """

  def __init__(self, features: np.ndarray, labels: np.ndarray, num_classes: int):
    """`features` `[examples, width]`, `labels` int `[examples]`: the support."""
    x = features.astype(np.float64)
    self._mean, self._std = x.mean(0), x.std(0) + 1e-5
    x = self._prepare(x)
    y = 2. * (labels[:, None] == np.arange(num_classes)) - 1
    if len(x) >= x.shape[1]:
      self._values, vectors = scipy.linalg.eigh(x.T @ x)
      self._left, self._right = vectors, vectors.T @ (x.T @ y)
    else:
      self._values, vectors = scipy.linalg.eigh(x @ x.T)
      self._left, self._right = x.T @ vectors, vectors.T @ y

  def _prepare(self, features: np.ndarray) -> np.ndarray:
    white = (features.astype(np.float64) - self._mean) / self._std
    return np.pad(white, ((0, 0), (0, 1)), constant_values=_BIAS)

  def weights(self, l2: float) -> np.ndarray:
    """(X'X + l2 I)^-1 X'Y: float64 `[width + 1, classes]`, the bias last; l2 > 0."""
    return self._left @ (self._right / (self._values[:, None] + l2))

  def predict(self, features: np.ndarray, l2: float) -> np.ndarray:
    """The classes of `features` `[examples, width]`: int `[examples]`."""
    weights = self.weights(l2)
    return np.concatenate([(self._prepare(features[rows]) @ weights).argmax(-1)
                           for rows in _blocks(len(features), sum(weights.shape))])


class FewShot:
  """Evaluator: accuracy of a `LinearProbe` on k examples a class, as `{k}shot`, mean over seeds."""

  def __init__(self, train_split: str, test_split: str, shots: tuple[int, ...] = (1, 5, 10, 25),
               l2: float = 2. ** 10, seeds: int = 3, every: str = ''):
    """Sets what is measured.

    Args:
      train_split: key of `config.data.splits`; the examples a support is drawn from, all of which
        are computed: a slice such as train[:65000] is enough for ImageNet.
      test_split: key of `config.data.splits`.
      shots: examples a class.
      l2: strength of the ridge; big_vision's, the paper states none.
      seeds: number of supports drawn, with seeds 0, 1, ...
      every: when it runs.
    """
    self.train_split, self.test_split, self.every = train_split, test_split, every
    self.shots, self.l2, self.seeds = tuple(shots), l2, seeds
    self._frozen = _Frozen()

  def __call__(self, run, params, step: int) -> dict[str, float]:
    num_classes = run.plan.task.num_classes
    train, train_labels = self._frozen(run, params, self.train_split)
    supports = [few_labels.draw_support(train_labels, num_classes, self.shots, seed)
                for seed in range(self.seeds)]
    test, test_labels = self._frozen(run, params, self.test_split)
    found = {}
    for k in self.shots:
      right = []
      for support in supports:
        rows = support[k]
        probe = LinearProbe(train[rows], train_labels[rows], num_classes)
        right.append(np.mean(probe.predict(test, self.l2) == test_labels))
      found[f'{k}shot'] = float(np.mean(right))
    return found


# --- Nearest neighbours --------------------------------------------------------------------------


def nearest_neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int,
                       k: int, temperature: float | None) -> np.ndarray:
  """Classifies by a vote of the k training examples of largest cosine similarity s.

  Args:
    train: float `[examples, width]`.
    labels: int `[examples]`.
    test: float `[queries, width]`.
    num_classes: classes are 0 to num_classes - 1.
    k: neighbours that vote, at most `examples`.
    temperature: a vote weighs exp(s / temperature); None lets all weigh the same.

  Returns:
    int `[queries]`; of classes with equally many votes, the first.
  """
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  train, test = unit(train.astype(np.float32)), unit(test.astype(np.float32))
  predicted = []
  for rows in _blocks(len(test), max(len(train), num_classes)):
    similarity = test[rows] @ train.T
    nearest = np.argpartition(similarity, -k, axis=-1)[:, -k:]
    s = np.take_along_axis(similarity, nearest, -1).astype(np.float64)
    # Below the largest: the same vote, and no overflow at small temperatures.
    weight = np.ones_like(s) if temperature is None else np.exp(
        (s - s.max(-1, keepdims=True)) / temperature)
    votes = np.zeros((len(s), num_classes))
    np.add.at(votes, (np.arange(len(s))[:, None], labels[nearest]), weight)
    predicted.append(votes.argmax(-1))
  return np.concatenate(predicted)


class KNN:
  """Evaluator: accuracy of `nearest_neighbours` as `accuracy`.

  Weighted votes at temperature 0.07 are those of Wu et al. (arXiv 1805.01978, section 3.4), and 20
  neighbours are what DINO found best with them (arXiv 2104.14294, section 3.2 and appendix F.1).
  """

  def __init__(self, train_split: str, test_split: str, k: int = 20,
               temperature: float | None = .07, every: str = ''):
    """Splits are keys of `config.data.splits`; for the others see `nearest_neighbours`."""
    self.train_split, self.test_split, self.every = train_split, test_split, every
    self.k, self.temperature = k, temperature
    self._frozen = _Frozen()

  def __call__(self, run, params, step: int) -> dict[str, float]:
    train, train_labels = self._frozen(run, params, self.train_split)
    if not 1 <= self.k <= len(train):
      raise UserError(f'k-NN: k={self.k} is not between 1 and the {len(train)} examples of split '
                      f'{self.train_split!r}')
    test, test_labels = self._frozen(run, params, self.test_split)
    predicted = nearest_neighbours(train, train_labels, test, run.plan.task.num_classes, self.k,
                                   self.temperature)
    return {'accuracy': float(np.mean(predicted == test_labels))}
