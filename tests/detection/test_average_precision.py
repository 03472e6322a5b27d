"""Average precision: cases worked by hand, and the whole of it done again in plain loops."""

import copy
import sys
import types

import ml_collections
import numpy as np
import pytest

from core.config import UserError
from detection import average_precision

CLASS_IDS = [7, 3, 90]  # Neither contiguous nor in order.


def truth_of(objects, images=2):
  """A COCO data set of `(image, class, x, y, width, height[, crowd])`; annotations count from 0."""
  annotations = [
      {'id': i, 'image_id': image, 'category_id': CLASS_IDS[label], 'bbox': [x, y, w, h],
       'area': w * h, 'iscrowd': int(any(crowd)),
       'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]]}
      for i, (image, label, x, y, w, h, *crowd) in enumerate(objects)]
  return {'images': [{'id': i, 'height': 200, 'width': 200} for i in range(images)],
          'annotations': annotations,
          'categories': [{'id': c, 'name': f'n{c}'} for c in CLASS_IDS]}


def found(*rows):
  """Results of `(image, class, score, x, y, width, height)`."""
  return [{'image_id': image, 'category_id': CLASS_IDS[label], 'score': score,
           'bbox': [x, y, w, h]} for image, label, score, x, y, w, h in rows]


def masks_of(results):
  """The same results with masks that fill their boxes."""
  inside = np.zeros((200, 200, len(results)), np.uint8, order='F')
  for i, (x, y, w, h) in enumerate(result['bbox'] for result in results):
    inside[y:y + h, x:x + w, i] = 1
  masks = average_precision.pycocotools()[2].encode(inside)
  return [{k: v for k, v in result.items() if k != 'bbox'} | {'segmentation': mask}
          for result, mask in zip(results, masks)]


def test_precision_and_recall_worked_by_hand():
  """Right, wrong, right: precision is 1 up to recall 1/2, and 2/3 from there to recall 1. Of the
  101 recalls, 0 to .50 are 51."""
  truth = truth_of([(0, 0, 0, 0, 100, 100), (0, 0, 100, 100, 100, 100)])
  values = average_precision.coco_ap(truth, found(
      (0, 0, .9, 0, 0, 100, 100), (0, 0, .8, 100, 0, 100, 100), (0, 0, .7, 100, 100, 100, 100)))
  by_hand = (51 + 50 * 2 / 3) / 101
  # All objects are large, so nothing is said of small and medium ones.
  assert values == pytest.approx({
      'AP': by_hand, 'AP50': by_hand, 'AP75': by_hand, 'APl': by_hand,
      'AR1': .5, 'AR10': 1, 'AR100': 1, 'ARl': 1})


def test_overlap_decides_how_many_thresholds_are_met():
  """An IoU of .72 is enough for .50, .55, .60, .65 and .70, five of ten."""
  truth = truth_of([(0, 0, 0, 0, 100, 100)])
  values = average_precision.coco_ap(truth, found((0, 0, .9, 0, 0, 72, 100)))
  assert [values[k] for k in ('AP', 'AP50', 'AP75')] == pytest.approx([.5, 1, 0])
  # Masks of the same shapes: an annotation is a polygon, a result run lengths.
  assert average_precision.coco_ap(truth, masks_of(found((0, 0, .9, 0, 0, 72, 100))),
                                   'segm') == pytest.approx(values)


def test_wrong_detections_count_among_those_of_their_size():
  """An object of 32 x 32, both small and medium; surer and wrong, a large and a small detection."""
  truth = truth_of([(0, 0, 0, 0, 32, 32)])
  results = found((0, 0, .9, 50, 50, 97, 97), (0, 0, .8, 50, 0, 10, 10), (0, 0, .7, 0, 0, 32, 32))
  for kind, given in (('bbox', results), ('segm', masks_of(results))):
    values = average_precision.coco_ap(truth, given, kind)
    assert [values[k] for k in ('AP', 'APs', 'APm')] == pytest.approx([1 / 3, 1 / 2, 1]), kind
    assert 'APl' not in values


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
  objects = [(0, 0, 0, 0, 40, 40), (0, 0, 100, 100, 100, 100, True)]
  # Two detections in the crowd, surer than the right one; an overlap is measured of their own area.
  results = found((0, 0, .9, 110, 110, 20, 20), (0, 0, .8, 150, 150, 20, 20),
                  (0, 0, .7, 0, 0, 40, 40))
  assert average_precision.coco_ap(truth_of(objects), results)['AP'] == pytest.approx(1)
  # Without the crowd they are wrong: precision 1/3 at every recall.
  assert average_precision.coco_ap(truth_of(objects[:1]), results)['AP'] == pytest.approx(1 / 3)


def test_equal_scores_stay_in_order():
  """By image, then as given: whether the right one of two comes first is precision 1 or 1/2."""
  right, wrong = (0, 0, 50, 50), (100, 100, 50, 50)
  for image, precision in ((0, 1), (1, .5)):
    truth = truth_of([(image, 0, *right)])
    results = found((image, 0, .5, *right), (1 - image, 0, .5, *wrong))
    assert average_precision.coco_ap(truth, results)['AP'] == pytest.approx(precision)
    assert average_precision.coco_ap(truth, results[::-1])['AP'] == pytest.approx(precision)
  truth = truth_of([(0, 0, *right)])
  both = found((0, 0, .5, *right), (0, 0, .5, *wrong))
  assert average_precision.coco_ap(truth, both)['AP'] == pytest.approx(1)
  assert average_precision.coco_ap(truth, both[::-1])['AP'] == pytest.approx(.5)


# --- The same again in plain loops ---------------------------------------------------------------


def iou(a, b, crowd):
  """Of x, y, width, height."""
  across = max(min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]), 0)
  down = max(min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]), 0)
  own = a[2] * a[3]
  return across * down / (own if crowd else own + b[2] * b[3] - across * down)


