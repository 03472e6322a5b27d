"""Files of graphs. `config.data.name` is FORMAT:PATH; `~` is the home directory.

  tsv:DIR      `nodes.tsv` with columns type, name and, if there are any, label (several with '|'
               between them, none: empty); `edges.tsv` with columns relation, source, target and, if
               there are any, weight. UTF-8, with a header, tabs between fields, and quotes mean
               nothing. Either may be compressed (`.gz`).
  dat:DIR      numbered nodes, see `_dat`.
  authors:DIR  net_dbis and net_aminer, see graph.authors.
  kg:FILE      RecBole's atomic files, see graph.recbole.
"""

import array
import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import ml_collections
import numpy as np

from core import config as config_lib
from core.config import UserError
from core.data import text_files
from graph import authors, recbole, tables

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def read(data: ml_collections.ConfigDict) -> tables.Table:
  """Reads what `config.data.name` names.

  Raises:
    UserError: no such format or file, or one that is not as it has to be: with its number if it is
      a line that is wrong.
  """
  format_, colon, path = data.name.partition(':')
  known = {'tsv': _tsv, 'dat': _dat, 'authors': authors.read}
  if not colon:
    raise UserError(f"config.data.name={data.name!r}: write 'planted', or FORMAT:PATH with FORMAT "
                    f'one of {", ".join(known)}, kg')
  if format_ == 'kg':
    return recbole.read(pathlib.Path(path).expanduser(), data.relations, data.labels)
  reader = config_lib.choose('config.data.name', format_, {**known, 'kg': None})
  folder = pathlib.Path(path).expanduser()
  if not path or not folder.is_dir():
    raise UserError(f'config.data.name={data.name!r}: no such folder; write {format_}:FOLDER')
  return reader(folder)


# --- tsv -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Column:
  """The edges of one relation while they are read; names are numbers."""
  sources: array.array = dataclasses.field(default_factory=lambda: array.array('i'))
  targets: array.array = dataclasses.field(default_factory=lambda: array.array('i'))
  weights: array.array = dataclasses.field(default_factory=lambda: array.array('d'))
  lines: array.array = dataclasses.field(default_factory=lambda: array.array('q'))


def _tsv(folder: pathlib.Path) -> tables.Table:
  places, labels = _nodes(_one_of(folder, 'nodes.tsv'))
  path = _one_of(folder, 'edges.tsv')
  numbers: dict[str, int] = {}
  relations: dict[str, _Column] = collections.defaultdict(_Column)
  weighted = False
  for line, relation, source, target, weight in tables.rows(
      path, ('relation', 'source', 'target'), ['weight']):
    column = relations[relation]
    column.sources.append(numbers.setdefault(source, len(numbers)))
    column.targets.append(numbers.setdefault(target, len(numbers)))
    column.lines.append(line)
    if weight is not None:
      weighted = True
      column.weights.append(_weight(path, line, weight))
  if not relations:
    raise UserError(f'{path} has no edges below its header')
  # Of every name in the edges, its place among the nodes of each type, or -1.
  where = {type: np.fromiter((of.get(name, -1) for name in numbers), np.int64, len(numbers))
           for type, of in places.items()}
  names = list(numbers)
  edges = []
  for relation, column in relations.items():
    ends = [np.asarray(column.sources), np.asarray(column.targets)]
    types = _ends(path, relation, ends, column.lines, where, names)
    edges.append(tables.Edges(
        relation, *types, *(where[type][end] for type, end in zip(types, ends)),
        np.asarray(column.weights) if weighted else None))
  return tables.Table({type: list(of) for type, of in places.items()}, edges, labels)


