"""The files of metapath2vec's authors, net_dbis and net_aminer (Dong et al., KDD 2017).

A folder of ISO-8859-1 text with tabs between fields and without headers: `id_author.txt` and
`id_conf.txt` (id, name), `paper_author.txt` (paper, author) and `paper_conf.txt` (paper, venue).
Papers are those that these two have, and are called by their ids: `paper.txt`, with their titles,
is not read. Labels, lines 'name label', are read from `googlescholar.8area.author.label.txt` and
`googlescholar.8area.venue.label.txt` in the folder, beside it or in `label` beside it.
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from core.config import UserError
from core.data import text_files
from graph import tables

_ENCODING = 'iso-8859-1'


def read(folder: pathlib.Path) -> tables.Table:
  """Reads types author, paper and venue, relations paper-author and paper-venue.

  Names lose spaces, as in the authors' script, and the letter of their type ('aJiaweiHan') if all
  have it. Nodes that have one name then are one node.

  Raises:
    UserError: a file is not there or a line is not as it has to be; or a relation has an id that is
      not in the file of names.
  """
  names, places, ends = {}, {}, {}
  for type, file in (('author', 'id_author.txt'), ('venue', 'id_conf.txt')):
    ids, texts = _names(folder / file, type[0])
    names[type], first = _merged(texts)
    places[type] = ids, first
    if len(names[type]) < len(texts):
      logging.info('%s: %s of %s names are there before, and the same node', folder / file,
                   f'{len(texts) - len(names[type]):,}', f'{len(texts):,}')
  for type, file in (('author', 'paper_author.txt'), ('venue', 'paper_conf.txt')):
    path = folder / file
    ends[type] = tables.ids(path, tables.numbers(path, 2, 'two ids with a tab between'))
  papers = np.unique(np.concatenate([found[:, 0] for found in ends.values()]))
  edges = [tables.Edges(f'paper-{type}', 'paper', type, np.searchsorted(papers, found[:, 0]),
                        _places(path, found[:, 1], *places[type]))
           for (type, found), path in zip(ends.items(), (folder / 'paper_author.txt',
                                                         folder / 'paper_conf.txt'))]
  return tables.Table(
      {'author': names['author'], 'paper': list(map(str, papers.tolist())),
       'venue': names['venue']}, edges,
      {type: _labels(folder, type, some) for type, some in names.items()})


def _names(path: pathlib.Path, letter: str) -> tuple[np.ndarray, list[str]]:
  """Ids int64 `[lines]` and names of a file of names."""
  ids, names = [], []
  for line, text in text_files.lines(path, _ENCODING):
    id, tab, name = text.partition('\t')
    if not tab or not id.strip().isdecimal():
      raise UserError(f"{path}:{line}: {text!r:.80} is not 'id name' with a tab between")
    ids.append(int(id))
    names.append(name.replace(' ', ''))
  if not names:
    raise UserError(f'{path} is empty; its lines are an id and a name with a tab between')
  if len(set(ids)) < len(ids):
    seen = np.zeros(len(ids), bool)
    seen[np.unique(ids, return_index=True)[1]] = True
    tables.check(path, seen, 'the id is there before')
  return np.array(ids), _bare(names, letter)


def _bare(names: Sequence[str], letter: str) -> list[str]:
  """Names without the letter of their type, if all have it."""
  if all(name.startswith(letter) for name in names):
    return [name[1:] for name in names]
  return list(names)


def _merged(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
  """The different names, and the place of each in them."""
  known: dict[str, int] = {}
  places = np.fromiter((known.setdefault(name, len(known)) for name in names), np.int64,
                       len(names))
  return list(known), places


def _places(path: pathlib.Path, wanted: np.ndarray, ids: np.ndarray,
            places: np.ndarray) -> np.ndarray:
  """`places` `[names]` of the `wanted` ids `[edges]` among `ids` `[names]`."""
  order = np.argsort(ids)
  found = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
  tables.check(path, ids[found] == wanted, 'the second id is not in the file of names')
  return places[found]


def _labels(folder: pathlib.Path, type: str, names: Sequence[str]) -> Mapping[int, list[str]]:
  """Labels by place in `names`; none without a file."""
  file = f'googlescholar.8area.{type}.label.txt'
  path = next((path for path in (folder / file, folder.parent / file,
                                 folder.parent / 'label' / file) if path.exists()), None)
  if path is None:
    return {}
  found: list[str] = []
  labels: list[str] = []
  for line, text in text_files.lines(path, _ENCODING):
    name, space, label = text.rpartition(' ')
    if not space or not name or not label:
      raise UserError(f"{path}:{line}: {text!r:.80} is not 'name label' with a space between")
    found.append(name)
    labels.append(label)
  place = {name: i for i, name in enumerate(names)}
  # All names of a short file may begin with that letter by chance: what finds more nodes is right.
  found = max((found, _bare(found, type[0])), key=lambda some: sum(name in place for name in some))
  by_place: dict[int, list[str]] = {}
  for name, label in zip(found, labels):
    if name in place:
      by_place.setdefault(place[name], []).append(label)
  missing = sum(name not in place for name in found)
  if missing:
    logging.warning('%s: %s of %s names are not in the graph', path, f'{missing:,}',
                    f'{len(found):,}')
  return by_place
