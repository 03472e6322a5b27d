"""Positions of the cells of a feature map, and which of its cells are padding."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def valid_cells(image_size: jax.Array, padded: tuple[int, int],
                cells: tuple[int, int]) -> jax.Array:
  """Which cells of a feature map lie on the image: the reference's 'nearest' downsampled mask.

  Cell i looks at pixel floor(i * padded / cells); `jax.image.resize` would look at the middle of
  the cell, and lose the last one for about half of all sizes.

  Args:
    image_size: int `[batch, 2]`, height and width of the image in the padded picture.
    padded: height and width of the padded picture.
    cells: height and width of the map.

  Returns:
    bool `[batch, *cells]`.
  """
  rows, columns = (jnp.arange(n) * size // n < image_size[:, axis, None]
                   for axis, (n, size) in enumerate(zip(cells, padded)))
  return rows[:, :, None] & columns[:, None, :]


def sine(valid: jax.Array, width: int) -> jax.Array:
  """Sines and cosines of both coordinates (DETR appendix A.4, after Parmar et al. 2018).

  Coordinates count valid cells from 1 and run to 2 pi over the image, so that they do not see the
  padding. The first half of the channels is y, the second x; in each, sines and cosines alternate.

  Args:
    valid: bool `[batch, height, width]`.
    width: channels, a multiple of 4.

  Returns:
    float32 `[batch, height, width, width]`.
  """
  if width % 4:
    raise ValueError(f'width={width}: sines and cosines of y and of x need a multiple of 4')
  half = width // 2
  powers = 10_000. ** (2 * (jnp.arange(half) // 2) / half)
  count = valid.astype(jnp.float32)

  def encode(axis):
    at = count.cumsum(axis)
    last = jax.lax.index_in_dim(at, -1, axis)
    angle = (at / (last + 1e-6) * 2 * math.pi)[..., None] / powers
    even = jnp.arange(half) % 2 == 0
    return jnp.where(even, jnp.sin(angle), jnp.cos(angle))
  return jnp.concatenate([encode(1), encode(2)], axis=-1)


class Learned(nn.Module):
  """A learned vector a column and one a row; columns come first.

  Attributes:
    width: channels, even.
    longest: most rows, and most columns.
    dtype: of the output; `row_embed` and `col_embed` `[longest, width / 2]` are float32.
  """
  width: int
  longest: int = 50
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, valid: jax.Array) -> jax.Array:
    """bool `[batch, height, width]` -> `[batch, height, width, width]`."""
    batch, height, width = valid.shape
    if max(height, width) > self.longest:
      raise ValueError(f'a feature map of {height}x{width}: learned positions end at '
                       f'{self.longest}; smaller images, or sine positions')
    table = lambda name: self.param(
        name, nn.with_logical_partitioning(nn.initializers.uniform(1.0), (None, 'embed')),
        (self.longest, self.width // 2), jnp.float32)
    rows, columns = table('row_embed')[:height], table('col_embed')[:width]
    shape = (batch, height, width, self.width // 2)
    return jnp.concatenate([jnp.broadcast_to(columns, shape),
                            jnp.broadcast_to(rows[:, None], shape)], -1).astype(self.dtype)
