"""The task: batches, loss under accumulation, what is trained, and what is refused."""

import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import detr as configs
from core import partition, task as task_lib
from core.config import UserError
from core.data import images
from core.plan import make_plan
from detection import detr

_ROWS = 8


def _config(**model):
  config = configs.get_config('smoke')
  config.model.update(dict(width=16, heads=2, mlp_dim=16, encoder_layers=0, decoder_layers=1))
  config.model.update(model)
  return config


def _batch(task, rng, objects):
  spec = task.batch_spec(len(objects))
  shape = spec['image'].shape
  slots = spec['labels'].shape[1]
  batch = {
      'image': rng.integers(0, 256, shape, np.uint8),
      'image_size': np.full((len(objects), 2), shape[1], np.int32),
      'boxes': np.concatenate([rng.uniform(.3, .7, (len(objects), slots, 2)),
                               rng.uniform(.1, .5, (len(objects), slots, 2))], -1),
      'labels': rng.integers(0, 10, (len(objects), slots), np.int32),
      'objects': np.asarray(objects, np.int32), 'mask': np.ones(len(objects), np.float32)}
  if 'segments' in spec:
    batch['segments'] = rng.integers(0, 3, spec['segments'].shape, np.uint8)
  return {name: jnp.asarray(value, spec[name].dtype) for name, value in batch.items()}


def _one(devices=1):
  return jax.devices()[:devices]


@pytest.mark.slow
@pytest.mark.parametrize('objects', [(5, 0, 1, 2, 4, 0, 3, 1), (0,) * 8])
def test_microbatches_share_what_losses_are_divided_by(objects):
  """Reference: one batch. Microbatches 0, 2, 4, 6 and 1, 3, 5, 7 have 13 and 3 objects."""
  updated = []
  for accum in (1, 2):
    config = _config()
    config.accum, config.batch_size = accum, _ROWS
    config.optim.update(dict(name='sgd', lr=1.0, clip_norm=0., weight_decay=0.))
    config.optim.schedule.update(dict(name='constant', warmup='0 steps'))
    plan = make_plan(config, _one())
    state = plan.init(jax.random.key(0))
    batch = _batch(plan.task, np.random.default_rng(0), objects)
    state, metrics = plan.train_step(state, batch)
    updated.append((jax.device_get(state.params),
                    {k: v[0] / max(v[1], 1e-9) for k, v in jax.device_get(metrics).items()}))
  (whole, one), (parts, two) = updated
  chex.assert_trees_all_close(parts, whole, atol=2e-5)
  for name in ('loss', 'loss_ce', 'loss_bbox', 'loss_giou'):
    np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)


