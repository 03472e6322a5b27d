"""Augmentation: what is drawn, that boxes and segments follow the pixels, and padding."""

import types

import numpy as np
import pytest

from core.config import UserError
from detection import augment

PAPER = types.SimpleNamespace(
    scales=tuple(range(480, 801, 32)), longest=1333, crop=True, crop_scales=(400, 500, 600),
    crop_min=384, crop_max=600)


def but(**changes):
  return types.SimpleNamespace(**{**vars(PAPER), **changes})


def reference_size(height, width, short, longest):
  """The rule of the reference implementation, in Python's own numbers."""
  low, high = float(min(height, width)), float(max(height, width))
  if longest is not None and high / low * short > longest:
    short = int(round(longest * low / high))
  if min(height, width) == short:
    return height, width
  if width < height:
    return int(short * height / width), short
  return short, int(short * width / height)


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('size, expected', [
    ((480, 640), (800, 1066)),
    ((640, 480), (1066, 800)),
    ((426, 640), (800, 1201)),  # 1201.88, rounded down.
    ((300, 640), (625, 1333)),  # Capped: 1333 * 300 / 640 = 624.8; 1333.3 wide.
    ((200, 640), (417, 1333)),  # 416.6; 1334.4 wide, which the cap takes off.
    ((500, 500), (800, 800)),
    ((800, 1000), (800, 1000)),
    ((1200, 1600), (800, 1066)),
    ((1, 5000), (1, 1333)),
])
def test_evaluation_sizes(size, expected):
  assert tuple(map(int, augment.resized(*size, 800, 1333))) == expected
  view = augment.evaluation_views(np.array([size]), 800, 1333)
  assert view.shape == (1, 1) and (view['height'][0, 0], view['width'][0, 0]) == expected
  assert view['middle_height'][0, 0] == 0


def test_sizes_agree_with_the_rule_in_plain_python():
  rng = np.random.default_rng(0)
  height, width = rng.integers(60, 1400, (2, 3000))
  short = rng.integers(300, 900, 3000)
  for longest in (1333, None):
    got = np.stack(augment.resized(height, width, short, longest), -1)
    want = np.array([reference_size(h, w, s, longest) for h, w, s in zip(height, width, short)])
    if longest:
      assert (want > longest).any() and want.max() <= longest + 12
      want = np.minimum(want, longest)
    np.testing.assert_array_equal(got, want)


def test_drawn_views_are_within_the_papers_bounds():
  sizes = np.array([[480, 640], [640, 427], [500, 500], [333, 1000]])
  views = augment.draw_views(sizes, 2000, 3, PAPER)
  assert views.shape == (4, 2000) and views.dtype.itemsize == 24
  cropped = views['middle_height'] > 0
  assert .47 < cropped.mean() < .53
  for (height, width), row, crop in zip(sizes, views, cropped):
    whole = {(int(v['height']), int(v['width'])) for v in row[~crop]}
    assert whole == {reference_size(height, width, s, 1333) for s in PAPER.scales}
    middles = {(int(v['middle_height']), int(v['middle_width'])) for v in row[crop]}
    assert middles == {reference_size(height, width, s, None) for s in PAPER.crop_scales}
    assert not row[~crop]['crop_height'].any()
    for name in ('height', 'width'):
      side, middle = row[crop][f'crop_{name}'], row[crop][f'middle_{name}']
      most = np.minimum(middle, 600)
      assert side.min() == 384 and (side <= most).all() and (side == most).any()
      # Even from 384 on: the middle of what there is, give or take.
      assert abs(((side - 384 + .5) / (most - 384 + 1)).mean() - .5) < .03
    for v in row[crop][:200]:
      possible = {reference_size(v['crop_height'], v['crop_width'], s, 1333) for s in PAPER.scales}
      assert (v['height'], v['width']) in possible
  # Height and width of a crop are drawn apart.
  of_one = views[2][cropped[2] & (views[2]['middle_height'] == 600)]
  assert abs(np.corrcoef(of_one['crop_height'], of_one['crop_width'])[0, 1]) < .12


def test_views_follow_from_the_seed():
  sizes = np.array([[480, 640]] * 5)
  first, again, other = (augment.draw_views(sizes, 7, seed, PAPER) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any() and len(np.unique(first)) > 20
  plain = augment.draw_views(sizes, 50, 1, but(crop=False))
  assert not plain['middle_height'].any() and set(plain['height'].flat) == set(PAPER.scales)


@pytest.mark.parametrize('changes, message', [
    (dict(scales=()), r'config.data.scales=\(\)'),
    (dict(scales=(0, 64)), 'config.data.scales'),
    (dict(longest=0), 'config.data.longest=0'),
    (dict(crop_scales=()), 'config.data.crop_scales'),
    (dict(crop_min=500), 'config.data.crop_min=500 must be from 1 to 400'),
    (dict(crop_max=100), 'config.data.crop_min=384 must be from 1 to 100'),
])
def test_settings_that_contradict_each_other(changes, message):
  with pytest.raises(UserError, match=message):
    augment.draw_views(np.array([[480, 640]]), 1, 0, but(**changes))
  with pytest.raises(UserError, match='config.data.views=0'):
    augment.draw_views(np.array([[480, 640]]), 0, 0, PAPER)


# --- Pixels --------------------------------------------------------------------------------------


COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)


