"""A user's own data in COCO's format, and COCO itself, as a source of examples for detection."""

import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from core.config import UserError
from core.data import images
from detection import categories
from detection import coco_files
from detection import coco_layouts
from detection import coco_masks
from detection.image_sizes import image_size


class CocoSource:
  """One split of a data set in COCO's format, for `coco:PATH`.

  PATH has one of three layouts:

    {train,val or validation,test}/annotations.json with images/ beside it,
    annotations.json with images/ beside it, split 80/10/10 by a hash of each image's file name:
      adding images never moves others between splits,
    COCO's own: annotations/instances_{train,val}2017.json and {train,val}2017/.

  A file whose annotations have `segments_info` is panoptic. Its PNG pictures lie in panoptic/
  beside images/; in COCO's own layout it is annotations/panoptic_{train,val}2017.json, and they lie
  in panoptic_{train,val}2017/ or in annotations/panoptic_{train,val}2017/. Boxes then end at
  the index of a segment's last pixel, as those that the reference implementation trains on, so one
  pixel wide segments have boxes without width; and crowd segments are drawn like others.

  The whole file is checked when it is opened; see `coco_files.read`. Instances can be pickled into
  data workers, which do not read the file again, and are read from many threads.

  Examples, `source[i]`:
    image: the encoded bytes; image_id: int; height, width: int, of the image.
    boxes: float32 `[n, 4]`, xyxy in pixels, clipped to the image.
    labels: int32 `[n]`, class indices.
    area: float32 `[n]`, of the annotations; that of the box where they do not tell.
    crowd: bool `[n]`.
    segments: int32 `[height, width]`, with masks: i + 1 where object i is, the smaller object on
      top; 0 elsewhere. Crowds of instances are not drawn.

  Attributes:
    class_names, class_ids, is_thing: lists with an entry for each class index: its name, the id of
      its category and whether it is a thing; see `categories.Classes`.
    sizes: int32 `[len, 2]`, height and width as the annotations have them.
    image_ids: int64 `[len]`.
    objects: int32 `[len]`, objects of each image that are not crowds.
  """

  def __init__(self, path: str, split: str, *, masks: bool = False, strict: bool = True,
               labels: str = 'contiguous', panoptic: bool = False):
    """Opens and checks a split.

    Args:
      path: the folder.
      split: 'train', 'validation' (or 'val') or 'test'.
      masks: give `segments` too. Needs pycocotools unless the file is panoptic.
      strict: refuse a file with mistakes; else they are left out, counted and logged, and boxes
        that reach out of their image are clipped.
      labels: what a class index is, see `categories.classes`.
      panoptic: the annotations must be panoptic (which matters where COCO's own layout has both).

    Raises:
      UserError: there is no such split, or what is wrong in it.
    """
    self._places = coco_layouts.find(path, split, panoptic)
    self._split, self._masks, self._strict = split, masks, strict
    self._table = table = coco_files.read(self._places, masks, strict)
    if panoptic and not table.panoptic:
      raise UserError(f'{self._places.annotations} is not panoptic: its annotations have no '
                      'segments_info')
    self._check_categories()
    classes = categories.classes(table.names, table.things, labels, self._places.annotations)
    self.class_names, self.class_ids = classes.names, classes.ids
    self.is_thing = classes.is_thing
    self._labels = classes.index(table.categories)
    self._rows = np.arange(len(table.files))
    if self._places.by_hash:
      wanted = {'val': 'validation'}.get(split, split)
      splits = np.array([_hash_split(name) for name in table.files])
      self._rows = np.flatnonzero(splits == wanted)
      if not len(self._rows):
        raise UserError(f'split {split!r} of coco:{path} is empty; it needs more images, or '
                        'folders train, val and test')
    self.sizes, self.image_ids = table.sizes[self._rows], table.image_ids[self._rows]
    counted = np.concatenate([[0], np.cumsum(~table.crowd)])[table.ends]
    self.objects = np.diff(counted)[self._rows].astype(np.int32)

  def _check_categories(self) -> None:
    """All splits of the user must number their classes alike."""
    if not self._places.train:
      return
    train, mine = coco_files.category_names(self._places.train), self._table.names
    if train != mine:
      first = min(train.items() ^ mine.items())
      side, other = ('train', 'it') if first in train.items() else ('it', 'train')
      raise UserError(f'{self._places.annotations} and {self._places.train} differ in their '
                      f'categories: {side} has {first[0]} ({first[1]}), which {other} has not; all '
                      'splits need the same list')

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads an example.

    Raises:
      ImageError: the image cannot be read, or (unless strict) disagrees with its annotations.
      UserError: strict, and the image or its panoptic picture disagrees with the annotations.
    """
    example = self.target(index)
    path = os.path.join(self._places.images, self._table.files[self._rows[index]])
    try:
      example['image'] = pathlib.Path(path).read_bytes()
      size = image_size(example['image'])
    except OSError as e:
      # As a broken image, so that a long run survives it the same way.
      raise images.ImageError(f'{path}: {e.strerror}') from e
    except images.ImageError as e:
      raise images.ImageError(f'{path}: {e}') from e
    said = (example['height'], example['width'])
    if size != said:
      hint = (' (cameras note how they were held; with that it is turned)'
              if size == said[::-1] else '')
      raise self._error(f'{path} is {size[1]} x {size[0]} pixels, width x height{hint}; '
                        f'{self._places.annotations} says {said[1]} x {said[0]}')
    return example

  def target(self, index: int) -> dict[str, Any]:
    """An example without its `image`. Raises like reading one, if panoptic."""
    table, image = self._table, int(self._rows[index])
    height, width = map(int, table.sizes[image])
    rows = table.objects(image)
    x, y, w, h = table.bbox[rows].T
    example = {
        'image_id': int(table.image_ids[image]), 'height': height, 'width': width,
        'boxes': np.stack([x.clip(0), y.clip(0), (x + w).clip(max=width), (y + h).clip(max=height)],
                          1).astype(np.float32),
        'labels': self._labels[rows], 'area': table.area[rows].astype(np.float32),
        'crowd': table.crowd[rows]}
    if table.panoptic:
      segments, example['boxes'] = self._picture(image)
    elif self._masks:
      kept = [row for row in range(rows.start, rows.stop) if not table.crowd[row]]
      segments = coco_masks.draw([table.code(row) for row in kept],
                                 [row - rows.start + 1 for row in kept], height, width)
    if self._masks:
      example['segments'] = segments
    return example

  def _picture(self, image: int) -> tuple[np.ndarray, np.ndarray]:
    """`segments` and `boxes` of a panoptic image."""
    table = self._table
    height, width = map(int, table.sizes[image])
    if not table.pictures[image]:
      return np.zeros((height, width), np.int32), np.zeros((0, 4), np.float32)
    path = os.path.join(self._places.panoptic, table.pictures[image])
    ids = table.segment_ids[table.objects(image)]
    try:
      segments, boxes = coco_masks.panoptic(pathlib.Path(path).read_bytes(), ids)
    except OSError as e:
      raise images.ImageError(f'{path}: {e.strerror}') from e
    except images.ImageError as e:
      raise images.ImageError(f'{path}: {e}') from e
    if segments.shape != (height, width):
      raise self._error(f'{path} is {segments.shape[1]} x {segments.shape[0]} pixels, width x '
                        f'height; {self._places.annotations} says {width} x {height}')
    if len(absent := ids[boxes[:, 0] < 0]):
      raise self._error(f'{path} has no pixel of segment {absent[0]} (R + 256 G + 65536 B), which '
                        f'{self._places.annotations} lists for it')
    return segments, boxes

  def _error(self, text: str) -> Exception:
    if self._strict:
      return UserError(f'{text}; correct it, or leave such images out with '
                       '--config.data.strict=False')
    return images.ImageError(text)

  def coco(self) -> dict[str, list[dict[str, Any]]]:
    """The split's annotations in COCO's format, for pycocotools.

    Categories and images keep their ids. Annotations are numbered from 1: pycocotools takes a
    match with annotation 0 for none. With masks they have their `segmentation`, as compressed run
    lengths; those of a panoptic file are read from its pictures, which takes a while.
    """
    table = self._table
    found = []
    for index, image in enumerate(self._rows):
      rows = table.objects(image)
      size = table.sizes[image].tolist()
      codes = self._codes(index)
      for i, row in enumerate(range(rows.start, rows.stop)):
        entry = {'id': len(found) + 1, 'image_id': int(table.image_ids[image]),
                 'category_id': int(table.categories[row]), 'bbox': table.bbox[row].tolist(),
                 'area': float(table.area[row]), 'iscrowd': int(table.crowd[row])}
        if codes:
          entry['segmentation'] = {'size': size, 'counts': codes[i]}
        found.append(entry)
    return {
        'images': [{'id': int(table.image_ids[i]), 'file_name': table.files[i],
                    'height': int(table.sizes[i, 0]), 'width': int(table.sizes[i, 1])}
                   for i in self._rows],
        'annotations': found,
        'categories': [{'id': i, 'name': name, 'isthing': int(table.things[i])}
                       for i, name in sorted(table.names.items())]}

  def _codes(self, index: int) -> list[bytes]:
    """Run lengths of the masks of an image's objects; none when masks were not asked for."""
    if not self._masks:
      return []
    table, rows = self._table, self._table.objects(self._rows[index])
    if not table.panoptic:
      return [table.code(row) for row in range(rows.start, rows.stop)]
    segments = self.target(index)['segments']
    return coco_masks.split(segments, rows.stop - rows.start)

  def __repr__(self) -> str:
    return f'CocoSource({self._places.annotations!r}, {self._split!r})'


def _hash_split(name: str) -> str:
  """80/10/10 by the hash of a file name."""
  bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big') % 10
  return 'train' if bucket < 8 else 'validation' if bucket == 8 else 'test'
