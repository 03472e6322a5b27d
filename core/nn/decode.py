"""Generation a token at a time: the cache of keys and values, and the draw of a token."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from core.nn import attention


@flax.struct.dataclass
class Cache:
  """Keys and values of one layer's self-attention, of the positions that were computed already.

  The layers of a model keep a list of these, not one stack: an array that a loop carries is written
  in place, where a layer cut out of a stack would be copied for every token.

  Attributes:
    key: `[batch, heads, length, head_dim]`; rows from `position` on are zero.
    value: likewise.
    position: int32 scalar, how many positions are there.
  """
  key: jax.Array
  value: jax.Array
  position: jax.Array
  fixed = False  # Attention adds keys and values to it.

  @classmethod
  def empty(cls, batch: int, heads: int, length: int, head_dim: int, dtype: Any,
            value_dim: int | None = None) -> 'Cache':
    zeros = lambda size: jnp.zeros((batch, heads, length, size), dtype)
    return cls(zeros(head_dim), zeros(value_dim or head_dim), jnp.zeros((), jnp.int32))

  def grown(self, length: int) -> 'Cache':
    """With room for `length` positions; what attention costs is in proportion to the room."""
    more = ((0, 0), (0, 0), (0, length - self.key.shape[2]), (0, 0))
    return self.replace(key=jnp.pad(self.key, more), value=jnp.pad(self.value, more))

  def attend(self, query: jax.Array, key: jax.Array,
             value: jax.Array) -> tuple[jax.Array, 'Cache']:
    """Causal attention of new positions to themselves and to all before them.

    Args:
      query, key, value: `[batch, new, heads, head_dim]`; there must be room for them.

    Returns:
      `[batch, new, heads, head_dim]` in the dtype of `value`, and the cache after them.
    """
    new, head_dim = query.shape[1], query.shape[-1]
    put = lambda into, x: jax.lax.dynamic_update_slice_in_dim(
        into, x.swapaxes(1, 2).astype(into.dtype), self.position, axis=2)
    after = Cache(put(self.key, key), put(self.value, value), self.position + new)
    at = self.position + jnp.arange(new)
    seen = jnp.arange(after.key.shape[2]) <= at[:, None]
    query = query * jnp.asarray(head_dim ** -0.5, query.dtype)
    scores = jnp.einsum('bqhd,bhkd->bhqk', query, after.key, preferred_element_type=jnp.float32)
    weights = attention.masked_softmax(scores, seen).astype(value.dtype)
    return jnp.einsum('bhqk,bhkd->bqhd', weights, after.value), after


@flax.struct.dataclass
class Memory:
  """Keys and values of one layer's cross-attention: computed once a source, whatever is decoded.

  Several rows may read one source (the beams of a search): theirs stand side by side.

  Attributes:
    mask: bool `[batch, length]`, which positions of the source are there.
    key: `[batch, heads, length, head_dim]`, None until the first attention has computed it.
    value: likewise.
    weights: float32 `[batch, heads, rows, length]` of the last attention.
  """
  mask: jax.Array
  key: jax.Array | None = None
  value: jax.Array | None = None
  weights: jax.Array | None = None

  @property
  def fixed(self) -> bool:
    """Whether keys and values are there, so that attention need not compute them."""
    return self.key is not None

  def attend(self, query: jax.Array, key: jax.Array | None = None,
             value: jax.Array | None = None) -> tuple[jax.Array, 'Memory']:
    """Attention of queries to the memory.

    Args:
      query: `[batch * rows, 1, heads, head_dim]`.
      key, value: `[batch, length, heads, head_dim]`, the first time.

    Returns:
      `[batch * rows, 1, heads, head_dim]` in the dtype of `value`, and the memory, filled.
    """
    after = self if key is None else Memory(self.mask, key.swapaxes(1, 2), value.swapaxes(1, 2))
    grouped = query.reshape(len(after.mask), -1, *query.shape[2:])
    grouped = grouped * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum('bqhd,bhkd->bhqk', grouped, after.key, preferred_element_type=jnp.float32)
    weights = attention.masked_softmax(scores, after.mask[:, None, None])
    out = jnp.einsum('bhqk,bhkd->bqhd', weights.astype(after.value.dtype), after.value)
    return out.reshape(*query.shape[:-1], -1), after.replace(weights=weights)


@functools.cache
def compiler_options() -> dict[str, str]:
  """What `jax.jit` should be told about a function that generates, on the platform it runs on."""
  if jax.default_backend() != 'cpu':
    return {}
  # XLA's library kernels for the CPU give a product of a few rows to one thread; its own use all.
  options = {'xla_cpu_experimental_ynn_fusion_type': ''}
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except Exception:  # pylint: disable=broad-except
    return {}  # An experimental option: a compiler that no longer has it needs nothing.
  return options


def draw(rng: jax.Array, logits: jax.Array, temperature: jax.Array | float = 1.0, top_k: int = 0,
         top_p: float = 1.0) -> jax.Array:
  """Draws a token from each row.

  Args:
    rng: key.
    logits: `[..., tokens]`.
    temperature: logits are divided by it; 0 takes the most likely token (the first of equals).
    top_k: only the k most likely tokens (and those as likely as the k-th); 0 for all.
    top_p: of these only the most likely ones that together reach this probability (nucleus,
      Holtzman et al. 2020), at least one; 1 for all.

  Returns:
    int32 `[...]`.
  """
  logits = logits.astype(jnp.float32)
  greedy = logits.argmax(-1)
  scaled = logits / jnp.maximum(temperature, 1e-6)
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(scaled, top_k)[0][..., -1:]
    scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
  if top_p < 1:
    ordered = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
    chance = jax.nn.softmax(ordered, axis=-1)
    # A token is in when those before it do not reach top_p yet.
    inside = jnp.cumsum(chance, axis=-1) - chance < top_p
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
  drawn = jax.random.categorical(rng, scaled, axis=-1)
  return jnp.where(jnp.asarray(temperature) > 0, drawn, greedy).astype(jnp.int32)
