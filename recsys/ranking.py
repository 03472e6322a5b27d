"""How well answers are ranked: ranks on the device, measures of them, and the evaluators.

Every question is ranked three ways, always all of them and by name:

  full    among all items, those of the history included (RecBole's default for sequences);
  unseen  among the items that the history does not have;
  popN    among N items drawn by popularity that the user never touched (BERT4Rec section 4.2 has
          N=100).

A rank is the number of other items whose score is not lower: ties count against the model, and so
does a score that is no number.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# HR@1 is also NDCG@1. MRR is not cut.
MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'HR@1': lambda r: r < 1, 'HR@5': lambda r: r < 5, 'HR@10': lambda r: r < 10,
    'NDCG@5': lambda r: (r < 5) / np.log2(r + 2.), 'NDCG@10': lambda r: (r < 10) / np.log2(r + 2.),
    'MRR': lambda r: 1 / (r + 1.)}


def ranks(scores: jax.Array, batch: Mapping[str, jax.Array], items: int) -> dict[str, jax.Array]:
  """Ranks of the answers, from 0.

  Args:
    scores: float32 `[batch, rows]`; rows 1 to `items` are the catalogue, the others are ignored.
    batch: 'answer' int32 `[batch]`, 'seen' int32 `[batch, s]` (different items, padded with 0)
      and 'candidates' int32 `[batch, n]`.
    items: size of the catalogue.

  Returns:
    int32 `[batch]` a protocol.
  """
  ids = jnp.arange(scores.shape[1])
  answer = batch['answer'][:, None]
  goal = jnp.take_along_axis(scores, answer, axis=1)
  # Not "greater or equal": comparing with what is no number is False.
  ahead = ~(scores < goal) & (ids != answer) & (ids >= 1) & (ids <= items)
  among = lambda chosen: jnp.take_along_axis(ahead, chosen, axis=1).sum(axis=1)
  full = ahead.sum(axis=1)
  # Row 0 is never ahead, so the padding of `seen` does not count.
  return {'full': full, 'unseen': full - among(batch['seen']),
          f'pop{batch["candidates"].shape[1]}': among(batch['candidates'])}


def ranks_on_host(scores: np.ndarray, question: Mapping) -> dict[str, int]:
  """The same for one question by other means.

  Args:
    scores: `[items + 1]`; row 0 is ignored.
    question: 'history', 'answer' and 'candidates' as `sequences.Questions` has them.
  """
  goal = scores[question['answer']]
  ahead = ~(scores < goal)
  ahead[[0, question['answer']]] = False
  full = int(ahead.sum())
  seen = int(ahead[np.unique(question['history'])].sum())
  return {'full': full, 'unseen': full - seen,
          f'pop{len(question["candidates"])}': int(ahead[question['candidates']].sum())}


class _Totals:
  """Sums of the measures over questions, so that memory does not depend on how many there are."""

  def __init__(self):
    self._sums: dict[str, float] = {}
    self._count = 0

  def add(self, found: Mapping[str, np.ndarray]) -> None:
    """Args: found: protocol -> ranks int `[n]`."""
    for protocol, values in found.items():
      for name, measure in MEASURES.items():
        key = f'{protocol}/{name}'
        self._sums[key] = self._sums.get(key, 0.) + float(np.sum(measure(values), dtype=float))
    self._count += len(values)

  def means(self) -> dict[str, float]:
    return {key: total / self._count for key, total in self._sums.items()}


class LeaveOneOut:
  """Measures of a model on the questions of a split: 'full/NDCG@10' and so on."""

  def __init__(self, task, split: str, every: str = ''):
    self._task, self._split, self.every = task, split, every

  def __call__(self, run, params, step: int) -> dict[str, float]:
    totals = _Totals()
    for found in run.map(self._task.ranks, params, self._split):
      totals.add({name: values for name, values in found.items() if name != 'index'})
    return totals.means()


class Baseline:
  """The same measures of scores that no model made: popularity, or the truth where it is known."""
  every = 'end'  # Training does not change them.

  def __init__(self, task, split: str, scores: Callable[[np.ndarray], np.ndarray]):
    """Args: scores: of a history int32 `[n]`: `[items + 1]`."""
    self._task, self._split, self._scores = task, split, scores

  def __call__(self, run, params, step: int) -> dict[str, float]:
    totals = _Totals()
    for question in self._task.dataset(self._split):
      found = ranks_on_host(self._scores(question['history']), question)
      totals.add({name: np.asarray([rank]) for name, rank in found.items()})
    return totals.means()
