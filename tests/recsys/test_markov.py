"""The embedded log against the model that it is said to come from."""

import hashlib

import numpy as np
import pytest
import scipy.stats

from recsys import markov


@pytest.fixture(name='log', scope='module')
def _log():
  return markov.log()


def numbers(log):
  """In the world, of the ids from 1: int64 `[items]`."""
  return np.array([int(name.split()[1]) for name in log.items])


def from_the_formula(history):
  """The docstring of `recsys.markov`, item by item; by numbers in the world."""
  popularity, one_step, two_steps = markov.world()
  found = []
  for v in range(200):
    if v in history:
      found.append(0)
    elif not history:
      found.append(popularity[v])
    elif len(history) == 1:
      found.append(one_step[history[-1]][v])
    else:
      found.append(.6 * one_step[history[-1]][v] + .4 * two_steps[history[-2]][v])
  return np.array(found) / sum(found)


def test_the_log_is_what_it_was(log):
  assert log is markov.log()
  text = '\n'.join([*log.users, *log.items]).encode()
  digest = hashlib.sha256(log.events.astype('<i4').tobytes() + log.starts.astype('<i8').tobytes()
                          + text)
  # Published numbers are of this log: another one is another data set.
  assert digest.hexdigest() == 'dd245c2d90e04b3b9c544d5d617defdcb7b9cc9db746392df5153880b3b7f8d9'


def test_sizes_and_no_item_twice(log):
  assert len(log) == 4000 and len(log.items) == 200 and sorted(numbers(log)) == list(range(200))
  lengths = np.diff(log.starts)
  observed = np.bincount(lengths, minlength=25)[8:]
  assert len(observed) == 17  # 8 to 24, all as likely.
  assert scipy.stats.chisquare(observed).pvalue > .001
  assert all(len(set(log.sequence(u).tolist())) == lengths[u] for u in range(len(log)))


def test_the_world():
  popularity, one_step, two_steps = markov.world()
  ranks = np.arange(200)
  np.testing.assert_allclose(popularity, 1 / (ranks + 5) / np.sum(1 / (ranks + 5)), rtol=1e-12)
  assert not np.array_equal(one_step, two_steps)
  for rows in (one_step, two_steps):
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
    followers = (rows - .15 * popularity) / .85
    np.testing.assert_allclose(np.diag(followers), 0, atol=1e-12)
    want = np.array([0] * 194 + [1, 2, 4, 8, 16, 32]) / 63
    np.testing.assert_allclose(np.sort(followers), np.tile(want, (200, 1)), atol=1e-12)


@pytest.mark.parametrize('length', [0, 1, 2, 3, 23])
def test_chances_are_the_formula(log, length):
  users = np.flatnonzero(np.diff(log.starts) >= length)[:20]
  for user in users:
    history = log.sequence(user)[:length]
    found = markov.chances(history, log)
    assert found.dtype == np.float64 and found.shape == (201,) and found[0] == 0
    assert abs(found.sum() - 1) < 1e-12 and not found[history].any()
    want = from_the_formula(numbers(log)[history - 1].tolist())
    np.testing.assert_allclose(found[1:], want[numbers(log)], rtol=1e-12)


def test_first_items_are_as_frequent_as_their_chances(log):
  observed = np.bincount(log.events[log.starts[:-1]], minlength=201)[1:]
  expected = markov.chances(np.zeros(0, int), log)[1:] * len(log)
  assert scipy.stats.chisquare(observed, expected).pvalue > .001


def surprise(log, chances_of):
  """How far log-likelihoods are from what is expected of them, in standard deviations."""
  away, variance = 0., 0.
  for user in range(0, len(log), 4):
    sequence = log.sequence(user)
    for place in range(2, len(sequence), 3):
      chances = chances_of(sequence[:place])
      logs = np.log(np.where(chances > 0, chances, 1))
      mean = chances @ logs
      away += logs[sequence[place]] - mean
      variance += chances @ logs ** 2 - mean ** 2
  return away / variance ** .5


def test_next_items_are_as_likely_as_their_chances(log):
  assert abs(surprise(log, lambda history: markov.chances(history, log))) < 3.5
  # That this is a test: the last two items the other way round do not explain the log.
  swapped = lambda h: markov.chances(np.append(h[:-2], h[-1:-3:-1]), log)
  assert abs(surprise(log, swapped)) > 20


def test_scores_of_the_docstring(log):
  one_step = markov.world()[1][np.ix_(numbers(log), numbers(log))]
  by_chances, by_last, by_count = [], [], []
  for user in range(len(log)):
    *history, target = log.sequence(user)
    for ranks, scores in ((by_chances, markov.chances(np.array(history), log)),
                          (by_last, np.append(0, one_step[history[-1] - 1])),
                          (by_count, log.counts.astype(float))):
      scores[[0, *history]] = -1
      ranks.append((scores >= scores[target]).sum() - 1)
  for ranks, hits, gain in ((by_chances, .870, .585), (by_last, .631, .457),
                            (by_count, .310, .160)):
    ranks = np.array(ranks)
    assert round((ranks < 10).mean(), 3) == hits
    assert round(((ranks < 10) / np.log2(ranks + 2)).mean(), 3) == gain
