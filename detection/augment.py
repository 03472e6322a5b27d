"""The augmentation of DETR (section 4 and appendix A.4), and the geometry of its evaluation.

Sizes are drawn ahead of pixels: a `View` says how large an example will be before its image is
read, so that batches are made of examples that fit one padded shape. Where a crop lies, and whether
the picture is mirrored, is drawn when the example is made. As in the reference implementation a
crop is resized by the same rule as a whole picture (the paper only names the sides 800 and 1333).

Everything is numpy and OpenCV, on uint8 `[height, width, 3]` and boxes float32 `[n, 4]` xyxy in
pixels. `segments` are maps int32 `[height, width]`: i + 1 where object i is, 0 where none is.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

from core.config import UserError

# What is decided about an example before it is read, 24 bytes: views of all of COCO fit in memory.
# `middle_*` is the size before the crop, 0 where there is no crop; `height`, `width` the last one.
View = np.dtype([(name, np.int32) for name in (
    'middle_height', 'middle_width', 'crop_height', 'crop_width', 'height', 'width')])


# --- Sizes ---------------------------------------------------------------------------------------


def resized(height, width, short, longest=None) -> tuple[np.ndarray, np.ndarray]:
  """The size that a picture is resized to: its aspect ratio stays.

  The shorter side becomes `short`, the longer one is rounded down. If it were longer than
  `longest`, `short` is lowered first, and rounded half to even; where a very elongated picture
  still is a pixel too long, that pixel is taken off (the reference implementation leaves it).

  Args:
    height, width: int, or int arrays of one shape, positive.
    short: length of the shorter side, int or int array.
    longest: limit of the longer side; None for none.

  Returns:
    Height and width, int64 of the shape of the arguments together.
  """
  height, width, short = np.broadcast_arrays(*(np.asarray(v, np.int64)
                                               for v in (height, width, short)))
  low, high = np.minimum(height, width), np.maximum(height, width)
  if longest is None:
    long = short * high // low
  else:
    capped = np.maximum(np.rint(longest * low / high).astype(np.int64), 1)
    short = np.where(high / low * short > longest, capped, short)
    long = np.minimum(short * high // low, longest)
  return np.where(height <= width, short, long), np.where(width <= height, short, long)


def draw_views(sizes: np.ndarray, views_per_image: int, seed: int, settings: Any) -> np.ndarray:
  """Draws what training sees of every image, several times over.

  With probability one half the shorter side is drawn from `scales`. Otherwise, if `crop`, it is
  first drawn from `crop_scales`, without a limit to the longer side; then the sides of a crop are
  drawn, evenly from `crop_min` to the smaller of `crop_max` and the side there is; and the crop's
  shorter side is drawn from `scales`.

  Args:
    sizes: int `[n, 2]`, height and width of every image.
    views_per_image: k, at least 1.
    seed: of all draws.
    settings: has `scales`, `longest`, `crop`, `crop_scales`, `crop_min`, `crop_max`, in pixels.

  Returns:
    `View` `[n, k]`.

  Raises:
    UserError: the settings contradict each other.
  """
  _check(settings, views_per_image)
  rng = np.random.default_rng(seed)
  shape = (len(sizes), views_per_image)
  height, width = (np.broadcast_to(side[:, None], shape) for side in np.asarray(sizes).T)
  views = np.zeros(shape, View)
  if settings.crop:
    cropped = rng.random(shape) < .5
    middle = resized(height, width, rng.choice(settings.crop_scales, shape))
    crop = [rng.integers(settings.crop_min, np.minimum(side, settings.crop_max), endpoint=True)
            for side in middle]
    for name, values in zip(View.names, (*middle, *crop)):
      views[name] = np.where(cropped, values, 0)
    height, width = (np.where(cropped, views[name], side) for name, side in (
        ('crop_height', height), ('crop_width', width)))
  views['height'], views['width'] = resized(
      height, width, rng.choice(settings.scales, shape), settings.longest)
  return views


def _check(settings: Any, views_per_image: int) -> None:
  if views_per_image < 1:
    raise UserError(f'config.data.views={views_per_image}; an image needs at least one view')
  if not settings.scales or min(settings.scales) < 1:
    raise UserError(f'config.data.scales={tuple(settings.scales)}: lengths of the shorter side in '
                    'pixels, at least one')
  if settings.longest < 1:
    raise UserError(f'config.data.longest={settings.longest}; it must be at least 1')
  if not settings.crop:
    return
  if not settings.crop_scales:
    raise UserError('config.data.crop_scales=(): name at least one, or set config.data.crop=False')
  if not 1 <= settings.crop_min <= min(*settings.crop_scales, settings.crop_max):
    raise UserError(
        f'config.data.crop_min={settings.crop_min} must be from 1 to '
        f'{min(*settings.crop_scales, settings.crop_max)}, the least of config.data.crop_scales '
        'and config.data.crop_max')


def evaluation_views(sizes: np.ndarray, short: int, longest: int) -> np.ndarray:
  """The one view of every image that is evaluated: resized, nothing else.

  Args:
    sizes: int `[n, 2]`, height and width of every image.
    short, longest: as in `resized`.

  Returns:
    `View` `[n, 1]`.
  """
  views = np.zeros((len(sizes), 1), View)
  height, width = np.asarray(sizes).T
  views['height'][:, 0], views['width'][:, 0] = resized(height, width, short, longest)
  return views


# --- Pixels --------------------------------------------------------------------------------------


class Applied(NamedTuple):
  """An example as a view shows it.

  Attributes:
    image: uint8 `[height, width, 3]`, of the view's size.
    boxes: float32 `[m, 4]`, xyxy in pixels of this image.
    kept: int64 `[m]`, which of the objects there were these are, ascending.
    segments: int32 `[height, width]`, numbered by `boxes`; None when there were none.
  """
  image: np.ndarray
  boxes: np.ndarray
  kept: np.ndarray
  segments: np.ndarray | None


def apply(image: np.ndarray, boxes: np.ndarray, view: np.void, rng: np.random.Generator,
          flip: bool, segments: np.ndarray | None = None) -> Applied:
  """Mirrors, crops and resizes a picture with all that is known about it.

  Args:
    image: uint8 `[h, w, 3]`, of the size that the view was drawn for.
    boxes: float32 `[n, 4]`, xyxy in pixels.
    view: one element of `draw_views` or `evaluation_views`.
    rng: whether to mirror, and where to crop; as many draws for every view, used or not.
    flip: mirror left to right with probability one half.
    segments: int32 `[h, w]`.
  """
  mirrored, down, right = rng.random(3)
  kept = np.arange(len(boxes))
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  if flip and mirrored < .5:
    image = cv2.flip(image, 1)
    boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + np.float32([1, 0, 1, 0]) * image.shape[1]
    segments = None if segments is None else segments[:, ::-1]
  if view['middle_height']:
    image, boxes, segments = _resize(
        image, boxes, segments, view['middle_height'], view['middle_width'])
    height, width = int(view['crop_height']), int(view['crop_width'])
    top = int(down * (image.shape[0] - height + 1))
    left = int(right * (image.shape[1] - width + 1))
    image = image[top:top + height, left:left + width]
    boxes = np.clip(boxes - [left, top, left, top], 0, [width, height, width, height])
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    if segments is not None:
      segments = renumbered(segments[top:top + height, left:left + width], kept, len(boxes))
    boxes = boxes[kept]
  image, boxes, segments = _resize(image, boxes, segments, view['height'], view['width'])
  return Applied(np.ascontiguousarray(image), boxes.astype(np.float32), kept, segments)


def _resize(image, boxes, segments, height: int, width: int):
  """Resizes all three; boxes by the ratios that rounding left."""
  h, w = image.shape[:2]
  height, width = int(height), int(width)
  if (h, w) == (height, width):
    return image, boxes, segments
  # The reference implementation resizes with Pillow, whose bilinear filter widens as a picture
  # shrinks. OpenCV's does not, and would alias: the mean of the area a pixel covers comes closest.
  method = cv2.INTER_AREA if height <= h and width <= w else cv2.INTER_LINEAR
  image = cv2.resize(image, (width, height), interpolation=method)
  boxes = boxes * np.array([width / w, height / h, width / w, height / h])
  if segments is not None:
    # Pixel i shows pixel floor(i * old / new), in whole numbers; not the nearest centre.
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    segments = segments[rows[:, None], columns]
  return image, boxes, segments


def renumbered(segments: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
  """Segments of the kept objects alone.

  Args:
    segments: int `[height, width]` with numbers up to `count`.
    kept: which objects stay, by index.
    count: of objects before.

  Returns:
    int32 `[height, width]`, i + 1 where `kept[i]` is.
  """
  number = np.zeros(count + 1, np.int32)
  number[kept + 1] = np.arange(1, len(kept) + 1)
  return number[segments]


# --- Fixed shapes --------------------------------------------------------------------------------


def to_targets(example: dict[str, Any], image: np.ndarray, rng: np.random.Generator, *,
               flip: bool, shape: tuple[int, int], slots: int,
               keep_crowd: bool = False) -> dict[str, np.ndarray]:
  """Makes a row of a batch: applies the example's view and pads.

  Args:
    example: of `detection.views.Viewed`; its objects, `height`, `width` and `view` are used, and
      `segments` if it has them.
    image: uint8 `[height, width, 3]`, decoded.
    rng: see `apply`.
    flip: whether to mirror at random.
    shape: height and width of the row, at least the view's.
    slots, keep_crowd: see `pad_example`.

  Returns:
    What `pad_example` returns.

  Raises:
    UserError: the image has not the size that its annotations give; or see `pad_example`.
  """
  if image.shape[:2] != (example['height'], example['width']):
    raise UserError(
        f'image {example["image_id"]} is {image.shape[0]}x{image.shape[1]} (height x width) once '
        f'decoded, and {example["height"]}x{example["width"]} in its annotations, so boxes would '
        'not be where objects are; correct the annotations, or the orientation in the file')
  shown = apply(image, example['boxes'], example['view'], rng, flip, example.get('segments'))
  return pad_example(
      shown.image, shown.boxes, example['labels'][shown.kept], example['crowd'][shown.kept],
      shape, slots, example['image_id'], shown.segments, keep_crowd)


def pad_example(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray,
                shape: tuple[int, int], slots: int, image_id: int,
                segments: np.ndarray | None = None,
                keep_crowd: bool = False) -> dict[str, np.ndarray]:
  """Pads an example to fixed shapes: the image at its bottom and right, objects at their end.

  Args:
    image: uint8 `[h, w, 3]`.
    boxes: float32 `[n, 4]`, xyxy in pixels.
    labels: int32 `[n]`, classes.
    crowd: bool `[n]`. Groups too dense to be told apart are no targets of detection.
    shape: height and width of the padded image.
    slots: of targets.
    image_id: named in errors.
    segments: int32 `[h, w]`.
    keep_crowd: whether crowds are targets none the less, as panoptic ones are.

  Returns:
    `image` uint8 `[*shape, 3]`, `image_size` int32 `[2]`, `boxes` float32 `[slots, 4]` cxcywh
    relative to the image without its padding, `labels` int32 `[slots]`, `objects` int32 (slots
    that are real), and `segments` uint8 `shape` (slot + 1, 0 for nothing) if there were any.

  Raises:
    UserError: more objects than slots, or too many slots for `segments`.
  """
  if not keep_crowd and crowd.any():
    kept = np.flatnonzero(~crowd)
    segments = None if segments is None else renumbered(segments, kept, len(boxes))
    boxes, labels = boxes[kept], labels[kept]
  count = len(boxes)
  if count > slots:
    raise UserError(f'image {image_id} has {count} objects, and config.model.queries={slots} can '
                    'find no more than so many; raise it')
  height, width = image.shape[:2]
  size = np.array([width, height], np.float64)
  low, high = boxes[:, :2] / size, boxes[:, 2:] / size
  row = {
      'image': np.zeros((*shape, 3), np.uint8), 'image_size': np.array([height, width], np.int32),
      'boxes': np.zeros((slots, 4), np.float32), 'labels': np.zeros(slots, np.int32),
      'objects': np.int32(count)}
  row['image'][:height, :width] = image
  row['boxes'][:count] = np.concatenate([(low + high) / 2, high - low], -1)
  row['labels'][:count] = labels
  if segments is not None:
    if slots > 254:
      raise UserError(f'config.model.queries={slots}: with masks 254 is the most')
    row['segments'] = np.zeros(shape, np.uint8)
    row['segments'][:height, :width] = segments
  return row
