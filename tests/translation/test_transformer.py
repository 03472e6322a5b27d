import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.nn import dropout
from translation import transformer

SOURCE = np.array([[3, 4, 5, 6, 1, 0], [7, 8, 1, 0, 0, 0]])
TARGET = np.array([[9, 10, 11, 1, 0], [12, 13, 14, 15, 1]])


def make(**changes):
  settings = dict(vocab=20, width=16, depth=2, heads=4, mlp_dim=24) | changes
  model = transformer.Transformer(**settings)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), SOURCE, TARGET))['params']
  # Norms and biases that do something.
  leaves, treedef = jax.tree.flatten(params)
  random = np.random.default_rng(0)
  leaves = [p + .1 * random.normal(size=p.shape).astype(np.float32) for p in leaves]
  return model, treedef.unflatten(leaves)


def count(**settings):
  model = transformer.Transformer(**settings)
  ids = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids)
  return sum(p.size for p in jax.tree.leaves(shapes))


BASE = dict(vocab=37_000, width=512, depth=6, heads=8, mlp_dim=2048)


@pytest.mark.parametrize('changes, parameters', [
    ({}, 63_045_632), ({'vocab': 32_768}, 60_878_848),
    ({'width': 1024, 'heads': 16, 'mlp_dim': 4096}, 176_283_648 + 37_000 * 1024),
    (dict(vocab=100, width=32, depth=2, heads=4, mlp_dim=64), 45_184)])
def test_parameter_counts(changes, parameters):
  assert count(**BASE | changes) == parameters


# --- The model in float64, written from the paper -------------------------------------------------


def norm(x, p):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-6) * p['scale'] + p['bias']


def attend(queries, memory, p, seen):
  q, k, v = (np.einsum('nd,dhe->hne', x, p[name]['kernel'])
             for name, x in (('query', queries), ('key', memory), ('value', memory)))
  scores = np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('hne,hed->nd', weights @ v, p['out']['kernel'])


def feed_forward(x, p):
  hidden = np.maximum(x @ p['Dense_0']['kernel'] + p['Dense_0']['bias'], 0)
  return hidden @ p['Dense_1']['kernel'] + p['Dense_1']['bias']


def embed(ids, table):
  width = table.shape[1]
  x = np.where(ids[:, None] != 0, table[ids] * np.sqrt(width), 0)
  angles = np.arange(len(ids))[:, None] / 10000 ** (np.arange(0, width, 2) / width)
  x[:, 0::2] += np.sin(angles)
  x[:, 1::2] += np.cos(angles)
  return x


def oracle(source, target, p, post=True):
  """Logits of one pair without padding, `[target_len, vocab]`."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)

  def sublayer(x, p, i, f):
    layer_norm = p[f'LayerNorm_{i}']
    return norm(x + f(x), layer_norm) if post else x + f(norm(x, layer_norm))

  x = embed(source, p['embedding'])
  for i in range(2):
    layer = p['encoder'][f'layers_{i}']
    everything = np.ones((len(source), len(source)), bool)
    x = sublayer(x, layer, 0, lambda x: attend(x, x, layer['MultiHeadDotProductAttention_0'],
                                               everything))
    x = sublayer(x, layer, 1, lambda x: feed_forward(x, layer['MlpBlock_0']))
  memory = x if post else norm(x, p['encoder']['norm'])
  x = embed(np.concatenate([[0], target[:-1]]), p['embedding'])
  for i in range(2):
    layer = p['decoder'][f'layers_{i}']
    before = np.tril(np.ones((len(target), len(target)), bool))
    x = sublayer(x, layer, 0, lambda x: attend(x, x, layer['MultiHeadDotProductAttention_0'],
                                               before))
    x = sublayer(x, layer, 1, lambda x: attend(x, memory, layer['MultiHeadDotProductAttention_1'],
                                               np.ones((len(x), len(memory)), bool)))
    x = sublayer(x, layer, 2, lambda x: feed_forward(x, layer['MlpBlock_0']))
  x = x if post else norm(x, p['decoder']['norm'])
  return x @ p['embedding'].T


@pytest.mark.parametrize('order', ['post', 'pre'])
def test_logits_are_the_paper_s_in_float64(order):
  """Also: padding on either side changes nothing."""
  model, params = make(norm=order)
  got = np.asarray(model.apply({'params': params}, SOURCE, TARGET))
  assert got.dtype == np.float32
  for row in range(2):
    source, target = SOURCE[row][SOURCE[row] != 0], TARGET[row][TARGET[row] != 0]
    want = oracle(source, target, params, order == 'post')
    np.testing.assert_allclose(got[row, :len(target)], want, rtol=2e-4, atol=2e-4)


# --- Packing --------------------------------------------------------------------------------------


def test_shifting_begins_every_sentence_anew():
  """What the public Flax example gets wrong: a sentence must not begin with its neighbour's end."""
  target = jnp.asarray([[3, 8, 1, 9, 1, 5, 4, 1, 0, 0]])
  segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0]])
  np.testing.assert_array_equal(transformer.shift_right(target, segments),
                                [[0, 3, 8, 0, 9, 0, 5, 4, 0, 0]])
  np.testing.assert_array_equal(transformer.within(target, segments)[0, :8],
                                [0, 1, 2, 0, 1, 0, 1, 2])
  np.testing.assert_array_equal(transformer.shift_right(target), [[0, 3, 8, 1, 9, 1, 5, 4, 1, 0]])


