"""Panoptic pictures: masks to one segment a pixel, and how good they are (DETR section 4.4).

An id map is int32 `[height, width]`: every pixel has the id, 0 or more, of one segment of the list
beside it, or is `VOID`, nobody's. That holds for predictions and for ground truth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from core.evaluate import EvalRun
from detection import average_precision

VOID = -1
STRIDE = 4  # Of the mask head's output.

# --- From masks to segments ----------------------------------------------------------------------


def upsample(masks: np.ndarray, padded_size: tuple[int, int],
             image_size: tuple[int, int]) -> np.ndarray:
  """Mask logits as large as the picture the model saw, without its padding.

  Args:
    masks: float32 `[masks, h, w]` of the padded picture.
    padded_size: height and width of the padded picture.
    image_size: height and width of its valid part, top left.

  Returns:
    float32 `[masks, *image_size]`, interpolated bilinearly between pixel centres.

  Raises:
    ValueError: the picture is larger than with its padding.
  """
  (height, width), (valid_height, valid_width) = padded_size, image_size
  if valid_height > height or valid_width > width:
    raise ValueError(f'a picture of {valid_height}x{valid_width} in a padded one of '
                     f'{height}x{width}')
  out = np.empty((len(masks), valid_height, valid_width), np.float32)
  for mask, large in zip(masks, out):
    large[:] = cv2.resize(mask, (int(width), int(height)),
                          interpolation=cv2.INTER_LINEAR)[:valid_height, :valid_width]
  return out


def merge(scores: np.ndarray, labels: np.ndarray, masks: np.ndarray, is_thing: Sequence[bool],
          size: tuple[int, int], threshold: float = .85,
          min_area: int = 4) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """One segment a pixel: the reference implementation's inference.

  Queries that are sure of a class compete for every pixel; those of one kind of stuff become one
  segment. Segments of a few pixels are then dropped and their pixels go to the next best query,
  until there are none. As in the reference implementation stuff is united the first time only: what
  was united away has no pixels, so it is dropped with the small ones.

  Args:
    scores: float `[queries]`, probability of the best class.
    labels: int `[queries]`, class indices; a query whose index is beyond `is_thing` is no object.
    masks: float `[queries, h, w]`, logits of the picture the model saw, without padding.
    is_thing: class index -> whether it is of countable things.
    size: height and width of the original picture, which the segments are of.
    threshold: queries with this score or less are left out.
    min_area: pixels of the original picture; segments as small or smaller are dropped.

  Returns:
    ids: int32 `[*size]`, `VOID` everywhere when no query is left.
    segments: of ids 0, 1, ..: 'id', 'label', 'isthing', 'area' (pixels), 'score'. Each has pixels.
  """
  is_thing = np.asarray(is_thing, bool)
  kept = np.flatnonzero((labels < len(is_thing)) & (scores > threshold))
  rows, columns = (_centres(n, out) for n, out in zip(masks.shape[1:], size))
  # Pixels are picked before they are compared: fewer, and the same as comparing and then picking.
  masks = masks[kept][:, rows[:, None], columns]
  united = np.arange(len(kept))
  for label in np.unique(labels[kept]):
    if not is_thing[label]:
      same = np.flatnonzero(labels[kept] == label)
      united[same] = same[0]
  while len(kept):
    # A softmax over queries changes nothing about which is the highest.
    ids = united[masks.argmax(0)]
    areas = np.bincount(ids.ravel(), minlength=len(kept))
    large = areas > min_area
    if large.all():
      segments = [{'id': i, 'label': int(labels[k]), 'isthing': bool(is_thing[labels[k]]),
                   'area': int(areas[i]), 'score': float(scores[k])} for i, k in enumerate(kept)]
      return ids.astype(np.int32), segments
    kept, masks = kept[large], masks[large]
    united = np.arange(len(kept))
  return np.full(size, VOID, np.int32), []


def _centres(size: int, out: int) -> np.ndarray:
  """Places int `[out]` that Pillow's nearest-neighbour resize of `size` pixels picks.

  Those under the centres of the new pixels. Summed as Pillow sums them, since a centre that falls
  between two pixels goes where the rounding takes it.
  """
  step = size / out
  return np.cumsum(np.concatenate([[step / 2], np.full(out - 1, step)])).astype(np.int64)


def instances(masks: np.ndarray, size: tuple[int, int]) -> list[dict[str, Any]]:
  """Each mask by itself, as COCO's compressed run lengths.

  Args:
    masks: float `[masks, h, w]`, logits of the picture the model saw, without padding.
    size: height and width of the original picture.

  Returns:
    A 'segmentation' for every mask: where its probability is above .5, enlarged or shrunk to `size`
    by the nearest pixel (the floor of its place, which differs from what `merge` does: so does the
    reference implementation).

  Raises:
    UserError: pycocotools is not installed.
  """
  _, _, mask = average_precision.pycocotools()
  rows, columns = (np.arange(out) * n // out for n, out in zip(masks.shape[1:], size))
  inside = masks[:, rows[:, None], columns] > 0
  return mask.encode(np.asfortranarray(inside.transpose(1, 2, 0), np.uint8))


def to_png(ids: np.ndarray) -> np.ndarray:
  """Ids `[h, w]` of 0 to 2^24 - 1 as colours uint8 `[h, w, 3]`: R + 256 G + 65536 B.

  In COCO's panoptic files 0 is nobody's: give `ids + 1`, which makes `VOID` 0.

  Raises:
    ValueError: an id that three bytes do not hold, such as `VOID`.
  """
  if ids.size and not 0 <= ids.min() <= ids.max() < 2 ** 24:
    raise ValueError(f'ids from {ids.min()} to {ids.max()}; a picture holds 0 to {2 ** 24 - 1}')
  return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def from_png(rgb: np.ndarray) -> np.ndarray:
  """Colours uint8 `[h, w, 3]` as ids int32 `[h, w]`: R + 256 G + 65536 B."""
  return rgb.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


# --- How good they are ---------------------------------------------------------------------------


class PanopticQuality:
  """Panoptic quality (Kirillov et al. 2019, section 4), by the rules of COCO's own evaluation.

  A predicted and a true segment of one class match when their IoU is above .5, where the pixels of
  the prediction that the ground truth leaves `VOID` count for nothing. A crowd, a region of many
  things of a class, is neither matched nor missed; an unmatched prediction is forgiven when more
  than half of it is on `VOID` and on crowds of its class.
  """

  def __init__(self, is_thing: Sequence[bool]):
    """`is_thing`: class index -> whether it is of countable things."""
    self._is_thing = np.asarray(is_thing, bool)
    self._iou = np.zeros(len(is_thing))
    self._hits, self._wrong, self._missed = np.zeros((3, len(is_thing)), np.int64)

  def add(self, pred_ids: np.ndarray, pred_segments: Sequence[Mapping[str, Any]],
          gt_ids: np.ndarray, gt_segments: Sequence[Mapping[str, Any]]) -> None:
    """Counts a picture.

    Args:
      pred_ids: the id map predicted, int `[height, width]`.
      pred_segments: its segments, 'id' and 'label'.
      gt_ids: the true one, of the same size.
      gt_segments: its segments, 'id', 'label' and 'crowd'. One without pixels is missed.

    Raises:
      ValueError: maps of different sizes, an id that is not listed or is listed twice, or a
        predicted segment without pixels.
    """
    if pred_ids.shape != gt_ids.shape:
      raise ValueError(f'{pred_ids.shape} predicted for {gt_ids.shape}')
    shape = len(gt_segments) + 1, len(pred_segments) + 1
    pairs = (_places(gt_ids, gt_segments).astype(np.int64) * shape[1]
             + _places(pred_ids, pred_segments))
    pixels = np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    pred_area, gt_area = pixels.sum(0)[1:], pixels.sum(1)[1:]
    on_void, shared = pixels[0, 1:], pixels[1:, 1:]
    if not pred_area.all():
      raise ValueError(f'segment {pred_segments[pred_area.argmin()]["id"]} has no pixels')

    pred_label = np.array([segment['label'] for segment in pred_segments], np.int64)
    gt_label = np.array([segment['label'] for segment in gt_segments], np.int64)
    crowd = np.array([segment['crowd'] for segment in gt_segments], bool)
    same = gt_label[:, None] == pred_label
    # 0 for a crowd or true segment without pixels beside a prediction that is all on VOID.
    union = np.maximum(pred_area - on_void + gt_area[:, None] - shared, 1)
    iou = shared / union
    hit = same & ~crowd[:, None] & (iou > .5)
    forgiven = on_void + np.where(same & crowd[:, None], shared, 0).sum(0)

    np.add.at(self._iou, pred_label[hit.nonzero()[1]], iou[hit])
    np.add.at(self._hits, pred_label[hit.any(0)], 1)
    np.add.at(self._wrong, pred_label[~hit.any(0) & (forgiven / pred_area <= .5)], 1)
    np.add.at(self._missed, gt_label[~hit.any(1) & ~crowd], 1)

  def result(self) -> dict[str, float]:
    """'PQ' = sum of IoU / (matched + wrong / 2 + missed / 2), 'SQ' (mean IoU of the matched), 'RQ'.

    Means over the classes that were seen or predicted, in 0..1; with '_th' of things and with '_st'
    of stuff alone. What no such class is of is left out.
    """
    counted = self._hits + (self._wrong + self._missed) / 2
    values = {}
    for suffix, classes in (('', True), ('_th', self._is_thing), ('_st', ~self._is_thing)):
      seen = (counted > 0) & classes
      if seen.any():
        iou, hits, weight = self._iou[seen], self._hits[seen], counted[seen]
        values[f'PQ{suffix}'] = float(np.mean(iou / weight))
        values[f'SQ{suffix}'] = float(np.mean(iou / np.maximum(hits, 1)))
        values[f'RQ{suffix}'] = float(np.mean(hits / weight))
    return values


def _places(ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Places of ids in a list of segments, from 1; 0 where the map is `VOID`."""
  listed = [segment['id'] for segment in segments]
  known = np.array([VOID, *listed], np.int64)
  if len(np.unique(known)) < len(known):
    raise ValueError(f'ids of segments must differ, and none may be {VOID}: {listed}')
  order = known.argsort()
  found, inverse = np.unique(ids, return_inverse=True)
  places = order[np.searchsorted(known, found, sorter=order).clip(max=len(known) - 1)]
  if (known[places] != found).any():
    raise ValueError(f'id {found[known[places] != found][0]} of the map is not among the segments')
  return places[inverse].reshape(ids.shape)


