"""Scenes of digits: what is drawn is what the annotations say, and the data set holds it."""

import itertools

import numpy as np
import pytest

from core.data import images
from core.data import sources
from core.data.datasets import digits
from core.data.datasets import scenes


@pytest.fixture(scope='module')
def some():
  return list(itertools.islice(scenes.scenes('validation'), 80))


def tight(mask):
  y, x = np.nonzero(mask)
  return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_every_pixel_belongs_to_a_segment_and_boxes_fit(some):
  for s in some:
    n, total = len(s.labels), len(s.labels) + len(s.stuff)
    assert s.image.shape == (64, 64, 3) and s.segments.shape == (64, 64)
    assert {a.dtype for a in (s.image, s.segments, s.colours)} == {np.dtype(np.uint8)}
    assert {a.dtype for a in (s.boxes, s.labels, s.sources, s.stuff, s.stuff_boxes)} == {
        np.dtype(np.int32)}
    np.testing.assert_array_equal(np.unique(s.segments), np.arange(1, total + 1))
    for i in range(n):
      assert s.boxes[i].tolist() == tight(s.segments == i + 1)
    for i in range(len(s.stuff)):
      x0, y0, x1, y1 = tight(s.segments == n + 1 + i)
      assert s.stuff_boxes[i].tolist() == [x0, y0, x1 - 1, y1 - 1]
    assert np.all(np.diff(s.stuff) > 0) and set(s.stuff) <= {10, 11, 12, 13}


def test_digits_are_those_of_the_split_and_of_all_classes(some):
  labels = digits.digits('validation')[1]
  for s in some:
    np.testing.assert_array_equal(s.labels, labels[s.sources])
  counts = np.bincount(np.concatenate([s.labels for s in some]), minlength=10)
  assert counts.min() > .04 * counts.sum() and counts.max() < .17 * counts.sum()
  assert set(np.bincount([len(s.stuff) for s in some]).nonzero()[0]) == {1, 2, 3}
  assert {len(s.labels) for s in some} >= {1, 2, 3, 4}
  assert max(len(s.labels) for s in some) == 4


def test_digits_overlap_little_and_stand_out(some):
  contrasts = []
  for s in some:
    luminance = s.image @ np.array([.299, .587, .114])
    for i, (x0, y0, x1, y1) in enumerate(s.boxes):
      assert 9 <= y1 - y0 <= 30 and x1 - x0 <= 30
      for a0, b0, a1, b1 in s.boxes[:i]:
        common = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
        assert common / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - common) <= .15
      ground = luminance[y0:y1, x0:x1][s.segments[y0:y1, x0:x1] > len(s.labels)]
      ink = luminance[s.segments == i + 1]
      if len(ground):
        contrasts.append(abs(ink.mean() - ground.mean()))
      # The ink is the colour that the scene says, in the darkest or lightest pixels of the digit.
      colour = s.colours[i] @ np.array([.299, .587, .114])
      assert np.abs(ink - colour).min() < 12
  assert np.quantile(contrasts, .02) > 40


def test_some_scenes_have_no_digit():
  data = digits.digits('test')
  drawn = [scenes.scene(data, np.random.default_rng(seed)) for seed in range(300)]
  found = [s for s in drawn if not len(s.labels)]
  assert 1 <= len(found) <= 9  # One in a hundred: mean 3, 3.5 standard deviations above it.
  assert found[0].boxes.shape == (0, 4) and found[0].colours.shape == (0, 3)
  assert found[0].segments.min() == 1


def test_scenes_follow_from_split_and_number(some):
  again = scenes.scene(digits.digits('validation'), np.random.default_rng((1, 7)))
  np.testing.assert_array_equal(again.image, some[7].image)
  np.testing.assert_array_equal(again.segments, some[7].segments)
  test = next(scenes.scenes('test'))
  assert not np.array_equal(test.image, some[0].image)
  # Part of version 1.0.0: whoever changes this changes everybody's test set.
  assert [s.labels.tolist() for s in some[:3]] == [[8, 1], [9, 6, 4], [2, 1]]


def test_prepared_files_hold_the_scenes(tmp_path, monkeypatch):
  monkeypatch.setattr(scenes, 'SIZES', {'train': 3, 'validation': 2, 'test': 4})
  for split, size in scenes.SIZES.items():
    source = sources.open_source('digit_scenes', split, data_dir=str(tmp_path))
    drawn = list(scenes.scenes(split))
    assert len(source) == len(drawn) == size
    for i, s in enumerate(drawn):
      example = source[i]
      n = len(s.labels)
      areas = [int((s.segments == k).sum()) for k in range(1, s.segments.max() + 1)]
      assert example['image_id'] == i
      np.testing.assert_array_equal(images.decode(example['image']), s.image)
      np.testing.assert_array_equal(images.decode(example['panoptic'], 1)[..., 0], s.segments)
      np.testing.assert_array_equal(example['objects']['bbox'], s.boxes)
      np.testing.assert_array_equal(example['objects']['label'], s.labels)
      np.testing.assert_array_equal(example['objects']['area'], areas[:n])
      np.testing.assert_array_equal(example['stuff']['bbox'], s.stuff_boxes)
      np.testing.assert_array_equal(example['stuff']['label'], s.stuff)
      np.testing.assert_array_equal(example['stuff']['area'], areas[n:])
