"""The embedded log: 4,000 users of 200 items, drawn from a model that is known.

What a user takes next depends on the last two items. With T1 and T2 the chances of what follows one
step and two steps after an item, and only among items that the user has not had,

  P(next = v) ~ .6 T1[last, v] + .4 T2[last but one, v];  T1[last, v] after one item, P0[v] at first

In T1 as in T2 six items follow each item, the k-th in proportion to 1 / 2^k, with 85% of the mass;
the rest is popularity P0. So the best scores that a model can give are known (`chances`). For the
last item of every user, among those that the user has not had, and a tie counted against the model:

                              HR@10   NDCG@10
  the true chances             .870      .585
  T1 of the last item alone    .631      .457
  how often items occur        .310      .160

The same log comes out on every platform and with every version of Python and numpy: draws are from
`random.random()`, and sums that decide are made from left to right.
"""

import functools
import random

import ml_collections
import numpy as np

from recsys import interactions, logs

ITEMS, USERS = 200, 4000
SHORTEST, LONGEST = 8, 24  # Events of a user.

_SEED = 'markov'
_FOLLOWERS = 6
_FLOOR = .15  # Of the mass of a transition is popularity.


@functools.cache
def world() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """P0 float64 `[items]`, T1 and T2 float64 `[items, items]`, by the numbers in items' names."""
  popularity = _normalized(1 / (np.arange(ITEMS) + 5.))
  rng = random.Random(f'{_SEED} world')
  return popularity, _transitions(rng, popularity), _transitions(rng, popularity)


def _transitions(rng: random.Random, popularity: np.ndarray) -> np.ndarray:
  shares = _normalized(1 / 2 ** np.arange(_FOLLOWERS))
  rows = np.tile(_FLOOR * popularity, (ITEMS, 1))
  for item in range(ITEMS):
    left = popularity.copy()
    left[item] = 0
    for share in shares:
      follower = _draw(rng, left)
      left[follower] = 0
      rows[item, follower] += (1 - _FLOOR) * share
  return rows


def _normalized(weights: np.ndarray) -> np.ndarray:
  return weights / np.cumsum(weights)[-1]  # np.sum adds in an order of its own.


def _draw(rng: random.Random, weights: np.ndarray) -> int:
  """An index in proportion to its weight."""
  sums = np.cumsum(weights)
  return int(np.searchsorted(sums, rng.random() * sums[-1], side='right'))


def _weights(history: list[int]) -> np.ndarray:
  """What the next item is drawn in proportion to, float64 `[items]`, by the numbers in names."""
  popularity, one_step, two_steps = world()
  if not history:
    return popularity
  if len(history) == 1:
    weights = one_step[history[0]].copy()
  else:
    weights = .6 * one_step[history[-1]] + .4 * two_steps[history[-2]]
  weights[history] = 0
  return weights


@functools.cache
def log() -> logs.Log:
  """The log; its items are called 'item 000' (the most popular by P0) to 'item 199'."""
  rng = random.Random(f'{_SEED} users')
  users, items = [], []
  for user in range(USERS):
    history: list[int] = []
    for _ in range(SHORTEST + int(rng.random() * (LONGEST - SHORTEST + 1))):
      history.append(_draw(rng, _weights(history)))
    users += [f'user {user:04d}'] * len(history)
    items += [f'item {item:03d}' for item in history]
  everything = ml_collections.ConfigDict(dict(core=0, min_item_count=0, min_length=0))
  return logs.build(interactions.Table(users, items, None), everything)


def chances(history: np.ndarray, log: logs.Log) -> np.ndarray:
  """The true distribution of the next item: no scores rank better.

  Args:
    history: int `[events]`, what the user had so far, the oldest first, in ids of `log`; may be
      empty.
    log: what `log()` returns.

  Returns:
    float64 `[items + 1]`, of sum 1; 0 for id 0 and for what the user had.
  """
  numbers = np.array([int(name.removeprefix('item ')) for name in log.items])
  weights = _weights(numbers[np.asarray(history, np.int64) - 1].tolist())
  return np.append(0, _normalized(weights)[numbers])