class Panoptic:
  """Evaluator: panoptic quality of a split, as `PanopticQuality` names it, and AP of its masks.

  The task says what it sees with `segment(params, batch)` -> 'scores' float32 and 'labels' int32
  `[batch, queries]` of the best real class, 'masks' float32 `[batch, queries, h, w]`, logits at a
  stride of 4 of the padded picture, 'image_size' int32 `[batch, 2]`; its `source(split)`, opened
  with masks, knows the ground truth in pixels of the original images. Images that could not be read
  count with nothing found on them.

  'mask_AP' and 'mask_AP50' are of things, every mask for itself before pixels are shared out; they
  are there when all things of the ground truth have a segmentation.
  """

  def __init__(self, split: str, every: str = '', threshold: float = .85, least: float = .05):
    """`threshold`: of `merge`; from .5 on, what passes is likelier than 'no object', as the
    reference implementation also asks. `least`: masks with this score or less do not enter the AP,
    which saves time."""
    self.split, self.every = split, every
    self.threshold, self.least = threshold, least
    self._truth = None  # Read once: it may take reading the whole split.

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    task = run.plan.task
    source = task.source(self.split)
    is_thing = np.asarray(source.is_thing, bool)
    quality = PanopticQuality(is_thing)
    self._truth = self._truth or source.coco()
    things = _things(source, self._truth)
    results, unread = [], set(range(len(source)))
    for rows in run.map(task.segment, params, self.split):
      padded = tuple(STRIDE * n for n in rows['masks'].shape[2:])
      for index, scores, labels, masks, image_size in zip(
          rows['index'], rows['scores'], rows['labels'], rows['masks'], rows['image_size']):
        size = tuple(source.sizes[index].tolist())
        for_ap = (scores > self.least) & is_thing[labels] & (things is not None)
        some = np.flatnonzero(for_ap | (scores > self.threshold))
        scores, labels, for_ap = scores[some], labels[some], for_ap[some]
        masks = upsample(masks[some], padded, image_size)
        found = merge(scores, labels, masks, is_thing, size, self.threshold)
        quality.add(*found, *_truth(source, index))
        if for_ap.any():
          results += [
              {'image_id': int(source.image_ids[index]), 'score': float(score),
               'category_id': int(source.class_ids[label]), 'segmentation': segmentation}
              for score, label, segmentation in zip(scores[for_ap], labels[for_ap],
                                                    instances(masks[for_ap], size))]
        unread.discard(int(index))
    for index in sorted(unread):
      quality.add(np.full(tuple(source.sizes[index]), VOID, np.int32), [], *_truth(source, index))
    values = quality.result()
    if things is not None:
      precision = average_precision.coco_ap(things, results, 'segm')
      values |= {f'mask_{name}': precision[name] for name in ('AP', 'AP50') if name in precision}
    return values


def _truth(source, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """The id map and the segments of an image; a pixel of object i is i + 1 in its source."""
  target = source.target(int(index))
  segments = [{'id': i, 'label': int(label), 'crowd': bool(crowd)}
              for i, (label, crowd) in enumerate(zip(target['labels'], target['crowd']))]
  return target['segments'] - 1, segments


def _things(source, truth: dict[str, Any]) -> dict[str, Any] | None:
  """Of the COCO data set of a source what is of things; None where their masks are not known."""
  ids = {source.class_ids[i] for i in np.flatnonzero(source.is_thing)}
  annotations = [a for a in truth['annotations'] if a['category_id'] in ids]
  if not annotations or not all(a.get('segmentation') for a in annotations):
    return None
  return {'images': truth['images'], 'annotations': annotations,
          'categories': [c for c in truth['categories'] if c['id'] in ids]}
