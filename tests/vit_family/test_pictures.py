import json
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vit as vit_config
from core.evaluate import EvalRun
from core.plan import make_plan
from vit_family import analysis, pictures


def random_attention(layers=4, heads=3, tokens=10, seed=0):
  weights = np.random.default_rng(seed).exponential(size=(layers, heads, tokens, tokens)) ** 3
  return weights / weights.sum(-1, keepdims=True)


def plan_of(**model):
  config = vit_config.get_config('smoke')
  config.model.update(dict(variant='mini', **model))
  config.batch_size = 12
  return make_plan(config, jax.devices()[:1])


def random_params(plan):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, .1, s.shape), jnp.float32),
                      plan.params_shape)


def test_attention_is_that_of_the_model():
  """Every row is a distribution, and the logits are those of the plain forward pass."""
  plan = plan_of(scan=False)
  params = random_params(plan)
  batch = {'image': np.random.default_rng(0).integers(0, 255, (2, 16, 16, 1)).astype(np.uint8)}
  logits, weights = jax.jit(lambda p, b: pictures.attention(plan.task, p, b))(params, batch)
  assert weights.shape == (6, 2, 4, 5, 5)
  np.testing.assert_allclose(weights.sum(-1), 1., rtol=1e-5)
  np.testing.assert_allclose(logits, jax.jit(plan.task.logits)(params, batch), rtol=1e-4, atol=1e-5)


def distances_by_hand(plan, params):
  """Mean distances `[layers, heads]` over the 20 test images, taken all at once."""
  source = plan.task.dataset('test')
  image = np.stack([plan.task.transform(source[i], np.random.default_rng(0), False)['image']
                    for i in range(20)])
  weights = jax.jit(lambda p, b: pictures.attention(plan.task, p, b))(params, {'image': image})[1]
  np.testing.assert_allclose(weights.sum(-1), 1., rtol=1e-5)
  weights = np.asarray(weights, np.float64)[..., -4:, -4:]
  return (weights * SIDES).sum((-2, -1)).mean(1) / 4


# Four patches of 8 pixels in a square.
SIDES = np.array([[0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]]) ** .5 * 8


def test_what_was_learned(tmp_path):
  """20 test images in batches of 12, measured 4 at a time: the last batch is padded."""
  plan = plan_of(scan=True)
  params = random_params(plan)
  run = EvalRun(plan, tmp_path)
  assert pictures.Learned('test', images=128, rolled=3)(run, params, 0) == {}
  for name in ('attention_distance', 'filters', 'position_similarity', 'rollout'):
    assert cv2.imread(str(tmp_path / 'pictures' / f'{name}.png')).std() > 10, name
  found = json.loads((tmp_path / 'pictures' / 'learned.json').read_text())
  assert found['images'] == 20 and found['grid'] == [2, 2]
  np.testing.assert_allclose(
      found['attention_distance'], distances_by_hand(plan, params), atol=6e-4)
  assert found['uniform_distance'] == pytest.approx(SIDES.mean(), abs=6e-4)
  assert set(found['position_similarity']) == {'adjacent', 'others'}
  assert found['filters']['of'] == 'embedding'
  np.testing.assert_allclose(
      found['filters']['explained_variance'],
      analysis.principal_filters(np.asarray(params['embedding']['kernel']))[1], atol=1e-6)


def test_what_was_learned_without_a_class_token(tmp_path):
  plan = plan_of(classifier='gap', scan=True)
  params = random_params(plan)
  distance, image, mixed = pictures.Learned('test', rolled=3)._measure(
      EvalRun(plan, tmp_path), params, token=False)
  np.testing.assert_allclose(distance.mean(0), distances_by_hand(plan, params), rtol=1e-4)
  assert image.shape == (3, 16, 16, 1) and mixed.shape == (3, 6, 4, 4)


def test_distances_stop_at_the_images_that_were_asked_for():
  """Five of 20, of which two are drawn, in three calls of two."""
  calls = []

  def fn(params, batch, part):
    calls.append(part)
    at = batch + 2 * part + np.arange(2)
    return {'distance': np.ones((2, 1, 1)) * at[:, None, None], 'mask': np.array([1., 1.]),
            'image': at, 'mixed': at}

  run = types.SimpleNamespace(
      batch_size=4, plan=types.SimpleNamespace(layout=types.SimpleNamespace(batch_ways=1)),
      batches=lambda split: iter(range(0, 20, 4)), jit=lambda _: fn)
  run.batch_size = 2 * 9  # gcd with 8 is 2: nine parts a batch.
  distance, image, _ = pictures.Learned('test', images=5, rolled=2)._measure(run, {}, True)
  np.testing.assert_array_equal(distance.ravel(), range(5))
  np.testing.assert_array_equal(image, [0, 1])
  assert calls == [0, 1, 2]


def test_a_model_without_attention_leaves_nothing(tmp_path):
  run = types.SimpleNamespace(pictures=tmp_path)
  assert pictures.Learned('test')(run, {'root_block': {}}, 0) == {}
  assert not list(tmp_path.iterdir())


def test_mosaic():
  tiles = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2).astype(float)
  found = pictures._mosaic(tiles, 1, -1.)
  assert found.shape == (5, 8)
  np.testing.assert_array_equal(found[3:5, 6:8], tiles[1, 2])
  assert (found[2] == -1).all() and (found[:, [2, 5]] == -1).all()
  assert (found == -1).sum() == 40 - 24


def test_pictures_are_written(tmp_path):
  """Also for images that are wider than high: 16x32 in patches of 8."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 255, (12, 16, 32, 3)).astype(np.uint8)
  weights = random_attention(tokens=9)
  names = [f'class {i}' for i in range(10)]
  pictures.predictions(image, np.arange(12) % 10, np.arange(12) // 2, names, tmp_path / 'a.png')
  pictures.rollouts(image[:4], np.stack([weights] * 4), True, tmp_path / 'b.png')
  pictures.position_similarity(rng.normal(size=(8, 8)), (16, 32), tmp_path / 'c.png')
  top = [{'class': n, 'probability': 1 / (i + 2)} for i, n in enumerate(names[:5])]
  pictures.prediction(image[0], analysis.rollout(weights), top, tmp_path / 'd.png', token=True)
  pictures.prediction(image[0], None, top, tmp_path / 'e.png', token=True)
  pictures.attention_distance(rng.uniform(0, 20, (30, 4)), 12., tmp_path / 'f.png')
  components, explained = analysis.principal_filters(rng.normal(size=(7, 7, 3, 12)))
  pictures.filters(components, explained, 'conv_root', tmp_path / 'g.png')
  for name in 'abcdefg':
    picture = cv2.imread(str(tmp_path / f'{name}.png'))
    assert picture is not None and picture.std() > 10, name