def picture(height, width, boxes):
  """Rectangles of pure colours on black, with their map."""
  image, segments = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.int32)
  for i, (x0, y0, x1, y1) in enumerate(boxes):
    image[y0:y1, x0:x1] = COLOURS[i]
    segments[y0:y1, x0:x1] = i + 1
  return image, segments


def found(mask):
  y, x = np.nonzero(mask)
  return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def view(**sizes):
  made = np.zeros((), augment.View)
  for name, value in sizes.items():
    made[name] = value
  return made[()]


def test_boxes_and_segments_follow_the_pixels_through_drawn_views():
  boxes = [(10, 12, 30, 52), (50, 5, 90, 30), (40, 60, 110, 75)]
  image, segments = picture(80, 120, boxes)
  settings = but(scales=(60, 100, 150), longest=200, crop_scales=(70, 90), crop_min=40, crop_max=75)
  views = augment.draw_views(np.array([[80, 120]]), 120, 0, settings)[0]
  dropped, flipped = 0, 0
  for i, v in enumerate(views):
    shown = augment.apply(image, np.float32(boxes), v, np.random.default_rng(i), True, segments)
    assert shown.image.shape == (v['height'], v['width'], 3) and shown.image.dtype == np.uint8
    assert shown.segments.shape == (v['height'], v['width'])
    assert shown.segments.dtype == np.int32 and shown.boxes.dtype == np.float32
    assert len(shown.boxes) == len(shown.kept) and (np.diff(shown.kept) > 0).all()
    assert (shown.boxes >= 0).all() and (shown.boxes <= np.tile([v['width'], v['height']], 2)).all()
    dropped += 3 - len(shown.kept)
    flipped += len(shown.kept) == 3 and shown.boxes[0, 0] > shown.boxes[1, 0]
    enlarged = max(v['height'] / 40, 1)
    for n, (kept, box) in enumerate(zip(shown.kept, shown.boxes)):
      if min(box[2:] - box[:2]) < 3 * enlarged:
        continue  # Too thin a strip to find its colour again after two blurs.
      seen = shown.image[..., kept] > 125
      assert np.abs(found(seen) - box).max() <= 1 + enlarged / 2
      assert np.abs(found(shown.segments == n + 1) - box).max() <= 1 + enlarged
    absent = [kept for kept in range(3) if kept not in shown.kept]
    assert all((shown.image[..., kept] > 125).sum() == 0 for kept in absent)
    assert shown.segments.max() <= len(shown.kept)
  assert dropped > 10 and flipped > 20


def test_flip_by_hand():
  boxes = np.float32([[1, 2, 4, 5]])
  image, segments = picture(6, 10, [(1, 2, 4, 5)])
  plain = view(height=6, width=10)
  seen = set()
  for seed in range(40):
    shown = augment.apply(image, boxes, plain, np.random.default_rng(seed), True, segments)
    seen.add(tuple(shown.boxes[0].tolist()))
    assert found(shown.image[..., 0]) == shown.boxes[0].tolist() == found(shown.segments)
    never = augment.apply(image, boxes, plain, np.random.default_rng(seed), False)
    assert never.boxes.tolist() == boxes.tolist() and never.segments is None
    np.testing.assert_array_equal(never.image, image)
  assert seen == {(1, 2, 4, 5), (6, 2, 9, 5)}
  assert boxes.tolist() == [[1, 2, 4, 5]]  # What the source keeps is not written to.


def test_crop_by_hand():
  """Crops of 4x4 from 8x8: what is cut off is dropped, numbers close up, halves are clipped."""
  boxes = [(0, 0, 2, 2), (3, 3, 5, 5), (4, 0, 8, 2)]
  image, segments = picture(8, 8, boxes)
  v = view(middle_height=8, middle_width=8, crop_height=4, crop_width=4, height=4, width=4)
  tops = set()
  for seed in range(300):
    down, right = np.random.default_rng(seed).random(3)[1:]
    top, left = int(down * 5), int(right * 5)
    tops.add((top, left))
    shown = augment.apply(image, np.float32(boxes), v, np.random.default_rng(seed), False, segments)
    np.testing.assert_array_equal(shown.image, image[top:top + 4, left:left + 4])
    want = []
    for i, (x0, y0, x1, y1) in enumerate(boxes):
      box = [max(x0 - left, 0), max(y0 - top, 0), min(x1 - left, 4), min(y1 - top, 4)]
      if box[2] > box[0] and box[3] > box[1]:
        want.append((i, box))
    assert shown.kept.tolist() == [i for i, _ in want]
    assert shown.boxes.tolist() == [box for _, box in want]
    for n, (_, box) in enumerate(want):
      assert found(shown.segments == n + 1) == box
  assert tops == {(top, left) for top in range(5) for left in range(5)}


