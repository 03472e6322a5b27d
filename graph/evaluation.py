"""What vectors are worth: classification and clustering of labelled nodes (metapath2vec, sections
4.2 and 4.3), by type.

Vectors are learned without labels. What is fitted here runs on one thread: threads that wait for
each other make a fit of 27,500 nodes on two busy cores take 12 s instead of 1.4.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import threadpoolctl
import tqdm
from absl import logging
from matplotlib.figure import Figure

from core.config import RunFailed, UserError
from core.evaluate import EvalRun
from graph.network import Graph


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
  """The labelled nodes of a type that have vectors.

  Attributes:
    type: of the nodes.
    ids: int64 `[n]`, ascending.
    has: bool `[n, classes]`, which labels each has; every class has a node.
    classes: their names.
    coverage: the share of the labelled nodes that occur in the walks, before some were drawn.
  """
  type: str
  ids: np.ndarray
  has: np.ndarray
  classes: tuple[str, ...]
  coverage: float

  @property
  def labels(self) -> np.ndarray:
    """int64 `[n]` if every node has one label, else `has`."""
    return self.has.argmax(axis=1) if (self.has.sum(axis=1) == 1).all() else self.has


def vectors_of(task: Any, params) -> tuple[np.ndarray, np.ndarray]:
  """Vectors float32 `[nodes, dim]`, and which nodes occur, bool `[nodes]`; others have none.

  Raises:
    RunFailed: vectors that are not finite.
  """
  vectors, occurs = task.vectors(params), task.occurs(params)
  bad = np.flatnonzero(occurs & ~np.isfinite(vectors.sum(axis=1)))
  if len(bad):
    raise RunFailed(f'the vectors of {len(bad):,} of {occurs.sum():,} nodes, such as '
                    f'{task.graph.names[bad[0]]!r}, are not finite; a lower learning rate may help')
  return vectors, occurs


def labelled(graph: Graph, occurs: np.ndarray, most: int = 0, seed: int = 0) -> list[Labelled]:
  """The labelled nodes of each type of which any is labelled.

  Args:
    graph: with labels.
    occurs: bool `[nodes]`.
    most: how many nodes of a type are drawn, 0 for all.
    seed: of the draw.

  Returns:
    an entry a type, without those whose occurring nodes are of fewer than two classes, which are
    logged.
  """
  counts, found = np.diff(graph.label_ptr), []
  for type in graph.types:
    nodes = graph.nodes_of(type)
    with_label = nodes.start + np.flatnonzero(counts[nodes])
    if not len(with_label):
      continue
    ids = with_label[occurs[with_label]]
    coverage = len(ids) / len(with_label)
    if most and len(ids) > most:
      ids = np.sort(np.random.default_rng(seed).choice(ids, most, replace=False))
    has = np.zeros((len(ids), len(graph.label_names)), bool)
    for place in range(counts[ids].max(initial=0)):  # Of several labels, one after the other.
      rows = np.flatnonzero(counts[ids] > place)
      has[rows, graph.label_col[graph.label_ptr[ids[rows]] + place]] = True
    kept = np.flatnonzero(has.any(axis=0))
    if len(kept) < 2:
      logging.warning('%s is not evaluated: its %d labelled nodes that occur in walks are of %d '
                      'classes', type, len(ids), len(kept))
      continue
    found.append(Labelled(type, ids, has[:, kept], tuple(graph.label_names[c] for c in kept),
                          coverage))
  return found


class Classification:
  """Evaluator: 'TYPE/macro_f1@20%' and so on for every share, see `classification`, and
  'TYPE/coverage'. Leaves pictures/classification.png."""
  every = 'end'

  def __init__(self, task: Any):
    """Raises `UserError` for shares or repeats that have no meaning."""
    self._task = task
    _check(task.config.eval, 'repeats')
    for share in task.config.eval.shares:
      if not 0 < share < 1:
        raise UserError(f'config.eval.shares has {share}; write shares of the labelled nodes to '
                        'train on, between 0 and 1')

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    vectors, occurs = vectors_of(self._task, params)
    settings, seed = self._task.config.eval, self._task.config.seed
    metrics, panels = {}, {}
    for some in labelled(self._task.graph, occurs, settings.max_nodes, seed):
      found = panels[some.type] = classification(vectors[some.ids], some.labels, settings.shares,
                                                 settings.repeats, seed)
      metrics[f'{some.type}/coverage'] = some.coverage
      metrics |= {f'{some.type}/{name}': value for name, value in found.items()}
    if run.writes and panels:
      draw(panels, settings.shares, run.pictures / 'classification.png')
    return metrics


class Clustering:
  """Evaluator: 'TYPE/nmi', 'TYPE/nmi_std' and 'TYPE/nmi_normalised', see `clustering`, of the types
  whose nodes have one label each."""
  every = 'end'

  def __init__(self, task: Any):
    """Raises `UserError` for no clusterings."""
    self._task = task
    _check(task.config.eval, 'clusterings')

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    vectors, occurs = vectors_of(self._task, params)
    settings, seed = self._task.config.eval, self._task.config.seed
    metrics = {}
    for some in labelled(self._task.graph, occurs, settings.max_nodes, seed):
      if some.labels.ndim == 1:
        found = clustering(vectors[some.ids], some.labels, len(some.classes), settings.clusterings,
                           seed)
        metrics |= {f'{some.type}/{name}': value for name, value in found.items()}
    return metrics


def _check(settings: ml_collections.ConfigDict, key: str) -> None:
  if settings[key] < 1:
    raise UserError(f'config.eval.{key} is {settings[key]}; it must be at least 1')


def classification(vectors: np.ndarray, labels: np.ndarray, shares: Sequence[float], repeats: int,
                   seed: int) -> dict[str, float]:
  """F1 of logistic regression on the vectors of some nodes, measured on the rest.

  Vectors are taken as they are: made to vary alike in every direction, those of little meaning
  weigh as much as the others, and F1 on DBLP falls from .931 to .917. Splits are random, not by
  class: a class without training nodes is never predicted. Of nodes with several labels one
  regression a class is fitted, and as many of the best classes as a node has labels are its
  prediction (the protocol of DeepWalk).

  Args:
    vectors: float32 `[n, dim]`.
    labels: int `[n]`, or bool `[n, classes]` where nodes have several.
    shares: of the nodes, for training; at least one node is, and at least one is not.
    repeats: random splits; what is trained on at a share is trained on at larger ones, too.
    seed: of the splits.

  Returns:
    'macro_f1@20%' and 'micro_f1@20%', means over the splits, and their deviations
    'macro_f1_std@20%' and 'micro_f1_std@20%', for every share.
  """
  several = labels.ndim == 2
  truth = labels if several else labels[:, None] == np.unique(labels)
  n, metrics = len(truth), {}
  orders = [np.random.default_rng((seed, repeat)).permutation(n) for repeat in range(repeats)]
  with threadpoolctl.threadpool_limits(1), _bar('classify', len(shares) * repeats) as bar:
    for share in shares:
      count = min(max(round(share * n), 1), n - 1)
      found = []
      for order in orders:
        train, test = order[:count], order[count:]
        scores = _scores(vectors[train], truth[train], vectors[test], several)
        places = np.argsort(np.argsort(-scores, axis=1, kind='stable'), axis=1)
        predicted = (places < truth[test].sum(axis=1, keepdims=True)) & (scores > -np.inf)
        found.append(f1(truth[test], predicted))
        bar.update()
      for name, values in zip(('macro_f1', 'micro_f1'), np.transpose(found)):
        metrics[f'{name}@{100 * share:g}%'] = float(values.mean())
        metrics[f'{name}_std@{100 * share:g}%'] = float(values.std())
  return metrics


def _scores(x: np.ndarray, has: np.ndarray, asked: np.ndarray, several: bool) -> np.ndarray:
  """How likely each class is, `[asked, classes]`; -inf for those without a training node."""
  from sklearn.linear_model import LogisticRegression  # slow to import

  scores = np.full((len(asked), has.shape[1]), -np.inf)
  for c in np.flatnonzero(has.any(axis=0)) if several else ():
    scores[:, c] = np.inf if has[:, c].all() else LogisticRegression(max_iter=1000).fit(
        x, has[:, c]).decision_function(asked)
  if not several:
    seen = np.flatnonzero(has.any(axis=0))
    scores[:, seen] = 0. if len(seen) == 1 else LogisticRegression(max_iter=1000).fit(
        x, has.argmax(axis=1)).predict_proba(asked)
  return scores


def f1(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
  """Macro-F1 over the classes that are true or predicted anywhere, and Micro-F1.

  Args:
    truth, predicted: bool `[n, classes]`.
  """
  hits, total = (truth & predicted).sum(axis=0), truth.sum(axis=0) + predicted.sum(axis=0)
  there = total > 0
  return float((2 * hits[there] / total[there]).mean()), float(2 * hits.sum() / total.sum())


def clustering(vectors: np.ndarray, labels: np.ndarray, k: int, runs: int,
               seed: int) -> dict[str, float]:
  """How well k-means finds the classes: normalised mutual information (arithmetic mean).

  Args:
    vectors: float32 `[n, dim]`.
    labels: int `[n]`.
    k: clusters.
    runs: of k-means, each the best of ten starts by k-means++: one start in five ends in another
      optimum than the best on DBLP.
    seed: of the starts.

  Returns:
    'nmi' and 'nmi_std', mean and deviation over the runs, of the vectors as they are;
    'nmi_normalised' and 'nmi_normalised_std' of vectors of length 1.
  """
  from sklearn.cluster import KMeans  # slow to import
  from sklearn.metrics import normalized_mutual_info_score

  metrics = {}
  with threadpoolctl.threadpool_limits(1), _bar('cluster', 2 * runs) as bar:
    for name, values in {'nmi': vectors, 'nmi_normalised': unit(vectors)}.items():
      found = []
      for run in range(runs):
        model = KMeans(k, n_init=10, random_state=(seed + run) % 2 ** 32)
        found.append(normalized_mutual_info_score(labels, model.fit_predict(values)))
        bar.update()
      metrics |= {name: float(np.mean(found)), f'{name}_std': float(np.std(found))}
  return metrics


def unit(vectors: np.ndarray) -> np.ndarray:
  """Vectors `[n, dim]` of length 1; zeros stay zeros."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


