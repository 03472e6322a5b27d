"""What the features of each layer are worth: linear probes (paper sections 3.3 and 4.5).

Everything is an evaluator. Features come from the device, logistic regression is scikit-learn's.
"""

import json
import warnings

import jax
import ml_collections
import numpy as np
from absl import logging
from matplotlib.figure import Figure

from core import few_labels

_HELD_OUT = .1  # Share of the training examples that layer and strength are chosen on.


class Probe:
  """Logistic regression (L-BFGS) on the mean-pooled features of each layer.

  Layer and regularisation are chosen on a tenth of the training examples; then the chosen layer's
  probe is fitted to all of them and scored on the test split. Features are standardised by the mean
  and deviation of what a probe is fitted to: the paper says neither this nor the strengths. The
  low-data protocol (table 4) fits the same layer with the same strength to a few labels a class.

  Gives 'accuracy' and 'best_layer'; '{n}_labels' and '{n}_labels_std' for n labels a class, over
  the subsets drawn (classes that have fewer are no such protocol, and it is left out); for BERT,
  whose inputs are masked here too, 'vote_accuracy': the most frequent class of several masks.
  Leaves `probe.png`, the accuracy by layer, and `probe.json` with its numbers.
  """

  def __init__(self, train_split: str, test_split: str, settings: ml_collections.ConfigDict,
               every: str = ''):
    """`settings` is `config.eval.probe`: `strengths` (C of scikit-learn), `max_iter`, `labels`
    (a class), `subsets`, `masks`."""
    self.train_split, self.test_split, self.every = train_split, test_split, every
    self.settings = settings
    self._fn = None

  def __call__(self, run, params, step: int) -> dict[str, float]:
    settings = self.settings
    x, y = self._features(run, params, self.train_split, 0)
    test, test_y = self._features(run, params, self.test_split, 0)
    held = np.zeros(len(y), bool)
    held[np.random.default_rng(0).permutation(len(y))[:max(int(len(y) * _HELD_OUT), 1)]] = True

    curve = np.zeros((x.shape[1], len(settings.strengths)))
    for layer in range(x.shape[1]):
      for i, strength in enumerate(settings.strengths):
        predict = self._fit(x[~held, layer], y[~held], strength)
        curve[layer, i] = np.mean(predict(x[held, layer]) == y[held])
    layer, i = np.unravel_index(curve.argmax(), curve.shape)
    strength = settings.strengths[i]
    predict = self._fit(x[:, layer], y, strength)
    answers = predict(test[:, layer])
    found = {'accuracy': float(np.mean(answers == test_y)), 'best_layer': float(layer)}
    found |= self._few_labels(x[:, layer], y, test[:, layer], test_y, strength)
    if run.plan.config.model.objective == 'bert':
      answers = [answers] + [
          predict(self._features(run, params, self.test_split, draw)[0][:, layer])
          for draw in range(1, settings.masks)]
      found['vote_accuracy'] = float(np.mean(vote(np.stack(answers, 1)) == test_y))
    if run.writes:
      picture(curve.max(1), int(layer), found['accuracy'], run.pictures / 'probe.png')
      (run.pictures / 'probe.json').write_text(json.dumps({
          'train_examples': len(y), 'test_examples': len(test_y),
          'strengths': list(settings.strengths), 'validation_accuracy': curve.round(6).tolist(),
          'best_layer': int(layer), 'best_strength': float(strength)}, indent=1) + '\n')
    return found

  def _features(self, run, params, split: str, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[examples, layers, width]` and int `[examples]`, in the order of the split."""
    task = run.plan.task
    if self._fn is None:
      self._fn = lambda args, batch: {
          'features': task.features(args[0], batch['tokens'], args[1]), 'label': batch['label']}
    # The number of the mask is an argument, so that all masks share one compilation.
    parts = list(run.map(self._fn, (params, np.int32(draw)), split))
    return tuple(np.concatenate([part[k] for part in parts]) for k in ('features', 'label'))

  def _fit(self, x: np.ndarray, y: np.ndarray, strength: float):
    """Fits to `x` `[examples, width]`, `y` `[examples]`; returns features -> classes."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    model = LogisticRegression(C=strength, max_iter=self.settings.max_iter)
    with warnings.catch_warnings(record=True) as complaints:
      warnings.simplefilter('always')
      model.fit((x - mean) / deviation, y)
    if complaints:
      logging.info('a probe of strength %g stopped after %d iterations', strength,
                   self.settings.max_iter)
    return lambda x: model.predict((x - mean) / deviation)

  def _few_labels(self, x, y, test, test_y, strength: float) -> dict[str, float]:
    fewest = np.bincount(y).min()
    sizes = tuple(n for n in self.settings.labels if n <= fewest)
    if not sizes:
      return {}
    right = {n: [] for n in sizes}
    for seed in range(self.settings.subsets):
      for n, rows in few_labels.draw_support(y, int(y.max()) + 1, sizes, seed).items():
        right[n].append(np.mean(self._fit(x[rows], y[rows], strength)(test) == test_y))
    found = {}
    for n, values in right.items():
      found |= {f'{n}_labels': float(np.mean(values)), f'{n}_labels_std': float(np.std(values))}
    return found


def vote(answers: np.ndarray) -> np.ndarray:
  """The most frequent class of each row, equals at random (section 4.6).

  Args:
    answers: int `[examples, masks]`.

  Returns:
    int `[examples]`.
  """
  counts = np.zeros((len(answers), answers.max() + 1))
  np.add.at(counts, (np.arange(len(answers))[:, None], answers), 1)
  return (counts + np.random.default_rng(0).uniform(0, .5, counts.shape)).argmax(1)


class MaskVote:
  """The class head of a fine-tuned BERT under several masks (section 4.6).

  Gives 'accuracy', the most frequent class, and 'one_mask', the first mask alone.
  """

  def __init__(self, split: str, masks: int, every: str = ''):
    self.split, self.masks, self.every = split, masks, every
    self._fn = None

  def __call__(self, run, params, step: int) -> dict[str, float]:
    task = run.plan.task
    if self._fn is None:
      self._fn = lambda params, batch: {
          'label': batch['label'],
          'answers': jax.numpy.stack([task.class_logits(params, batch['tokens'], draw).argmax(-1)
                                      for draw in range(self.masks)], axis=1)}
    parts = list(run.map(self._fn, params, self.split))
    answers, labels = (np.concatenate([part[k] for part in parts]) for k in ('answers', 'label'))
    return {'accuracy': float(np.mean(vote(answers) == labels)),
            'one_mask': float(np.mean(answers[:, 0] == labels))}


def picture(accuracy: np.ndarray, best: int, test: float, path) -> None:
  """Accuracy by layer (paper figure 2), the layer that was chosen, and what it gave on test.

  Args:
    accuracy: `[layers]`, on held-out training examples.
    best: the chosen layer.
    test: its accuracy on the test split.
    path: the PNG to write.
  """
  figure = Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  axes.plot(range(len(accuracy)), 100 * accuracy, marker='o', markersize=4,
            label='held-out training examples')
  axes.plot(best, 100 * test, marker='*', markersize=12, linestyle='none', color='tab:red',
            label=f'test, layer {best}: {100 * test:.1f}%')
  axes.set_xlabel('layer (the last is the final norm)')
  axes.set_ylabel('linear probe accuracy (%)')
  axes.set_title('what a linear classifier reads from each layer', fontsize=10)
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.grid(alpha=.3)
  axes.legend(fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)
