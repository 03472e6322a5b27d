"""Mode predict: what the users of a file would take next, and which items that was read from."""

import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from core.config import UserError
from recsys import interactions, pictures

_DRAWN = 8  # Users.


def predict(task: Any, params, inputs: pathlib.Path, out: pathlib.Path) -> list[dict[str, Any]]:
  """Recommends items to every user in a file of interactions; they need not be known.

  Args:
    task: the `bert4rec.Task`.
    params: the model's.
    inputs: see `interactions.read`. Where the file has no column `config.data.columns.time`, its
      order is that of time.
    out: a folder; gets attention_N.png for the N-th of the first eight users.

  Returns:
    a record a user, in order of appearance: 'user'; 'history', the number of events; 'items', up
    to `config.eval.top` that are not in the history, best first: 'item' and 'score' (a logit);
    and 'picture', a file in `out`, of those who have one.

  Raises:
    UserError: the file cannot be read, or has items that the model does not know.
  """
  histories = _histories(task, inputs)
  everyone = list(histories.items())
  size = min(task.config.eval.batch_size or task.config.batch_size, len(everyone))
  room = 1 << (max(map(len, histories.values())) - 1).bit_length()
  best = jax.jit(functools.partial(_best, task))
  names = task.log.items
  records = []
  for start in range(0, len(everyone), size):
    some = everyone[start:start + size]
    asked = _questions(task, [history for _, history in some], size)
    seen = np.zeros((size, room), np.int32)
    for row, (_, history) in zip(seen, some):
      row[:len(history)] = history
    scores, ids = jax.device_get(best(params, *asked, seen))
    for (user, history), found, those in zip(some, scores, ids):
      records.append({'user': user, 'history': len(history), 'items': [
          {'item': str(names[item - 1]), 'score': round(float(score), 5)}
          for score, item in zip(found, those) if score > -np.inf]})
  for record, picture in zip(records, _pictures(task, params, everyone[:_DRAWN], out)):
    record['picture'] = picture
  return records


def _histories(task: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
  """user -> ids of their items in order of time, int32 `[events]`."""
  table = interactions.read(path, _columns(path, task.config.data.columns))
  ids = {name: i for i, name in enumerate(task.log.items.tolist(), 1)}
  unknown = list(dict.fromkeys(item for item in table.items if item not in ids))
  if unknown:
    more = ' ...' if unknown[3:] else ''
    raise UserError(f'{path}: {len(unknown):,} of its items are not among the {len(ids):,} that '
                    f'the model knows: {", ".join(map(repr, unknown[:3]))}{more}; leave them out')
  order = range(len(table.items)) if table.times is None else np.argsort(
      table.times, kind='stable').tolist()
  histories: dict[str, list[int]] = {user: [] for user in table.users}
  for event in order:
    histories[table.users[event]].append(ids[table.items[event]])
  return {user: np.asarray(items, np.int32) for user, items in histories.items()}


def _columns(path: pathlib.Path, columns: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`columns` without that of times, if the header of the file has none."""
  if not columns.time or path.suffix.lower() == '.txt':
    return columns
  try:
    with path.open(encoding='utf-8', errors='replace') as file:
      header = file.readline()
  except OSError:
    return columns  # The reader will say what is wrong.
  # As a word, in whatever quotes or with whatever type. Found where it is only part of a name, the
  # reader will say that there is no such column: better than an order that is not that of time.
  if re.search(rf'(?<!\w){re.escape(columns.time)}(?!\w)', header):
    return columns
  logging.warning('%s has no column %r (config.data.columns.time): its order is that of time',
                  path, columns.time)
  return ml_collections.ConfigDict({**columns, 'time': ''})


def _questions(task: Any, histories: Sequence[np.ndarray],
               size: int) -> tuple[np.ndarray, np.ndarray]:
  """Items int32 `[size, length]` and slots `[size]`; rows beyond the histories are padding."""
  items = np.zeros((size, task.config.model.length), np.int32)
  slots = np.zeros(size, np.int32)
  for i, history in enumerate(histories):
    items[i], slots[i] = task.question(history)
  return items, slots


def _best(task: Any, params, items: jax.Array, slots: jax.Array,
          seen: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores and ids `[batch, top]` of the best items that are not in `seen` int32 `[batch, s]`,
  which is padded with 0. Where there are too few the scores are -inf."""
  ids = jnp.arange(task.rows)
  top = min(task.config.eval.top, task.items)

  def some(items, slots, seen):
    scores = task.scores(params, items, slots)
    scores = jnp.where((ids >= 1) & (ids <= task.items), scores, -jnp.inf)
    scores = scores.at[jnp.arange(len(seen))[:, None], seen].set(-jnp.inf)
    return tuple(jax.lax.top_k(scores, top))
  return task.in_chunks(some, items, slots, seen)


def _pictures(task: Any, params, users: Sequence[tuple[str, np.ndarray]],
              out: pathlib.Path) -> list[str]:
  """Draws what was attended to for each user; returns the names of the files."""
  items, slots = _questions(task, [history for _, history in users], len(users))
  attention = jax.device_get(jax.jit(functools.partial(pictures.attention_of, task))(
      params, items))
  names = []
  for i, (user, _) in enumerate(users):
    end = int(slots[i]) + 1
    there = slice(end - np.count_nonzero(items[i]), end)
    labels = ['[mask]' if item == task.mask_id else str(task.log.items[item - 1])
              for item in items[i, there]]
    names.append(f'attention_{i + 1}.png')
    pictures.heads(attention[:, i, :, there, there], labels, out / names[-1],
                   f'attention of user {pictures.short(user)}')
  return names
