"""Panoptic pictures: cases worked by hand, and the metric done again with dictionaries."""

import collections
import types

import numpy as np
import pytest
from PIL import Image

from detection import average_precision, panoptic
from detection.panoptic import VOID

IS_THING = [True, True, False, False]

# --- From masks to segments ----------------------------------------------------------------------


def bilinear(size, out):
  """float64 `[out, size]`: between centres, the ends held."""
  at = np.clip((np.arange(out) + .5) * size / out - .5, 0, size - 1)
  return np.maximum(1 - abs(at[:, None] - np.arange(size)), 0)


def test_upsample_interpolates_between_centres_and_crops():
  masks = np.random.default_rng(0).normal(0, 5, (3, 6, 9)).astype(np.float32)
  out = panoptic.upsample(masks, (24, 36), (23, 30))
  assert out.shape == (3, 23, 30) and out.dtype == np.float32
  expected = bilinear(6, 24) @ masks.astype(np.float64) @ bilinear(9, 36).T
  np.testing.assert_allclose(out, expected[:, :23, :30], atol=1e-5)
  assert panoptic.upsample(masks[:0], (24, 36), (23, 30)).shape == (0, 23, 30)
  with pytest.raises(ValueError, match='25x30 in a padded one of 24x36'):
    panoptic.upsample(masks, (24, 36), (25, 30))


def merged(scores, labels, rows, size=None, **kwargs):
  """`merge` of masks one pixel high."""
  masks = np.float32(rows)[:, None]
  return panoptic.merge(np.array(scores), np.array(labels), masks, IS_THING,
                        size or masks.shape[1:], **kwargs)


def test_only_sure_queries_compete():
  """The threshold itself is too little, class 4 is no object, and the highest logit wins."""
  row = lambda left, right: [left] * 6 + [right] * 5
  ids, segments = merged([.9, .99, .85, .999], [0, 2, 1, 4],
                         [row(-2, -1), row(-3, 0), row(9, 9), row(9, 9)])
  assert ids.tolist() == [[0] * 6 + [1] * 5] and ids.dtype == np.int32
  assert segments == [
      {'id': 0, 'label': 0, 'isthing': True, 'area': 6, 'score': .9},
      {'id': 1, 'label': 2, 'isthing': False, 'area': 5, 'score': .99}]


def test_stuff_is_united_and_things_are_not():
  """Of two queries of class 2 and two of class 0, the second of class 2 leads nowhere."""
  rows = np.eye(4)[[0] * 5 + [2] * 5 + [3] * 5].T
  ids, segments = merged([.9] * 4, [2, 2, 0, 0], rows)
  assert ids.tolist() == [[0] * 5 + [1] * 5 + [2] * 5]
  assert [s['label'] for s in segments] == [2, 0, 0]


def test_united_stuff_loses_its_second_query_and_its_pixels_to_the_next_best():
  """In the left half query 0 leads; in the right half 1, then 2, then 0. Queries 0 and 1 are of one
  kind of stuff: united they have everything, and 1 and 2 nothing. Both go, and all is 0's. But a
  thing with columns of its own stays, and takes those that 1 led and it was second in."""
  rows = [[5] * 8 + [1] * 8, [0] * 8 + [4] * 8, [-5] * 8 + [2] * 8]
  ids, segments = merged([.9] * 3, [2, 2, 0], rows)
  assert ids.tolist() == [[0] * 16] and [s['label'] for s in segments] == [2]
  ids, segments = merged([.9] * 3, [2, 2, 0], [r + [v] * 6 for r, v in zip(rows, (0, 0, 3))])
  assert ids.tolist() == [[0] * 8 + [1] * 14]
  assert [(s['label'], s['area']) for s in segments] == [(2, 8), (0, 14)]


def test_small_segments_go_until_there_are_none():
  """Query 2 has 4 pixels and is dropped; query 1, with 5, stays and gets them."""
  rows = [[9] * 7 + [0] * 9, [0] * 7 + [5] * 5 + [1] * 4, [0] * 12 + [8] * 4]
  ids, segments = merged([.9] * 3, [0, 0, 1], rows)
  assert ids.tolist() == [[0] * 7 + [1] * 9] and [s['area'] for s in segments] == [7, 9]
  assert [s['area'] for s in merged([.9] * 3, [0, 0, 1], rows, min_area=3)[1]] == [7, 5, 4]
  # When every one is small, or none is sure, everything is nobody's.
  for scores in ([.9] * 3, [.1] * 3):
    ids, segments = merged(scores, [0, 0, 1], [r[5:9] for r in rows])
    assert (ids == VOID).all() and ids.shape == (1, 4) and segments == []


