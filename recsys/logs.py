"""Logs: what every user did, one after the other, as arrays of item ids.

`config.data` says what is read and what is kept of it:

  name            `markov` (embedded, see recsys.markov), `interactions:PATH` (see
                  recsys.interactions), or a tfds data set such as `movielens/1m-ratings`.
  split, data_dir  of tfds data sets.
  columns         user, item and time: columns of a file, or features of a tfds data set, where
                  `data/review_date` is the feature `review_date` in `data`.
  core, min_item_count, min_length   filters, see `build`.

A log that is not embedded is made once, by `prepare`, and kept as `log.npz` in the workdir.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm
from absl import logging

from core.config import UserError
from core.data import kept, sources
from recsys import interactions

FILE = 'log.npz'

_FILTERS = ('core', 'min_item_count', 'min_length')
# Features of tfds data sets that need no `config.data.columns`. tfds shuffles what it prepares:
# which of two events of the same second (or day) comes first, is then by chance, once and for all.
_TFDS_COLUMNS = {
    'movielens': {'user': 'user_id', 'item': 'movie_id', 'time': 'timestamp'},
    'amazon_us_reviews': {'user': 'data/customer_id', 'item': 'data/product_id',
                          'time': 'data/review_date'}}


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
  """Everything that users did, numbered.

  Attributes:
    users: str `[users]`, in the order in which the data first has them.
    items: str `[items]`; id i + 1 is that of `items[i]`, 0 is none. The most frequent item comes
      first, of equally frequent ones that which the data has first.
    events: int32 `[events]`, ids of items: user after user, and of each in order of time; events of
      the same time stay in the order of the data.
    starts: int64 `[users + 1]`, where in `events` each user begins, and their number.
    made_of: what it was made of, JSON of `config.data`; '' for one that is not kept in a file.
  """
  users: np.ndarray
  items: np.ndarray
  events: np.ndarray
  starts: np.ndarray
  made_of: str = ''

  def __len__(self) -> int:
    """The number of users."""
    return len(self.users)

  def sequence(self, user: int) -> np.ndarray:
    """The events of one user, int32 `[events of the user]`; a view."""
    return self.events[self.starts[user]:self.starts[user + 1]]

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """How often each item occurs in all events, int64 `[items + 1]`; `counts[0]` is 0."""
    return np.bincount(self.events, minlength=len(self.items) + 1)

  def save(self, path: pathlib.Path) -> None:
    """Writes the file whole or not at all."""
    kept.save(path, {field.name: np.asarray(getattr(self, field.name))
                     for field in dataclasses.fields(self)})


def load(path: pathlib.Path) -> Log:
  """Reads what `Log.save` wrote.

  Raises:
    UserError: no such file, a damaged one, or arrays that do not belong together.
  """
  with kept.opened(path, 'log') as arrays:
    found = {field.name: arrays[field.name] for field in dataclasses.fields(Log)}
    kinds = ''.join(value.dtype.kind for value in found.values())
    log = Log(**found | {'made_of': str(found['made_of'])})
    if kinds != 'UUiiU' or {a.ndim for a in (log.users, log.items, log.events, log.starts)} != {1}:
      raise ValueError('arrays of other kinds or shapes')
    if (len(log.starts) != len(log) + 1 or log.starts[0] or log.starts[-1] != len(log.events)
        or (np.diff(log.starts) < 1).any() or log.events.min() < 1
        or log.events.max() > len(log.items)):
      raise ValueError('arrays that do not belong together')
  return log


def build(table: interactions.Table, data: ml_collections.ConfigDict) -> Log:
  """Filters and numbers interactions. An event that occurs twice is two events.

  Args:
    table: what was read.
    data: with `core=k` above 0, users and items of fewer than k events are dropped again and again
      until there are none; otherwise items of fewer than `min_item_count` events are dropped, then
      users who are left with fewer than `min_length` (or with none), once each.

  Raises:
    UserError: nothing is left; says by which filter.
  """
  user_names, users = _numbered(table.users)
  item_names, items = _numbered(table.items)
  kept = np.arange(len(users))
  if data.core > 0:
    while True:
      enough = (_own_count(users[kept]) >= data.core) & (_own_count(items[kept]) >= data.core)
      if enough.all():
        break
      kept = kept[enough]
    _check_some(kept, f'core={data.core} leaves')
  else:
    kept = kept[_own_count(items) >= data.min_item_count]
    _check_some(kept, f'min_item_count={data.min_item_count} leaves')
    kept = kept[_own_count(users[kept]) >= data.min_length]
    _check_some(kept, f'min_length={data.min_length}, after '
                f'min_item_count={data.min_item_count}, leaves')
  users, items = users[kept], items[kept]
  # Users keep their order. Sorting is stable: times that are equal stay in the order of the data.
  order = np.argsort(users, kind='stable') if table.times is None else np.lexsort(
      (table.times[kept], users))
  events_of = np.bincount(users, minlength=len(user_names))
  counts = np.bincount(items, minlength=len(item_names))
  by_count = np.argsort(-counts, kind='stable')[:np.count_nonzero(counts)]
  ids = np.zeros(len(item_names), np.int32)
  ids[by_count] = np.arange(1, len(by_count) + 1)
  present = np.flatnonzero(events_of)
  return Log(np.array([user_names[i] for i in present], np.str_),
             np.array([item_names[i] for i in by_count], np.str_),
             ids[items[order]], np.append(0, np.cumsum(events_of[present])))


def _numbered(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
  """The different names in order of appearance, and int32 `[events]`, the place of each in them."""
  known: dict[str, int] = {}
  numbers = np.fromiter((known.setdefault(name, len(known)) for name in names), np.int32,
                        len(names))
  return list(known), numbers


def _own_count(numbers: np.ndarray) -> np.ndarray:
  """How often the number of each event occurs."""
  return np.bincount(numbers)[numbers] if len(numbers) else numbers


def _check_some(kept: np.ndarray, what: str) -> None:
  if not len(kept):
    raise UserError(f'config.data.{what} no event of the data; set it lower')


# --- Where logs come from ------------------------------------------------------------------------


def find(data: ml_collections.ConfigDict, workdir: pathlib.Path | None) -> Log:
  """The log that `config.data` describes.

  Args:
    data: see the top of this file.
    workdir: of the run, where `prepare` may have left the log; else the data is read.

  Raises:
    UserError: the data cannot be read, nothing is left of it, or what `prepare` left is damaged or
      was made with other settings.
  """
  if data.name == 'markov':
    from recsys import markov  # It makes its log with `build`.
    return markov.log()
  if workdir is None or not (workdir / FILE).exists():
    return _make(data)
  log = load(workdir / FILE)
  kept.check_same(workdir / FILE, log.made_of, _settings(data))
  return log


def prepare(data: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Reads what `config.data` names and leaves `log.npz` in the workdir, unless it is there.

  Raises:
    UserError: the data cannot be read, nothing is left of it, or the file that is there is damaged
      or was made with other settings.
  """
  log = find(data, workdir)
  if data.name != 'markov' and not (workdir / FILE).exists():
    log.save(workdir / FILE)


