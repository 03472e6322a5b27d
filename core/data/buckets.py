"""Batches of a few shapes: which one a step has, with which examples, is a function of the step."""

from collections.abc import Sequence

import numpy as np


class Schedule:
  """Says for every step which bucket its batch comes from, and which of the bucket's batches it is.

  A round is as many steps as it takes to see every bucket once: a bucket of n examples and r rows a
  batch has round(n / r) of them, at least one. Within a round the buckets come in an order drawn
  from the seed. A bucket's own examples are shuffled and repeated apart from the others', so that
  nothing is left over at the end of a round.
  """

  def __init__(self, counts: Sequence[int], rows: Sequence[int], seed: int):
    """Plans.

    Args:
      counts: examples of each bucket; buckets of none never come.
      rows: examples a batch of each bucket.
      seed: of the order.
    """
    shares = [max(round(n / r), 1) if n else 0 for n, r in zip(counts, rows, strict=True)]
    self._round = np.repeat(np.arange(len(shares)), shares)
    self._shares, self._seed = shares, seed
    self._drawn = (-1, None, None)

  def at(self, step: int) -> tuple[int, int]:
    """(bucket, number of the batch among all that this bucket has ever given) of a step."""
    number, position = divmod(step, len(self._round))
    drawn = self._drawn  # Read once: threads share the schedule.
    if drawn[0] != number:
      order = np.random.default_rng((self._seed, number)).permutation(self._round)
      # How often the same bucket came before, at every position of the round.
      before = np.empty_like(order)
      for bucket, share in enumerate(self._shares):
        before[order == bucket] = np.arange(share)
      drawn = self._drawn = (number, order, before)
    bucket = int(drawn[1][position])
    return bucket, number * self._shares[bucket] + int(drawn[2][position])
