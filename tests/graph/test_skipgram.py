"""Skip-gram: gradients against loops over pairs with equation 7, draws against counts^.75, rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from graph import skipgram

ROWS, DIM, WINDOW, NEGATIVES = 14, 5, 2, 3
ENDS = (5, 9, 12)  # Types a, b and c, and two rows more than nodes; c never occurs.
TYPES = skipgram.Groups((0, 5), (5, 4), ENDS, (0, 1, -1))
EVERY = skipgram.Groups((0,), (12,), ENDS, (0, 0, 0))
WALKS = np.int32([[0, 5, 1, 6, 0, 7], [2, 8, 3, -1, -1, -1], [-1] * 6, [4, -1, 5, 4, 8, -1],
                  [1, 1, 1, 5, 5, -1], [3, -1, -1, -1, -1, -1]])
COUNTS = np.float64([9, 1, 0, 40, 3, 7, 7, 120, 2, 0, 0, 0])


def objective(kind, shared=0, **changes):
  groups = EVERY if kind == 'all' else TYPES
  return skipgram.Objective(**{**dict(window=WINDOW, negatives=NEGATIVES, kind=kind, groups=groups,
                                      shared=shared), **changes})


def noise(groups):
  return tuple(map(jnp.asarray, skipgram.noise(
      COUNTS if groups is TYPES else COUNTS + 1, groups.first, groups.size, .75)))


@functools.cache
def drawn(kind, shared, sets=1):
  of = objective(kind, shared)

  @jax.jit
  def draw(key, *tables):
    return of.draw_shared(key, (sets,), *tables) if shared else of.draw_own(key, WALKS, *tables)
  return np.asarray(draw(jax.random.key(3), *noise(of.groups)))


@functools.cache
def params(scale=1.):
  rng = np.random.default_rng(0)
  return {name: (scale * rng.normal(size=(ROWS, DIM))).astype(np.float32)
          for name in ('input', 'output')}


def type_of(node):
  return sum(node >= end for end in ENDS)


def by_pairs(kind, shared, tables, walks, negatives):
  """Dense gradients, terms, loss and pairs: one pair after the other, in float64 (equation 7)."""
  x, y = (np.float64(tables[name]) for name in ('input', 'output'))
  gradients, terms = {'input': 0 * x, 'output': 0 * y}, {name: np.zeros(ROWS) for name in tables}
  sigmoid = lambda value: 1 / (1 + np.exp(-value))
  loss = pairs = 0.
  for row, walk in enumerate(walks):
    for i, v in enumerate(walk):
      slot = 0
      for j in range(i - WINDOW, i + WINDOW + 1):
        if j == i:
          continue
        c = walk[j] if 0 <= j < len(walk) else -1
        if v >= 0 and c >= 0:
          some = [(c, 1., 1.)]
          if shared:
            of = {'all': 0, 'context': type_of(c), 'centre': type_of(v)}[kind]
            own = negatives[row * len(negatives) // len(walks)][of]  # Of this walk's set.
            some += [(u, 0., NEGATIVES / len(own)) for u in own]
          else:
            some += [(u, 0., 1.) for u in negatives[row, i, slot]
                     if kind != 'all' or u != c]
          for u, right, weight in some:
            chance = sigmoid(y[u] @ x[v])
            loss -= weight * np.log(chance if right else 1 - chance)
            gradients['output'][u] += weight * (chance - right) * x[v]
            gradients['input'][v] += weight * (chance - right) * y[u]
            terms['output'][u] += weight
          terms['input'][v] += 1 + NEGATIVES  # Also where a negative is the context.
          pairs += 1
        slot += 1
  return gradients, terms, loss, pairs


def summed(rows):
  gradients, terms = np.zeros((ROWS, DIM)), np.zeros(ROWS)
  np.add.at(gradients, np.asarray(rows.ids), np.asarray(rows.gradients))
  np.add.at(terms, np.asarray(rows.ids), np.asarray(rows.terms))
  return gradients, terms


@pytest.mark.parametrize('shared, sets', [(0, 1), (11, 1), (11, 3)])
@pytest.mark.parametrize('kind', skipgram.NEGATIVES)
def test_gradients(kind, shared, sets):
  of, negatives = objective(kind, shared), drawn(kind, shared, sets)
  if not shared and kind == 'all':
    assert (negatives == np.asarray(of._contexts(jnp.asarray(WALKS)))[..., None]).any()
  want, terms, loss, pairs = by_pairs(kind, shared, params(), WALKS, negatives)
  (*rows, found, number), dense = jax.jit(lambda *args: (
      of.gradients(*args), jax.grad(lambda *args: of.loss(*args)[0])(*args)))(
          params(), WALKS, negatives)
  assert number == pairs == 18 + 6 + 8 + 14
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  for name, one in zip(('input', 'output'), rows):
    got, count = summed(one)
    np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(got, dense[name] * pairs, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(count, terms[name], rtol=1e-5)
    # Nothing is learned by rows that do not occur.
    assert not got[count == 0].any() and (count == 0).any()


@pytest.mark.parametrize('length', [1, 2, 3])
def test_pieces_are_the_whole(length):
  """Every pair is in one piece, whatever the pieces."""
  of, negatives = objective('context', 11), drawn('context', 11)
  *want, loss, pairs = jax.jit(of.gradients)(params(), WALKS, negatives)
  parts = np.asarray(skipgram.pieces(jnp.asarray(WALKS), length, WINDOW))
  assert parts.shape == (-(-WALKS.shape[1] // length), len(WALKS), length + 2 * WINDOW)
  found = [jax.jit(of.gradients, static_argnums=3)(params(), part, negatives, WINDOW)
           for part in parts]
  np.testing.assert_allclose(sum(part[2] for part in found), loss, rtol=1e-5)
  assert sum(part[3] for part in found) == pairs
  for at in range(2):
    for got, expected in zip(map(sum, zip(*(summed(part[at]) for part in found))),
                             summed(want[at])):
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_pairs_of_few_bits():
  """Products of bfloat16, summed in float32."""
  of, negatives = objective('context', 11, dtype=np.dtype(jnp.bfloat16)), drawn('context', 11)
  want, _, loss, _ = by_pairs('context', 11, params(), WALKS, negatives)
  *rows, found, _ = jax.jit(of.gradients)(params(), WALKS, negatives)
  np.testing.assert_allclose(found, loss, rtol=.02)
  for name, one in zip(('input', 'output'), rows):
    assert one.gradients.dtype == np.float32
    np.testing.assert_allclose(summed(one)[0], want[name], atol=.02 * abs(want[name]).max())
    assert abs(summed(one)[0] - want[name]).max() > 1e-4  # It was bfloat16 indeed.


def test_a_pair_by_hand():
  """X_c . X_v = 0, so sigma is 1/2; X_u . X_v = ln 3, so sigma is 3/4."""
  of = skipgram.Objective(1, 1, 'all', skipgram.Groups((0,), (3,), (3,), (0,)), 0)
  log3 = np.log(3.)
  tables = {'input': np.float32([[1, 0], [0, 0], [5, 5]]),
            'output': np.float32([[7, 7], [0, 2], [log3, 0]])}
  *rows, loss, pairs = jax.jit(of.gradients)(
      tables, np.int32([[0, 1]]), np.full((1, 2, 2, 1), 2, np.int32))
  # The pair (0, 1), and (1, 0), all of whose products are 0.
  np.testing.assert_allclose(loss, np.log(2) + np.log(4) + 2 * np.log(2), rtol=1e-6)
  assert pairs == 2
  x, y = (np.zeros((3, 2)) for _ in range(2))
  x[0] = -.5 * np.array([0, 2]) + .75 * np.array([log3, 0])
  x[1] = -.5 * np.array([7, 7]) + .5 * np.array([log3, 0])
  y[1], y[2] = [-.5, 0], [.75, 0]
  for one, want, terms in zip(rows, (x, y), ([2, 2, 0], [1, 1, 2])):
    got, count = np.zeros((3, 2)), np.zeros(3)
    np.add.at(got, one.ids, one.gradients)
    np.add.at(count, one.ids, one.terms)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(count, terms)


# --- Negatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['context', 'centre'])
def test_every_negative_is_of_the_type_that_it_should_be(kind):
  """Of the predicted node (metapath2vec++), or of the centre (its released code)."""
  of = objective(kind)
  walks = np.random.default_rng(0).integers(0, 9, (200, 6)).astype(np.int32)
  negatives = np.asarray(jax.jit(of.draw_own)(jax.random.key(0), walks, *noise(TYPES)))
  contexts = np.asarray(of._contexts(jnp.asarray(walks)))
  assert negatives.shape == (200, 6, 2 * WINDOW, NEGATIVES)
  np.testing.assert_array_equal(contexts[0, 2], walks[0, [0, 1, 3, 4]])
  np.testing.assert_array_equal(contexts[0, 0], [-1, -1, *walks[0, 1:3]])
  like = contexts if kind == 'context' else np.broadcast_to(walks[..., None], contexts.shape)
  there = contexts >= 0
  kinds = np.searchsorted(ENDS, negatives[there], 'right')
  assert (kinds == np.searchsorted(ENDS, like[there], 'right')[:, None]).all()
  assert set(kinds.flat) == {0, 1}
  # Also those that are not used are nodes, so that no row outside the table is read.
  assert negatives.min() >= 0 and negatives.max() < ENDS[-1]


def test_shared_negatives_are_of_every_group_and_weigh_for_the_pairs_of_it():
  of = objective('context', 6)
  negatives = np.asarray(jax.jit(of.draw_shared, static_argnums=1)(
      jax.random.key(0), (50,), *noise(TYPES)))
  assert negatives.shape == (50, 2, 3) and negatives.dtype == np.int32
  assert (negatives[:, 0] < 5).all() and (negatives[:, 1] >= 5).all() and negatives.max() < 9
  assert len(np.unique(negatives, axis=0)) > 10
  # Contexts of 0 are of the second type alone, and those of 5 of the first.
  walk, some = np.int32([[0, 5]]), np.int32([[[1, 2, 3], [6, 7, 8]]])
  _, rows, _, _ = jax.jit(of.gradients)(params(), walk, some)
  gradients, terms = summed(rows)
  np.testing.assert_allclose(terms[[1, 2, 3, 6, 7, 8]], NEGATIVES / 3)
  for u, v in (1, 5), (6, 0):
    x, y = params()['input'][v], params()['output'][u]
    np.testing.assert_allclose(gradients[u], NEGATIVES / 3 * x / (1 + np.exp(-x @ y)), rtol=1e-5)


@pytest.mark.parametrize('power', [.75, 0., 1.])
def test_draws_are_by_counts(power):
  accept, alias = skipgram.noise(COUNTS, TYPES.first, TYPES.size, power)
  groups = np.tile(np.int32([0, 1]), 50_000)
  found = np.asarray(jax.jit(skipgram.draw, static_argnums=2)(
      jax.random.key(1), groups, TYPES, accept, alias))
  assert found.dtype == np.int32
  for group, (first, size) in enumerate(zip(TYPES.first, TYPES.size)):
    seen = np.bincount(found[groups == group], minlength=ROWS)
    assert seen.sum() == seen[first:first + size].sum() == 50_000
    counts = COUNTS[first:first + size]
    # Also with a power of 0, what never occurs is never drawn.
    share = np.where(counts > 0, counts ** power, 0)
    there = share > 0
    assert not seen[first:first + size][~there].any()
    expected = share[there] / share.sum() * 50_000
    assert scipy.stats.chisquare(seen[first:first + size][there], expected).pvalue > 1e-4


def test_groups_of_nodes():
  ids = jnp.arange(12)
  assert TYPES.of(ids).tolist() == [0] * 5 + [1] * 4 + [-1] * 3
  assert EVERY.of(ids).tolist() == [0] * 12
  assert skipgram.Groups((0,), (12,), (12,), (0,)).of(ids).tolist() == [0] * 12


# --- Rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('cap', [0., 4.])
def test_descend(cap):
  """Rows that occur several times add up; one of more terms than the cap moves as if it had those.
  """
  rng = np.random.default_rng(0)
  table = rng.normal(size=(6, 3)).astype(np.float32)
  ids, terms = np.int32([2, 0, 2, 5, 2, 0]), np.float32([3, 1, 2, 4, 3, .5])
  gradients = rng.normal(size=(6, 3)).astype(np.float32)
  found, scratch = jax.jit(skipgram.descend, static_argnums=4)(
      table, np.zeros(6, np.float32), skipgram.Rows(ids, gradients, terms), np.float32(.1), cap)
  want = np.float64(table)
  share = {2: 4 / 8, 0: 1., 5: 1.} if cap else {2: 1., 0: 1., 5: 1.}
  for id, gradient in zip(ids, gradients):
    want[id] -= .1 * share[id] * gradient
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found[np.array([1, 3, 4])], table[[1, 3, 4]])
  assert not scratch.any() and scratch.shape == (6,)


# --- Frequent tokens -----------------------------------------------------------------------------


def test_chances_to_be_kept_are_word2vec_s():
  counts = np.float64([60, 30, 9, 1, 0])
  # s = .01: (sqrt(60) + 1) / 60, (sqrt(30) + 1) / 30, (3 + 1) / 9, and 1 from a share of s on.
  want = [.145766, .215907, 4 / 9, 1, 1]
  found = skipgram.kept(counts, .01)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, want, rtol=1e-5)
  # Where f = 2.618 s is the limit (sqrt(f / s) is the golden ratio).
  np.testing.assert_allclose(skipgram.kept(np.float64([26, 974]), .01)[0], 1)
  assert skipgram.kept(np.float64([27, 973]), .01)[0] < 1


def test_subsampling_drops_tokens_and_closes_ranks():
  chances = np.float32([.2, 1., .7, 0.])
  walks = np.tile(np.int32([0, 1, 2, 1, 0, 3, -1]), (20_000, 1))
  found = np.asarray(jax.jit(skipgram.subsample)(jax.random.key(0), walks, chances))
  assert found.shape == walks.shape and found.dtype == np.int32
  there = found >= 0
  assert (there[:, 1:] <= there[:, :-1]).all()
  patterns = {}
  for bits in range(8):  # Which of 0, 2, 0 are kept; 1 always is, 3 never.
    first, second, third = bits & 1, bits >> 1 & 1, bits >> 2 & 1
    walk = [0] * first + [1] + [2] * second + [1] + [0] * third
    chance = np.prod([p if kept else 1 - p for kept, p in
                      ((first, .2), (second, .7), (third, .2))])
    patterns[tuple(walk + [-1] * (7 - len(walk)))] = chance
  kinds, seen = np.unique(found, axis=0, return_counts=True)
  assert {tuple(kind) for kind in kinds.tolist()} == set(patterns)
  expected = np.array([patterns[tuple(kind)] for kind in kinds.tolist()]) * len(found)
  assert scipy.stats.chisquare(seen, expected).pvalue > 1e-4


def test_subsampling_of_all_but_nothing():
  everything = np.ones(9, np.float32)
  walks = WALKS[[0, 1, 2]]
  np.testing.assert_array_equal(
      skipgram.subsample(jax.random.key(0), walks, everything), walks)
  assert (np.asarray(skipgram.subsample(jax.random.key(0), walks, 0 * everything)) == -1).all()
