"""Attention: one function that picks an implementation, and one module with public kernels.

Every paper goes through `dot_product_attention`. What runs behind it depends on where the code
will run (`partition.platform()`, which is not the tracing host when compiling ahead of time) and
on what is asked: a mask, dropout, or the weights themselves rule some kernels out.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from core import partition
from core.nn import dropout as dropout_lib

# Splash is for the lengths at which the score matrix no longer fits on the chip; below, XLA's own
# fusions keep it there.
_SPLASH_MIN_LENGTH = 1024
# Splash walks the score matrix in blocks; the largest of these that divides a length is used.
_SPLASH_BLOCKS = (512, 256, 128)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    return_weights: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """softmax(query key^T / sqrt(head_dim)) value, "Attention Is All You Need" section 3.2.1.

  The softmax is computed in float32 whatever the inputs are. A query that may attend to nothing
  gets a zero output (and zero weights), never NaN, in every implementation.

  Args:
    query: `[batch, q_len, heads, head_dim]` float.
    key: `[batch, k_len, heads, head_dim]`, same dtype.
    value: `[batch, k_len, heads, head_dim]`, same dtype; heads of another size go through XLA.
    mask: bool, broadcastable to `[batch, heads, q_len, k_len]`; True lets a query see a key.
    causal: also hide every key after the query's own position; needs q_len == k_len.
    dropout_rate: share of the weights that is dropped; the rest is scaled up.
    dropout_rng: key for the dropout; None switches it off.
    return_weights: also return the weights as they are before dropout.
    implementation: 'xla', 'cudnn' or 'splash'; by default the fastest that is eligible.

  Returns:
    `[batch, q_len, heads, head_dim]` in the dtype of `query`; with `return_weights` a pair with
    the float32 weights `[batch, heads, q_len, k_len]`.
  """
  if causal and query.shape[1] != key.shape[1]:
    raise ValueError(f'causal attention needs as many queries as keys, not {query.shape[1]} and '
                     f'{key.shape[1]}; a decoder with a cache passes a mask')
  dropout = dropout_rate > 0.0 and dropout_rng is not None
  if implementation is None:
    implementation = 'xla' if return_weights or dropout else _choose(query, key, value, mask)
  elif implementation != 'xla' and (return_weights or dropout):
    raise ValueError(f'{implementation!r} attention has neither weights to return nor dropout')
  if implementation == 'splash':
    if mask is not None:
      raise ValueError("'splash' attention is either full or causal: it takes no mask")
    return _splash(query, key, value, causal)
  if implementation == 'cudnn':
    return _cudnn(query, key, value, mask, causal)
  if implementation != 'xla':
    raise ValueError(f"implementation={implementation!r}: expected 'xla', 'cudnn' or 'splash'")
  if causal and mask is None and not dropout and not return_weights:
    return _xla_causal(query, key, value)
  return _xla(query, key, value, mask, causal, dropout_rate if dropout else 0.0, dropout_rng,
              return_weights)


def _choose(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> str:
  """The fastest implementation for these shapes on the platform that will run them."""
  head_dim = query.shape[-1]
  if value.shape[-1] != head_dim:
    return 'xla'
  platform = partition.platform()
  if platform == 'gpu':
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if half and head_dim % 8 == 0 and head_dim <= 128:
      return 'cudnn'
  elif platform == 'tpu':
    lengths = (query.shape[1], key.shape[1])
    if (mask is None and head_dim % 8 == 0 and head_dim <= 256
        and max(lengths) >= _SPLASH_MIN_LENGTH and all(n % 128 == 0 for n in lengths)):
      return 'splash'
  return 'xla'


def _xla(query, key, value, mask, causal, dropout_rate, dropout_rng, return_weights):
  """Plain XLA: any mask, dropout, weights on demand."""
  batch, q_len, heads, head_dim = query.shape
  k_len = key.shape[1]
  if causal:
    triangle = jnp.tril(jnp.ones((q_len, k_len), bool))
    mask = triangle if mask is None else mask & triangle
  query = query * jnp.asarray(head_dim ** -0.5, query.dtype)
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
  if not return_weights and not dropout_rate:
    # Dividing after the product touches head_dim numbers a query instead of k_len.
    exp, total = _masked_exp(scores, mask)
    out = jnp.einsum('bhqk,bkhd->bqhd', exp.astype(value.dtype), value,
                     preferred_element_type=jnp.float32)
    return (out / jnp.swapaxes(total, 1, 2)).astype(value.dtype)
  weights = masked_softmax(scores, mask)
  kept = weights
  if dropout_rate:
    kept = dropout_lib.dropout(weights, dropout_rate, dropout_rng)
  out = jnp.einsum('bhqk,bkhd->bqhd', kept.astype(value.dtype), value)
  return (out, weights) if return_weights else out


def _xla_causal(query, key, value):
  """Causal attention a block of queries at a time, each with the keys it may see: the half of the
  scores that the mask would throw away is for the most part never computed, nor kept."""
  length = query.shape[1]
  count = next((n for n in (4, 2) if length >= 64 * n and length % n == 0), 1)
  size = length // count
  outs = []
  for stop in range(size, length + 1, size):
    seen = jnp.arange(stop) <= jnp.arange(stop - size, stop)[:, None]
    outs.append(_xla(query[:, stop - size:stop], key[:, :stop], value[:, :stop], seen, False, 0.0,
                     None, False))
  return jnp.concatenate(outs, axis=1)


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Softmax over the last axis where hidden entries weigh exactly zero.

  Args:
    scores: float32 `[..., k]`.
    mask: bool, broadcastable to `scores`, True for entries that count; or None.

  Returns:
    float32 like `scores`; a row with nothing to count is all zeros.
  """
  exp, total = _masked_exp(scores, mask)
  return exp / total


