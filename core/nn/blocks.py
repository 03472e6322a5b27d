"""Transformer blocks, and the loop that runs a stack of them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from core import partition
from core.nn import attention, dropout as dropout_lib, remat as remat_lib

ACTIVATIONS = {
    # The JAX ViT code uses the tanh form, BERT and torch ports the exact one.
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    # Not jax.nn.gelu, whose complementary error function costs four times as much on a CPU and
    # differs where the result is below 1e-6.
    'gelu_erf': lambda x: x * (.5 + .5 * lax.erf(x * np.sqrt(.5).astype(x.dtype))),
    # Image GPT section 2: x * sigmoid(1.702 x), from OpenAI's code.
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'swish': jax.nn.swish,
}


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
  """LayerNorm with float32 statistics and logically named parameters."""
  # The fast variance, E[x^2] - E[x]^2, loses digits in channels with a mean far from zero.
  return nn.LayerNorm(
      epsilon=epsilon, dtype=dtype, name=name, use_fast_variance=False,
      scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)))


class MlpBlock(nn.Module):
  """Dense, activation, dropout, Dense, dropout (ViT section 3.1, the public code's MlpBlock).

  Attributes:
    mlp_dim: hidden width.
    activation: a key of `ACTIVATIONS`.
    dtype: computation dtype.
    dropout_rate: after the activation and after the second layer.
    hidden_dropout: whether to drop after the activation too; BERT does not.
    kernel_init: initializer of both kernels.
    bias_init: initializer of both biases.
  """
  mlp_dim: int
  activation: str = 'gelu_tanh'
  dtype: Any = jnp.float32
  dropout_rate: float = 0.0
  hidden_dropout: bool = True
  kernel_init: Callable = nn.initializers.xavier_uniform()
  bias_init: Callable = nn.initializers.normal(1e-6)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps `[..., width]` to `[..., width]`."""
    def dense(features, names, name):
      return nn.Dense(
          features, dtype=self.dtype, name=name,
          kernel_init=nn.with_logical_partitioning(self.kernel_init, names),
          bias_init=nn.with_logical_partitioning(self.bias_init, names[1:]))

    dropout = dropout_lib.Dropout(self.dropout_rate, deterministic=not train)
    hidden = dense(self.mlp_dim, ('embed', 'mlp'), 'Dense_0')(x)
    hidden = partition.constrain(hidden, ('batch', 'length', 'mlp'))
    hidden = ACTIVATIONS[self.activation](hidden)
    if self.hidden_dropout:
      hidden = dropout(hidden)
    return dropout(dense(x.shape[-1], ('mlp', 'embed'), 'Dense_1')(hidden))


class TransformerBlock(nn.Module):
  """Self-attention, optional cross-attention and an MLP, each around a residual.

  With norm='pre' a branch is x + f(LN(x)) (ViT, Image GPT); with 'post' it is LN(x + f(x))
  (Transformer, BERT). The parameters carry the public linen names: `LayerNorm_i`,
  `MultiHeadDotProductAttention_i` and `MlpBlock_0`, numbered in the order of the branches.

  Attributes:
    heads: attention heads.
    mlp_dim: hidden width of the MLP.
    norm: 'pre' or 'post'.
    cross: whether there is a cross-attention branch between self-attention and MLP.
    causal: whether self-attention hides the future.
    head_dim: size of a head; by default width / heads.
    value_dim: size of a head's values where it is another.
    activation: a key of `ACTIVATIONS`.
    epsilon: of the layer norms: 1e-6 in flax, 1e-5 in torch, 1e-12 in BERT.
    dtype: computation dtype.
    dropout_rate: dropout of each branch's output and inside the MLP.
    attention_dropout_rate: dropout of the attention weights.
    hidden_dropout: whether the MLP drops after its activation.
    residual: whether a branch is added to what it read; without, norm='post' is LN(f(x)).
    use_bias: whether the attention projections have biases.
    kernel_init: initializer of all kernels.
    mlp_bias_init: initializer of the MLP's biases.
  """
  heads: int
  mlp_dim: int
  norm: str = 'pre'
  cross: bool = False
  causal: bool = False
  head_dim: int | None = None
  value_dim: int | None = None
  activation: str = 'gelu_tanh'
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  hidden_dropout: bool = True
  residual: bool = True
  use_bias: bool = True
  kernel_init: Callable = nn.initializers.xavier_uniform()
  mlp_bias_init: Callable = nn.initializers.normal(1e-6)

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      *,
      context: jax.Array | None = None,
      mask: jax.Array | None = None,
      memory: jax.Array | None = None,
      memory_mask: jax.Array | None = None,
      branch_drop_rate: jax.Array | float | None = None,
      cache: tuple[Any, ...] | None = None,
      train: bool = False,
  ) -> jax.Array | tuple[jax.Array, tuple[Any, ...]]:
    """Runs the block.

    Args:
      x: `[batch, length, width]`.
      context: `[batch, k_len, width]`, all positions, where `x` is only those that are wanted of
        them; norm='post' only.
      mask: bool, broadcastable to `[batch, heads, length, k_len]`, True lets a query see a key;
        a padding mask is `[batch, 1, 1, k_len]`. k_len is `length` without `context`.
      memory: `[batch, memory_length, memory_width]`, what cross-attention reads.
      memory_mask: bool, broadcastable to `[batch, heads, length, memory_length]`.
      branch_drop_rate: scalar in [0, 1): in training, how often an example goes around a branch
        (stochastic depth, Huang et al. 2016, with the kept branches scaled up instead of scaling
        down in evaluation); None for never.
      cache: in generation, the `decode.Cache` of the self-attention and, with `cross`, the
        `decode.Memory` of the memory, which once filled need not be given.
      train: switches dropout on, drawn from the rng 'dropout'.

    Returns:
      `[batch, length, width]` in `dtype`; with `cache` a pair with the caches after.
    """
    if self.norm not in ('pre', 'post'):
      raise ValueError(f"norm={self.norm!r}: expected 'pre' or 'post'")
    filled = cache is not None and self.cross and cache[1].fixed
    if context is not None and self.norm != 'post':
      raise ValueError("a block with norm='pre' takes no context: it would need its own norm")
    if self.cross != (memory is not None or filled):
      raise ValueError(f'a block with cross={self.cross} was called '
                       f'{"without" if self.cross else "with"} memory')
    drop = dropout_lib.Dropout(self.dropout_rate, deterministic=not train)

    caches = []

    def attend(index, x, *args, **kwargs):
      out = attention.MultiHeadAttention(
          heads=self.heads, head_dim=self.head_dim, value_dim=self.value_dim, dtype=self.dtype,
          use_bias=self.use_bias,
          dropout_rate=self.attention_dropout_rate, kernel_init=self.kernel_init,
          name=f'MultiHeadDotProductAttention_{index}')(
              x, *args, cache=cache and cache[index], train=train, **kwargs)
      if cache is not None:
        out, after = out
        caches.append(after)
      return drop(out)

    def mlp(x):
      return MlpBlock(
          mlp_dim=self.mlp_dim, activation=self.activation, dtype=self.dtype,
          dropout_rate=self.dropout_rate, hidden_dropout=self.hidden_dropout,
          kernel_init=self.kernel_init, bias_init=self.mlp_bias_init,
          name='MlpBlock_0')(x, train=train)

    def drop_branch(y):
      if branch_drop_rate is None or not train:
        return y
      keep = jax.random.bernoulli(
          self.make_rng('dropout'), 1.0 - branch_drop_rate, (y.shape[0], 1, 1))
      # Scaled in float32: rounded to bfloat16 the factor would be off for every example alike.
      return (y * jnp.where(keep, 1.0 / (1.0 - branch_drop_rate), 0.0)).astype(self.dtype)

    branches = [lambda x: attend(
        0, x, None if context is None else context.astype(self.dtype), mask=mask,
        causal=self.causal)]
    if self.cross:
      branches.append(lambda x: attend(1, x, memory, mask=memory_mask))
    branches.append(mlp)

    x = x.astype(self.dtype)
    for i, branch in enumerate(branches):
      norm = layer_norm(self.epsilon, self.dtype, f'LayerNorm_{i}')
      before = x if self.residual else 0
      if self.norm == 'pre':
        x = before + drop_branch(branch(norm(x)))
      else:
        x = norm(before + drop_branch(branch(x)))
      x = partition.constrain(x, ('batch', 'length', 'embed'))
    return x if cache is None else (x, tuple(caches))


