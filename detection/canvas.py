"""What all pictures of detections are drawn with: panels in pixels, boxes, labels, colours.

Boxes are float `[n, 4]`, xyxy in pixels of the image they are drawn on.
"""

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib import patches
from matplotlib.figure import Figure

DPI = 100
MARGIN, HEAD = 18, 20  # Pixels around an image, where labels find room, and above for a title.
NARROWEST = 190  # Pixels of a figure's column, so that titles fit above narrow images.
_FONT = 8  # Points.
_PAD = 2  # Pixels around the text of a label.


def colour(label: int, instance: int = 0) -> tuple[float, float, float]:
  """The colour of a class, RGB in [0, 1], or a shade of it for the objects after the first."""
  hue = (.58 + .381966 * label + .035 * instance) % 1
  saturation, value = ((.85, .95), (.6, 1.), (1., .75))[label % 3]
  return colorsys.hsv_to_rgb(hue, saturation, value * (1., .72, .86)[instance % 3])


def new_figure(width: int, height: int) -> Figure:
  return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def sized(image: np.ndarray, least: int, most: int) -> tuple[int, int]:
  """Height and width to draw an image in: small ones grow a whole number of times until the longer
  side has `least` pixels, and no side is longer than `most`."""
  longest = max(image.shape[:2])
  scale = min(most / longest, max(1, -(-least // longest)))
  return tuple(max(1, round(n * scale)) for n in image.shape[:2])


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """An image of another height and width: with the pixels it has, or means of them."""
  method = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_NEAREST
  return cv2.resize(image, size[::-1], interpolation=method)


def panel(figure: Figure, left: int, top: int, image: np.ndarray, size: tuple[int, int],
           title: str = '', above: int = 0):
  """Axes that show an image in `size` (height, width) pixels, `left` and `top` pixels from the
  figure's corner, with a title `above` pixels higher. Coordinates in them are pixels of the image,
  whose edges are 0 and its size."""
  width, height = figure.get_size_inches() * DPI
  axes = figure.add_axes((left / width, 1 - (top + size[0]) / height,
                          size[1] / width, size[0] / height))
  axes.imshow(resized(image, size), extent=(0, image.shape[1], image.shape[0], 0), aspect='auto',
              interpolation='nearest')
  axes.axis('off')
  if title:
    figure.text((left + size[1] / 2) / width, 1 - (top - above - 4) / height, title,
                fontsize=9, ha='center', va='bottom', parse_math=False)
  return axes


def write(axes, text: str, fill) -> tuple[Any, np.ndarray]:
  """A label that has no place yet, and its width and height in units of the axes."""
  written = axes.text(0, 0, text, fontsize=_FONT, color=_beside(fill), ha='left', va='top',
                      zorder=4, parse_math=False,
                      bbox={'facecolor': fill, 'edgecolor': 'none', 'pad': _PAD * 72 / DPI})
  extent = written.get_window_extent()
  return written, np.array([extent.width + 2 * _PAD, extent.height + 2 * _PAD]) / _scale(axes)


def _beside(fill) -> str:
  """Black or white, whichever is told more easily from a colour."""
  return 'white' if np.dot(fill, (.299, .587, .114)) < .55 else 'black'


def _scale(axes) -> np.ndarray:
  """Pixels of the figure for one of the image, across and down."""
  return abs(np.subtract(*axes.transData.transform([(1, 1), (0, 0)])))


def move(axes, written, corner) -> None:
  """Puts the upper left corner of a label somewhere."""
  written.set_position(corner + _PAD / _scale(axes))


def draw_boxes(axes, image: np.ndarray, boxes, labels, texts) -> None:
  """Draws boxes, the first on top, and their labels where these hide least."""
  height, width = image.shape[:2]
  boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float64).reshape(-1, 4)
  for box, label in list(zip(boxes, labels))[::-1]:
    tint = colour(label)
    # With a seam around it a line is seen on any ground.
    for thickness, edge, alpha in ((3.2, _beside(tint), .5), (1.6, tint, 1)):
      axes.add_patch(patches.Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, edgecolor=edge,
                                       alpha=alpha, linewidth=thickness, clip_on=False))
  taken = np.zeros((0, 4))
  for box, label, text in zip(boxes, labels, texts):
    written, size = write(axes, text, colour(label))
    room = np.array([[-MARGIN, -MARGIN], [MARGIN, MARGIN]]) / _scale(axes) + [
        [0, 0], [width, height]]
    places = _places(box, size)
    spots = np.concatenate([places, places + size], 1)
    inside = _shared(spots, room.reshape(1, 4))
    cost = (40 * (_shared(spots, taken) + size.prod() - inside) + _shared(spots, boxes))
    best = spots[np.argmin(cost / size.prod() + .002 * np.arange(len(spots)))]
    taken = np.concatenate([taken, best[None]])
    move(axes, written, best[:2])


def _places(box: np.ndarray, size: np.ndarray) -> np.ndarray:
  """Corners for a label of a box, best first: above, below, beside, then inside it."""
  across = np.linspace(box[0], box[2] - size[0], 7)
  down = np.linspace(box[1], box[3] - size[1], 7)
  row = lambda y: np.stack([across, np.full(7, y)], 1)
  column = lambda x: np.stack([np.full(7, x), down], 1)
  return np.concatenate([
      row(box[1] - size[1]), row(box[3]), column(box[2]), column(box[0] - size[0]), row(box[1]),
      row(box[3] - size[1])])


def _shared(spots: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Area that each of xyxy `[n, 4]` has in common with all of `[m, 4]`: `[n]`."""
  low = np.maximum(spots[:, None, :2], others[:, :2])
  high = np.minimum(spots[:, None, 2:], others[:, 2:])
  return np.maximum(high - low, 0).prod(-1).sum(-1)


def class_name(names: Sequence[str], label: int) -> str:
  """A class's name; its number where it has none."""
  return label < len(names) and names[label] or f'class {label}'
