"""From a source to host batches; the step is the whole state of the pipeline.

Training data is an infinite row of examples, a pure function of the seed: epoch after epoch of
shuffled indices (grain), each example transformed with a random generator seeded by its position in
that row. Global batch `s` is positions `s * batch_size .. (s + 1) * batch_size - 1`. A process
takes out of each batch the rows that its devices hold, so the global batches are the same for any
number of processes, and a run that restarts at step `s` simply begins there.

    source -> shuffle -> repeat -> random_map -> rows of this process -> batch -> devices.py
"""

import contextlib
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import flags
from absl import logging

from core.config import UserError
from core.data import buckets
from core.data.images import ImageError

Batch = dict[str, np.ndarray]
Transform = Callable[[dict[str, Any], np.random.Generator], Mapping[str, np.ndarray]]

# Arrays that the pipeline adds to what the transform makes.
PIPELINE_KEYS = ('mask', 'index')


class Source(Protocol):
  """Random access to examples, as `core.data.sources.open_source` gives it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def train_stream(
    source: Source, transform: Transform, *, batch_size: int, rows: Sequence[int], seed: int,
    start_step: int = 0, workers: int = 0, threads: int = 4, reuse_batch: bool = False,
) -> Iterator[Batch]:
  """Yields this process's rows of global batches start_step, start_step + 1, ... for ever.

  Args:
    source: at least one example.
    transform: `(example, rng) -> dict` of arrays whose shapes and dtypes never change. It runs in
      several threads, and must be picklable when there are workers. An `ImageError` from it or
      from the source (a file that broke after it was listed) makes the next example of the source
      take the place, with the same random generator; the event is logged.
    batch_size: rows of a global batch.
    rows: the rows (0 .. batch_size - 1) that this process provides, see
      `core.data.devices.process_rows`.
    seed: of order and augmentation, any non-negative int.
    start_step: the first global batch to yield.
    workers: processes that make batches; 0 makes them in threads of this process.
    threads: threads in this process, which share the work of a batch, or in each worker, where
      every thread makes a batch of its own (so workers x threads batches are in memory).
    reuse_batch: yield the first batch again and again, to time a step without its input.

  Yields:
    The transform's arrays with a leading dimension `len(rows)`, and `mask` float32 `[len(rows)]`
    of ones.

  Raises:
    UserError: the source is empty.
  """
  import grain  # A second to import: only those who read data pay it.
  if not len(source):
    raise UserError(f'{source!r} is empty; training needs at least one example')
  # Two seeds that differ, for any user seed: grain adds the epoch to the seed it shuffles with, so
  # neighbouring seeds would otherwise share their orders one epoch apart.
  order_seed, map_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
  examples = (
      grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat()
      .random_map(_Read(source, transform, replace_bad=True), seed=map_seed))
  stream = _stream(examples, batch_size, rows, None, start_step, workers, threads)
  if reuse_batch:
    with contextlib.closing(stream):
      return _Stream(itertools.repeat(next(stream)))
  return stream


def bucket_stream(
    source: Source, transform: Transform, *, batch_sizes: Sequence[int],
    rows: Sequence[Sequence[int]], seed: int, start_step: int = 0, workers: int = 0,
    threads: int = 4, reuse_batch: bool = False,
) -> Iterator[tuple[int, Batch]]:
  """Like `train_stream`, for batches of one or several shapes; yields (bucket, batch).

  Args:
    source: with several buckets its attribute `buckets`, int `[len]`, says which one each example
      is of; the transform gives examples of one bucket the same shapes.
    transform: as in `train_stream`.
    batch_sizes: rows of a global batch of each bucket.
    rows: the rows that this process provides of each bucket's batches.
    seed, start_step, workers, threads, reuse_batch: as in `train_stream`. With several buckets
      every thread makes a batch of its own.

  Raises:
    UserError: the source is empty.
  """
  if len(batch_sizes) == 1:
    stream = train_stream(
        source, transform, batch_size=batch_sizes[0], rows=rows[0], seed=seed,
        start_step=start_step, workers=workers, threads=threads, reuse_batch=reuse_batch)
    with contextlib.closing(stream):
      for batch in stream:
        yield 0, batch
    return
  import grain
  if not len(source):
    raise UserError(f'{source!r} is empty; training needs at least one example')
  order_seed, map_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
  members = [np.flatnonzero(source.buckets == bucket) for bucket in range(len(batch_sizes))]
  schedule = buckets.Schedule([len(m) for m in members], batch_sizes, order_seed)
  read = _Read(source, transform, replace_bad=True)
  examples = [
      grain.MapDataset.source(m).shuffle(seed=order_seed).repeat().random_map(read, seed=map_seed)
      if len(m) else None for m in members]
  batches = _make_batches(examples, schedule, tuple(batch_sizes), tuple(map(tuple, rows)))
  stream = _read_ahead(batches[start_step:], workers, threads)
  step = start_step
  with contextlib.closing(stream):
    first = next(stream) if reuse_batch else None
    while True:
      yield schedule.at(start_step if reuse_batch else step)[0], first or next(stream)
      step += 1


def eval_stream(
    source: Source, transform: Transform, *, batch_size: int, rows: Sequence[int],
    indices: np.ndarray | None = None, workers: int = 0, threads: int = 4,
) -> Iterator[Batch]:
  """Yields this process's rows of every batch of a split: each example exactly once, in order.

  Every process yields ceil(len(source) / batch_size) batches. Rows beyond the end, and examples
  that fail with `ImageError`, repeat the first good example with `mask` 0.

  Args:
    source: at least one example.
    transform: as in `train_stream`; its random generator is seeded by the example's index alone.
    batch_size: rows of a global batch.
    rows: the rows that this process provides.
    indices: of the examples to read, all by default.
    workers: processes that make batches; 0 makes them in threads of this process.
    threads: threads in this process, or in each worker.

  Yields:
    The transform's arrays with a leading dimension `len(rows)`, `mask` float32 and `index` int32
    `[len(rows)]`: the example's index in the source, -1 where `mask` is 0.

  Raises:
    UserError: the source is empty.
  """
  import grain
  if not len(source):
    raise UserError(f'{source!r} is empty; evaluation needs at least one example')
  indices = np.arange(len(source)) if indices is None else indices
  examples = grain.MapDataset.source(indices).random_map(
      _Read(source, transform, replace_bad=False), seed=0)
  return _stream(examples, batch_size, rows, len(indices), 0, workers, threads)


class _Read:
  """Reads and transforms the example of an index; survives broken images. For `random_map`."""

  def __init__(self, source: Source, transform: Transform, replace_bad: bool):
    self._source, self._transform, self._replace_bad = source, transform, replace_bad
    self._broken = set()  # Indices; each is reported once (by each worker that meets it).

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    error = None
    for attempt in range(min(100, len(self._source))):
      at = (int(index) + attempt) % len(self._source)
      try:
        example = dict(self._transform(self._source[at], rng))
      except ImageError as e:
        error = e
        if at not in self._broken:
          self._broken.add(at)
          logging.warning('example %d of %r cannot be read (%s); %d so far', at, self._source, e,
                          len(self._broken))
        continue
      # An evaluation counts nothing twice: the place of a broken example is padding.
      real = attempt == 0 or self._replace_bad
      example['mask'] = np.float32(real)
      if not self._replace_bad:
        example['index'] = np.int32(at if real else -1)
      return example
    raise UserError(f'{attempt + 1} examples in a row of {self._source!r} cannot be read, the last '
                    f'because: {error}')


@functools.cache
def _rows_dataset():
  """Makes the class below once grain is wanted: it derives from a class of grain's."""
  import grain

  class Rows(grain.MapDataset):
    """Element n is row `rows[n % len(rows)]` of global batch `n // len(rows)`.

    With `examples` given the parent is one pass, padded to whole batches with element 0.
    """

    def __init__(self, parent, batch_size, rows, examples):
      super().__init__(parent)
      self._batch_size, self._rows, self._examples = batch_size, tuple(rows), examples

    def __len__(self):
      steps = len(self._parent) // self._batch_size if self._examples is None else (
          -(-self._examples // self._batch_size))
      # For ever must stay an index: a few rows of sys.maxsize positions are.
      return min(steps, sys.maxsize // self._batch_size) * len(self._rows)

    def __getitem__(self, index):
      if isinstance(index, slice):
        return self.slice(index)
      step, row = divmod(index, len(self._rows))
      position = step * self._batch_size + self._rows[row]
      if self._examples is None or position < self._examples:
        return self._parent[position]
      return {**self._parent[0], 'mask': np.float32(0), 'index': np.int32(-1)}

  # Workers unpickle by importing: there is no such name at module level, so say how to find it.
  Rows.__reduce__ = lambda self: (
      _make_rows, (self._parent, self._batch_size, self._rows, self._examples))
  return Rows


def _make_rows(parent, batch_size, rows, examples):
  return _rows_dataset()(parent, batch_size, rows, examples)


@functools.cache
def _batches_dataset():
  """Like `_rows_dataset`."""
  import grain

  class Batches(grain.MapDataset):
    """Element n is this process's part of the batch of step n, stacked."""

    def __init__(self, parents, schedule, batch_sizes, rows):
      super().__init__([p for p in parents if p is not None])
      self._all, self._schedule = parents, schedule
      self._batch_sizes, self._rows = batch_sizes, rows

    def __len__(self):
      return sys.maxsize // max(self._batch_sizes)

    def __getitem__(self, index):
      if isinstance(index, slice):
        return self.slice(index)
      bucket, number = self._schedule.at(index)
      start = number * self._batch_sizes[bucket]
      examples = [self._all[bucket][start + row] for row in self._rows[bucket]]
      return {name: np.stack([e[name] for e in examples]) for name in examples[0]}

  Batches.__reduce__ = lambda self: (
      _make_batches, (self._all, self._schedule, self._batch_sizes, self._rows))
  return Batches


def _make_batches(parents, schedule, batch_sizes, rows):
  return _batches_dataset()(parents, schedule, batch_sizes, rows)


def _stream(examples, batch_size: int, rows: Sequence[int], count: int | None, start_step: int,
            workers: int, threads: int) -> '_Stream':
  """Cuts a row of examples into batches, from `start_step` on, read ahead by threads or workers."""
  rows = [int(r) for r in rows]
  if not rows or min(rows) < 0 or max(rows) >= batch_size:
    raise ValueError(f'rows must be in 0..{batch_size - 1}, and at least one: {rows}')
  local = _make_rows(examples, batch_size, rows, count)
  if workers:
    # A worker takes every n-th element, so the elements must be batches.
    return _read_ahead(local.batch(len(rows))[start_step:], workers, threads)
  # Threads work on examples, so the first batch comes soon and few batches are in memory.
  import grain
  return _Stream(iter(local[start_step * len(rows):].to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(len(rows), 2 * threads))
  ).batch(len(rows))))


