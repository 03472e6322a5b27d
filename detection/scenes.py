"""The embedded scenes of digits as a source of detection examples, with or without their stuff."""

import functools
from typing import Any

import numpy as np

from core.data import images, sources
from core.data.datasets import scenes

_DIGITS = 10


class Scenes:
  """A split of `digit_scenes` (`core.data.datasets.scenes`).

  Examples: `image` bytes, `image_id`, `height` and `width` int; `boxes` float32 `[n, 4]` xyxy in
  pixels, `labels` int32 `[n]`, `area` float32 `[n]` in pixels seen, `crowd` bool `[n]`, of which
  none is true; with masks `segments` int32 `[height, width]`, i + 1 where object i is and 0 where
  none is. Digits come first, then stuff. A digit's box ends one past its last pixel; a stuff
  box at the last one, as the boxes that panoptic models are trained on.

  Attributes:
    class_names: '0' .. '9', and with stuff 'paper', 'grid', 'stripes', 'dots'.
    class_ids: of the classes in the ground truth; their indices.
    is_thing: whether a class is a digit.
    sizes: int32 `[len, 2]`, height and width of every image.
    image_ids: int64 `[len]`, the numbers of the scenes in the whole split.
    objects: int32 `[len]`, how many each image has.
  """

  def __init__(self, split: str, data_dir: str | None = None, masks: bool = False,
               stuff: bool = False):
    """Opens a split; prepares the data set on first use.

    Args:
      split: `train`, `validation`, `test`, or a slice such as `train[:200]`.
      data_dir: root of tfds data sets, as in `core.data.sources.open_source`.
      masks: whether examples have `segments`.
      stuff: whether the regions of the ground are objects as well, as panoptic models want.

    Raises:
      UserError: the split does not exist, or the data set cannot be written.
    """
    self._arguments = (split, data_dir, masks, stuff)
    self._masks, self._groups = masks, ('objects', 'stuff') if stuff else ('objects',)
    self._source = sources.open_source('digit_scenes', split, data_dir=data_dir)
    self.class_names = list(scenes.CLASS_NAMES if stuff else scenes.CLASS_NAMES[:_DIGITS])
    self.class_ids = list(range(len(self.class_names)))
    self.is_thing = [i < _DIGITS for i in self.class_ids]
    self.sizes = np.full((len(self._source), 2), scenes.SIDE, np.int32)

  def __reduce__(self):
    return Scenes, self._arguments

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {'image': self._source[index]['image'], **self.target(index)}

  def target(self, index: int) -> dict[str, Any]:
    """The example without its image."""
    raw = self._source[index]
    joined = lambda name: [value for group in self._groups for value in raw[group][name]]
    labels = np.array(joined('label'), np.int32)
    target = {
        'image_id': int(raw['image_id']), 'height': scenes.SIDE, 'width': scenes.SIDE,
        'boxes': np.array(joined('bbox'), np.float32).reshape(-1, 4), 'labels': labels,
        'area': np.array(joined('area'), np.float32), 'crowd': np.zeros(len(labels), bool)}
    if self._masks:
      segments = images.decode(raw['panoptic'], 1)[..., 0].astype(np.int32)
      target['segments'] = np.where(segments <= len(labels), segments, 0)
    return target

  @functools.cached_property
  def image_ids(self) -> np.ndarray:
    return np.array([self._source[i]['image_id'] for i in range(len(self))], np.int64)

  @functools.cached_property
  def objects(self) -> np.ndarray:
    count = lambda raw: sum(len(raw[group]['label']) for group in self._groups)
    return np.array([count(self._source[i]) for i in range(len(self))], np.int32)

  def coco(self) -> dict[str, list[dict[str, Any]]]:
    """Ground truth in COCO's format, with masks as plain run lengths where there are masks."""
    pictures, annotations = [], []
    for i in range(len(self)):
      target = self.target(i)
      pictures.append({'id': target['image_id'], 'height': target['height'],
                       'width': target['width']})
      for n, (box, label, area) in enumerate(zip(target['boxes'].tolist(), target['labels'],
                                                 target['area'])):
        annotation = {
            'id': len(annotations) + 1,  # Not 0, which pycocotools takes for no match.
            'image_id': target['image_id'], 'category_id': int(label), 'iscrowd': 0,
            'bbox': [box[0], box[1], box[2] - box[0], box[3] - box[1]], 'area': float(area)}
        if self._masks:
          annotation['segmentation'] = _run_lengths(target['segments'] == n + 1)
        annotations.append(annotation)
    categories = [{'id': i, 'name': name, 'isthing': int(thing)}
                  for i, name, thing in zip(self.class_ids, self.class_names, self.is_thing)]
    return {'images': pictures, 'annotations': annotations, 'categories': categories}

  def __repr__(self) -> str:
    split, data_dir, masks, stuff = self._arguments
    return f'Scenes({split!r}, data_dir={data_dir!r}, masks={masks}, stuff={stuff})'


def _run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
  """COCO's uncompressed code: lengths of runs down the columns, of zeros and ones by turns."""
  pixels = mask.ravel(order='F')
  ends = np.flatnonzero(np.diff(pixels)) + 1
  counts = np.diff(np.concatenate([[0], ends, [pixels.size]])).tolist()
  return {'size': list(mask.shape), 'counts': [0, *counts] if pixels[0] else counts}