def test_segments_take_the_floor_pixel():
  segments = np.arange(1, 8, dtype=np.int32)[None].repeat(2, 0)
  image = np.zeros((2, 7, 3), np.uint8)
  shown = augment.apply(image, np.zeros((7, 4)), view(height=1, width=4),
                        np.random.default_rng(0), False, segments)
  # 0, 7 / 4, 14 / 4, 21 / 4 rounded down; nearest centres would be 0, 2, 4, 6.
  assert shown.segments.tolist() == [[1, 2, 4, 6]]


def test_boxes_scale_by_the_realised_ratio():
  v = augment.evaluation_views(np.array([[427, 640]]), 800, 1333)[0, 0]
  shown = augment.apply(np.zeros((427, 640, 3), np.uint8), np.float32([[64, 42.7, 640, 427]]), v,
                        np.random.default_rng(0), False)
  assert shown.image.shape == (800, 1199, 3)
  np.testing.assert_allclose(shown.boxes, [[119.9, 80, 1199, 800]], rtol=1e-6)


def test_shrinking_averages():
  dots = np.zeros((64, 64, 3), np.uint8)
  dots[::4, ::4] = 160  # One pixel of sixteen; interpolation between centres would miss them all.
  shown = augment.apply(dots, np.zeros((0, 4)), view(height=16, width=16),
                        np.random.default_rng(0), False)
  np.testing.assert_array_equal(shown.image, 10)
  assert shown.boxes.shape == (0, 4) and len(shown.kept) == 0


# --- Fixed shapes --------------------------------------------------------------------------------


def example(**changes):
  image, segments = picture(20, 40, [(0, 0, 10, 10), (20, 5, 40, 20), (10, 10, 14, 20)])
  return image, {
      'image_id': 17, 'height': 20, 'width': 40, 'labels': np.int32([4, 9, 2]),
      'boxes': np.float32([[0, 0, 10, 10], [20, 5, 40, 20], [10, 10, 14, 20]]),
      'crowd': np.array([False, True, False]), 'segments': segments,
      'view': view(height=10, width=20), **changes}


def test_rows_by_hand():
  image, made = example()
  row = augment.to_targets(made, image, np.random.default_rng(0), flip=False, shape=(12, 24),
                           slots=4)
  assert {k: (v.dtype.name, v.shape) for k, v in row.items()} == {
      'image': ('uint8', (12, 24, 3)), 'image_size': ('int32', (2,)), 'boxes': ('float32', (4, 4)),
      'labels': ('int32', (4,)), 'objects': ('int32', ()), 'segments': ('uint8', (12, 24))}
  assert row['image_size'].tolist() == [10, 20] and row['objects'] == 2
  np.testing.assert_allclose(row['boxes'], [[.125, .25, .25, .5], [.3, .75, .1, .5],
                                            [0, 0, 0, 0], [0, 0, 0, 0]], atol=1e-6)
  assert row['labels'].tolist() == [4, 2, 0, 0]
  assert row['image'][:, 20:].max() == row['image'][10:].max() == 0 and row['image'][2, 2, 0] == 250
  assert found(row['segments'] == 1) == [0, 0, 5, 5]
  assert found(row['segments'] == 2) == [5, 5, 7, 10] and row['segments'].max() == 2

  row = augment.to_targets(made, image, np.random.default_rng(0), flip=False, shape=(10, 20),
                           slots=3, keep_crowd=True)
  assert row['objects'] == 3 and row['labels'].tolist() == [4, 9, 2]
  assert found(row['segments'] == 2) == [10, 3, 20, 10]  # Row 2 shows row 4, row 3 row 6.
  del made['segments']
  assert 'segments' not in augment.to_targets(
      made, image, np.random.default_rng(0), flip=False, shape=(10, 20), slots=3)


def test_an_image_without_objects():
  image, _ = example()
  row = augment.pad_example(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32),
                            np.zeros(0, bool), (20, 40), 2, 1, np.zeros((20, 40), np.int32))
  assert row['objects'] == 0 and not row['boxes'].any() and not row['segments'].any()


def test_what_does_not_fit_says_so():
  image, made = example()
  to_row = lambda example, **kw: augment.to_targets(
      example, image, np.random.default_rng(0), flip=False, shape=(10, 20), **kw)
  assert to_row(made, slots=2)['objects'] == 2  # The crowd does not count.
  with pytest.raises(UserError, match='image 17 has 3 objects.*config.model.queries=2'):
    to_row(made, slots=2, keep_crowd=True)
  with pytest.raises(UserError, match='image 17 is 20x40 .* 40x20 in its annotations'):
    to_row({**made, 'height': 40, 'width': 20}, slots=3)
  with pytest.raises(UserError, match='config.model.queries=300.*254'):
    to_row(made, slots=300)
