"""Beam search and sampling on the device: what a decoder writes, a token at a time.

Both are for use inside `jax.jit`, where they compile once a shape, and know no model. They call

  step(tokens, state) -> (logits, state, attention)

with tokens int32 `[rows]`, those drawn last (0 at first), and get logits `[rows, vocab]`, attention
`[rows, source_length]` and the decoder's next state, a pytree whose leaves are `[rows, ...]` or
scalars. Rows are items by beams: row = item * beams + beam.
"""

from typing import Any, Callable

import flax
import jax
import jax.numpy as jnp

from core.config import UserError
from core.nn import decode

Step = Callable[[jax.Array, Any], tuple[jax.Array, Any, jax.Array]]

# Vocabulary entries whose maximum stands for all of them while the largest logits are looked for.
_BLOCK = 128


@flax.struct.dataclass
class Found:
  """Hypotheses, the best first.

  Attributes:
    tokens: int32 `[batch, beams, room]`: EOS included, where there is one, and 0 after the end.
    scores: float32 `[batch, beams]`: what they are ranked by; -inf where there is no hypothesis.
    log_probs: float32 `[batch, beams]`: log-probability in nats, summed over the tokens; likewise.
    lengths: int32 `[batch, beams]`: tokens, EOS included; 0 where there is no hypothesis.
  """
  tokens: jax.Array
  scores: jax.Array
  log_probs: jax.Array
  lengths: jax.Array


def length_penalty(length: jax.Array | float, alpha: float) -> jax.Array:
  """((5 + length) / 6) ** alpha, by which log-probabilities are divided (Wu et al. 2016, eq. 14).

  Args:
    length: tokens, EOS included, of any shape.
    alpha: 0 for no penalty, in which case short hypotheses are preferred.

  Returns:
    float32 of the shape of `length`.
  """
  return ((5 + jnp.asarray(length, jnp.float32)) / 6) ** alpha


@flax.struct.dataclass
class _Beams:
  """Hypotheses of each item, `[batch, beams]`, as ends of paths through a `_Carry`'s history.

  Attributes:
    scores, log_probs, lengths: as in `Found`.
    ends: int32, the beam that the last token in the history belongs to.
  """
  scores: jax.Array
  log_probs: jax.Array
  lengths: jax.Array
  ends: jax.Array


@flax.struct.dataclass
class _Carry:
  """What beam search remembers between two steps.

  Attributes:
    at: int32 scalar, how many tokens each live beam has.
    log_probs: float32 `[batch, beams]` of live beams, falling; -inf where there is none.
    tokens: int32 `[room, batch, beams]`, what live beams got at each step.
    parents: likewise, which beam of the step before they continue.
    finished: those that ended with EOS, by falling score.
    done: bool `[batch]`; what is done does not change any more.
    attended: float32 `[batch, beams, source_length]`, attention summed over the tokens of live
      beams, or None where coverage costs nothing.
    state: the decoder's.
  """
  at: jax.Array
  log_probs: jax.Array
  tokens: jax.Array
  parents: jax.Array
  finished: _Beams
  done: jax.Array
  attended: jax.Array | None
  state: Any


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
  """`[batch, n]` at int32 `[batch, m]`."""
  return jnp.take_along_axis(x, at, axis=1, mode='promise_in_bounds')


def _reorder(x: jax.Array, parents: jax.Array) -> jax.Array:
  """`[batch * beams, ...]` at int32 `[batch, beams]`; a scalar stays."""
  if not x.ndim:
    return x
  # Beams come from their own item only: said so, a batch over several devices is not gathered.
  rows = x.reshape(*parents.shape, *x.shape[1:])
  return jax.vmap(lambda x, at: x.at[at].get(mode='promise_in_bounds'))(rows, parents).reshape(
      x.shape)


