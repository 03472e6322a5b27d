"""Whole models against float64 loops over single sentences, word by word and unpadded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.config import UserError
from tests.translation import test_alignment, test_cells
from translation.seq2seq import Seq2Seq

SOURCE = np.array([[5, 6, 7, 3, 1], [4, 1, 0, 0, 0]], np.int32)
TARGET = np.array([[3, 4, 5, 1], [7, 1, 0, 0]], np.int32)
SENTENCES = [([5, 6, 7, 3, 1], [3, 4, 5, 1]), ([4, 1], [7, 1])]

MODELS = {
    'sutskever': dict(layers=2, reverse=True, source_vocab=9),
    'both ways': dict(cell='lstm', bidirectional=True),
    'bahdanau': dict(cell='gru', attention='bahdanau', bidirectional=True),
    'bahdanau, deep': dict(cell='lstm', attention='bahdanau', layers=2, reverse=True),
    'luong': dict(attention='dot', layers=2, reverse=True),
    'luong, fed': dict(attention='general', layers=2, reverse=True, input_feeding=True),
    'concat': dict(cell='rnn', attention='concat', bidirectional=True, source_vocab=9),
}


def model(**changes):
  return Seq2Seq(**{'vocab': 8, 'width': 4, 'embed': 3, **changes})


@functools.cache
def params_of(module):
  return test_cells.made(module, SOURCE, TARGET)


def oracle(m, params, source, target):
  """Logits `[length, vocab]` and attention `[length, source]` of one pair."""
  matrix = lambda name: np.asarray(params[name], np.float64)
  table = 'target_embedding' if m.source_vocab else 'embedding'
  read_words = matrix('source_embedding' if m.source_vocab else table)
  order = list(range(len(source)))
  if m.reverse:
    order = order[:-1][::-1] + order[-1:]
  below = np.array([read_words[source[i]] for i in order])
  ends = []
  for layer in range(m.layers):
    ways = [test_cells.run(m.cell, params['encoder'][f'forward_{layer}'], below)]
    if m.bidirectional:
      ways.append(test_cells.run(m.cell, params['encoder'][f'backward_{layer}'], below, True))
    below = np.concatenate([hidden for hidden, _ in ways], axis=-1)
    ends.append([last for _, last in ways])
  annotations = np.zeros_like(below)
  annotations[order] = below

  states = []
  for layer, ways in enumerate(ends):
    if m.attention == 'bahdanau':
      parts = ways[-1]
    else:
      parts = [np.concatenate(part) for part in zip(*ways)]
    if m.bidirectional or m.attention == 'bahdanau':
      parts = [part @ matrix(f'bridge_{layer}_{name}') for part, name in zip(parts, 'hc')]
      parts[0] = np.tanh(parts[0])
    states.append(tuple(parts))

  attend = lambda s: test_alignment.attend(m.attention, params.get('aligner'), s, annotations)
  logits, shares, fed = [], [], np.zeros(m.width)
  for word in [0, *target[:-1]]:
    x = matrix(table)[word] * (word != 0)
    context = second = None
    before = states[-1][0]
    if m.attention == 'bahdanau':
      share, context = attend(before)
      second = context
    elif m.input_feeding:
      second = fed
    after, at = [], x
    for layer, state in enumerate(states):
      after.append(test_cells.step(m.cell, params['decoder'][f'forward_{layer}'], at, state,
                                   None if layer else second))
      at = after[-1][0]
    states = after
    if m.attention == 'none':
      share = np.zeros(len(source))
      logits.append(at @ matrix('output') + matrix('output_bias'))
    elif m.attention == 'bahdanau':
      u, v, c = np.split(matrix('readout'), [m.width, m.width + m.embed])
      total = before @ u + x @ v + context @ c + matrix('readout_bias')
      most = np.array([max(total[i], total[i + 1]) for i in range(0, len(total), 2)])
      logits.append(most @ matrix('output') + matrix('output_bias'))
    else:
      share, context = attend(at)
      fed = np.tanh(np.concatenate([context, at]) @ matrix('combine'))
      logits.append(fed @ matrix('output'))
    shares.append(share)
  return np.array(logits), np.array(shares)


@pytest.mark.parametrize('name', MODELS)
def test_logits_and_attention(name):
  """Teacher forcing, and word by word with two beams, against the oracle."""
  m = model(**MODELS[name])
  params = params_of(m)
  logits = jax.jit(m.apply)({'params': params}, SOURCE, TARGET)
  assert logits.dtype == jnp.float32

  @jax.jit
  def by_steps(source, target):
    bound = functools.partial(m.apply, {'params': params})
    memory = bound(source, method='encode')
    def step(state, tokens):
      logits, state, attention = bound(tokens, state, memory, method='step')
      return state, (logits, attention)
    fed = jnp.repeat(jnp.pad(target[:, :-1], ((0, 0), (1, 0))), 2, axis=0)
    return jax.lax.scan(step, bound(memory, 2, 9, method='begin'), fed.T)[1]
  stepped, attention = by_steps(SOURCE, TARGET)
  for b, (source, target) in enumerate(SENTENCES):
    want, shares = oracle(m, params, source, target)
    np.testing.assert_allclose(logits[b, :len(target)], want, atol=1e-5)
    for row in (2 * b, 2 * b + 1):
      np.testing.assert_allclose(stepped[:len(target), row], want, atol=1e-5)
      np.testing.assert_allclose(attention[:len(target), row, :len(source)], shares, atol=1e-5)
      assert not np.asarray(attention[:, row, len(source):]).any()


def test_beams_go_their_own_ways():
  """Rows are item * beams + beam; the second beam is fed other words than the first."""
  m = model(**MODELS['luong, fed'])
  params = params_of(m)
  bound = functools.partial(m.apply, {'params': params})

  @jax.jit
  def run():
    memory = bound(SOURCE, method='encode')
    state = bound(memory, 2, 5, method='begin')
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {4}
    assert {x.shape[0] for x in jax.tree.leaves(memory)} == {2}
    for tokens in ([0] * 4, [3, 4, 5, 6], [5, 4, 3, 6]):
      logits, state, _ = bound(jnp.array(tokens), state, memory, method='step')
    return logits
  logits = run()
  for row, words in enumerate(([3, 5], [4, 4], [5, 3], [6, 6])):
    want, _ = oracle(m, params, SENTENCES[row // 2][0], [*words, 1])
    np.testing.assert_allclose(logits[row], want[-1], atol=1e-5)


@pytest.mark.parametrize('name', ['luong, fed', 'bahdanau'])
def test_gradients_of_the_loop_over_words(name):
  """The derivative along a random direction against a difference of float64 losses."""
  m = model(**MODELS[name])
  params = params_of(m)
  direction = test_cells.random_like(params, seed=7)
  probe = np.random.default_rng(8).normal(size=(5, m.vocab))

  def loss(params):
    logits = m.apply({'params': params}, SOURCE, TARGET)
    return sum((logits[b, :len(t)] * probe[:len(t)]).sum() for b, (_, t) in enumerate(SENTENCES))

  def exact(distance):
    moved = jax.tree.map(lambda p, d: np.float64(p) + distance * d, params, direction)
    return sum((oracle(m, moved, s, t)[0] * probe[:len(t)]).sum() for s, t in SENTENCES)
  grads = jax.jit(jax.grad(loss))(params)
  slope = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (grads, direction))))
  np.testing.assert_allclose(slope, (exact(1e-5) - exact(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize('name', ['sutskever', 'luong, fed'])
def test_dropout(name):
  m = model(**MODELS[name], dropout=.4)
  params = params_of(m)
  run = jax.jit(lambda seed: m.apply({'params': params}, SOURCE, TARGET, train=True,
                                     rngs={'dropout': jax.random.key(seed)}))
  np.testing.assert_array_equal(run(0), run(0))
  assert (np.abs(run(0) - run(1)).max(axis=(0, 2)) > 1e-3).all()  # At every word.
  kept = jax.jit(m.apply)({'params': params}, SOURCE, TARGET)
  plain = jax.jit(m.clone(dropout=0.).apply)({'params': params}, SOURCE, TARGET)
  np.testing.assert_array_equal(kept, plain)


def test_dropout_in_the_loop_leaves_the_recurrent_path():
  """Where all inputs are dropped, the top layer goes on from its own state alone."""
  m = model(**MODELS['luong, fed'], dropout=1 - 1e-7)
  params = params_of(m)
  layer = dict(params['decoder']['forward_1'])
  layer['kernel'] = np.zeros_like(layer['kernel'])

  def fed_states(module):
    memory = module.encode(jnp.asarray(SOURCE))
    words = jnp.ones((2, 3, 3))
    return memory['states'][1], memory['annotations'], module._scan(words, memory, True)
  start, annotations, read = jax.jit(lambda: m.apply(
      {'params': params}, method=fed_states, rngs={'dropout': jax.random.key(0)}))()
  hidden, _ = test_cells.run('lstm', layer, np.zeros((3, 4)), state=tuple(
      np.float64(part[0]) for part in start))
  for t in range(3):
    _, context = test_alignment.attend('general', params['aligner'], hidden[t],
                                       np.float64(annotations[0]))
    want = np.tanh(np.concatenate([context, hidden[t]]) @ params['combine'])
    np.testing.assert_allclose(read[0, t], want, atol=1e-5)


def test_half_precision():
  m = model(**MODELS['bahdanau'])
  params = params_of(m)
  whole = jax.jit(m.apply)({'params': params}, SOURCE, TARGET)
  half = jax.jit(m.clone(dtype=jnp.bfloat16).apply)({'params': params}, SOURCE, TARGET)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, whole, atol=.1)


def test_a_sentence_of_padding_stays_finite():
  """What fills up the last batch of an evaluation."""
  m = model(**MODELS['luong, fed'])
  blank = np.zeros_like(SOURCE)
  assert np.isfinite(jax.jit(m.apply)({'params': params_of(m)}, blank, TARGET)).all()


def test_attention_begins_uniform():
  """Bahdanau et al. 2015: v_a = 0."""
  m = model(**MODELS['bahdanau'], initializer='bahdanau')

  @jax.jit
  def attention():
    params = nn.unbox(m.init(jax.random.key(0), SOURCE, TARGET)['params'])
    bound = functools.partial(m.apply, {'params': params})
    memory = bound(SOURCE, method='encode')
    return bound(jnp.zeros(2, jnp.int32), bound(memory, 1, 5, method='begin'), memory,
                 method='step')[2]
  np.testing.assert_allclose(attention(), [[.2] * 5, [.5, .5, 0, 0, 0]], atol=1e-6)


def count(m):
  shapes = jax.eval_shape(lambda: m.init(jax.random.key(0), SOURCE, TARGET))
  return sum(x.size for x in jax.tree.leaves(shapes))


def test_size_of_sutskevers_model():
  """Section 3.4: 384M parameters, of which 64M recurrent."""
  n = 1000
  recurrent = 2 * 4 * (4 * n * (n + n) + 4 * n)
  softmax = 80_000 * n + 80_000
  made = count(Seq2Seq(vocab=80_000, source_vocab=160_000, width=n, embed=n, layers=4,
                       reverse=True))
  assert made == recurrent + 160_000 * n + 80_000 * n + softmax == 384_112_000


def test_size_of_bahdanaus_model():
  """RNNsearch, appendix A: n 1000, embeddings 620, maxout 500, 30,000 words each."""
  n, m, l, words = 1000, 620, 500, 30_000
  encoder = 2 * 3 * (n * m + n * n + n)
  decoder = 3 * (n * m + n * n + 2 * n * n + n) + n * n
  attention = n * n + 2 * n * n + n
  readout = 2 * l * (n + m + 2 * n + 1) + l * words + words
  made = count(Seq2Seq(vocab=words, source_vocab=words, width=n, embed=m, cell='gru',
                       attention='bahdanau', bidirectional=True))
  assert made == encoder + decoder + attention + readout + 2 * words * m


def test_errors():
  init = lambda **kw: model(**kw).init(jax.random.key(0), SOURCE, TARGET)
  with pytest.raises(ValueError, match='no segments'):
    model().init(jax.random.key(0), SOURCE, TARGET, source_segments=SOURCE)
  with pytest.raises(UserError, match='input_feeding needs an attention of Luong'):
    init(attention='bahdanau', input_feeding=True)
  with pytest.raises(UserError, match="config.model.attention: unknown name 'luong'"):
    init(attention='luong')
  with pytest.raises(UserError, match="'general'"):
    init(attention='dot', bidirectional=True)
