"""The Transformer: Vaswani et al., "Attention Is All You Need", 2017.

Where the paper is silent its authors' code of that time (tensor2tensor, `transformer_base_v1`) is
followed: no biases in attention, dropout on the sum of embedding and position and on what every
sublayer adds and nowhere else, and a zero vector where the decoder begins.
"""

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from core import partition
from core.nn import blocks, decode, positions

LAYERS = 'layers'
POSITIONS = (*positions.SINUSOIDS, 'learned')


@flax.struct.dataclass
class Sources:
  """What generation reads of a model and its sources.

  Attributes:
    layers: keys and values, a decoder layer each.
    output: the matrix of the logits as `[width, vocab]`, or None for the embedding itself. XLA's
      products of a few rows on a CPU are several times as slow with the rows of the embedding.
  """
  layers: list[decode.Memory]
  output: jax.Array | None


class Transformer(nn.Module):
  """Encoder and decoder; the methods that every translation model has.

  Attributes:
    vocab: size of the vocabulary of the target, and of the source when that is shared.
    width, depth, heads, mlp_dim: d_model, N, h and d_ff of the paper's table 3.
    source_vocab: size of the source's own vocabulary; 0 shares one matrix between both embeddings
      and the softmax (section 3.4), else the target's is shared with the softmax alone.
    head_dim, value_dim: d_k and d_v; None for width / heads.
    norm: 'post' as in the paper, or 'pre' with a norm at the end of either stack.
    positions: one of `POSITIONS`.
    max_length: rows of learned positions.
    dropout: residual and embedding dropout (section 5.4).
    attention_dropout: of the attention weights, which the paper has not.
    hidden_dropout: whether to drop after the ReLU too.
    attention_bias: whether attention projections have biases.
    activation: 'relu' in the paper.
    epsilon: of the layer norms.
    dtype: computation dtype; parameters, softmax and logits are float32.
    scan: one compiled layer instead of `depth`.
    remat: what the backward pass computes again: 'none', 'dots' or 'full'.
  """
  vocab: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  source_vocab: int = 0
  head_dim: int | None = None
  value_dim: int | None = None
  norm: str = 'post'
  positions: str = 'paper'
  max_length: int = 0
  dropout: float = 0.0
  attention_dropout: float = 0.0
  hidden_dropout: bool = False
  attention_bias: bool = False
  activation: str = 'relu'
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  scan: bool = False
  remat: str = 'none'

  def setup(self):
    table = lambda name, rows: self.param(
        name, nn.with_logical_partitioning(nn.initializers.normal(self.width ** -0.5),
                                           ('vocab', 'embed')), (rows, self.width), jnp.float32)
    self.table = table('embedding', self.vocab)
    self.source_table = table('source_embedding', self.source_vocab) if self.source_vocab else None
    if self.positions == 'learned':
      self.position_tables = [self.param(
          f'{side}_positions', nn.with_logical_partitioning(
              nn.initializers.normal(self.width ** -0.5), ('length', 'embed')),
          (self.max_length, self.width), jnp.float32) for side in ('source', 'target')]
    stack = lambda cross, name: Stack(
        cross, self.depth, self.heads, self.mlp_dim, self.head_dim or self.width // self.heads,
        self.value_dim or self.width // self.heads, self.norm, self.dropout, self.attention_dropout,
        self.hidden_dropout, self.attention_bias, self.activation, self.epsilon, self.dtype,
        self.scan, self.remat, name=name)
    self.encoder, self.decoder = stack(False, 'encoder'), stack(True, 'decoder')
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, source: jax.Array, target: jax.Array, *,
               source_segments: jax.Array | None = None, target_segments: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    """Predicts every token of the target from the source and the tokens before it.

    Args:
      source: int32 `[batch, source_len]`; 0 is padding.
      target: int32 `[batch, target_len]`, each sentence with its end; it is shifted right here.
      source_segments, target_segments: int32 like these, where a row holds several pairs: which
        one a token belongs to, from 1; 0 is padding. None of them sees another.
      train: switches dropout on, drawn from the rng 'dropout'.

    Returns:
      logits float32 `[batch, target_len, vocab]`.
    """
    if target_segments is None:
      seen, across = None, _keys(source)
    else:
      seen = same(target_segments, target_segments)
      across = same(target_segments, source_segments)
    x = self._embed(shift_right(target, target_segments), 1, within(target, target_segments), train)
    memory = self._encode(source, source_segments, train)
    x = self.decoder(x, mask=seen, memory=memory, memory_mask=across, train=train)
    return self._logits(x)

  def _encode(self, source, segments, train):
    mask = _keys(source) if segments is None else same(segments, segments)
    return self.encoder(self._embed(source, 0, within(source, segments), train), mask=mask,
                        train=train)

  def _embed(self, ids, side, at, train):
    """Embedding times sqrt(width), and position: `[batch, length, width]`."""
    table = self.table if side or self.source_table is None else self.source_table
    x = jnp.asarray(table, self.dtype)[ids] * jnp.asarray(self.width ** 0.5, self.dtype)
    x = x * (ids != 0)[..., None].astype(self.dtype)
    if self.positions == 'learned':
      x = x + self.position_tables[side].astype(self.dtype)[at]
    else:
      x = x + positions.sinusoids(at, self.width, self.positions).astype(self.dtype)
    x = partition.constrain(x, ('batch', 'length', 'embed'))
    return self.drop(x, deterministic=not train)

  def _logits(self, x):
    return jnp.einsum('bnd,vd->bnv', x, self.table.astype(self.dtype),
                      preferred_element_type=jnp.float32)

  # Generation; the layers must be unrolled (`unrolled`).

  def encode(self, source: jax.Array) -> Sources:
    """What the decoder reads of sources `[batch, source_len]`: keys and values, a layer each."""
    memory = self._encode(source, None, False)
    # One throw-away token makes the layers fill their memories; all but that is never computed.
    empty = [decode.Memory(source != 0) for _ in range(self.depth)]
    x = jnp.zeros((len(source), 1, self.width), self.dtype)
    caches = list(zip(self._caches(len(source), 1), empty))
    _, caches = self.decoder(x, memory=memory, caches=caches)
    output = None
    if partition.platform() == 'cpu':
      # Behind a barrier it is turned once and not at every step.
      output = jax.lax.optimization_barrier(self.table.astype(self.dtype).T)
    return Sources([memory.replace(weights=None) for _, memory in caches], output)

  def _caches(self, rows, room):
    size = self.width // self.heads
    return [decode.Cache.empty(rows, self.heads, room, self.head_dim or size, self.dtype,
                               self.value_dim or size) for _ in range(self.depth)]

  def begin(self, memory: Sources, beams: int, room: int) -> list[decode.Cache]:
    """Empty caches for `beams` rows an item, each for `room` tokens."""
    return self._caches(len(memory.layers[0].mask) * beams, room)

  def step(self, tokens: jax.Array, state: Sequence[decode.Cache],
           memory: Sources) -> tuple[jax.Array, list[decode.Cache], jax.Array]:
    """One more token of every row.

    Args:
      tokens: int32 `[rows]`, drawn last; 0 in the beginning. Rows of one item are neighbours.
      state: from `begin` or the step before.
      memory: from `encode`.

    Returns:
      logits float32 `[rows, vocab]` of the next token, the state after, and attention to the
      source, the last layer's mean over heads, float32 `[rows, source_len]`.
    """
    x = self._embed(tokens[:, None], 1, state[0].position[None], False)
    x, caches = self.decoder(x, caches=list(zip(state, memory.layers)))
    weights = caches[-1][1].weights.mean(axis=1)
    logits = (self._logits(x)[:, 0] if memory.output is None else jnp.dot(
        x[:, 0], memory.output, preferred_element_type=jnp.float32))
    return (logits, [own for own, _ in caches],
            weights.reshape(len(tokens), weights.shape[-1]))


