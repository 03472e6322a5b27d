"""Tables: what the readers of all formats leave, and how they read rows and numbers."""

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from core import config as config_lib
from core.config import UserError
from core.data.text_files import lines


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
  """The edges of one relation, in the order of the data.

  Attributes:
    name: of the relation.
    source, target: types.
    sources, targets: int `[edges]`, places in the names of those types.
    weights: float `[edges]`, or None.
  """
  name: str
  source: str
  target: str
  sources: np.ndarray
  targets: np.ndarray
  weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """A graph as it was read.

  Attributes:
    names: of the nodes of each type, which differ within a type.
    edges: one entry a relation.
    labels: of a type, what the nodes in some places are labelled with: one or several.
  """
  names: Mapping[str, Sequence[str]]
  edges: Sequence[Edges]
  labels: Mapping[str, Mapping[int, Sequence[str]]] = dataclasses.field(default_factory=dict)


def renamed(table: Table, types: Mapping[str, str]) -> Table:
  """Types, and relations that are called by their types, under their new names.

  Raises:
    UserError: a type that is not there, or two that would be called the same.
  """
  for old in types:
    config_lib.choose('config.data.types', old, table.names)
  new = {old: types.get(old, old) for old in table.names}
  for name, count in collections.Counter(new.values()).items():
    if count > 1 or not name:
      raise UserError(f'config.data.types: {count} types would be called {name!r}')

  def called(edges: Edges) -> str:
    name = edges.name
    rest = name[len(edges.source):]
    if name.startswith(f'{edges.source}-') and rest.endswith(f'-{edges.target}'):
      name = new[edges.source] + rest[:-len(edges.target)] + new[edges.target]
    return name
  return Table(
      {new[type]: names for type, names in table.names.items()},
      [dataclasses.replace(edges, name=called(edges), source=new[edges.source],
                           target=new[edges.target]) for edges in table.edges],
      {new[type]: nodes for type, nodes in table.labels.items()})


def filtered(table: Table, min_degree: Mapping[str, int]) -> Table:
  """Drops nodes, and then edges: see graph.network.

  Raises:
    UserError: a type that is not there; or a type has no node, or a relation no edge, or none is
      left.
  """
  kept = {type: np.ones(len(names), bool) for type, names in table.names.items()}
  for type, least in min_degree.items():
    config_lib.choose('config.data.min_degree', type, kept)
    if not isinstance(least, int) or least < 1:
      raise UserError(f'config.data.min_degree.{type}={least!r} is not a whole number from 1')
    degree = np.zeros(len(kept[type]), np.int64)
    for edges in table.edges:
      for end, places in ((edges.source, edges.sources), (edges.target, edges.targets)):
        if end == type:
          degree += np.bincount(places, minlength=len(degree))
    kept[type] = degree >= least
  place = {type: np.cumsum(rows) - 1 for type, rows in kept.items()}  # Of those that are kept.
  relations = []
  for edges in table.edges:
    there = kept[edges.source][edges.sources] & kept[edges.target][edges.targets]
    relations.append(dataclasses.replace(
        edges, sources=place[edges.source][edges.sources[there]],
        targets=place[edges.target][edges.targets[there]],
        weights=None if edges.weights is None else edges.weights[there]))
  why = f'config.data.min_degree={dict(min_degree)}: ' if min_degree else ''
  for what, name, count in [
      *(('node of type', type, rows.sum()) for type, rows in kept.items()),
      *(('edge of relation', edges.name, len(edges.sources)) for edges in relations)]:
    if not count:
      raise UserError(f'{why}there is no {what} {name!r}')
  return Table(
      {type: list(itertools.compress(names, kept[type])) for type, names in table.names.items()},
      relations,
      {type: {int(place[type][node]): some for node, some in nodes.items() if kept[type][node]}
       for type, nodes in table.labels.items()})


