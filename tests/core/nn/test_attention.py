import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from core import partition
from core.nn import attention


def oracle(q, k, v, mask=None):
  """Attention in float64, one query at a time, written from the formula."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  batch, q_len, heads, dim = q.shape
  k_len = k.shape[1]
  mask = np.broadcast_to(True if mask is None else mask, (batch, heads, q_len, k_len))
  out = np.zeros(q.shape[:3] + v.shape[3:])
  weights = np.zeros((batch, heads, q_len, k_len))
  for b, h, i in np.ndindex(batch, heads, q_len):
    seen = np.flatnonzero(mask[b, h, i])
    if not seen.size:
      continue
    scores = k[b, seen, h] @ q[b, i, h] / np.sqrt(dim)
    e = np.exp(scores - scores.max())
    weights[b, h, i, seen] = e / e.sum()
    out[b, i, h] = weights[b, h, i, seen] @ v[b, seen, h]
  return out, weights


def inputs(batch=2, q_len=7, k_len=7, heads=3, dim=8, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(batch, n, heads, dim) for n in (q_len, k_len, k_len)]
  return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes)]


def some_mask(q_len, k_len):
  """A mask `[2, 1, q_len, k_len]` with one row that sees nothing."""
  mask = np.random.default_rng(0).random((2, 1, q_len, k_len)) < 0.6
  mask[:, :, :, 0] = True
  mask[1, :, 2] = False
  return mask


@pytest.mark.parametrize('q_len, masked, causal', [
    (7, False, False), (7, True, False), (7, False, True), (7, True, True), (5, True, False)])
def test_matches_a_float64_oracle(q_len, masked, causal):
  q, k, v = inputs(q_len=q_len)
  mask = some_mask(q_len, 7) if masked else None
  out, weights = attention.dot_product_attention(
      q, k, v, mask=mask, causal=causal, return_weights=True)
  seen = np.ones((q_len, 7), bool) if mask is None else mask
  if causal:
    seen = seen & np.tri(7, dtype=bool)
  want, want_weights = oracle(q, k, v, seen)
  np.testing.assert_allclose(out, want, atol=2e-6)
  np.testing.assert_allclose(weights, want_weights, atol=2e-6)
  alone = attention.dot_product_attention(q, k, v, mask=mask, causal=causal)
  np.testing.assert_allclose(alone, want, atol=2e-6)


@pytest.mark.parametrize('length', [127, 130, 256])
def test_causal_attention_in_blocks_is_that_with_a_mask(length):
  """Lengths that make one, two and four blocks."""
  q, k, v = inputs(1, length, length, 2, 4)
  triangle = np.tri(length, dtype=bool)
  probe = np.random.default_rng(1).normal(size=q.shape)

  def loss(q, k, v, **kw):
    out = attention.dot_product_attention(q, k, v, **kw)
    return (out * probe).sum(), out
  grad = jax.grad(loss, (0, 1, 2), has_aux=True)
  (grads, out), (want_grads, want) = grad(q, k, v, causal=True), grad(q, k, v, mask=triangle)
  np.testing.assert_allclose(want, oracle(q, k, v, triangle)[0], atol=2e-6)
  np.testing.assert_allclose(out, want, atol=2e-6)
  for got, expected in zip(grads, want_grads):
    np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize('masked, causal', [(False, False), (True, False), (False, True)])
def test_gradients_match_finite_differences(masked, causal):
  q, k, v = inputs()
  mask = some_mask(7, 7) if masked else None
  seen = np.ones((7, 7), bool) if mask is None else mask
  if causal:
    seen = seen & np.tri(7, dtype=bool)
  probe = np.random.default_rng(1).normal(size=q.shape)

  def loss(q, k, v):
    return (attention.dot_product_attention(q, k, v, mask=mask, causal=causal) * probe).sum()
  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  rng = np.random.default_rng(2)
  for which, grad in enumerate(grads):
    for _ in range(3):
      direction = rng.normal(size=q.shape)
      ends = []
      for sign in (1, -1):
        moved = [np.asarray(x, np.float64) for x in (q, k, v)]
        moved[which] += sign * 1e-5 * direction
        ends.append((oracle(*moved, seen)[0] * probe).sum())
      np.testing.assert_allclose(
          (np.asarray(grad, np.float64) * direction).sum(), (ends[0] - ends[1]) / 2e-5,
          rtol=1e-4, atol=1e-4)


def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients():
  q, k, v = inputs()
  mask = some_mask(7, 7)
  out, weights = attention.dot_product_attention(q, k, v, mask=mask, return_weights=True)
  assert not np.any(out[1, 2])
  assert not np.any(weights[1, :, 2])
  none = jnp.zeros((1, 1, 1, 1), bool)
  grads = jax.grad(lambda *x: attention.dot_product_attention(*x, mask=none).sum(), (0, 1, 2))(
      q, k, v)
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_bfloat16_keeps_the_softmax_in_float32():
  q, k, v = inputs(dtype=jnp.bfloat16)
  out, weights = attention.dot_product_attention(q, k, v, return_weights=True)
  assert out.dtype == jnp.bfloat16
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(np.asarray(out, np.float32), oracle(q, k, v)[0], atol=0.03)


def test_dropout_drops_weights_and_keeps_their_mean():
  q, k, v = inputs(q_len=64, k_len=64)
  v = jnp.ones_like(v)
  rng = jax.random.key(3)
  out = attention.dot_product_attention(q, k, v, dropout_rate=0.5, dropout_rng=rng)
  assert np.std(out) > 0.01
  # The mean of 384 rows, each with a standard deviation of about 0.2.
  np.testing.assert_allclose(np.mean(out), 1, atol=0.05)
  calm = attention.dot_product_attention(q, k, v, dropout_rate=0.5)
  np.testing.assert_allclose(calm, 1, atol=1e-5)


def test_causal_needs_as_many_queries_as_keys():
  q, k, v = inputs(q_len=5)
  with pytest.raises(ValueError, match='as many queries as keys'):
    attention.dot_product_attention(q, k, v, causal=True)


@pytest.mark.parametrize('causal', [False, True])
def test_splash_matches_xla_with_batch_and_heads_split_over_a_mesh(causal):
  q, k, v = inputs(batch=2, q_len=256, k_len=256, heads=4, dim=16)
  layout = partition.Layout(
      jax.make_mesh((2, 1, 2), partition.AXES, devices=jax.devices()[:4],
                    axis_types=(AxisType.Auto,) * 3), partition.RULES['fsdp_tp'])

  def run(implementation):
    def loss(q, k, v):
      out = attention.dot_product_attention(q, k, v, causal=causal, implementation=implementation)
      return (out ** 2).sum(), out
    with partition.use(layout):
      return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run('splash'), run('xla'))


def test_the_platform_and_what_is_asked_choose_the_implementation(monkeypatch):
  half = inputs(q_len=1024, k_len=1024, dim=64, dtype=jnp.bfloat16)
  full = inputs(q_len=1024, k_len=1024, dim=64)
  odd = inputs(q_len=197, k_len=197, dim=64, dtype=jnp.bfloat16)
  wide = inputs(dim=256, dtype=jnp.bfloat16)
  mask = jnp.ones((1, 1, 1, 1024), bool)
  choose = attention._choose
  for platform, (q, k, _), m, want in [
      ('cpu', half, None, 'xla'), ('gpu', half, None, 'cudnn'), ('gpu', half, mask, 'cudnn'),
      ('gpu', full, None, 'xla'), ('gpu', wide, None, 'xla'), ('tpu', half, None, 'splash'),
      ('tpu', full, None, 'splash'), ('tpu', half, mask, 'xla'), ('tpu', odd, None, 'xla')]:
    monkeypatch.setattr(partition, 'platform', lambda p=platform: p)
    assert choose(q, k, k, m) == want, (platform, q.shape, q.dtype)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize('causal, head_dim', [(False, 64), (True, 128)])
def test_splash_compiles_for_a_tpu_that_is_not_here(monkeypatch, causal, head_dim):
  pytest.importorskip('libtpu')
  from jax.experimental import topologies
  for name, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'),
                      ('TPU_ACCELERATOR_TYPE', 'v5litepod-4')):
    monkeypatch.setitem(os.environ, name, value)
  try:
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
  except jax.errors.JaxRuntimeError as e:
    pytest.skip(f'libtpu cannot start, another process may hold it: {e}')
  mesh = jax.make_mesh((1, 2, 2), partition.AXES, devices=topology.devices,
                       axis_types=(AxisType.Auto,) * 3)
  layout = partition.Layout(mesh, partition.RULES['fsdp_tp'])
  shape = (4, 1024, 4, head_dim)
  x = jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=layout.sharding(('batch', 'length', 'heads', 'kv'), shape))

  def grads(q, k, v):
    def loss(*x):
      return attention.dot_product_attention(*x, causal=causal).astype(jnp.float32).sum()
    with partition.use(layout):
      return jax.grad(loss, (0, 1, 2))(q, k, v)
  text = jax.jit(grads).lower(x, x, x).compile().as_text()
  # One kernel forward, one each for the gradients of queries and of keys and values.
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert 'all-gather' not in text


def project(x, p):
  return np.einsum('bld,dhk->blhk', x, p['kernel']) + p.get('bias', 0)


@pytest.mark.parametrize('kind', ['self', 'cross', 'values', 'no_bias'])
def test_multi_head_attention_matches_the_oracle(kind):
  rng = np.random.default_rng(0)
  x, memory, values = (rng.normal(size=(2, n, w)).astype(np.float32)
                       for n, w in ((5, 12), (7, 10), (7, 9)))
  args = {'self': (x,), 'no_bias': (x,), 'cross': (x, memory), 'values': (x, memory, values)}[kind]
  module = attention.MultiHeadAttention(heads=3, use_bias=kind != 'no_bias',
                                        bias_init=nn.initializers.normal(0.5))
  params = nn.meta.unbox(module.init(jax.random.key(0), *args))['params']
  out, state = module.apply({'params': params}, *args, mutable=['intermediates'])
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  keys = args[1] if len(args) > 1 else x
  vals = args[2] if len(args) > 2 else keys
  want, weights = oracle(project(x, p['query']), project(keys, p['key']),
                         project(vals, p['value']))
  want = np.einsum('blhk,hkd->bld', want, p['out']['kernel']) + p['out'].get('bias', 0)
  np.testing.assert_allclose(out, want, atol=2e-5)
  np.testing.assert_allclose(state['intermediates']['attention'][0], weights, atol=2e-5)
  np.testing.assert_allclose(module.apply({'params': params}, *args), want, atol=2e-5)
  assert ('bias' in params['out']) == (kind != 'no_bias')


def test_parameters_have_public_shapes_and_flattened_fans():
  module = attention.MultiHeadAttention(heads=4, head_dim=64)
  boxed = module.init(jax.random.key(0), jnp.zeros((1, 2, 256)))['params']
  params = nn.meta.unbox(boxed)
  for name in ('query', 'key', 'value'):
    assert params[name]['kernel'].shape == (256, 4, 64)
    assert params[name]['bias'].shape == (4, 64)
    assert boxed[name]['kernel'].names == ('embed', 'heads', 'kv')
  assert params['out']['kernel'].shape == (4, 64, 256)
  assert params['out']['bias'].shape == (256,)
  # Xavier of a 256 x 256 matrix: the bound is sqrt(6 / 512), for all four kernels.
  for name in params:
    np.testing.assert_allclose(abs(params[name]['kernel']).max(), (6 / 512) ** 0.5, rtol=1e-3)
