import numpy as np
import pytest

from core.config import UserError
from core.data import buckets, pipeline
from tests.core.data import examples

SIZES, ROWS = (4, 2, 4), ((0, 1, 2, 3), (0, 1), (0, 1, 2, 3))


class Lengths(examples.Numbers):
  """Example i is of bucket i % 2; there is nothing in bucket 2."""

  @property
  def buckets(self):
    return np.arange(len(self)) % 2

  def __repr__(self):
    return 'Lengths()'


def of_its_length(example, rng):
  number = example['number']
  return {'number': np.full(2 + number % 2, number), 'noise': rng.random(2)}


def stream(steps=30, n=19, rows=ROWS, **kw):
  kw = {'seed': 5, **kw}
  made = pipeline.bucket_stream(Lengths(n), of_its_length, batch_sizes=SIZES, rows=rows, **kw)
  return examples.take(made, steps)


def test_a_round_visits_every_bucket_in_its_share():
  schedule = buckets.Schedule([10, 9, 0], [4, 2, 4], seed=0)  # 2.5 -> 2 batches, 4.5 -> 4
  rounds = [[schedule.at(6 * r + i) for i in range(6)] for r in range(4)]
  for number, found in enumerate(rounds):
    assert sorted(b for b, _ in found) == [0, 0, 1, 1, 1, 1]
    for bucket, share in ((0, 2), (1, 4)):
      assert [k for b, k in found if b == bucket] == list(
          range(number * share, (number + 1) * share)), 'no batch twice, none left out'
  assert len({tuple(b for b, _ in found) for found in rounds}) > 1, 'every round has its own order'
  again = buckets.Schedule([10, 9, 0], [4, 2, 4], seed=0)
  assert [again.at(i) for i in (23, 0, 17)] == [schedule.at(i) for i in (23, 0, 17)]


def test_batches_hold_examples_of_one_bucket_and_each_once_a_pass():
  seen = {0: [], 1: []}
  for bucket, batch in stream(steps=60):
    assert batch['number'].shape == (SIZES[bucket], 2 + bucket)
    assert batch['mask'].tolist() == [1] * SIZES[bucket]
    assert (batch['number'] % 2 == bucket).all()
    seen[bucket] += batch['number'][:, 0].tolist()
  for bucket, members in seen.items():
    count = len(range(bucket, 19, 2))
    for start in range(0, len(members) - count, count):
      assert sorted(members[start:start + count]) == list(range(bucket, 19, 2))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_any_start_and_any_part_of_the_rows_give_the_same_batches(workers):
  whole = stream()
  later = stream(steps=12, start_step=18, workers=workers)
  assert [b for b, _ in later] == [b for b, _ in whole[18:]]
  examples.assert_same([x for _, x in later], [x for _, x in whole[18:]])
  first, second = (stream(rows=rows) for rows in (((0, 1), (0,), (0, 1)), ((2, 3), (1,), (2, 3))))
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for (_, a), (_, b) in zip(first, second)]
  examples.assert_same(joined, [x for _, x in whole])


def test_the_seed_decides():
  assert [b for b, _ in stream()] != [b for b, _ in stream(seed=6)]


def test_the_first_batch_again_and_again():
  (bucket, first), *rest = stream(steps=5, start_step=7, reuse_batch=True)
  assert all(b == bucket for b, _ in rest)
  examples.assert_same([x for _, x in rest], [first] * 4)


def test_one_bucket_is_the_plain_stream():
  made = pipeline.bucket_stream(
      examples.Numbers(23), examples.with_noise, batch_sizes=[8], rows=[range(8)], seed=3)
  found = examples.take(made, 9)
  assert {b for b, _ in found} == {0}
  examples.assert_same([x for _, x in found], examples.train(range(8)))


def test_evaluation_reads_the_chosen_examples_once_in_order():
  made = pipeline.eval_stream(Lengths(19), of_its_length, batch_size=4, rows=range(4),
                              indices=np.arange(1, 19, 2))
  found = examples.take(made, 3)
  index = np.concatenate([x['index'] for x in found])
  assert index.tolist() == [*range(1, 19, 2), -1, -1, -1]
  assert np.concatenate([x['mask'] for x in found]).sum() == 9


def test_an_empty_source_is_an_error():
  with pytest.raises(UserError, match='is empty'):
    stream(n=0)
