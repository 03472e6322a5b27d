"""RecBole's atomic files of a knowledge graph, `.kg` with `.link` and `.item` beside it.

Tabs between fields, with a header of NAME:TYPE. The `.kg` has head, relation and tail; the entities
have no types there, so `config.data.relations` says which relations are used and what their ends
are: (relation, head type, tail type). Many relations are there once more, from tail to head: one of
both is enough. An entity in two types is two nodes.

The heads of the first relation may be items: the `.link` says which (item, entity). Then they are
called by the column `movie_title` of the `.item`, if there is one, and labelled by the column
`config.data.labels` ('': no labels), where a `token_seq` is several, with spaces between.
"""

import collections
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from core.config import UserError
from core.data import text_files
from graph import tables

_TITLE = 'movie_title'
_TRIPLE = ('head_id:token', 'relation_id:token', 'tail_id:token')


def read(path: pathlib.Path, relations: Sequence[Sequence[str]], labels: str) -> tables.Table:
  """Reads the relations that are named.

  Args:
    path: of the `.kg`.
    relations: `config.data.relations`.
    labels: a column of the `.item`, or ''.

  Raises:
    UserError: a file is not there or is not as it has to be; a relation or column is not there.
  """
  if path.suffix != '.kg':
    raise UserError(f"config.data.name='kg:{path}': a knowledge graph of "
                    "RecBole's is a file NAME.kg")
  wanted = {}
  for relation in relations:
    if isinstance(relation, str) or len(relation) != 3 or relation[0] in wanted:
      raise UserError(f'config.data.relations: {relation!r} is not (relation, head type, tail '
                      'type), each relation once')
    wanted[relation[0]] = tuple(relation[1:])
  places: dict[str, dict[str, int]] = {type: {} for types in wanted.values() for type in types}
  ends = {name: ([], []) for name in wanted}
  there = collections.Counter()
  for _, head, relation, tail in tables.rows(path, _TRIPLE):
    there[relation] += 1
    if relation in wanted:
      for type, entity, end in zip(wanted[relation], (head, tail), ends[relation]):
        end.append(places[type].setdefault(entity, len(places[type])))
  if not there:
    raise UserError(f'{path} has no triples below its header')
  unknown = [name for name in wanted if name not in there]
  if unknown or not wanted:
    what = f'has no relation {unknown[0]!r}' if unknown else 'names none'
    raise UserError(f'config.data.relations {"of" if unknown else "for"} {path}: {what}; there are '
                    + ', '.join(f'{name} ({n:,})' for name, n in there.most_common()))
  names = {type: list(of) for type, of in places.items()}
  edges = [tables.Edges(name, *types, *map(np.array, ends[name])) for name, types in wanted.items()]
  first = edges[0].source
  entities = places[first]
  labelled: dict[int, list[str]] = {}
  titles = {entity: entity for entity in entities}
  for entity, title, some in _items(path, labels):
    if entity in entities:
      titles[entity] = title or entity
      if some:
        labelled.setdefault(entities[entity], []).extend(some)
  count = collections.Counter(titles.values())
  names[first] = [title if title == entity or count[title] == 1 else f'{title} ({entity})'
                  for entity, title in titles.items()]
  return tables.Table(names, edges, {first: labelled})


def _items(path: pathlib.Path, labels: str) -> Iterator[tuple[str, str, list[str]]]:
  """Entity, title ('' without that column) and labels of all items that are entities."""
  link, items = path.with_suffix('.link'), path.with_suffix('.item')
  if not (link.exists() and items.exists()):
    if labels:
      raise UserError(f'config.data.labels={labels!r}: needs {link.name} and {items.name} beside '
                      f'{path}')
    return
  _, header = next(text_files.lines(items), (0, ''))
  columns = {field.rpartition(':')[0]: field for field in header.split('\t')}
  if labels and labels not in columns:
    raise UserError(f'config.data.labels={labels!r}: {items} has no such column; it has '
                    f'{", ".join(columns)}')
  entities: dict[str, list[str]] = {}
  for _, item, entity in tables.rows(link, ('item_id:token', 'entity_id:token')):
    entities.setdefault(item, []).append(entity)
  wanted = [columns[name] for name in (_TITLE, labels) if name in columns]
  several = columns.get(labels, '').endswith(':token_seq')
  for _, item, *fields in tables.rows(items, ('item_id:token',), wanted):
    found = dict(zip(wanted, fields))
    label = found.get(columns.get(labels), '')
    for entity in entities.get(item, ()):
      yield (entity, found.get(columns.get(_TITLE), ''),
             label.split() if several else [label] if label else [])
