"""Where the first parameters come from: `config.init_from` and what mode evaluate and export read.

A source, be it foreign weights or a workdir of ours, is a table of names and shapes whose values
are still on disk. Names and shapes are settled first; then each parameter is read, placed on its
devices and dropped before the next one is read, so a host never holds the model twice.
"""

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from core import partition
from core.checkpoint import Checkpoints, compare_shapes, open_params, shapes
from core.config import UserError
from core.plan import Plan
from core.weights import Weights, local_copy


def load_into(plan: Plan, state, path: str):
  """Starts a training run from what is at `path` (transfer).

  Args:
    plan: the model.
    state: a fresh `TrainState`. The buffers of the parameters that are replaced, and of their
      average, are deleted one by one as the new ones arrive.
    path: a workdir of ours, or foreign weights, local or at a URL.

  Returns:
    `state` with the new parameters; what the task lets stay fresh (a head) is kept.

  Raises:
    UserError: nothing there, unreadable, or another model.
  """
  names = [name for name, _ in _named(plan.params_shape)]
  fresh = dict(_named(state.params))
  averages = dict(_named(state.ema)) if state.ema is not None else {}
  treedef = jax.tree.structure(plan.params_shape)
  weights = open_params(path) if _is_workdir(path) else _open_foreign(plan, path)
  weights = _settle(plan, path, weights, transfer=True)
  for name, placed in _placed(plan, weights, drop=lambda name: fresh[name].delete()):
    fresh[name] = placed
    if averages:
      averages[name].delete()
      averages[name] = jax.numpy.copy(placed)
  collect = lambda found: treedef.unflatten([found[name] for name in names])
  return state.replace(params=collect(fresh), ema=collect(averages) if averages else None)


def read_params(plan: Plan, path: str):
  """Reads parameters just as they are, for everything but training.

  Args:
    plan: the model.
    path: a workdir (its newest checkpoint; the averaged parameters when it has them), or foreign
      weights, local or at a URL.

  Returns:
    Parameters on their devices, in the plan's shardings.

  Raises:
    UserError: nothing there, unreadable, or another model.
  """
  if _is_workdir(path):
    return restore_params(plan, pathlib.Path(path))[0]
  weights = _settle(plan, path, _open_foreign(plan, path), transfer=False)
  found = dict(_placed(plan, weights))
  return jax.tree.structure(plan.params_shape).unflatten(
      [found[name] for name, _ in _named(plan.params_shape)])


def restore_params(plan: Plan, workdir: pathlib.Path):
  """(parameters to use, step) of the checkpoints of a workdir that `config.checkpoint` names."""
  options = plan.config.checkpoint
  checkpoints = Checkpoints(workdir / 'checkpoints')
  try:
    step = None
    if options.select == 'best':
      step = checkpoints.best_step(options.best)
      if step is None and checkpoints.steps():
        raise UserError(f'no checkpoint in {workdir} was measured by config.checkpoint.best='
                        f"{options.best!r}; use config.checkpoint.select='newest'")
    restored = checkpoints.restore_params(plan.params_shape, options.average, step)
  finally:
    checkpoints.close()
  if restored is None:
    raise UserError(f'{workdir} holds no checkpoint; train first, or set --config.init_from')
  return restored


def _named(tree) -> list[tuple[str, Any]]:
  return [(partition.path_name(path), leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_workdir(path: str) -> bool:
  return (pathlib.Path(path) / 'checkpoints').is_dir()


def _open_foreign(plan: Plan, path: str) -> Weights:
  return plan.task.open_weights(local_copy(path))


def _settle(plan: Plan, path: str, weights: Weights, transfer: bool) -> Weights:
  """Lets the task adapt `weights`, holds names and shapes against the model, and reports."""
  adapted, notes = plan.task.adapt(weights, plan.params_shape, transfer)
  want = {name: shape for name, shape in shapes(plan.params_shape).items()
          if name not in notes.fresh}
  looks = f', which looks like {notes.looks_like},' if notes.looks_like else ''
  compare_shapes({name: w.shape for name, w in adapted.items()}, want, f'{path}{looks}')
  if jax.process_index() == 0:
    parts = [f'{len(adapted)} tensors read']
    for what, names in (('not used', notes.unused), ('fresh', notes.fresh),
                        ('resized', notes.resized)):
      parts.append(f'{what}: {_listed(names)}')
    print(f'{path}{looks or ":"} {"; ".join(parts)}', flush=True)
  return adapted


def _listed(names: tuple[str, ...], show: int = 4) -> str:
  more = f' and {len(names) - show} more' if len(names) > show else ''
  return ', '.join(names[:show]) + more if names else 'none'


def _placed(plan: Plan, weights: Weights, drop: Callable[[str], None] = lambda name: None,
            ) -> Iterator[tuple[str, jax.Array]]:
  """Yields (name, array on its devices), one at a time; `drop(name)` comes just before.

  The layers of one parameter follow each other: a source that stores them stacked then reads the
  stack once.
  """
  want = dict(_named(plan.params_shape))
  for name in sorted(weights, key=lambda name: (re.sub(r'_\d+/', '/', name, count=1), name)):
    target = want[name]
    value = np.asarray(weights[name].read(), target.dtype)
    drop(name)
    # Every process reads the whole tensor and keeps the parts of its own devices.
    yield name, jax.make_array_from_callback(
        target.shape, target.sharding, lambda index, value=value: value[index])
    del value
