import json
import types

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn

from core.config import UserError
from core.data import images
from detection import attention_pictures, detector, pictures, predict

HEIGHT, WIDTH = 30, 60  # Of the image, which the model sees at 20x40 in a bucket of 24x48.


def task_of(**model):
  """A task without weights: 16 pixels to a cell, and a class 1 that is no category."""
  config = ml_collections.ConfigDict(dict(
      data=dict(eval_short=20, longest=100, eval_buckets=((48, 48), (32, 32), (24, 48))),
      eval=dict(threshold=.7, mask_threshold=.85, nms=0.)))
  return types.SimpleNamespace(
      config=config, model=detector.DETR(4, stages=(1, 1, 1), **model),
      class_names=['cat', '', 'dog', 'sky'], class_ids=[7, -1, 9, 12],
      is_thing=[True, False, True, False])


# Of queries: relative boxes, scores and labels.
BOXES = np.float32([[.25, .5, .75, 1.], [0, 0, 1, 1], [.1, .2, .3, .6], [-.1, .5, .55, 1.2]])
SCORES, LABELS = np.float32([.65, .99, .123456, .9]), np.int32([0, 1, 0, 2])


def fake_look(batches, **more):
  """Says the same of every image, whose shapes it notes."""
  def look(task, params, batch):
    batches.append(batch['image'].shape)
    cells = tuple(-(-n // predict.stride(task.model)) for n in batch['image'].shape[1:3])
    seen = {'boxes': BOXES, 'scores': SCORES, 'labels': LABELS,
            'decoder': np.arange(4.)[:, None, None] * np.ones(cells),
            'encoder': np.arange(np.prod(cells) ** 2.).reshape(cells * 2), **more}
    return {key: jnp.asarray(x)[None] for key, x in seen.items()}
  return look


def write(path, height=HEIGHT, width=WIDTH, seed=0):
  image = np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)
  images.write(path, image)
  return image


def run(task, inputs, tmp_path):
  out = tmp_path / 'out'
  out.mkdir(exist_ok=True)
  return predict.predict(task, {}, inputs, out), out


def read(path):
  picture = cv2.imread(str(path))
  assert picture is not None and path.read_bytes().startswith(b'\x89PNG')
  return picture


def test_boxes_come_out_in_pixels_of_the_file(tmp_path, monkeypatch):
  """Resized by two thirds and padded; the relative boxes are of the image without its padding."""
  shapes, drawn = [], {}
  monkeypatch.setattr(predict, 'look', fake_look(shapes))
  for name in ('encoder_attention', 'decoder_attention', 'detections'):
    module = pictures if name == 'detections' else attention_pictures
    draw = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, name=name, draw=draw:
                        drawn.update({name: args}) or draw(*args))
  image = write(tmp_path / 'a.png')
  (record,), out = run(task_of(), tmp_path / 'a.png', tmp_path)
  assert shapes == [(1, 24, 48, 3)]

  results = json.loads((out / 'detections.json').read_text())
  assert results == [
      {'image_id': 1, 'category_id': 7, 'bbox': [15., 15., 30., 15.], 'score': .65},
      {'image_id': 1, 'category_id': 7, 'bbox': [6., 6., 12., 12.], 'score': .12346},
      {'image_id': 1, 'category_id': 9, 'bbox': [-6., 15., 39., 21.], 'score': .9}]
  assert record['objects'] == [
      {'label': 'dog', 'category_id': 9, 'score': .9, 'box': [0., 15., 33., 30.]}]
  assert record['input'] == str(tmp_path / 'a.png') and 'segments' not in record
  assert record['pictures'] == ['a_boxes.png', 'a_attention_encoder.png',
                                'a_attention_decoder.png']
  json.dumps(record)
  for name in record['pictures']:
    height, width, _ = read(out / name).shape
    assert 150 < height < 1500 and 150 < width < 1500, name
  assert not (out / 'panoptic.json').exists()

  # The file's own pixels under the boxes, the model's under the attention.
  np.testing.assert_array_equal(drawn['detections'][0], image)
  np.testing.assert_allclose(drawn['detections'][1], [[-6, 15, 33, 36]], atol=1e-5)
  shown, maps, points, stride, _ = drawn['encoder_attention']
  assert shown.shape == (20, 40, 3) and maps.shape == (2, 3, 2, 3) and stride == 16
  np.testing.assert_allclose(points, [(.85 * 20, .225 * 40)], atol=1e-5)
  np.testing.assert_allclose(drawn['decoder_attention'][1], [[-4, 10, 22, 24]], atol=1e-5)
  np.testing.assert_array_equal(drawn['decoder_attention'][4], np.full((1, 2, 3), 3.))