class Stack(nn.Module):
  """N layers of the encoder, or with `cross` of the decoder; see `Transformer`."""
  cross: bool
  depth: int
  heads: int
  mlp_dim: int
  head_dim: int
  value_dim: int
  norm: str
  dropout: float
  attention_dropout: float
  hidden_dropout: bool
  attention_bias: bool
  activation: str
  epsilon: float
  dtype: Any
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None,
               memory: jax.Array | None = None, memory_mask: jax.Array | None = None,
               caches: list[Any] | None = None, train: bool = False) -> Any:
    """`[batch, length, width]` -> the same; with `caches` a pair with the caches after."""
    def make_block(name):
      return blocks.TransformerBlock(
          self.heads, self.mlp_dim, norm=self.norm, cross=self.cross, causal=self.cross,
          head_dim=self.head_dim, value_dim=self.value_dim, activation=self.activation,
          epsilon=self.epsilon, dtype=self.dtype, dropout_rate=self.dropout,
          attention_dropout_rate=self.attention_dropout, hidden_dropout=self.hidden_dropout,
          use_bias=self.attention_bias, mlp_bias_init=nn.initializers.zeros, name=name)

    x = blocks.run_blocks(
        make_block, self.depth, x, prefix=LAYERS, scan=self.scan, remat=self.remat, train=train,
        outputs=caches is not None, layer_inputs={} if caches is None else {'cache': caches},
        mask=mask, memory=memory, memory_mask=memory_mask)
    if caches is not None:
      x, caches = x
    if self.norm == 'pre':
      x = blocks.layer_norm(self.epsilon, self.dtype, 'norm')(x)
    return x if caches is None else (x, caches)


def unrolled(model: Transformer, params) -> tuple[Transformer, Any]:
  """The model and parameters to generate with: layers one by one."""
  if model.scan:
    params = {name: blocks.unstack_layers(part, LAYERS) if name in ('encoder', 'decoder') else part
              for name, part in params.items()}
  return model.clone(scan=False, remat='none'), params


def _keys(source: jax.Array) -> jax.Array:
  """bool `[batch, 1, 1, length]`: every query sees what is not padding."""
  return (source != 0)[:, None, None]


def same(queries: jax.Array, keys: jax.Array) -> jax.Array:
  """bool `[batch, 1, q_len, k_len]`: a query sees the keys of its own segment, padding nothing."""
  return ((queries[:, :, None] == keys[:, None]) & (keys != 0)[:, None])[:, None]


def shift_right(target: jax.Array, segments: jax.Array | None = None) -> jax.Array:
  """What the decoder is fed, int32 `[batch, length]`: 0, then each token but the last.

  With `segments` every sentence of a row begins with 0 again.
  """
  shift = lambda x: jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
  shifted = shift(target)
  return shifted if segments is None else shifted * (shift(segments) == segments)


def within(ids: jax.Array, segments: jax.Array | None = None) -> jax.Array:
  """Positions int32, from 0 in every segment: `[length]`, or `[batch, length]` with `segments`."""
  at = jnp.arange(ids.shape[1])
  if segments is None:
    return at
  begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  return at - jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