def _masked_exp(scores, mask):
  """Numerators of a softmax `[..., k]` and what they are divided by `[..., 1]`."""
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  exp = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  if mask is None:
    return exp, exp.sum(axis=-1, keepdims=True)
  exp = jnp.where(mask, exp, 0.0)
  total = exp.sum(axis=-1, keepdims=True)
  return exp, jnp.where(total > 0.0, total, 1.0)


def _cudnn(query, key, value, mask, causal):
  """cuDNN flash attention (NVIDIA, half precision)."""
  if mask is not None:
    mask = jnp.broadcast_to(mask, jnp.broadcast_shapes(mask.shape, (1, 1, 1, 1)))
    if causal:
      mask = mask & jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
      causal = False
  out = jax.nn.dot_product_attention(
      query, key, value, mask=mask, is_causal=causal, implementation='cudnn')
  if mask is None:
    return out
  # cuDNN spreads the weight of a fully hidden row evenly over all keys.
  seen = mask.any(axis=-1, keepdims=True)
  return jnp.where(jnp.swapaxes(seen, 1, 2), out, 0)


def _splash(query, key, value, causal):
  """Pallas splash attention (TPU): no score matrix in memory, hidden blocks are skipped.

  A Pallas call is opaque to the partitioner, so each device runs it on its own examples and heads
  under `shard_map`. Off a TPU the kernel is interpreted, which only tests want.
  """
  # Imported here: Pallas for TPU takes a second to import and most runs never use it.
  from jax.experimental.pallas.ops.tpu import splash_attention

  def block(length: int) -> int:
    return next(size for size in _SPLASH_BLOCKS if length % size == 0)

  def attend(query, key, value):
    """Attention of one device's `[batch, heads, length, head_dim]`."""
    shape = (query.shape[2], key.shape[2])
    mask = (splash_attention.CausalMask if causal else splash_attention.FullMask)(shape)
    q, kv = block(shape[0]), block(shape[1])
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=splash_attention.BlockSizes(
            block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv,
            block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv),
        head_shards=1, q_seq_shards=1, interpret=partition.platform() != 'tpu')
    return jax.vmap(kernel)(query, key, value)

  scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
  heads_first = [jnp.swapaxes(x, 1, 2) for x in (scaled, key, value)]
  layout = partition.ambient()
  if layout is not None and layout.mesh.size > 1:
    spec = layout.spec(('batch', 'heads', None, None), heads_first[0].shape)
    attend = jax.shard_map(attend, mesh=layout.mesh, in_specs=(spec,) * 3, out_specs=spec,
                           check_vma=False)
  return jnp.swapaxes(attend(*heads_first), 1, 2)


