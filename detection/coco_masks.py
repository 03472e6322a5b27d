"""Masks as COCO writes them: polygons, run lengths, and coloured PNG pictures.

In memory a mask is COCO's compressed run-length code: some hundred bytes, and exactly what
pycocotools makes of the polygons, so nothing is lost for training or for evaluation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from core.config import UserError
from core.data import images

# Names of what can be wrong with a mask, as `check_segmentation` raises them.
NO_MASK, BAD_POLYGON, BAD_RUNS = 'no mask', 'malformed polygon', 'malformed run lengths'


def library():
  """`pycocotools.mask`. Raises `UserError` where it is not installed."""
  try:
    from pycocotools import mask
  except ImportError as e:
    raise UserError("COCO's masks need pycocotools: `pip install -e '.[detection]'`") from e
  return mask


class MaskError(ValueError):
  """A mask that cannot be read; `kind` is one of the names above, the text says why."""

  def __init__(self, kind: str, text: str):
    super().__init__(text)
    self.kind = kind


def encode(segmentation: Any, height: int, width: int) -> bytes:
  """Checks the `segmentation` of an annotation and gives its compressed run lengths.

  Args:
    segmentation: a list of polygons `[x0, y0, x1, y1, ...]` in pixels, or `{'size', 'counts'}`
      with counts as a list of run lengths or compressed to a string.
    height, width: of the image.

  Raises:
    MaskError: there is none, or it is malformed. pycocotools itself would crash or make up a mask.
  """
  mask = library()
  if not segmentation:
    raise MaskError(NO_MASK, 'it has no segmentation')
  if isinstance(segmentation, dict):
    runs, size = segmentation.get('counts'), segmentation.get('size')
    if size != [height, width]:
      raise MaskError(BAD_RUNS, f'size {str(size)[:40]} where the image has [{height}, {width}]')
    counts = _decompress(runs) if isinstance(runs, str) else runs
    if not isinstance(counts, list) or any(type(c) is not int or c < 0 for c in counts):
      raise MaskError(BAD_RUNS, 'counts are not lengths')
    if sum(counts) != height * width:
      raise MaskError(BAD_RUNS, f'counts add up to {sum(counts):,}, not to the image\'s '
                      f'{height * width:,} pixels')
    return mask.frPyObjects({'size': [height, width], 'counts': counts}, height, width)['counts']
  if not isinstance(segmentation, list):
    raise MaskError(BAD_POLYGON, f'segmentation {str(segmentation)[:40]} is neither a list of '
                    'polygons nor run lengths')
  for polygon in segmentation:
    _check_polygon(polygon, height, width)
  return mask.merge(mask.frPyObjects(segmentation, height, width))['counts']


def _check_polygon(polygon: Any, height: int, width: int) -> None:
  if not isinstance(polygon, list) or any(type(v) not in (int, float) for v in polygon):
    raise MaskError(BAD_POLYGON, f'{str(polygon)[:40]} is not a list of numbers')
  if len(polygon) < 6 or len(polygon) % 2:
    raise MaskError(BAD_POLYGON, f'{len(polygon)} numbers; a polygon has at least three pairs')
  # What lies outside is cut off when it is drawn. Far outside is another coordinate system, and
  # would take memory in proportion.
  far = 2 * max(height, width)
  if not all(-far <= v <= far for v in polygon):  # NaN is not between anything.
    raise MaskError(BAD_POLYGON, 'it reaches far beyond the image, or is not finite')


def _decompress(code: str) -> list[int]:
  """Run lengths of COCO's string: six-bit characters, five of them data, low bits first; from the
  fourth number on a difference to the last but one."""
  counts, value, shift = [], 0, 0
  for character in code:
    bits = ord(character) - 48
    if not 0 <= bits < 64:
      raise MaskError(BAD_RUNS, f'counts contain {character!r}')
    value |= (bits & 31) << shift
    shift += 5
    if not bits & 32:
      if bits & 16:
        value -= 1 << shift
      counts.append(value + (counts[-2] if len(counts) > 2 else 0))
      value = shift = 0
  if shift:
    raise MaskError(BAD_RUNS, 'counts end within a number')
  return counts


def draw(codes: Sequence[bytes], numbers: Sequence[int], height: int, width: int) -> np.ndarray:
  """Draws masks into one map, large ones first, so that the smaller of two is on top.

  Args:
    codes: compressed run lengths, as `encode` gives them.
    numbers: what the pixels of each mask get.
    height, width: of the map.

  Returns:
    int32 `[height, width]`; 0 where there is no mask.
  """
  segments = np.zeros((height, width), np.int32, order='F')  # As pycocotools decodes.
  if codes:
    mask = library()
    masks = [{'size': [height, width], 'counts': code} for code in codes]
    for i in np.argsort(-mask.area(masks).astype(np.int64), kind='stable'):
      np.copyto(segments, numbers[i], where=mask.decode(masks[i]).view(bool))
  return np.ascontiguousarray(segments)


def panoptic(png: bytes, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Reads a panoptic picture, whose pixels are segment ids R + 256 G + 65536 B.

  Args:
    png: the encoded picture.
    ids: of the segments; pixels of other ids are nothing's.

  Returns:
    The map int32 `[height, width]`, i + 1 where `ids[i]` is; and boxes float32 `[n, 4]`, xyxy,
    which end at the index of the last pixel (without one more) as those that the reference
    implementation trains panoptic models on. The box of a segment without a pixel is all -1.

  Raises:
    ImageError: not a picture.
  """
  colours = images.decode(png).astype(np.int32)
  found = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
  boxes = np.full((len(ids), 4), -1, np.float32)
  if not len(ids):
    return np.zeros_like(found), boxes
  order = np.argsort(ids)
  ordered = np.asarray(ids, np.int32)[order]
  at = np.minimum(np.searchsorted(ordered, found), len(ids) - 1)
  segments = np.where(ordered[at] == found, order[at] + 1, 0).astype(np.int32)
  for i, place in enumerate(ndimage.find_objects(segments, len(ids))):
    if place is not None:
      rows, columns = place
      boxes[i] = columns.start, rows.start, columns.stop - 1, rows.stop - 1
  return segments, boxes


def split(segments: np.ndarray, count: int) -> list[bytes]:
  """Compressed run lengths of the objects 1 .. count of a map, int32 `[height, width]`."""
  mask = library()
  return [mask.encode(np.asfortranarray(segments == i + 1, np.uint8))['counts']
          for i in range(count)]
