"""COCO's average precision of boxes and masks, and non-maximum suppression, on the host.

The numbers are pycocotools'; what is here hands it predictions and ground truth that are in memory
already (DETR table 1). Suppression is for the ablation that shows how little DETR needs it (section
4.2, figure 4).
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.config import UserError
from core.evaluate import EvalRun

# In the order in which pycocotools gives them.
_STATISTICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm',
               'ARl')


class Detection:
  """Evaluator: average precision of the boxes of a split, as `coco_ap` names it.

  The task says what it sees with `detect(params, batch)` -> 'boxes' float32 `[batch, queries, 4]`,
  xyxy relative to the image, 'scores' float32 and 'labels' int32 `[batch, queries]`; its
  `source(split)` knows the ground truth in pixels of the original images. Images that could not be
  read count with nothing found on them. `config.eval.nms` is the overlap above which the lesser of
  two boxes of a class is dropped; without it, or at 0, none is: the set loss leaves no duplicates.
  """

  def __init__(self, split: str, every: str = ''):
    self.split, self.every = split, every
    self._truth = None  # Read once: it may take reading the whole split.

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    task = run.plan.task
    source = task.source(self.split)
    threshold = task.config.eval.get('nms', 0.)
    if not 0 <= threshold <= 1:
      raise UserError(f'config.eval.nms={threshold}; it must be between 0 (off) and 1')
    results = []
    for rows in run.map(task.detect, params, self.split):
      for index, boxes, scores, labels in zip(rows['index'], rows['boxes'], rows['scores'],
                                              rows['labels']):
        height, width = source.sizes[index]
        boxes = boxes.astype(np.float64) * (width, height, width, height)
        if threshold:
          kept = nms(boxes, scores, labels, threshold)
          boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        results += results_of(source.image_ids[index], boxes, scores, labels, source.class_ids)
    self._truth = self._truth or source.coco()
    return coco_ap(self._truth, results)


def results_of(image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray,
               class_ids: Sequence[int]) -> list[dict[str, Any]]:
  """Detections of an image in COCO's format for results.

  Args:
    image_id: COCO's.
    boxes: float `[queries, 4]`, xyxy in pixels of the original image.
    scores: float `[queries]`.
    labels: int `[queries]`, class indices.
    class_ids: class index -> COCO's category id, negative for an index that no category has.

  Returns:
    Records of 'image_id', 'category_id', 'bbox' (x, y, width, height; not rounded) and 'score', in
    the order given, without those whose class is beyond `class_ids` or no category.
  """
  boxes = np.asarray(boxes, np.float64)
  corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
  return [{'image_id': int(image_id), 'category_id': int(class_ids[label]), 'bbox': box,
           'score': float(score)}
          for box, score, label in zip(corners, scores, labels, strict=True)
          if label < len(class_ids) and class_ids[label] >= 0]


def coco_ap(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]] | np.ndarray,
            kind: str = 'bbox', per_class: bool = False) -> dict[str, float]:
  """COCO's twelve numbers: averages over classes, in 0..1.

  Args:
    ground_truth: a COCO data set, 'images', 'annotations' (with 'area' and 'iscrowd'; with
      'segmentation' for masks) and 'categories'. It is not changed, and ids may be any.
    results: records as `results_of` gives them, with 'segmentation' (compressed run lengths) for
      masks; or, of boxes, float `[n, 7]`: image id, x, y, width, height, score, category id.
      Those of categories that the ground truth does not list are ignored.
    kind: what overlap is measured of, 'bbox' or 'segm'.
    per_class: adds 'AP/<name of the category>'.

  Returns:
    'AP' (over overlaps .50 to .95), 'AP50', 'AP75', 'APs', 'APm', 'APl' (areas below 32^2, to 96^2
    and above, in pixels of the original image); 'AR1', 'AR10', 'AR100' (recall by the number of
    detections an image), 'ARs', 'ARm', 'ARl'. What has no ground truth is left out.

  Raises:
    UserError: pycocotools is not installed.
    ValueError: another kind, or results of an image that is not in the ground truth.
  """
  if kind not in ('bbox', 'segm'):
    raise ValueError(f"kind is {kind!r}; it must be 'bbox' or 'segm'")
  coco, evaluation, mask = pycocotools()
  if isinstance(results, np.ndarray):
    results = [{'image_id': int(row[0]), 'bbox': row[1:5].tolist(), 'score': float(row[5]),
                'category_id': int(row[6])} for row in results]
  strange = ({result['image_id'] for result in results}
             - {image['id'] for image in ground_truth['images']})
  if strange:
    raise ValueError(f'{len(strange)} images of the results are not in the ground truth, such as '
                     f'{min(strange)}')
  # pycocotools takes a match with annotation 0 for none, so both sides are numbered from 1. It
  # writes into the records it is given.
  truth = [{**annotation, 'id': i} for i, annotation in enumerate(ground_truth['annotations'], 1)]
  found = [{**result, 'id': i} for i, result in enumerate(results, 1)]
  for record in found:
    record['area'] = (record['bbox'][2] * record['bbox'][3] if kind == 'bbox'
                      else float(mask.area(record['segmentation'])))
  with contextlib.redirect_stdout(io.StringIO()):
    sides = []
    for annotations in (truth, found):
      sides.append(coco())
      sides[-1].dataset = {**ground_truth, 'annotations': annotations}
      sides[-1].createIndex()
    measured = evaluation(*sides, kind)
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
  values = dict(zip(_STATISTICS, measured.stats))
  if per_class:
    names = {category['id']: category['name'] for category in ground_truth['categories']}
    precision = measured.eval['precision'][..., 0, -1]  # Overlap, recall, class.
    values |= {f'AP/{names[i]}': precision[..., k].mean()
               for k, i in enumerate(measured.params.catIds)}
  return {name: float(value) for name, value in values.items() if value > -1}


def pycocotools():
  """Its COCO, COCOeval and mask module; `UserError` where it is not installed."""
  try:
    from pycocotools import coco, cocoeval, mask
  except ImportError as e:
    raise UserError("COCO's average precision needs pycocotools: "
                    "pip install -e '.[detection]'") from e
  return coco.COCO, cocoeval.COCOeval, mask


def nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray,
        threshold: float) -> np.ndarray:
  """Greedy non-maximum suppression within each class.

  Args:
    boxes: float `[n, 4]`, xyxy.
    scores: float `[n]`.
    labels: int `[n]`.
    threshold: a box is dropped whose IoU with a better one of its class, itself kept, is above it.

  Returns:
    int `[kept]`, places of the kept boxes, best first; of equal scores the earlier comes first.
  """
  boxes = np.asarray(boxes, np.float64)
  low = np.maximum(boxes[:, None, :2], boxes[:, :2])
  high = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
  shared = np.maximum(high - low, 0).prod(-1)
  area = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1)
  # Not divided by the union, which is 0 for two boxes without area.
  rivals = shared > threshold * (area[:, None] + area - shared)
  rivals &= labels[:, None] == labels
  dropped = np.zeros(len(boxes), bool)
  kept = []
  for i in np.argsort(-scores, kind='stable'):
    if not dropped[i]:
      kept.append(i)
      dropped |= rivals[i]
  return np.array(kept, np.int64)