def _one_of(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The file, or the compressed one if that is there instead."""
  packed = folder / f'{name}.gz'
  return packed if packed.exists() and not (folder / name).exists() else folder / name


def _nodes(path: pathlib.Path) -> tuple[dict[str, dict[str, int]], dict[str, dict[int, list[str]]]]:
  """Places of names by type, and labels of places by type."""
  places: dict[str, dict[str, int]] = {}
  labels: dict[str, dict[int, list[str]]] = {}
  for line, type, name, label in tables.rows(path, ('type', 'name'), ['label']):
    of = places.setdefault(type, {})
    if name in of:
      raise UserError(f'{path}:{line}: a second {type} called {name!r}; nodes of a type need names '
                      'of their own')
    of[name] = len(of)
    if some := [part for part in (label or '').split('|') if part]:
      labels.setdefault(type, {})[of[name]] = some
  if not places:
    raise UserError(f'{path} has no nodes below its header')
  return places, labels


def _weight(path: pathlib.Path, line: int, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = 0.
  if not _SMALLEST <= value <= _LARGEST or '_' in text:  # Python's own may have underscores.
    raise UserError(f'{path}:{line}: the weight {text!r} is not a positive number (of float32)')
  return value


def _ends(path: pathlib.Path, relation: str, ends: Sequence[np.ndarray], lines: Sequence[int],
          where: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
  """The types of sources and targets of a relation.

  Args:
    path: of edges, for errors.
    relation: its name. Where that is A-B or A-anything-B with types A and B, and in one way alone,
      those are meant; else the one type that all names at that end have.
    ends: sources and targets, int `[edges]`, places in `names`.
    lines: int `[edges]`, their lines in the file.
    where: int `[names]` by type: -1 for a name that no node of the type has.
    names: that occur in edges.

  Raises:
    UserError: an unknown node, or types that the names do not tell.
  """
  meant = [(a, b) for a in where for b in where
           if relation.startswith(f'{a}-') and relation[len(a):].endswith(f'-{b}')]
  types = []
  for side, end in enumerate(ends):
    has = {type: of[end] >= 0 for type, of in where.items()}
    fit = [meant[0][side]] if len(meant) == 1 else list(has)
    unknown = ~np.any([has[type] for type in fit], 0)
    if unknown.any():
      first = int(np.argmax(unknown))
      what = f'node of type {fit[0]!r}' if len(meant) == 1 else 'node'
      raise UserError(f'{path}:{lines[first]}: no {what} is called {names[end[first]]!r}')
    fit = [type for type in fit if has[type].all()]
    if len(fit) != 1:
      many = f'are all of the types {", ".join(fit)}' if fit else 'are of different types'
      which = ('sources', 'targets')[side]
      raise UserError(f'{path}: the {which} of relation {relation!r} {many}; call it A-B or '
                      f'A-{relation}-B, where A and B are the types of its ends')
    types.append(fit[0])
  return types


# --- dat -----------------------------------------------------------------------------------------


def _dat(folder: pathlib.Path) -> tables.Table:
  """Numbered nodes, as in librahu/HIN-Datasets-for-Recommendation-and-Network-Embedding.

  Every `A_B.dat` is a relation A-B of types A and B, with lines 'i j weight'; nodes are numbered
  from 1, and their numbers are their names. `A_label.dat` has lines 'id label', where the id is
  that of another numbering if `A_map_id.dat` is there: lines 'i id'.
  """
  maps, labels, relations = {}, {}, []
  for path in sorted(folder.glob('*.dat')):
    type, _, rest = path.stem.partition('_')
    if rest == 'map_id':
      maps[type] = tables.ids(path, tables.numbers(path, 2, "two numbers 'i id' with a tab"))
      tables.check(path, maps[type][:, 0] >= 1, 'nodes are numbered from 1')
    elif rest == 'label':
      labels[type] = path
    elif type and rest and '_' not in rest:
      relations.append((path, type, rest))
    else:
      raise UserError(f'{path}: the name is not A_B.dat, A_label.dat or A_map_id.dat, where A and '
                      'B are types of nodes without _; move it elsewhere')
  if not relations:
    raise UserError(f'{folder} has no relation: no file A_B.dat, where A and B are types of nodes')
  sizes = {type: int(found[:, 0].max()) for type, found in maps.items()}
  edges = []
  for path, *types in relations:
    values = tables.numbers(path, 3, "three numbers 'i j weight' with tabs between")
    ends = tables.ids(path, values[:, :2])
    tables.check(path, (ends >= 1).all(1), 'nodes are numbered from 1')
    tables.check(path, (values[:, 2] >= _SMALLEST) & (values[:, 2] <= _LARGEST),
                 'the weight is not a positive number (of float32)')
    for type, end in zip(types, ends.T):
      sizes[type] = max(sizes.get(type, 0), int(end.max()))
    edges.append(tables.Edges('-'.join(types), *types, *(ends.T - 1), values[:, 2]))
  for type in {**maps, **labels}:
    if not any(type in (e.source, e.target) for e in edges):
      raise UserError(f'{folder}: there is {type}_label.dat or {type}_map_id.dat, but no relation '
                      f'of {type!r}')
  names = {type: [str(i) for i in range(1, size + 1)] for type, size in sizes.items()}
  return tables.Table(names, edges, {
      type: _dat_labels(path, maps.get(type), sizes[type]) for type, path in labels.items()})


def _dat_labels(path: pathlib.Path, numbering: np.ndarray | None,
                size: int) -> dict[int, list[str]]:
  """Labels by place. `numbering` int64 `[lines, 2]` is that of `A_map_id.dat`."""
  pairs: Iterable[Sequence[int]] = [(i, i) for i in range(1, size + 1)]
  if numbering is not None:
    pairs = numbering.tolist()
  place = {str(id): i - 1 for i, id in pairs}
  labels: dict[int, list[str]] = {}
  for line, text in text_files.lines(path):
    fields = text.split('\t')
    if len(fields) != 2 or not fields[1]:
      raise UserError(f"{path}:{line}: {text!r:.80} is not 'id label' with a tab between")
    if fields[0] not in place:
      raise UserError(f'{path}:{line}: there is no node with the id {fields[0]!r}')
    labels.setdefault(place[fields[0]], []).append(fields[1])
  return labels
