"""Pictures of translation: which source words a translation looked at, and quality by length."""

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from matplotlib.figure import Figure

# Fonts with Hangul that systems commonly have, then the one of the extra `translation`.
_HANGUL = ('NanumGothic', 'Noto Sans CJK KR', 'Noto Sans KR', 'Malgun Gothic',
           'Apple SD Gothic Neo')


def alignment(path: pathlib.Path, source: Sequence[str], target: Sequence[str],
              weights: np.ndarray, titles: Sequence[str]) -> None:
  """Draws attention from the target's pieces (down) to the source's (across), a panel a map.

  Args:
    path: of the PNG.
    source, target: pieces as they are read.
    weights: float `[maps, len(target), len(source)]`, rows sum to 1.
    titles: of the maps.
  """
  cell = 0.24
  width, height = len(source) * cell + 1.0, len(target) * cell + 0.9
  columns = min(len(weights), max(int(14 / width), 1))
  rows = -(-len(weights) // columns)
  figure = Figure(figsize=(columns * width + 0.4, rows * height + 0.3), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  family = fonts(''.join((*source, *target)))
  for axes in grid.flat[len(weights):]:
    axes.axis('off')
  for axes, panel, title in zip(grid.flat, weights, titles, strict=False):
    axes.imshow(panel, cmap='Greys', vmin=0, vmax=1, aspect='equal', interpolation='nearest')
    axes.set_title(title, fontsize=8)
    axes.set_xticks(range(len(source)), source, rotation=90, fontsize=7, family=family)
    axes.set_yticks(range(len(target)), target, fontsize=7, family=family)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_color('lightgrey')
  figure.savefig(path, dpi=110)


def by_length(path: pathlib.Path, groups: Sequence[dict[str, Any]]) -> None:
  """Draws BLEU and exact matches against the number of source words; see `scoring.by_length`."""
  figure = Figure(figsize=(6, 3.4), layout='constrained')
  axes = figure.subplots()
  middles = [(group['from'] + group['to']) / 2 for group in groups]
  axes.plot(middles, [group['bleu'] for group in groups], 'o-', label='BLEU')
  axes.plot(middles, [100 * group['exact_match'] for group in groups], 's--',
            label='exact matches, %')
  axes.set_xticks(middles, [f'{g["from"]}-{g["to"]}\n({g["sentences"]})' for g in groups],
                  fontsize=7)
  axes.set_xlabel('source words (sentences)')
  axes.set_ylim(0, 105)
  axes.legend(fontsize=8)
  axes.grid(alpha=.3)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=110)


def fonts(text: str) -> list[str]:
  """Font families that can write `text`: matplotlib's own, and one with Hangul if there is any."""
  return ['DejaVu Sans'] + (_hangul() if any('가' <= c <= '힣' for c in text) else [])


@functools.cache
def _hangul() -> list[str]:
  from matplotlib import font_manager
  known = {font.name for font in font_manager.fontManager.ttflist}
  for name in _HANGUL:
    if name in known:
      return [name]
  # Only its file is wanted: importing the package would change matplotlib's settings.
  package = importlib.util.find_spec('koreanize_matplotlib')
  if package is None:
    logging.warning("no font with Hangul: pictures show boxes; pip install -e '.[translation]' "
                    'brings one')
    return []
  file = next(pathlib.Path(package.origin).parent.rglob('NanumGothic.ttf'))
  font_manager.fontManager.addfont(file)
  return [font_manager.FontProperties(fname=file).get_name()]