def slow_ap(truth, results, threshold):
  """Mean over classes of the area under interpolated precision, of objects of all sizes."""
  by_class = []
  for category in (c['id'] for c in truth['categories']):
    marks, positives = [], 0  # (score, right), those that count.
    for image in truth['images']:
      here = lambda x: x['image_id'] == image['id'] and x['category_id'] == category
      objects = sorted(filter(here, truth['annotations']), key=lambda a: a['iscrowd'])
      positives += sum(not a['iscrowd'] for a in objects)
      taken = set()
      for result in sorted(filter(here, results), key=lambda r: -r['score'])[:100]:
        best, match = threshold, None
        for i, a in enumerate(objects):
          if i in taken or (a['iscrowd'] and match is not None
                            and not objects[match]['iscrowd']):
            continue
          overlap = iou(result['bbox'], a['bbox'], a['iscrowd'])
          if overlap >= best:
            best, match = overlap, i
        if match is None or not objects[match]['iscrowd']:
          marks.append((result['score'], match is not None))
          taken.add(match)
    if not positives:
      continue
    marks.sort(key=lambda m: -m[0])
    right = np.cumsum([m[1] for m in marks])
    recall, precision = right / positives, right / np.arange(1, len(marks) + 1)
    by_class.append(np.mean([max(precision[recall >= r], default=0)
                             for r in np.linspace(0, 1, 101)]))
  return np.mean(by_class)


def random_case(seed):
  """Objects on six images and detections near many of them, as a model gives them."""
  rng = np.random.default_rng(seed)
  objects = [(int(rng.integers(6)), int(rng.integers(3)), *rng.integers(0, 120, 2).tolist(),
              *rng.integers(8, 60, 2).tolist(), rng.random() < .15) for _ in range(40)]
  truth = truth_of(objects, images=6)
  results = []
  for image in range(6):
    near = [(label, x, y, w, h) for i, label, x, y, w, h, _ in objects if i == image]
    near = np.array(near * 2 + [(0, 5, 5, 30, 30)] * 4, np.float64)
    boxes = near[:, 1:] + rng.normal(0, 4, (len(near), 4)) * (rng.random((len(near), 1)) < .8)
    labels = np.where(rng.random(len(near)) < .9, near[:, 0], 1).astype(int)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    results += average_precision.results_of(image, boxes, rng.random(len(near)), labels, CLASS_IDS)
  return truth, results