def test_rows_are_padded_to_the_smallest_bucket(tmp_path):
  task = task_of()
  image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
  row = predict._row(tmp_path, image, task.config.data)
  assert row['image'].shape == (24, 48, 3) and row['image_size'].tolist() == [20, 40]
  assert (row['image'][:20, :40] == 200).all()
  assert not row['image'][20:].any() and not row['image'][:, 40:].any()
  # The side of 100 alone would be 30 by 100: too long for 48.
  tall = predict._row(tmp_path, np.zeros((29, 20, 3), np.uint8), task.config.data)
  assert tall['image'].shape == (32, 32, 3) and tall['image_size'].tolist() == [29, 20]


def test_segments_are_numbered_from_one_and_zero_is_nobodys(tmp_path, monkeypatch):
  """Query 0 (a cat) is sure of the left, query 3 (sky) of the right; 1 is no category, 2 unsure."""
  masks = np.full((4, 6, 12), -9., np.float32)
  masks[0, :, :5], masks[3, :, 5:] = 9, 9
  masks[1:3] = 20
  more = {'masks': masks, 'scores': np.float32([.95, .99, .8, .9]),
          'labels': np.int32([0, 1, 0, 3])}
  monkeypatch.setattr(predict, 'look', fake_look([], **more))
  write(tmp_path / 'a.png')
  (record,), out = run(task_of(), tmp_path / 'a.png', tmp_path)
  assert record['pictures'][3:] == ['a_panoptic.png', 'a_panoptic_ids.png']
  read(out / 'a_panoptic.png')
  ids = read(out / 'a_panoptic_ids.png').astype(int) @ [65536, 256, 1]  # OpenCV's are blue first.
  # Of the 48 columns with padding 40 are the image, and of these 20 the cat's: half the picture.
  want = np.where(np.arange(WIDTH) < WIDTH / 2, 1, 2)
  assert ids.shape == (HEIGHT, WIDTH) and (ids == want).all()
  assert record['segments'] == [
      {'id': 1, 'label': 'cat', 'category_id': 7, 'isthing': True, 'area': 900, 'score': .95},
      {'id': 2, 'label': 'sky', 'category_id': 12, 'isthing': False, 'area': 900, 'score': .9}]
  assert json.loads((out / 'panoptic.json').read_text()) == {'annotations': [{
      'image_id': 1, 'file_name': 'a_panoptic_ids.png', 'segments_info': [
          {'id': 1, 'category_id': 7}, {'id': 2, 'category_id': 12}]}]}
  json.dumps(record)


def test_nothing_found(tmp_path, monkeypatch):
  """Pictures all the same, of a grid of points, and every pixel nobody's."""
  points = []
  draw = attention_pictures.encoder_attention
  monkeypatch.setattr(attention_pictures, 'encoder_attention',
                      lambda *args: points.extend(args[2]) or draw(*args))
  monkeypatch.setattr(predict, 'look', fake_look(
      [], scores=np.full(4, .1, np.float32), masks=np.zeros((4, 6, 12), np.float32)))
  write(tmp_path / 'a.png')
  (record,), out = run(task_of(), tmp_path / 'a.png', tmp_path)
  assert record['objects'] == [] and record['segments'] == []
  assert sorted(points) == [(5, 10), (5, 30), (15, 10), (15, 30)]
  assert len(record['pictures']) == 5 and all(read(out / name).size for name in record['pictures'])
  assert not read(out / 'a_panoptic_ids.png').any()
  assert json.loads((out / 'panoptic.json').read_text())['annotations'][0]['segments_info'] == []


