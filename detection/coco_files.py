"""What a file in COCO's format says, checked, as arrays."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm
from absl import logging

from core.config import UserError
from detection import coco_masks
from detection.coco_layouts import Places


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """A checked file. Objects are in the order of their images; n images, m objects.

  Attributes:
    names, things: category id -> name, and whether it is a thing.
    panoptic: whether objects are segments of pictures.
    image_ids: int64 `[n]`.
    files: of the images, below their folder.
    sizes: int32 `[n, 2]`, height and width.
    pictures: file names of the panoptic pictures, '' where an image has none.
    ends: int64 `[n + 1]`; the objects of image i are ends[i] .. ends[i + 1] - 1.
    bbox: float64 `[m, 4]`, x, y, width and height as in the file.
    area: float64 `[m]`.
    categories: int64 `[m]`, ids.
    crowd: bool `[m]`.
    segment_ids: int64 `[m]`, ids of annotations, or of segments in their picture.
    codes: compressed run lengths of the masks of all objects, one behind the other.
    code_ends: int64 `[m + 1]`, where they end in `codes`; all 0 when masks were not asked for.
  """
  names: dict[int, str]
  things: dict[int, bool]
  panoptic: bool
  image_ids: np.ndarray
  files: list[str]
  sizes: np.ndarray
  pictures: list[str]
  ends: np.ndarray
  bbox: np.ndarray
  area: np.ndarray
  categories: np.ndarray
  crowd: np.ndarray
  segment_ids: np.ndarray
  codes: bytes
  code_ends: np.ndarray

  def objects(self, image: int) -> slice:
    return slice(int(self.ends[image]), int(self.ends[image + 1]))

  def code(self, row: int) -> bytes:
    return self.codes[self.code_ends[row]:self.code_ends[row + 1]]


def read(places: Places, masks: bool, strict: bool) -> Table:
  """Reads and checks a file, once a process while it stays as it is.

  Args:
    places: of the split.
    masks: check and keep the masks too.
    strict: refuse a file with mistakes; else what is wrong is left out, counted and logged.

  Raises:
    UserError: the file cannot be read, or `strict` and something in it is wrong.
  """
  return _read(places, masks, strict, _changed(places.annotations))


def category_names(path: str) -> dict[int, str]:
  """Category id -> name of a file. Raises `UserError` like `read`."""
  return _category_names(path, _changed(path))


def _changed(path: str) -> tuple[int, int]:
  stat = os.stat(path)
  return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _category_names(path: str, changed: tuple[int, int]) -> dict[int, str]:
  del changed
  return _categories(path, _load(path)['categories'], False)[0]


@functools.lru_cache(maxsize=4)
def _read(places: Places, masks: bool, strict: bool, changed: tuple[int, int]) -> Table:
  del changed
  path = places.annotations
  content = _load(path)
  first = content['annotations'][:1]
  panoptic = bool(first) and isinstance(first[0], dict) and 'segments_info' in first[0]
  names, things = _categories(path, content['categories'], panoptic)
  return _Reader(places, names, things, panoptic, masks and not panoptic).read(content, strict)


def _load(path: str) -> dict[str, list]:
  """The JSON of a file, with its three lists."""
  try:
    content = json.loads(pathlib.Path(path).read_bytes())
  except OSError as e:
    raise UserError(f'{path}: {e.strerror}') from e
  except json.JSONDecodeError as e:
    raise UserError(f'{path} is not JSON: line {e.lineno}, column {e.colno}: {e.msg}') from e
  except (ValueError, RecursionError) as e:  # Not UTF-8, or lists within lists without end.
    raise UserError(f'{path} is not JSON: {e}') from e
  lists = ('images', 'annotations', 'categories')
  if not isinstance(content, dict):
    raise UserError(f'{path} holds a {type(content).__name__}, not an object with the lists '
                    f'{", ".join(lists)} (a list alone is COCO\'s format of results)')
  if wrong := [name for name in lists if not isinstance(content.get(name), list)]:
    raise UserError(f'{path} has no list {" and no list ".join(map(repr, wrong))}; COCO\'s format '
                    f'has {", ".join(lists)}')
  return content


def _categories(path: str, entries: list, panoptic: bool) -> tuple[dict[int, str], dict[int, bool]]:
  names, things = {}, {}
  for entry in entries:
    number, name = (entry.get('id'), entry.get('name')) if isinstance(entry, dict) else (None, None)
    if not _is_id(number) or not isinstance(name, str):
      raise UserError(f'{path}: category {str(entry)[:60]} lacks an integer id or a name')
    if number in names:
      raise UserError(f'{path}: categories {names[number]!r} and {name!r} share the id {number}')
    if panoptic and entry.get('isthing') not in (0, 1):
      raise UserError(f'{path}: category {name!r} does not say whether it is a thing or stuff, '
                      '"isthing": 1 or 0, as panoptic files do')
    names[number], things[number] = name, bool(entry['isthing']) if panoptic else True
  if not names:
    raise UserError(f'{path} has no categories')
  return names, things


class _Skip(Exception):
  """An entry that is wrong: of what kind, and what it says."""

  def __init__(self, kind: str, text: str):
    super().__init__(kind, text)
    self.kind, self.text = kind, text


class _Reader:
  """Goes through a file once and keeps what is right; counts what is not."""

  def __init__(self, places: Places, names: dict[int, str], things: dict[int, bool],
               panoptic: bool, masks: bool):
    self._places, self._names, self._things = places, names, things
    self._panoptic, self._masks = panoptic, masks
    self._wrong: dict[str, int] = {}
    self._shown: dict[str, list[str]] = {}
    self._index: dict[int, int] = {}  # Image id -> position; -1 for images that were left out.
    self._ids: set[int] = set()  # Of annotations.
    self._images: list[tuple[int, str, tuple[int, int]]] = []
    self._pictures: list[str] = []
    self._rows: list[tuple] = []  # Image, bbox, area, category, crowd, id, run lengths.

  def read(self, content: dict[str, list], strict: bool) -> Table:
    self._for_each(content['images'], 'image', self._image, _names_in(self._places.images))
    self._pictures = [''] * len(self._images)
    one = self._picture if self._panoptic else self._annotation
    pictures = _names_in(self._places.panoptic) if self._panoptic else lambda name: True
    self._for_each(content['annotations'], 'annotation', one, pictures)
    self._report(strict)
    return self._table()

  def _for_each(self, entries: list, what: str, take: Callable, *more: Any) -> None:
    for position, entry in enumerate(tqdm.tqdm(
        entries, desc=f'check {os.path.basename(self._places.annotations)}', unit=f' {what}s',
        unit_scale=True, delay=5, mininterval=.5 if sys.stderr.isatty() else 30)):
      try:
        if not isinstance(entry, dict):
          raise _Skip(f'{what}s that are not objects', f'{what}s[{position}]')
        take(entry, *more)
      except _Skip as e:
        self._note(e)

  def _note(self, wrong: _Skip) -> None:
    self._wrong[wrong.kind] = self._wrong.get(wrong.kind, 0) + 1
    self._shown.setdefault(wrong.kind, [])
    if len(self._shown[wrong.kind]) < (3 if wrong.kind.startswith('missing') else 1):
      self._shown[wrong.kind].append(wrong.text)

  def _image(self, entry: dict, exists: Callable[[str], bool]) -> None:
    number, name = entry.get('id'), entry.get('file_name')
    if not _is_id(number):
      raise _Skip('images without an integer id', str(name)[:60])
    if number in self._index:
      raise _Skip('images with the id of another', f'id {number}, {str(name)[:60]}')
    self._index[number] = -1
    if not isinstance(name, str) or not name:
      raise _Skip('images without a file_name', f'id {number}')
    size = tuple(entry.get(side) for side in ('height', 'width'))
    if not all(_is_number(s) and s > 0 and s == int(s) for s in size):
      raise _Skip('images without a whole width and height', f'{name}: {size[1]} x {size[0]}')
    if not exists(name):
      raise _Skip(f'missing image files in {self._places.images}', name)
    self._index[number] = len(self._images)
    self._images.append((number, name, (int(size[0]), int(size[1]))))

  def _annotation(self, entry: dict, _: Callable) -> None:
    number = entry.get('id')
    if not _is_id(number):
      raise _Skip('annotations without an integer id', str(entry)[:60])
    if number in self._ids:
      raise _Skip('annotations with the id of another', f'id {number}')
    self._ids.add(number)
    image = self._image_of(entry, f'annotation {number}')
    if image >= 0:
      self._object(entry, number, image, f'annotation {number}')

  def _picture(self, entry: dict, exists: Callable[[str], bool]) -> None:
    image, name = self._image_of(entry, f'picture {entry.get("file_name")}'), entry.get('file_name')
    if image < 0:
      return
    if self._pictures[image]:
      raise _Skip('images with two panoptic pictures', self._images[image][1])
    if not isinstance(name, str) or not exists(name):
      raise _Skip(f'missing panoptic pictures in {self._places.panoptic}', str(name)[:60])
    segments = entry.get('segments_info')
    if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
      raise _Skip('annotations without a list segments_info', name)
    self._pictures[image] = name
    seen = set()
    for segment in segments:
      number, where = segment.get('id'), f'segment {str(segment.get("id"))[:20]} of {name}'
      try:
        if type(number) is not int or not 0 < number < 2**24 or number in seen:
          raise _Skip('segments whose ids are not different numbers from 1 to 16,777,215', where)
        seen.add(number)
        self._object(segment, number, image, where)
      except _Skip as e:
        self._note(e)

  def _image_of(self, entry: dict, where: str) -> int:
    number = entry.get('image_id')
    if type(number) is not int or number not in self._index:
      raise _Skip('annotations with an image_id that no image has', f'{where}: {str(number)[:20]}')
    return self._index[number]

  def _object(self, entry: dict, number: int, image: int, where: str) -> None:
    _, name, (height, width) = self._images[image]
    where = f'{where} in {name}'
    category, crowd = entry.get('category_id'), entry.get('iscrowd', 0)
    if type(category) is not int or category not in self._names:
      raise _Skip('annotations with a category_id that no category has',
                  f'{where}: {str(category)[:20]}')
    bbox = self._box(entry.get('bbox'), height, width, where)
    # Many exporters leave the area out, and for boxes alone it is theirs.
    area = entry.get('area', bbox[2] * bbox[3])
    if not _is_number(area) or area < 0:
      raise _Skip('annotations whose area is not a number from 0 up', f'{where}: {str(area)[:20]}')
    if crowd not in (0, 1):
      raise _Skip('annotations whose iscrowd is neither 0 nor 1', f'{where}: {str(crowd)[:20]}')
    code = b''
    if self._masks:
      try:
        code = coco_masks.encode(entry.get('segmentation'), height, width)
      except coco_masks.MaskError as e:
        raise _Skip(f'annotations with {e.kind}', f'{where}: {e}') from e
    self._rows.append((image, bbox, float(area), category, bool(crowd), number, code))

  def _box(self, box: Any, height: int, width: int, where: str) -> list[float]:
    text = f'{where}: {str(box)[:80]}'
    if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):
      raise _Skip('boxes that are not four numbers [x, y, width, height]', text)
    if not all(map(_is_number, box)):
      raise _Skip('boxes with NaN or infinity', text)
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
      raise _Skip('boxes without a positive width and height', text)
    x0, y0, x1, y1 = max(x, 0.), max(y, 0.), min(x + w, float(width)), min(y + h, float(height))
    text += f' of {width} x {height} pixels'
    # As float32, which training has: a box as thin as its rounding is none.
    if not (np.float32(x0) < np.float32(x1) and np.float32(y0) < np.float32(y1)):
      raise _Skip('boxes outside their image', text)
    if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 1:
      self._note(_Skip('boxes that reach more than a pixel out of their image', text))
      return [x0, y0, x1 - x0, y1 - y0]
    return [x, y, w, h]

  def _report(self, strict: bool) -> None:
    path = self._places.annotations
    if self._wrong:
      parts = []
      for kind, count in self._wrong.items():
        shown = ', '.join(self._shown[kind])
        more = ', ...' if count > len(self._shown[kind]) else ''
        parts.append(f'{kind}: {count:,} ({shown}{more})')
      text = '; '.join(parts)
      if strict:
        raise UserError(f'{path} has {text}; correct the file, or leave them out with '
                        '--config.data.strict=False')
      logging.warning('%s: left out (boxes that reach out of their image: clipped) %s', path, text)
    if not self._images:
      raise UserError(f'{path} has no images' + (', or none that is right' if self._wrong else ''))

  def _table(self) -> Table:
    rows = sorted(self._rows, key=lambda row: row[0])  # Stable: else as in the file.
    column = lambda i, dtype: np.array([row[i] for row in rows], dtype)
    codes = [row[6] for row in rows]
    numbers, files, sizes = zip(*self._images)
    return Table(
        names=self._names, things=self._things, panoptic=self._panoptic,
        image_ids=np.array(numbers, np.int64), files=list(files), sizes=np.array(sizes, np.int32),
        pictures=self._pictures,
        ends=np.searchsorted(column(0, np.int64), np.arange(len(files) + 1)),
        bbox=column(1, np.float64).reshape(-1, 4), area=column(2, np.float64),
        categories=column(3, np.int64), crowd=column(4, bool), segment_ids=column(5, np.int64),
        codes=b''.join(codes),
        code_ends=np.concatenate([[0], np.cumsum([len(c) for c in codes], dtype=np.int64)]))


def _is_number(value: Any) -> bool:
  """Whether a value of JSON is a number, and not NaN, infinite or beyond floats."""
  try:
    return type(value) in (int, float) and math.isfinite(value)
  except OverflowError:
    return False


def _is_id(value: Any) -> bool:
  return type(value) is int and abs(value) < 2**63


def _names_in(folder: str) -> Callable[[str], bool]:
  """Tells whether a file is in a folder; one listing instead of a question for each file."""
  try:
    names = set(os.listdir(folder))
  except OSError as e:
    raise UserError(f'{folder}: {e.strerror}; the pictures of the annotations beside it belong '
                    'there') from e
  return lambda name: name in names or ('/' in name and os.path.isfile(os.path.join(folder, name)))