@pytest.mark.parametrize('size, out', [((9, 7), (5, 13)), ((24, 36), (9, 27)), ((4, 6), (6, 4)),
                                       ((3, 41), (7, 15))])
def test_the_id_map_is_resized_as_pillow_does(size, out):
  ids = np.random.default_rng(0).integers(0, 9, size).astype(np.int32)
  masks = (ids == np.arange(9)[:, None, None]).astype(np.float32)
  found, _ = panoptic.merge(np.ones(9), np.zeros(9, int), masks, IS_THING, out, min_area=-1)
  np.testing.assert_array_equal(
      found, np.asarray(Image.fromarray(ids).resize(out[::-1], Image.NEAREST)))


def test_instances_are_the_likelier_half_at_the_floor_of_their_place():
  """From 3 pixels to 2: of 0 and 1.5 the floors are 0 and 1. `merge` has .75 and 2.25: 0 and 2."""
  masks = np.float32([[[1, -1, 1]], [[-1, 1, -1]], [[0, 1e-3, 0]]])
  decode = average_precision.pycocotools()[2].decode
  found = [decode(s).tolist() for s in panoptic.instances(masks, (1, 2))]
  assert found == [[[1, 0]], [[0, 1]], [[0, 1]]]
  assert decode(panoptic.instances(masks, (2, 6))[0]).tolist() == [[1, 1, 0, 0, 1, 1]] * 2


def test_colours_of_ids():
  ids = np.array([[0, 255, 256], [1 + 2 * 256 + 3 * 65536, 2 ** 24 - 1, 65536]], np.int32)
  rgb = panoptic.to_png(ids)
  assert rgb.dtype == np.uint8 and rgb.tolist() == [
      [[0, 0, 0], [255, 0, 0], [0, 1, 0]], [[1, 2, 3], [255] * 3, [0, 0, 1]]]
  np.testing.assert_array_equal(panoptic.from_png(rgb), ids)
  for wrong in (VOID, 2 ** 24):
    with pytest.raises(ValueError, match=f'ids from {wrong} to {wrong}'):
      panoptic.to_png(np.array([[wrong]]))


# --- How good they are ---------------------------------------------------------------------------


def picture(*segments, void=0):
  """An id map and its segments from `(label, pixels[, crowd])` side by side, `void` at the end."""
  ids = np.concatenate([np.repeat(np.arange(10, 10 + len(segments)), [s[1] for s in segments]),
                        np.full(void, VOID)])
  return ids[None].astype(np.int32), [{'id': 10 + i, 'label': s[0], 'crowd': any(s[2:])}
                                      for i, s in enumerate(segments)]


def quality(*pairs):
  measured = panoptic.PanopticQuality(IS_THING)
  for prediction, truth in pairs:
    measured.add(*prediction, *truth)
  return measured.result()


def everything(pq, sq, rq, group):
  return {f'{name}{suffix}': pytest.approx(value) for suffix in ('', group)
          for name, value in (('PQ', pq), ('SQ', sq), ('RQ', rq))}


def test_perfect():
  both = picture((0, 5), (0, 3), (2, 8), void=4)
  assert quality((both, both)) == everything(1, 1, 1, '_th') | everything(1, 1, 1, '_st')


def test_wrong_class_is_wrong_once_and_missed_once():
  """Class 0 is missed and 1 is wrong, so two classes have 0; stuff is right: the mean is 1/3."""
  values = quality((picture((1, 5), (2, 8)), picture((0, 5), (2, 8))))
  assert values == everything(0, 0, 0, '_th') | everything(1, 1, 1, '_st') | {
      name: pytest.approx(1 / 3) for name in ('PQ', 'SQ', 'RQ')}


def test_split_segment():
  """6 of 10 pixels are one segment: matched with IoU .6. The other 4 are wrong: .6 / 1.5 = .4."""
  assert quality((picture((0, 6), (0, 4)), picture((0, 10)))) == everything(.4, .6, 2 / 3, '_th')


def test_half_is_not_a_match():
  """10 of 20 pixels: IoU exactly .5, so missed and wrong. One pixel more: 11 / 20 is matched, and
  the stuff beside it is wrong."""
  assert quality((picture((0, 20)), picture((0, 10), (2, 10))))['PQ_th'] == 0
  assert quality((picture((0, 11), (2, 9)), picture((0, 20))))['PQ_th'] == pytest.approx(.55)


def test_void_counts_for_nothing():
  """6 of a prediction's 10 pixels are on a segment of 6, the rest on void: IoU 6 / 6."""
  assert quality((picture((0, 10)), picture((0, 6), void=4))) == everything(1, 1, 1, '_th')
  # On another class by 4 and on void by 6, which is more than half: forgiven, and the stuff missed.
  values = quality((picture((0, 10)), picture((2, 4), void=6)))
  assert values == everything(0, 0, 0, '_st')
  # By 5 of 10, which is not: wrong.
  assert quality((picture((0, 10)), picture((2, 5), void=5)))['PQ_th'] == 0
  # What the prediction leaves void is missed.
  values = quality((picture((0, 6), void=4), picture((0, 6), (2, 4))))
  assert (values['PQ_th'], values['PQ_st']) == (1, 0)


