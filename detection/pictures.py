"""What a detector found and where it looked, as pictures (DETR figures 3, 5, 6 and 7).

Boxes are float `[n, 4]`, xyxy in pixels of the image they are drawn on. A `heat` is a map over the
cells of the features the model saw; cell (i, j) covers the `stride` x `stride` pixels from (i, j) *
stride on, and maps may go beyond the image, where its padding was.
"""

import colorsys
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps, patches
from matplotlib.figure import Figure

from core.evaluate import EvalRun

_DPI = 100
_FONT = 8  # Points.
_PAD = 2  # Pixels around the text of a label.
_MARGIN, _HEAD = 18, 20  # Pixels around an image, where labels find room, and above for a title.
_NARROWEST = 190  # Pixels of a figure's column, so that titles fit above narrow images.
_SMALL = .25  # Mean side, relative to the image, below which a box is small.
_KINDS = {'small': 'tab:green', 'large, wide': 'tab:red', 'large, tall': 'tab:blue'}


def colour(label: int, instance: int = 0) -> tuple[float, float, float]:
  """The colour of a class, RGB in [0, 1], or a shade of it for the objects after the first."""
  hue = (.58 + .381966 * label + .035 * instance) % 1
  saturation, value = ((.85, .95), (.6, 1.), (1., .75))[label % 3]
  return colorsys.hsv_to_rgb(hue, saturation, value * (1., .72, .86)[instance % 3])


# --- Figures -------------------------------------------------------------------------------------


def _figure(width: int, height: int) -> Figure:
  return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)


