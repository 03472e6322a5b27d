import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from core.config import UserError
from core.nn import blocks
from generative import sampling
from tests.generative import tiny


def settings(**changes):
  return ml_collections.ConfigDict({**dict(temperature=1., top_k=0, top_p=1., count=2, rows=0),
                                    **changes})


def greedy(model, params, prompt):
  """Draws the most likely token with a whole forward pass each time."""
  batch, given = prompt.shape
  tokens = np.concatenate([prompt, np.zeros((batch, model.length - given), np.int32)], 1)
  apply = jax.jit(model.apply)
  for at in range(given, model.length):
    logits = apply({'params': params}, tokens)['logits']
    tokens[:, at] = np.asarray(logits)[:, at].argmax(-1)
  return tokens


@pytest.mark.parametrize('given, scan', [(0, False), (4, True), (8, False)])
def test_cached_generation_is_that_of_whole_passes(given, scan, monkeypatch):
  monkeypatch.setattr(sampling, '_ROOM', 3)  # the caches grow twice on the way
  model = tiny.model()
  params, prompt = tiny.params(model), tiny.tokens(2, given)
  want = greedy(model, params, prompt)
  used = blocks.stack_layers(params, 'h') if scan else params
  complete = jax.jit(lambda params, prompt: sampling.complete(
      model.clone(scan=scan), params, prompt, jax.random.key(0), settings(temperature=0.)))
  got = complete(used, prompt)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(got[:, :given], prompt)
  complete(used, (prompt + 1) % tiny.COLORS)
  assert complete._cache_size() == 1


def test_cached_logits_are_those_of_a_whole_pass():
  from core.nn import decode
  model = tiny.model()
  params, tokens = tiny.params(model), tiny.tokens()
  step = jax.jit(lambda tokens, caches, begin: model.apply(
      {'params': params}, tokens, caches=caches, begin=begin), static_argnums=2)
  want = np.asarray(jax.jit(model.apply)({'params': params}, tokens)['logits'])
  caches = [decode.Cache.empty(2, tiny.HEADS, tiny.LENGTH, tiny.WIDTH // tiny.HEADS, jnp.float32)
            for _ in range(tiny.DEPTH)]
  made = step(tokens[:, :3], caches, True)
  np.testing.assert_allclose(made['logits'][:, 0], want[:, 3], rtol=1e-4, atol=1e-5)
  for at in range(4, tiny.LENGTH):
    made = step(tokens[:, at - 1:at], made['caches'], False)
    np.testing.assert_allclose(made['logits'][:, 0], want[:, at], rtol=1e-4, atol=1e-5)
  numbers = sum(cache.key.size + cache.value.size for cache in made['caches'])
  assert numbers == 2 * tiny.DEPTH * 2 * tiny.LENGTH * tiny.WIDTH


def test_drawn_tokens_follow_the_model():
  model = tiny.model(length=2, depth=1)
  params = tiny.params(model)
  drawn = np.asarray(jax.jit(lambda params: sampling.complete(
      model, params, np.zeros((6000, 0), np.int32), jax.random.key(0), settings()))(params))
  pairs = np.array([[a, b] for a in range(tiny.COLORS) for b in range(tiny.COLORS)], np.int32)
  chance = jax.nn.log_softmax(model.apply({'params': params}, pairs)['logits'])
  want = np.exp(np.asarray(chance)[:, 0][np.arange(49), pairs[:, 0]]
                + np.asarray(chance)[:, 1][np.arange(49), pairs[:, 1]])
  got = np.bincount(drawn[:, 0] * tiny.COLORS + drawn[:, 1], minlength=49) / len(drawn)
  np.testing.assert_allclose(got, want, atol=.02)
  assert abs(want.sum() - 1) < 1e-5


def test_a_prompt_that_leaves_nothing():
  model = tiny.model()
  with pytest.raises(ValueError, match='leaves nothing'):
    sampling.complete(model, tiny.params(model), tiny.tokens(), jax.random.key(0), settings())


@pytest.mark.parametrize('change, words', [
    (dict(temperature=-1), 'at least 0'), (dict(top_k=-1), 'counts colours'),
    (dict(top_p=0), 'above 0'), (dict(top_p=1.5), 'at most 1'), (dict(count=0), 'at least 1'),
    (dict(rows=8), 'nothing to complete in 8'), (dict(rows=-1), 'nothing to complete')])
def test_bad_settings(change, words):
  with pytest.raises(UserError, match=words):
    sampling.check(settings(**change), 8)


def test_the_upper_half_is_given():
  assert sampling.given_rows(settings(), 32) == 16
  assert sampling.given_rows(settings(rows=5), 32) == 5
