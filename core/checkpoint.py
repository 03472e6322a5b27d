"""Saving and restoring: Orbax does the writing, this file says what, when and what if it broke."""

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from core import partition
from core.config import UserError
from core.weights import Weight

# Copies of an array on many devices share the work of writing it, each a slice, which takes a
# program of its own for every shape. Small arrays are not worth it.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
    (np.ndarray, ocp.type_handlers.NumpyHandler()))


class Checkpoints:
  """The checkpoints of one workdir.

  A checkpoint is the `TrainState` and a small JSON record (`extra`): the metrics of the logging
  window that was open, so that a resumed run logs what the unbroken one would have.
  """

  def __init__(self, directory: pathlib.Path, options: ml_collections.ConfigDict | None = None):
    """Opens `directory`.

    Args:
      directory: made when missing.
      options: `config.checkpoint`: `keep` newest to keep; `best`, a metric such as
        'validation/accuracy' whose best checkpoint is kept too ('' for none), with '-' before
        the name when less is better. None opens for reading only.
    """
    self.directory = directory
    keep, tracked = [], {}
    if options is not None:
      keep.append(policies.LatestN(options.keep))
      if options.best:
        name, reverse = options.best.lstrip('-'), options.best.startswith('-')
        keep.append(policies.BestN(get_metric_fn=lambda m: m[name], reverse=reverse, n=1,
                                   keep_checkpoints_without_metrics=False))
        # Without it metrics are not written, and a resumed run would not know what was best.
        tracked = dict(best_fn=lambda m: m[name], best_mode='min' if reverse else 'max')
    self.best = options.best if options is not None else ''
    # The logger's own level, as `set_verbosity` would fix a level that was inherited before.
    logger = logging.get_absl_logger()
    level = logger.level
    if options is None:
      logger.setLevel('ERROR')  # Orbax warns that it will only read, as it was told.
    try:
      self._manager = ocp.CheckpointManager(
          directory.absolute(),
          options=ocp.CheckpointManagerOptions(
              preservation_policy=policies.AnyPreservationPolicy(keep) if keep else None,
              enable_async_checkpointing=True, read_only=options is None,
              create=options is not None, **tracked),
          item_handlers={'state': ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS),
                         'extra': ocp.JsonCheckpointHandler()})
    finally:
      logger.setLevel(level)

  def steps(self) -> list[int]:
    """Steps of all finished checkpoints, oldest first."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, extra: dict[str, Any],
           metrics: dict[str, float] | None = None) -> None:
    """Starts saving in the background; the arrays are copied before this returns."""
    if self.best and metrics is not None and self.best.lstrip('-') not in metrics:
      raise UserError(f'config.checkpoint.best={self.best!r} is not a metric of this run; there '
                      f'are {sorted(metrics)}')
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), extra=ocp.args.JsonSave(extra)),
        metrics=metrics if self.best else None, force=True)

  def wait(self) -> None:
    """Blocks until what was started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def restore(self, state_shape) -> tuple[Any, dict[str, Any]] | None:
    """Reads the newest checkpoint that can be read, and moves unreadable newer ones aside.

    Args:
      state_shape: `TrainState` of `jax.ShapeDtypeStruct` with the shardings wanted now; they may
        differ from those it was saved with.

    Returns:
      (state, extra), or None when there is no checkpoint.

    Raises:
      UserError: the checkpoint is of another model, or none of them can be read.
    """
    def read(step):
      self._check_same_model(step, state_shape)
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=_restore_args(state_shape), extra=ocp.args.JsonRestore()))
      return restored.state, restored.extra

    found, damaged = self._newest(read)
    for step in damaged:
      self._set_aside(step)
    return found

  def best_step(self, best: str) -> int | None:
    """The checkpoint with the best value of a metric, the earlier of equals; None without any.

    Args:
      best: `config.checkpoint.best`.
    """
    name, sign = best.lstrip('-'), -1 if best.startswith('-') else 1
    measured = {step: self._manager.metrics(step) for step in self.steps()}
    values = {step: sign * metrics[name] for step, metrics in measured.items()
              if metrics and name in metrics}
    return max(values, key=values.get) if values else None

  def restore_params(self, params_shape, average: int = 1, step: int | None = None):
    """Reads only what evaluation needs from the newest readable checkpoint.

    Args:
      params_shape: parameters of `jax.ShapeDtypeStruct` with the shardings wanted.
      average: take the mean of so many of the newest checkpoints ("Attention Is All You Need",
        section 6.1); all of them must then be readable.
      step: read this one and no other; it must be readable.

    Returns:
      (parameters, step), the average of the parameters where one was kept; None when there is no
      checkpoint. Raises like `restore`.
    """
    def read(step):
      saved = self._manager.item_metadata(step)['state']
      key = 'ema' if saved['ema'] is not None else 'params'
      compare_shapes(shapes(saved[key]), shapes(params_shape), self._where(step))
      return self._manager.restore(step, args=ocp.args.Composite(
          state=_restore_args({key: params_shape}, partial=True))).state[key], step

    if average == 1 and step is None:
      return self._newest(read)[0]
    steps = [step] if step is not None else self.steps()[-average:]
    if len(steps) < average:
      raise UserError(f'config.checkpoint.average={average}, but {self.directory} holds the '
                      f'checkpoints {steps}; more are kept with config.checkpoint.keep')
    mean = None
    add = jax.jit(lambda mean, params: jax.tree.map(lambda m, p: m + p / average, mean, params),
                  donate_argnums=(0, 1))
    for step in steps:
      try:
        params, _ = read(step)
      except UserError:
        raise
      except Exception as e:  # pylint: disable=broad-except  # Whatever a damaged file does.
        lost = f', so that there is no mean of {average}' if average > 1 else ''
        raise UserError(f'{self._where(step)} cannot be read ({type(e).__name__}){lost}') from e
      mean = add(jax.tree.map(lambda p: p * 0, params) if mean is None else mean, params)
    return mean, steps[-1]

  def _newest(self, read) -> tuple[Any, list[int]]:
    """Tries `read(step)` from the newest down; returns its result and the steps that failed."""
    damaged = []
    for step in reversed(self.steps()):
      problem, result = '', None
      try:
        result = read(step)
      except UserError:
        raise
      except Exception as e:  # pylint: disable=broad-except
        # Whatever a damaged file makes the reader say, the answer is the same: try an older one.
        problem = f'{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ""}'
      if not _any_process(bool(problem)):
        return result, damaged
      logging.warning('%s cannot be read (%s); trying the one before', self._where(step),
                      problem or 'another process failed')
      damaged.append(step)
    if damaged:
      raise UserError(f'{self.directory}: none of the checkpoints {damaged} can be read; train '
                      'into another --workdir')
    return None, []

  def _set_aside(self, step: int) -> None:
    """Frees the step's name for the run that reaches it again, without deleting anything."""
    if jax.process_index() == 0:
      aside = self.directory.parent / 'unreadable'
      aside.mkdir(exist_ok=True)
      target = aside / f'{step}-{len(list(aside.iterdir()))}'
      (self.directory / str(step)).rename(target)
      logging.warning('%s was moved to %s', self._where(step), target)
    self._manager.reload()

  def _where(self, step: int) -> str:
    return f'checkpoint {step} in {self.directory}'

  def _check_same_model(self, step: int, state_shape) -> None:
    """Raises `UserError` naming the first parameters whose shapes differ from the saved ones."""
    saved = self._manager.item_metadata(step)['state']
    compare_shapes(shapes(saved['params']), shapes(state_shape.params), self._where(step))
    if (saved['ema'] is None) != (state_shape.ema is None):
      kept = 'without' if saved['ema'] is None else 'with'
      raise UserError(f'{self._where(step)} was saved {kept} a moving average of the parameters; '
                      'set config.ema as it was')


