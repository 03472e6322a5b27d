"""Files of interactions: who had to do with which item, and when.

The ending of a file says how it is written; all are UTF-8, with one interaction a line:

  .txt    the BERT4Rec authors': 'user item', separated by white space, in order of time, no header.
  .inter  RecBole's atomic files: separated by tabs, with a header of NAME:TYPE.
  .tsv    separated by tabs, with a header of names. As in `.inter`, quotes mean nothing.
  .csv    separated by commas, with a header of names. "..." quotes a field.

Times are seconds, or ISO 8601 dates and datetimes (UTC unless they say otherwise), and in one
column all of the same kind.
"""

import contextlib
import csv
import dataclasses
import datetime
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import ml_collections
import numpy as np

from core.config import UserError
from core.data import text_files

ENDINGS = ('.txt', '.inter', '.tsv', '.csv')

_COLUMNS = ('user', 'item', 'time')
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


@dataclasses.dataclass(frozen=True)
class Table:
  """Interactions in the order of their file.

  Attributes:
    users, items: str, one an event; equal names are one object, so they cost eight bytes an event.
    times: float64 `[events]`, seconds since 1970, or None when the order is that of time.
  """
  users: Sequence[str]
  items: Sequence[str]
  times: np.ndarray | None


def read(path: str | os.PathLike, columns: ml_collections.ConfigDict) -> Table:
  """Reads a file of interactions.

  Args:
    path: the file; `~` is the home directory.
    columns: `config.data.columns`: `user`, `item` and `time` name columns of the header; without a
      `time` (''), the order of the file is that of time. A `.txt` has no header and needs none.

  Raises:
    UserError: the file is not there or cannot be read, is of no kind that is known here, has no
      such columns or no interactions, or has a line that is wrong: the message has its number.
  """
  path = pathlib.Path(path).expanduser()
  ending = path.suffix.lower()
  if not path.is_file():
    raise UserError(f'{path}: {"a folder" if path.is_dir() else "no such file"}; interactions are '
                    f'read from one file that ends with {", ".join(ENDINGS)}')
  if ending not in ENDINGS:
    raise UserError(f'{path}: a file of interactions ends with {", ".join(ENDINGS)}, which says '
                    'how it is written')
  return _read(path, ending, columns)


def time_parser(first: str) -> Callable[[str], float]:
  """How to read the column of times whose first one is `first`.

  Returns:
    A function from text to seconds since 1970; it raises a `ValueError` that says what would be
    right.
  """
  for parse in (_number, _date):  # In this order: 20140501 could be either.
    with contextlib.suppress(ValueError):
      parse(first)
      return parse
  return _number


def _number(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not math.isfinite(value) or '_' in text:  # Python's own numbers may have underscores.
    raise ValueError('is not a time; write seconds such as 881250949, or, in every line, ISO dates '
                     'such as 2014-05-01')
  return value


@functools.lru_cache(2**16)  # There are few days.
def _date(text: str) -> float:
  try:
    time = datetime.datetime.fromisoformat(text.strip())
  except ValueError as e:
    raise ValueError('is not an ISO date such as 2014-05-01 or 2014-05-01T18:30:00, as the first '
                     'in its column is') from e
  if time.tzinfo is None:
    time = time.replace(tzinfo=datetime.timezone.utc)
  return (time - _EPOCH).total_seconds()


def _read(path: pathlib.Path, ending: str, columns: ml_collections.ConfigDict) -> Table:
  rows = _rows(path, ending)
  if ending == '.txt':
    where, width, like = (0, 1, None), 2, "'user item', as in every .txt"
  else:
    _, header = next(rows, (0, []))
    if not any(header):
      raise UserError(f'{path} has no header; a {ending} begins with one line of names')
    if ending == '.inter':
      header = [_untyped(path, field) for field in header]
    width, like = len(header), f'{len(header)} as in its header'
    where = [_position(path, header, key, columns[key]) if key != 'time' or columns[key] else None
             for key in _COLUMNS]
  user_at, item_at, time_at = where
  users, items, times = [], [], []
  known: dict[str, str] = {}  # One object a name, not one a line.
  seconds = None
  for number, row in rows:
    if len(row) != width:
      raise UserError(f'{path}:{number}: {len(row)} fields, not {like}')
    user, item = row[user_at], row[item_at]
    if not user or not item:
      raise UserError(f'{path}:{number}: the {"item" if user else "user"} is empty; remove the '
                      'line')
    users.append(known.setdefault(user, user))
    items.append(known.setdefault(item, item))
    if time_at is not None:
      seconds = seconds or time_parser(row[time_at])
      try:
        times.append(seconds(row[time_at]))
      except ValueError as e:
        raise UserError(f'{path}:{number}: {columns.time} {row[time_at]!r} {e}') from e
  if not users:
    raise UserError(f'{path} is empty: it has no interactions'
                    + ('' if ending == '.txt' else ' below its header'))
  return Table(users, items, None if time_at is None else np.array(times, np.float64))


def _rows(path: pathlib.Path, ending: str) -> Iterator[tuple[int, list[str]]]:
  """The fields of each row, and the number of its (last) line."""
  lines = text_files.lines(path)
  if ending == '.csv':
    # With their ends: a field may go on in the next line.
    reader = csv.reader((text + '\n' for _, text in lines), strict=True)
    try:
      for row in reader:
        yield reader.line_num, row
    except csv.Error as e:
      raise UserError(f'{path}:{reader.line_num}: not comma-separated values: {e}') from e
  else:
    separator = None if ending == '.txt' else '\t'
    for number, text in lines:
      yield number, text.split(separator)


def _untyped(path: pathlib.Path, field: str) -> str:
  name, colon, _ = field.rpartition(':')
  if not colon:
    raise UserError(f"{path}: {field!r} in its header is not NAME:TYPE, such as user_id:token; a "
                    'header of names alone is that of a .tsv')
  return name


def _position(path: pathlib.Path, header: list[str], key: str, name: str) -> int:
  if header.count(name) != 1:
    raise UserError(f'{path}: {"several columns are" if name in header else "no column is"} called '
                    f'{name!r} (config.data.columns.{key}); it has {", ".join(header)}')
  return header.index(name)
