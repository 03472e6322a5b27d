"""Evaluators: means over a split, predictions scored on the host, and when each one runs."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from core import metrics as metrics_lib
from core.config import RunFailed
from core.data import devices, pipeline
from core.plan import Plan


class EvalRun:
  """What an evaluator may ask of a run: batches of a split, compiled functions, a place to write.

  Attributes:
    plan: the plan.
    workdir: pictures go to `workdir / 'pictures'`; only the first process writes.
    batch_size: the config's, rounded up so that it divides over the mesh and the processes; no
      result depends on it.
  """

  def __init__(self, plan: Plan, workdir: pathlib.Path):
    self.plan, self.workdir = plan, workdir
    wanted = plan.config.eval.batch_size or plan.config.batch_size
    ways = plan.layout.batch_ways
    self.batch_size = -(-wanted // ways) * ways
    self._compiled: dict[Any, Callable] = {}

  @property
  def writes(self) -> bool:
    return jax.process_index() == 0

  @property
  def pictures(self) -> pathlib.Path:
    path = self.workdir / 'pictures'
    path.mkdir(parents=True, exist_ok=True)
    return path

  def batches(self, split: str) -> Iterator[Mapping[str, jax.Array]]:
    """Global device batches of a split; padding rows have `mask` 0 and `index` -1.

    They come in the order of the split, one shape of batch after the other.
    """
    plan = self.plan
    source = plan.task.dataset(split)
    specs = plan.task.specs(self.batch_size, train=False)
    for bucket, spec in enumerate(specs):
      indices = None if len(specs) == 1 else np.flatnonzero(source.buckets == bucket)
      if indices is not None and not len(indices):
        continue
      size = spec['mask'].shape[0]
      spec = {**spec, 'index': jax.ShapeDtypeStruct((size,), np.int32)}
      shardings = plan.batch_shardings(spec)
      rows = devices.process_rows(shardings['mask'], size)
      stream = pipeline.eval_stream(source, functools.partial(plan.task.transform, train=False),
                                    batch_size=size, rows=rows, indices=indices)
      put = lambda batch, size=size, rows=rows, shardings=shardings: devices.to_device(
          {k: v for k, v in batch.items() if k in shardings}, shardings, size, rows)
      with devices.prefetch(stream, put) as device_batches:
        yield from device_batches

  def jit(self, fn: Callable, **kwargs) -> Callable:
    """Compiles `fn(params, batch)` once for this run; its results are whole on every host."""
    if fn not in self._compiled:
      self._compiled[fn] = self.plan.jit(fn, out_shardings=self.plan.layout.replicated, **kwargs)
    return self._compiled[fn]

  def loss_sums(self, params, batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The task's metrics and loss on a batch as (sum, weight); one program for all splits."""
    loss, aux = self.plan.task.loss(params, batch, jax.random.key(0), False)
    return dict(aux.metrics, loss=(loss * aux.weight, aux.weight))

  def map(self, fn: Callable, params, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Runs `fn(params, batch) -> {name: [batch, ...]}` and yields its rows without the padding.

    The arrays are numpy, in the order of `batches`, on every process; 'index' int32 is the place of
    each example in the split.
    """
    compiled = self.jit(fn)
    index_of = self.jit(_index)
    for batch in self.batches(split):
      outputs, index = jax.device_get((compiled(params, batch), index_of(params, batch)))
      yield {k: v[index >= 0] for k, v in {**outputs, 'index': index}.items()}


def _index(params, batch):
  del params
  return batch['index']


class Mean:
  """Means of the task's own loss and metrics over a split, each example counted once."""

  def __init__(self, split: str, every: str = ''):
    self.split, self.every = split, every

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    step_fn = run.jit(run.loss_sums)
    totals: dict[str, list[float]] = {}
    # One step behind, so that the host adds while the device computes.
    previous = None
    for batch in run.batches(self.split):
      current = step_fn(params, batch)
      _add(totals, previous)
      previous = current
    _add(totals, previous)
    return metrics_lib.mean(totals)


def _add(totals, metrics) -> None:
  for name, (total, weight) in (jax.device_get(metrics) or {}).items():
    entry = totals.setdefault(name, [0., 0.])
    entry[0] += float(total)
    entry[1] += float(weight)


class Evaluators:
  """All evaluators of a task and their cadence."""

  def __init__(self, plan: Plan, workdir: pathlib.Path):
    self._run = EvalRun(plan, workdir)
    self._evaluators = plan.task.evaluators()
    self._steps = plan.steps
    self._every = {}
    self.final = []  # Names of those that wait for the end of a run.
    for name, evaluator in self._evaluators.items():
      text = evaluator.every or plan.config.eval.every
      if text == 'end':
        self.final.append(name)
      else:
        self._every[name] = max(plan.steps_of(text, f'eval of {name}'), 1)

  def due(self, step: int) -> list[str]:
    """Names of the evaluators to run after `step` updates, without `final`."""
    return [name for name, every in self._every.items()
            if step == self._steps or step % every == 0]

  def run(self, params, step: int, names: list[str] | None = None,
          say: Callable[[str], None] = lambda text: None) -> dict[str, float]:
    """Runs evaluators (all by default); returns 'name/metric' -> value."""
    values = {}
    for name in names if names is not None else self._evaluators:
      found = self._evaluators[name](self._run, params, step)
      values.update({f'{name}/{metric}': float(value) for metric, value in found.items()})
      if found:
        say(f'{name}: ' + '  '.join(f'{k} {v:.4g}' for k, v in found.items()))
    bad = sorted(k for k, v in values.items() if not np.isfinite(v))
    if bad:
      raise RunFailed(f'step {step}: {bad[0]} is {values[bad[0]]}')
    return values
