import numpy as np
import pytest

from detection import canvas


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
  figure = canvas.new_figure(440, 440)
  axes = canvas.panel(figure, 20, 20, image, (400, 400))
  canvas.draw_boxes(axes, image, boxes, [0, 1, 2, 3, 4, 0, 1, 2], ['traffic light 0.93'] * 8)
  figure.savefig('/dev/null', format='png')
  labels = labels_of(axes)
  assert len(labels) == 8 and overlaps(labels) == 0
  assert (labels > -1).all() and (labels < 441).all()
  # One object alone: its label stands above it.
  alone = canvas.panel(figure, 20, 20, image, (400, 400))
  canvas.draw_boxes(alone, image, boxes[:1], [0], ['cat 0.93'])
  figure.savefig('/dev/null', format='png')
  assert labels_of(alone)[0, 1] == pytest.approx(420 - 100, abs=2)


def test_colours_of_classes_differ():
  colours = np.array([canvas.colour(i) for i in range(133)])
  assert colours.min() >= 0 and colours.max() <= 1
  distance = abs(colours[:, None] - colours).max(-1) + np.eye(133)
  assert distance.min() > .02
  # The first ones, all that small data sets have, are told apart at a glance.
  assert distance[:10, :10].min() > .15
