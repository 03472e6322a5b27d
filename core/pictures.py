"""Pictures: the learning curves that every run has, and how an image is drawn."""

import collections
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from core import metrics


def learning_curves(workdir: pathlib.Path) -> None:
  """Draws metrics.jsonl as pictures/learning_curves.png: a panel a metric, a line a split.

  What has been measured once is no curve; it is drawn only where there is nothing else.
  """
  path = workdir / 'metrics.jsonl'
  if jax.process_index() != 0 or not path.exists():
    return
  panels = collections.defaultdict(lambda: collections.defaultdict(list))
  for line in metrics.read(path):
    for key, value in line.items():
      split, _, name = key.partition('/')
      if name and split != 'time':
        panels[name][split].append((line['step'], value))
  if not panels:
    return
  panels = {name: splits for name, splits in panels.items()
            if any(len(points) > 1 for points in splits.values())} or panels
  # What is measured on several splits comes first: that is where people look.
  names = sorted(panels, key=lambda n: (-len(panels[n]), n != 'loss', n))
  columns = min(len(names), 3)
  rows = -(-len(names) // columns)
  figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  for axes in grid.flat[len(names):]:
    axes.axis('off')
  order = ['train', 'validation', 'test']
  for axes, name in zip(grid.flat, names):
    for split in sorted(panels[name], key=lambda s: (order.index(s) if s in order else 9, s)):
      steps, values = zip(*panels[name][split])
      few = len(steps) < 15
      label = f'{split} ({values[-1]:.4g})'
      axes.plot(steps, values, marker='o' if few else None, markersize=4, label=label,
                color=f'C{order.index(split)}' if split in order else None)
    axes.set_xlabel('step')
    axes.set_title(name.replace('_', ' '))
    axes.legend(fontsize=8, title='last value', title_fontsize=8)
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
  (workdir / 'pictures').mkdir(exist_ok=True)
  figure.savefig(workdir / 'pictures' / 'learning_curves.png', dpi=110)


def show(axes, image: np.ndarray, title: str = '', color: str = 'black') -> None:
  """Draws `[h, w, 1 or 3]`, uint8 or float in [0, 1], without axes."""
  grey = image.ndim == 3 and image.shape[-1] == 1
  axes.imshow(image[..., 0] if grey else image, cmap='gray' if grey else None,
              vmin=0, vmax=255 if image.dtype == np.uint8 else 1, interpolation='nearest')
  axes.set_title(title, fontsize=8, color=color)
  axes.axis('off')