def _sized(image: np.ndarray, least: int, most: int) -> tuple[int, int]:
  """Height and width to draw an image in: small ones grow a whole number of times until the longer
  side has `least` pixels, and no side is longer than `most`."""
  longest = max(image.shape[:2])
  scale = min(most / longest, max(1, -(-least // longest)))
  return tuple(max(1, round(n * scale)) for n in image.shape[:2])


def _drawn(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """An image of another height and width: with the pixels it has, or means of them."""
  method = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_NEAREST
  return cv2.resize(image, size[::-1], interpolation=method)


def _panel(figure: Figure, left: int, top: int, image: np.ndarray, size: tuple[int, int],
           title: str = '', above: int = 0):
  """Axes that show an image in `size` (height, width) pixels, `left` and `top` pixels from the
  figure's corner, with a title `above` pixels higher. Coordinates in them are pixels of the image,
  whose edges are 0 and its size."""
  width, height = figure.get_size_inches() * _DPI
  axes = figure.add_axes((left / width, 1 - (top + size[0]) / height,
                          size[1] / width, size[0] / height))
  axes.imshow(_drawn(image, size), extent=(0, image.shape[1], image.shape[0], 0), aspect='auto',
              interpolation='nearest')
  axes.axis('off')
  if title:
    figure.text((left + size[1] / 2) / width, 1 - (top - above - 4) / height, title,
                fontsize=9, ha='center', va='bottom', parse_math=False)
  return axes


def _write(axes, text: str, fill) -> tuple[Any, np.ndarray]:
  """A label that has no place yet, and its width and height in units of the axes."""
  written = axes.text(0, 0, text, fontsize=_FONT, color=_beside(fill), ha='left', va='top',
                      zorder=4, parse_math=False,
                      bbox={'facecolor': fill, 'edgecolor': 'none', 'pad': _PAD * 72 / _DPI})
  extent = written.get_window_extent()
  return written, np.array([extent.width + 2 * _PAD, extent.height + 2 * _PAD]) / _scale(axes)


def _beside(fill) -> str:
  """Black or white, whichever is told more easily from a colour."""
  return 'white' if np.dot(fill, (.299, .587, .114)) < .55 else 'black'


def _scale(axes) -> np.ndarray:
  """Pixels of the figure for one of the image, across and down."""
  return abs(np.subtract(*axes.transData.transform([(1, 1), (0, 0)])))


def _move(axes, written, corner) -> None:
  """Puts the upper left corner of a label somewhere."""
  written.set_position(corner + _PAD / _scale(axes))


def _draw_boxes(axes, image: np.ndarray, boxes, labels, texts) -> None:
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
    written, size = _write(axes, text, colour(label))
    room = np.array([[-_MARGIN, -_MARGIN], [_MARGIN, _MARGIN]]) / _scale(axes) + [
        [0, 0], [width, height]]
    places = _places(box, size)
    spots = np.concatenate([places, places + size], 1)
    inside = _shared(spots, room.reshape(1, 4))
    cost = (40 * (_shared(spots, taken) + size.prod() - inside) + _shared(spots, boxes))
    best = spots[np.argmin(cost / size.prod() + .002 * np.arange(len(spots)))]
    taken = np.concatenate([taken, best[None]])
    _move(axes, written, best[:2])


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


def _named(names: Sequence[str], label: int) -> str:
  """A class's name; its number where it has none."""
  return label < len(names) and names[label] or f'class {label}'


# --- Objects -------------------------------------------------------------------------------------


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
  sizes = np.array([_sized(one[0], least, most) for one in found])
  beside = 1 if found[0][4] is None else 2
  columns = min(columns, len(found))
  cell = max(sizes[:, 1].max() + 2 * _MARGIN, _NARROWEST)
  tops = np.cumsum([0] + [sizes[i:i + columns, 0].max() + 2 * _MARGIN + _HEAD
                          for i in range(0, len(found), columns)])
  figure = _figure(cell * beside * columns, tops[-1])
  for number, (image, boxes, labels, scores, truth) in enumerate(found):
    row, column = divmod(number, columns)
    size = tuple(sizes[number].tolist())
    order = np.argsort(-np.asarray(scores), kind='stable')
    boxes, labels, scores = (np.asarray(part)[order] for part in (boxes, labels, scores))
    sides = [('found' if len(boxes) else 'nothing found', boxes, labels,
              [f'{_named(names, i)} {score:.2f}' for i, score in zip(labels, scores)])]
    if truth is not None:
      sides.append(('ground truth', *truth, [_named(names, i) for i in truth[1]]))
    for side, (title, *drawn) in enumerate(sides):
      left = (column * beside + side) * cell + (cell - size[1]) // 2
      axes = _panel(figure, left, tops[row] + _HEAD + _MARGIN, image, size, title, _MARGIN)
      _draw_boxes(axes, image, *drawn)
  figure.savefig(path, dpi=_DPI)


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
  size = _sized(image, 400, 800)
  rows, columns = (np.arange(out) * n // out for n, out in zip(ids.shape, size))
  ids = ids[rows[:, None], columns]
  grey = np.repeat(_drawn(image, size).mean(-1, keepdims=True) / 255, 3, -1)
  shown, fills, counts = .6 * grey, {}, {}
  for segment in segments:
    label = segment['label']
    counts[label] = counts.get(label, -1) + 1
    fill = np.array(colour(label, counts[label]))
    fills[segment['id']] = fill if segment['isthing'] else .35 * fill + .65
    shown[ids == segment['id']] = (.3 * grey + .7 * fills[segment['id']])[ids == segment['id']]
  edge = np.zeros(size, bool)
  edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
  edge[1:] |= ids[1:] != ids[:-1]
  shown[edge] = 1.
  cell = max(size[1] + 2 * _MARGIN, _NARROWEST)
  figure = _figure(2 * cell, size[0] + _MARGIN + _HEAD)
  left = (cell - size[1]) // 2
  _panel(figure, left, _HEAD, image, size, 'image')
  axes = _panel(figure, left + cell, _HEAD, shown, size,
                'segments' if segments else 'no segment found')
  taken = []
  middles = {s['id']: _depth(ids == s['id']) for s in segments if (ids == s['id']).any()}
  # The small ones choose first: large ones have room elsewhere.
  for segment in sorted(segments, key=lambda s: (ids == s['id']).sum()):
    if segment['id'] in middles:
      fill = fills[segment['id']]
      written, extent = _write(axes, _named(names, segment['label']), fill)
      _move(axes, written, _put(axes, middles[segment['id']], extent, taken) - extent / 2)
  figure.savefig(path, dpi=_DPI)


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


# --- Attention -----------------------------------------------------------------------------------


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
  small = _sized(image, 200, 330)
  step = small[0] + _HEAD + 8  # From one map down to the next.
  large = (step + small[0], round((step + small[0]) * small[1] / small[0]))
  cell = max(small[1] + 2 * _MARGIN, _NARROWEST)
  order = sorted(range(len(points)), key=lambda i: points[i][1])
  sides = [sorted(part, key=lambda i: points[i][0])
           for part in (order[:-(-len(points) // 2)], order[-(-len(points) // 2):])]
  middle = max(large[1] + 2 * _MARGIN, _NARROWEST)
  figure = _figure(middle + cell * min(len(points), 2), large[0] + _HEAD + _MARGIN)
  axes = _panel(figure, cell + (middle - large[1]) // 2, _HEAD, image, large, 'image')
  for side, left in zip(sides, (0, cell + middle)):
    for place, i in enumerate(side):
      # One alone stands halfway down.
      down = _HEAD + (place * step if len(side) > 1 else step // 2)
      heat = attention_to(maps, points[i], stride)
      shown = _panel(figure, left + (cell - small[1]) // 2, down, overlay(image, heat, stride),
                     small, f'who attends to point {i + 1}')
      for panel, marker in ((axes, 13), (shown, 7)):
        panel.plot(points[i][1], points[i][0], 'o', markersize=marker, color=f'C{i}',
                   markeredgecolor='white', clip_on=False)
      axes.text(points[i][1], points[i][0], str(i + 1), fontsize=8, color='white', ha='center',
                va='center_baseline', weight='bold')
      shown.add_patch(patches.Rectangle((0, 0), 1, 1, transform=shown.transAxes, fill=False,
                                        edgecolor=f'C{i}', linewidth=4, clip_on=False))
  figure.savefig(path, dpi=_DPI)


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
    return detections(image, boxes, labels, scores, names, path)
  size = _sized(image, 180, 260)
  columns = min(columns, len(boxes))
  cell = max(size[1] + _MARGIN, _NARROWEST)
  tall = 2 * size[0] + _HEAD + _MARGIN
  figure = _figure(cell * columns, tall * -(-len(boxes) // columns))
  for i, (box, label, heat) in enumerate(zip(boxes, labels, maps)):
    left = i % columns * cell + (cell - size[1]) // 2
    top = i // columns * tall + _HEAD
    _panel(figure, left, top, overlay(image, heat, stride), size,
           f'{_named(names, label)} {scores[i]:.2f}')
    _draw_boxes(_panel(figure, left, top + size[0] + 4, image, size), image, box[None], [label], [])
  figure.savefig(path, dpi=_DPI)


# --- Queries -------------------------------------------------------------------------------------


def kinds_of(boxes: np.ndarray) -> np.ndarray:
  """0 for small boxes, 1 for large ones at least as wide as high and 2 for large tall ones, int
  `[...]`, of cxcywh `[..., 4]` relative to the image."""
  width, height = boxes[..., 2], boxes[..., 3]
  return np.where(width * height < _SMALL ** 2, 0, np.where(width >= height, 1, 2))


def query_boxes(boxes: np.ndarray, path: pathlib.Path, count: int = 20) -> None:
  """What every query is for: the centres of its boxes on all images (figure 7).

  Args:
    boxes: `[images, queries, 4]`, cxcywh relative to the image: all of them, whatever their score.
    path: the PNG to write.
    count: the first so many queries are drawn.
  """
  count = min(count, boxes.shape[1])
  columns = min(5, count)
  rows = -(-count // columns)
  figure = Figure(figsize=(max(1.8 * columns, 4.5), 2. * rows + .6), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  for axes in grid.flat[count:]:
    axes.axis('off')
  kinds = kinds_of(boxes)
  for query, axes in zip(range(count), grid.flat):
    for kind, (name, tint) in enumerate(_KINDS.items()):
      drawn = boxes[kinds[:, query] == kind, query]
      axes.scatter(drawn[:, 0], drawn[:, 1], s=5, color=tint, alpha=.6, linewidths=0,
                   label=name if query == 0 else None)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=(), yticks=(), aspect='equal')
    axes.set_title(f'query {query}', fontsize=8)
    axes.spines[:].set_color('lightgrey')
  figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize=8, markerscale=3)
  figure.suptitle(f'centres of the boxes that each query predicts on {len(boxes)} images',
                  fontsize=9)
  figure.savefig(path, dpi=120)


# --- Evaluators ----------------------------------------------------------------------------------


class Examples:
  """Evaluator that leaves `detections.png`: images of a split with what was found and what is
  there. Boxes are drawn from the score `config.eval.threshold` on."""

  def __init__(self, split: str, every: str = '', shown: int = 12):
    self.split, self.every, self.shown = split, every, shown
    self._fn = None

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    task = run.plan.task
    if self._fn is None:
      self._fn = lambda params, batch: {
          **{name: batch[name] for name in ('image', 'image_size', 'boxes', 'labels', 'objects')},
          **{f'found_{name}': x for name, x in task.detect(params, batch).items()}}
    found = []
    for rows in run.map(self._fn, params, self.split):
      found += [{name: x[i] for name, x in rows.items()} for i in range(len(rows['image']))]
      if len(found) >= self.shown:
        break
    if run.writes and found:
      examples([_example(row, task.config.eval.threshold) for row in found[:self.shown]],
               task.class_names, run.pictures / 'detections.png')
    return {}


def _example(row: dict[str, np.ndarray], threshold: float) -> tuple:
  """A row of a batch with what was found, in pixels and as `examples` wants it."""
  height, width = row['image_size']
  scale = np.array([width, height, width, height])
  kept = row['found_scores'] >= threshold
  centre, size = np.split(row['boxes'][:row['objects']], 2, axis=1)
  true = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
  return (row['image'][:height, :width], row['found_boxes'][kept] * scale,
          row['found_labels'][kept], row['found_scores'][kept],
          (true * scale, row['labels'][:row['objects']]))


class Slots:
  """Evaluator that leaves `queries.png`, see `query_boxes`."""

  def __init__(self, split: str, every: str = 'end'):
    self.split, self.every = split, every
    self._fn = None

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    task = run.plan.task
    if self._fn is None:
      self._fn = lambda params, batch: {'boxes': task.forward(params, batch)['boxes'][-1]}
    found = [rows['boxes'] for rows in run.map(self._fn, params, self.split)]
    if run.writes and found:
      query_boxes(np.concatenate(found), run.pictures / 'queries.png')
    return {}
