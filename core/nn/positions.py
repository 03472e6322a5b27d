"""Position embeddings."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class LearnedPositions(nn.Module):
  """Adds one learned vector a position (ViT section 3.1, equation 1).

  Attributes:
    dtype: computation dtype; the table `pos_embedding` `[1, length, width]` is float32.
    stddev: of the normal init, 0.02 in the public ViT code and in BERT.
  """
  dtype: Any = jnp.float32
  stddev: float = 0.02

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds the table to x `[batch, length, width]`, whose length must be the table's."""
    table = self.param(
        'pos_embedding',
        nn.with_logical_partitioning(nn.initializers.normal(self.stddev),
                                     (None, 'length', 'embed')),
        (1, *x.shape[1:]), jnp.float32)
    return x.astype(self.dtype) + table.astype(self.dtype)


SINUSOIDS = ('paper', 'tensor2tensor', 'marian')


def sinusoids(positions: jax.Array, width: int, layout: str = 'paper') -> jax.Array:
  """Sines and cosines of positions ("Attention Is All You Need", section 3.5).

  The paper's equation and its authors' code differ in the frequencies too, not only in where the
  channels stand, so that weights trained with one layout need that layout.

  Args:
    positions: int `[...]`, from 0.
    width: number of channels, even.
    layout: 'paper': sin and cos of 10000^(-2i/width) side by side, as printed. 'tensor2tensor': all
      sines, then all cosines, of 10000^(-i/(width/2 - 1)). 'marian': the printed frequencies, all
      sines, then all cosines.

  Returns:
    float32 `[..., width]`.
  """
  half = width // 2
  if width % 2:
    raise ValueError(f'width={width}: sines and cosines come in pairs')
  steps = jnp.arange(half, dtype=jnp.float32)
  if layout == 'tensor2tensor':
    steps = steps / (half - 1)
  elif layout in SINUSOIDS:
    steps = steps / half
  else:
    raise ValueError(f'layout={layout!r}: expected one of {SINUSOIDS}')
  angles = positions[..., None].astype(jnp.float32) * jnp.exp(-math.log(10000.0) * steps)
  pair = jnp.sin(angles), jnp.cos(angles)
  if layout == 'paper':
    return jnp.stack(pair, axis=-1).reshape(*angles.shape[:-1], width)
  return jnp.concatenate(pair, axis=-1)