def _read_ahead(batches, workers: int, threads: int) -> '_Stream':
  """Yields the elements of a grain dataset of batches, made by threads here or in workers."""
  import grain
  batches = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain's workers insist; notebooks and tests parse no flags.
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=1))
  return _Stream(iter(batches))


class _Stream:
  """An iterator over host batches whose threads and workers end when it ends or is closed."""

  def __init__(self, iterator):
    # The only reference, given up on closing: grain's iterators must be closed and gone before the
    # interpreter takes its modules apart, or they complain. `finalize` also runs at exit.
    self._holder = [iterator]
    self._close = weakref.finalize(self, _close_held, self._holder)

  def __iter__(self):
    return self

  def __next__(self) -> Batch:
    if not self._holder:
      raise StopIteration
    try:
      return next(self._holder[0])
    except StopIteration:
      self.close()
      raise

  def close(self) -> None:
    self._close()


def _close_held(holder: list[Any]) -> None:
  iterator = holder.pop()
  if hasattr(iterator, 'close'):
    iterator.close()


def check_against_spec(batch: Mapping[str, np.ndarray],
                       spec: Mapping[str, jax.ShapeDtypeStruct]) -> None:
  """Holds a host batch against what the step consumes.

  Args:
    batch: arrays of this process; all with the same leading dimension.
    spec: name -> shape and dtype with the global batch dimension (which is not compared). `mask`
      and `index`, which the pipeline adds, need not be in it.

  Raises:
    UserError: names the first array that is missing, extra, or of another shape or dtype.
  """
  for name in sorted(set(spec) | set(batch)):
    if name not in batch:
      raise UserError(f'batch has no array {name!r}, which batch_spec asks for; it has '
                      f'{", ".join(sorted(batch))}')
    if name not in spec:
      if name in PIPELINE_KEYS:
        continue
      raise UserError(f'batch has an array {name!r} that batch_spec does not know; it knows '
                      f'{", ".join(sorted(spec))}')
    got, want = batch[name], spec[name]
    if got.shape[1:] != want.shape[1:] or got.ndim != len(want.shape) or got.dtype != want.dtype:
      raise UserError(
          f'batch array {name!r} has rows of {got.dtype}{list(got.shape[1:])}, batch_spec says '
          f'{want.dtype}{list(want.shape[1:])}')
  leading = {name: array.shape[0] for name, array in batch.items()}
  if len(set(leading.values())) > 1:
    raise UserError(f'batch arrays differ in their number of rows: {leading}')
