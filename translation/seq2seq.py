"""Encoder-decoder models of recurrent cells, without attention and with it.

Sutskever et al., "Sequence to Sequence Learning with Neural Networks", 2014; Bahdanau et al.,
"Neural Machine Translation by Jointly Learning to Align and Translate", 2015; Luong et al.,
"Effective Approaches to Attention-based Neural Machine Translation", 2015.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core import partition
from core.config import UserError, choose
from translation import alignment, cells

ATTENTIONS = ('none', *alignment.KINDS)


class Seq2Seq(nn.Module):
  """A recurrent encoder and a recurrent decoder.

  The decoder's layer l begins with the last state of the encoder's layer l. Where that does not
  fit it is projected, h_0 = tanh(W_s h) and for an LSTM c_0 = W_c c: of both directions side by
  side, or with Bahdanau's attention of the backward direction alone, tanh(W_s h_1). What is drawn:

  - attention 'none': logits = W h + b.
  - 'dot', 'general', 'concat' (Luong): the current top state h attends and reads the context c;
    h~ = tanh(W_c [c; h]), logits = W h~. With input feeding h~ is also read by the next step.
  - 'bahdanau': the top state s before the step attends; all gates of the first layer read c, and
    logits = W t + b, with t the maxout over pairs of U s + V E y + C c + b.

  Attributes:
    vocab: words of the target.
    source_vocab: words of the source; 0 when both share one vocabulary and one table.
    width: of the states; an encoder with two directions has it in each.
    embed: width of the embeddings.
    layers: of the encoder, and of the decoder.
    cell: 'rnn', 'lstm' or 'gru'.
    attention: one of `ATTENTIONS`.
    bidirectional: whether the encoder also reads from the end.
    reverse: whether the encoder is given the words of the source in reverse (its EOS stays last).
      Annotations and attention are in the order of the source all the same.
    input_feeding: Luong's; see above.
    dropout: share dropped of what each layer and the last projection read.
    initializer: a key of `cells.INITS`.
    dtype: computation dtype; parameters, states, softmaxes and logits are float32.
  """
  vocab: int
  source_vocab: int = 0
  width: int = 256
  embed: int = 256
  layers: int = 1
  cell: str = 'lstm'
  attention: str = 'none'
  bidirectional: bool = False
  reverse: bool = False
  input_feeding: bool = False
  dropout: float = 0.0
  initializer: str = 'modern'
  dtype: Any = jnp.float32

  def setup(self):
    choose('config.model.attention', self.attention, ATTENTIONS)
    inits = choose('config.model.initializer', self.initializer, cells.INITS)
    if self.input_feeding and self.attention in ('none', 'bahdanau'):
      raise UserError('config.model.input_feeding needs an attention of Luong et al. (dot, general '
                      f'or concat), not config.model.attention={self.attention!r}')

    def matrix(name, shape, names, init=inits.kernel):
      return self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)

    table = lambda name, size: matrix(name, (size, self.embed), ('vocab', 'embed'),
                                      inits.embedding)
    self.target_table = table('target_embedding' if self.source_vocab else 'embedding', self.vocab)
    self.source_table = (table('source_embedding', self.source_vocab) if self.source_vocab
                         else self.target_table)
    width = self.width
    annotation = width * (2 if self.bidirectional else 1)
    shared = dict(layers=self.layers, dropout=self.dropout, initializer=self.initializer,
                  dtype=self.dtype)
    self.encoder = cells.Stack(self.cell, self.embed, width, bidirectional=self.bidirectional,
                               **shared)
    context = {'bahdanau': annotation}.get(self.attention, width if self.input_feeding else 0)
    self.decoder = cells.Stack(self.cell, self.embed, width, context=context, **shared)
    self.drop = nn.Dropout(self.dropout)

    self.bridges = None
    if self.bidirectional or self.attention == 'bahdanau':
      ends = width if self.attention == 'bahdanau' else annotation
      carried = len(cells.begin(self.cell, 1, 1))
      self.bridges = [[matrix(f'bridge_{layer}_{part}', (ends, width), ('embed', None))
                       for part in 'hc'[:carried]] for layer in range(self.layers)]
    if self.attention != 'none':
      self.aligner = alignment.Alignment(self.attention, width, annotation, self.initializer,
                                         self.dtype)
    read = width
    if self.attention == 'bahdanau':
      read = width // 2
      self.readout = matrix('readout', (width + self.embed + annotation, 2 * read),
                            ('embed', None))
      self.readout_bias = matrix('readout_bias', (2 * read,), (None,), inits.bias)
    elif self.attention != 'none':
      self.combine = matrix('combine', (annotation + width, width), ('embed', None))
    self.output = matrix('output', (read, self.vocab), ('embed', 'vocab'))
    if self.attention in ('none', 'bahdanau'):
      self.output_bias = matrix('output_bias', (self.vocab,), ('vocab',), inits.bias)

  def __call__(self, source: jax.Array, target: jax.Array, *,
               source_segments: jax.Array | None = None,
               target_segments: jax.Array | None = None, train: bool = False) -> jax.Array:
    """Scores every next word of the target given those before it (teacher forcing).

    Args:
      source, target: int32 `[batch, source_len]`, `[batch, target_len]`: words, EOS, then 0.
      source_segments, target_segments: must be None: a state would run on from one sentence to
        the next in its row.
      train: draws dropout from the rng 'dropout'.

    Returns:
      float32 `[batch, target_len, vocab]`.

    Raises:
      ValueError: when segments are given.
    """
    if source_segments is not None or target_segments is not None:
      raise ValueError('recurrent models do not take several sentences in a row: no segments')
    memory = self.encode(source, train=train)
    words = self._embed(self.target_table, jnp.pad(target[:, :-1], ((0, 0), (1, 0))))
    if self.attention != 'bahdanau' and not self.input_feeding:
      read, _ = self.decoder(words, states=memory['states'], train=train)
      if self.attention != 'none':
        read = self._attend(self._weights(), read, memory)[0]
    else:
      read = self._scan(words, memory, train)
    return self._logits(read, words, train)

  def encode(self, source: jax.Array, *, train: bool = False) -> dict[str, Any]:
    """Reads sources int32 `[batch, source_len]`.

    Returns:
      'mask' bool `[batch, source_len]`; 'states', where the decoder's layers begin; and with
      attention 'annotations' `[batch, source_len, annotation]` and their 'keys'.
    """
    mask = source != 0
    order = None
    if self.reverse:
      # Of n ids the last, EOS, stays: position i < n - 1 is exchanged with n - 2 - i.
      last = mask.sum(axis=1, keepdims=True) - 1
      place = jnp.arange(source.shape[1])
      order = jnp.where(place < last, last - 1 - place, place)
      source = jnp.take_along_axis(source, order, axis=1)
    words = self._embed(self.source_table, source)
    annotations, finals = self.encoder(words, mask=mask, train=train)
    memory = {'mask': mask, 'states': self._start(finals)}
    if self.attention != 'none':
      if order is not None:  # The exchange is its own inverse.
        annotations = jnp.take_along_axis(annotations, order[..., None], axis=1)
      memory['annotations'] = partition.constrain(annotations, ('batch', 'length', 'embed'))
      memory['keys'] = alignment.prepare(self.attention, self.aligner.weights(), annotations)
    return memory

  def begin(self, memory: dict[str, Any], beams: int, room: int) -> dict[str, Any]:
    """The state before the first word of `batch * beams` rows; it needs no `room`."""
    del room
    state = {'layers': jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), memory['states'])}
    if self.input_feeding:
      state['fed'] = jnp.zeros((len(memory['mask']) * beams, self.width), self.dtype)
    return state

  def step(self, tokens: jax.Array, state: dict[str, Any], memory: dict[str, Any]
           ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    """Goes on by one word.

    Args:
      tokens: int32 `[batch * beams]`, the words drawn last; 0 at first.
      state: what `begin` or the last step gave.
      memory: what `encode` gave; its rows are not repeated for the beams.

    Returns:
      logits float32 `[batch * beams, vocab]`, the state after, and the attention float32
      `[batch * beams, source_len]`: all zeros in a model that has none.
    """
    words = self._embed(self.target_table, tokens)
    weights = self._weights()
    inputs = cells.project(weights['layers'][0], words)
    state, read, attention = self._advance(weights, inputs, state, memory)
    if attention is None:
      attention = jnp.zeros((len(tokens), memory['mask'].shape[1]), jnp.float32)
    return self._logits(read, words, False), state, attention

  def _embed(self, table, ids):
    """`[...]` -> `[..., embed]`; padding is zero."""
    words = jnp.where(ids[..., None] != 0, jnp.asarray(table)[ids], 0).astype(self.dtype)
    return words if words.ndim < 3 else partition.constrain(words, ('batch', 'length', 'embed'))

  def _start(self, finals):
    """The decoder's first states from what the encoder's layers and directions end with."""
    if self.bridges is None:
      return [directions[0] for directions in finals]
    if self.attention == 'bahdanau':
      ends = [directions[-1] for directions in finals]
    else:
      ends = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *zip(*finals))
    starts = []
    for end, bridges in zip(ends, self.bridges):
      made = [part @ bridge for part, bridge in zip(end, bridges)]
      starts.append((jnp.tanh(made[0]), *made[1:]))
    return starts

  def _weights(self):
    """Everything a step of the decoder multiplies with, but for its last projection."""
    weights = {'layers': self.decoder.weights()}
    if self.attention != 'none':
      weights['align'] = self.aligner.weights()
    if self.attention not in ('none', 'bahdanau'):
      weights['combine'] = self.combine.astype(self.dtype)
    return weights

  def _align(self, weights, queries, memory):
    """Contexts `[batch, queries, annotation]` and attention float32 `[batch, queries, source]`."""
    attention = alignment.align(self.attention, weights['align'], queries, memory['keys'],
                                memory['mask'])
    return alignment.read(attention, memory['annotations']), attention

  def _attend(self, weights, hidden, memory):
    """Luong's h~ `[batch, queries, width]` of top states of that shape, and their attention."""
    context, attention = self._align(weights, hidden, memory)
    both = jnp.concatenate([context, hidden.astype(self.dtype)], axis=-1)
    return jnp.tanh(both @ weights['combine']), attention

  def _advance(self, weights, inputs, state, memory, drop=lambda x, layer: x):
    """One step of the decoder, from the first layer's product with the word alone.

    Returns the state after, what the last projection reads, and the attention or None.
    """
    rows = len(inputs)
    # Beams attend as so many queries to their item's one set of annotations.
    split = lambda x: x.reshape(len(memory['mask']), -1, x.shape[-1])
    join = lambda x: x.reshape(rows, x.shape[-1])
    attention = fed = None
    if self.attention == 'bahdanau':
      before = state['layers'][-1][0]
      context, attention = map(join, self._align(weights, split(before), memory))
      fed, read = context, jnp.concatenate([before.astype(self.dtype), context], axis=-1)
    elif self.input_feeding:
      fed = state['fed']
    if fed is not None:
      inputs = inputs + drop(fed, 0) @ weights['layers'][0]['context']
    after = {'layers': cells.climb(self.cell, weights['layers'], inputs, state['layers'], drop)}
    if self.attention != 'bahdanau':
      read = after['layers'][-1][0].astype(self.dtype)
      if self.attention != 'none':
        read, attention = map(join, self._attend(weights, split(read), memory))
    if self.input_feeding:
      after['fed'] = read
    return after, read, attention

  def _scan(self, words, memory, train):
    """What the last projection reads `[batch, length, ...]`, where attention is in the loop."""
    weights = self._weights()
    rate = self.dropout if train else 0.0
    inputs = cells.project(weights['layers'][0],
                           self.drop(words, deterministic=not train)).swapaxes(0, 1)
    length, batch, _ = inputs.shape
    rng = self.make_rng('dropout') if rate else None

    def step(state, now):
      inputs, place = now

      def drop(x, layer):
        if not rate:
          return x
        key = jax.random.fold_in(jax.random.fold_in(rng, place), layer)
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
      state, read, _ = self._advance(weights, inputs, state, memory, drop)
      return state, read

    start = self.begin(memory, 1, length)
    _, read = jax.lax.scan(step, start, (inputs, jnp.arange(length)))
    return read.swapaxes(0, 1)

  def _logits(self, read, words, train):
    """The last projection, float32 `[..., vocab]`."""
    if self.attention == 'bahdanau':
      # `read` is the state and the context; the readout's rows are in the order s, E y, c.
      state, context = jnp.split(read, [self.width], axis=-1)
      total = jnp.concatenate([state, words, context], axis=-1) @ self.readout.astype(self.dtype)
      total = total + self.readout_bias.astype(self.dtype)
      read = total.reshape(*total.shape[:-1], -1, 2).max(axis=-1)
    read = self.drop(read, deterministic=not train)
    logits = jnp.einsum('...d,dv->...v', read, self.output.astype(self.dtype),
                        preferred_element_type=jnp.float32)
    if self.attention in ('none', 'bahdanau'):
      logits = logits + self.output_bias
    return logits if logits.ndim < 3 else partition.constrain(
        logits, ('batch', 'length', 'vocab'))
