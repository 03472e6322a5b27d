"""What every object query is for, as a picture (DETR figure 7)."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from core.evaluate import EvalRun

_SMALL = .25  # Mean side, relative to the image, below which a box is small.
_KINDS = {'small': 'tab:green', 'large, wide': 'tab:red', 'large, tall': 'tab:blue'}


def kinds_of(boxes: np.ndarray) -> np.ndarray:
  """0 for small boxes, 1 for large ones at least as wide as high and 2 for large tall ones, int
  `[...]`, of xyxy `[..., 4]` relative to the image."""
  width, height = np.moveaxis(boxes[..., 2:] - boxes[..., :2], -1, 0)
  return np.where(width * height < _SMALL ** 2, 0, np.where(width >= height, 1, 2))


def query_boxes(boxes: np.ndarray, path: pathlib.Path, count: int = 20) -> None:
  """What every query is for: the centres of its boxes on all images (figure 7).

  Args:
    boxes: `[images, queries, 4]`, xyxy relative to the image: all of them, whatever their score.
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
  kinds, centres = kinds_of(boxes), (boxes[..., :2] + boxes[..., 2:]) / 2
  for query, axes in zip(range(count), grid.flat):
    for kind, (name, tint) in enumerate(_KINDS.items()):
      drawn = centres[kinds[:, query] == kind, query]
      axes.scatter(drawn[:, 0], drawn[:, 1], s=5, color=tint, alpha=.6, linewidths=0,
                   label=name if query == 0 else None)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=(), yticks=(), aspect='equal')
    axes.set_title(f'query {query}', fontsize=8)
    axes.spines[:].set_color('lightgrey')
  figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize=8, markerscale=3)
  figure.suptitle(f'centres of the boxes that each query predicts on {len(boxes)} images',
                  fontsize=9)
  figure.savefig(path, dpi=120)


class Slots:
  """Evaluator that leaves `queries.png`, see `query_boxes`; of the layer that is measured."""

  def __init__(self, split: str, every: str = 'end'):
    self.split, self.every = split, every

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    found = [rows['boxes'] for rows in run.map(run.plan.task.detect, params, self.split)]
    if run.writes and found:
      query_boxes(np.concatenate(found), run.pictures / 'queries.png')
    return {}
