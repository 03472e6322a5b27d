"""Mode predict of a detector: what is on a user's images, and where it looked for it."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.config import UserError
from core.data import images
from detection import (
    attention_pictures, augment, average_precision, boxes, panoptic, pictures, transformer)

_POINTS = 4  # Whose attention is drawn.


def predict(task: Any, params, inputs: pathlib.Path, out: pathlib.Path) -> list[dict[str, Any]]:
  """Finds the objects of each image at `inputs`, a file or a folder.

  Leaves in `out`, for every image, NAME_boxes.png, NAME_attention_encoder.png (of a model that has
  an encoder) and NAME_attention_decoder.png; with the mask head NAME_panoptic.png, for people, and
  NAME_panoptic_ids.png, whose R + 256 G + 65536 B is a segment's id and 0 nobody's. NAME is the
  file's without its ending, or with it where two images would share a name.

  `detections.json` has every box whatever its score in COCO's format for results, `panoptic.json`
  the segments in that for panoptic results; `image_id` counts the files by name, from 1. Pictures
  and records leave out what `config.eval.nms` drops, if it is set.

  Args:
    task: with `config`, `model`, and of its classes `class_names`, `class_ids` and `is_thing`.
    params: the model's.
    inputs: an image or a folder of them.
    out: a folder.

  Returns:
    a record an image: 'input'; 'pictures', names of files in `out`; 'objects' with a score of
    `config.eval.threshold` or more, best first: 'label', 'category_id', 'score', 'box' (xyxy in
    pixels of the image, within it); and with the mask head 'segments' surer than
    `config.eval.mask_threshold`: 'id', 'label', 'category_id', 'isthing', 'area' (pixels), 'score'.

  Raises:
    UserError: there is no image, or one that cannot be read or that no bucket holds.
  """
  paths = images.files(inputs)
  compiled = jax.jit(functools.partial(look, task))  # Once for each bucket.
  records, results, annotations = [], [], []
  for image_id, (path, name) in enumerate(zip(paths, _names(paths)), 1):
    image = images.read(path, 3)
    row = _row(path, image, task.config.data)
    seen = jax.device_get(compiled(params, {key: x[None] for key, x in row.items()}))
    seen = _known({key: x[0] for key, x in seen.items()}, task)
    size = image.shape[1::-1] * 2
    results += [_rounded(result) for result in average_precision.results_of(
        image_id, seen['boxes'] * size, seen['scores'], seen['labels'], task.class_ids)]
    found = _above(seen, task.config.eval)
    pictures.detections(image, found['boxes'] * size, found['labels'], found['scores'],
                        task.class_names, out / f'{name}_boxes.png')
    record = {'input': str(path), 'pictures': [f'{name}_boxes.png'],
              'objects': _objects(found, size, task)}
    record['pictures'] += _attention(row, seen, found, task, out, name)
    if 'masks' in seen:
      ids, segments = _segments(row, seen, image.shape[:2], task)
      pictures.panoptic_map(image, ids, segments, task.class_names, out / f'{name}_panoptic.png')
      images.write(out / f'{name}_panoptic_ids.png', panoptic.to_png(ids))
      record['pictures'] += [f'{name}_panoptic.png', f'{name}_panoptic_ids.png']
      record['segments'] = [_written(segment, task) for segment in segments]
      annotations.append({
          'image_id': image_id, 'file_name': f'{name}_panoptic_ids.png',
          'segments_info': [{key: segment[key] for key in ('id', 'category_id')}
                            for segment in record['segments']]})
    records.append(record)
  (out / 'detections.json').write_text(json.dumps(results) + '\n')
  if annotations:
    (out / 'panoptic.json').write_text(json.dumps({'annotations': annotations}) + '\n')
  return records


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """What each file's answers are called: without the endings unless two would be the same."""
  stems = [path.stem for path in paths]
  return stems if len(set(stems)) == len(stems) else [path.name for path in paths]


def _row(path: pathlib.Path, image: np.ndarray, data: Any) -> dict[str, np.ndarray]:
  """'image' uint8 `[height, width, 3]`, resized as for evaluation and padded to the smallest bucket
  that holds it, and 'image_size' int32 `[2]`, its height and width without the padding."""
  view, = augment.evaluation_views(np.array([image.shape[:2]]), data.eval_short, data.longest)[0]
  height, width = int(view['height']), int(view['width'])
  area = lambda shape: shape[0] * shape[1]
  shapes = [shape for shape in data.eval_buckets if height <= shape[0] and width <= shape[1]]
  if not shapes:
    largest = max(data.eval_buckets, key=area)
    raise UserError(
        f'{path}: {height}x{width} (height x width) once resized, and no bucket holds that; the '
        f'largest of config.data.eval_buckets is {largest[0]}x{largest[1]}')
  shown = augment.apply(image, np.zeros((0, 4)), view, np.random.default_rng(0), flip=False).image
  padded = np.zeros((*min(shapes, key=area), 3), np.uint8)
  padded[:height, :width] = shown
  return {'image': padded, 'image_size': np.array([height, width], np.int32)}


# --- What the model says -------------------------------------------------------------------------


