import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.nn import attention, decode


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def causal_attention(query, key, value):
  """float64 `[batch, length, heads, head_dim]`."""
  length, head_dim = query.shape[1], query.shape[-1]
  scores = np.einsum('bqhd,bkhd->bhqk', query, key) / head_dim ** .5
  scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
  return np.einsum('bhqk,bkhd->bqhd', softmax(scores), value)


def inputs(length, seed=0, heads=3, head_dim=4):
  return np.random.default_rng(seed).normal(size=(3, 2, length, heads, head_dim))


@pytest.mark.parametrize('parts', [(7,), (1,) * 7, (4, 1, 2), (1, 6)])
def test_cached_attention_in_any_pieces_is_causal_attention(parts):
  query, key, value = inputs(7)
  want = causal_attention(query, key, value)
  cache = decode.Cache.empty(2, 3, 7, 4, jnp.float32)
  attend = jax.jit(decode.Cache.attend)
  start, outs = 0, []
  for size in parts:
    piece = [jnp.asarray(x[:, start:start + size], jnp.float32) for x in (query, key, value)]
    out, cache = attend(cache, *piece)
    outs.append(out)
    start += size
  np.testing.assert_allclose(np.concatenate(outs, 1), want, rtol=2e-5, atol=2e-6)
  assert int(cache.position) == 7


def test_a_cache_grows_without_a_change():
  query, key, value = inputs(6)
  want = causal_attention(query, key, value)
  cache = decode.Cache.empty(2, 3, 4, 4, jnp.float32)
  first, cache = cache.attend(*(jnp.asarray(x[:, :4], jnp.float32) for x in (query, key, value)))
  cache = cache.grown(6)
  assert cache.key.shape == (2, 3, 6, 4)
  last, _ = cache.attend(*(jnp.asarray(x[:, 4:], jnp.float32) for x in (query, key, value)))
  np.testing.assert_allclose(np.concatenate([first, last], 1), want, rtol=2e-5, atol=2e-6)


def test_multi_head_attention_with_a_cache_is_its_causal_self():
  module = attention.MultiHeadAttention(heads=2, use_bias=False)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)
  params = module.init(jax.random.key(0), x)
  want = module.apply(params, x, causal=True)
  cache = decode.Cache.empty(2, 2, 5, 4, jnp.float32)
  first, cache = module.apply(params, x[:, :3], cache=cache)
  rest = []
  for i in (3, 4):
    out, cache = module.apply(params, x[:, i:i + 1], cache=cache)
    rest.append(out)
  np.testing.assert_allclose(np.concatenate([first, *rest], 1), want, rtol=1e-5, atol=1e-6)


def test_a_memory_is_cross_attention_with_rows_side_by_side():
  """Three rows an item read keys and values that are computed once."""
  module = attention.MultiHeadAttention(heads=2)
  random = np.random.default_rng(2)
  source = jnp.asarray(random.normal(size=(2, 5, 6)), jnp.float32)
  rows = jnp.asarray(random.normal(size=(2, 3, 8)), jnp.float32)
  mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
  params = module.init(jax.random.key(0), rows, source)
  want, kept = module.apply(params, rows, source, mask=mask[:, None, None],
                            mutable=['intermediates'])
  empty = decode.Memory(mask)
  assert not empty.fixed
  _, filled = module.apply(params, rows[:, :1], source, cache=empty)
  assert filled.fixed
  # With the memory filled nothing but the queries is projected: the source is not asked for.
  out, after = module.apply(params, rows.reshape(6, 1, 8), cache=filled)
  np.testing.assert_allclose(out.reshape(2, 3, 8), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(after.weights, kept['intermediates']['attention'][0], atol=1e-6)
  np.testing.assert_array_equal(after.key, filled.key)


LOGITS = np.array([2., 1., .5, .5, -1., -3.])


def frequencies(**settings):
  draw = jax.jit(jax.vmap(lambda key: decode.draw(key, jnp.asarray(LOGITS), **settings)))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
  return np.bincount(drawn, minlength=6) / len(drawn)


@pytest.mark.parametrize('temperature', [.5, 1., 3.])
def test_draws_follow_the_softmax(temperature):
  np.testing.assert_allclose(frequencies(temperature=temperature), softmax(LOGITS / temperature),
                             atol=.015)


def test_zero_temperature_takes_the_first_of_the_most_likely():
  logits = jnp.asarray([[1., 3., 3.], [5., 0., 1.]])
  np.testing.assert_array_equal(decode.draw(jax.random.key(0), logits, 0.), [1, 0])


def only(kept):
  chance = softmax(LOGITS) * kept
  return chance / chance.sum()


def test_top_k_keeps_k_and_what_is_as_likely():
  np.testing.assert_allclose(frequencies(top_k=2), only([1, 1, 0, 0, 0, 0]), atol=.015)
  np.testing.assert_allclose(frequencies(top_k=3), only([1, 1, 1, 1, 0, 0]), atol=.015)
  np.testing.assert_allclose(frequencies(top_k=6), softmax(LOGITS), atol=.015)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
  # Probabilities are .54, .20, .12, .12, .03 and .004.
  np.testing.assert_allclose(frequencies(top_p=.5), only([1, 0, 0, 0, 0, 0]), atol=.015)
  np.testing.assert_allclose(frequencies(top_p=.6), only([1, 1, 0, 0, 0, 0]), atol=.015)
  np.testing.assert_allclose(frequencies(top_p=.97), only([1, 1, 1, 1, 1, 0]), atol=.015)


def test_top_p_counts_after_top_k():
  # Of the two most likely the first has .73.
  np.testing.assert_allclose(frequencies(top_k=2, top_p=.7), only([1, 0, 0, 0, 0, 0]), atol=.015)