@pytest.mark.parametrize('positions', ['paper', 'learned'])
def test_packed_pairs_are_as_if_alone(positions):
  """Logits of two pairs in one row are those of each in a row of its own."""
  model, params = make(positions=positions, max_length=12)
  alone = model.apply({'params': params}, SOURCE, TARGET)
  row = lambda ids: np.pad(np.concatenate([x[x != 0] for x in ids]), (0, 1))[None]
  numbers = lambda ids: np.pad(np.repeat([1, 2], (ids != 0).sum(1)), (0, 1))[None]
  packed = model.apply({'params': params}, row(SOURCE), row(TARGET),
                       source_segments=numbers(SOURCE), target_segments=numbers(TARGET))
  lengths = (TARGET != 0).sum(1)
  np.testing.assert_allclose(packed[0, :lengths[0]], alone[0, :lengths[0]], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(packed[0, lengths[0]:lengths.sum()], alone[1, :lengths[1]], rtol=1e-4,
                             atol=1e-5)


def test_nothing_leaks_between_packed_pairs_or_from_the_future():
  """Gradients of a token's logits with respect to what it must not see are exactly zero."""
  model, params = make()
  source = jnp.asarray([[3, 4, 1, 5, 6, 1, 0]])
  target = jnp.asarray([[7, 8, 1, 9, 10, 1, 0]])
  segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]])
  table = params['embedding']

  def logits(rows, at):
    # Every position has a row of the table of its own, so that its influence can be told.
    ids = jnp.arange(1, 15).reshape(2, 7)
    known = {**params, 'embedding': jnp.concatenate([table[:1], rows, table[15:]])}
    out = model.apply({'params': known}, ids[:1] * (source != 0), ids[1:] * (target != 0),
                      source_segments=segments, target_segments=segments)
    return out[0, at, 0]  # The softmax's row 0 is nobody's.

  rows = jnp.concatenate([table[source[0]], table[target[0]]])
  influence = lambda at: np.abs(jax.grad(logits)(rows, at)).sum(-1)
  first = influence(1)  # The second token of the first pair.
  assert (first[:3] > 0).all() and (first[3:7] == 0).all()
  assert first[7] > 0 and (first[8:] == 0).all()
  second = influence(4)
  assert (second[:3] == 0).all() and (second[3:6] > 0).all() and second[6] == 0
  assert (second[7:10] == 0).all() and second[10] > 0 and (second[11:] == 0).all()


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [
    dict(scan=True), pytest.param(dict(norm='pre', positions='learned', max_length=9, head_dim=3,
                                       value_dim=5), marks=pytest.mark.slow)])
def test_a_token_at_a_time_is_the_whole_pass(changes):
  """With beams side by side, keys and values of the source computed once."""
  model, params = make(**changes)
  want = np.asarray(model.apply({'params': params}, SOURCE, TARGET))
  model, params = transformer.unrolled(model, params)
  call = lambda method, *args: model.apply({'params': params}, *args, method=method)
  memory = call('encode', jnp.asarray(SOURCE))
  beams, state = 3, call('begin', memory, 3, 5)
  step = jax.jit(lambda tokens, state: call('step', tokens, state, memory))
  tokens = jnp.zeros(2 * beams, jnp.int32)
  for at in range(5):
    logits, state, attention = step(tokens, state)
    got = np.asarray(logits).reshape(2, beams, -1)
    np.testing.assert_allclose(got, np.broadcast_to(want[:, None, at], got.shape), rtol=1e-4,
                               atol=1e-5)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert (np.asarray(attention).reshape(2, 3, 6)[1, :, 3:] == 0).all()
    tokens = jnp.repeat(jnp.asarray(TARGET[:, at]), beams)
  assert step._cache_size() == 1


def test_the_source_is_projected_once():
  """A step multiplies nothing of the source's length with a kernel."""
  model, params = transformer.unrolled(*make())
  call = lambda method, *args: model.apply({'params': params}, *args, method=method)
  source = jnp.asarray(np.pad(SOURCE, ((0, 0), (0, 31))))
  memory = call('encode', source)
  made = jax.make_jaxpr(lambda t, s: call('step', t, s, memory))(
      jnp.zeros(2, jnp.int32), call('begin', memory, 1, 5))
  kernels = [eqn for eqn in made.jaxpr.eqns if eqn.primitive.name == 'dot_general'
             and any(v.aval.shape[:2] == (2, 37) for v in eqn.invars)]
  assert not kernels


def test_dropout_is_residual_and_embedding_alone(monkeypatch):
  """With the paper's settings attention weights and the ReLU's outputs are never dropped."""
  model, params = make(dropout=.5)
  shapes, bernoulli, in_blocks = [], jax.random.bernoulli, dropout.dropout
  # Embeddings are dropped by flax, what is in blocks by ours.
  monkeypatch.setattr(jax.random, 'bernoulli', lambda key, p, shape: (
      shapes.append(tuple(shape)) or bernoulli(key, p, shape)))
  monkeypatch.setattr(dropout, 'dropout', lambda x, rate, key: (
      shapes.append(x.shape) or in_blocks(x, rate, key)))
  model.apply({'params': params}, SOURCE, TARGET, train=True, rngs={'dropout': jax.random.key(0)})
  monkeypatch.undo()
  # Two embeddings, two sublayers in either encoder layer and three in either decoder layer.
  assert sorted(shapes) == [(2, 5, 16)] * (1 + 3 * 2) + [(2, 6, 16)] * (1 + 2 * 2)
  same = [model.apply({'params': params}, SOURCE, TARGET, train=True,
                      rngs={'dropout': jax.random.key(k)}) for k in (0, 0, 1)]
  np.testing.assert_array_equal(same[0], same[1])
  assert np.abs(same[0] - same[2]).max() > .1
