"""Dropout (Srivastava et al., 2014) with a quarter of the random numbers of flax's.

Small models on a CPU spend a quarter of their time drawing random words. One evaluation of
Threefry, of whose 64 bits `jax.random.bits` keeps 32, decides about four values here, each by 16
bits: a rate is met to within 1/131072. Which values are dropped does not depend on how an array is
split over devices.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend import random as threefry


def dropout(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
  """Sets values to zero with chance `rate` and scales up the others by 1 / (1 - rate).

  Args:
    x: `[..., n]` float, fewer than 2^34 values.
    rate: in [0, 1].
    rng: key.
  """
  if rate >= 1:
    return jnp.zeros_like(x)
  width = x.shape[-1]
  shape = (*x.shape[:-1], -(-width // 4))
  key = jax.random.key_data(rng).astype(jnp.uint32)
  place = sum(lax.broadcasted_iota(jnp.uint32, shape, dim) * math.prod(shape[dim + 1:])
              for dim in range(len(shape)))
  words = threefry.threefry2x32_p.bind(key[0], key[1], place, jnp.zeros_like(place))
  quarters = [part for word in words for part in (word & 0xFFFF, word >> 16)]
  drawn = jnp.concatenate(quarters, axis=-1)[..., :width]
  return jnp.where(drawn >= round(rate * 2 ** 16), x / (1 - rate), 0).astype(x.dtype)


class Dropout(nn.Module):
  """`dropout` with the rng 'dropout', where a module trains.

  Attributes:
    rate: share of the values that is dropped.
    deterministic: whether nothing is.
  """
  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.deterministic or not self.rate:
      return x
    return dropout(x, self.rate, self.make_rng('dropout'))