def test_crowds_forgive_their_own_class_and_are_never_missed():
  beside = (2, 4), (2, 4)  # Stuff of 4 pixels, missed or right.
  for label, crowd, void, forgiven in ((0, 6, 0, True), (1, 6, 0, False), (0, 3, 3, True),
                                       (0, 5, 0, False), (0, 3, 2, False)):
    truth = picture(beside[0], (2, 10 - crowd - void), (label, crowd, True), void=void)
    values = quality((picture(beside[1], (0, 10)), truth))
    # A crowd has no part in the result even where a prediction is exactly it.
    assert ('PQ_th' not in values) == forgiven, (label, crowd, void)
    assert forgiven or values['PQ_th'] == 0
  exact = picture((0, 10, True), (2, 4))
  assert quality((exact, exact)) == everything(1, 1, 1, '_st')


def test_pictures_add_up_and_nothing_seen_is_nothing_said():
  """Of class 0: IoU 1 and .6, one missed, one wrong: 1.6 / (2 + 1)."""
  perfect = picture((0, 10))
  values = quality((perfect, perfect), (picture((0, 6), (0, 4)), perfect),
                   (picture(void=10), perfect))
  assert values == everything(1.6 / 3, .8, 2 / 3, '_th')
  assert quality((picture(void=3), picture(void=3))) == {}


def slow_quality(pairs):
  """The metric with dictionaries, one pixel and one pair of segments after the other."""
  iou, hits, wrong, missed = (collections.Counter() for _ in range(4))
  for (pred_ids, pred), (gt_ids, gt) in pairs:
    shared, pred_area, gt_area = (collections.Counter() for _ in range(3))
    for p, g in zip(pred_ids.ravel().tolist(), gt_ids.ravel().tolist()):
      shared[p, g] += 1
      pred_area[p] += 1
      gt_area[g] += 1
    matched = set()
    for p in pred:
      for g in gt:
        both = shared[p['id'], g['id']]
        if p['label'] != g['label'] or g['crowd'] or not both:
          continue
        ratio = both / (pred_area[p['id']] + gt_area[g['id']] - both - shared[p['id'], VOID])
        if ratio > .5:
          iou[p['label']] += ratio
          hits[p['label']] += 1
          matched |= {('p', p['id']), ('g', g['id'])}
    for g in gt:
      missed[g['label']] += ('g', g['id']) not in matched and not g['crowd']
    for p in pred:
      ignored = shared[p['id'], VOID] + sum(
          shared[p['id'], g['id']] for g in gt if g['crowd'] and g['label'] == p['label'])
      wrong[p['label']] += (('p', p['id']) not in matched
                            and not ignored > .5 * pred_area[p['id']])
  values = {}
  for suffix, classes in (('', (0, 1, 2, 3)), ('_th', (0, 1)), ('_st', (2, 3))):
    rows = [(iou[c], hits[c], hits[c] + wrong[c] / 2 + missed[c] / 2) for c in classes]
    rows = [row for row in rows if row[2]]
    if rows:
      values[f'PQ{suffix}'] = np.mean([i / n for i, h, n in rows])
      values[f'SQ{suffix}'] = np.mean([i / h if h else 0 for i, h, n in rows])
      values[f'RQ{suffix}'] = np.mean([h / n for i, h, n in rows])
  return values


def test_equals_dictionaries_on_random_maps():
  rng = np.random.default_rng(0)
  pairs = []
  for _ in range(30):
    gt_ids = np.kron(rng.choice([VOID, 3, 7, 8, 900], (4, 4)), np.ones((3, 3), int))
    gt = [{'id': i, 'label': int(rng.integers(4)), 'crowd': rng.random() < .2}
          for i in (900, 3, 8, 7)]
    # The truth with other ids, some pixels and some classes changed.
    pred_ids = np.where(rng.random((12, 12)) < .15, rng.choice([VOID, 5, 6], (12, 12)),
                        np.where(gt_ids == VOID, 0, gt_ids + 1))
    labels = {g['id'] + 1: g['label'] for g in gt}
    pred = [{'id': int(i), 'label': labels[i] if i in labels and rng.random() < .7
             else int(rng.integers(4))} for i in np.unique(pred_ids) if i != VOID]
    pairs.append(((pred_ids, pred), (gt_ids, gt)))
  expected = slow_quality(pairs)
  assert .1 < expected['PQ'] < .7 and len(expected) == 9
  assert quality(*pairs) == pytest.approx(expected, abs=1e-12)