def run_blocks(
    make_block: Callable[..., nn.Module],
    depth: int,
    x: jax.Array,
    *,
    prefix: str,
    scan: bool = False,
    remat: str = 'none',
    train: bool = False,
    layer_inputs: Mapping[str, Any] | None = None,
    outputs: bool = False,
    **inputs: jax.Array | None,
) -> jax.Array | tuple[jax.Array, Any]:
  """Runs `depth` blocks of equal shape one after the other; call it inside a compact module.

  Unrolled, the blocks are `{prefix}_{i}`. Scanned, there is one set of parameters `{prefix}` whose
  arrays are stacked on axis 0 with the logical name 'layers': the compiler sees one block, which
  for deep models compiles many times faster. Both give the same outputs for the same weights (see
  `stack_layers`); dropout draws differ. What blocks sow is stacked like the parameters.

  Args:
    make_block: makes a block from the keyword argument `name`.
    depth: number of blocks.
    x: what flows through the blocks, `[batch, length, width]`.
    prefix: name of the blocks' parameters.
    scan: whether to compile one block and loop, or all of them.
    remat: what a block keeps for the backward pass, see `core.nn.remat`.
    train: passed to every block.
    layer_inputs: arrays `[depth, ...]`, or unrolled also lists; block i gets row i under the same
      keyword.
    outputs: whether a block returns a pair: what flows on, and something to keep.
    **inputs: arrays (or None) that every block gets alike, such as masks and memory.

  Returns:
    the last block's output; with `outputs` a pair with what the blocks gave to keep: unrolled a
    list, scanned stacked on axis 0.
  """
  layer_inputs = dict(layer_inputs or {})

  def step(block, x, inputs, layer):
    made = block(x, train=train, **inputs, **layer)
    return made if outputs else (made, None)

  # Inside a scan XLA cannot merge the second computation with the first, so it need not be prevented
  # from it.
  step = remat_lib.remat(step, remat, prevent_cse=not scan)
  if scan:
    step = nn.scan(
        step, length=depth, in_axes=(nn.broadcast, 0),
        variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True},
        metadata_params={nn.PARTITION_NAME: 'layers'})
    x, kept = step(make_block(name=prefix), x, inputs, layer_inputs)
    return (x, kept) if outputs else x
  kept = []
  for i in range(depth):
    layer = {name: rows[i] for name, rows in layer_inputs.items()}
    x, out = step(make_block(name=f'{prefix}_{i}'), x, inputs, layer)
    kept.append(out)
  return (x, kept) if outputs else x


