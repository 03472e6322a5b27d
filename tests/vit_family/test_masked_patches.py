import fractions
import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import vit as vit_config
from core import keys
from core import task as task_lib
from core.config import UserError
from vit_family import patches


def task_of(target='mean_color', channels=3, **changes):
  config = vit_config.get_config('smoke')
  config.task = 'vit_family.masked_patches'
  config.model.update(dict(target=target, mask_rate=.5, num_classes=10))
  config.model.scan = False  # One layer: a loop would only be more to compile.
  config.data.channels = channels
  for key, value in changes.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  return task_lib.load(config)


def batch_of(rows=3, size=16, channels=3, seed=0):
  image = np.random.default_rng(seed).integers(0, 256, (rows, size, size, channels))
  return {'image': jnp.asarray(image, jnp.uint8), 'label': jnp.zeros(rows, jnp.int32),
          'mask': jnp.ones(rows)}


def shapes(task):
  return nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))


def random_params(task, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, .3, s.shape), jnp.float32), shapes(task))


def color_class(pixels):
  """The class of a patch `[h, w, channels]`, in exact fractions."""
  found = 0
  for channel in range(pixels.shape[-1]):
    mean = fractions.Fraction(int(pixels[..., channel].sum()), pixels[..., channel].size)
    found = found * 8 + min(int(mean / 255 * 8), 7)
  return found


def test_patches_are_cut_in_raster_order_and_put_together_again():
  images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  cut = patches.to_patches(jnp.asarray(images), 2)
  assert cut.shape == (2, 6, 2, 2, 3)
  np.testing.assert_array_equal(cut[1, 4], images[1, 2:4, 2:4])
  np.testing.assert_array_equal(patches.from_patches(cut, 4, 6), images)


def test_colors_are_binned_in_eighths():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (20, 8, 3)) * rng.integers(0, 2, (20, 1, 3))
  pixels[:4] = 0
  pixels[1] = 255
  # Sums on the edges of bins: 8 pixels of mean 255 k / 8 sum to 255 k; one less is a bin lower.
  pixels[2, 0], pixels[2, 1, 1:] = 255, 255
  pixels[3] = pixels[2]
  pixels[3, 0] = 254
  expected = [color_class(p[None]) for p in pixels]
  assert expected[:4] == [0, 511, 1 * 64 + 2 * 8 + 2, 0 * 64 + 1 * 8 + 1]
  found = patches.color_classes(jnp.asarray(pixels))
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_allclose(patches.class_colors(found, 3)[2], [1.5 / 8, 2.5 / 8, 2.5 / 8])
  np.testing.assert_array_equal(patches.color_classes(jnp.asarray(pixels[..., :1])),
                                [e // 64 for e in expected])


def test_shares_of_the_corruption():
  """Of 500 images: exactly half of the patches; of those 80, 10 and 10 in 100, within 4 sigma."""
  keys = jax.random.split(jax.random.key(0), 500)
  found = jax.jit(functools.partial(patches.draw_corruption, patches=64, rate=.5))(keys)
  chosen, masked, replaced, source = (
      np.asarray(x) for x in (found.chosen, found.masked, found.replaced, found.source))
  assert chosen.shape == (500, 32) and all(len(set(row)) == 32 for row in chosen)
  corrupted = np.zeros((500, 64), bool)
  np.put_along_axis(corrupted, chosen, True, 1)
  assert not (masked & replaced).any() and not ((masked | replaced) & ~corrupted).any()
  for share, kind in ((.8, masked), (.1, replaced)):
    assert abs(kind.sum() / 16_000 - share) < 4 * np.sqrt(share * (1 - share) / 16_000)
  # No place is preferred, for corruption or as a source; a patch is never its own.
  assert abs(corrupted.mean(0) - .5).max() < 4 * .5 / np.sqrt(500)
  assert (source != np.arange(64)).all()
  away = np.bincount(((source - np.arange(64)) % 64).ravel(), minlength=64)
  assert away[0] == 0 and abs(away[1:] / (32_000 / 63) - 1).max() < 4.5 / np.sqrt(32_000 / 63)


@pytest.mark.parametrize(
    'total, rate, count', [(49, .5, 24), (196, .15, 29), (4, .1, 1), (1, 1, 1)])
def test_number_of_corrupted_patches(total, rate, count):
  found = jax.eval_shape(lambda k: patches.draw_corruption(k, total, rate),
                         jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2)))
  assert found.chosen.shape == (2, count)