def label_arrays(table: Table) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
  """`label_names`, `label_ptr` and `label_col` of a `network.Graph` of these nodes.

  Labels that are numbers come first and in their order, the others in that of the alphabet.
  """
  some = [table.labels.get(type, {}) for type in table.names]
  names = sorted({label for nodes in some for labels in nodes.values() for label in labels},
                 key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
  number = {name: i for i, name in enumerate(names)}
  counts, col = [], []
  for nodes, all_ in zip(some, table.names.values()):
    for place in range(len(all_)):
      numbers = sorted({number[label] for label in nodes.get(place, ())})
      counts.append(len(numbers))
      col += numbers
  return tuple(names), np.append(0, np.cumsum(counts)), np.array(col, np.int32)


# --- Reading -------------------------------------------------------------------------------------


def rows(path: pathlib.Path, columns: Sequence[str],
         optional: Sequence[str] = ()) -> Iterator[tuple[int | str | None, ...]]:
  """The rows of a file with a header and tabs between fields.

  Args:
    path: the file.
    columns: of the header, which may have others too.
    optional: columns that need not be there.

  Yields:
    the number of the line, the fields of `columns`, which are not empty, and those of `optional`,
    None without such a column.

  Raises:
    UserError: as of `lines`; the header lacks a column, or has it twice; a line has another number
      of fields than the header, or an empty one.
  """
  found = lines(path)
  _, first = next(found, (0, ''))
  header = first.split('\t')
  for column in (*columns, *optional):
    count = header.count(column)
    if count > 1 or (not count and column in columns):
      raise UserError(f'{path}: {"several columns are" if count else "no column is"} called '
                      f'{column!r}; its header is {first!r:.80}, and needs {", ".join(columns)}, '
                      'with tabs between')
  places = [header.index(column) for column in columns]
  others = [header.index(column) if column in header else None for column in optional]
  for number, line in found:
    fields = line.split('\t')
    if len(fields) != len(header):
      raise UserError(f'{path}:{number}: {len(fields)} fields, not {len(header)} as in its header')
    some = [fields[place] for place in places]
    if '' in some:
      raise UserError(f'{path}:{number}: the {columns[some.index("")]} is empty')
    yield number, *some, *(None if place is None else fields[place] for place in others)


def numbers(path: pathlib.Path, width: int, like: str) -> np.ndarray:
  """Reads lines of `width` numbers with tabs between them; a few 100,000 lines a second.

  Args:
    path: the file.
    width: of every line.
    like: such a line in words, for errors.

  Returns:
    float64 `[lines, width]`, finite. Whole numbers are exact up to 2**53.

  Raises:
    UserError: as of `lines`; a line is not like that, and the message has its number.
  """
  at = 0

  def counted() -> Iterator[str]:
    nonlocal at
    for at, text in lines(path, 'latin-1'):
      # numpy skips lines without a word, and that would not be seen in what it returns.
      if not text.strip() or (at == 1 and text.count('\t') != width - 1):
        raise UserError(f'{path}:{at}: {text!r:.80} is not {like}')
      yield text

  # numpy reads lines one by one and stops at the first bad one, so `at` is that one's number.
  source = counted()
  first = next(source, None)
  if first is None:
    raise UserError(f'{path} is empty; its lines are {like}')
  try:
    values = np.loadtxt(itertools.chain([first], source), np.float64, comments=None,
                        delimiter='\t', ndmin=2)
  except ValueError as e:
    raise UserError(f'{path}:{at}: not {like} ({e})') from e
  check(path, np.isfinite(values).all(1), f'not {like}')
  return values


def ids(path: pathlib.Path, values: np.ndarray) -> np.ndarray:
  """Ids of nodes int64 `[lines, ...]` from the `numbers` of a file: whole, 0 or more."""
  right = (values == np.floor(values)) & (values >= 0) & (values < 2**31)
  check(path, right.reshape(len(right), -1).all(1),
        'an id is not a whole number, is negative, or is too large')
  return values.astype(np.int64)


def check(path: pathlib.Path, right: np.ndarray, wrong: str) -> None:
  """Raises a `UserError` with the first line that is not `right` bool `[lines]`."""
  if not right.all():
    raise UserError(f'{path}:{np.argmin(right) + 1}: {wrong}')