def test_a_folder_with_names_that_collide(tmp_path, monkeypatch):
  shapes = []
  monkeypatch.setattr(predict, 'look', fake_look(shapes))
  folder = tmp_path / 'in'
  folder.mkdir()
  write(folder / 'a.png')
  (folder / 'a.jpg').write_bytes(cv2.imencode('.jpg', np.zeros((60, 30, 3), np.uint8))[1].tobytes())
  write(folder / 'b.png', seed=1)
  records, out = run(task_of(), folder, tmp_path)
  left = [name for record in records for name in record['pictures']]
  assert left[::3] == ['a.jpg_boxes.png', 'a.png_boxes.png', 'b.png_boxes.png']
  assert sorted(p.name for p in out.iterdir()) == sorted([*left, 'detections.json'])
  # The upright image is of another bucket; each is compiled once.
  assert shapes == [(1, 48, 48, 3), (1, 24, 48, 3)]
  ids = [result['image_id'] for result in json.loads((out / 'detections.json').read_text())]
  assert ids == [1] * 3 + [2] * 3 + [3] * 3


def test_duplicates_are_dropped_where_evaluation_drops_them(tmp_path, monkeypatch):
  monkeypatch.setattr(predict, 'look', fake_look(
      [], boxes=np.tile(BOXES[:1], (4, 1)), scores=np.float32([.8, .9, .95, .75]),
      labels=np.int32([0, 0, 2, 2])))
  write(tmp_path / 'a.png')
  task = task_of()
  for overlap, scores in ((0., [.95, .9, .8, .75]), (.7, [.95, .9])):
    task.config.eval.nms = overlap
    (record,), _ = run(task, tmp_path / 'a.png', tmp_path)
    assert [found['score'] for found in record['objects']] == scores


def test_what_cannot_be_predicted(tmp_path, monkeypatch):
  monkeypatch.setattr(predict, 'look', fake_look([]))
  write(tmp_path / 'long.png', 20, 60)
  with pytest.raises(UserError, match=r'long\.png: 20x60 .*config.data.eval_buckets is 48x48'):
    run(task_of(), tmp_path / 'long.png', tmp_path)
  (tmp_path / 'a.png').write_text('no image')
  with pytest.raises(UserError, match=r'a\.png: not a JPEG'):
    run(task_of(), tmp_path / 'a.png', tmp_path)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='no images in this folder'):
    run(task_of(), tmp_path / 'empty', tmp_path)


def test_points_are_the_best_objects_of_different_cells():
  centres = np.array([[5., 5], [6, 7], [-3, 5], [5, 20], [30, 9], [30, 30], [17, 17]])
  assert predict._points(centres, (32, 40, 3), 16) == [(5, 5), (5, 20), (30, 9), (30, 30)]
  assert predict._points(centres[:2], (32, 40, 3), 16) == [(5, 5)]


def small_model(scan):
  return detector.DETR(3, 5, 16, stages=(1,), channels=4, backbone_norm='group', freeze_at=0,
                       encoder_layers=2, decoder_layers=2, heads=2, mlp_dim=16, scan=scan)


class Recorder:
  """A model that keeps what it returned."""

  def __init__(self, model):
    self._model, self.stages, self.dilation = model, model.stages, model.dilation

  def apply(self, *args, **kwargs):
    self.returned = self._model.apply(*args, **kwargs)
    return self.returned