def _top_k(x: jax.Array, k: int, block: int = _BLOCK) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k` of `[rows, n]`, indices of equals included, in about one pass over the rows.

  The k largest entries are in the k blocks with the largest maxima, the first of equals, since each
  of these k holds an entry that comes before any that is left out.
  """
  rows, n = x.shape
  count = n // block
  if count <= 2 * k:
    return jax.lax.top_k(x, k)
  whole = x[:, :count * block].reshape(rows, count, block)
  # In order, so that of equals the first stays the first.
  best = jnp.sort(jax.lax.top_k(whole.max(-1), k)[1], axis=-1)
  places = (best[..., None] * block + jnp.arange(block)).reshape(rows, k * block)
  rest = jnp.broadcast_to(jnp.arange(count * block, n), (rows, n - count * block))
  places = jnp.concatenate([places, rest], axis=1)
  values, at = jax.lax.top_k(_take(x, places), k)
  return values, _take(places, at)


def _uncovered(attended: jax.Array, source_mask: jax.Array) -> jax.Array:
  """Sum over the source of log(min(attention, 1)) (Wu et al. 2016, eq. 14): at most 0.

  Args:
    attended: float32 `[batch, beams, source_length]`.
    source_mask: bool `[batch, source_length]`.

  Returns:
    float32 `[batch, beams]`.
  """
  # A weight that underflowed to 0 must not make a hypothesis impossible.
  logs = jnp.log(jnp.clip(attended, jnp.finfo(jnp.float32).tiny, 1))
  return jnp.where(source_mask[:, None], logs, 0).sum(-1)


def _trace(carry: _Carry, ends: jax.Array, lengths: jax.Array) -> jax.Array:
  """Tokens of hypotheses, followed from their ends through the history to its start.

  Args:
    carry: of a search.
    ends: int32 `[batch, beams]`, the beam of the last token.
    lengths: likewise, how many tokens.

  Returns:
    int32 `[batch, beams, room]`, 0 after the last.
  """
  def back(beams, here):
    at, tokens, parents = here
    inside = at < lengths
    found = jnp.where(inside, _take(tokens, beams), 0)
    return jnp.where(inside, _take(parents, beams), beams), found

  steps = jnp.arange(carry.tokens.shape[0])
  tokens = jax.lax.scan(back, ends, (steps, carry.tokens, carry.parents), reverse=True)[1]
  return jnp.moveaxis(tokens, 0, 2)


def beam_search(step: Step, state: Any, *, batch: int, beams: int, limits: jax.Array, room: int,
                alpha: float = .6, coverage: float = 0., eos: int = 1,
                source_mask: jax.Array | None = None) -> Found:
  """The most likely continuations, as ranked by Wu et al. 2016, eq. 14.

  A hypothesis Y scores log P(Y) / length_penalty(|Y|, alpha) + coverage * sum over source positions
  of log(min(attention summed over the tokens of Y, 1)). Each step orders all continuations of an
  item by log-probability. Those among the best `beams` that end with EOS join the ended hypotheses,
  of which the best `beams` by score are kept (so that one beam without penalties is greedy search);
  the best `beams` of the others live on. An item is done when it is at its limit, or has `beams`
  ended hypotheses that no live one can still beat (its log-probability only falls, so that divided
  by the penalty at the limit it is a bound); the search ends when all are. What is found for an
  item does not depend on the other items. EOS is not forced at the limit: only an item without any
  ended hypothesis is given those that live.

  Besides the decoder's state, whose rows are put in the order of the beams at every step (one copy
  of it a step, none for one beam), the search holds `2 * room * batch * beams` int32 of history,
  and `batch * beams * source_length` float32 where coverage counts. A step reads the logits twice
  and writes one row of the history, whatever was decoded before.

  Args:
    step: see the top of this file.
    state: the decoder's, fresh.
    batch: items.
    beams: hypotheses kept an item.
    limits: int32 `[batch]`, tokens an item may have, EOS included.
    room: no item may have more tokens.
    alpha: length penalty, at least 0.
    coverage: weight of the coverage penalty, at least 0.
    eos: id that ends a hypothesis.
    source_mask: bool `[batch, source_length]`, True where the source has a token; only read, and
      needed, where coverage counts.

  Returns:
    `Found`.

  Raises:
    UserError: fewer than one beam, or negative alpha or coverage.
    ValueError: coverage counts and `source_mask` is missing.
  """
  if beams < 1:
    raise UserError(f'beam search with {beams} beams; it must be at least 1')
  if alpha < 0 or coverage < 0:
    raise UserError(f'beam search with a length penalty of {alpha} and a coverage penalty of '
                    f'{coverage}: both must be at least 0')
  if coverage and source_mask is None:
    raise ValueError('a coverage penalty needs to know the padding of the source: source_mask')
  limits = jnp.minimum(limits, room).astype(jnp.int32)
  most = length_penalty(limits, alpha)

  def advance(carry: _Carry) -> _Carry:
    last = jnp.where(carry.at > 0, carry.tokens[carry.at - 1], 0).reshape(-1)
    logits, state, attention = step(last, carry.state)
    logits = logits.astype(jnp.float32)
    # Even if all that go on have one parent these are enough, and one is EOS. Only they get their
    # log-probability: the softmax of all would be written and read again.
    # The barrier is for XLA on the CPU, which would otherwise merge the two passes into a slow one.
    values, ids = jax.lax.optimization_barrier(_top_k(logits, min(beams + 1, logits.shape[1])))
    largest, wide = values[:, :1], values.shape[1]
    values = values - largest - jnp.log(jnp.exp(logits - largest).sum(-1, keepdims=True))
    values = (values + carry.log_probs.reshape(-1, 1)).reshape(batch, beams * wide)
    totals, at = jax.lax.top_k(values, 2 * beams)
    parents, tokens = at // wide, _take(ids.reshape(batch, -1), at)
    length = carry.at + 1

    scores = totals / length_penalty(length, alpha)
    attended = carry.attended
    if coverage:
      attended += attention.astype(jnp.float32).reshape(attended.shape)
      scores += coverage * _take(_uncovered(attended, source_mask), parents)
    closed = carry.done[:, None]
    ends = tokens == eos
    counts = ends & (jnp.arange(2 * beams) < beams) & ~closed
    scores = jnp.where(counts, scores, -jnp.inf)
    # The old before the new: of equals the first are kept, and so nothing that is done changes.
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, jnp.broadcast_to(new, totals.shape)], axis=1),
        carry.finished, _Beams(scores, totals, length, parents))
    best = jax.lax.top_k(both.scores, beams)[1]
    finished = jax.tree.map(lambda x: _take(x, best), both)

    live, at = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), beams)
    parents, tokens = _take(parents, at), _take(tokens, at)
    live = jnp.where(closed, carry.log_probs, live)
    put = lambda into, x: jax.lax.dynamic_update_index_in_dim(into, x, carry.at, axis=0)
    if beams > 1:
      state = jax.tree.map(lambda x: _reorder(x, parents), state)
    if coverage:
      moved = jnp.take_along_axis(attended, parents[..., None], axis=1, mode='promise_in_bounds')
      attended = jnp.where(closed[..., None], carry.attended, moved)
    # Fewer than `beams` finished ones make the worst -inf, below any bound but that of no beam.
    beaten = finished.scores[:, -1] >= live[:, 0] / most
    return _Carry(at=length, log_probs=live, tokens=put(carry.tokens, tokens),
                  parents=put(carry.parents, parents), finished=finished,
                  done=carry.done | (length >= limits) | beaten, attended=attended, state=state)

  none = jnp.full((batch, beams), -jnp.inf)
  zeros = jnp.zeros((batch, beams), jnp.int32)
  history = jnp.zeros((room, batch, beams), jnp.int32)
  # All beams of an item begin alike: but for the first they would all find the same.
  carry = _Carry(at=jnp.int32(0), log_probs=none.at[:, 0].set(0), tokens=history, parents=history,
                 finished=_Beams(none, none, zeros, zeros), done=limits <= 0,
                 attended=jnp.zeros((batch, beams, source_mask.shape[1])) if coverage else None,
                 state=state)
  carry = jax.lax.while_loop(lambda c: (c.at < room) & ~c.done.all(), advance, carry)

  scores = carry.log_probs / most[:, None]
  if coverage:
    scores += coverage * _uncovered(carry.attended, source_mask)
  scores, ends = jax.lax.top_k(scores, beams)
  live = _Beams(scores, _take(carry.log_probs, ends),
                jnp.broadcast_to(limits[:, None], ends.shape), ends)
  ended = carry.finished.scores[:, :1] > -jnp.inf
  made = jax.tree.map(lambda old, new: jnp.where(ended, old, new), carry.finished, live)
  exists = made.scores > -jnp.inf
  lengths = jnp.where(exists, made.lengths, 0)
  # EOS is not in the history, which holds what live beams got.
  before = lengths - (exists & ended)
  tokens = _trace(carry, made.ends, before)
  closing = (jnp.arange(room) == before[..., None]) & (before < lengths)[..., None]
  return Found(tokens=jnp.where(closing, eos, tokens), scores=made.scores,
               log_probs=jnp.where(exists, made.log_probs, -jnp.inf), lengths=lengths)


def sample(step: Step, state: Any, *, rng: jax.Array, batch: int, limits: jax.Array, room: int,
           temperature: jax.Array | float = 0., top_k: int = 0, top_p: float = 1., eos: int = 1,
           items: jax.Array | None = None) -> Found:
  """Draws one continuation an item.

  A draw depends on `rng`, the number of the item and the step, not on the rest of the batch.
  Besides the decoder's state, which no step moves, sampling holds `room * batch` int32.

  Args:
    step: see the top of this file; rows are items.
    state: the decoder's, fresh.
    rng: key.
    batch: items.
    limits: int32 `[batch]`, tokens an item may have, EOS included.
    room: no item may have more tokens.
    temperature, top_k, top_p: see `decode.draw`; a temperature of 0 takes the most likely token.
    eos: id that ends a sentence.
    items: int32 `[batch]`, numbers of the items; by default they are counted from 0.

  Returns:
    `Found` with one hypothesis an item, which has no EOS if it was cut at its limit. Scores are its
    log-probability under the model (temperature 1, all tokens allowed).
  """
  limits = jnp.minimum(limits, room).astype(jnp.int32)
  items = jnp.arange(batch) if items is None else items
  keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, items)

  def advance(carry):
    at, last, tokens, log_probs, lengths, done, state = carry
    logits, state, _ = step(last, state)
    logits = logits.astype(jnp.float32)
    drawn = jax.vmap(lambda key, row: decode.draw(jax.random.fold_in(key, at), row, temperature,
                                                  top_k, top_p))(keys, logits)
    chosen = _take(logits, drawn[:, None])[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    drawn = jnp.where(done, 0, drawn)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, drawn, at, axis=0)
    log_probs += jnp.where(done, 0, chosen)
    lengths += ~done
    done = done | (drawn == eos) | (at + 1 >= limits)
    return at + 1, drawn, tokens, log_probs, lengths, done, state

  zeros = jnp.zeros(batch, jnp.int32)
  carry = (jnp.int32(0), zeros, jnp.zeros((room, batch), jnp.int32), jnp.zeros(batch), zeros,
           limits <= 0, state)
  _, _, tokens, log_probs, lengths, _, _ = jax.lax.while_loop(
      lambda c: (c[0] < room) & ~c[5].all(), advance, carry)
  return Found(tokens=tokens.T[:, None], scores=log_probs[:, None], log_probs=log_probs[:, None],
               lengths=lengths[:, None])
