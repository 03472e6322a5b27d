"""What a detector found, as pictures: boxes and segments, beside what is there (DETR figures 5, 9).

Boxes are float `[n, 4]`, xyxy in pixels of the image they are drawn on.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from core.evaluate import EvalRun
from detection import canvas


def detections(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray,
               names: Sequence[str], path: pathlib.Path,
               truth: tuple[np.ndarray, np.ndarray] | None = None) -> None:
  """An image with what was found on it, and beside it what is there.

  Args:
    image: uint8 `[h, w, 3]`.
    boxes: `[n, 4]`.
    labels: int `[n]`, class indices.
    scores: float `[n]`.
    names: class index -> name.
    path: the PNG to write.
    truth: boxes and labels of the ground truth.
  """
  examples([(image, boxes, labels, scores, truth)], names, path, least=400, most=1000)


def examples(found: Sequence[tuple], names: Sequence[str], path: pathlib.Path, columns: int = 3,
             least: int = 300, most: int = 380) -> None:
  """Many images as `detections` draws one.

  Args:
    found: of each image 'image', 'boxes', 'labels', 'scores' and 'truth', see `detections`; with
      the truth for all of them or for none.
    names: class index -> name.
    path: the PNG to write.
    columns: images in a row.
    least, most: pixels of the longer side; smaller images grow a whole number of times.
  """
  sizes = np.array([canvas.sized(one[0], least, most) for one in found])
  beside = 1 if found[0][4] is None else 2
  columns = min(columns, len(found))
  cell = max(sizes[:, 1].max() + 2 * canvas.MARGIN, canvas.NARROWEST)
  tops = np.cumsum([0] + [sizes[i:i + columns, 0].max() + 2 * canvas.MARGIN + canvas.HEAD
                          for i in range(0, len(found), columns)])
  figure = canvas.new_figure(cell * beside * columns, tops[-1])
  for number, (image, boxes, labels, scores, truth) in enumerate(found):
    row, column = divmod(number, columns)
    size = tuple(sizes[number].tolist())
    order = np.argsort(-np.asarray(scores), kind='stable')
    boxes, labels, scores = (np.asarray(part)[order] for part in (boxes, labels, scores))
    sides = [('found' if len(boxes) else 'nothing found', boxes, labels,
              [f'{canvas.class_name(names, i)} {score:.2f}' for i, score in zip(labels, scores)])]
    if truth is not None:
      sides.append(('ground truth', *truth, [canvas.class_name(names, i) for i in truth[1]]))
    for side, (title, *drawn) in enumerate(sides):
      left = (column * beside + side) * cell + (cell - size[1]) // 2
      axes = canvas.panel(figure, left, tops[row] + canvas.HEAD + canvas.MARGIN, image, size, title,
                          canvas.MARGIN)
      canvas.draw_boxes(axes, image, *drawn)
  figure.savefig(path, dpi=canvas.DPI)


def panoptic_map(image: np.ndarray, ids: np.ndarray, segments: Sequence[dict[str, Any]],
                 names: Sequence[str], path: pathlib.Path) -> None:
  """An image beside its segments: stuff in pale colours, things in strong ones, all with names.

  Args:
    image: uint8 `[h, w, 3]`.
    ids: int `[h, w]`, of each pixel the id of a segment; others belong to nobody and stay grey.
    segments: with 'id', 'label' (class index) and 'isthing'.
    names: class index -> name.
    path: the PNG to write.
  """
  size = canvas.sized(image, 400, 800)
  rows, columns = (np.arange(out) * n // out for n, out in zip(ids.shape, size))
  ids = ids[rows[:, None], columns]
  grey = np.repeat(canvas.resized(image, size).mean(-1, keepdims=True) / 255, 3, -1)
  shown, fills, counts = .6 * grey, {}, {}
  for segment in segments:
    label = segment['label']
    counts[label] = counts.get(label, -1) + 1
    fill = np.array(canvas.colour(label, counts[label]))
    fills[segment['id']] = fill if segment['isthing'] else .35 * fill + .65
    shown[ids == segment['id']] = (.3 * grey + .7 * fills[segment['id']])[ids == segment['id']]
  edge = np.zeros(size, bool)
  edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
  edge[1:] |= ids[1:] != ids[:-1]
  shown[edge] = 1.
  cell = max(size[1] + 2 * canvas.MARGIN, canvas.NARROWEST)
  figure = canvas.new_figure(2 * cell, size[0] + canvas.MARGIN + canvas.HEAD)
  left = (cell - size[1]) // 2
  canvas.panel(figure, left, canvas.HEAD, image, size, 'image')
  axes = canvas.panel(figure, left + cell, canvas.HEAD, shown, size,
                      'segments' if segments else 'no segment found')
  taken = []
  middles = {s['id']: _depth(ids == s['id']) for s in segments if (ids == s['id']).any()}
  # The small ones choose first: large ones have room elsewhere.
  for segment in sorted(segments, key=lambda s: (ids == s['id']).sum()):
    if segment['id'] in middles:
      fill = fills[segment['id']]
      written, extent = canvas.write(axes, canvas.class_name(names, segment['label']), fill)
      canvas.move(axes, written, _put(axes, middles[segment['id']], extent, taken) - extent / 2)
  figure.savefig(path, dpi=canvas.DPI)


def _depth(mask: np.ndarray) -> np.ndarray:
  """How far every pixel of a bool `[h, w]` is from the nearest pixel outside it, as float32."""
  framed = np.pad(mask.astype(np.uint8), 1)
  return cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]


def _put(axes, depth: np.ndarray, extent: np.ndarray, taken: list) -> np.ndarray:
  """Where the middle of a label goes: deep in its segment and on no other label.

  Where its segment has no room, as near as there is some, with a line to the segment.
  """
  free = np.zeros(depth.shape, bool)
  across, down = np.ceil(extent / 2).astype(int)
  free[down:depth.shape[0] - down, across:depth.shape[1] - across] = True
  for x0, y0, x1, y1 in taken:
    free[max(y0 - down, 0):y1 + down, max(x0 - across, 0):x1 + across] = False
  middle = np.unravel_index(depth.argmax(), depth.shape)
  spot = middle
  if (inside := depth * free).any():
    spot = np.unravel_index(inside.argmax(), depth.shape)
  elif free.any():
    places = np.argwhere(free)
    spot = places[np.square(places - middle).sum(1).argmin()]
    axes.plot((middle[1], spot[1]), (middle[0], spot[0]), color='white', linewidth=1, zorder=3)
  y, x = (int(n) for n in spot)
  taken.append((x - across, y - down, x + across, y + down))
  return np.array([x, y], np.float64)


class Examples:
  """Evaluator that leaves `detections.png`: images of a split with what was found and what is
  there. Boxes are drawn from the score `config.eval.threshold` on."""

  def __init__(self, split: str, every: str = '', shown: int = 12):
    self.split, self.every, self.shown = split, every, shown

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    task = run.plan.task
    found = []
    for rows in run.map(task.detect, params, self.split):
      found += [{name: x[i] for name, x in rows.items()} for i in range(len(rows['index']))]
      if len(found) >= self.shown:
        break
    if run.writes and found:
      # Images are read again here, so that the program is the one that measures the boxes.
      source, rng = task.dataset(self.split), np.random.default_rng(0)
      drawn = [_example(task.transform(dict(source[row['index']]), rng, train=False), row,
                        task.config.eval.threshold) for row in found[:self.shown]]
      examples(drawn, task.class_names, run.pictures / 'detections.png')
    return {}


def _example(row: dict[str, np.ndarray], seen: dict[str, np.ndarray], threshold: float) -> tuple:
  """A row of a batch with what was seen on it, in pixels and as `examples` wants it."""
  height, width = row['image_size']
  scale = np.array([width, height, width, height])
  kept = seen['scores'] >= threshold
  centre, size = np.split(row['boxes'][:row['objects']], 2, axis=1)
  true = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
  return (row['image'][:height, :width], seen['boxes'][kept] * scale, seen['labels'][kept],
          seen['scores'][kept], (true * scale, row['labels'][:row['objects']]))
