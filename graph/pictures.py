"""What vectors look like: nodes on a plane (metapath2vec, figures 1 and 5); neighbours as bars."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import threadpoolctl
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from core.evaluate import EvalRun
from graph import evaluation

_POINTS = 3000, 1500  # The most nodes on the left and on the right of projection.png.
_SMALL, _NAMED = 60, 12  # Nodes of the types that are drawn large, and names that are written.
_COLORS = 9  # Labels with a colour of their own; all others are grey.
_LETTERS = 28  # The most in a name.
_MARKERS = 'oDs^vPX*'
# Where a name may be, in points from its node.
_BESIDE = ((7, 5), (7, -11), (-7, 5), (-7, -11), (9, 15), (9, -21), (-9, 15), (-9, -21))


class Projection:
  """Evaluator that leaves projection.png: nodes on a plane, drawn by the seed, evenly over types.

  On the left are the two principal components of the vectors, coloured by type. On the right is
  t-SNE of the vectors at length 1, of the types with labels, coloured by label (the first of
  several), and of types of few nodes, with names; without labels, of all, coloured by type.
  """
  every = 'end'

  def __init__(self, task: Any):
    self._task = task

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    vectors, occurs = evaluation.vectors_of(self._task, params)
    counts = self._task.counts(params)
    if run.writes and occurs.sum() > 2:
      self._draw(vectors, occurs, counts, run.pictures / 'projection.png')
    return {}

  def _draw(self, vectors: np.ndarray, occurs: np.ndarray, counts: np.ndarray,
            path: pathlib.Path) -> None:
    graph, seed = self._task.graph, self._task.config.seed
    nodes = {type: graph.nodes_of(type).start + np.flatnonzero(occurs[graph.nodes_of(type)])
             for type in graph.types}
    nodes = {type: ids for type, ids in nodes.items() if len(ids)}
    small = {type for type, ids in nodes.items() if len(ids) <= _SMALL}
    form = {type: _MARKERS[i % len(_MARKERS)] for i, type in enumerate(nodes)}
    color_of_type = {type: f'C{i % 10}' for i, type in enumerate(nodes)}
    figure = Figure(figsize=(13, 7), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2)

    drawn = evenly(nodes, _POINTS[0], seed)
    places, shares = principal(vectors[np.concatenate(list(drawn.values()))])
    _scatter(left, _divided(places, drawn), {
        type: [color_of_type[type]] * len(ids) for type, ids in drawn.items()}, form, small)
    left.set_title('principal components, by type', fontsize=10)
    left.set_xlabel(f'component 1 ({shares[0]:.0%} of the variance)', fontsize=9)
    left.set_ylabel(f'component 2 ({shares[1]:.0%} of the variance)', fontsize=9)
    _legend(left, color_of_type)

    labels = {some.type: some for some in evaluation.labelled(graph, occurs)}
    drawn = evenly({type: labels[type].ids if type in labels else ids
                    for type, ids in nodes.items()
                    if not labels or type in labels or type in small}, _POINTS[1], seed)
    places = _divided(tsne(vectors[np.concatenate(list(drawn.values()))], seed), drawn)
    colors, meaning = _by_label(labels, drawn) if labels else (
        {type: [color_of_type[type]] * len(ids) for type, ids in drawn.items()}, color_of_type)
    _scatter(right, places, colors, form, small)
    right.set_title(f't-SNE of {", ".join(drawn)}, by {"label" if labels else "type"}',
                    fontsize=10, parse_math=False)
    right.set(xticks=[], yticks=[])
    _legend(right, meaning)
    names = [(counts[id], str(graph.names[id]), place) for type in drawn if type in small
             for id, place in zip(drawn[type], places[type])]
    figure.draw_without_rendering()  # It is only now that the axes have their size.
    figure.set_layout_engine('none')
    names.sort(key=lambda name: -name[0])
    _write(right, [name[1:] for name in names[:_NAMED]], [place for *_, place in names])
    figure.savefig(path)


def evenly(nodes: Mapping[str, np.ndarray], most: int, seed: int) -> dict[str, np.ndarray]:
  """Draws so many nodes in all, of every type as many if it has them; ascending."""
  rng, drawn = np.random.default_rng(seed), {}
  for type in sorted(nodes, key=lambda type: len(nodes[type])):  # What they leave, others take.
    count = (most - sum(map(len, drawn.values()))) // (len(nodes) - len(drawn))
    drawn[type] = np.sort(rng.permutation(nodes[type])[:count])
  return {type: drawn[type] for type in nodes}


def principal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The first two principal components `[n, 2]`, and their shares of the variance."""
  centred = vectors - vectors.mean(axis=0)
  left, size, _ = np.linalg.svd(np.pad(centred, ((0, 0), (0, 1))), full_matrices=False)
  return (left * size)[:, :2], size[:2] ** 2 / max((size ** 2).sum(), 1e-30)


def tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
  """t-SNE of vectors at length 1, float32 `[n, 2]`, of at least two."""
  from sklearn.manifold import TSNE  # slow to import

  x = evaluation.unit(vectors)
  with threadpoolctl.threadpool_limits(1):  # See graph.evaluation.
    return TSNE(perplexity=min(30, (len(x) - 1) / 3), init='pca' if min(x.shape) > 1 else 'random',
                max_iter=500, random_state=seed % 2 ** 32).fit_transform(x)


