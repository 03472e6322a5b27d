"""Rows of a process, global arrays, and the thread that reads ahead."""

import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from core.config import UserError
from core.data import devices
from core.data import pipeline
from tests.core.data.examples import Numbers, assert_same, train, with_noise


@pytest.fixture(scope='module')
def mesh():
  assert jax.device_count() == 8, 'see tests/conftest.py'
  return jax.make_mesh((4, 2), ('data', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize('spec', [P('data'), P(), P(('data', 'tensor')), P('tensor')])
def test_to_device_places_every_row(mesh, spec):
  sharding = NamedSharding(mesh, spec)
  rows = devices.process_rows(sharding, 16)
  assert rows == list(range(16))
  batch = {'x': np.random.default_rng(0).random((16, 3)).astype(np.float32),
           'y': np.arange(16, dtype=np.int32)}
  for shardings in (sharding, {'x': sharding, 'y': sharding}):
    arrays = devices.to_device(batch, shardings, 16, rows)
    for name in batch:
      assert arrays[name].sharding == sharding and arrays[name].dtype == batch[name].dtype
      np.testing.assert_array_equal(np.asarray(arrays[name]), batch[name])


def test_to_device_can_split_other_dimensions(mesh):
  sharding = NamedSharding(mesh, P('data', 'tensor'))
  batch = {'x': np.arange(64).reshape(8, 8)}
  array = devices.to_device(batch, sharding, 8, range(8))['x']
  np.testing.assert_array_equal(np.asarray(array), batch['x'])
  assert array.addressable_shards[0].data.shape == (2, 4)


class PartOfMesh:
  """What `process_rows` sees in one of several processes: only that process's devices."""

  def __init__(self, sharding, held):
    self._sharding, self._held = sharding, set(held)

  def addressable_devices_indices_map(self, shape):
    return {d: i for d, i in self._sharding.devices_indices_map(shape).items()
            if d in self._held}


@pytest.mark.parametrize('spec, want', [
    (P('data'), [range(0, 8), range(8, 16)]),
    (P('tensor'), [range(16), range(16)]),
    (P(), [range(16), range(16)])])
def test_process_rows_of_two_processes(mesh, spec, want):
  halves = mesh.devices[:2].ravel(), mesh.devices[2:].ravel()
  for half, rows in zip(halves, want):
    got = devices.process_rows(PartOfMesh(NamedSharding(mesh, spec), half), 16)
    assert got == list(rows)


def test_process_rows_that_are_not_neighbours(mesh):
  apart = mesh.devices[[0, 2]].ravel()
  part = PartOfMesh(NamedSharding(mesh, P('data')), apart)
  assert devices.process_rows(part, 8) == [0, 1, 4, 5]


def test_to_device_refuses_rows_it_has_not(mesh):
  with pytest.raises(ValueError, match='needs rows'):
    devices.to_device({'x': np.zeros(4)}, NamedSharding(mesh, P('data')), 8, [0, 1, 4, 5])


def test_stream_to_devices(mesh):
  sharding = NamedSharding(mesh, P('data'))
  rows = devices.process_rows(sharding, 8)
  want = train(rows, steps=5)
  stream = pipeline.train_stream(Numbers(23), with_noise, batch_size=8, rows=rows, seed=3)
  with devices.prefetch(stream, lambda b: devices.to_device(b, sharding, 8, rows)) as batches:
    got = [jax.device_get(next(batches)) for _ in range(5)]
  assert_same(got, want)


# --- Prefetch ------------------------------------------------------------------------------------


class Counter:
  """Counts up slowly; remembers whether it was closed."""

  def __init__(self, n=10**9, delay=0.0, fail_at=None):
    self.made, self.closed = 0, threading.Event()
    self._n, self._delay, self._fail_at = n, delay, fail_at

  def __iter__(self):
    return self

  def __next__(self):
    time.sleep(self._delay)
    if self.made == self._fail_at:
      raise UserError('broken at the source')
    if self.made == self._n:
      raise StopIteration
    self.made += 1
    return self.made - 1

  def close(self):
    self.closed.set()


def test_prefetch_keeps_the_order_and_ends():
  counter = Counter(20)
  stream = devices.prefetch(counter, lambda x: x * x, depth=3)
  assert list(stream) == [x * x for x in range(20)]
  assert list(stream) == []  # And stays ended.
  assert counter.closed.wait(5)


def test_prefetch_passes_errors_on_after_what_came_before():
  for stream in (devices.prefetch(Counter(fail_at=3)),
                 devices.prefetch(Counter(), lambda x: 1 // (3 - x))):
    assert [next(stream) for _ in range(3)] is not None
    with pytest.raises((UserError, ZeroDivisionError)):
      next(stream)
    with pytest.raises(StopIteration):
      next(stream)


def test_prefetch_works_ahead_but_not_too_far():
  counter = Counter()
  with devices.prefetch(counter, depth=2) as stream:
    deadline = time.monotonic() + 5
    while counter.made < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)
    assert counter.made == 3  # Two are ready, one waits for room.
    assert next(stream) == 0


def test_prefetch_close_ends_the_thread():
  counter = Counter()
  stream = devices.prefetch(counter)
  next(stream)
  stream.close()
  assert counter.closed.is_set() and not stream._thread.is_alive()
  with pytest.raises(StopIteration):
    next(stream)
  stream.close()  # Twice is fine.


def test_abandoned_prefetch_ends_its_thread():
  counter = Counter()
  stream = devices.prefetch(counter)
  next(stream)
  del stream
  assert counter.closed.wait(5)


def test_prefetch_counts_waiting():
  with devices.prefetch(Counter(10, delay=0.05)) as slow:
    list(slow)
    assert slow.waited > 0.4
  with devices.prefetch(Counter(5)) as fast:
    for _ in range(5):
      time.sleep(0.05)  # A step; the next element is ready when it ends.
      next(fast)
    assert fast.waited < 0.2