def look(task: Any, params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Detections with the attention of the last layers, averaged over heads.

  Args:
    task: see `predict`.
    params: the model's.
    batch: 'image' uint8 `[batch, height, width, 3]` and 'image_size' int32 `[batch, 2]`.

  Returns:
    'boxes' float32 `[batch, queries, 4]`, xyxy relative to the image; 'scores' float32 and 'labels'
    int32 `[batch, queries]` of the best real class; 'decoder' float32 `[batch, queries, h, w]`,
    over the cells of the padded image; 'encoder' float32 `[batch, h, w, h, w]`, from each cell to
    each, unless there is no encoder; and 'masks' as the model gives them, if it does.
  """
  outputs, sown = task.model.apply({'params': params}, batch['image'], batch['image_size'],
                                   mutable=['intermediates'])
  sides = sown['intermediates']['transformer']
  scores = jax.nn.softmax(outputs['logits'][-1])[..., :-1]
  seen = {'boxes': boxes.to_xyxy(outputs['boxes'][-1]), 'scores': scores.max(-1),
          'labels': scores.argmax(-1).astype(jnp.int32)}
  cells = tuple(-(-n // stride(task.model)) for n in batch['image'].shape[1:3])
  for side, name in (('decoder', 'cross_attn'), ('encoder', 'self_attn')):
    if side in sides:
      weights = _last(sides[side], name).mean(1)
      seen[side] = weights.reshape(*weights.shape[:2], *cells)
  if 'encoder' in seen:
    seen['encoder'] = seen['encoder'].reshape(-1, *cells, *cells)
  if 'masks' in outputs:
    seen['masks'] = outputs['masks']
  return seen


def stride(model: Any) -> int:
  """Pixels of the image to a cell of the features that a `detector.DETR` attends to."""
  return 2 ** (len(model.stages) + 1 - model.dilation)


def _last(layers: Mapping[str, Any], name: str) -> jax.Array:
  """Attention `[batch, heads, queries, keys]` of the last layer, scanned or not."""
  weights = lambda layer: layer[name]['attention'][0]
  if transformer.LAYERS in layers:
    return weights(layers[transformer.LAYERS])[-1]
  return weights(layers[f'{transformer.LAYERS}_{len(layers) - 1}'])


def _known(seen: dict[str, np.ndarray], task: Any) -> dict[str, np.ndarray]:
  """Leaves out queries whose class no category has (COCO's ids have gaps)."""
  ids = np.array([*task.class_ids, *[-1] * (seen['labels'].max() + 1)])
  return _of(seen, ids[seen['labels']] >= 0)


def _of(seen: dict[str, np.ndarray], queries: np.ndarray) -> dict[str, np.ndarray]:
  """What is seen of some queries, by index or bool, in that order."""
  return {key: x if key == 'encoder' else x[queries] for key, x in seen.items()}


def _above(seen: dict[str, np.ndarray], settings: Any) -> dict[str, np.ndarray]:
  """The queries that are sure of their object, best first; with `settings.nms` as in evaluation."""
  order = np.argsort(-seen['scores'], kind='stable')
  if settings.nms:
    order = average_precision.nms(seen['boxes'], seen['scores'], seen['labels'], settings.nms)
  return _of(seen, order[seen['scores'][order] >= settings.threshold])


# --- What is left for the user -------------------------------------------------------------------


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
  return {**result, 'bbox': [round(x, 2) for x in result['bbox']],
          'score': round(result['score'], 5)}


def _objects(found: Mapping[str, np.ndarray], size: tuple[int, ...],
             task: Any) -> list[dict[str, Any]]:
  """Records of what was found; `size` is width, height, width, height."""
  inside = (found['boxes'].clip(0, 1) * size).astype(np.float64).round(2).tolist()
  return [{'label': task.class_names[label], 'category_id': int(task.class_ids[label]),
           'score': round(float(score), 5), 'box': box}
          for label, score, box in zip(found['labels'], found['scores'], inside)]


def _attention(row, seen, found, task, out: pathlib.Path, name: str) -> list[str]:
  """Draws the attention of encoder and decoder; returns the names of the files."""
  height, width = row['image_size']
  shown = row['image'][:height, :width]
  centres = (found['boxes'][:, 1::-1] + found['boxes'][:, :1:-1]) / 2 * (height, width)
  cell = stride(task.model)
  left = []
  if 'encoder' in seen:
    left.append(f'{name}_attention_encoder.png')
    attention_pictures.encoder_attention(
        shown, seen['encoder'], _points(centres, shown.shape, cell), cell, out / left[-1])
  left.append(f'{name}_attention_decoder.png')
  attention_pictures.decoder_attention(
      shown, found['boxes'] * (width, height, width, height), found['labels'], found['scores'],
      found['decoder'], cell, task.class_names, out / left[-1])
  return left


def _points(centres: np.ndarray, shape: tuple[int, ...], cell: int) -> list[tuple[float, float]]:
  """The centres (y, x) of the best objects, one a cell; of none, a grid."""
  height, width = shape[:2]
  chosen = {}
  for y, x in centres:
    if 0 <= y < height and 0 <= x < width:
      chosen.setdefault((int(y // cell), int(x // cell)), (float(y), float(x)))
  grid = [(y * height, x * width) for x in (.25, .75) for y in (.25, .75)]
  return list(chosen.values())[:_POINTS] or grid


def _segments(row, seen, size: tuple[int, int], task) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """The id map `[*size]`, from 1 and 0 where nobody is, and the segments: see `panoptic.merge`."""
  threshold = task.config.eval.mask_threshold
  sure = seen['scores'] > threshold  # Only these are enlarged.
  masks = panoptic.upsample(seen['masks'][sure], row['image'].shape[:2], tuple(row['image_size']))
  ids, segments = panoptic.merge(seen['scores'][sure], seen['labels'][sure], masks, task.is_thing,
                                 size, threshold)
  return ids + 1, [{**segment, 'id': segment['id'] + 1} for segment in segments]


def _written(segment: Mapping[str, Any], task: Any) -> dict[str, Any]:
  return {'id': segment['id'], 'label': task.class_names[segment['label']],
          'category_id': int(task.class_ids[segment['label']]), 'isthing': segment['isthing'],
          'area': segment['area'], 'score': round(segment['score'], 5)}
