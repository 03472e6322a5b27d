"""The order of data, and its independence of processes and restarts."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import UserError
from core.data import devices
from core.data import pipeline
from tests.core.data.examples import Numbers, assert_same, take, train, with_noise


def fails_on_seven(example, rng):
  if example['number'] == 7:
    raise UserError('seven is not allowed')
  return with_noise(example, rng)


def cut(batches, rows):
  return [{name: array[list(rows)] for name, array in batch.items()} for batch in batches]


# --- Training ------------------------------------------------------------------------------------


def test_every_epoch_has_every_example_once_in_another_order():
  batches = train(range(8), n=24, steps=9)
  numbers = np.concatenate([b['number'] for b in batches]).reshape(3, 24)
  for epoch in numbers:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(24))
  assert len({tuple(epoch) for epoch in numbers}) == 3
  noise = np.concatenate([b['noise'] for b in batches])
  assert len(np.unique(noise, axis=0)) == len(noise)  # Augmented anew in every epoch.
  for batch in batches:
    np.testing.assert_array_equal(batch['mask'], np.ones(8, np.float32))
    assert batch['mask'].dtype == np.float32


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('layout', ['blocks', 'strided', 'shared'])
def test_global_batches_do_not_depend_on_the_processes(processes, layout):
  whole = train(range(8))
  for p in range(processes):
    per = 8 // processes
    rows = {'blocks': range(p * per, (p + 1) * per), 'strided': range(p, 8, processes),
            # As on a mesh with a model axis: neighbouring processes hold the same rows.
            'shared': range(p // 2 * 4, p // 2 * 4 + 4)}[layout]
    assert_same(train(rows), cut(whole, rows))


@pytest.mark.parametrize('start', range(9))
def test_restart_at_any_step_at_another_process_count(start):
  whole = train(range(8))
  for rows in (range(8), range(4), range(4, 8)):
    assert_same(train(rows, start_step=start, steps=9 - start), cut(whole[start:], rows))


def test_threads_do_not_change_the_order():
  assert_same(train(range(8), threads=1), train(range(8), threads=7))


def test_far_restart_is_immediate():
  begin = time.monotonic()
  batch, = train(range(8), start_step=10**12, steps=1)
  assert len(batch['number']) == 8
  assert time.monotonic() - begin < 30  # Imports included; walking there takes days.


def test_batch_larger_than_the_data():
  batch, = train(range(64), n=5, batch_size=64, steps=1)
  assert np.bincount(batch['number'][:60]).tolist() == [12] * 5


def test_seeds_differ_and_do_not_share_orders():
  orders = set()
  for seed in range(4):
    numbers = np.concatenate([b['number'] for b in train(range(8), n=24, steps=9, seed=seed)])
    orders |= {tuple(epoch) for epoch in numbers.reshape(3, 24)}
  assert len(orders) == 12
  big = train(range(8), seed=2**40, steps=1)
  assert not np.array_equal(big[0]['number'], train(range(8), seed=0, steps=1)[0]['number'])


def test_reuse_batch():
  first = train(range(8), steps=1)
  assert_same(train(range(8), steps=4, reuse_batch=True), first * 4)


def test_broken_examples_are_replaced_by_the_next_good_one():
  kw = dict(batch_size=8, rows=range(8), seed=0)
  good = take(pipeline.train_stream(Numbers(24), with_noise, **kw), 3)
  bad = take(pipeline.train_stream(Numbers(24, broken=(5, 6, 23)), with_noise, **kw), 3)
  for g, b in zip(good, bad):
    want = [{5: 7, 6: 7, 23: 0}.get(n, n) for n in g['number'].tolist()]
    np.testing.assert_array_equal(b['number'], want)
    np.testing.assert_array_equal(b['noise'], g['noise'])
    np.testing.assert_array_equal(b['mask'], g['mask'])


def test_nothing_but_broken_examples_is_a_user_error():
  stream = pipeline.train_stream(Numbers(3, broken=range(3)), with_noise, batch_size=2,
                                 rows=range(2), seed=0)
  with pytest.raises(UserError, match='3 examples in a row.*is broken'):
    take(stream, 1)


def test_empty_source_and_wrong_rows():
  for make in (lambda s, r: pipeline.train_stream(s, with_noise, batch_size=4, rows=r, seed=0),
               lambda s, r: pipeline.eval_stream(s, with_noise, batch_size=4, rows=r)):
    with pytest.raises(UserError, match='is empty'):
      make(Numbers(0), range(4))
    for rows in ([], [4], [-1]):
      with pytest.raises(ValueError, match='rows must be'):
        make(Numbers(5), rows)


def test_errors_of_a_transform_reach_the_consumer():
  stream = pipeline.train_stream(Numbers(10), fails_on_seven, batch_size=10, rows=range(10), seed=0)
  with pytest.raises(UserError, match='seven is not allowed'):
    take(stream, 1)


@pytest.mark.slow
def test_workers_give_the_same_batches():
  whole = train(range(8))
  assert_same(train(range(8), workers=2), whole)
  assert_same(train(range(2, 6), workers=2, start_step=4, steps=5), cut(whole[4:], range(2, 6)))
  want = list(pipeline.eval_stream(Numbers(11), with_noise, batch_size=4, rows=[1, 3]))
  got = list(pipeline.eval_stream(Numbers(11), with_noise, batch_size=4, rows=[1, 3], workers=2))
  assert_same(got, want)
  # Arrays on devices outlive the memory that workers share with us.
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  stream = pipeline.train_stream(Numbers(23), with_noise, batch_size=8, rows=range(8), seed=3,
                                 workers=1)
  with devices.prefetch(stream, lambda b: devices.to_device(b, sharding, 8, range(8))) as batches:
    kept = [next(batches) for _ in range(9)]
  assert_same(jax.device_get(kept), whole)


@pytest.mark.slow
def test_errors_in_workers_reach_the_consumer():
  stream = pipeline.train_stream(Numbers(10), fails_on_seven, batch_size=10, rows=range(10), seed=0,
                                 workers=1)
  with pytest.raises(UserError, match='seven is not allowed'):
    take(stream, 1)


# --- Evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 3, 8, 9, 16, 23])
@pytest.mark.parametrize('batch_size, processes', [(1, 1), (4, 1), (4, 2), (8, 4), (32, 8)])
def test_eval_counts_every_example_once(n, batch_size, processes):
  per = batch_size // processes
  parts = [list(pipeline.eval_stream(Numbers(n), with_noise, batch_size=batch_size,
                                     rows=range(p * per, (p + 1) * per)))
           for p in range(processes)]
  steps = -(-n // batch_size)
  assert [len(part) for part in parts] == [steps] * processes
  whole = [{name: np.concatenate([part[s][name] for part in parts]) for name in parts[0][s]}
           for s in range(steps)]
  mask = np.concatenate([b['mask'] for b in whole])
  index = np.concatenate([b['index'] for b in whole])
  number = np.concatenate([b['number'] for b in whole])
  assert mask.dtype == np.float32 and index.dtype == np.int32
  np.testing.assert_array_equal(index[mask > 0], np.arange(n))
  np.testing.assert_array_equal(number[mask > 0], np.arange(n))
  assert (index[mask == 0] == -1).all() and (number[mask == 0] == 0).all()
  assert mask.sum() == n and len(mask) == steps * batch_size


def test_eval_randomness_belongs_to_the_example():
  def noise(batch_size):
    batches = list(pipeline.eval_stream(Numbers(10), with_noise, batch_size=batch_size,
                                        rows=range(batch_size)))
    return np.concatenate([b['noise'][b['mask'] > 0] for b in batches])
  np.testing.assert_array_equal(noise(3), noise(7))
  assert len(np.unique(noise(3), axis=0)) == 10


def test_eval_masks_broken_examples():
  batches = list(pipeline.eval_stream(Numbers(6, broken=(0, 4)), with_noise, batch_size=4,
                                      rows=range(4)))
  np.testing.assert_array_equal(np.stack([b['mask'] for b in batches]),
                                [[0, 1, 1, 1], [0, 1, 0, 0]])
  np.testing.assert_array_equal(np.stack([b['index'] for b in batches]),
                                [[-1, 1, 2, 3], [-1, 5, -1, -1]])


# --- Specification -------------------------------------------------------------------------------

SPEC = {'image': jax.ShapeDtypeStruct((64, 4, 4, 3), jnp.float32),
        'label': jax.ShapeDtypeStruct((64,), jnp.int32),
        'mask': jax.ShapeDtypeStruct((64,), jnp.float32)}


def good_batch(**changes):
  batch = {'image': np.zeros((8, 4, 4, 3), np.float32), 'label': np.zeros(8, np.int32),
           'mask': np.ones(8, np.float32), **changes}
  return {name: array for name, array in batch.items() if array is not None}


def test_check_against_spec_accepts_local_rows_and_pipeline_arrays():
  pipeline.check_against_spec(good_batch(), SPEC)
  pipeline.check_against_spec(good_batch(index=np.zeros(8, np.int32)), SPEC)


@pytest.mark.parametrize('changes, words', [
    ({'label': None}, "no array 'label'.*it has image, mask"),
    ({'boxes': np.zeros((8, 4))}, "'boxes' that batch_spec does not know"),
    ({'image': np.zeros((8, 4, 5, 3), np.float32)},
     r"'image' has rows of float32\[4, 5, 3\], batch_spec says float32\[4, 4, 3\]"),
    ({'image': np.zeros((8, 4, 4, 3))}, r"float64\[4, 4, 3\], batch_spec says float32"),
    ({'label': np.zeros((8, 1), np.int32)}, r"'label' has rows of int32\[1\]"),
    ({'label': np.zeros(7, np.int32)}, 'number of rows')])
def test_check_against_spec_names_what_is_wrong(changes, words):
  with pytest.raises(UserError, match=words):
    pipeline.check_against_spec(good_batch(**changes), SPEC)
