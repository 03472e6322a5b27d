import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vit as vit_config
from core.plan import make_plan
from vit_family import pictures


def random_attention(layers=4, heads=3, tokens=10, seed=0):
  weights = np.random.default_rng(seed).exponential(size=(layers, heads, tokens, tokens)) ** 3
  return weights / weights.sum(-1, keepdims=True)


def test_rollout_rows_sum_to_one_at_every_depth():
  weights = random_attention()
  for depth in range(1, 5):
    np.testing.assert_allclose(pictures.rollout(weights[:depth]).sum(-1), 1., rtol=1e-12)


def test_rollout_by_hand():
  """Two layers, one head, two tokens: 0.5 A + 0.5 I, then the product, second layer first."""
  a = np.array([[[[.5, .5], [0., 1.]]], [[[1., 0.], [1., 0.]]]])
  first = np.array([[.75, .25], [0., 1.]])
  second = np.array([[1., 0.], [.5, .5]])
  np.testing.assert_allclose(pictures.rollout(a), second @ first)


def test_uniform_attention_is_seen_everywhere_alike():
  heat = pictures.heat(pictures.rollout(np.full((3, 2, 10, 10), .1)), token=True)
  assert heat.shape == (3, 3)
  np.testing.assert_allclose(heat, 1.)
  assert pictures.heat(pictures.rollout(np.full((3, 2, 9, 9), 1 / 9)), token=False).shape == (3, 3)


def test_similarity_is_cosine():
  e = np.random.default_rng(0).normal(size=(9, 5))
  found = pictures.similarity(e)
  np.testing.assert_allclose(np.diag(found), 1.)
  np.testing.assert_allclose(found[2, 7], e[2] @ e[7] / np.linalg.norm(e[2]) / np.linalg.norm(e[7]))


@pytest.mark.parametrize('scan', [True, False])
def test_attention_is_that_of_the_model(scan):
  """Every row is a distribution, and the logits are those of the plain forward pass."""
  config = vit_config.get_config('smoke')
  config.model.variant, config.model.scan = 'mini', scan
  task = make_plan(config, jax.devices()[:1]).task
  params = jax.tree.map(
      lambda s: jnp.asarray(np.random.default_rng(0).normal(0, .1, s.shape), jnp.float32),
      make_plan(config, jax.devices()[:1]).params_shape)
  batch = {'image': np.random.default_rng(0).integers(0, 255, (2, 16, 16, 1)).astype(np.uint8)}
  logits, weights = jax.jit(lambda p, b: pictures.attention(task, p, b))(params, batch)
  assert weights.shape == (6, 2, 4, 5, 5)
  np.testing.assert_allclose(weights.sum(-1), 1., rtol=1e-5)
  np.testing.assert_allclose(logits, jax.jit(task.logits)(params, batch), rtol=1e-4, atol=1e-5)


def test_pictures_are_written(tmp_path):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 255, (12, 32, 32, 3)).astype(np.uint8)
  weights = random_attention(tokens=17)
  names = [f'class {i}' for i in range(10)]
  pictures.predictions(image, np.arange(12) % 10, np.arange(12) // 2, names, tmp_path / 'a.png')
  pictures.rollouts(image[:4], np.stack([weights] * 4), True, tmp_path / 'b.png')
  pictures.position_similarity(rng.normal(size=(16, 8)), tmp_path / 'c.png')
  top = [{'class': n, 'probability': 1 / (i + 2)} for i, n in enumerate(names[:5])]
  pictures.prediction(image[0], pictures.rollout(weights), top, tmp_path / 'd.png', token=True)
  for name in 'abcd':
    picture = cv2.imread(str(tmp_path / f'{name}.png'))
    assert picture is not None and picture.std() > 10, name
