"""From a log to what is trained on and what is asked: splits, windows, questions, negatives.

Leave-one-out: of every user with three or more events the last is the test's answer. What is held
out for validation is the config's choice, see `Split`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from absl import logging

from core.config import UserError, choose
from recsys.logs import Log

_FEWEST = 3  # Events without which a user is trained on and never asked about.

# What is held out, beside the last event of every user.
VALIDATIONS = {
    'item': 'the last but one of every user, which training then does not see',
    'users': 'the last but one of a few users, of whom training sees nothing (the replicability '
             "study's way)",
    'none': "nothing, as the authors' released code has it"}


@dataclasses.dataclass(frozen=True)
class Split:
  """Which events of a log are for what.

  Attributes:
    log: the log.
    known: int64 `[users]`: training sees so many of each user's first events.
    asked: int64, users that 'test' asks for the last event of.
    validation: int64, users that 'validation' asks for the last but one of.
  """
  log: Log
  known: np.ndarray
  asked: np.ndarray
  validation: np.ndarray

  def question(self, split: str, user: int) -> tuple[np.ndarray, int]:
    """(history, answer) of a user: int32 `[n]` item ids in order of time, and an item id."""
    events = self.log.sequence(user)
    at = len(events) - (1 if split == 'test' else 2)
    return events[:at], int(events[at])

  @functools.cached_property
  def train_counts(self) -> np.ndarray:
    """int64 `[items + 1]`: how often training sees each item."""
    log = self.log
    within = np.arange(len(log.events)) - np.repeat(log.starts[:-1], np.diff(log.starts))
    seen = within < np.repeat(self.known, np.diff(log.starts))
    return np.bincount(log.events[seen], minlength=len(log.items) + 1)


def split(log: Log, validation: str, validation_users: int = 0, seed: int = 0) -> Split:
  """Holds out what is asked about.

  Args:
    log: the log.
    validation: a key of `VALIDATIONS`.
    validation_users: of 'users', how many.
    seed: of 'users', which ones.

  Raises:
    UserError: no user has three events, or fewer than are wanted for validation.
  """
  choose('config.data.validation', validation, VALIDATIONS)
  lengths = np.diff(log.starts)
  asked = np.flatnonzero(lengths >= _FEWEST)
  if not len(asked):
    raise UserError(f'none of the {len(log):,} users has {_FEWEST} events, so that there is '
                    'nothing to ask; the longest history has '
                    f'{lengths.max(initial=0)}')
  if len(asked) < len(log):
    logging.info('%d of %d users have fewer than %d events: trained on, never asked about',
                 len(log) - len(asked), len(log), _FEWEST)
  known = lengths.copy()
  known[asked] -= 1
  held = asked[:0]
  if validation == 'item':
    known[asked] -= 1
    held = asked
  elif validation == 'users':
    if not 0 < validation_users < len(asked):
      raise UserError(f'config.data.validation_users={validation_users}: of {len(asked):,} users '
                      'with three events at least one must be held out, and one left')
    held = np.sort(np.random.default_rng(seed).permutation(asked)[:validation_users])
    known[held] = 0
  return Split(log, known, asked, held)


class Windows:
  """What training reads: windows of at most `length` successive events of a user.

  A longer history is cut as the authors' code does: windows that end at its end, `step` events
  apart, and one that begins at its beginning.

  Attributes:
    buckets: int `[len]`: the first of the lengths that a window fits in.
  """

  def __init__(self, held: Split, lengths: tuple[int, ...], step: int):
    """Cuts.

    Args:
      held: which events may be seen.
      lengths: of the batches, ascending; the last is the longest window.
      step: events between windows.
    """
    self._log = held.log
    longest = lengths[-1]
    users, starts, sizes = [], [], []
    short = np.flatnonzero((held.known > 0) & (held.known <= longest))
    users.append(short)
    starts.append(np.zeros(len(short), np.int64))
    sizes.append(held.known[short])
    for user in np.flatnonzero(held.known > longest):
      begins = np.arange(held.known[user] - longest, 0, -step)
      begins = np.append(begins, 0)[::-1]
      users.append(np.full(len(begins), user))
      starts.append(begins)
      sizes.append(np.full(len(begins), longest))
    self._users, self._starts, self._sizes = (np.concatenate(x) for x in (users, starts, sizes))
    # By user, so that the order of the data does not depend on how it was cut here.
    order = np.argsort(self._users, kind='stable')
    self._users, self._starts, self._sizes = (
        x[order] for x in (self._users, self._starts, self._sizes))
    self.buckets = np.searchsorted(lengths, self._sizes)

  def __len__(self) -> int:
    return len(self._users)

  def __getitem__(self, index: int) -> dict[str, Any]:
    start, size = self._starts[index], self._sizes[index]
    events = self._log.sequence(self._users[index])[start:start + size]
    return {'items': events, 'bucket': self.buckets[index]}

  def __repr__(self) -> str:
    return f'Windows({len(self)} of {len(self._log)} users)'


class Questions:
  """What evaluation asks: a user's history, and what came next.

  Attributes:
    longest: length of the longest history.
  """

  def __init__(self, held: Split, name: str, negatives: 'Negatives'):
    """Args: held; name: 'validation' or 'test'; negatives: of the sampled protocol."""
    self._held, self._name, self._negatives = held, name, negatives
    self._users = held.asked if name == 'test' else held.validation
    lengths = np.diff(held.log.starts)[self._users]
    self.longest = int(lengths.max(initial=2)) - (1 if name == 'test' else 2)

  def __len__(self) -> int:
    return len(self._users)

  def __getitem__(self, index: int) -> dict[str, Any]:
    user = int(self._users[index])
    history, answer = self._held.question(self._name, user)
    return {'history': history, 'answer': answer,
            'candidates': self._negatives.draw(user, self._held.log.sequence(user))}

  def __repr__(self) -> str:
    return f'Questions({self._name}, {len(self)} users)'


class Negatives:
  """Items that a user never touched, drawn in proportion to how often they occur (section 4.2).

  The same for a user and seed, whatever else is drawn.
  """

  def __init__(self, counts: np.ndarray, count: int, seed: int):
    """Args: counts int `[items + 1]`, of all events; count: negatives a user; seed."""
    self._ends, self._count, self._seed = np.cumsum(counts), count, seed

  def draw(self, user: int, touched: np.ndarray) -> np.ndarray:
    """int32 `[count]` item ids, all different, none of `touched`: all events of the user.

    Raises:
      UserError: the user left fewer items untouched.
    """
    taken = {0, *touched.tolist()}
    untouched = len(self._ends) - len(taken)
    if untouched < self._count:
      raise UserError(f'config.eval.negatives={self._count}, but user {user} left only '
                      f'{untouched} items untouched')
    rng = np.random.default_rng((self._seed, user))
    found: list[int] = []
    while len(found) < self._count:
      # Without replacement by rejection: what was drawn before is drawn again and left out.
      places = rng.integers(self._ends[-1], size=2 * self._count)
      for item in np.searchsorted(self._ends, places, side='right').tolist():
        if item not in taken and len(found) < self._count:
          taken.add(item)
          found.append(item)
    return np.asarray(found, np.int32)
