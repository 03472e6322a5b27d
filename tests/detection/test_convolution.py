import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detection import convolution


@pytest.fixture
def double():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize('size', [3, 5])
def test_gradients_are_those_of_the_convolution(double, monkeypatch, size, stride, dilation):
  """Odd and even sides; wide enough, so that the kernel's gradient is made of products."""
  monkeypatch.setattr(convolution, '_WIDE', 4)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 11, 14, 4), jnp.float64)
  kernel = jax.random.normal(keys[1], (size, size, 4, 6), jnp.float64)
  plain = lambda x, kernel: convolution._convolve(stride, dilation, x, kernel)
  ours = lambda x, kernel: convolution.convolve(x, kernel, stride, dilation)
  assert 'custom_vjp' in str(jax.make_jaxpr(ours)(x, kernel))
  y, back = jax.vjp(ours, x, kernel)
  expected, expected_back = jax.vjp(plain, x, kernel)
  np.testing.assert_array_equal(y, expected)
  dy = jax.random.normal(keys[2], y.shape, y.dtype)
  for found, wanted in zip(back(dy), expected_back(dy)):
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.dtype == wanted.dtype


def test_only_wide_ones_on_a_cpu_differ(monkeypatch):
  x, wide = jnp.zeros((1, 4, 4, 128)), jnp.zeros((3, 3, 128, 128))
  # Anew each time: what is traced depends on the platform.
  traced = lambda x, kernel: str(jax.make_jaxpr(lambda *a: convolution.convolve(*a))(x, kernel))
  assert 'custom_vjp' in traced(x, wide)
  assert 'custom_vjp' not in traced(x, wide[..., :64])
  monkeypatch.setattr(convolution.partition, 'platform', lambda: 'tpu')
  assert 'custom_vjp' not in traced(x, wide)