def test_parameters_are_those_of_the_classifier_but_for_the_head():
  mine = shapes(task_of())
  config = task_of().config
  config.task = 'vit_family.classification'
  theirs = shapes(task_lib.load(config))
  del theirs['head']
  extra = {name: mine.pop(name) for name in ('mask_token', 'patch_head')}
  assert jax.tree.map(lambda s: s.shape, mine) == jax.tree.map(lambda s: s.shape, theirs)
  assert extra['mask_token'].shape == (1, 1, 32)
  assert extra['patch_head']['kernel'].shape == (32, 512)
  assert 'cls' not in shapes(task_of(model__classifier='gap'))


def test_the_model_sees_only_what_it_may():
  """What a masked or replaced patch shows changes no prediction; what a kept one shows does."""
  task = task_of('mean_color', 1)
  params = random_params(task)
  images = np.random.default_rng(0).normal(size=(1, 16, 16, 1)).astype(np.float32)
  corruption = patches.Corruption(
      chosen=jnp.array([[3, 0, 1]]), masked=jnp.array([[True, False, False, False]]),
      replaced=jnp.array([[False, True, False, False]]), source=jnp.array([[1, 2, 3, 0]]))
  predict = jax.jit(lambda x: task.model.apply({'params': params}, x, corruption))
  plain = predict(images)
  assert plain.shape == (1, 3, 8) and plain.dtype == jnp.float32
  seen = []
  for patch in range(4):
    changed = images.copy()
    row, column = 8 * (patch // 2), 8 * (patch % 2)
    changed[:, row:row + 8, column:column + 8] += 1
    seen.append(not np.allclose(predict(changed), plain, atol=1e-6))
  assert seen == [False, False, True, True]

  # When tokens cannot see each other, a kept patch changes its own prediction alone: chosen[0].
  block = params['Transformer']['encoderblock_0']['MultiHeadDotProductAttention_0']
  block['out']['kernel'] = jnp.zeros_like(block['out']['kernel'])
  alone = jax.jit(lambda x: task.model.apply({'params': params}, x, corruption))
  changed = images.copy()
  changed[:, 8:, 8:] += 1
  difference = abs(alone(changed) - alone(images)).max(-1)[0]
  assert difference[0] > 1e-4
  np.testing.assert_allclose(difference[1:], 0, atol=1e-6)


@pytest.mark.parametrize('target, channels', [('mean_color', 3), ('downsampled', 3), ('l2', 1)])
def test_loss(target, channels):
  """ln 512 with the zero head of a fresh model; with random weights, that of numpy."""
  task = task_of(target, channels)
  params = random_params(task)
  batch = batch_of(channels=channels)
  rng = jax.random.key(5)
  zero = {**params, 'patch_head': jax.tree.map(jnp.zeros_like, params['patch_head'])}
  images = np.asarray(batch['image'], np.int64)
  pixels = np.stack([images[:, r:r + 8, c:c + 8] for r in (0, 8) for c in (0, 8)], 1)

  corruption = patches.draw_corruption(
      keys.example_keys(jax.random.split(rng)[0], batch['image']), 4, .5)

  loss = functools.partial(task.loss, train=False)
  wanted = jax.value_and_grad(loss, has_aux=True) if target == 'mean_color' else (
      lambda *args: (loss(*args), None))
  run = jax.jit(lambda params: (
      wanted(params, batch, rng),
      task.model.apply({'params': params}, batch['image'] / 127.5 - 1, corruption)))
  ((value, aux), grads), outputs = run(params)
  outputs = np.asarray(outputs, np.float64)
  each, right = [], []
  for row in range(3):
    for at, out in zip(np.asarray(corruption.chosen)[row], outputs[row]):
      patch = pixels[row, at]
      if target == 'l2':
        each.append(((out.reshape(patch.shape) - (patch / 127.5 - 1)) ** 2).mean())
        mean = np.clip(np.round((out.reshape(patch.shape) + 1) * 127.5), 0, 255)
        right.append(color_class(mean.astype(int)) == color_class(patch))
        continue
      cells = [patch] if target == 'mean_color' else [
          patch[r:r + 2, c:c + 2] for r in range(0, 8, 2) for c in range(0, 8, 2)]
      logits = out.reshape(len(cells), 512)
      truth = np.array([color_class(cell) for cell in cells])
      each.append((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(cells)), truth]).mean())
      right.append((logits.argmax(-1) == truth).mean())
  assert float(aux.weight) == 6
  np.testing.assert_allclose(value, np.mean(each), rtol=1e-4)
  np.testing.assert_allclose(aux.metrics['accuracy'], (np.sum(right), 6), rtol=1e-6)
  if target == 'mean_color':
    assert float(abs(grads['mask_token']).max()) > 1e-6
  if target != 'l2':
    np.testing.assert_allclose(run(zero)[0][0][0], np.log(512), rtol=1e-6)


