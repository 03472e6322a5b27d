"""DETR's Transformer: positions join queries and keys in every layer (section 3.2, figure 10)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core import partition
from core.nn import attention, blocks

# Name of the layers, of the encoder and of the decoder.
LAYERS = 'layers'
# torch's; flax has 1e-6.
EPSILON = 1e-5


def uniform(bound: float):
  """Initializer: uniform within `bound` of zero."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(features: int, fan_in: int, name: str, *, kernel_init=None, dtype: Any = jnp.float32,
          names: tuple[str | None, str | None] = ('embed', 'embed')) -> nn.Dense:
  """A layer with torch's default initialisation, uniform within 1 / sqrt(fan_in), where none is
  given; `names` are the kernel's logical ones."""
  default = uniform(fan_in ** -.5)
  return nn.Dense(
      features, dtype=dtype, name=name,
      kernel_init=nn.with_logical_partitioning(kernel_init or default, names),
      bias_init=nn.with_logical_partitioning(default, names[1:]))


class Layer(nn.Module):
  """A layer of the encoder, or with `cross` of the decoder.

  Attributes:
    cross: whether there is cross-attention between self-attention and the feed-forward network.
    heads: attention heads.
    mlp_dim: hidden width of the feed-forward network; 0 leaves it out (section 4.2, "FFN").
    norm: 'post' (published) or 'pre'.
    dropout: of attention weights, of the hidden layer and of every branch.
    keep: whether the output is also given to keep, as `blocks.run_blocks` wants it.
    dtype: computation dtype.
  """
  cross: bool
  heads: int
  mlp_dim: int
  norm: str = 'post'
  dropout: float = 0.0
  keep: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, positions: jax.Array, mask: jax.Array | None = None,
               memory: jax.Array | None = None, memory_positions: jax.Array | None = None,
               train: bool = False) -> Any:
    """Runs the layer.

    Args:
      x: `[batch, length, width]`.
      positions: broadcastable to `x`; added to what makes queries and keys, not values.
      mask: bool `[batch, 1, 1, keys]`, True for keys that are seen: of `x` in the encoder, of
        `memory` in the decoder.
      memory: `[batch, keys, width]`, with `cross`.
      memory_positions: like `memory`; added to its keys.
      train: draws dropout from the rng 'dropout'.
    """
    width = x.shape[-1]
    drop = nn.Dropout(self.dropout, deterministic=not train)

    def attend(name, query, key, value, mask):
      # torch draws query, key and value as one matrix [3 width, width].
      return attention.MultiHeadAttention(
          heads=self.heads, dtype=self.dtype, dropout_rate=self.dropout,
          kernel_init=uniform((6 / (4 * width)) ** .5),
          out_init=nn.initializers.xavier_uniform(), name=name)(
              query, key, value, mask=mask, train=train)

    def self_attention(x):
      at = x + positions
      return attend('self_attn', at, at, x, None if self.cross else mask)

    def cross_attention(x):
      return attend('cross_attn', x + positions, memory + memory_positions, memory, mask)

    def feed_forward(x):
      xavier = nn.initializers.xavier_uniform()
      hidden = nn.relu(dense(self.mlp_dim, width, 'linear1', kernel_init=xavier, dtype=self.dtype,
                             names=('embed', 'mlp'))(x))
      hidden = partition.constrain(hidden, ('batch', 'length', 'mlp'))
      return dense(width, self.mlp_dim, 'linear2', kernel_init=xavier, dtype=self.dtype,
                   names=('mlp', 'embed'))(drop(hidden))

    branches = [self_attention]
    if self.cross:
      branches.append(cross_attention)
    if self.mlp_dim:
      branches.append(feed_forward)
    for i, branch in enumerate(branches):
      norm = blocks.layer_norm(EPSILON, self.dtype, f'norm{i + 1}')
      x = x + drop(branch(norm(x))) if self.norm == 'pre' else norm(x + drop(branch(x)))
      x = partition.constrain(x, ('batch', 'length', 'embed'))
    return (x, x) if self.keep else x


class Transformer(nn.Module):
  """Encoder over the cells of a feature map, decoder over object queries.

  Attributes:
    encoder_layers, decoder_layers: how many; an encoder of 0 hands the features on.
    heads, mlp_dim, norm, dropout, dtype: see `Layer`.
    positions_at: 'attention' adds positions to queries and keys of every layer (published); 'input'
      adds them once, to what the encoder and the decoder begin with (table 3).
    scan: whether layers are compiled once and looped over.
    remat: see `blocks.run_blocks`.
  """
  encoder_layers: int = 6
  decoder_layers: int = 6
  heads: int = 8
  mlp_dim: int = 2048
  norm: str = 'post'
  dropout: float = 0.0
  positions_at: str = 'attention'
  scan: bool = True
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, positions: jax.Array, valid: jax.Array,
               queries: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
    """Finds what the queries ask for.

    Args:
      features: `[batch, cells, width]`.
      positions: `[batch, cells, width]`.
      valid: bool `[batch, cells]`, False for cells that are padding.
      queries: `[queries, width]`, their positions; their content starts as zeros.
      train: draws dropout from the rng 'dropout'.

    Returns:
      what every decoder layer found, normed, `[layers, batch, queries, width]`, and the encoder's
      output `[batch, cells, width]`.
    """
    mask = valid[:, None, None, :]
    features, positions = features.astype(self.dtype), positions.astype(self.dtype)
    queries = jnp.broadcast_to(queries.astype(self.dtype), (len(features), *queries.shape))
    start = jnp.zeros_like(queries)
    if self.positions_at == 'input':
      features, positions = features + positions, jnp.zeros_like(positions)
      start, queries = queries, start

    def stack(x, name, cross, depth, **inputs):
      return Stack(cross, depth, self.heads, self.mlp_dim, self.norm, self.dropout, self.scan,
                   self.remat, self.dtype, name=name)(x, train=train, mask=mask, **inputs)

    memory = stack(features, 'encoder', False, self.encoder_layers, positions=positions)
    found = stack(start, 'decoder', True, self.decoder_layers, positions=queries,
                  memory=memory, memory_positions=positions)
    return found, memory


class Stack(nn.Module):
  """The layers of one side and the norm behind them; see `Layer` and `Transformer`."""
  cross: bool
  depth: int
  heads: int
  mlp_dim: int
  norm: str
  dropout: float
  scan: bool
  remat: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool, **inputs: jax.Array) -> jax.Array:
    """`[batch, length, width]` -> the same; the decoder's is `[depth, ...]`, of every layer."""
    def make_layer(name):
      return Layer(self.cross, self.heads, self.mlp_dim, self.norm, self.dropout, self.cross,
                   self.dtype, name=name)

    if self.depth:
      x = blocks.run_blocks(make_layer, self.depth, x, prefix=LAYERS, scan=self.scan,
                            remat=self.remat, train=train, outputs=self.cross, **inputs)
    if self.cross:
      _, kept = x
      x = kept if self.scan else jnp.stack(kept)
    # The post-norm encoder ends in the norm of its last layer; the decoder has one of its own,
    # which all its layers share.
    if self.cross or self.norm == 'pre' and self.depth:
      x = blocks.layer_norm(EPSILON, self.dtype, 'norm')(x)
    return x
