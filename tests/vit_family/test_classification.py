import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import vit as vit_config
from core import task as task_lib
from core.config import UserError


def png(image):
  return cv2.imencode('.png', image)[1].tobytes()


def task_of(arg='smoke', **changes):
  config = vit_config.get_config(arg)
  config.model.num_classes = config.model.num_classes or 10
  for key, value in changes.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  return task_lib.load(config)


def test_zero_head_gives_the_bias_and_the_known_losses():
  """Sheet section 15, check 2, through the task: ln C for softmax; C softplus(-10) + 10 for sigmoid."""
  for loss, bias, expected in (
      ('softmax', 0., np.log(10)), ('sigmoid', -10., 10 * np.log1p(np.exp(-10.)) + 10)):
    task = task_of(model__loss=loss, model__head_bias_init=bias)
    params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    batch = {name: jnp.ones(s.shape, s.dtype) for name, s in task.batch_spec(3).items()}
    np.testing.assert_allclose(jax.jit(task.logits)(params, batch), bias)
    value, aux = jax.jit(task.loss, static_argnums=3)(params, batch, jax.random.key(0), False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert float(aux.weight) == 3


def test_the_mask_leaves_rows_out():
  task = task_of()
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, .3, p.shape), jnp.float32),
                        nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
  batch = {'image': jnp.asarray(rng.integers(0, 255, (4, 16, 16, 1)), jnp.uint8),
           'label': jnp.array([1, 2, 3, 4], jnp.int32), 'mask': jnp.array([1., 0., 1., 0.])}
  loss = jax.jit(task.loss, static_argnums=3)
  value, aux = loss(params, batch, jax.random.key(0), False)
  kept = {k: v[::2] for k, v in batch.items()}
  expected, other = loss(params, kept, jax.random.key(0), False)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert float(aux.weight) == 2
  np.testing.assert_allclose(aux.metrics['accuracy'], other.metrics['accuracy'])


@pytest.mark.parametrize('crop', ['inception', 'affine', 'none'])
@pytest.mark.parametrize('eval_crop', ['resize', 'resize_small'])
def test_transform_shapes_and_determinism(crop, eval_crop):
  task = task_of(data__crop=crop, data__eval_crop=eval_crop, data__channels=3, data__flip=True)
  image = np.random.default_rng(0).integers(0, 255, (37, 51, 3)).astype(np.uint8)
  example = {'image': png(image), 'label': 3}
  for train in (True, False):
    made = [task.transform(example, np.random.default_rng(5), train) for _ in range(2)]
    assert made[0]['image'].shape == (16, 16, 3) and made[0]['image'].dtype == np.uint8
    assert made[0]['label'].dtype == np.int32 and made[0]['label'] == 3
    np.testing.assert_array_equal(made[0]['image'], made[1]['image'])


def test_evaluation_ignores_the_rng():
  task = task_of()
  example = {'image': png(np.arange(64, dtype=np.uint8).reshape(8, 8)), 'label': 0}
  a, b = (task.transform(example, np.random.default_rng(s), False)['image'] for s in (0, 1))
  np.testing.assert_array_equal(a, b)
  c, d = (task.transform(example, np.random.default_rng(s), True)['image'] for s in (0, 1))
  assert (c != d).any()


@pytest.mark.parametrize('change, match', [
    (dict(model__variant='XXL'), 'valid: Ti, S, B, L, H'), (dict(model__loss='hinge'), 'softmax'),
    (dict(model__classifier='cls'), 'token, gap'), (dict(data__crop='none of it'), 'inception'),
    (dict(data__image_size=20), 'not a multiple of config.model.patch_size=8')])
def test_bad_configs(change, match):
  with pytest.raises(UserError, match=match):
    task_of(**change)


def test_a_folder_of_ones_own(tmp_path):
  """configs/vit.py:b16,folder reads classes from the folder names."""
  rng = np.random.default_rng(0)
  for split in ('train', 'validation', 'test'):
    for name in ('cat', 'dog'):
      folder = tmp_path / split / name
      folder.mkdir(parents=True)
      for i in range(3):
        (folder / f'{i}.png').write_bytes(png(rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)))
  config = vit_config.get_config('ti16,folder')
  config.data.name = f'folder:{tmp_path}'
  task = task_lib.load(config)
  assert task.class_names == ['cat', 'dog'] and task.num_classes == 2
  assert len(task.dataset('train')) == 6 and len(task.dataset('test')) == 6
  made = task.transform(task.dataset('train')[5], np.random.default_rng(0), True)
  assert made['image'].shape == (224, 224, 3) and made['label'] == 1
