"""Attention of recurrent decoders: how well each source word fits a decoder state.

Bahdanau et al. 2015 score with a small network, Luong et al. 2015 with a product or a network.
What depends on the source alone is computed once a sentence (`prepare`). As in `cells`, the module
holds parameters and the functions take arrays, so that they may be used inside any loop.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core.config import UserError, choose
from core.nn import attention
from translation import cells

KINDS = ('bahdanau', 'dot', 'general', 'concat')
_ADDITIVE = ('bahdanau', 'concat')


def prepare(kind: str, weights: Mapping[str, jax.Array], annotations: jax.Array) -> jax.Array:
  """What scores read of the source: `[batch, source, annotation]` -> `[batch, source, width]`."""
  return annotations if kind == 'dot' else annotations @ weights['memory']


def align(kind: str, weights: Mapping[str, jax.Array], queries: jax.Array, keys: jax.Array,
          mask: jax.Array) -> jax.Array:
  """How much each query attends to each source word.

  Scores of a decoder state s and an annotation h: 'dot' s h; 'general' s W h; 'bahdanau' and
  'concat' v tanh(W s + U h), which is v tanh([W U] [s; h]). None is scaled.

  Args:
    kind: one of `KINDS`.
    weights: what `Alignment.weights` gave.
    queries: `[batch, queries, width]`, decoder states.
    keys: `[batch, source, width]`, what `prepare` gave.
    mask: bool `[batch, source]`, False at padding.

  Returns:
    float32 `[batch, queries, source]`, each row summing to 1 over the words that are not padding.
  """
  queries = queries.astype(keys.dtype)
  if kind in _ADDITIVE:
    scores = _additive(queries @ weights['query'], keys, weights['score'])
  else:
    scores = jnp.einsum('bqd,bsd->bqs', queries, keys, preferred_element_type=jnp.float32)
  return attention.masked_softmax(scores, mask[:, None])


# The hidden layer `[batch, queries, source, width]` is the largest tensor of a model by far: the
# backward pass computes it again instead of keeping it for every step of a decoder.
@jax.checkpoint
def _additive(queries, keys, score):
  hidden = jnp.tanh(queries[:, :, None] + keys[:, None])
  return jnp.einsum('bqsd,d->bqs', hidden, score[:, 0], preferred_element_type=jnp.float32)


def read(weights: jax.Array, annotations: jax.Array) -> jax.Array:
  """The contexts `[batch, queries, annotation]`: annotations `[batch, source, annotation]`
  weighted by `[batch, queries, source]`."""
  return jnp.einsum('bqs,bsa->bqa', weights.astype(annotations.dtype), annotations)


class Alignment(nn.Module):
  """The parameters of an attention.

  Attributes:
    kind: one of `KINDS`.
    width: of the decoder's states, and of the hidden layer of an additive attention.
    annotation: width of the annotations.
    initializer: a key of `cells.INITS`.
    dtype: computation dtype; scores and their softmax are float32.
  """
  kind: str
  width: int
  annotation: int
  initializer: str = 'modern'
  dtype: Any = jnp.float32

  def setup(self):
    choose('config.model.attention', self.kind, KINDS)
    inits = choose('config.model.initializer', self.initializer, cells.INITS)
    if self.kind == 'dot' and self.width != self.annotation:
      raise UserError(
          f"config.model.attention='dot' needs annotations as wide as the decoder, not "
          f"{self.annotation} and {self.width} (a bidirectional encoder's are twice as wide); "
          "use 'general'")

    def matrix(name, shape, init):
      return self.param(name, nn.with_logical_partitioning(init, ('embed', None)), shape,
                        jnp.float32)
    matrices = {}
    if self.kind in _ADDITIVE:
      matrices['query'] = matrix('query', (self.width, self.width), inits.query)
      matrices['score'] = matrix('score', (self.width, 1), inits.score)
    if self.kind != 'dot':
      matrices['memory'] = matrix('memory', (self.annotation, self.width), inits.query)
    self.matrices = matrices

  def weights(self) -> dict[str, jax.Array]:
    """'memory' `[annotation, width]`, 'query' `[width, width]` and 'score' `[width, 1]`, as far as
    the kind has them, in `dtype`."""
    return {name: x.astype(self.dtype) for name, x in self.matrices.items()}