def test_maps_that_do_not_fit_their_segments():
  fine = picture((0, 4), (2, 4))
  with pytest.raises(ValueError, match='id 11 of the map is not among the segments'):
    quality(((fine[0], fine[1][:1]), fine))
  with pytest.raises(ValueError, match='segment 12 has no pixels'):
    quality(((fine[0], [*fine[1], {'id': 12, 'label': 0}]), fine))
  with pytest.raises(ValueError, match='must differ'):
    quality((fine, (fine[0], fine[1] * 2)))
  with pytest.raises(ValueError, match=r'\(1, 7\) predicted for \(1, 8\)'):
    quality(((fine[0][:, 1:], fine[1]), fine))


# --- The evaluator -------------------------------------------------------------------------------


class FakeSource:
  """Three images, left a thing (class 0, category 5) and right stuff (class 1, category 9)."""
  is_thing, class_ids = [True, False], [5, 9]
  image_ids = np.array([31, 32, 33])
  sizes = np.array([[8, 16], [16, 32], [8, 16]], np.int32)

  def __init__(self, masks_known=True):
    self._masks_known = masks_known

  def __len__(self):
    return 3

  def target(self, i):
    height, width = self.sizes[i]
    segments = np.ones((height, width), np.int32)
    segments[:, width // 2:] = 2
    # On the last one the right half is a crowd of things.
    return {'segments': segments, 'labels': np.int32([0, 0 if i == 2 else 1]),
            'crowd': np.array([False, i == 2])}

  def coco(self):
    annotations = [{'id': 1, 'image_id': 31, 'category_id': 9, 'bbox': [8, 0, 8, 8], 'area': 64,
                    'iscrowd': 0}]
    for image_id, (height, width) in zip(self.image_ids.tolist(), self.sizes.tolist()):
      annotations.append({
          'id': image_id, 'image_id': image_id, 'category_id': 5, 'iscrowd': 0,
          'bbox': [0, 0, width // 2, height], 'area': height * width // 2})
      if self._masks_known:
        x, y = width // 2, height
        annotations[-1]['segmentation'] = [[0, 0, x, 0, x, y, 0, y]]
    return {'annotations': annotations, 'categories': [{'id': i, 'name': str(i)} for i in (5, 9)],
            'images': [{'id': i, 'height': h, 'width': w} for i, (h, w) in
                       zip(self.image_ids.tolist(), self.sizes.tolist())]}


class FakeRun:
  """What the evaluator asks of a run; the model saw pictures of 8 x 16, padded to 8 x 24."""

  def __init__(self, source):
    self.plan = types.SimpleNamespace(task=types.SimpleNamespace(
        segment='segment', source={'test': source}.__getitem__))

  def map(self, fn, params, split):
    assert (fn, params, split) == ('segment', 'params', 'test')
    left, right, nowhere = [5, 5, -5, -5, 5, 5], [-5, -5, 5, 5, 5, 5], [-5] * 6
    for index, sure in ((1, .5), (0, .9)):
      yield {'index': np.int32([index]), 'image_size': np.int32([[8, 16]]),
             'scores': np.float32([[.99, sure, .04, .2]]), 'labels': np.int32([[1, 0, 0, 0]]),
             'masks': np.float32([[[right] * 2, [left] * 2, [left] * 2, [nowhere] * 2]])}


def test_evaluator():
  """On the first image all is right. On the second, twice as large as the model saw it, the thing
  is not sure enough, so stuff has its pixels too, IoU 1/2: missed, missed and wrong. The third was
  not read: its thing is missed, its crowd is not. Things 1 / (1 + 2/2), stuff 1 / (1 + 2/2)."""
  values = panoptic.Panoptic('test')(FakeRun(FakeSource()), 'params', 0)
  # Masks of two of three things are found, the .04 not counting: 67 of 101 recalls at precision 1.
  expected = everything(.5, 1, .5, '_th') | everything(.5, 1, .5, '_st')
  assert values == expected | {'mask_AP': pytest.approx(67 / 101),
                               'mask_AP50': pytest.approx(67 / 101)}
  # Things without masks have no mask AP; with a lower threshold both are sure: 2 / (2 + 1/2).
  values = panoptic.Panoptic('test', threshold=.4)(FakeRun(FakeSource(False)), 'params', 0)
  assert values == everything(.9, 1, (.8 + 1) / 2, '_th') | everything(.9, 1, .9, '_st') | {
      'PQ_th': pytest.approx(.8), 'RQ_th': pytest.approx(.8), 'PQ_st': 1, 'RQ_st': 1}