def draw(panels: Mapping[str, Mapping[str, float]], shares: Sequence[float],
         path: pathlib.Path) -> None:
  """Draws F1 against the share of training nodes, a panel a type; bands are one deviation.

  Args:
    panels: what `classification` found, by type.
    shares: those it was asked for.
    path: the PNG to write.
  """
  figure = Figure(figsize=(4.6 * len(panels), 3.6), dpi=120, layout='constrained')
  shares = sorted(shares)
  percent = [100 * share for share in shares]
  for axes, (type, found) in zip(figure.subplots(1, len(panels), squeeze=False).flat,
                                 panels.items()):
    for color, name, label in ('C0', 'micro_f1', 'Micro-F1'), ('C1', 'macro_f1', 'Macro-F1'):
      mean, std = (np.array([found[f'{name}{kind}@{p:g}%'] for p in percent])
                   for kind in ('', '_std'))
      axes.plot(percent, mean, marker='o', markersize=3.5, color=color, label=label)
      axes.fill_between(percent, mean - std, mean + std, color=color, alpha=.2, linewidth=0)
    axes.set_ylim(max(axes.get_ylim()[0], 0), min(axes.get_ylim()[1], 1.01))
    axes.set_title(type, fontsize=10, parse_math=False)
    axes.set_xlabel('labelled nodes to train on (%)', fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8)
  figure.savefig(path)


def _bar(what: str, total: int) -> tqdm.tqdm:
  return tqdm.tqdm(total=total, desc=what, unit=' fits', delay=5,
                   mininterval=.5 if sys.stderr.isatty() else 30)
