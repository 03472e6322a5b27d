import types

import cv2
import numpy as np
import pytest

from detection import pictures

NAMES = ['cat', 'dog', 'traffic light', r'$\nope$', '']


# No text, line or heat has this colour.
GROUND = np.array([0, 0, 40], np.uint8)


def ground(height, width):
  return np.tile(GROUND, (height, width, 1))


def read(path):
  """RGB float `[h, w, 3]` in [0, 1]."""
  return cv2.imread(str(path))[..., ::-1] / 255


def near(picture, colour, tolerance=.04):
  return (abs(picture - np.array(colour)) < tolerance).all(-1)


def extent(mask):
  """First row, one past the last, first column, one past the last."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


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
  drawn = near(picture, pictures.colour(1))
  # Away from the label, which has the same colour and lies at the left above the box.
  across = np.flatnonzero(drawn[round(top + unit * .6 * height)])
  down = np.flatnonzero(drawn[:, round(left + unit * .75 * width)])
  found = np.array([across[0] - left, down[0] - top, across[-1] + 1 - left, down[-1] + 1 - top])
  np.testing.assert_allclose(found, box * unit, atol=3)


def labels_of(axes):
  """Extents of the labels in axes, pixels `[n, 4]`: x0, y0, x1, y1."""
  return np.array([text.get_bbox_patch().get_window_extent().extents for text in axes.texts])


def overlaps(rectangles):
  """Pairs that share more than the rounding of a pixel."""
  low = np.maximum(rectangles[:, None, :2], rectangles[:, :2])
  high = np.minimum(rectangles[:, None, 2:], rectangles[:, 2:])
  return (np.triu((high - low > 1).all(-1), 1)).sum()


def test_labels_hide_neither_each_other_nor_objects():
  """Six boxes with one corner, and two at the edges of the image."""
  image = np.zeros((400, 400, 3), np.uint8)
  boxes = np.array([[100, 100, 140 + 20 * i, 150 + 10 * i] for i in range(6)]
                   + [[0, 0, 30, 400], [390, 300, 400, 400]], np.float64)
  figure = pictures._figure(440, 440)
  axes = pictures._panel(figure, 20, 20, image, (400, 400))
  pictures._draw_boxes(axes, image, boxes, [0, 1, 2, 3, 4, 0, 1, 2], ['traffic light 0.93'] * 8)
  figure.savefig('/dev/null', format='png')
  labels = labels_of(axes)
  assert len(labels) == 8 and overlaps(labels) == 0
  assert (labels > -1).all() and (labels < 441).all()
  # One object alone: its label stands above it.
  alone = pictures._panel(figure, 20, 20, image, (400, 400))
  pictures._draw_boxes(alone, image, boxes[:1], [0], ['cat 0.93'])
  figure.savefig('/dev/null', format='png')
  assert labels_of(alone)[0, 1] == pytest.approx(420 - 100, abs=2)


def test_truth_is_drawn_beside_what_was_found(tmp_path):
  image = np.zeros((80, 80, 3), np.uint8)
  found = np.array([[10., 10, 70, 70]]), np.array([0]), np.array([.9])
  pictures.detections(image, *found, NAMES, tmp_path / 'one.png')
  pictures.detections(image, *found, NAMES, tmp_path / 'two.png',
                      truth=(np.array([[10., 10, 70, 70]]), np.array([2])))
  one, two = read(tmp_path / 'one.png'), read(tmp_path / 'two.png')
  assert two.shape == (one.shape[0], 2 * one.shape[1], 3)
  half = one.shape[1]
  assert near(two[:, :half], pictures.colour(0)).any()
  assert near(two[:, half:], pictures.colour(2)).any()
  assert not near(two[:, half:], pictures.colour(0)).any()


def test_the_best_is_named_first_and_odd_names_are_written(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(pictures, '_draw_boxes', lambda axes, image, *what: drawn.append(what))
  pictures.detections(np.zeros((50, 50, 3), np.uint8), np.arange(12.).reshape(3, 4),
                      np.array([3, 4, 9]), np.array([.7, .9, .8]), NAMES, tmp_path / 'a.png')
  (boxes, labels, texts), = drawn
  assert texts == ['class 4 0.90', 'class 9 0.80', r'$\nope$ 0.70']
  assert labels.tolist() == [4, 9, 3] and boxes[:, 0].tolist() == [4, 8, 0]
  monkeypatch.undo()
  pictures.detections(np.zeros((50, 50, 3), np.uint8), np.array([[5., 5, 9, 9]]), np.array([3]),
                      np.array([.7]), NAMES, tmp_path / 'b.png')  # '$' is no formula.
  pictures.decoder_attention(ground(50, 50), np.array([[5., 5, 9, 9]]), np.array([3]),
                             np.array([.7]), np.ones((1, 7, 7)), 8, NAMES, tmp_path / 'c.png')


def test_colours_of_classes_differ():
  colours = np.array([pictures.colour(i) for i in range(133)])
  assert colours.min() >= 0 and colours.max() <= 1
  distance = abs(colours[:, None] - colours).max(-1) + np.eye(133)
  assert distance.min() > .02
  # The first ones, all that small data sets have, are told apart at a glance.
  assert distance[:10, :10].min() > .15


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
  assert np.corrcoef(thing, pictures.colour(0))[0, 1] > .95
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


def test_attention_is_that_of_those_who_attend_to_the_point():
  """The column: cell (1, 2) looks at cell (0, 1), which itself looks elsewhere."""
  maps = np.zeros((2, 3, 2, 3))
  maps[1, 2, 0, 1] = .75
  maps[0, 1, 1, 0] = .5
  found = pictures.attention_to(maps, (3.9, 9.), 8)
  np.testing.assert_array_equal(found, [[0, 0, 0], [0, 0, .75]])
  np.testing.assert_array_equal(pictures.attention_to(maps, (8., 0.), 8), [[0, .5, 0], [0, 0, 0]])
  # On the very edge of an image that fills its cells.
  np.testing.assert_array_equal(pictures.attention_to(maps, (16., 24.), 8), np.zeros((2, 3)))


def test_encoder_picture_shows_the_column(tmp_path, monkeypatch):
  shown = []
  overlay = pictures.overlay
  monkeypatch.setattr(pictures, 'overlay', lambda image, heat, stride: shown.append(heat)
                      or overlay(image, heat, stride))
  maps = np.random.default_rng(0).random((3, 4, 3, 4))
  image = np.full((20, 30, 3), 90, np.uint8)
  path = tmp_path / 'encoder.png'
  pictures.encoder_attention(image, maps, [(2., 3.), (17., 25.)], 8, path)
  np.testing.assert_array_equal(shown, [maps[:, :, 0, 0], maps[:, :, 2, 3]])
  picture = read(path)
  assert picture.shape[0] > 300 and picture.shape[1] > 600
  assert all(near(picture, colour).sum() > 500 for colour in ((.122, .467, .706), (1, .498, .055)))


def test_overlay_covers_the_image_without_its_padding():
  """3x4 cells of 8 pixels over an image of 20x18: the brightest cell of all is in the padding."""
  heat = np.zeros((3, 4))
  heat[2, 1], heat[2, 3] = .01, .1
  drawn = pictures.overlay(np.zeros((20, 18, 3), np.uint8), heat, 8)
  assert drawn.shape == (20, 18, 3)
  assert drawn[:8].max() < .05
  brightness = drawn[19].sum(-1)
  assert brightness.argmax() in (11, 12)  # Around the middle of the cell, at 12.
  assert drawn[19, 12].max() == pytest.approx(.6 * .988, abs=.02)  # The brightest of inferno.


def test_decoder_pictures(tmp_path):
  """Heat above the box it belongs to; a row more for more objects; none found still draws."""
  image = ground(48, 48)
  maps = np.zeros((3, 6, 6))
  maps[0, 4, 1] = maps[1, 1, 4] = maps[2, 0, 0] = 1
  boxes = np.array([[4., 28, 20, 44], [28, 4, 44, 20], [0, 0, 10, 10]])
  args = np.array([0, 1, 2]), np.array([.9, .8, .7])
  pictures.decoder_attention(image, boxes, *args, maps, 8, NAMES, tmp_path / 'a.png')
  picture = read(tmp_path / 'a.png')
  third = picture.shape[1] // 3
  for i, (row, column) in enumerate(((4, 1), (1, 4))):
    part = picture[:, i * third:(i + 1) * third]
    top, bottom, left, right = extent(near(part, GROUND / 255, .01))
    unit = (right - left) / 48
    assert bottom - top == right - left
    above = part[top - (bottom - top) - 4:top - 4, left:right].sum(-1)
    for drawn in (above > above.max() / 2, near(part, pictures.colour(i))[top:bottom, left:right]):
      np.testing.assert_allclose(np.argwhere(drawn).mean(0) / unit, [8 * row + 4, 8 * column + 4],
                                 atol=1)
  pictures.decoder_attention(image, boxes, *args, maps, 8, NAMES, tmp_path / 'b.png', columns=2)
  assert read(tmp_path / 'b.png').shape == (2 * picture.shape[0], 2 * third, 3)
  pictures.decoder_attention(image, boxes[:0], args[0][:0], args[1][:0], maps[:0], 8, NAMES,
                             tmp_path / 'c.png')
  assert near(read(tmp_path / 'c.png'), GROUND / 255, .01).sum() > 400 ** 2


def test_query_boxes(tmp_path):
  """Kinds by hand; the one query's small boxes are green and where their centres are."""
  boxes = np.array([[.5, .5, .2, .3], [.5, .5, .3, .2], [.5, .5, 1, .1], [.5, .5, .1, 1.],
                    [.5, .5, .5, .5]])
  assert pictures.kinds_of(boxes).tolist() == [0, 0, 1, 2, 1]
  boxes = np.tile([.25, .75, .1, .1], (40, 2, 1))
  boxes[:, 1] = .5, .5, .9, .5
  pictures.query_boxes(boxes, tmp_path / 'one.png', count=1)
  picture = read(tmp_path / 'one.png')
  grey = near(picture, [.827] * 3, .02)
  rows, columns = (np.flatnonzero(grey.sum(axis) > 150) for axis in (1, 0))
  frame = rows[0], rows[-1], columns[0], columns[-1]
  green = np.argwhere((picture[..., 1] - picture[..., 0] > .3)
                      & (np.arange(len(picture)) < frame[1])[:, None]).mean(0)
  place = (green - [frame[0], frame[2]]) / [frame[1] - frame[0], frame[3] - frame[2]]
  np.testing.assert_allclose(place, [.75, .25], atol=.02)
  pictures.query_boxes(boxes, tmp_path / 'both.png')
  red = [(read(tmp_path / f'{name}.png')[:frame[1]] @ [1, -1, 0] > .4).any()
         for name in ('one', 'both')]
  assert red == [False, True]


