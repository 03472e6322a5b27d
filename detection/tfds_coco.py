"""COCO as tfds prepares it, as a source of examples for detection.

tfds keeps no image sizes, which training must know before it reads an image, and boxes relative to
them. `scan` reads the sizes off the images once and leaves a file; `--mode=prepare` calls it.
"""

import concurrent.futures
import pathlib
import sys
import zipfile
from typing import Any

import numpy as np
import tqdm

from core import weights
from core.config import UserError
from core.data import sources
from core.data.images import ImageError
from detection import categories
from detection import coco_masks
from detection.image_sizes import image_size

_KEYS = ('sizes', 'objects', 'image_ids')  # Of the file of sizes.
_DTYPES = {'id': np.int64, 'area': np.float32, 'label': np.int64, 'is_crowd': bool}


class TfdsCoco:
  """One split of tfds' COCO: 'coco/2017', 'coco/2014', or 'coco/2017_panoptic' for such targets.

  Examples and attributes are those of `detection.coco.CocoSource`, with two differences that come
  from tfds: areas are whole numbers, and boxes are relative float32 numbers times the image's
  size, which is within 1e-4 pixels of COCO's own. Boxes without width or height (there are a few)
  are left out. Masks exist in the panoptic annotations only, and their boxes are the masks'.
  """

  def __init__(self, name: str, split: str, *, data_dir: str | None = None, masks: bool = False,
               sizes_file: str | pathlib.Path, labels: str = 'contiguous'):
    """Opens a split.

    Args:
      name: of the data set, as `core.data.sources.open_source` takes it.
      split: such as 'train' or 'validation', or a slice of one.
      data_dir: of tfds data sets.
      masks: give `segments` too.
      sizes_file: what `scan` left for this split.
      labels: 'contiguous' for classes 0..79 (or 0..132), 'ids' for COCO's own ids.

    Raises:
      UserError: the data set is not there or not COCO, it has no masks, or `sizes_file` is not
        there or is of other data.
    """
    self._source = sources.open_source(name, split, data_dir=data_dir,
                                       features=('image', 'image/id'))
    self._key = _objects_key(self._source)
    self.panoptic = self._key == 'panoptic_objects'
    if masks and not self.panoptic:
      raise UserError(f'data set {name!r} has no masks; use coco/2017_panoptic, or COCO\'s own '
                      'files as coco:PATH')
    self._name, self._split, self._masks = name, split, masks
    self.sizes, self.objects, self.image_ids = _read_sizes(pathlib.Path(sizes_file), self._source)
    self._categories = categories.PANOPTIC if self.panoptic else categories.THINGS
    classes = categories.classes(
        self._categories, {i: categories.is_thing(i) for i in self._categories}, labels, name)
    self.class_names, self.class_ids = classes.names, classes.ids
    self.is_thing = classes.is_thing
    # tfds numbers the categories in the order of their ids.
    self._ids = np.array(list(self._categories))
    self._labels = classes.index(self._ids)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads an example; its image stays encoded. Raises `ImageError` for a broken panoptic PNG."""
    read = self._source[index]
    return {**self._target(index, read), 'image': read['image']}

  def target(self, index: int) -> dict[str, Any]:
    """An example without its `image`."""
    return self._target(index, self._source[index])

  def _target(self, index: int, read: dict[str, Any]) -> dict[str, Any]:
    height, width = map(int, self.sizes[index])
    objects = _objects(read[self._key])
    example = {
        'image_id': int(self.image_ids[index]), 'height': height, 'width': width,
        'boxes': self._absolute(index, objects['bbox']),
        'labels': self._labels[objects['label']], 'area': objects['area'],
        'crowd': objects['is_crowd']}
    if self.panoptic:
      segments, example['boxes'] = coco_masks.panoptic(read['panoptic_image'], objects['id'])
      if segments.shape != (height, width) or (example['boxes'] < 0).any():
        raise ImageError(f'image {example["image_id"]}: its panoptic picture does not fit its '
                         'segments')
      if self._masks:
        example['segments'] = segments
    return example

  def _absolute(self, index: int, bbox: np.ndarray) -> np.ndarray:
    """xyxy in pixels of tfds' relative yxyx, float32 `[n, 4]`."""
    height, width = self.sizes[index]
    return bbox[:, [1, 0, 3, 2]] * np.array([width, height, width, height], np.float32)

  def coco(self) -> dict[str, list[dict[str, Any]]]:
    """The annotations in COCO's format, for pycocotools; reads every example.

    Masks (compressed run lengths) are among them when the source was opened with them.
    """
    found = []
    for index in range(len(self)):
      read = self._source[index]
      example = self._target(index, read)
      # Those of the annotations also where training has the masks' own.
      boxes = self._absolute(index, _objects(read[self._key])['bbox']).astype(np.float64)
      count = len(example['labels'])
      codes = coco_masks.split(example['segments'], count) if self._masks else []
      for i in range(count):
        x0, y0, x1, y1 = boxes[i].tolist()
        entry = {'id': len(found) + 1, 'image_id': example['image_id'],
                 'category_id': self.class_ids[example['labels'][i]],
                 'bbox': [x0, y0, x1 - x0, y1 - y0], 'area': float(example['area'][i]),
                 'iscrowd': int(example['crowd'][i])}
        if codes:
          entry['segmentation'] = {'size': self.sizes[index].tolist(), 'counts': codes[i]}
        found.append(entry)
    return {
        'images': [{'id': int(number), 'height': int(height), 'width': int(width)}
                   for number, (height, width) in zip(self.image_ids, self.sizes)],
        'annotations': found,
        'categories': [{'id': i, 'name': name, 'isthing': int(categories.is_thing(i))}
                       for i, name in self._categories.items()]}

  def __repr__(self) -> str:
    return f'TfdsCoco({self._name!r}, {self._split!r})'


