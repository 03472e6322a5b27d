"""Alias tables: drawing from any distribution with two random numbers (Walker, 1977)."""

import numpy as np


def tables(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Builds the table of one distribution.

  Column j is drawn uniformly; it gives j with the chance `accept[j]`, else `alias[j]`. Light
  columns are filled up by heavy ones in order: which one fills which follows from where their
  running sums of what lacks and what is left over meet, so there is no loop over columns.

  Args:
    weights: float `[n]`, none negative, some positive.

  Returns:
    accept float32 `[n]` and alias int32 `[n]`.
  """
  share = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64) * len(weights)
  light, heavy = np.flatnonzero(share < 1), np.flatnonzero(share >= 1)
  accept, alias = np.minimum(share, 1), np.arange(len(share))
  if len(light) and len(heavy):
    lacks, spare = np.cumsum(1 - share[light]), np.cumsum(share[heavy] - 1)
    before = np.append(0, lacks[:-1])
    # The first heavy column with something left when everything lighter before it is filled.
    alias[light] = heavy[np.minimum(np.searchsorted(spare, before, 'right'), len(heavy) - 1)]
    # A heavy column gives more than it can spare when it fills its last light one, and is then
    # filled up by the next heavy one.
    filled = np.searchsorted(before, spare, 'left')
    given = np.append(0, lacks)[filled]
    accept[heavy] = np.clip(1 + spare - given, 0, 1)
    alias[heavy[:-1]] = heavy[1:]
    accept[heavy[-1]] = 1
  return accept.astype(np.float32), alias.astype(np.int32)
