import types

import numpy as np
import pytest

from detection import attention_pictures, canvas, pictures
from tests.detection.drawn import GROUND, extent, ground, near, read, run_of

NAMES = ['cat', 'dog', 'traffic light', r'$\nope$', '']


@pytest.mark.parametrize('size', [(40, 60), (1500, 1200)])
def test_boxes_are_drawn_where_they_are(tmp_path, size):
  """Middles of the edges, found by their colour, on an image drawn larger and one drawn smaller."""
  height, width = size
  box = np.array([.3 * width, .25 * height, .8 * width, .9 * height])
  path = tmp_path / 'boxes.png'
  pictures.detections(ground(*size), box[None], np.array([1]), np.array([.93]), NAMES, path)
  picture = read(path)
  top, bottom, left, right = extent(near(picture, GROUND / 255, .01))
  assert 400 <= max(bottom - top, right - left) <= 1000
  unit = (bottom - top) / height
  assert (right - left) / width == pytest.approx(unit, rel=.01)
  drawn = near(picture, canvas.colour(1))
  # Away from the label, which has the same colour and lies at the left above the box.
  across = np.flatnonzero(drawn[round(top + unit * .6 * height)])
  down = np.flatnonzero(drawn[:, round(left + unit * .75 * width)])
  found = np.array([across[0] - left, down[0] - top, across[-1] + 1 - left, down[-1] + 1 - top])
  np.testing.assert_allclose(found, box * unit, atol=3)


def test_truth_is_drawn_beside_what_was_found(tmp_path):
  image = np.zeros((80, 80, 3), np.uint8)
  found = np.array([[10., 10, 70, 70]]), np.array([0]), np.array([.9])
  pictures.detections(image, *found, NAMES, tmp_path / 'one.png')
  pictures.detections(image, *found, NAMES, tmp_path / 'two.png',
                      truth=(np.array([[10., 10, 70, 70]]), np.array([2])))
  one, two = read(tmp_path / 'one.png'), read(tmp_path / 'two.png')
  assert two.shape == (one.shape[0], 2 * one.shape[1], 3)
  half = one.shape[1]
  assert near(two[:, :half], canvas.colour(0)).any()
  assert near(two[:, half:], canvas.colour(2)).any()
  assert not near(two[:, half:], canvas.colour(0)).any()


