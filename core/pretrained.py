"""Where the first parameters come from: `config.init_from` and what mode evaluate and export read."""

import pathlib

import jax
import numpy as np
from etils import epath

from core.checkpoint import Checkpoints, compare_shapes, shapes
from core.config import UserError
from core.plan import Plan


def load_into(plan: Plan, state, path: str):
  """Replaces the fresh parameters of `state` (and their average) by those at `path`."""
  params = read_params(plan, path)
  return state.replace(params=params,
                       ema=jax.tree.map(jax.numpy.copy, params) if state.ema is not None else None)


def read_params(plan: Plan, path: str):
  """Reads parameters from a workdir of ours or from foreign weights.

  Args:
    plan: the model.
    path: a workdir (its newest checkpoint; the averaged parameters when it has them), or a file
      that the task's `load_pretrained` knows.

  Returns:
    Parameters on their devices, in the plan's shardings.

  Raises:
    UserError: nothing there, or another model.
  """
  if (pathlib.Path(path) / 'checkpoints').is_dir():
    return restore_params(plan, pathlib.Path(path))[0]
  if not epath.Path(path).exists():
    raise UserError(f'config.init_from={path!r}: no such file or workdir')
  params = plan.task.load_pretrained(path, plan.params_shape)
  compare_shapes(shapes(params), shapes(plan.params_shape), path)
  return jax.tree.map(
      lambda x, s: jax.device_put(np.asarray(x, s.dtype), s.sharding), params, plan.params_shape)


def restore_params(plan: Plan, workdir: pathlib.Path):
  """(parameters to use, step) of a workdir's newest readable checkpoint."""
  checkpoints = Checkpoints(workdir / 'checkpoints')
  try:
    restored = checkpoints.restore_params(plan.params_shape)
  finally:
    checkpoints.close()
  if restored is None:
    raise UserError(f'{workdir} holds no checkpoint; train first, or set --config.init_from')
  return restored