def _flattened(init: Callable, inputs: int) -> Callable:
  """Initialises a rank-3 kernel as the matrix it is, so that fans are those of the matrix.

  Args:
    init: initializer of a matrix.
    inputs: how many leading dimensions of the kernel are contracted with the input.
  """
  def flat_init(key, shape, dtype=jnp.float32):
    matrix = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    return init(key, matrix, dtype).reshape(shape)
  return flat_init


class _Projection(nn.Module):
  """The kernel and bias of one projection; the caller multiplies.

  Attributes:
    kernel_shape: `(width, heads, head_dim)`, or `(heads, head_dim, width)` for the output.
    kernel_names: logical names of the kernel's dimensions.
    inputs: number of leading kernel dimensions that are contracted.
  """
  kernel_shape: tuple[int, ...]
  kernel_names: tuple[str, ...]
  inputs: int
  use_bias: bool
  kernel_init: Callable
  bias_init: Callable
  dtype: Any

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array | None]:
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(_flattened(self.kernel_init, self.inputs),
                                               self.kernel_names), self.kernel_shape, jnp.float32)
    bias = None
    if self.use_bias:
      bias = self.param(
          'bias', nn.with_logical_partitioning(self.bias_init, self.kernel_names[self.inputs:]),
          self.kernel_shape[self.inputs:], jnp.float32).astype(self.dtype)
    return kernel.astype(self.dtype), bias


