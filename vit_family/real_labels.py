"""ImageNet-ReaL: validation images with every label that fits them (arXiv 2006.07159).

The labels are a file `real.json` that its authors publish: for each of ILSVRC2012's validation
images, in the order of their file names, the list of its classes. An answer counts as right when it
is in that list; images with an empty list are left out of the mean.
"""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from core.config import UserError

CLASSES = 1000

_FILE_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\.JPEG')
_TRAINING = re.compile(r'n\d{8}_\d+\.JPEG')


def real_index(file_name: str | bytes) -> int:
  """Position of an image among the labels: 292 for 'ILSVRC2012_val_00000293.JPEG'.

  Training images ('n01440764_18.JPEG') have no such label: -1.

  Raises:
    UserError: not the name of an ILSVRC2012 image.
  """
  text = file_name.decode('utf-8', 'replace') if isinstance(file_name, bytes) else file_name
  if _TRAINING.fullmatch(text):
    return -1
  match = _FILE_NAME.fullmatch(text)
  if not match or int(match[1]) == 0:
    raise UserError(f'file_name {text!r} is not that of an ILSVRC2012 validation image, such as '
                    "'ILSVRC2012_val_00000293.JPEG'; config.data.real_labels needs imagenet2012's "
                    'validation split')
  return int(match[1]) - 1


def load(path: str | pathlib.Path) -> list[frozenset[int]]:
  """Reads the labels: for each image its set of classes, which may be empty.

  Raises:
    UserError: no such file, or not a JSON list of lists of class numbers below 1,000.
  """
  try:
    lists = json.loads(pathlib.Path(path).expanduser().read_text('utf-8'))
  except OSError as e:
    raise UserError(f'config.data.real_labels={str(path)!r}: {e.strerror}; give the real.json of '
                    'ImageNet-ReaL') from e
  except ValueError as e:  # Neither JSON nor even UTF-8.
    raise UserError(f'{path} is not JSON: {e}') from e
  if not isinstance(lists, list) or not lists:
    raise UserError(f'{path} is not a list with an entry for each image')
  for position, classes in enumerate(lists):
    # `type`, because True is an int to Python.
    if not isinstance(classes, list) or not all(
        type(c) is int and 0 <= c < CLASSES for c in classes):
      raise UserError(f'{path}: entry {position} is {str(classes)[:60]}, not a list of classes '
                      f'between 0 and {CLASSES - 1}')
  return [frozenset(classes) for classes in lists]


class ReaL:
  """Evaluator: the share of images whose best class is one of their labels, as `top1`.

  The batch must hold `real_index`, int32 `[batch]` (see the function); the model's classes are
  those of ImageNet-1k in their usual order.
  """

  def __init__(self, split: str, labels_path: str, every: str = ''):
    """Reads the labels, so that a wrong file is noticed before any training.

    Args:
      split: key of `config.data.splits`.
      labels_path: the file `real.json`.
      every: when it runs.

    Raises:
      UserError: the file is missing or malformed.
    """
    self.split, self.every = split, every
    self._path, self._labels = labels_path, load(labels_path)
    self._fn = None

  def __call__(self, run, params, step: int) -> dict[str, float]:
    task = run.plan.task
    if 'real_index' not in task.batch_spec(1):
      raise UserError('ImageNet-ReaL needs the place of each image among its labels, real_index '
                      'in the batch; set config.data.real_labels')
    if task.num_classes != CLASSES:
      raise UserError(f'ImageNet-ReaL has {CLASSES} classes, the model {task.num_classes}')
    if self._fn is None:
      self._fn = lambda params, batch: {
          'class': jnp.argmax(task.logits(params, batch), -1), 'index': batch['real_index']}
    parts = list(run.map(self._fn, params, self.split))
    predicted, index = (np.concatenate([part[k] for part in parts]) for k in ('class', 'index'))
    if index.min() < 0:
      raise UserError(f'split {self.split!r} has training images, which ImageNet-ReaL does not '
                      "label; set config.data.splits.test to 'validation'")
    if index.max() >= len(self._labels):
      raise UserError(f'{self._path} has labels of {len(self._labels)} images; split '
                      f'{self.split!r} has image {index.max() + 1}')
    return {'top1': accuracy(predicted, [self._labels[i] for i in index])}


def accuracy(predicted: np.ndarray, labels: list[frozenset[int]]) -> float:
  """Share of `predicted`, int `[n]`, that is among the labels, over images that have any.

  Raises:
    UserError: no image has a label.
  """
  right = [int(answer) in classes for answer, classes in zip(predicted, labels, strict=True)
           if classes]
  if not right:
    raise UserError('ImageNet-ReaL: no image of the split has a label')
  return float(np.mean(right))
