"""A model and a log small enough to compute by hand."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs import bert4rec as configs
from core import task as task_lib
from recsys import encoder, logs

ITEMS, LENGTH, WIDTH, DEPTH, HEADS = 11, 7, 12, 2, 3
ROWS = ITEMS + 4


def model(**changes) -> encoder.Encoder:
  return encoder.Encoder(**{**dict(rows=ROWS, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS,
                                   mlp_dim=20), **changes})


def draw(shapes, scale: float = .3, seed: int = 0):
  """numpy, every parameter away from its start; norms around 1."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    mean = 1. if path[-1].key == 'scale' else 0.
    return (mean + scale * rng.normal(size=x.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def params(of: encoder.Encoder, scale: float = .3, seed: int = 0):
  items = jnp.zeros((1, of.length), jnp.int32)
  return draw(nn.unbox(jax.eval_shape(of.init, jax.random.key(0), items, items))['params'], scale,
              seed)


def log(sequences: Sequence[Sequence[int]], items: int = 0) -> logs.Log:
  """A log of these item ids; the catalogue is as large as the largest, or larger."""
  events = np.concatenate([np.asarray(s, np.int32) for s in sequences])
  names = [f'item {i}' for i in range(1, max(items, int(events.max())) + 1)]
  return logs.Log(np.array([f'user {i}' for i in range(len(sequences))]), np.array(names), events,
                  np.append(0, np.cumsum([len(s) for s in sequences])))


def task_of(sequences: Sequence[Sequence[int]] = (), arg: str = 'smoke', items: int = 0, **changes):
  """The task of a config with changes ('model__width=8'), on a log of these sequences."""
  config = configs.get_config(arg)
  for name, value in changes.items():
    config.update_from_flattened_dict({name.replace('__', '.'): value})
  task = task_lib.load(config)
  if len(sequences):
    task.log = log(sequences, items)
  return task