def _divided(places: np.ndarray, drawn: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  ends = np.cumsum([len(ids) for ids in drawn.values()])
  return dict(zip(drawn, np.split(places, ends[:-1])))


def _by_label(labels: Mapping[str, evaluation.Labelled],
              drawn: Mapping[str, np.ndarray]) -> tuple[dict[str, list[str]], dict[str, str]]:
  """The colour of each node by type, and what colours mean. Nodes without a label are black."""
  first, known = {}, {}
  for type, some in labels.items():
    of = dict(zip(some.ids.tolist(), some.has.argmax(axis=1)))
    first[type] = [some.classes[of[id]] for id in drawn[type].tolist()]
    for label in first[type]:
      known[label] = known.get(label, 0) + 1
  # The most frequent have a colour, in the order of their names; C7 is grey.
  kept = sorted(sorted(known, key=lambda label: -known[label])[:_COLORS])
  meaning = dict(zip(kept, (f'C{i}' for i in range(10) if i != 7)))
  colors = {type: [meaning.get(label, 'lightgrey') for label in first[type]] if type in first
            else ['black'] * len(ids) for type, ids in drawn.items()}
  return colors, meaning | ({'other': 'lightgrey'} if len(known) > len(kept) else {})


def _scatter(axes, places: Mapping[str, np.ndarray], colors: Mapping[str, Sequence[str]],
             form: Mapping[str, str], small: set[str]) -> None:
  """Draws nodes of several types, those of small ones large and on top."""
  for type, points in places.items():
    large = type in small
    axes.scatter(*points.T, c=colors[type], marker=form[type], s=55 if large else 9,
                 linewidth=.8 if large else 0, edgecolor='black' if large else None,
                 alpha=1 if large else .7, zorder=3 if large else 2)
    axes.scatter([], [], c='none', marker=form[type], s=30, edgecolor='black', label=short(type))
  axes.spines[:].set_color('lightgrey')
  axes.tick_params(labelsize=8, color='lightgrey')


def _legend(axes, meaning: Mapping[str, str]) -> None:
  """Below the axes: the forms of types that `_scatter` drew, then what colours mean."""
  forms, types = axes.get_legend_handles_labels()
  if list(map(short, meaning)) == types:  # By type: the forms get the colours.
    for handle, color in zip(forms, meaning.values()):
      handle.set(facecolor=color, edgecolor='black')
  else:
    for label, color in meaning.items():
      axes.scatter([], [], color=color, s=30, label=short(label))
  handles, texts = axes.get_legend_handles_labels()
  columns = min(max(90 // (max(map(len, texts)) + 6), 1), 6)  # As fit beneath the axes.
  legend = axes.legend(handles, texts, fontsize=8, loc='upper center', bbox_to_anchor=(.5, -.08),
                       ncols=columns, frameon=False)
  for text in legend.get_texts():
    text.set_parse_math(False)


def _write(axes, names: Sequence[tuple[str, np.ndarray]], marks: Sequence[np.ndarray]) -> None:
  """Writes names beside places; one that would cover another, or a mark, is left out."""
  taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in map(axes.transData.transform, marks)]
  for name, place in names:
    for x, y in _BESIDE:
      text = axes.annotate(
          short(name), place, (x, y), textcoords='offset points', fontsize=8, parse_math=False,
          ha='left' if x > 0 else 'right', zorder=4,
          path_effects=[patheffects.withStroke(linewidth=2.5, foreground='white')])
      box = text.get_window_extent()
      inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
      if inside and not any(box.overlaps(other) for other in taken):
        taken.append(box)
        break
      text.remove()


def bars(record: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the neighbours of a node as horizontal bars, a panel a type.

  Args:
    record: see `graph.neighbours.predict`; of at least one neighbour.
    path: the PNG to write.
  """
  panels = record['neighbours']
  rows = max(map(len, panels.values()))
  figure = Figure(figsize=(4. * len(panels), .26 * rows + 1.3), dpi=120, layout='constrained')
  low = min(0., *(other['similarity'] for some in panels.values() for other in some))
  for axes, (type, some) in zip(figure.subplots(1, len(panels), squeeze=False).flat,
                                panels.items()):
    names = [short(other['node']) for other in some]
    values = [other['similarity'] for other in some]
    axes.barh(range(len(some)), values, color='C0', height=.75)
    for row, value in enumerate(values):
      axes.text(max(value, 0) + .02, row, f'{value:.2f}', fontsize=7, va='center')
    axes.set_yticks(range(len(some)), names, fontsize=8, parse_math=False)
    axes.set(xlim=(low, 1.18), ylim=(rows - .4, -.6))
    axes.tick_params(axis='x', labelsize=7)
    axes.tick_params(axis='y', length=0)
    axes.set_title(short(type), fontsize=9, parse_math=False)
    axes.set_xlabel('cosine', fontsize=8)
    axes.spines[['top', 'right', 'left']].set_visible(False)
  figure.suptitle(f'nearest to {short(record["node"])} ({record["type"]})', fontsize=10,
                  parse_math=False)
  figure.savefig(path)


def short(name: str) -> str:
  """A name on one line, cut to 28 letters."""
  name = ' '.join(name.split())
  return name if len(name) <= _LETTERS else f'{name[:_LETTERS - 1]}…'
