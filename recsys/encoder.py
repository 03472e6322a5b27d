"""The model of BERT4Rec (Sun et al., 2019, section 3) and, made causal, of SASRec.

Where the paper is silent its authors' code is followed: a LayerNorm and dropout after the sum of
embeddings, a segment embedding that is one vector for all, and BERT's transform before the output.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core import partition
from core.nn import blocks, dropout as dropout_lib, remat as remat_lib

LAYERS = 'encoderblock'
TABLE, BIAS = 'item_embedding', 'output_bias'
_EPSILON = 1e-12


class Encoder(nn.Module):
  """Post-norm Transformer blocks over a sequence of items.

  The item table `item_embedding` `[rows, width]` is also the output's (equation 7); with
  `transform` there is a bias `output_bias` `[rows]`. Neither is used here for the output: what is
  made of `states` is the loss's and the ranking's matter.

  Attributes:
    rows: of the item table: padding 0, the items from 1, then special items.
    length: of the position table.
    width, depth, heads: of the blocks.
    mlp_dim: inner width of the feed-forward networks.
    causal: whether a position sees only itself and what is before it (SASRec).
    transform: whether states pass BERT's dense layer, GELU and LayerNorm before the output.
    positions: whether there are position embeddings.
    segments: whether the released code's segment table `[2, width]` is there, of which row 0 is
      added everywhere.
    residual: whether blocks have residual connections.
    dropout: of the embeddings and of every branch's output.
    attention_dropout: of the attention weights.
    dtype: computation dtype; parameters are float32.
    remat: what the backward pass computes again: 'none', 'dots' or 'full'.
  """
  rows: int
  length: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  causal: bool = False
  transform: bool = True
  positions: bool = True
  segments: bool = True
  residual: bool = True
  dropout: float = 0.0
  attention_dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, items: jax.Array, slots: jax.Array, *, train: bool = False) -> jax.Array:
    """Encodes sequences and reads some of their positions.

    Args:
      items: int32 `[batch, n]`, n at most `length`; 0 is padding, on either side.
      slots: int32 `[batch, m]`, positions to read.
      train: switches dropout on, drawn from the rng 'dropout'.

    Returns:
      states `[batch, m, width]` in `dtype`; their products with the rows of the table, plus the
      bias, are the logits.
    """
    # Cut at two standard deviations, without correcting for what is cut: TensorFlow's law.
    init = nn.initializers.truncated_normal(.02)
    table = lambda name, shape, names: self.param(
        name, nn.with_logical_partitioning(init, names), shape, jnp.float32)
    x = table(TABLE, (self.rows, self.width), ('vocab', 'embed')).astype(self.dtype)[items]
    if self.segments:
      x = x + table('segment_embedding', (2, self.width), (None, 'embed'))[0].astype(self.dtype)
    if self.positions:
      rows = table('position_embedding', (self.length, self.width), ('length', 'embed'))
      x = x + rows[:items.shape[1]].astype(self.dtype)
    x = blocks.layer_norm(_EPSILON, self.dtype, 'embedding_norm')(x)
    x = dropout_lib.Dropout(self.dropout, deterministic=not train)(x)
    x = partition.constrain(x, ('batch', 'length', 'embed'))

    def make_block(name, causal=self.causal):
      return blocks.TransformerBlock(
          self.heads, self.mlp_dim, norm='post', causal=causal, activation='gelu_erf',
          epsilon=_EPSILON, dtype=self.dtype, dropout_rate=self.dropout,
          attention_dropout_rate=self.attention_dropout, hidden_dropout=False,
          residual=self.residual, kernel_init=init, mlp_bias_init=nn.initializers.zeros, name=name)

    seen = (items > 0)[:, None, None, :]
    x = blocks.run_blocks(make_block, self.depth - 1, x, prefix=LAYERS, remat=self.remat,
                          train=train, mask=seen)
    # Of the last block only the slots are read, and only they are computed.
    if self.causal:
      seen = seen & (jnp.arange(items.shape[1]) <= slots[:, None, :, None])

    def last(block, wanted, x):
      return block(wanted, context=x, mask=seen, train=train)
    x = remat_lib.remat(last, self.remat)(
        make_block(f'{LAYERS}_{self.depth - 1}', causal=False),
        jnp.take_along_axis(x, slots[..., None], axis=1), x)
    if self.transform:
      x = nn.Dense(self.width, dtype=self.dtype, name='transform',
                   kernel_init=nn.with_logical_partitioning(init, ('embed', None)),
                   bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)))(x)
      x = blocks.layer_norm(_EPSILON, self.dtype, 'transform_norm')(
          blocks.ACTIVATIONS['gelu_erf'](x))
      self.param(BIAS, nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',)),
                 (self.rows,), jnp.float32)
    return x


def logits(params, states: jax.Array) -> jax.Array:
  """Scores of every row of the item table (equation 7): float32 `[..., rows]`.

  Args:
    params: of an `Encoder`.
    states: `[..., width]`, what it returned.
  """
  scores = jnp.einsum('...d,vd->...v', states, params[TABLE].astype(states.dtype),
                      preferred_element_type=jnp.float32)
  return scores + params[BIAS] if BIAS in params else scores


def row_logits(params, states: jax.Array, rows: jax.Array) -> jax.Array:
  """Scores of one row each: float32 `[...]` for states `[..., width]` and rows int `[...]`."""
  chosen = params[TABLE][rows].astype(states.dtype)
  scores = jnp.sum((states * chosen).astype(jnp.float32), axis=-1)
  return scores + params[BIAS][rows] if BIAS in params else scores
