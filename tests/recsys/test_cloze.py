"""What is masked: how many, which, and that nothing else changes."""

import functools
import math

import jax
import numpy as np
import pytest

from recsys import cloze

MASK, LENGTH = 99, 60
# Every length from none to all, padded on the right and on the left.
ITEMS = np.zeros((2, LENGTH + 1, LENGTH), np.int32)
for _n in range(LENGTH + 1):
  ITEMS[0, _n, :_n] = ITEMS[1, _n, LENGTH - _n:] = np.random.default_rng(_n).integers(1, 90, _n)
ITEMS = ITEMS.reshape(-1, LENGTH)
COUNTS = (ITEMS > 0).sum(1)


@functools.cache
def masker(rate, slots, **more):
  return jax.jit(lambda rng, items: cloze.mask_items(rng, items, MASK, rate=rate, slots=slots,
                                                     **dict(more)))


def run(rate, slots, items=ITEMS, seed=0, **more):
  return jax.device_get(masker(rate, slots, **more)(jax.random.key(seed), items))


def check(puzzle, items):
  """Labels are what was there, all of them are masked, and nothing else is changed."""
  hidden = np.zeros(items.shape, bool)
  for row, slots, labels, weights in zip(hidden, puzzle.slots, puzzle.labels, puzzle.weights):
    assert set(weights) <= {0., 1.}
    row[slots[weights > 0]] = True
    assert row.sum() == weights.sum(), 'a position is asked twice'
    assert not labels[weights == 0].any()
  assert (items[hidden] > 0).all(), 'padding is masked'
  assert not puzzle.weights[~items.any(1)].any() and (~items.any(1)).any()
  np.testing.assert_array_equal(puzzle.items, np.where(hidden, MASK, items))
  np.testing.assert_array_equal(
      puzzle.labels, np.take_along_axis(items, puzzle.slots, 1) * (puzzle.weights > 0))
  return hidden


# Of Beauty, of Steam, and one where a product in float32 is rounded otherwise (.7 of 45).
@pytest.mark.parametrize('rate, most', [(.6, 60), (.4, 20), (.7, 50)])
def test_a_fixed_number_is_masked(rate, most):
  puzzle = run(rate, most)
  check(puzzle, ITEMS)
  want = [min(most, max(1, math.floor(int(n) * rate + .5))) if n else 0 for n in COUNTS]
  np.testing.assert_array_equal(puzzle.weights.sum(1), want)
  assert max(want) == cloze.max_masks(LENGTH, rate, most)


@pytest.mark.parametrize('length, rate, most, slots', [
    (50, .6, 30, 30), (50, .4, 20, 20), (200, .2, 40, 40), (200, .2, 20, 20), (8, .6, 30, 5),
    (2, .2, 40, 1), (3, .5, 40, 2), (1, 1., 40, 1)])
def test_slots_are_as_many_as_are_ever_masked(length, rate, most, slots):
  assert cloze.max_masks(length, rate, most) == slots


def test_every_position_is_as_likely_and_draws_differ():
  items = np.zeros((6001, 15), np.int32)
  items[:6000, 2:12] = np.arange(1, 11)
  puzzle = run(.3, 3, items)
  hidden = check(puzzle, items)[:6000]
  assert not hidden[:, :2].any() and not hidden[:, 12:].any()
  # 3 of 10: five standard deviations of a share of 6000. Pairs too: 3 * 2 / (10 * 9).
  spread = lambda p: 5 * np.sqrt(p * (1 - p) / 6000)
  np.testing.assert_allclose(hidden[:, 2:12].mean(0), .3, atol=spread(.3))
  inside = hidden[:, 2:12].astype(float)
  pairs = (inside.T @ inside / 6000)[np.triu_indices(10, 1)]
  np.testing.assert_allclose(pairs, 1 / 15, atol=spread(1 / 15))
  np.testing.assert_array_equal(run(.3, 3, items).slots, puzzle.slots)
  assert (run(.3, 3, items, seed=1).slots != puzzle.slots).any()


def test_bernoulli_masks_each_item_with_its_chance():
  items = np.repeat(ITEMS, 20, axis=0)
  hidden = check(run(.15, LENGTH, items, masking='bernoulli'), items)
  total = (items > 0).sum()
  assert abs(hidden.sum() / total - .15) < 5 * np.sqrt(.15 * .85 / total)
  # The number in a sequence is binomial: its variance is n p (1 - p), and none is possible.
  counts = np.repeat(COUNTS, 20)
  long = counts > 30
  scaled = (hidden.sum(1) - .15 * counts)[long] / np.sqrt(.15 * .85 * counts[long])
  assert abs(scaled.var() - 1) < 5 * np.sqrt(2 / long.sum())
  assert (hidden.sum(1)[counts == 3] == 0).any()
  # What exceeds the slots stays.
  few = check(run(.15, 4, items, masking='bernoulli'), items).sum(1)
  np.testing.assert_array_equal(few, np.minimum(hidden.sum(1), 4))


def test_a_share_has_only_its_last_item_masked():
  items = np.repeat(ITEMS, 20, axis=0)
  hidden = check(run(.3, 18, items, last_share=1 / 11), items)
  last = LENGTH - 1 - (items[:, ::-1] > 0).argmax(1)
  # The others of these have three masked at least.
  some = np.repeat(COUNTS, 20) > 9
  only = ((hidden.sum(1) == 1) & hidden[np.arange(len(items)), last])[some]
  assert (hidden.sum(1)[some][~only] >= 3).all()
  expected = 1 / 11
  assert abs(only.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(only))
  left = items[some, -1] > 0
  assert only[left].any() and only[~left].any()
  # All of them.
  always = run(.3, 18, items, last_share=1.)
  check(always, items)
  there = items.any(1)
  np.testing.assert_array_equal(always.weights.sum(1), there)
  np.testing.assert_array_equal(always.slots[there, 0], last[there])


def test_each_item_is_followed_by_the_next():
  items = np.int32([[1, 2, 3, 0, 0], [0, 0, 4, 5, 6], [0] * 5, [7, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
  puzzle = jax.device_get(cloze.next_items(items))
  np.testing.assert_array_equal(puzzle.items, items[:, :4])
  np.testing.assert_array_equal(puzzle.slots, [[0, 1, 2, 3]] * 5)
  np.testing.assert_array_equal(puzzle.labels, [[2, 3, 0, 0], [0, 0, 5, 6], [0] * 4, [0] * 4,
                                                [2, 3, 4, 5]])
  np.testing.assert_array_equal(puzzle.weights, puzzle.labels > 0)