def stack_layers(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Turns the unrolled layout `{prefix}_{i}` into the scanned one.

  Args:
    params: the tree that holds the blocks; its other entries are kept as they are.
    prefix: name of the blocks.

  Returns:
    a new tree with `{prefix}`, whose arrays are stacked on axis 0. numpy stays numpy.
  """
  depth = sum(_layer_index(name, prefix) is not None for name in params)
  blocks = [params[f'{prefix}_{i}'] for i in range(depth)]
  if not blocks:
    raise ValueError(f'no {prefix}_0 among {sorted(params)}')

  def stack(*leaves):
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return (np if on_host else jnp).stack(leaves)
  others = {k: v for k, v in params.items() if _layer_index(k, prefix) is None}
  return {**others, prefix: jax.tree.map(stack, *blocks)}


def unstack_layers(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Turns the scanned layout `{prefix}` into the unrolled one: the inverse of `stack_layers`."""
  others = {k: v for k, v in params.items() if k != prefix}
  depth = jax.tree.leaves(params[prefix])[0].shape[0]
  blocks = {f'{prefix}_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], params[prefix])
            for i in range(depth)}
  return {**others, **blocks}


def _layer_index(name: str, prefix: str) -> int | None:
  index = name.removeprefix(f'{prefix}_')
  return int(index) if index != name and index.isdigit() else None
