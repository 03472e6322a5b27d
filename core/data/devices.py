"""From host batches to global arrays on devices, made ready by a thread while the step runs."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def process_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
  """Returns the rows of the batch dimension that this process's devices hold, ascending.

  Processes may share rows (devices that differ only along a model axis hold the same ones).

  Args:
    sharding: of an array whose first dimension is the batch.
    batch_size: the global one.
  """
  rows = set()
  for index in sharding.addressable_devices_indices_map((batch_size,)).values():
    rows.update(range(*index[0].indices(batch_size)))
  return sorted(rows)


def to_device(batch: Mapping[str, np.ndarray],
              shardings: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding],
              batch_size: int, rows: Sequence[int]) -> dict[str, jax.Array]:
  """Assembles global arrays from this process's rows; no communication.

  Args:
    batch: arrays `[len(rows), ...]`.
    shardings: one for all arrays, or one by name (arrays without one are left out).
    batch_size: rows of the global arrays.
    rows: which rows `batch` holds, ascending; they must cover the devices of this process.

  Returns:
    Global arrays `[batch_size, ...]`.
  """
  rows = np.asarray(rows)

  def put(array, sharding):
    def piece(index):
      first, stop, _ = index[0].indices(batch_size)
      at = int(np.searchsorted(rows, first))
      part = slice(at, at + stop - first)
      if not np.array_equal(rows[part], np.arange(first, stop)):
        raise ValueError(f'a device needs rows {first}..{stop - 1}, which this process has not')
      return array[(part, *index[1:])]

    return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, piece)

  if isinstance(shardings, Mapping):
    return {name: put(batch[name], s) for name, s in shardings.items() if name in batch}
  return {name: put(array, shardings) for name, array in batch.items()}


class prefetch:  # pylint: disable=invalid-name
  """Keeps a few elements of an iterator ready, worked on by a background thread.

  Iterate it, and `close` it (or use `with`) when done early.

  Attributes:
    waited: seconds that the consumer has spent in `next` so far.
  """

  def __init__(self, iterator: Iterable[Any], put: Callable[[Any], Any] = lambda x: x,
               depth: int = 2):
    """Starts the thread.

    Args:
      iterator: what to read; its `close`, if any, is called by the thread at the end.
      put: applied to each element in the thread, such as a copy to the devices.
      depth: elements that may be ready and not yet taken.
    """
    self.waited = 0.0
    self._queue = queue.Queue(maxsize=max(1, depth))
    self._stop = threading.Event()
    self._done = False
    self._thread = threading.Thread(
        target=_produce, args=(iterator, put, self._queue, self._stop), daemon=True,
        name='prefetch')
    self._thread.start()

  def __iter__(self):
    return self

  def __next__(self):
    if self._done:
      raise StopIteration
    start = time.perf_counter()
    kind, value = self._queue.get()
    self.waited += time.perf_counter() - start
    if kind == 'element':
      return value
    self._done = True
    self._thread.join()
    if kind == 'error':
      raise value
    raise StopIteration

  def close(self) -> None:
    """Ends the thread after what it is doing now; the rest is dropped."""
    self._done = True
    self._stop.set()
    while self._thread.is_alive():
      try:
        self._queue.get_nowait()
      except queue.Empty:
        self._thread.join(0.01)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def __del__(self):
    self._stop.set()  # The thread knows no `self`, so an abandoned prefetch ends too.


def _produce(iterable, put, out: queue.Queue, stop: threading.Event) -> None:
  """The thread of `prefetch`: sends ('element', x)..., then ('end', None) or ('error', e)."""

  def send(item) -> bool:
    while not stop.is_set():
      try:
        out.put(item, timeout=0.1)
        return True
      except queue.Full:
        pass
    return False

  try:
    for element in iterable:
      if not send(('element', put(element))):
        break
    last = ('end', None)
  except BaseException as e:  # pylint: disable=broad-except  # All of it belongs to the consumer.
    last = ('error', e)
  finally:
    if hasattr(iterable, 'close'):
      iterable.close()
  send(last)