def test_look_gives_the_attention_of_the_last_layer():
  """A real model on an image of 16x16 in 24x16, so 6x4 cells of which 4x4 are no padding:
  distributions over these, of the layer that comes last, and boxes and scores as it gives them."""
  model = Recorder(small_model(scan=True))
  rng = np.random.default_rng(0)
  batch = {'image': rng.integers(0, 255, (1, 24, 16, 3)).astype(np.uint8),
           'image_size': np.array([[16, 16]], np.int32)}
  shapes = nn.unbox(jax.eval_shape(
      lambda: model._model.init(jax.random.key(0), **rename(batch))['params']))
  params = jax.tree.map(lambda x: rng.normal(0, .3, x.shape).astype(np.float32), shapes)
  params['class_embed']['bias'][-1] = 9.  # 'No object' is likeliest, and no answer.

  def look(params):
    return predict.look(types.SimpleNamespace(model=model), params, batch), model.returned

  seen, (outputs, sown) = jax.device_get(jax.jit(look)(params))
  assert set(seen) == {'boxes', 'scores', 'labels', 'decoder', 'encoder'}
  assert seen['decoder'].shape == (1, 5, 6, 4) and seen['encoder'].shape == (1, 6, 4, 6, 4)
  for weights in (seen['decoder'], seen['encoder']):
    np.testing.assert_allclose(weights.sum((-2, -1)), 1., rtol=1e-5)
    assert not weights[..., 4:, :].any() and weights[..., :4, :].min() > 0

  for side, name in (('encoder', 'self_attn'), ('decoder', 'cross_attn')):
    weights = sown['intermediates']['transformer'][side]['layers'][name]['attention'][0]
    assert weights.shape[:3] == (2, 1, 2)  # Layers, images, heads.
    np.testing.assert_allclose(seen[side].reshape(weights[1, :, 0].shape),
                               weights[1].mean(1), rtol=1e-5)
    assert abs(weights[0] - weights[1]).max() > 1e-4

  logits = np.asarray(outputs['logits'][-1], np.float64)
  probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(seen['scores'], probabilities[..., :3].max(-1), rtol=1e-5)
  np.testing.assert_array_equal(seen['labels'], probabilities[..., :3].argmax(-1))
  x, y, w, h = np.moveaxis(outputs['boxes'][-1], -1, 0)
  np.testing.assert_allclose(
      seen['boxes'], np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1), atol=1e-6)


def rename(batch):
  return {'images': batch['image'], 'image_size': batch['image_size']}


def test_the_last_layer_of_an_unrolled_model():
  layers = {f'layers_{i}': {'cross_attn': {'attention': (i * np.ones((1, 2, 3, 4)),)}}
            for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}
  assert (predict._last(layers, 'cross_attn') == 11).all()
  model = small_model(scan=False)
  batch = {'image': jax.ShapeDtypeStruct((1, 24, 16, 3), np.uint8),
           'image_size': jax.ShapeDtypeStruct((1, 2), np.int32)}

  def look(batch):
    params = nn.unbox(model.init(jax.random.key(0), **rename(batch))['params'])
    return predict.look(types.SimpleNamespace(model=model), params, batch)

  seen = jax.eval_shape(look, batch)
  assert seen['decoder'].shape == (1, 5, 6, 4) and seen['encoder'].shape == (1, 6, 4, 6, 4)


def test_a_model_without_an_encoder_has_no_picture_of_it(tmp_path, monkeypatch):
  look = fake_look([])
  monkeypatch.setattr(predict, 'look', lambda *args: {
      key: x for key, x in look(*args).items() if key != 'encoder'})
  write(tmp_path / 'a.png')
  (record,), out = run(task_of(), tmp_path / 'a.png', tmp_path)
  assert record['pictures'] == ['a_boxes.png', 'a_attention_decoder.png']
  assert not (out / 'a_attention_encoder.png').exists()


def test_strides():
  assert [predict.stride(detector.DETR(4, dilation=dilation)) for dilation in (False, True)] == [
      32, 16]
