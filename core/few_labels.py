"""Small labelled sets drawn from a large one."""

import numpy as np

from core.config import UserError


def draw_support(labels: np.ndarray, num_classes: int, shots: tuple[int, ...],
                 seed: int) -> dict[int, np.ndarray]:
  """Draws examples of every class; those of fewer shots are among those of more.

  Args:
    labels: int `[examples]` of the pool.
    num_classes: classes are 0 to num_classes - 1.
    shots: examples a class.
    seed: of the draw.

  Returns:
    For each number of shots, indices int `[classes * shots]` into the pool.

  Raises:
    UserError: a class has fewer examples than the most shots; it names class and count.
  """
  rng = np.random.default_rng(seed)
  shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]
  scarce = min(range(num_classes), key=lambda c: len(shuffled[c]))
  if len(shuffled[scarce]) < max(shots):
    raise UserError(f'few-shot: class {scarce} has {len(shuffled[scarce])} of the '
                    f'{len(labels)} training examples, fewer than {max(shots)} shots; give a '
                    'larger part of the split in config.data.splits, or fewer shots')
  return {k: np.concatenate([indices[:k] for indices in shuffled]) for k in shots}
