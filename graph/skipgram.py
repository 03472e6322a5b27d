"""Heterogeneous skip-gram with negative sampling, by updates of the rows that occur.

The objective of a pair, centre v and context c within the window (equations 2 and 6), as a loss:

  -log sigmoid(X_c . X_v) - sum over M negatives u of log sigmoid(-X_u . X_v)

X_v is a row of the input table, X_c and X_u of the output table, as in the authors' code. What u is
drawn from makes the method: all nodes (metapath2vec), or those of the type of c (metapath2vec++).

An update reads the rows of some walks, computes all their pairs by matrix products, adds up the
gradient of every row over its pairs, and adds it to the row: no array is as large as a table.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import partition
from graph import alias as alias_lib

# Which nodes negatives are drawn from: all; those of the type of the predicted node, the context
# (metapath2vec++, equation 6); those of the type of the centre, which is what the released code
# does in its ++ mode.
NEGATIVES = ('all', 'context', 'centre')


@dataclasses.dataclass(frozen=True)
class Groups:
  """Sets of nodes that negatives are drawn from, each a range of ids.

  Attributes:
    first, size: of the ranges.
    ends: the id behind each type of the graph, ascending; with `of_type` it finds a node's group.
    of_type: the group of each type; -1 for types whose nodes never occur.
  """
  first: tuple[int, ...]
  size: tuple[int, ...]
  ends: tuple[int, ...]
  of_type: tuple[int, ...]

  def of(self, ids: jax.Array) -> jax.Array:
    """The group of each node, int32 like `ids`."""
    types = sum((ids >= end).astype(jnp.int32) for end in self.ends[:-1]) if self.ends[1:] else (
        jnp.zeros_like(ids))
    return jnp.asarray(self.of_type, jnp.int32)[types]


def draw(key: jax.Array, groups: jax.Array, ranges: Groups, accept: jax.Array,
         alias: jax.Array) -> jax.Array:
  """Draws a node of each group by the alias tables of `noise`.

  Args:
    key: random key.
    groups: int32, any shape.
    ranges: what they are.
    accept, alias: float32 and int32 `[nodes]`; entries of a range are its own table.

  Returns:
    int32, like `groups`.
  """
  bits = jax.random.bits(key, (2, *groups.shape), np.uint32)
  size = jnp.asarray(ranges.size, jnp.uint32)[groups]
  at = jnp.asarray(ranges.first, jnp.int32)[groups] + (bits[0] % size).astype(jnp.int32)
  uniform = (bits[1] >> 8).astype(jnp.float32) * np.float32(2 ** -24)
  return jnp.where(uniform < accept[at], at, alias[at])


class Rows(NamedTuple):
  """Gradients of rows, to be added up by id.

  Attributes:
    ids: int32 `[n]`.
    gradients: float32 `[n, dim]`, of the loss.
    terms: float32 `[n]`, how many terms of the loss each is the sum of.
  """
  ids: jax.Array
  gradients: jax.Array
  terms: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of walks, and its gradients row by row.

  Attributes:
    window: k; every context within k tokens on both sides counts (Algorithm 1).
    negatives: M, terms a pair.
    kind: one of `NEGATIVES`.
    groups: see `Groups`.
    shared: negatives that some walks of an update share, of all groups together; each counts as
      often as it must for M a pair. 0: every pair draws its own M, as the paper has it.
    dtype: of the operands of matrix products; they are summed in float32.
  """
  window: int
  negatives: int
  kind: str
  groups: Groups
  shared: int
  dtype: np.dtype = np.dtype(np.float32)

  @property
  def per_group(self) -> int:
    return self.shared // len(self.groups.first)

  def draw_shared(self, key: jax.Array, shape: tuple[int, ...], accept: jax.Array,
                  alias: jax.Array) -> jax.Array:
    """Negatives for as many sets of walks as `shape` says: int32 `[*shape, groups, shared /
    groups]`."""
    groups = len(self.groups.first)
    which = jnp.broadcast_to(jnp.arange(groups)[:, None], (*shape, groups, self.per_group))
    return draw(key, which, self.groups, accept, alias)

  def draw_own(self, key: jax.Array, walks: jax.Array, accept: jax.Array, alias: jax.Array,
               halo: int = 0) -> jax.Array:
    """Negatives of every pair of `walks`: int32 `[walks, centres, 2 window, negatives]`."""
    groups = self._group_of_pairs(walks, halo)
    groups = jnp.broadcast_to(groups[..., None], (*groups.shape, self.negatives))
    return draw(key, groups, self.groups, accept, alias)

  def _group_of_pairs(self, walks: jax.Array, halo: int) -> jax.Array:
    """int32 `[walks, centres, 2 window]`."""
    of = self.groups.of(walks) if self.kind != 'all' else jnp.zeros_like(walks)
    if self.kind == 'context':
      return jnp.maximum(self._contexts(of, halo), 0)
    of = _centres(of, halo)
    return jnp.broadcast_to(of[..., None], (*of.shape, 2 * self.window))

  def _contexts(self, x: jax.Array, halo: int = 0) -> jax.Array:
    """`[walks, tokens]` -> `[walks, centres, 2 window]`: x at each context, -1 for none."""
    tokens, k = x.shape[1], self.window
    padded = jnp.pad(x, ((0, 0), (k, k)), constant_values=-1)
    return jnp.stack([_centres(padded[:, at:at + tokens], halo)
                      for at in range(2 * k + 1) if at != k], 2)

  def gradients(self, tables: Mapping[str, jax.Array], walks: jax.Array, negatives: jax.Array,
                halo: int = 0) -> tuple[Rows, Rows, jax.Array, jax.Array]:
    """The gradient of the summed loss of all pairs of some walks, or of pieces of walks.

    Args:
      tables: `input` and `output`, float32 `[rows, dim]`.
      walks: int32 `[walks, tokens]`, -1 where there is none.
      negatives: of one update, from `draw_own`; or from `draw_shared` for `(sets,)`, which then
        are of as many walks each.
      halo: of a piece, how many tokens at both ends are contexts alone and no centres.

    Returns:
      rows of the input table, rows of the output table, the loss (summed over pairs, nats) and the
      number of pairs, float32 scalars.
    """
    there = walks >= 0
    ids = jnp.where(there, walks, 0)
    centres = _centres(ids, halo)
    x, y = self._rows(tables['input'], centres), self._rows(tables['output'], ids)
    # An attention-like product: every token with every other, of which the window's are kept.
    pairs = self._band(walks.shape[1], halo) * (
        _centres(there, halo)[:, :, None] * there[:, None, :])
    sure = jax.nn.sigmoid(self._dot('nid,njd->nij', x, y))
    loss = -(pairs * _log(sure)).sum()
    error = pairs * (sure - 1)
    gx, gy = self._dot('nij,njd->nid', error, y), self._dot('nij,nid->njd', error, x)
    count = pairs.sum(2)
    if self.shared:
      more = self._shared(tables['output'], ids, centres, x, pairs, negatives)
    else:
      more = self._own(tables['output'], walks, x, negatives, halo)
    dim = x.shape[-1]
    rows_in = Rows(centres.reshape(-1), (gx + more.to_centres).reshape(-1, dim),
                   (count * (1 + self.negatives)).reshape(-1))
    rows_out = Rows(jnp.concatenate([ids.reshape(-1), more.rows.ids.reshape(-1)]),
                    jnp.concatenate([gy.reshape(-1, dim), more.rows.gradients.reshape(-1, dim)]),
                    jnp.concatenate([pairs.sum(1).reshape(-1), more.rows.terms.reshape(-1)]))
    return rows_in, rows_out, loss + more.loss, count.sum()

  def _shared(self, output, ids, centres, x, pairs, negatives) -> '_Negative':
    """Every centre of a set of walks against the same negatives, each weighed for the pairs that it
    stands for."""
    sets, groups = negatives.shape[:2]
    together = lambda a: a.reshape(sets, -1, a.shape[-1])  # The centres of a set.
    u = self._rows(output, negatives.reshape(sets, -1))
    weights = pairs.sum(2, keepdims=True)
    if self.kind == 'context':
      weights = self._dot('nij,njg->nig', pairs, jax.nn.one_hot(self.groups.of(ids), groups))
    elif self.kind == 'centre':
      weights = weights * jax.nn.one_hot(self.groups.of(centres), groups)
    each = together(weights * (self.negatives / self.per_group))
    weights = jnp.repeat(each, self.per_group, axis=2)
    right = jax.nn.sigmoid(-self._dot('nid,nsd->nis', together(x), u))
    error = weights * (1 - right)
    # Logarithms were a tenth of a step on a CPU: up to four scores that weigh the same share one.
    chances = jnp.maximum(right, 1e-9).reshape(*right.shape[:2], each.shape[2], self.per_group)
    while chances.shape[-1] % 2 == 0 and chances.shape[-1] * 4 > self.per_group:
      one, other = jnp.split(chances, 2, axis=-1)
      chances = one * other
    rows = Rows(negatives, self._dot('nis,nid->nsd', error, together(x)), weights.sum(1))
    return _Negative(-(each * jnp.log(chances).sum(-1)).sum(),
                     self._dot('nis,nsd->nid', error, u).reshape(x.shape), rows)

  def _own(self, output, walks, x, negatives, halo) -> '_Negative':
    """Every pair against its own negatives."""
    contexts = self._contexts(walks, halo)
    weights = (contexts >= 0) & (_centres(walks, halo) >= 0)[..., None]
    weights = jnp.broadcast_to(weights[..., None], negatives.shape)
    if self.kind == 'all':
      # As in the authors' code, which only in ++ mode lets a negative be the context itself.
      weights = weights & (negatives != contexts[..., None])
    flat = lambda a: a.reshape(*a.shape[:2], -1)
    weights = flat(weights).astype(jnp.float32)
    u = self._rows(output, flat(negatives))
    right = jax.nn.sigmoid(-self._dot('nid,nipd->nip', x, u))
    error = weights * (1 - right)
    rows = Rows(negatives, error[..., None] * x[:, :, None].astype(jnp.float32), weights)
    return _Negative(-(weights * _log(right)).sum(), self._dot('nip,nipd->nid', error, u), rows)

  def _band(self, tokens: int, halo: int) -> np.ndarray:
    apart = abs(np.arange(halo, tokens - halo)[:, None] - np.arange(tokens))
    return ((apart <= self.window) & (apart > 0)).astype(np.float32)

  def _rows(self, table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.at[ids].get(mode='clip').astype(self.dtype)

  def _dot(self, form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a.astype(self.dtype), b.astype(self.dtype),
                      preferred_element_type=jnp.float32)

  def loss(self, tables: Mapping[str, jax.Array], walks: jax.Array, negatives: jax.Array,
           halo: int = 0) -> tuple[jax.Array, jax.Array]:
    """The mean loss a pair, and the number of pairs: what `gradients` is of, times that number."""
    *_, loss, pairs = self.gradients(tables, walks, negatives, halo)
    return loss / jnp.maximum(pairs, 1), pairs


class _Negative(NamedTuple):
  """What negatives add: to the loss, to the gradients of centres, and rows of their own."""
  loss: jax.Array
  to_centres: jax.Array
  rows: Rows


def _centres(x: jax.Array, halo: int) -> jax.Array:
  """The columns of `[walks, tokens]` that are centres."""
  return x[:, halo:x.shape[1] - halo]


def pieces(walks: jax.Array, length: int, halo: int) -> jax.Array:
  """Cuts walks into pieces, for updates that see a few tokens of many walks.

  Args:
    walks: int32 `[..., tokens]`.
    length: centres of a piece.
    halo: tokens of the walk before and after them that are contexts.

  Returns:
    int32 `[pieces, ..., length + 2 halo]`, -1 where there is none.
  """
  count = -(-walks.shape[-1] // length)
  padding = [(0, 0)] * (walks.ndim - 1) + [(halo, halo + count * length - walks.shape[-1])]
  padded = jnp.pad(walks, padding, constant_values=-1)
  return jnp.stack([padded[..., at * length:(at + 1) * length + 2 * halo] for at in range(count)])


def _log(chance: jax.Array) -> jax.Array:
  return jnp.log(jnp.maximum(chance, 1e-30))


def descend(table: jax.Array, scratch: jax.Array, rows: Rows, rate: jax.Array,
            cap: float) -> tuple[jax.Array, jax.Array]:
  """Takes a step of gradient descent on the rows of a table.

  A row whose gradient is the sum of more than `cap` terms moves as if they were `cap`: hundreds of
  pairs at once on the row of a hub would overshoot, where one after the other they do not.

  Args:
    table: float32 `[n, dim]`.
    scratch: float32 `[n]` of zeros; returned as such.
    rows: gradients; the same id may occur several times.
    rate: learning rate, float32 scalar.
    cap: terms; 0 for no limit.

  Returns:
    the table and scratch after.
  """
  # Over a mesh the rows travel, not the table: each device then has its own part of it to change.
  ids, gradients, terms = (partition.constrain(a, (None,) * a.ndim) for a in rows)
  step = gradients * -rate
  if cap:
    scratch = scratch.at[ids].add(terms)
    step *= jnp.minimum(1, cap / jnp.maximum(scratch[ids], 1))[:, None]
    scratch = scratch.at[ids].set(0)
  return table.at[ids].add(step), scratch


def noise(counts: np.ndarray, first: Sequence[int], size: Sequence[int],
          power: float) -> tuple[np.ndarray, np.ndarray]:
  """Alias tables of count^power within each range of ids.

  Args:
    counts: float `[nodes]`.
    first, size: the ranges.
    power: .75 in word2vec.

  Returns:
    accept float32 and alias int32 `[nodes]`. Every range must have counts.
  """
  accept, other = np.zeros(len(counts), np.float32), np.zeros(len(counts), np.int32)
  for begin, length in zip(first, size):
    part = slice(begin, begin + length)
    accept[part], found = alias_lib.tables(np.power(counts[part], power) * (counts[part] > 0))
    other[part] = found + begin
  return accept, other


def kept(counts: np.ndarray, sample: float) -> np.ndarray:
  """The chance that a token is kept, (sqrt(f / s) + 1) s / f at most 1, f its share of all tokens.

  Args:
    counts: float `[nodes]`.
    sample: s, word2vec's threshold.

  Returns:
    float32 `[nodes]`.
  """
  share = np.maximum(counts / counts.sum(), 1e-300)
  return np.minimum((np.sqrt(share / sample) + 1) * sample / share, 1).astype(np.float32)


def subsample(key: jax.Array, walks: jax.Array, chances: jax.Array) -> jax.Array:
  """Drops tokens; those that stay move together, so that a window reaches further, as in word2vec.

  Args:
    key: random key.
    walks: int32 `[walks, tokens]`, -1 where there is none.
    chances: from `kept`.

  Returns:
    int32 `[walks, tokens]`, filled up with -1 at the end.
  """
  stays = (jax.random.uniform(key, walks.shape) < chances[jnp.maximum(walks, 0)]) & (walks >= 0)
  order = jnp.argsort(~stays, axis=1, stable=True)
  return jnp.take_along_axis(jnp.where(stays, walks, -1), order, axis=1)