@pytest.mark.parametrize('seed', range(3))
def test_equals_plain_loops(seed):
  truth, results = random_case(seed)
  values = average_precision.coco_ap(truth, results)
  steps = [slow_ap(truth, results, t) for t in np.linspace(.5, .95, 10)]
  assert .2 < steps[0] < .95 and .05 < np.mean(steps) < steps[0] - .1  # A case that says something.
  assert values['AP50'] == pytest.approx(steps[0], abs=1e-9)
  assert values['AP75'] == pytest.approx(steps[5], abs=1e-9)
  assert values['AP'] == pytest.approx(np.mean(steps), abs=1e-9)


def test_the_truth_itself_scores_1_whatever_its_ids():
  truth, _ = random_case(0)
  results = [{k: a[k] for k in ('image_id', 'category_id', 'bbox')} | {'score': .5}
             for a in truth['annotations'] if not a['iscrowd']]
  values = average_precision.coco_ap(truth, results)
  for name in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'AR100'):
    assert values[name] == pytest.approx(1), name


def test_leaves_its_arguments_alone_and_says_nothing(capsys):
  truth, results = random_case(1)
  before = copy.deepcopy((truth, results))
  average_precision.coco_ap(truth, results)
  assert (truth, results) == before and capsys.readouterr().out == ''


def test_arrays_and_classes():
  truth, results = random_case(2)
  rows = np.array([[r['image_id'], *r['bbox'], r['score'], r['category_id']] for r in results])
  by_class = average_precision.coco_ap(truth, rows, per_class=True)
  names = [f'AP/n{c}' for c in CLASS_IDS]
  assert np.mean([by_class.pop(name) for name in names]) == pytest.approx(by_class['AP'])
  assert by_class == average_precision.coco_ap(truth, results)
  # A class nobody has is left out, and the one with the box is right.
  one = average_precision.coco_ap(truth_of([(0, 1, 0, 0, 9, 9)]), found((0, 1, .9, 0, 0, 9, 9)),
                                  per_class=True)
  assert one['AP/n3'] == pytest.approx(1) and not {'AP/n7', 'AP/n90'} & one.keys()


def test_nothing_found_and_nothing_to_find():
  values = average_precision.coco_ap(truth_of([(0, 0, 0, 0, 10, 10)]), [])
  assert values == dict.fromkeys(
      ('AP', 'AP50', 'AP75', 'APs', 'AR1', 'AR10', 'AR100', 'ARs'), 0.)
  results = found((0, 0, .9, 0, 0, 10, 10))
  assert average_precision.coco_ap(truth_of([]), results) == {}
  assert average_precision.coco_ap(truth_of([], images=0) | {'categories': []}, []) == {}
  assert average_precision.coco_ap(truth_of([(0, 0, 0, 0, 10, 10, True)]), results) == {}


def test_errors(monkeypatch):
  truth = truth_of([(0, 0, 0, 0, 10, 10)])
  with pytest.raises(ValueError, match='1 images of the results .* such as 5'):
    average_precision.coco_ap(truth, found((5, 0, .9, 0, 0, 10, 10)))
  with pytest.raises(ValueError, match="'boxes'"):
    average_precision.coco_ap(truth, [], 'boxes')
  monkeypatch.setitem(sys.modules, 'pycocotools', None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[detection\]'"):
    average_precision.coco_ap(truth, [])


def test_results_in_coco_s_format():
  boxes = np.array([[1.126, 2, 4, 8], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 2]])
  results = average_precision.results_of(
      np.int64(139), boxes, np.float32([.5, .6, .7, .25]), np.array([2, 1, 4, 0]), [5, -1, 8, 9])
  # Class 1 is no category and 4 is beyond the list.
  assert results == [
      {'image_id': 139, 'category_id': 8, 'bbox': pytest.approx([1.126, 2, 2.874, 6]), 'score': .5},
      {'image_id': 139, 'category_id': 5, 'bbox': [0, 0, 2, 2], 'score': .25}]
  assert all(type(r[k]) is int for r in results for k in ('image_id', 'category_id'))


