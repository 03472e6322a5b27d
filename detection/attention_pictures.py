"""Where a detector looked, as pictures (DETR figures 3 and 6).

A `heat` is a map over the cells of the features the model saw; cell (i, j) covers the `stride` x
`stride` pixels from (i, j) * stride on, and maps may go beyond the image, where its padding was.
"""

import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib import colormaps, patches

from detection import canvas, pictures


def overlay(image: np.ndarray, heat: np.ndarray, stride: int) -> np.ndarray:
  """An image in grey under a heat in colour, float `[h, w, 3]` in [0, 1].

  Args:
    image: uint8 `[h, w, 3]`, as the model saw it, without padding.
    heat: float `[rows, columns]`, not negative; its largest on the image is the brightest.
    stride: pixels of the image to a cell.
  """
  rows, columns = heat.shape
  large = cv2.resize(heat.astype(np.float32), (columns * stride, rows * stride),
                     interpolation=cv2.INTER_LINEAR)[:image.shape[0], :image.shape[1]]
  large = large / max(large.max(), 1e-12)
  return .4 * image.mean(-1, keepdims=True) / 255 + .6 * colormaps['inferno'](large)[..., :3]


def attention_to(maps: np.ndarray, point: tuple[float, float], stride: int) -> np.ndarray:
  """Who attends to a point: the column of the attention matrix, as in the reference implementation.

  Args:
    maps: float `[h, w, h, w]`; from each cell (of the first two axes) to each (of the others).
    point: y and x in pixels.
    stride: pixels to a cell.

  Returns:
    `[h, w]`, what every cell gives the one at the point.
  """
  row, column = (min(int(at // stride), n - 1) for at, n in zip(point, maps.shape[2:]))
  return maps[:, :, row, column]


def encoder_attention(image: np.ndarray, maps: np.ndarray, points: Sequence[tuple[float, float]],
                      stride: int, path: pathlib.Path) -> None:
  """An image with points on it, and around it who attends to each (figure 3).

  Args:
    image: uint8 `[h, w, 3]`, as the model saw it, without padding.
    maps: see `attention_to`; of the last layer, averaged over heads.
    points: y and x in pixels of the image, one to four.
    stride: pixels of the image to a cell.
    path: the PNG to write.
  """
  small = canvas.sized(image, 200, 330)
  step = small[0] + canvas.HEAD + 8  # From one map down to the next.
  large = (step + small[0], round((step + small[0]) * small[1] / small[0]))
  cell = max(small[1] + 2 * canvas.MARGIN, canvas.NARROWEST)
  order = sorted(range(len(points)), key=lambda i: points[i][1])
  sides = [sorted(part, key=lambda i: points[i][0])
           for part in (order[:-(-len(points) // 2)], order[-(-len(points) // 2):])]
  middle = max(large[1] + 2 * canvas.MARGIN, canvas.NARROWEST)
  figure = canvas.new_figure(middle + cell * min(len(points), 2),
                             large[0] + canvas.HEAD + canvas.MARGIN)
  axes = canvas.panel(figure, cell + (middle - large[1]) // 2, canvas.HEAD, image, large, 'image')
  for side, left in zip(sides, (0, cell + middle)):
    for place, i in enumerate(side):
      # One alone stands halfway down.
      down = canvas.HEAD + (place * step if len(side) > 1 else step // 2)
      heat = attention_to(maps, points[i], stride)
      shown = canvas.panel(figure, left + (cell - small[1]) // 2, down,
                           overlay(image, heat, stride), small, f'who attends to point {i + 1}')
      for panel, marker in ((axes, 13), (shown, 7)):
        panel.plot(points[i][1], points[i][0], 'o', markersize=marker, color=f'C{i}',
                   markeredgecolor='white', clip_on=False)
      axes.text(points[i][1], points[i][0], str(i + 1), fontsize=8, color='white', ha='center',
                va='center_baseline', weight='bold')
      shown.add_patch(patches.Rectangle((0, 0), 1, 1, transform=shown.transAxes, fill=False,
                                        edgecolor=f'C{i}', linewidth=4, clip_on=False))
  figure.savefig(path, dpi=canvas.DPI)


def decoder_attention(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray,
                      maps: np.ndarray, stride: int, names: Sequence[str], path: pathlib.Path,
                      columns: int = 6) -> None:
  """Where the decoder looked for each object, above the object's box (figure 6).

  Args:
    image: uint8 `[h, w, 3]`, as the model saw it, without padding.
    boxes: `[objects, 4]`.
    labels: int `[objects]`, class indices.
    scores: float `[objects]`.
    maps: float `[objects, rows, columns]`, cross-attention of the last layer, averaged over heads.
    stride: pixels of the image to a cell.
    names: class index -> name.
    path: the PNG to write.
    columns: objects in a row.

  With no object the image alone is drawn, as `detections` does.
  """
  if not len(boxes):
    return pictures.detections(image, boxes, labels, scores, names, path)
  size = canvas.sized(image, 180, 260)
  columns = min(columns, len(boxes))
  cell = max(size[1] + canvas.MARGIN, canvas.NARROWEST)
  tall = 2 * size[0] + canvas.HEAD + canvas.MARGIN
  figure = canvas.new_figure(cell * columns, tall * -(-len(boxes) // columns))
  for i, (box, label, heat) in enumerate(zip(boxes, labels, maps)):
    left = i % columns * cell + (cell - size[1]) // 2
    top = i // columns * tall + canvas.HEAD
    canvas.panel(figure, left, top, overlay(image, heat, stride), size,
                 f'{canvas.class_name(names, label)} {scores[i]:.2f}')
    below = canvas.panel(figure, left, top + size[0] + 4, image, size)
    canvas.draw_boxes(below, image, box[None], [label], [])
  figure.savefig(path, dpi=canvas.DPI)
