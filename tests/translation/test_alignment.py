"""Attentions against the formulas in float64, one pair of state and word at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.config import UserError
from core.nn import attention
from translation import alignment

WIDTH = 3
LENGTHS = (4, 2)


def score(kind, params, s, h):
  if kind == 'dot':
    return s @ h
  matrix = lambda name: np.asarray(params[name], np.float64)
  if kind == 'general':
    return s @ matrix('memory').T @ h
  # Luong's form: one matrix for the state and the annotation side by side.
  both = np.concatenate([matrix('query'), matrix('memory')])
  return matrix('score')[:, 0] @ np.tanh(np.concatenate([s, h]) @ both)


def attend(kind, params, s, hs):
  """Weights `[source]` and context of one state `[width]` over annotations `[source, ...]`."""
  exp = np.exp([score(kind, params, s, h) for h in hs])
  return exp / exp.sum(), (exp / exp.sum()) @ hs


def case(kind, annotation):
  module = alignment.Alignment(kind, WIDTH, annotation)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), nn.unbox(jax.eval_shape(
      lambda: module.init(jax.random.key(0), method='weights')).get('params', {})))
  weights = module.apply({'params': params}, method='weights')
  queries = np.float32(rng.normal(size=(2, 3, WIDTH)))
  annotations = np.float32(rng.normal(size=(2, 4, annotation)))
  return params, weights, queries, annotations, np.arange(4) < np.array(LENGTHS)[:, None]


@pytest.mark.parametrize('kind, annotation', [
    ('bahdanau', 5), ('dot', WIDTH), ('general', 5), ('concat', 5)])
def test_weights_and_contexts(kind, annotation):
  params, weights, queries, annotations, mask = case(kind, annotation)

  @jax.jit
  def run(queries, annotations):
    keys = alignment.prepare(kind, weights, annotations)
    shares = alignment.align(kind, weights, queries, keys, mask)
    return shares, alignment.read(shares, annotations)
  shares, contexts = run(queries, annotations)
  assert shares.dtype == jnp.float32
  for b, n in enumerate(LENGTHS):
    assert not np.asarray(shares[b, :, n:]).any()
    for q in range(3):
      want, context = attend(kind, params, np.float64(queries[b, q]),
                             np.float64(annotations[b, :n]))
      np.testing.assert_allclose(shares[b, q, :n], want, atol=1e-6)
      np.testing.assert_allclose(contexts[b, q], context, atol=1e-6)


def test_gradients_flow_through_the_recomputed_scores():
  _, weights, queries, annotations, mask = case('concat', 5)

  def total(recompute):
    def loss(weights):
      keys = alignment.prepare('concat', weights, annotations)
      if recompute:
        shares = alignment.align('concat', weights, queries, keys, mask)
      else:
        hidden = jnp.tanh((queries @ weights['query'])[:, :, None] + keys[:, None])
        shares = attention.masked_softmax((hidden @ weights['score'])[..., 0], mask[:, None])
      return (shares * np.arange(4)).sum()
    return jax.jit(jax.grad(loss))(weights)
  for got, want in zip(*map(jax.tree.leaves, (total(True), total(False)))):
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_scores_are_float32_in_half_precision():
  """Two scores that bfloat16 cannot tell apart."""
  keys = jnp.asarray([[[16., 1.], [16., 1.0625]]], jnp.bfloat16)
  shares = alignment.align('dot', {}, jnp.asarray([[[16., 1.]]], jnp.bfloat16), keys,
                           np.ones((1, 2), bool))
  np.testing.assert_allclose(shares[0, 0], [1 / (1 + np.exp(.0625)), 1 / (1 + np.exp(-.0625))],
                             atol=1e-6)


def test_the_worked_example():
  """A query and five words, by hand: unscaled (Luong's dot) and divided by sqrt(3)."""
  query = np.array([.2, .9, 0.], np.float32)
  words = np.array([[.1, 0, .8], [.1, .9, 0], [0, .1, .8], [.2, .1, .6], [.9, 0, .1]], np.float32)
  plain = ([.151281, .340066, .162250, .168872, .177530], [.242686, .339172, .369901])
  scaled = ([.172419, .275223, .179530, .183724, .189105], [.251703, .284026, .410704])

  shares = alignment.align('dot', {}, query[None, None], words[None], np.ones((1, 5), bool))
  np.testing.assert_allclose(shares[0, 0], plain[0], atol=1e-5)
  np.testing.assert_allclose(alignment.read(shares, words[None])[0, 0], plain[1], atol=1e-5)
  for factor, (weights, context) in ((1., scaled), (3 ** .5, plain)):
    out, got = attention.dot_product_attention(
        factor * query[None, None, None], words[None, :, None], words[None, :, None],
        return_weights=True)
    np.testing.assert_allclose(got[0, 0, 0], weights, atol=1e-5)
    np.testing.assert_allclose(out[0, 0, 0], context, atol=1e-5)


def test_errors():
  init = lambda *args: alignment.Alignment(*args).init(jax.random.key(0), method='weights')
  with pytest.raises(UserError, match="'dot' needs annotations as wide.*not 6 and 3.*'general'"):
    init('dot', 3, 6)
  with pytest.raises(UserError, match="config.model.attention: unknown name 'location'"):
    init('location', 3, 3)