def test_suppression_by_hand():
  """IoU of neighbours 10 wide and 2 apart is 8/12, 4 apart 6/14."""
  boxes = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10], [2, 0, 12, 10], [50, 0, 50, 9]])
  scores, labels = np.array([.5, .9, .8, .7, .9]), np.array([0, 0, 0, 1, 0])
  keep = lambda threshold: average_precision.nms(boxes, scores, labels, threshold).tolist()
  # Box 1 drops 0 and 2; 3 is of another class, 4 far away; of equal scores the earlier is first.
  assert keep(.5) == [1, 4, 3]
  assert keep(.7) == [1, 4, 2, 3, 0]
  # Box 2 is before 1 and drops it, but not 0; and 1, which is gone, drops nothing.
  scores[1] = .6
  assert keep(.5) == [4, 2, 3, 0]
  far = np.arange(50)[:, None] * 9 + [0, 0, 5, 5]
  assert average_precision.nms(far, np.tile([.5, .9], 25), np.zeros(50), .5).tolist() == [
      *range(1, 50, 2), *range(0, 50, 2)]
  assert average_precision.nms(boxes[:0], scores[:0], labels[:0], .5).tolist() == []


# --- The evaluator -------------------------------------------------------------------------------


class FakeRun:
  """What the evaluator asks of a run. Batches have an order of their own; an image is missing."""

  def __init__(self, nms=None):
    self.read = 0
    config = ml_collections.ConfigDict({'eval': {} if nms is None else {'nms': nms}})
    truth = truth_of([(10, 0, 0, 0, 40, 100), (11, 0, 50, 0, 50, 50), (12, 0, 0, 0, 9, 9)])
    truth['images'] = [{'id': i} for i in (10, 11, 12)]
    source = types.SimpleNamespace(
        sizes=np.array([[100, 40], [200, 100], [9, 9]], np.int32), class_ids=CLASS_IDS,
        image_ids=np.array([10, 11, 12]),
        coco=lambda: setattr(self, 'read', self.read + 1) or truth)
    self.plan = types.SimpleNamespace(task=types.SimpleNamespace(
        config=config, detect='detect', source={'validation': source}.__getitem__))

  def map(self, fn, params, split):
    assert (fn, params, split) == ('detect', 'params', 'validation')
    row = lambda index, *boxes: {
        'index': np.int32([index]), 'boxes': np.float32([boxes]),
        'scores': np.float32([[.9, .8]]), 'labels': np.int32([[0, 0]])}
    # Of width 100 and height 200: 50, 0, 100, 50. Then of width 40 and height 100, twice all of it.
    yield row(1, [.5, 0, 1, .25], [.5, 0, 1, .25])
    yield row(0, [0, 0, 1, 1], [0, 0, 1, 1])


def test_evaluator_turns_relative_boxes_into_pixels():
  """Of three objects two are found; of the third no image was seen. Without suppression the second
  boxes are wrong but come after the right ones."""
  run, evaluator = FakeRun(), average_precision.Detection('validation')
  values = evaluator(run, 'params', 0)
  # Recall 2/3 at precision 1: the recalls 0 to .66 are 67.
  assert values['AP'] == pytest.approx(67 / 101)
  assert values['AR1'] == pytest.approx(2 / 3) and values['APs'] == 0
  assert evaluator(run, 'params', 1) == values and run.read == 1


def test_evaluator_suppresses_when_asked(monkeypatch):
  counts = []
  coco_ap = average_precision.coco_ap
  monkeypatch.setattr(average_precision, 'coco_ap',
                      lambda truth, results: counts.append(len(results)) or coco_ap(truth, results))
  for nms in (0., .7):
    average_precision.Detection('validation')(FakeRun(nms), 'params', 0)
  assert counts == [4, 2]
  with pytest.raises(UserError, match=r'config\.eval\.nms=70'):
    average_precision.Detection('validation')(FakeRun(70), 'params', 0)
