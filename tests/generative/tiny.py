"""A model small enough to compute by hand, with every parameter away from its start."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from generative import gpt

COLORS, LENGTH, WIDTH, DEPTH, HEADS = 7, 9, 12, 3, 2


def model(**changes) -> gpt.ImageGPT:
  return gpt.ImageGPT(**{**dict(colors=COLORS, length=LENGTH, width=WIDTH, depth=DEPTH,
                                heads=HEADS), **changes})


def params(of: gpt.ImageGPT, seed: int = 0):
  """numpy, drawn; norms around 1."""
  tokens = jnp.zeros((1, of.length), jnp.int32)
  shapes = nn.unbox(jax.eval_shape(
      lambda rng: of.init(rng, tokens, keep=jnp.ones(tokens.shape)), jax.random.key(0)))['params']
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    mean = 1. if path[-1].key == 'scale' else 0.
    return (mean + .3 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, COLORS, (batch, length)).astype(np.int32)
