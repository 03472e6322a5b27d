"""Position embeddings."""

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
