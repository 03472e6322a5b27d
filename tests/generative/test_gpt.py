"""The model against the released code's formulas in float64, and what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.nn import blocks, losses
from generative import gpt
from tests.generative import tiny


def norm(x, scale):
  return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * scale


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def oracle(params, tokens, keep=None):
  """Logits and features, float64, a loop over the layers of unrolled parameters."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = p['wte'][tokens]
  if keep is None:
    first = np.broadcast_to(p['sos'], (len(x), 1, x.shape[-1]))
    x = np.concatenate([first, x[:, :-1]], 1)
  else:
    x = x * keep[..., None]
  x = x + p['wpe']
  features = []
  for i in range(tiny.DEPTH):
    h = p[f'h_{i}']
    y = norm(x, h['ln_1']['scale'])
    features.append(y.mean(1))
    q, k, v = (np.einsum('bne,ehd->bhnd', y, h['attn'][name]['kernel'])
               for name in ('query', 'key', 'value'))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if keep is None:
      length = scores.shape[-1]
      scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -1e10)
    x = x + np.einsum('bhnd,hde->bne', softmax(scores) @ v, h['attn']['out']['kernel'])
    y = norm(x, h['ln_2']['scale']) @ h['c_fc']['kernel']
    x = x + (y / (1 + np.exp(-1.702 * y))) @ h['c_proj']['kernel']
  x = norm(x, p['ln_f']['scale'])
  return x @ p['wtet'].T, np.stack(features + [x.mean(1)])


@pytest.mark.parametrize('bert', [False, True])
@pytest.mark.parametrize('scan', [False, True])
def test_the_model_is_the_released_code(bert, scan):
  model = tiny.model(bert=bert)
  params, tokens = tiny.params(model), tiny.tokens()
  keep = np.random.default_rng(2).random(tokens.shape) > .3 if bert else None
  want, features = oracle(params, tokens, keep)
  used = blocks.stack_layers(params, 'h') if scan else params
  made = model.clone(scan=scan).apply({'params': used}, tokens, keep=keep, pooled=True)
  np.testing.assert_allclose(made['logits'], want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made['features'], features, rtol=1e-4, atol=1e-5)
  assert ('sos' in params) == (not bert)


@pytest.mark.parametrize('x, want', [
    (1., .845796), (-1., -.154204), (2., 1.935659), (.5, .350388)])
def test_quick_gelu(x, want):
  assert abs(float(blocks.ACTIVATIONS['quick_gelu'](jnp.asarray(x))) - want) < 5e-7


def test_no_pixel_sees_itself_or_a_later_one():
  model = tiny.model()
  params, tokens = tiny.params(model), tiny.tokens(1)
  apply = jax.jit(model.apply)
  logits = lambda tokens: np.asarray(apply({'params': params}, tokens)['logits'])
  for j in range(tiny.LENGTH):
    other = tokens.copy()
    other[0, j] = (other[0, j] + 1) % tiny.COLORS
    moved = np.abs(logits(other) - logits(tokens)).max(-1)[0]
    np.testing.assert_array_equal(moved[:j + 1], 0)
    assert (moved[j + 1:] > 0).all()


def test_bert_without_positions_does_not_know_the_order():
  model = tiny.model(bert=True)
  params, tokens = tiny.params(model), tiny.tokens(1)
  params['wpe'] = np.zeros_like(params['wpe'])
  order = np.random.default_rng(0).permutation(tiny.LENGTH)
  keep = np.arange(tiny.LENGTH)[None] % 3 > 0
  one = model.apply({'params': params}, tokens, keep=keep)['logits']
  two = model.apply({'params': params}, tokens[:, order], keep=keep[:, order])['logits']
  np.testing.assert_allclose(np.asarray(one)[:, order], two, rtol=1e-4, atol=1e-5)


def test_bert_does_not_see_what_is_hidden():
  model = tiny.model(bert=True)
  params, tokens = tiny.params(model), tiny.tokens(1)
  keep = np.arange(tiny.LENGTH)[None] != 4
  other = tokens.copy()
  other[0, 4] = (other[0, 4] + 1) % tiny.COLORS
  logits = lambda tokens: model.apply({'params': params}, tokens, keep=keep)['logits']
  np.testing.assert_array_equal(logits(tokens), logits(other))


@pytest.mark.parametrize('initializer', ['code', 'sparse'])
def test_the_first_losses_are_those_of_guessing(initializer):
  model = gpt.ImageGPT(512, 16, 8, 2, 2, num_classes=10, initializer=initializer)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 16)))
  made, _ = jax.jit(model.init_with_output)(jax.random.key(0), tokens)
  loss = losses.softmax_cross_entropy(made['logits'], tokens).mean()
  assert abs(float(loss) - 6.238325) < 1e-5
  first = losses.softmax_cross_entropy(made['class_logits'], jnp.asarray([3, 4])).mean()
  assert abs(float(first) - 2.302585) < 1e-5


@pytest.mark.parametrize('initializer, want', [
    # The table of the sheet for width 64 and 8 layers.
    ('code', dict(wte=.02, wpe=.01, sos=.02, query=1 / 8, out=1 / 512 ** .5, c_fc=.02,
                  c_proj=.02, wtet=0)),
    ('sparse', dict(wte=.125 / 8, wpe=.125 / 8, query=.125 / 8, out=.125 / 8 / 4,
                    c_fc=.125 / 8, c_proj=.125 / 16 / 4, wtet=0)),
    ('huggingface', dict(wte=.02, wpe=.02, sos=.02, query=.02, out=.02 / 4, c_fc=.02,
                         c_proj=.02 / 4, wtet=.02))])
def test_initialisers(initializer, want):
  model = gpt.ImageGPT(512, 256, 64, 8, 4, initializer=initializer, scan=True)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 256), jnp.int32))['params']
  params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, 'value'))
  found = dict(params, **params['h'], **params['h']['attn'])
  for name, stddev in want.items():
    value = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found[name])])
    np.testing.assert_allclose(value.std(), stddev, rtol=.03 if value.size > 1000 else .3)
    assert abs(value.mean()) <= 4 * stddev / value.size ** .5


def test_the_class_head_reads_the_layers_it_is_told_to():
  layers = (1, 3)
  model = tiny.model(num_classes=4, head_layers=layers)
  params, tokens = tiny.params(model), tiny.tokens()
  _, features = oracle(params, tokens)
  want = np.concatenate([features[1], features[3]], -1) @ params['wclf'].T.astype(np.float64)
  made = model.apply({'params': params}, tokens)
  np.testing.assert_allclose(made['class_logits'], want, rtol=1e-4, atol=1e-5)


def test_a_frozen_model_learns_its_head_alone():
  model = tiny.model(num_classes=4, frozen=True)
  params, tokens = tiny.params(model), tiny.tokens()
  grads = jax.jit(jax.grad(
      lambda p: model.apply({'params': p}, tokens)['class_logits'].sum()))(params)
  assert np.abs(grads.pop('wclf')).max() > 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_unknown_initialiser():
  with pytest.raises(ValueError, match='code'):
    gpt.stddevs('xavier', 8, 2)