class MultiHeadAttention(nn.Module):
  """Multi-head attention with the parameters of the public ViT checkpoints.

  `query`, `key` and `value` have a kernel `[width, heads, head_dim]` and a bias
  `[heads, head_dim]`; `out` has a kernel `[heads, head_dim, width]` and a bias `[width]`. When the
  collection 'intermediates' is mutable, the weights `[batch, heads, q_len, k_len]` are sown there
  as 'attention': that is where the pictures get them. Otherwise they need never exist.

  Attributes:
    heads: number of heads.
    head_dim: size of a head; by default the query width divided by `heads`.
    value_dim: size of a head's values where it is another (d_v of the Transformer's table 3).
    out_width: width of the output; by default that of the queries.
    dtype: computation dtype; parameters are float32.
    use_bias: whether the four projections have biases.
    dropout_rate: dropout of the attention weights.
    kernel_init: initializer of the flattened 2-D kernels.
    out_init: that of the kernel of `out`; None for `kernel_init`.
    bias_init: initializer of the biases.
    implementation: passed on to `dot_product_attention`.
  """
  heads: int
  head_dim: int | None = None
  value_dim: int | None = None
  out_width: int | None = None
  dtype: Any = jnp.float32
  use_bias: bool = True
  dropout_rate: float = 0.0
  kernel_init: Callable = nn.initializers.xavier_uniform()
  out_init: Callable | None = None
  bias_init: Callable = nn.initializers.zeros
  implementation: str | None = None

  @nn.compact
  def __call__(
      self,
      inputs_q: jax.Array,
      inputs_kv: jax.Array | None = None,
      inputs_v: jax.Array | None = None,
      *,
      mask: jax.Array | None = None,
      causal: bool = False,
      cache: Any = None,
      train: bool = False,
  ) -> jax.Array | tuple[jax.Array, Any]:
    """Attends from `inputs_q` to `inputs_kv`.

    Args:
      inputs_q: `[batch, q_len, q_width]`.
      inputs_kv: `[batch, k_len, kv_width]`; None for self-attention.
      inputs_v: `[batch, k_len, v_width]` where values are read from something else than keys
        (DETR adds positions to queries and keys alone); None to read them from the keys' input.
      mask: bool, broadcastable to `[batch, heads, q_len, k_len]`, True lets a query see a key.
      causal: hide keys after the query's own position.
      cache: in generation, the `decode.Cache` of what came before, or the `decode.Memory` of a
        source, which once filled needs no `inputs_kv`; it decides what a query sees.
      train: draws attention dropout from the rng 'dropout'.

    Returns:
      `[batch, q_len, out_width]` in `dtype`; with `cache` a pair with the cache after.
    """
    width = inputs_q.shape[-1]
    head_dim = self.head_dim or width // self.heads
    if not self.head_dim and width % self.heads:
      raise ValueError(f'width {width} does not divide into {self.heads} heads')
    fixed = cache is not None and cache.fixed
    inputs_k = inputs_q if inputs_kv is None else inputs_kv
    inputs_v = inputs_k if inputs_v is None else inputs_v

    def projection(name, inputs, size):
      return _Projection((inputs.shape[-1], self.heads, size), ('embed', 'heads', 'kv'), 1,
                         self.use_bias, self.kernel_init, self.bias_init, self.dtype, name=name)()

    value_dim = self.value_dim or head_dim
    sources = (inputs_q,) if fixed else (inputs_q, inputs_k, inputs_v)
    params = [projection(*named) for named in zip(
        ('query', 'key', 'value'), sources, (head_dim, head_dim, value_dim))]
    # Neighbours that read the same input share one matrix product: all three in self-attention,
    # keys and values in cross-attention, queries and keys in DETR's encoder. Not in generation:
    # side by side the kernels are a copy, which would cost more for one token than it saves.
    projected = []
    start = 0
    while start < len(sources):
      end = start + 1
      while (cache is None and end < 3 and sources[end] is sources[start]
             and params[end][0].shape == params[start][0].shape):
        end += 1
      projected += _project(sources[start].astype(self.dtype), params[start:end])
      start = end
    projected = [partition.constrain(x, ('batch', 'length', 'heads', 'kv')) for x in projected]

    if cache is not None:
      out, cache = cache.attend(*projected)
    else:
      out = self._attend(*projected, mask, causal, train)

    kernel, bias = _Projection(
        (self.heads, value_dim, self.out_width or width), ('heads', 'kv', 'embed'), 2,
        self.use_bias, self.out_init or self.kernel_init, self.bias_init, self.dtype, name='out')()
    out = lax.dot_general(out, kernel, (((2, 3), (0, 1)), ((), ())))
    if bias is not None:
      out = out + bias
    return out if cache is None else (out, cache)

  def _attend(self, query, key, value, mask, causal, train):
    weights_wanted = self.is_mutable_collection('intermediates') and not self.is_initializing()
    out = dot_product_attention(
        query, key, value, mask=mask, causal=causal, dropout_rate=self.dropout_rate,
        dropout_rng=self.make_rng('dropout') if train and self.dropout_rate else None,
        return_weights=weights_wanted,
        implementation=None if weights_wanted else self.implementation)
    if weights_wanted:
      out, weights = out
      self.sow('intermediates', 'attention', weights)
    return out


def _project(inputs: jax.Array, params: list) -> list[jax.Array]:
  """Projects one input with several kernels in one product.

  Args:
    inputs: `[batch, length, width]`.
    params: pairs of a kernel `[width, heads, head_dim]` and a bias `[heads, head_dim]` or None.

  Returns:
    one `[batch, length, heads, head_dim]` for each pair.
  """
  if len(params) == 1:
    kernel, bias = params[0]
    out = lax.dot_general(inputs, kernel, (((2,), (0,)), ((), ())))
    return [out if bias is None else out + bias]
  # Stacked on an axis of their own: heads split over devices stay split.
  kernel = jnp.stack([kernel for kernel, _ in params], axis=1)
  out = lax.dot_general(inputs, kernel, (((2,), (0,)), ((), ())))
  if params[0][1] is not None:
    out = out + jnp.stack([bias for _, bias in params])
  return [out[:, :, i] for i in range(len(params))]