def open_params(path: str) -> dict[str, Weight]:
  """Parameters of a workdir's newest checkpoint (averaged where there is an average), unread."""
  directory = (pathlib.Path(path) / 'checkpoints').absolute()
  checkpoints = Checkpoints(directory)
  try:
    steps = checkpoints.steps()
  finally:
    checkpoints.close()
  if not steps:
    raise UserError(f'{path} holds no checkpoint; name another config.init_from')
  where = f'checkpoint {steps[-1]} in {directory}'
  source = directory / str(steps[-1]) / 'state'
  reader = ocp.PyTreeCheckpointer()

  def attempt(fn):
    try:
      return fn()
    except Exception as e:  # pylint: disable=broad-except
      # Whatever a damaged file makes the reader say, there is one way on.
      reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
      raise UserError(f'{where} cannot be read ({reason}); move it away to use the one before '
                      'it') from e

  def read(keys: tuple[str, ...]) -> np.ndarray:
    item: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
      item = {key: item}
    tree = attempt(lambda: reader.restore(source, args=ocp.args.PyTreeRestore(
        item=jax.tree.map(lambda _: 0, item), restore_args=item, partial_restore=True)))
    for key in keys:
      tree = tree[key]
    return tree

  saved = attempt(lambda: ocp.PyTreeCheckpointHandler().metadata(epath.Path(source)).tree)
  kind = 'ema' if saved['ema'] is not None else 'params'
  return {partition.path_name(keys): Weight(
      tuple(leaf.shape), lambda keys=keys: read((kind, *(key.key for key in keys))))
          for keys, leaf in jax.tree_util.tree_leaves_with_path(saved[kind])}


def _restore_args(shape, partial: bool = False):
  return ocp.args.PyTreeRestore(
      shape, restore_args=ocp.checkpoint_utils.construct_restore_args(shape),
      partial_restore=partial)


def shapes(params) -> dict[str, tuple[int, ...]]:
  """Name of every parameter -> its shape, for `compare_shapes`."""
  return {partition.path_name(path): tuple(p.shape)
          for path, p in jax.tree_util.tree_leaves_with_path(params)}


def compare_shapes(have: dict[str, tuple], want: dict[str, tuple], where: str,
                   show: int = 3) -> None:
  """Raises `UserError` when two parameter tables differ, naming the first differences."""
  wrong = [f'{name}: {have.get(name, "missing")} there, {want.get(name, "not used")} in the model'
           for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
  if wrong:
    more = f' and {len(wrong) - show} more' if len(wrong) > show else ''
    raise UserError(f'{where} is of another model: {"; ".join(wrong[:show])}{more}')


def _any_process(flag: bool) -> bool:
  """Whether any process says so; all must take the same way through a restore."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils  # only where there are several hosts
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
