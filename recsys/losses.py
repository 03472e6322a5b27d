"""Losses over a catalogue: the full softmax, and what stands for it when it does not fit.

All take the model's states `[positions, width]` and labels int32 `[positions]` (rows of the item
table), and give float32 `[positions]`, in nats.
"""

import math

import jax
import jax.numpy as jnp

from core import partition
from core.nn import losses
from recsys import encoder

LOSSES = ('softmax', 'sampled', 'gbce')
PROPOSALS = ('uniform', 'log_uniform')
_PARTS = 4096  # Of the range of logarithms, see `draw_negatives`.


def in_chunks(fn, count: int, *arrays: jax.Array):
  """`fn(*arrays)` for arrays of equally many rows, computed `count` rows at a time.

  Args:
    fn: of arrays `[rows, ...]` to a tree of arrays `[rows, ...]`, each row by itself.
    count: rows at a time, see `rows_within`: what `fn` makes on the way need not exist for all.
  """
  rows = len(arrays[0])
  chunks = -(-rows // count)
  if chunks <= 1:
    return fn(*arrays)

  def cut(x):
    x = jnp.pad(x, [(0, chunks * count - rows)] + [(0, 0)] * (x.ndim - 1))
    # Row i goes to chunk i mod chunks, so that every device keeps its rows (see core.step).
    return x.reshape(count, chunks, *x.shape[1:]).swapaxes(0, 1)
  made = jax.lax.map(lambda chunk: fn(*chunk), tuple(cut(x) for x in arrays))
  return jax.tree.map(
      lambda x: x.swapaxes(0, 1).reshape(chunks * count, *x.shape[2:])[:rows], made)


def rows_within(mebibytes: int, rows: int) -> int:
  """How many positions' float32 scores of a table of `rows` fit into so much memory of a device.

  A multiple of the number of parts that a batch is split into, so that `in_chunks` moves nothing.
  """
  layout = partition.ambient()
  ways = layout.batch_ways if layout else 1
  return max(mebibytes * 2 ** 20 // (4 * rows), 1) * ways


def full_softmax(params, states: jax.Array, labels: jax.Array, mebibytes: int) -> jax.Array:
  """Cross entropy over all rows of the item table, special ones included, as the authors have it.

  Args:
    params: of the `encoder.Encoder`.
    states, labels: see above.
    mebibytes: the most that a block of scores may take; what does not fit at once is computed in
      several blocks, and again for the gradient.
  """
  def loss(states, labels):
    return losses.softmax_cross_entropy(encoder.logits(params, states), labels)
  count = rows_within(mebibytes, params[encoder.TABLE].shape[0])
  return in_chunks(loss if count >= len(labels) else jax.checkpoint(loss), count, states, labels)


def draw_negatives(rng: jax.Array, shape: tuple[int, ...], items: int, proposal: str) -> jax.Array:
  """Items drawn with replacement, int32 `shape`, from 1 to `items`.

  Args:
    rng: key.
    shape: of the result.
    items: size of the catalogue, whose ids go from 1 by descending popularity.
    proposal: 'uniform', or 'log_uniform': in proportion to log(1 + 1/id), which needs no table of
      counts and is close to the popularity of items that follow Zipf's law.
  """
  if proposal == 'uniform':
    return jax.random.randint(rng, shape, 1, items + 1)
  # exp(u log(items + 1)) with u drawn in two parts: one float32 has 2^23 values, so that many of a
  # million items would never be drawn.
  coarse, fine = jax.random.split(rng)
  part = math.log(items + 1) / _PARTS
  ids = jnp.floor(jnp.exp(part * jax.random.randint(coarse, shape, 0, _PARTS))
                  * jnp.exp(part * jax.random.uniform(fine, shape)))
  return jnp.clip(ids, 1, items).astype(jnp.int32)


def log_chance(ids: jax.Array, items: int, proposal: str) -> jax.Array:
  """Logarithm of the chance that `draw_negatives` draws each of `ids`: float32, same shape."""
  if proposal == 'uniform':
    return jnp.full(ids.shape, -math.log(items), jnp.float32)
  return jnp.log(jnp.log1p(1 / ids.astype(jnp.float32))) - math.log(math.log(items + 1))


def _pair_scores(params, states, labels, negatives):
  """Scores of the labels `[positions]` and of the negatives `[positions, k]`."""
  positive = encoder.row_logits(params, states, labels)
  if negatives.ndim == 2:
    return positive, encoder.row_logits(params, states[:, None], negatives)
  shared = {name: params[name][negatives] for name in (encoder.TABLE, encoder.BIAS)
            if name in params}
  return positive, encoder.logits(shared, states)


def sampled_softmax(params, states: jax.Array, labels: jax.Array, negatives: jax.Array,
                    log_chances: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Cross entropy over the label and drawn negatives, corrected for how they were drawn (logQ).

  A negative that happens to be the label does not count.

  Args:
    params, states, labels: as in `full_softmax`.
    negatives: int32 `[k]`, shared by all positions, or `[positions, k]`.
    log_chances: of drawing the labels and the negatives, in their shapes.
  """
  positive, negative = _pair_scores(params, states, labels, negatives)
  positive = positive - log_chances[0]
  negative = jnp.where(negatives == labels[:, None], -jnp.inf, negative - log_chances[1])
  return jax.nn.logsumexp(jnp.concatenate([positive[:, None], negative], axis=1),
                          axis=1) - positive


def gbce(params, states: jax.Array, labels: jax.Array, negatives: jax.Array, items: int,
         calibration: float) -> jax.Array:
  """Generalised binary cross entropy (Petrov and Macdonald, gSASRec, 2023, section 5).

  Args:
    params, states, labels, negatives: as in `sampled_softmax`; negatives are drawn uniformly. One
      that happens to be the label counts, as in the paper's code.
    items: size of the catalogue.
    calibration: t; 0 is the plain binary cross entropy of SASRec, 1 fully calibrated.
  """
  positive, negative = _pair_scores(params, states, labels, negatives)
  count = negatives.shape[-1]
  alpha = count / (items - 1)
  beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
  return -(beta * jax.nn.log_sigmoid(positive)
           + jax.nn.log_sigmoid(-negative).sum(axis=-1)) / (count + 1)