def test_the_best_is_named_first_and_odd_names_are_written(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(canvas, 'draw_boxes', lambda axes, image, *what: drawn.append(what))
  pictures.detections(np.zeros((50, 50, 3), np.uint8), np.arange(12.).reshape(3, 4),
                      np.array([3, 4, 9]), np.array([.7, .9, .8]), NAMES, tmp_path / 'a.png')
  (boxes, labels, texts), = drawn
  assert texts == ['class 4 0.90', 'class 9 0.80', r'$\nope$ 0.70']
  assert labels.tolist() == [4, 9, 3] and boxes[:, 0].tolist() == [4, 8, 0]
  monkeypatch.undo()
  pictures.detections(np.zeros((50, 50, 3), np.uint8), np.array([[5., 5, 9, 9]]), np.array([3]),
                      np.array([.7]), NAMES, tmp_path / 'b.png')  # '$' is no formula.
  attention_pictures.decoder_attention(ground(50, 50), np.array([[5., 5, 9, 9]]), np.array([3]),
                             np.array([.7]), np.ones((1, 7, 7)), 8, NAMES, tmp_path / 'c.png')


def test_things_are_strong_stuff_is_pale_and_nobodys_is_grey(tmp_path):
  image = np.full((60, 90, 3), 128, np.uint8)
  ids = np.full((60, 90), -1)
  ids[:, :30], ids[:, 30:60] = 7, 2
  segments = [{'id': 7, 'label': 0, 'isthing': True}, {'id': 2, 'label': 1, 'isthing': False}]
  pictures.panoptic_map(image, ids, segments, NAMES, tmp_path / 'map.png')
  picture = read(tmp_path / 'map.png')
  map_ = picture[:, picture.shape[1] // 2:]
  top, bottom, left, right = extent(map_.min(-1) < .98)
  # A quarter of the way down no label is in the way.
  row = map_[top + (bottom - top) // 4]
  thing, stuff, nobody = (row[left + (right - left) * (2 * i + 1) // 6] for i in range(3))
  saturation = lambda pixel: (pixel.max() - pixel.min()) / pixel.max()
  assert saturation(thing) > .5 > .25 > saturation(stuff) > .05
  assert saturation(nobody) < .01
  # The strong colour is that of the class.
  assert np.corrcoef(thing, canvas.colour(0))[0, 1] > .95
  # Outlines between them are white.
  edge = left + (right - left) // 3
  assert row[edge - 2:edge + 3].min(-1).max() > .97


def test_names_lie_deep_in_their_segment_and_apart():
  """In the middle of a square; beside it where another name is; outside where there is no room."""
  axes = types.SimpleNamespace(plot=lambda *args, **kwargs: lines.append(args))
  lines, taken = [], []
  mask = np.zeros((100, 200), bool)
  mask[20:81, 40:101] = True
  size = np.array([20., 10.])
  np.testing.assert_array_equal(pictures._put(axes, pictures._depth(mask), size, taken), [70, 50])
  x, y = pictures._put(axes, pictures._depth(mask), size, taken)
  assert (abs(x - 70) >= 20 or abs(y - 50) >= 10) and mask[int(y), int(x)] and not lines
  small = np.zeros((100, 200), bool)
  small[49:52, 69:72] = True
  x, y = pictures._put(axes, pictures._depth(small), size, taken)
  apart = [x0 - x >= 10 or x - x1 >= 10 or y0 - y >= 5 or y - y1 >= 5
           for x0, y0, x1, y1 in taken[:-1]]
  assert all(apart) and len(lines) == 1 and np.hypot(x - 70, y - 50) < 30


def test_examples_are_drawn_in_pixels(tmp_path, monkeypatch):
  """Three of four images in batches of two, each 16x32 in a padded 32x32, the first broken."""
  def detect(params, batch):
    return {'boxes': np.tile(np.float32([[0, 0, .5, .5], [.5, .5, 1, 1]]), (2, 1, 1)),
            'scores': np.float32([[.9, .69], [.2, .7]]), 'labels': np.tile([1, 2], (2, 1))}

  def transform(example, rng, train):
    assert not train
    return {'image': np.full((32, 32, 3), example['number'], np.uint8),
            'image_size': np.array([16, 32]), 'labels': np.array([0, 5]), 'objects': 1,
            'boxes': np.float32([[.5, .5, .25, .5], [9, 9, 9, 9]])}

  config = types.SimpleNamespace(eval=types.SimpleNamespace(threshold=.7))
  task = types.SimpleNamespace(detect=detect, transform=transform, config=config,
                               class_names=NAMES,
                               dataset=lambda split: [{'number': i} for i in range(5)])
  drawn = []
  draw = pictures.examples
  monkeypatch.setattr(pictures, 'examples',
                      lambda found, *args: drawn.append(found) or draw(found, *args))
  evaluator = pictures.Examples('validation', shown=3)
  assert evaluator.every == '' and evaluator.split == 'validation'
  assert evaluator(run_of(tmp_path, task, [[1, 2], [3, 4]]), {}, 5) == {}
  assert read(tmp_path / 'detections.png').shape[1] > 1000
  (first, second, third), = drawn
  assert [one[0][0, 0, 0] for one in (first, second, third)] == [1, 2, 3]
  image, boxes, labels, scores, (true_boxes, true_labels) = first
  assert image.shape == (16, 32, 3) and labels.tolist() == [1]
  np.testing.assert_array_equal(boxes, [[0, 0, 16, 8]])
  np.testing.assert_array_equal(true_boxes, [[12, 4, 20, 12]])
  assert true_labels.tolist() == [0] and scores == pytest.approx([.9])
  np.testing.assert_array_equal(second[1], [[16, 8, 32, 16]])  # A score of .7 is enough.
