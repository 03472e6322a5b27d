import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from configs import vit as vit_config
from core import task as task_lib
from core.config import UserError
from vit_family import classification


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
  """ln C for softmax; C softplus(-10) + 10 for sigmoid."""
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


@pytest.mark.parametrize('crop', ['inception', 'affine', 'random', 'none'])
@pytest.mark.parametrize('eval_crop', ['resize', 'resize_small'])
def test_transform_shapes_and_determinism(crop, eval_crop):
  task = task_of(data__crop=crop, data__eval_crop=eval_crop, data__channels=3, data__flip=True,
                 data__resize=20, data__randaugment_layers=2, data__randaugment_magnitude=15)
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
    (dict(data__image_size=20), 'not a multiple of config.model.patch_size=8'),
    (dict(data__crop='random', data__resize=10), 'at least as large'),
    (dict(data__vtab='dmlabs'), "did you mean 'dmlab'"), (dict(model__mixup=-1.), 'alpha')])
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


def test_mixup_blends_neighbours_and_their_labels():
  images = jnp.arange(4.)[:, None, None, None] * jnp.ones((4, 2, 2, 1))
  targets = jax.nn.one_hot(jnp.arange(4), 4)
  mixed, labels = classification.mixup(images, targets, jax.random.key(1), .5)
  share = float(labels[1, 1])
  assert .5 <= share < 1
  np.testing.assert_allclose(labels, share * np.eye(4) + (1 - share) * np.eye(4)[[3, 0, 1, 2]],
                             rtol=1e-6)
  np.testing.assert_allclose(mixed[:, 0, 0, 0], share * np.arange(4) + (1 - share) * np.array(
      [3, 0, 1, 2]), rtol=1e-6)


def test_mixup_draws_from_the_beta_distribution():
  """max(a, 1 - a) with a ~ Beta(.2, .2) against scipy."""
  keys = jax.random.split(jax.random.key(0), 2000)
  shares = jax.vmap(lambda k: classification.mixup(
      jnp.ones((2, 1, 1, 1)), jnp.eye(2), k, .2)[1][0, 0])(keys)
  law = scipy.stats.beta(.2, .2)
  folded = lambda x: law.cdf(x) - law.cdf(1 - x)
  assert scipy.stats.kstest(np.asarray(shares, np.float64), folded).pvalue > 1e-3


def test_mixup_is_for_training_alone():
  task = task_of(model__mixup=1., model__loss='sigmoid')
  params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  rng = np.random.default_rng(0)
  batch = {'image': jnp.asarray(rng.integers(0, 255, (4, 16, 16, 1)), jnp.uint8),
           'label': jnp.arange(4, dtype=jnp.int32), 'mask': jnp.ones(4)}
  loss = jax.jit(task.loss, static_argnums=3)
  value = lambda key, train: float(loss(params, batch, jax.random.key(key), train)[0])
  assert value(0, False) == value(1, False)
  assert value(0, True) != value(1, True)


def test_top_5_counts_ties_against_the_model():
  logits = jnp.array([[6., 5, 4, 3, 2, 1, 0], [0., 0, 0, 0, 0, 0, 0], [9., 5, 4, 3, 2, 2, 1]])
  np.testing.assert_array_equal(
      classification.in_top(logits, jnp.array([4, 0, 5]), 5), [True, False, False])
  np.testing.assert_array_equal(
      classification.in_top(logits, jnp.array([5, 0, 0]), 5), [False, False, True])


def test_only_some_classes(tmp_path):
  for name in 'abc':
    for split in ('train', 'test'):
      (tmp_path / split / name).mkdir(parents=True)
      for i in range(2):
        (tmp_path / split / name / f'{i}.png').write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
  config = vit_config.get_config('ti16,folder')
  config.data.update(dict(name=f'folder:{tmp_path}', classes=(2, 0)))
  task = task_lib.load(config)
  assert task.class_names == ['c', 'a'] and task.num_classes == 2
  source = task.dataset('train')
  assert [source[i]['label'] for i in range(len(source))] == [1, 1, 0, 0]
  config.data.classes = (0, 3)
  with pytest.raises(UserError, match='from 0 to 2'):
    task_lib.load(config).dataset('train')


@pytest.mark.parametrize('arg, expected', [
    # ViT table 3 and 4, BiT-HyperRule, AugReg section 3.
    ('b16,imagenet2012', ('adamw', 3e-3, .3, 'cosine', '300 epochs', 224, .1)),
    ('l16,imagenet21k', ('adamw', 1e-3, .03, 'linear', '90 epochs', 224, .1)),
    ('h14,jft', ('adamw', 3e-4, .1, 'linear', '14 epochs', 224, 0.)),
    ('r50_l32,jft', ('adamw', 2e-4, .1, 'linear', '7 epochs', 224, 0.)),
    ('r152x2,jft', ('adamw', 6e-4, .1, 'linear', '7 epochs', 224, 0.)),
    ('s16,imagenet21k,augreg', ('adamw', 1e-3, .1, 'cosine', '300 epochs', 224, 0.)),
    ('b16,cifar10', ('sgd', .01, 0., 'cosine', '10000 steps', 384, 0.)),
    ('l16,pets', ('sgd', .01, 0., 'cosine', '500 steps', 384, .1)),
    ('h14,imagenet2012,finetune512', ('sgd', .03, 0., 'cosine', '20000 steps', 518, .1)),
    ('b16,vtab_kitti_distance', ('sgd', .01, 0., 'cosine', '2500 steps', 384, 0.)),
    ('r50x1,cifar100', ('sgd', .003, 0., 'step', '10000 steps', 128, 0.)),
    ('r101x1,flowers', ('sgd', .003, 0., 'step', '500 steps', 480, 0.))])
def test_recipes(arg, expected):
  config = vit_config.get_config(arg)
  optim = config.optim
  assert (optim.name, optim.lr, optim.weight_decay, optim.schedule.name, config.steps,
          config.data.image_size, config.model.dropout_rate) == expected


def test_recipes_that_do_not_exist_say_what_does():
  for arg, match in (('b16', 'write MODEL,DATASET'), ('b61,cifar10', 'did you mean .b16'),
                     ('b16,cifar11', 'did you mean .cifar10'), ('b16,cifar10,tune', 'finetune'),
                     ('b16,jft,finetune', 'nobody fine-tunes'), ('hunger,vit,2', 'PERCENT')):
    with pytest.raises(UserError, match=match):
      vit_config.get_config(arg)


def test_every_recipe_for_its_models_makes_a_task():
  for model in ('ti16', 'h14', 'r50_b16', 'r50x1'):
    for data in vit_config.DATASETS:
      for recipe in ('pretrain', 'augreg_light2', 'finetune', 'finetune512'):
        if recipe.startswith('fine') and data in ('jft', 'imagenet21k'):
          continue
        task_lib.load(vit_config.get_config(f'{model},{data},{recipe}'))
  with pytest.raises(UserError, match='augreg_strong2'):
    vit_config.get_config('h14,imagenet2012,augreg')