def test_rows_that_do_not_count_change_nothing():
  config = _config()
  task = task_lib.load(config)
  params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
  batch = _batch(task, np.random.default_rng(1), (3, 1, 2, 0))
  half = {name: value[:2] for name, value in batch.items()}
  masked = {**batch, 'mask': jnp.asarray([1, 1, 0, 0], jnp.float32)}
  loss = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(0), False))
  (one, aux), (two, expected) = loss(masked), loss(half)
  np.testing.assert_allclose(one, two, rtol=1e-5)
  for name, (total, weight) in expected.metrics.items():
    np.testing.assert_allclose(aux.metrics[name], (total, weight), rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_stage_two_trains_the_mask_head_alone():
  config = _config(masks='frozen')
  config.data.panoptic = True
  plan = make_plan(config, _one())
  state = plan.init(jax.random.key(0))
  before = jax.device_get(state.params)
  batch = _batch(plan.task, np.random.default_rng(0), (3,) * _ROWS)
  batch['labels'] = jnp.minimum(batch['labels'], 9)
  state, metrics = plan.train_step(state, batch)
  assert np.isfinite(jax.device_get(metrics['loss_mask'])).all()
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
  for path, moved in jax.tree_util.tree_leaves_with_path(changed):
    name = partition.path_name(path)
    assert moved == name.startswith(('mask_head/', 'bbox_attention/')), name
  # No moments of what is frozen.
  moments = sum(x.size for x in jax.tree.leaves(plan.state_shape.opt_state))
  head = sum(x.size for name in ('mask_head', 'bbox_attention')
             for x in jax.tree.leaves(before[name]))
  assert 2 * head <= moments < 2 * head + 10


@pytest.mark.parametrize('arg, trainable', [('r50,coco', 41_302_368), ('r101_dc5,coco', 60_242_272),
                                            ('r50,masks', 1_333_657)])
def test_trainable_parameters_of_the_paper(arg, trainable):
  """DETR R50: 41.3M (table 1), which leaves out stem, layer1 and batch norms."""
  plan = make_plan(configs.get_config(arg), _one())
  leaves = jax.tree_util.tree_leaves_with_path(plan.params_shape)
  assert trainable == sum(x.size for path, x in leaves
                          if not re.search(plan.task.frozen, partition.path_name(path)))


def test_training_views_are_drawn_and_evaluation_views_are_not(tmp_path):
  _coco(tmp_path, [3, 1])
  config = configs.get_config('r50,own')
  config.data.name = f'coco:{tmp_path}'
  config.data.splits.validation = 'train'
  task = task_lib.load(config)
  assert len(task.dataset('train')) == 2 * config.data.views and task.examples() == 2
  assert len(task.dataset('validation')) == 2
  element = task.transform(task.dataset('validation')[0], np.random.default_rng(0), False)
  # 40x60, the shorter side brought to 800.
  assert element['image_size'].tolist() == [800, 1200]
  np.testing.assert_allclose(element['boxes'][0], [8 / 60, 7 / 40, 12 / 60, 10 / 40], rtol=1e-5)
  assert element['objects'] == 3 and element['image'].shape in {(*b, 3) for b in
                                                                config.data.eval_buckets}


def _coco(path: pathlib.Path, objects: list[int]) -> None:
  (path / 'train' / 'images').mkdir(parents=True)
  listing = {'images': [], 'annotations': [], 'categories': [{'id': 7, 'name': 'cell'}]}
  for i, count in enumerate(objects):
    images.write(path / 'train' / 'images' / f'{i}.png', np.zeros((40, 60, 3), np.uint8))
    listing['images'].append({'id': i, 'file_name': f'{i}.png', 'height': 40, 'width': 60})
    for _ in range(count):
      listing['annotations'].append({
          'id': len(listing['annotations']), 'image_id': i, 'category_id': 7, 'iscrowd': 0,
          'bbox': [2, 2, 12, 10], 'area': 120})
  (path / 'train' / 'annotations.json').write_text(json.dumps(listing))


def test_more_objects_than_queries_is_refused_by_name_of_the_image(tmp_path):
  _coco(tmp_path, [1, 5])
  config = configs.get_config('r50,own')
  config.data.name, config.model.queries = f'coco:{tmp_path}', 4
  with pytest.raises(UserError, match=r'image 1 has 5 objects, more than config.model.queries=4'):
    make_plan(config, _one())


@pytest.mark.parametrize('key, value, message', [
    ('model.backbone', 'r51', "backbone: unknown name 'r51'; did you mean 'r50'"),
    ('model.masks', 'yes', 'masks: unknown name'),
    ('model.width', 30, 'multiple of 4'),
    ('model.decoder_layers', 0, 'at least 1'),
    ('data.labels', 'names', 'labels: unknown name'),
    ('data.name', 'coco2017', 'valid: digit_scenes, coco:PATH'),
    ('data.buckets', ((32, 32),), 'no bucket holds'),
    ('data.name', 'coco/2017_panoptic', 'does not go with config.data.panoptic=False')])
def test_bad_settings_are_refused(key, value, message):
  config = _config()
  section, name = key.split('.')
  config[section][name] = value
  with pytest.raises(UserError, match=message):
    task_lib.load(config).dataset('train')


def test_classes_are_coco_s_where_there_is_no_data():
  config = configs.get_config('r50,coco')
  config.data.data_dir = '/nowhere'
  task = task_lib.load(config)
  assert (len(task.class_names), task.class_names[1], task.class_ids[90]) == (91, 'person', 90)
  config.model.num_classes = 250
  assert task_lib.load(config).is_thing[187] is False


def test_detect_gives_the_best_real_class_even_where_no_object_is_likelier(monkeypatch):
  task = detr.Task(_config())
  logits = np.zeros((1, 1, 2, 11), np.float32)
  logits[..., -1] = 9
  logits[0, 0, 0, 3] = 2
  boxes = np.tile(np.float32([.5, .25, .2, .1]), (1, 1, 2, 1))
  monkeypatch.setattr(task, 'forward', lambda params, batch: {
      'logits': jnp.asarray(logits), 'boxes': jnp.asarray(boxes)})
  found = task.detect(None, None)
  assert found['labels'][0, 0] == 3
  np.testing.assert_allclose(found['boxes'][0, 0], [.4, .2, .6, .3], rtol=1e-6)
  np.testing.assert_allclose(found['scores'][0, 0],
                             np.exp(2) / (np.exp(9) + np.exp(2) + 9), rtol=1e-5)
