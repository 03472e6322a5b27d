"""Ranks against sorting, ties and numbers that are none, and the measures by hand."""

import types

import jax
import numpy as np
import pytest

from recsys import losses, ranking

ITEMS, ROWS, BATCH, NEGATIVES = 30, 35, 64, 6


def questions(seed=0):
  """Histories of 0 to 12 events, with repeats; some have the answer already."""
  rng = np.random.default_rng(seed)
  asked = []
  for i in range(BATCH):
    history = rng.integers(1, ITEMS + 1, rng.integers(0, 13)).astype(np.int32)
    answer = int(history[0]) if i % 4 == 0 and len(history) else int(rng.integers(1, ITEMS + 1))
    free = np.setdiff1d(np.arange(1, ITEMS + 1), np.append(history, answer))
    asked.append({'history': history, 'answer': answer,
                  'candidates': rng.permutation(free)[:NEGATIVES].astype(np.int32)})
  return asked


def batch_of(asked, room=13):
  seen = np.zeros((len(asked), room), np.int32)
  for row, question in zip(seen, asked):
    different = np.unique(question['history'])
    row[:len(different)] = different
  return {'seen': seen, 'answer': np.int32([q['answer'] for q in asked]),
          'candidates': np.stack([q['candidates'] for q in asked])}


ASKED = questions()
BATCH_OF = batch_of(ASKED)
ranks = jax.jit(lambda scores: ranking.ranks(scores, BATCH_OF, ITEMS))


def by_sorting(scores, question, protocol):
  """The answer's place in a list of candidates, best first, where it is the last of its equals."""
  candidates = {'full': range(1, ITEMS + 1),
                'unseen': set(range(1, ITEMS + 1)) - set(question['history'].tolist()),
                'pop6': question['candidates'].tolist()}[protocol]
  key = lambda item: -np.inf if np.isnan(scores[item]) else scores[item]
  answer = question['answer']
  listed = sorted({*candidates, answer}, key=lambda item: (-key(item), item == answer))
  return listed.index(answer)


@pytest.mark.parametrize('levels', [2, 5, 10 ** 6])
def test_ranks_are_places_in_a_sorted_list_with_many_ties(levels):
  scores = np.random.default_rng(levels).integers(0, levels, (BATCH, ROWS)).astype(np.float32)
  got = jax.device_get(ranks(scores))
  assert set(got) == {'full', 'unseen', 'pop6'}
  for i, question in enumerate(ASKED):
    want = {name: by_sorting(scores[i], question, name) for name in got}
    assert {name: int(values[i]) for name, values in got.items()} == want
    assert ranking.ranks_on_host(scores[i, :ITEMS + 1], question) == want
  assert (got['unseen'] < got['full']).any() and (got['pop6'] < got['unseen']).any()


@pytest.mark.parametrize('value', [0., -np.inf, np.inf, np.nan])
def test_scores_that_are_all_the_same_rank_last(value):
  """A model that says nothing is worth nothing."""
  scores = np.full((BATCH, ROWS), value, np.float32)
  got = jax.device_get(ranks(scores))
  assert (got['full'] == ITEMS - 1).all() and (got['pop6'] == NEGATIVES).all()
  for i, question in enumerate(ASKED):
    others = set(range(1, ITEMS + 1)) - {*question['history'].tolist(), question['answer']}
    assert got['unseen'][i] == len(others)
    assert ranking.ranks_on_host(scores[i, :ITEMS + 1], question) == {
        name: values[i] for name, values in got.items()}
  assert ranking.MEASURES['HR@10'](got['full']).sum() == 0


def test_no_number_is_worse_than_any_and_the_best_is_first():
  scores = np.random.default_rng(0).normal(size=(BATCH, ROWS)).astype(np.float32)
  rows = np.arange(BATCH)
  at = rows, BATCH_OF['answer']
  bad, best = scores.copy(), scores.copy()
  bad[at], best[at] = np.nan, 9.
  got = jax.device_get(ranks(bad))
  assert (got['full'] == ITEMS - 1).all() and (got['pop6'] == NEGATIVES).all()
  assert not any(values.any() for values in jax.device_get(ranks(best)).values())
  # Another item without a number is ahead of every answer.
  other = np.where(BATCH_OF['answer'] == 7, 8, 7)
  best[rows, other] = np.nan
  assert (jax.device_get(ranks(best))['full'] == 1).all()
  for i, question in enumerate(ASKED):
    assert ranking.ranks_on_host(bad[i, :ITEMS + 1], question)['full'] == ITEMS - 1
    assert ranking.ranks_on_host(best[i, :ITEMS + 1], question)['full'] == 1


