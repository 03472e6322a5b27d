"""Networks of nodes and edges of several types, as arrays of node ids.

`config.data` says what is read and what is kept of it:

  name        `planted` (embedded, see graph.planted), or FORMAT:PATH (see graph.readers).
  types       old name of a type -> new one, such as {'conference': 'venue', 'type': 'term'}. Names
              of relations that begin or end with a type ('paper-conference') follow.
  min_degree  type (by its new name) -> k: nodes of that type on which fewer than k edges end, in
              all relations together, are dropped with their edges; once.
  relations, labels   of `kg:FILE` alone, see graph.recbole.

A graph that is not embedded is made once, by `prepare`, and kept as `graph.npz` in the workdir.
"""

import bisect
import dataclasses
import difflib
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from core import config as config_lib
from core.config import UserError
from core.data import kept
from graph import readers, tables

FILE = 'graph.npz'

_COMPARED = 2000  # Names that come before, and after, one that is not there.
_STRING = np.dtypes.StringDType()  # One long name would make all names of a 'U' array as long.
_KINDS = {'offsets': 'i', 'label_ptr': 'i', 'label_col': 'i', 'names': 'u', 'types': 'U',
          'label_names': 'U', 'relations': 'U', 'made_of': 'U'}  # Of the arrays in the file.