def scan(source: sources.TfdsSource, path: pathlib.Path) -> None:
  """Reads the size of every image, without decoding it, and writes them to a file.

  The file is a `.npz` of `sizes` int32 `[n, 2]` (height, width), `objects` int32 `[n]` (those that
  are not crowds) and `image_ids` int64 `[n]`. It appears under its name when it is whole.

  Args:
    source: of `core.data.sources.open_source`.
    path: of the file.

  Raises:
    UserError: the data set is not COCO, or an image cannot be read.
  """
  key = _objects_key(source)

  def look(index: int) -> tuple[tuple[int, int], int, int]:
    example = source[index]
    try:
      size = image_size(example['image'])
    except ImageError as e:
      raise UserError(f'example {index} of {source!r}: {e}; prepare the data set anew') from e
    crowd = _objects(example[key])['is_crowd']
    return size, int((~crowd).sum()), int(example['image/id'])

  with concurrent.futures.ThreadPoolExecutor(8) as pool:  # Mostly waits for the disk.
    found = list(tqdm.tqdm(
        pool.map(look, range(len(source))), total=len(source), desc=f'image sizes {path.name}',
        unit=' images', unit_scale=True, delay=5, mininterval=.5 if sys.stderr.isatty() else 30))
  sizes, objects, image_ids = zip(*found)
  path.parent.mkdir(parents=True, exist_ok=True)
  with weights.appearing(path) as temporary, temporary.open('wb') as file:
    np.savez(file, sizes=np.array(sizes, np.int32), objects=np.array(objects, np.int32),
             image_ids=np.array(image_ids, np.int64))


def _objects_key(source: sources.TfdsSource) -> str:
  for key in ('panoptic_objects', 'objects'):
    if key in source.features and {'image', 'image/id'} <= set(source.features):
      return key
  raise UserError(f'{source!r} is not laid out as tfds\' coco, with image, image/id and objects; '
                  f'it has {", ".join(source.features)}')


def _objects(objects: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without those whose box has no width or height, which the reference drops too."""
  bbox = np.asarray(objects['bbox'], np.float32).reshape(-1, 4)
  kept = (bbox[:, 2] > bbox[:, 0]) & (bbox[:, 3] > bbox[:, 1])
  # For an image without objects tfds gives empty lists, which have no type.
  return {'bbox': bbox[kept]} | {name: np.asarray(objects[name], dtype)[kept]
                                 for name, dtype in _DTYPES.items()}


def _read_sizes(path: pathlib.Path, source: sources.TfdsSource) -> tuple[np.ndarray, ...]:
  """`sizes`, `objects` and `image_ids` of what `scan` wrote for a source."""
  try:
    with np.load(path, allow_pickle=False) as file:
      found = tuple(file[key] for key in _KEYS)
  except FileNotFoundError as e:
    raise UserError(f'{path}: no such file; --mode=prepare reads the sizes of the images of '
                    f'{source!r} into it') from e
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(f'{path} cannot be read ({e}); remove it, and --mode=prepare makes it '
                    'anew') from e
  ends = (0, len(source) - 1)
  if len(found[2]) != len(source) or any(
      int(source[i]['image/id']) != int(found[2][i]) for i in ends):
    raise UserError(f'{path} is of other images than {source!r}; remove it, and --mode=prepare '
                    'makes it anew')
  return found