def test_rows_that_are_no_items_never_count():
  scores = np.random.default_rng(0).normal(size=(BATCH, ROWS)).astype(np.float32)
  before = jax.device_get(ranks(scores))
  for value in (np.inf, np.nan):
    scores[:, 0] = scores[:, ITEMS + 1:] = value
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ranks(scores)), before)


def test_the_padding_of_what_was_seen_counts_nothing():
  scores = np.random.default_rng(0).normal(size=(BATCH, ROWS)).astype(np.float32)
  scores[:, 0] = np.inf
  wide = {**BATCH_OF, 'seen': np.pad(BATCH_OF['seen'], ((0, 0), (0, 5)))}
  jax.tree.map(np.testing.assert_array_equal, ranking.ranks(scores, wide, ITEMS), ranks(scores))


def test_ranks_in_chunks_are_the_same():
  scores = np.random.default_rng(0).integers(0, 5, (BATCH, ROWS)).astype(np.float32)
  names = sorted(BATCH_OF)
  some = lambda scores, *arrays: ranking.ranks(scores, dict(zip(names, arrays)), ITEMS)
  chunked = jax.jit(lambda scores: losses.in_chunks(
      some, 10, scores, *(BATCH_OF[name] for name in names)))
  jax.tree.map(np.testing.assert_array_equal, chunked(scores), ranks(scores))


def test_measures_by_hand():
  got = {name: measure(np.array([0, 1, 4, 5, 9, 10])).tolist()
         for name, measure in ranking.MEASURES.items()}
  assert got.keys() == {'HR@1', 'HR@5', 'HR@10', 'NDCG@5', 'NDCG@10', 'MRR'}
  assert [sum(got[f'HR@{k}']) for k in (1, 5, 10)] == [1, 3, 5]
  gains = [1, 1 / np.log2(3), 1 / np.log2(6), 1 / np.log2(7), 1 / np.log2(11), 0]
  np.testing.assert_allclose(got['NDCG@10'], gains)
  np.testing.assert_allclose(got['NDCG@5'], gains[:3] + [0, 0, 0])
  np.testing.assert_allclose(got['MRR'], [1, 1 / 2, 1 / 5, 1 / 6, 1 / 10, 1 / 11])


def test_evaluators_are_means_over_users():
  """However many come at a time."""
  scores = np.random.default_rng(3).normal(size=(BATCH, ROWS)).astype(np.float32)
  found = jax.device_get(ranks(scores))

  def run_map(fn, params, split):
    assert (fn, params, split) == ('ranks', 'params', 'validation')
    for start, stop in ((0, 50), (50, BATCH)):
      rows = {name: values[start:stop] for name, values in found.items()}
      yield {**rows, 'index': np.arange(start, stop)}
  task = types.SimpleNamespace(ranks='ranks', dataset={'validation': ASKED}.__getitem__)
  run = types.SimpleNamespace(map=run_map)
  got = ranking.LeaveOneOut(task, 'validation')(run, 'params', 3)
  assert got == pytest.approx({f'{protocol}/{name}': measure(values).mean()
                               for protocol, values in found.items()
                               for name, measure in ranking.MEASURES.items()})
  assert got['full/HR@10'] == np.mean(found['full'] < 10)
  fixed = scores[0, :ITEMS + 1]
  baseline = ranking.Baseline(task, 'validation', lambda history: fixed)(run, 'params', 3)
  same = jax.device_get(ranks(np.tile(scores[:1], (BATCH, 1))))
  assert baseline == pytest.approx({f'{protocol}/{name}': measure(values).mean()
                                    for protocol, values in same.items()
                                    for name, measure in ranking.MEASURES.items()})
