"""What of a sequence is to be predicted: masked items (BERT4Rec section 3.6), or each next one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKINGS = ('fixed', 'bernoulli')


class Puzzle(NamedTuple):
  """Attributes:
    items: int32 `[batch, n]`, what the model reads.
    slots: int32 `[batch, m]`, the positions where it answers.
    labels: int32 `[batch, m]`, the right answers.
    weights: float32 `[batch, m]`, 1 for an answer that counts and 0 for an empty slot.
  """
  items: jax.Array
  slots: jax.Array
  labels: jax.Array
  weights: jax.Array


def max_masks(length: int, rate: float, most: int) -> int:
  """Slots that a sequence of `length` items needs when `rate` of it is masked, at most `most`."""
  return max(min(int(length * rate + .5), most, length), 1)


def mask_items(rng: jax.Array, items: jax.Array, mask_id: int, *, rate: float, slots: int,
               masking: str = 'fixed', last_share: float = 0.0) -> Puzzle:
  """Replaces random items of each sequence by the mask item.

  Args:
    rng: key.
    items: int32 `[batch, n]`, padded with 0 on either side.
    mask_id: the mask item.
    rate: share of a sequence's items that is masked (rho).
    slots: the most that are masked in one sequence.
    masking: 'fixed': min(slots, max(1, round(rate * length))) items, halves rounded up, as the
      authors' code does; 'bernoulli': each item with that chance, what exceeds `slots` stays.
    last_share: share of the sequences of which only the last item is masked instead.
  """
  rng, which = jax.random.split(rng)
  there = items > 0
  length = there.sum(axis=1)
  order = jnp.where(there, jax.random.uniform(rng, items.shape), jnp.inf)
  lowest, chosen = jax.lax.top_k(-order, slots)
  if masking == 'fixed':
    # From the host: in float32 some halves would be rounded down.
    counts = [0] + [max_masks(n, rate, slots) for n in range(1, items.shape[1] + 1)]
    count = jnp.asarray(counts)[length]
  else:
    count = (-lowest < rate).sum(axis=1)
  if last_share:
    only_last = (jax.random.uniform(which, length.shape) < last_share) & (length > 0)
    last = jnp.where(there, jnp.arange(items.shape[1]), 0).max(axis=1)
    chosen = chosen.at[:, 0].set(jnp.where(only_last, last, chosen[:, 0]))
    count = jnp.where(only_last, 1, count)
  weights = jnp.arange(slots) < count[:, None]
  hidden = ((chosen[:, None, :] == jnp.arange(items.shape[1])[:, None])
            & weights[:, None, :]).any(axis=2)
  return Puzzle(jnp.where(hidden, mask_id, items), chosen,
                jnp.take_along_axis(items, chosen, axis=1) * weights,
                weights.astype(jnp.float32))


def next_items(items: jax.Array) -> Puzzle:
  """Each item but the last answers with the one after it (Kang and McAuley, 2018).

  Args:
    items: int32 `[batch, n + 1]`, padded with 0 on either side; the model reads all but the last.
  """
  items, labels = items[:, :-1], items[:, 1:]
  slots = jnp.broadcast_to(jnp.arange(labels.shape[1]), labels.shape)
  # The item before must be there too: with padding on the left nothing predicts the first one.
  weights = (labels > 0) & (items > 0)
  return Puzzle(items, slots, labels * weights, weights.astype(jnp.float32))