def _make(data: ml_collections.ConfigDict) -> Log:
  """Reads and builds."""
  if data.name.startswith('interactions:'):
    file = data.name.removeprefix('interactions:')
    if not file:
      raise UserError(f'config.data.name={data.name!r} names no file: write interactions:PATH')
    table, timeless = interactions.read(file, data.columns), 0
  else:
    table, timeless = _read_tfds(data)
  log = dataclasses.replace(build(table, data), made_of=json.dumps(_settings(data)))
  logging.info(
      'read %s: %s users, %s items, %s events, %.2f a user; dropped %s users, %s items, '
      '%s events%s', data.name, f'{len(log):,}', f'{len(log.items):,}',
      f'{len(log.events):,}', len(log.events) / len(log), f'{len(set(table.users)) - len(log):,}',
      f'{len(set(table.items)) - len(log.items):,}', f'{len(table.users) - len(log.events):,}',
      f', and before that {timeless:,} without a time' if timeless else '')
  return log


def _settings(data: ml_collections.ConfigDict) -> dict[str, Any]:
  """What a log depends on."""
  return {'name': data.name, 'split': data.split, 'columns': data.columns.to_dict(),
          **{key: data[key] for key in _FILTERS}}


def _read_tfds(data: ml_collections.ConfigDict) -> tuple[interactions.Table, int]:
  """The events of a tfds data set, and how many more there were, without a time."""
  base = re.split('[/:]', data.name.removeprefix('tfds:'))[0]
  columns = _TFDS_COLUMNS.get(base) or data.columns.to_dict()
  wanted = [columns[key] for key in ('user', 'item', 'time') if columns[key]]
  source = sources.open_source(data.name, data.split, data_dir=data.data_dir,
                               features=tuple(name.split('/')[0] for name in wanted))
  users, items, times, seconds = [], [], [], None
  known: dict[str, str] = {}
  for index in tqdm.tqdm(
      range(len(source)), desc=f'read {data.name}', unit=' events', unit_scale=True, delay=5,
      mininterval=.5 if sys.stderr.isatty() else 30):
    example = source[index]
    user, item, *time = [_text(source, example, name) for name in wanted]
    if time == ['']:  # Some reviews have no date.
      continue
    if time:
      seconds = seconds or interactions.time_parser(time[0])
      try:
        times.append(seconds(time[0]))
      except ValueError as e:
        raise UserError(f'example {index} of {source!r}: {columns["time"]} {time[0]!r} {e}') from e
    users.append(known.setdefault(user, user))
    items.append(known.setdefault(item, item))
  table = interactions.Table(users, items, np.array(times, np.float64) if columns['time'] else None)
  return table, len(source) - len(users)


def _text(source: sources.TfdsSource, example: Mapping[str, Any], name: str) -> str:
  """The value of a feature; `outer/inner` is one in another."""
  value = example
  for part in name.split('/'):
    if not isinstance(value, Mapping) or part not in value:
      raise UserError(f'{source!r} has no feature {name!r} (config.data.columns); it has '
                      f'{", ".join(_names(example))}')
    value = value[part]
  if isinstance(value, Mapping) or np.ndim(value):
    raise UserError(f'{source!r}: feature {name!r} (config.data.columns) is more than one value; '
                    f'it has {", ".join(_names(example))}')
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def _names(features: Mapping[str, Any], prefix: str = '') -> list[str]:
  return list(itertools.chain.from_iterable(
      _names(value, f'{prefix}{key}/') if isinstance(value, Mapping) else [prefix + key]
      for key, value in features.items()))