def run_of(tmp_path, task, batches):
  """What an evaluator asks of a run, on the host."""
  return types.SimpleNamespace(
      plan=types.SimpleNamespace(task=task), writes=True, pictures=tmp_path,
      map=lambda fn, params, split: (fn(params, batch) for batch in batches))


def test_examples_are_drawn_in_pixels(tmp_path, monkeypatch):
  """Three of four images in batches of two, each 16x32 in a padded 32x32."""
  def detect(params, batch):
    return {'boxes': np.tile(np.float32([[0, 0, .5, .5], [.5, .5, 1, 1]]), (2, 1, 1)),
            'scores': np.float32([[.9, .69], [.2, .7]]), 'labels': np.tile([1, 2], (2, 1))}

  batch = {'image': np.ones((2, 32, 32, 3), np.uint8), 'image_size': np.array([[16, 32]] * 2),
           'boxes': np.tile(np.float32([[.5, .5, .25, .5], [9, 9, 9, 9]]), (2, 1, 1)),
           'labels': np.array([[0, 5], [0, 5]]), 'objects': np.array([1, 1])}
  config = types.SimpleNamespace(eval=types.SimpleNamespace(threshold=.7))
  task = types.SimpleNamespace(detect=detect, config=config, class_names=NAMES)
  drawn = []
  draw = pictures.examples
  monkeypatch.setattr(pictures, 'examples',
                      lambda found, *args: drawn.append(found) or draw(found, *args))
  evaluator = pictures.Examples('validation', shown=3)
  assert evaluator.every == '' and evaluator.split == 'validation'
  assert evaluator(run_of(tmp_path, task, [batch] * 2), {}, 5) == {}
  assert read(tmp_path / 'detections.png').shape[1] > 1000
  (first, second, _), = drawn
  image, boxes, labels, scores, (true_boxes, true_labels) = first
  assert image.shape == (16, 32, 3) and labels.tolist() == [1]
  np.testing.assert_array_equal(boxes, [[0, 0, 16, 8]])
  np.testing.assert_array_equal(true_boxes, [[12, 4, 20, 12]])
  assert true_labels.tolist() == [0] and scores == pytest.approx([.9])
  np.testing.assert_array_equal(second[1], [[16, 8, 32, 16]])  # A score of .7 is enough.


def test_slots_take_the_last_layer_of_all_images(tmp_path, monkeypatch):
  outputs = np.random.default_rng(0).random((3, 4, 5, 4))  # Layers, batch, queries.
  task = types.SimpleNamespace(forward=lambda params, batch: {'boxes': outputs + batch})
  drawn = []
  monkeypatch.setattr(pictures, 'query_boxes', lambda boxes, path: drawn.append((boxes, path)))
  pictures.Slots('test')(run_of(tmp_path, task, [0, 1]), {}, 5)
  (boxes, path), = drawn
  np.testing.assert_array_equal(boxes, np.concatenate([outputs[2], outputs[2] + 1]))
  assert path == tmp_path / 'queries.png'
