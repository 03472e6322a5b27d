"""Alias tables: the distribution that they imply, against weights / sum."""

import numpy as np
import pytest

from graph import alias

RNG = np.random.default_rng(0)
CASES = {
    'one': [3.], 'even': np.ones(7), 'two': [1e-3, 1.], 'by hand': [1., 2., 5.],
    'random': RNG.random(1000), 'zeros': RNG.random(500) * (RNG.random(500) < .3),
    'one of many': np.eye(1, 50, 17)[0], 'first and last are zero': [0., 2., 0., 1., 0.],
    'heavy tails': RNG.pareto(.4, 2000), 'light first': np.sort(RNG.lognormal(0, 4, 999)),
    'heavy first': np.sort(RNG.lognormal(0, 4, 999))[::-1], 'tiny': RNG.random(30) * 1e-30,
    'huge': RNG.random(30) * 1e30, 'counts': RNG.integers(0, 9, 300), 'thirds': np.full(3, .1)}


@pytest.mark.parametrize('name', CASES)
def test_the_table_is_the_distribution(name):
  weights = np.asarray(CASES[name])
  accept, other = alias.tables(weights)
  n = len(weights)
  assert accept.dtype == np.float32 and other.dtype == np.int32
  assert accept.shape == other.shape == (n,)
  assert (accept >= 0).all() and (accept <= 1).all() and ((other >= 0) & (other < n)).all()
  implied = np.bincount(other, 1 - accept.astype(np.float64), n) + accept
  share = weights / weights.sum(dtype=np.float64)
  # A chance of float32 in each of the columns that a node is in.
  columns = np.bincount(other, minlength=n) + 1
  assert (abs(implied / n - share) <= columns * 2. ** -24 / n).all()
  # What has no weight is never drawn.
  assert not implied[weights == 0].any()
