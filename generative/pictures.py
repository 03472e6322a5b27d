"""What Image GPT draws: completions of images beside the originals, and images from nothing."""

import functools
import pathlib

import jax
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from core.nn import decode
from core.pictures import show
from generative import sampling

_HIDDEN = np.array([.62, .72, .95])  # what was not given; few images have this colour


class Samples:
  """Evaluator that leaves `completions.png` and `samples.png`.

  Completions are given the upper rows of test images (`config.model.sample.rows`, half by default)
  and drawn `count` times each; samples begin with nothing.
  """

  def __init__(self, split: str, settings: ml_collections.ConfigDict, every: str = '',
               shown: int = 6, samples: int = 24):
    """`settings` is `config.model.sample`; `shown` images are completed, `samples` drawn."""
    self.split, self.settings, self.every = split, settings, every
    self.shown, self.samples = shown, samples
    self._complete = self._sample = None

  def __call__(self, run, params, step) -> dict[str, float]:
    task, settings = run.plan.task, self.settings
    size = task.config.data.image_size
    given = sampling.given_rows(settings, size)
    if self._complete is None:
      complete = functools.partial(sampling.complete, task.model, settings=settings)
      key = lambda i: jax.random.fold_in(jax.random.key(task.config.seed), i)
      self._complete = lambda params, tokens: complete(
          params, tokens[:, :given * size].repeat(settings.count, axis=0), key(0))
      self._sample = lambda params: complete(
          params, np.zeros((self.samples, 0), np.int32), key(1))
    batch = next(run.batches(self.split))
    mask = run.plan.fetch(batch['mask'])[:self.shown] > 0
    # On every device the same few images: a part of a batch is no part of each device's.
    tokens = run.plan.fetch(batch['tokens'])[:self.shown][mask]
    if not len(tokens):
      return {}
    jit = functools.partial(run.jit, compiler_options=decode.compiler_options())
    completed, drawn = jax.device_get((
        jit(self._complete)(params, tokens), jit(self._sample)(params)))
    if run.writes:
      completed = completed.reshape(len(tokens), settings.count, -1)
      completions(task.image(tokens), task.image(completed), given, run.pictures /
                  'completions.png')
      samples(task.image(drawn), run.pictures / 'samples.png')
    return {}


def completions(originals: np.ndarray, completed: np.ndarray, given: int,
                path: pathlib.Path) -> None:
  """A row an image: the original, what was given, and what was drawn below it.

  Args:
    originals: uint8 `[images, size, size, channels]`, as the palette has them.
    completed: uint8 `[images, count, size, size, channels]`.
    given: rows given.
    path: the PNG to write.
  """
  images, count = completed.shape[:2]
  figure = Figure(figsize=(1.3 * (count + 2) + .2, 1.35 * images + .7), layout='constrained')
  cells = figure.subplots(images, count + 2, squeeze=False)
  for line, original, row in zip(cells, originals, completed):
    prompt = np.broadcast_to(original / 255, (*original.shape[:2], 3)).copy()
    prompt[given:] = _HIDDEN
    for axes, one in zip(line, (original, prompt, *row)):
      show(axes, one)
    for axes in line[2:]:
      axes.axhline(given - .5, color='tab:red', linewidth=.8, alpha=.6)
  cells[0, 0].set_title('original', fontsize=8)
  cells[0, 1].set_title('given (blue: not)', fontsize=8)
  for i in range(count):
    cells[0, i + 2].set_title(f'completion {i + 1}', fontsize=8)
  figure.suptitle('drawn below the red line', fontsize=9)
  figure.savefig(path, dpi=120)


def samples(drawn: np.ndarray, path: pathlib.Path, columns: int = 8) -> None:
  """A grid of uint8 `[images, size, size, channels]`, drawn without a prompt."""
  rows = -(-len(drawn) // columns)
  figure = Figure(figsize=(columns, rows + .4), layout='constrained')
  cells = figure.subplots(rows, columns, squeeze=False)
  for axes in cells.flat:
    axes.axis('off')
  for axes, one in zip(cells.flat, drawn):
    show(axes, one)
  figure.suptitle('images drawn from nothing', fontsize=9)
  figure.savefig(path, dpi=120)
