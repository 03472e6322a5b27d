import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.nn import dropout


def kept(rate, shape, seed=0):
  return np.asarray(dropout.dropout(jnp.ones(shape), rate, jax.random.key(seed)))


@pytest.mark.parametrize('rate', [.1, .2, .5, .9])
@pytest.mark.parametrize('shape', [(200, 64), (3, 50, 2, 50), (90, 113), (20_000, 1)])
def test_the_rate_is_met_and_the_mean_is_kept(rate, shape):
  x = kept(rate, shape)
  tolerance = 4 * np.sqrt(rate * (1 - rate) / x.size)
  assert abs((x == 0).mean() - rate) < tolerance
  np.testing.assert_allclose(x[x > 0], 1 / (1 - rate), rtol=1e-6)


def test_nothing_and_everything():
  np.testing.assert_array_equal(kept(0., (4, 6)), 1)
  np.testing.assert_array_equal(kept(1., (4, 6)), 0)
  x = jnp.arange(6.).reshape(2, 3)
  module = dropout.Dropout(.5, deterministic=True)
  np.testing.assert_array_equal(module.apply({}, x), x)


def test_neighbours_are_dropped_independently():
  """Also those that share a word, a quarter of a row apart, and those of another key."""
  rate, width = .3, 64
  x = kept(rate, (4000, width)) == 0
  both = rate ** 2
  tolerance = 4.5 * np.sqrt(both * (1 - both) / x.size)
  for apart in (1, 2, width // 4, width // 2, 3 * width // 4):
    assert abs((x & np.roll(x, apart, axis=1)).mean() - both) < tolerance, apart
  assert abs((x & np.roll(x, 1, axis=0)).mean() - both) < tolerance
  assert abs((x & (kept(rate, (4000, width), seed=1) == 0)).mean() - both) < tolerance


def test_what_is_dropped_does_not_depend_on_the_devices():
  mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ('data', 'tensor'))
  x = jnp.ones((8, 6, 10))
  run = jax.jit(lambda x: dropout.dropout(x, .4, jax.random.key(3)))
  for axes in (('data',), (None, 'tensor'), ('data', 'tensor')):
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    np.testing.assert_array_equal(run(split), run(x))


def test_gradients_flow_where_values_do():
  grad = jax.grad(lambda x: dropout.dropout(x, .25, jax.random.key(0)).sum())(jnp.ones((5, 8)))
  np.testing.assert_array_equal(grad, kept(.25, (5, 8)))


def test_half_precision_stays():
  x = jnp.ones((2, 4), jnp.bfloat16)
  assert dropout.dropout(x, .5, jax.random.key(0)).dtype == jnp.bfloat16
