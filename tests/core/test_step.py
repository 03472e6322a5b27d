import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core import step, task
from core.plan import make_plan


def quadratic(params, batch, rng, train):
  """Weighted mean of squared errors, with very uneven weights in a batch."""
  del rng, train
  error = (batch['x'] @ params['w'] - batch['y']) ** 2
  weight = batch['mask'].sum()
  mean = (error * batch['mask']).sum() / jnp.maximum(weight, 1e-9)
  return mean, task.Aux(weight, {'worst': (error.max(), jnp.ones(()))})


def batch_of(mask):
  rng = np.random.default_rng(0)
  return {'x': jnp.asarray(rng.normal(size=(len(mask), 3)), jnp.float32),
          'y': jnp.asarray(rng.normal(size=len(mask)), jnp.float32),
          'mask': jnp.asarray(mask, jnp.float32)}


@pytest.mark.parametrize('mask', [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0], [5, 0, 0, 0, .5, 0, 0, 1]])
def test_microbatches_weigh_as_one_batch(mask):
  """Four microbatches give the update of the whole batch, also when some are empty."""
  params = {'w': jnp.array([1., -2., .5])}
  tx = optax.sgd(0.1)
  state = step.init_state(params, tx, 0.)
  batch, key = batch_of(mask), jax.random.key(0)
  whole, found = step.gradient_update(quadratic, tx, 1, state, batch, key)
  split, parts = step.gradient_update(quadratic, tx, 4, state, batch, key)
  chex.assert_trees_all_close(whole.params, split.params, rtol=1e-5)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(found[name][0] / found[name][1], parts[name][0] / parts[name][1],
                               rtol=1e-5)
  # A float64 oracle of the gradient.
  x, y, m, w = (np.asarray(v, np.float64) for v in (*[batch[k] for k in ('x', 'y', 'mask')],
                                                     params['w']))
  gradient = (2 * m * (x @ w - y)) @ x / m.sum()
  np.testing.assert_allclose(whole.params['w'], w - 0.1 * gradient, rtol=1e-5)


def test_an_unweighted_mean_of_microbatches_would_be_wrong():
  """The test above can fail: the plain mean of microbatch gradients differs."""
  params, batch = {'w': jnp.array([1., -2., .5])}, batch_of([5, 0, 0, 0, .5, 0, 0, 1])
  micro = step.microbatches(batch, 4)
  grads = jax.vmap(lambda b: jax.grad(lambda p: quadratic(p, b, None, True)[0])(params))(micro)
  plain = grads['w'].mean(0)
  true = jax.grad(lambda p: quadratic(p, batch, None, True)[0])(params)['w']
  assert np.abs(plain - true).max() > 0.1


def test_accumulation_through_the_whole_step(smoke):
  """A real model with dropout off: accum=4 equals accum=1 to float32 rounding."""
  results = []
  for accum in (1, 4):
    config = smoke()
    config.accum = accum
    config.optim.name = 'sgd'  # adam would blow rounding in near-zero gradients up to whole steps
    plan = make_plan(config, jax.devices()[:1])
    batch = {name: jnp.zeros(s.shape, s.dtype)
             for name, s in plan.task.batch_spec(config.batch_size).items()}
    batch['image'] = jnp.asarray(
        np.random.default_rng(0).integers(0, 255, batch['image'].shape), jnp.uint8)
    batch['label'] = jnp.arange(8) % 3
    batch['mask'] = jnp.array([1, 1, 1, 0, 0, 0, 0, 1.])
    state = plan.init(jax.random.key(0))
    for _ in range(3):
      state, found = plan.train_step(state, batch)
    results.append((state.params, {k: v[0] / v[1] for k, v in found.items()}))
  chex.assert_trees_all_close(results[0], results[1], rtol=2e-4, atol=1e-6)


def test_moving_average(smoke):
  config = smoke()
  config.ema = 0.75
  plan = make_plan(config, jax.devices()[:1])
  state = plan.init(jax.random.key(0))
  batch = {name: jnp.ones(s.shape, s.dtype)
           for name, s in plan.task.batch_spec(config.batch_size).items()}
  expected = jax.device_get(state.params)
  for _ in range(3):
    state, _ = plan.train_step(state, batch)
    expected = jax.tree.map(lambda a, p: .75 * a + .25 * np.asarray(p), expected, state.params)
  chex.assert_trees_all_close(state.ema, expected, rtol=1e-6, atol=1e-8)


def test_the_state_is_donated(smoke):
  plan = make_plan(smoke(), jax.devices()[:1])
  state = plan.init(jax.random.key(0))
  batch = {name: jnp.ones(s.shape, s.dtype) for name, s in plan.task.batch_spec(8).items()}
  plan.train_step(state, batch)
  assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))


def test_dropout_is_a_function_of_seed_and_step(smoke):
  config = smoke()
  config.model.dropout_rate = 0.5
  plan = make_plan(config, jax.devices()[:1])
  batch = {name: jnp.ones(s.shape, s.dtype) for name, s in plan.task.batch_spec(8).items()}

  def head(first_step):
    state = plan.init(jax.random.key(0)).replace(step=jnp.int32(first_step))
    return np.asarray(plan.train_step(state, batch)[0].params['head']['kernel'])
  np.testing.assert_array_equal(head(5), head(5))
  assert np.abs(head(5) - head(6)).max() > 0


@pytest.mark.parametrize('precision, remat', [
    ('bfloat16', 'none'), ('float32', 'full'), ('float32', 'dots'),
    pytest.param('bfloat16', 'dots', marks=pytest.mark.slow)])
def test_precision_and_remat_keep_the_result(smoke, precision, remat):
  def loss(precision, remat):
    config = smoke()
    config.precision, config.remat = precision, remat
    plan = make_plan(config, jax.devices()[:1])
    batch = {name: jnp.ones(s.shape, s.dtype) for name, s in plan.task.batch_spec(8).items()}
    state = plan.init(jax.random.key(0))
    for _ in range(3):
      state, found = plan.train_step(state, batch)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state.params))
    return float(found['loss'][0] / found['loss'][1])
  tolerance = 2e-2 if precision == 'bfloat16' else 1e-5
  np.testing.assert_allclose(loss(precision, remat), loss('float32', 'none'), rtol=tolerance)