@dataclasses.dataclass(frozen=True, eq=False)
class Relation:
  """Edges of one kind, sorted by (source, target). An edge may be there several times.

  Attributes:
    name: of the relation.
    source, target: types.
    ptr: int64 `[nodes of the source type + 1]`; those of its n-th node are `ptr[n]:ptr[n + 1]`.
    col: int32 `[edges]`, global ids of target nodes.
    weight: float32 `[edges]`, positive; None where every edge counts the same.
    source_ids, target_ids: the global ids of the nodes of both types.
  """
  name: str
  source: str
  target: str
  ptr: np.ndarray
  col: np.ndarray
  weight: np.ndarray | None
  source_ids: range
  target_ids: range

  def reversed(self) -> 'Relation':
    """The same edges from target to source; the name stays."""
    rows = np.repeat(np.arange(self.source_ids.start, self.source_ids.stop, dtype=np.int32),
                     np.diff(self.ptr))
    order = np.argsort(self.col, kind='stable')
    counts = np.bincount(self.col - self.target_ids.start, minlength=len(self.target_ids))
    return Relation(self.name, self.target, self.source, np.append(0, np.cumsum(counts)),
                    rows[order], None if self.weight is None else self.weight[order],
                    self.target_ids, self.source_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """A heterogeneous network.

  Attributes:
    types: names of node types.
    offsets: int64 `[types + 1]`; nodes of `types[t]` have the ids `offsets[t]:offsets[t + 1]`.
    names: str `[nodes]` (numpy's StringDType), unique within a type.
    relations: as the data has them, one direction each.
    label_names: of all types of nodes.
    label_ptr: int64 `[nodes + 1]`; the labels of node n (none, one or several, in ascending order)
      are `label_col[label_ptr[n]:label_ptr[n + 1]]`.
    label_col: int32, places in `label_names`.
    made_of: what it was made of, JSON of `config.data`; '' for one that is not kept in a file.
  """
  types: tuple[str, ...]
  offsets: np.ndarray
  names: np.ndarray
  relations: tuple[Relation, ...]
  label_names: tuple[str, ...]
  label_ptr: np.ndarray
  label_col: np.ndarray
  made_of: str = ''

  def __len__(self) -> int:
    """The number of nodes."""
    return len(self.names)

  def type_of(self, ids: np.ndarray) -> np.ndarray:
    """The types of nodes, places in `types`, int64 of the shape of `ids`."""
    return np.searchsorted(self.offsets, ids, side='right') - 1

  def nodes_of(self, type: str) -> slice:
    """The ids of the nodes of a type. Raises `UserError` for one that is not there."""
    t = self.types.index(config_lib.choose('type of nodes', type, self.types))
    return slice(int(self.offsets[t]), int(self.offsets[t + 1]))

  def find(self, text: str) -> int:
    """The id of the node called 'name' or 'type:name'.

    Raises:
      UserError: there is none, and similar names are given; or several, of different types.
    """
    found = np.flatnonzero(self.names == text)
    type, colon, name = text.partition(':')
    if not len(found) and colon and type in self.types:
      nodes = self.nodes_of(type)
      found = nodes.start + np.flatnonzero(self.names[nodes] == name)
    else:
      name, nodes = text, slice(None)
    if len(found) == 1:
      return int(found[0])
    if len(found):
      which = ', '.join(map(repr, map(self._called, found)))
      raise UserError(f'several nodes are called {text!r}; write one of {which}')
    some = {other.casefold(): other for other in self.names[nodes].tolist()}
    keys = sorted(some)
    at = bisect.bisect(keys, name.casefold())
    keys = keys[max(at - _COMPARED, 0):at + _COMPARED]  # With all it could take minutes.
    near = [repr(some[other]) for other in difflib.get_close_matches(name.casefold(), keys, 3)]
    hint = 'similar: ' + ', '.join(near) if near else (
        f'write NAME or TYPE:NAME, with TYPE one of {", ".join(self.types)}')
    raise UserError(f'no node is called {text!r}; {hint}')

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """Names without white space that tell the type, str `[nodes]`, all different.

    The type's first letter comes before the name, as in the authors' files, or 'type:' where two
    types begin with the same letter. White space within becomes '_'. Of nodes that would then
    have the same, the second one's ends with '_2', and so on.
    """
    letters = [type[0] for type in self.types]
    prefixes = letters if len(set(letters)) == len(letters) else [f'{t}:' for t in self.types]
    tokens = [re.sub(r'\s+', '_', prefix + name)
              for prefix, type in zip(prefixes, self.types)
              for name in self.names[self.nodes_of(type)].tolist()]
    taken, seen = set(tokens), set()
    if len(taken) < len(tokens):
      for at, token in enumerate(tokens):
        if token in seen:
          number = next(n for n in itertools.count(2) if f'{token}_{n}' not in taken)
          tokens[at] = f'{token}_{number}'
          taken.add(tokens[at])
          logging.info('%s is %s in files', self._called(at), tokens[at])
        seen.add(token)
    return np.array(tokens, _STRING)

  def _called(self, id: int) -> str:
    return f'{self.types[self.type_of(id)]}:{self.names[id]}'

  def save(self, path: pathlib.Path) -> None:
    """Writes the file whole or not at all."""
    arrays = {
        'types': np.array(self.types, np.str_), 'offsets': self.offsets,
        # numpy would pickle a StringDType.
        'names': np.frombuffer('\n'.join(self.names.tolist()).encode(), np.uint8),
        'relations': np.array([(r.name, r.source, r.target) for r in self.relations], np.str_),
        'label_names': np.array(self.label_names, np.str_), 'label_ptr': self.label_ptr,
        'label_col': self.label_col, 'made_of': np.array(self.made_of, np.str_)}
    for i, relation in enumerate(self.relations):
      weight = np.zeros(0, np.float32) if relation.weight is None else relation.weight
      arrays |= {f'ptr_{i}': relation.ptr, f'col_{i}': relation.col, f'weight_{i}': weight}
    kept.save(path, arrays)


def load(path: pathlib.Path) -> Graph:
  """Reads what `Graph.save` wrote.

  Raises:
    UserError: no such file, a damaged one, or arrays that do not belong together.
  """
  with kept.opened(path, 'graph') as arrays:
    found = {key: arrays[key] for key in _KINDS}
    if any(found[key].dtype.kind != kind for key, kind in _KINDS.items()):
      raise ValueError('arrays of other kinds')
    types, offsets = tuple(found['types'].tolist()), found['offsets']
    names = found['names'].tobytes().decode().split('\n')
    _check(offsets, len(types), np.arange(len(names)), range(len(names)))
    ids = _ranges(types, offsets)
    relations = []
    for i, (name, source, target) in enumerate(found['relations'].tolist()):
      ptr, col, weight = (arrays[f'{key}_{i}'] for key in ('ptr', 'col', 'weight'))
      _check(ptr, len(ids[source]), col, ids[target])
      if weight.size and (weight.shape != col.shape or not (weight > 0).all()):
        raise ValueError('weights that are not those of edges')
      relations.append(Relation(name, source, target, ptr, col, weight if weight.size else None,
                                ids[source], ids[target]))
    labels, label_ptr, label_col = (found[f'label_{key}'] for key in ('names', 'ptr', 'col'))
    _check(label_ptr, len(names), label_col, range(len(labels)))
    return Graph(types, offsets, np.array(names, _STRING), tuple(relations), tuple(labels.tolist()),
                 label_ptr, label_col, str(found['made_of']))


def _check(ptr: np.ndarray, rows: int, col: np.ndarray, ids: range) -> None:
  """That `ptr` is where each of the rows of `col` begins, and that `col` are such ids."""
  if (ptr.dtype.kind + col.dtype.kind != 'ii' or ptr.shape != (rows + 1,) or col.ndim != 1
      or ptr[0] or ptr[-1] != len(col) or (np.diff(ptr) < 0).any()
      or (len(col) and not ids.start <= col.min() <= col.max() < ids.stop)):
    raise ValueError('arrays that do not belong together')


# --- From tables to graphs -----------------------------------------------------------------------


def build(table: tables.Table, types: Mapping[str, str] | None = None,
          min_degree: Mapping[str, int] | None = None) -> Graph:
  """Renames, filters and numbers what was read.

  Nodes of a type keep their order. An edge that is there twice stays two edges.

  Args:
    table: what was read.
    types, min_degree: see the top of this file.

  Raises:
    UserError: `types` or `min_degree` do not fit the data, or a type is left without a node or a
      relation without an edge.
  """
  table = tables.filtered(tables.renamed(table, types or {}), min_degree or {})
  offsets = np.append(0, np.cumsum([len(names) for names in table.names.values()]))
  ids = _ranges(table.names, offsets)
  relations = []
  for edges in table.edges:
    source_ids, target_ids = ids[edges.source], ids[edges.target]
    order = np.lexsort((edges.targets, edges.sources))
    weight = None
    if edges.weights is not None and (edges.weights != edges.weights[0]).any():
      weight = edges.weights[order].astype(np.float32)
    degree = np.bincount(edges.sources, minlength=len(source_ids))
    relations.append(Relation(edges.name, edges.source, edges.target,
                              np.append(0, np.cumsum(degree)),
                              (target_ids.start + edges.targets[order]).astype(np.int32), weight,
                              source_ids, target_ids))
  names = np.concatenate([np.array(some, _STRING) for some in table.names.values()])
  return Graph(tuple(table.names), offsets, names, tuple(relations), *tables.label_arrays(table))


def _ranges(types: Iterable[str], offsets: np.ndarray) -> dict[str, range]:
  """The global ids of the nodes of each type."""
  ends = offsets.tolist()
  return {type: range(*pair) for type, *pair in zip(types, ends[:-1], ends[1:])}


# --- Where graphs come from ----------------------------------------------------------------------


def find(data: ml_collections.ConfigDict, workdir: pathlib.Path | None) -> Graph:
  """The graph that `config.data` describes.

  Args:
    data: see the top of this file.
    workdir: of the run, where `prepare` may have left the graph; else the data is read.

  Raises:
    UserError: the data cannot be read, `build` cannot use it, or what `prepare` left is damaged or
      was made with other settings.
  """
  if data.name == 'planted':
    from graph import planted  # It makes its graph with `build`.
    if data.types or data.min_degree:
      raise UserError("config.data.types and min_degree are for graphs that are read, not for "
                      "config.data.name='planted'")
    return planted.graph()
  path, settings = workdir / FILE if workdir else None, _settings(data)
  if path is not None and path.exists():
    graph = load(path)
    kept.check_same(path, graph.made_of, settings)
    return graph
  graph = build(readers.read(data), settings['types'], settings['min_degree'])
  logging.info('read %s: %s', data.name, _summary(graph))
  return dataclasses.replace(graph, made_of=json.dumps(settings))


def prepare(data: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Reads what `config.data` names and leaves `graph.npz` in the workdir, unless it is there.

  Raises:
    UserError: as of `find`.
  """
  graph = find(data, workdir)
  if data.name != 'planted' and not (workdir / FILE).exists():
    graph.save(workdir / FILE)


def _settings(data: ml_collections.ConfigDict) -> dict[str, Any]:
  """What a graph depends on."""
  return {'name': data.name, 'types': dict(data.types), 'labels': data.labels,
          'relations': [list(relation) for relation in data.relations],
          'min_degree': dict(data.min_degree)}


def _summary(graph: Graph) -> str:
  """Numbers of nodes, edges, labels; and what walks cannot reach or take twice as often."""
  ends = np.zeros(len(graph), np.int64)
  twice = 0
  for relation in graph.relations:
    ends[graph.nodes_of(relation.source)] += np.diff(relation.ptr)
    ends += np.bincount(relation.col, minlength=len(graph))
    rows = np.repeat(np.arange(len(relation.source_ids)), np.diff(relation.ptr))
    twice += np.count_nonzero((np.diff(rows) == 0) & (np.diff(relation.col) == 0))

  def by_type(there: np.ndarray) -> str:
    counts = {type: np.count_nonzero(there[graph.nodes_of(type)]) for type in graph.types}
    return ', '.join(f'{type} {count:,}' for type, count in counts.items() if count) or 'none'
  edges = ', '.join(f'{r.name} {len(r.col):,}' for r in graph.relations)
  return (f'nodes: {by_type(ends >= 0)}; edges: {edges}, of which {twice:,} are there before; '
          f'labelled: {by_type(np.diff(graph.label_ptr) > 0)}; '
          f'without an edge: {by_type(ends == 0)}')
