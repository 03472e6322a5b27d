"""The task: palette files, order, images, objectives, use."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import image_gpt
from core import task as task_lib
from core.config import UserError
from core.data import images
from generative import palette


def task_of(workdir=None, **changes):
  config = image_gpt.get_config('smoke')
  for name, value in changes.items():
    config.update_from_flattened_dict({name.replace('__', '.'): value})
  return task_lib.load(config, workdir)


def batch_of(task, batch=4, seed=0):
  rng = np.random.default_rng(seed)
  model, length = task.config.model, task.config.data.image_size ** 2
  return {'tokens': jnp.asarray(rng.integers(0, model.colors, (batch, length)), jnp.int32),
          'label': jnp.asarray(rng.integers(0, 10, batch), jnp.int32), 'mask': jnp.ones(batch)}


def params_of(task, seed=0):
  shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(.3 * rng.normal(size=x.shape), jnp.float32), shapes)


# --- Palette -------------------------------------------------------------------------------------


def test_grey_data_gets_even_levels_and_keeps_its_file(tmp_path):
  task = task_of(tmp_path)
  task.prepare()
  written = np.load(tmp_path / 'palette.npy')
  np.testing.assert_allclose(written[:, 0], np.linspace(-1, 1, 16), atol=1e-6)
  # What is there is kept, and used.
  np.save(tmp_path / 'palette.npy', written[::-1])
  task = task_of(tmp_path)
  task.prepare()
  np.testing.assert_array_equal(task.palette.centers, written[::-1])


def test_colours_are_fitted_to_the_training_images(tmp_path):
  task = task_of(tmp_path, data__channels=3)
  task.prepare()
  fitted = np.load(tmp_path / 'palette.npy')
  assert fitted.shape == (16, 3)
  # The digits are grey, and so is every colour of theirs.
  np.testing.assert_allclose(fitted, fitted[:, :1].repeat(3, 1), atol=1e-5)
  assert (np.diff(fitted[:, 0]) > 0).all()


def test_a_named_palette_is_copied_and_must_stay_the_same(tmp_path):
  colors = palette.Palette(np.linspace(-1, .5, 16)[:, None])
  colors.save(tmp_path / 'mine.npy')
  run = tmp_path / 'run'
  run.mkdir()
  task = task_of(run, data__palette=str(tmp_path / 'mine.npy'))
  task.prepare()
  np.testing.assert_array_equal(np.load(run / 'palette.npy'), colors.centers)
  palette.grey_levels(16).save(tmp_path / 'mine.npy')
  with pytest.raises(UserError, match='another palette'):
    task.prepare()


def test_the_palette_comes_with_the_weights(tmp_path):
  before, after = tmp_path / 'before', tmp_path / 'after'
  before.mkdir(), after.mkdir()
  colors = palette.Palette(np.linspace(-1, .5, 16)[:, None])
  colors.save(before / 'palette.npy')
  task_of(after, init_from=str(before)).prepare()
  np.testing.assert_array_equal(np.load(after / 'palette.npy'), colors.centers)


def test_weights_without_a_palette_ask_for_it(tmp_path):
  (tmp_path / 'weights').mkdir()
  task = task_of(tmp_path, data__channels=3, init_from=str(tmp_path / 'weights' / 'igpt.npz'))
  with pytest.raises(UserError, match='kmeans_centers.npy'):
    task.prepare()


def test_no_palette_yet_says_how_to_make_one():
  with pytest.raises(UserError, match='--mode=prepare'):
    task_of(data__channels=3).palette  # pylint: disable=expression-not-assigned


# --- Order and images ----------------------------------------------------------------------------


def test_snake_order_turns_at_every_row():
  task = task_of(data__order='snake')
  assert list(task.order[:18]) == [*range(8), *range(15, 7, -1), 16, 17]


@pytest.mark.parametrize('order', ['raster', 'snake'])
def test_tokens_and_back(order):
  task = task_of(data__order=order)
  image = np.random.default_rng(0).integers(0, 16, (8, 8, 1)).astype(np.uint8) * 17
  tokens = task.tokens(image)
  np.testing.assert_array_equal(task.image(tokens), image)
  np.testing.assert_array_equal(task.image(np.stack([tokens] * 2))[1], image)
  # Either way the first half of the sequence is the upper half of the image.
  np.testing.assert_array_equal(np.sort(tokens[:32]), np.sort(image[:4].ravel() // 17))


def test_the_imagenet_evaluation_crop_is_the_middle_of_224():
  task = task_of(data__image_size=32, data__channels=3, data__eval_crop='imagenet')
  image = np.zeros((448, 672, 3), np.uint8)
  image[:, 112:560] = 200  # 224 of 336 columns after the resize
  out = task.eval_image(image)
  assert out.shape == (32, 32, 3) and out.min() == 200
  assert task_of(data__image_size=32, data__channels=3).eval_image(image).min() == 200


def test_cifar_crops_are_windows_of_the_mirrored_border():
  task = task_of(data__image_size=8, data__crop='cifar')
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode='reflect')
  mirrored = np.pad(image[:, ::-1], ((4, 4), (4, 4), (0, 0)), mode='reflect')
  windows = [x[i:i + 8, j:j + 8] for x in (padded, mirrored) for i in range(9) for j in range(9)]
  seen = set()
  for seed in range(60):
    got = task._train_image(image, np.random.default_rng(seed))
    at = [i for i, window in enumerate(windows) if np.array_equal(window, got)]
    assert len(at) >= 1
    seen.add(at[0])
  assert len(seen) > 30 and min(seen) < 81 <= max(seen)


def test_imagenet_crops_have_the_size_of_the_model():
  task = task_of(data__image_size=32, data__channels=3, data__crop='imagenet')
  image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
  out = [task._train_image(image, np.random.default_rng(seed)) for seed in (0, 1)]
  assert out[0].shape == (32, 32, 3) and not np.array_equal(*out)


# --- Objectives ----------------------------------------------------------------------------------


def nats(logits, tokens):
  logits = np.asarray(logits, np.float64)
  return (np.log(np.exp(logits).sum(-1))
          - np.take_along_axis(logits, np.asarray(tokens)[..., None], -1)[..., 0])


def test_the_joint_loss_is_the_weighted_sum():
  task = task_of(model__gen_weight=.5, model__clf_weight=2.)
  params, batch = params_of(task), batch_of(task)
  batch['mask'] = jnp.asarray([1., 1., 0., 1.])
  loss, aux = jax.jit(task.loss, static_argnums=3)(params, batch, jax.random.key(0), True)
  made = jax.jit(task.model.apply)({'params': params}, batch['tokens'])
  real = [0, 1, 3]
  generative = nats(made['logits'], batch['tokens'])[real].mean()
  classes = nats(made['class_logits'], batch['label'])[real].mean()
  np.testing.assert_allclose(loss, .5 * generative + 2 * classes, rtol=1e-5)
  total, weight = aux.metrics['bits_per_dim']
  np.testing.assert_allclose(total / weight, generative / math.log(2), rtol=1e-5)
  right = (np.asarray(made['class_logits']).argmax(-1) == batch['label'])[jnp.asarray(real)]
  assert aux.metrics['accuracy'] == (right.sum(), 3)


def test_bert_predicts_hidden_pixels_alone():
  task = task_of(model__objective='bert', model__clf_weight=0.)
  params, batch = params_of(task), batch_of(task)
  rng = jax.random.key(3)
  made, hidden = task.apply(params, batch['tokens'], rng)
  each = nats(made['logits'], batch['tokens']) * hidden
  want = (each.sum(1) / np.asarray(hidden).sum(1)).mean()
  np.testing.assert_allclose(task.loss(params, batch, rng, True)[0], want, rtol=1e-5)
  # Another step hides others.
  assert (task.apply(params, batch['tokens'], jax.random.key(4))[1] != hidden).any()


def test_bert_hides_15_percent_whatever_the_batch():
  task = task_of(model__objective='bert', model__clf_weight=0.)
  params, batch = params_of(task), batch_of(task, 200)
  draw = jax.jit(lambda tokens: task.apply(params, tokens, jax.random.key(0))[1])
  hidden = np.asarray(draw(batch['tokens']))
  assert abs(hidden.mean() - .15) < .01
  again = np.asarray(draw(batch['tokens'][50:60]))
  np.testing.assert_array_equal(again, hidden[50:60])


def test_features_have_a_row_a_layer_and_masks_of_their_own():
  task = task_of(model__objective='bert', model__clf_weight=0.)
  params, batch = params_of(task), batch_of(task)
  one, two = (np.asarray(task.features(params, batch['tokens'], draw)) for draw in (0, 1))
  assert one.shape == (4, 3, 16) and not np.allclose(one, two)
  np.testing.assert_array_equal(one, task.features(params, batch['tokens'], 0))


@pytest.mark.parametrize('change, words', [
    (dict(model__variant='XXL'), 'did you mean'), (dict(model__objective='gpt'), 'ar, bert'),
    (dict(data__order='spiral'), 'raster, snake'), (dict(data__channels=4), '1 or 3'),
    (dict(model__colors=1), 'at least 2'), (dict(model__mask_rate=1.), 'between 0 and 1'),
    (dict(model__gen_weight=0., model__clf_weight=0.), 'not both'),
    (dict(model__head_layers=(5,)), 'mu has 0 to 2'),
    (dict(model__sample__rows=8), 'nothing to complete')])
def test_bad_configs(change, words):
  with pytest.raises(UserError, match=words):
    task_of(**change)


# --- Use -----------------------------------------------------------------------------------------


def test_predict_completes_images_of_any_size(tmp_path, caplog):
  task = task_of(tmp_path)
  task.prepare()
  folder = tmp_path / 'images'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for name, shape in (('a', (8, 8, 1)), ('b', (40, 20, 1)), ('c', (16, 16, 3))):
    images.write(folder / f'{name}.png', rng.integers(0, 256, shape).astype(np.uint8))
  with caplog.at_level('WARNING'):
    records = task.predict(params_of(task), folder, tmp_path)
  assert caplog.text.count('are resized') == 1 and 'b.png of 40x20' in caplog.text
  assert [len(record['completions']) for record in records] == [4, 4, 4]
  assert len(records[0]['top5']) == 5
  original = images.read(folder / 'a.png', 1)
  for name in records[0]['completions']:
    completed = images.read(tmp_path / name, 1)
    assert completed.shape == (8, 8, 1)
    # The upper half is the image's, in the palette's colours.
    np.testing.assert_array_equal(completed[:4], task.image(task.tokens(original))[:4])
  assert (tmp_path / 'a.png').stat().st_size > 5000
  json.dumps(records)


def test_bert_completes_nothing(tmp_path):
  with pytest.raises(UserError, match='completes images'):
    task_of(model__objective='bert').predict(None, tmp_path, tmp_path)
