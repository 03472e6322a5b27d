import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from core.nn import losses


def logits(scale=5.0, dtype=np.float32):
  return (np.random.default_rng(0).normal(size=(6, 9)) * scale).astype(dtype)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('scale', [1.0, 200.0])
def test_softmax_cross_entropy_matches_scipy(smoothing, scale):
  x = logits(scale)
  labels = np.array([0, 8, 3, 3, 1, 5], np.int32)
  target = np.eye(9)[labels] * (1 - smoothing) + smoothing / 9
  want = -(target * scipy.special.log_softmax(x.astype(np.float64), axis=-1)).sum(-1)
  got = losses.softmax_cross_entropy(x, labels, smoothing)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  onehot = losses.softmax_cross_entropy(x, np.eye(9, dtype=np.float32)[labels], smoothing)
  np.testing.assert_allclose(onehot, want, rtol=1e-5, atol=1e-5)
  assert got.shape == (6,) and got.dtype == jnp.float32


def test_softmax_cross_entropy_of_mixed_and_empty_targets():
  x = logits()
  target = np.random.default_rng(1).random((6, 9)).astype(np.float32)
  target /= target.sum(-1, keepdims=True)
  target[2] = 0
  want = -(target * scipy.special.log_softmax(x.astype(np.float64), axis=-1)).sum(-1)
  np.testing.assert_allclose(losses.softmax_cross_entropy(x, target), want, rtol=1e-5, atol=1e-6)
  assert losses.softmax_cross_entropy(x, target, 0.1)[2] == 0


@pytest.mark.parametrize('scale', [1.0, 200.0])
def test_sigmoid_cross_entropy_matches_scipy(scale):
  x = logits(scale)
  target = (np.random.default_rng(1).random((6, 9)) < 0.3).astype(np.float32)
  y = x.astype(np.float64)
  want = -(target * scipy.special.log_expit(y) + (1 - target) * scipy.special.log_expit(-y)).sum(-1)
  np.testing.assert_allclose(losses.sigmoid_cross_entropy(x, target), want, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_summed_in_float32():
  x = jnp.zeros((2, 4096), jnp.bfloat16)
  got = losses.softmax_cross_entropy(x, jnp.array([0, 1]))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.log(4096), rtol=1e-6)
  got = losses.sigmoid_cross_entropy(x, jnp.zeros((2, 4096)))
  np.testing.assert_allclose(got, 4096 * np.log(2), rtol=1e-6)


def test_gradients_of_extreme_logits_are_finite():
  x = jnp.array([[1e4, -1e4, 0.0]])
  for loss in (lambda x: losses.softmax_cross_entropy(x, jnp.array([1])).sum(),
               lambda x: losses.sigmoid_cross_entropy(x, jnp.array([[0.0, 1.0, 0.0]])).sum()):
    assert np.isfinite(jax.grad(loss)(x)).all()


def test_losses_at_the_start_of_training():
  # A zero head with bias b gives logits b everywhere: ln C for a softmax, and about
  # C * 4.54e-5 + 10 for a sigmoid with b = -10 (ViT's pretraining).
  classes = 1000
  onehot = jax.nn.one_hot(jnp.array([3]), classes)
  softmax = losses.softmax_cross_entropy(jnp.zeros((1, classes)), onehot)
  np.testing.assert_allclose(softmax, np.log(classes), rtol=1e-6)
  sigmoid = losses.sigmoid_cross_entropy(jnp.full((1, classes), -10.0), onehot)
  np.testing.assert_allclose(sigmoid, classes * 4.54e-5 + 10, rtol=1e-5)