def test_a_loss_does_not_depend_on_the_rest_of_the_batch():
  """Padding rows leave no trace, and evaluation in batches of another size is the same."""
  task = task_of('mean_color', 1)
  params = random_params(task)
  loss = jax.jit(functools.partial(task.loss, train=False))
  batch = {**batch_of(4, channels=1), 'mask': jnp.array([1., 0., 1., 0.])}
  kept = {k: v[::2] for k, v in batch.items()}
  value, aux = loss(params, batch, jax.random.key(0))
  expected, other = loss(params, kept, jax.random.key(0))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['accuracy'], other.metrics['accuracy'])
  assert float(aux.weight) == float(other.weight) == 4
  # Another rng, another mask.
  assert abs(float(loss(params, kept, jax.random.key(1))[0]) - float(expected)) > 1e-4


@pytest.mark.parametrize('change, match', [
    (dict(target='colour'), 'mean_color, downsampled, l2'),
    (dict(model__mask_rate=0.), 'mask_rate'),
    (dict(model__backbone='R50', model__patch_size=1, data__image_size=32), 'hybrid'),
    (dict(model__variant='R50x1'), 'variant, with masked patches,'),
    (dict(target='downsampled', model__patch_size=2), 'multiple of 4')])
def test_bad_configs(change, match):
  with pytest.raises(UserError, match=match):
    task_of(**change)


def test_predict_draws_the_answer(tmp_path):
  task = task_of('downsampled', 1)
  params = random_params(task)
  image = np.asarray(batch_of(1, channels=1)['image'][0])
  (tmp_path / 'one.png').write_bytes(cv2.imencode('.png', image)[1].tobytes())
  out = tmp_path / 'out'
  out.mkdir()
  record, = task.predict(params, tmp_path / 'one.png', out)
  assert record['picture'] == 'one.png' and 0 <= record['accuracy'] <= 1
  assert cv2.imread(str(out / 'one.png')).std() > 10

  rows = jax.device_get(jax.jit(task.fill)(params, {'image': jnp.asarray(image[None])}))
  np.testing.assert_array_equal(rows['image'][0], image)
  assert rows['masked'].shape == (1, 16, 16, 1)
  # Two of four patches are filled; the best answer has the class of the truth in each 2x2 cell.
  blocks = lambda x: x[0].reshape(2, 8, 2, 8).swapaxes(1, 2)
  same = (blocks(rows['best']) == blocks(image[None])).all((-2, -1))
  kept = (blocks(rows['filled']) == blocks(image[None])).all((-2, -1))
  assert same.sum() == 2 and (kept == same).all()
  np.testing.assert_array_equal(
      [color_class(rows['best'][0, r:r + 2, c:c + 2]) for r in range(0, 16, 2)
       for c in range(0, 16, 2)],
      [color_class(image[r:r + 2, c:c + 2]) for r in range(0, 16, 2) for c in range(0, 16, 2)])
  with pytest.raises(UserError, match='no such file'):
    task.predict(params, tmp_path / 'none.png', out)
