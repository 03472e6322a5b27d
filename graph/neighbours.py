"""Similarity search: nodes whose vectors have the largest cosine (metapath2vec, section 4.4)."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from core.config import UserError
from core.evaluate import EvalRun
from graph import evaluation, pictures
from graph.network import Graph

# What is compared at a time: 1,024 queries with 4,096 nodes, down to 64 with 65,536, no more.
_QUERIES, _FEW, _ELEMENTS = 1024, 64, 1 << 22
_STEPS = 10 ** 6  # Cosines are rounded to so many steps from 0 to 1.
_DRAWN = 8  # Predictions that have a picture.
_AMONG, _SAME_LABEL = 10, 2000  # Neighbours, and nodes whose neighbours are looked at.

Found = dict[str, list[tuple[int, float]]]  # type -> ids and cosines of neighbours, best first


def nearest(vectors: np.ndarray, ids: np.ndarray, candidates: slice, occurs: np.ndarray,
            top: int) -> tuple[np.ndarray, np.ndarray]:
  """The nodes of largest cosine, not the query itself.

  Memory is that of a few million numbers beside the vectors, however many nodes there are.

  Args:
    vectors: float32 `[nodes, dim]`, finite where `occurs`; cosines of zeros are 0.
    ids: int `[queries]`, nodes.
    candidates: the nodes to look at.
    occurs: bool `[nodes]`; others are never found.
    top: how many to find.

  Returns:
    ids int64 `[queries, top]`, best first, -1 where there are too few; and cosines float64
    `[queries, top]`, rounded to six decimals, so that what is equal but for rounding is a tie:
    of those the lower id comes first.
  """
  best = np.full((len(ids), top), _key(-2 * _STEPS, 0))
  total = len(ids) * (candidates.stop - candidates.start)
  with tqdm.tqdm(total=total, desc='compare', unit=' pairs', unit_scale=True, delay=5,
                 mininterval=.5 if sys.stderr.isatty() else 30) as bar:
    for first in range(0, len(ids), _QUERIES):
      asked = ids[first:first + _QUERIES]
      queries = evaluation.unit(vectors[asked])
      size = _ELEMENTS // max(len(asked), _FEW)
      for start in range(candidates.start, candidates.stop, size):
        nodes = np.arange(start, min(start + size, candidates.stop))
        cosines = queries @ evaluation.unit(vectors[nodes[0]:nodes[-1] + 1]).T
        cosines[:, ~occurs[nodes]] = -2
        cosines[asked[:, None] == nodes] = -2
        steps = np.rint(cosines * np.float32(_STEPS))
        keys = np.concatenate([best[first:first + _QUERIES], _key(steps, nodes)], axis=1)
        best[first:first + _QUERIES] = np.partition(keys, -top, axis=1)[:, -top:]
        bar.update(steps.size)
  best = np.sort(best, axis=1)[:, ::-1]
  steps = -(-best >> 32)
  none = steps == -2 * _STEPS
  return np.where(none, -1, (steps << 32) - best), np.where(none, -np.inf, steps / _STEPS)


def _key(steps, node):
  """One number that is larger for a larger cosine, and of equal ones for a lower id."""
  return (np.int64(steps) << 32) - node


def by_type(graph: Graph, vectors: np.ndarray, occurs: np.ndarray, ids: np.ndarray,
            top: int) -> list[Found]:
  """The nearest nodes of each type, an entry a query; types of which none occurs are left out."""
  found: list[Found] = [{} for _ in ids]
  for type in graph.types:
    others, cosines = nearest(vectors, ids, graph.nodes_of(type), occurs, top)
    for entry, some, values in zip(found, others, cosines):
      if some[0] >= 0:
        entry[type] = [(int(id), float(value)) for id, value in zip(some, values) if id >= 0]
  return found


class Similarity:
  """Evaluator: how alike neighbours are. Leaves neighbours.md in the workdir: the nearest nodes of
  each type, for `config.eval.queries` or else the three nodes of each type that occur most.

  'TYPE/same_label@10' is, for up to 2,000 labelled nodes drawn by the seed, the mean share of their
  ten nearest labelled nodes of the same type that have a label in common with them.
  """
  every = 'end'

  def __init__(self, task: Any):
    """Raises `UserError` for queries that are no nodes."""
    self._task = task
    try:
      self._asked = [task.graph.find(text) for text in task.config.eval.queries]
    except UserError as e:
      raise UserError(f'config.eval.queries: {e}') from e

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    vectors, occurs = evaluation.vectors_of(self._task, params)
    counts = self._task.counts(params)
    if run.writes:
      (run.workdir / 'neighbours.md').write_text(self._tables(vectors, occurs, counts), 'utf-8')
    return {f'{some.type}/same_label@{_AMONG}': same_label(
        vectors[some.ids], some.has, self._task.config.seed)
            for some in evaluation.labelled(self._task.graph, occurs)}

  def _tables(self, vectors: np.ndarray, occurs: np.ndarray, counts: np.ndarray) -> str:
    graph, ids = self._task.graph, list(self._asked)
    if not ids:
      for nodes in map(graph.nodes_of, graph.types):
        most = nodes.start + np.argsort(-counts[nodes], kind='stable')[:3]
        ids += most[occurs[most]].tolist()
    ids = np.array(ids, np.int64)
    found = iter(by_type(graph, vectors, occurs, ids[occurs[ids]],
                         self._task.config.eval.top))
    text = ['# Nearest nodes by cosine\n']
    for id in ids:
      type = graph.types[graph.type_of(id)]
      text.append(f'## {_cell(graph.names[id])}\n\n{type}, in the walks {counts[id]:,} times\n')
      if occurs[id]:
        text.append(_table(graph, next(found)))
    return '\n'.join(text)


def same_label(vectors: np.ndarray, has: np.ndarray, seed: int) -> float:
  """The mean share of the ten nearest nodes that have a label in common, over up to 2,000 nodes.

  Args:
    vectors: float32 `[n, dim]`, at least two; all of them are candidates.
    has: bool `[n, classes]`.
    seed: of the draw.
  """
  n = len(vectors)
  drawn = np.random.default_rng(seed).permutation(n)[:_SAME_LABEL]
  others, _ = nearest(vectors, drawn, slice(0, n), np.ones(n, bool), min(_AMONG, n - 1))
  return float((has[drawn, None] & has[others]).any(axis=2).mean())


def _table(graph: Graph, found: Found) -> str:
  """A markdown table: two columns a type, the best first."""
  lines = ['| ' + ' | '.join(['', *(f'{_cell(type)} | similarity' for type in found)]) + ' |',
           '|' + '---:|' + ':---|---:|' * len(found)]
  for place in range(max(map(len, found.values()), default=0)):
    cells = [str(place + 1)]
    for some in found.values():
      cells += ([_cell(graph.names[some[place][0]]), f'{some[place][1]:.3f}']
                if place < len(some) else ['', ''])
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _cell(name: str) -> str:
  return ' '.join(name.split()).replace('|', r'\|')


def predict(task: Any, params, inputs: pathlib.Path, out: pathlib.Path) -> list[dict[str, Any]]:
  """Mode predict: the nearest nodes of each type, for the nodes that a file names.

  Args:
    task: has the graph.
    params: the model's.
    inputs: a text file, a node a line: 'name', or 'type:name' where types share a name. Blank
      lines are skipped.
    out: a folder; gets neighbours_N.png for the first eight of the nodes that occur.

  Returns:
    a record a line: 'node', 'type'; 'occurrences' in the walks; 'neighbours', by type up to
    `config.eval.top`, best first: 'node' and 'similarity' (a cosine); and 'picture', a file in
    `out`, of those who have one. Nodes that never occur have no neighbours, and a 'note'.

  Raises:
    UserError: the file cannot be read or names no node, or a node is unknown; with the line.
  """
  graph = task.graph
  ids = np.array(_asked(graph, inputs), np.int64)
  vectors, occurs = evaluation.vectors_of(task, params)
  counts = task.counts(params)
  found = iter(by_type(graph, vectors, occurs, ids[occurs[ids]], task.config.eval.top))
  records, drawn = [], 0
  for id in ids:
    record = {'node': str(graph.names[id]), 'type': graph.types[graph.type_of(id)],
              'occurrences': int(counts[id]), 'neighbours': {}}
    records.append(record)
    if not occurs[id]:
      record['note'] = 'does not occur in the walks, so it has no vector'
      continue
    record['neighbours'] = {
        type: [{'node': str(graph.names[other]), 'similarity': cosine} for other, cosine in some]
        for type, some in next(found).items()}
    if drawn < _DRAWN and record['neighbours']:
      drawn += 1
      record['picture'] = f'neighbours_{drawn}.png'
      pictures.bars(record, out / record['picture'])
  return records


def _asked(graph: Graph, path: pathlib.Path) -> Sequence[int]:
  """The ids of the nodes in a file."""
  if path.is_dir():
    raise UserError(f'--input={path} is a folder; give a text file with a node a line')
  try:
    lines = path.read_text('utf-8-sig').split('\n')
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'--input={path}: no text in UTF-8 with a node a line ({e})') from e
  ids = []
  for number, line in enumerate(lines, 1):
    if text := line.strip():
      try:
        ids.append(graph.find(text))
      except UserError as e:
        raise UserError(f'{path}, line {number}: {e}') from e
  if not ids:
    raise UserError(f"{path}: names no node; write 'name' or 'type:name', a node a line")
  return ids
