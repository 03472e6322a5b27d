"""Walks: every step an edge, drawn by equation 3, on the device and on the host; and what is exact.
"""

import functools

import jax
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.config import UserError
from graph import metapath, network, tables, walks
from tests.graph import tiny

TRIPS = [  # (path, tokens, kept types)
    ('user-item-tag-item-user', 8, ()), ('user-item-tag-item-user', 5, ('user', 'tag')),
    ('item-tag', 2, ()), ('user-[follows]->user', 5, ()),
    ('user-[follows]-user', 5, ()), ('user<-[follows]-user-item-user', 6, ()), ('*', 6, ())]


@functools.cache
def trip(text, length, keep=(), weighted=False):
  return tiny.Trip(tiny.graph(weighted), text, length, keep)


def on_device(of, starts, seed=0):
  """Walks, compiled."""
  return np.asarray(compiled(of)(jax.random.key(seed), starts))


def compiled(of):
  return functools.partial(jax.jit(lambda arrays, key, starts: walks.sample(
      key, starts, arrays, of.firsts, of.route)), of.arrays)


def on_host(of, starts, seed=0):
  return walks.sample_host(np.random.default_rng(seed), starts, of.csrs, of.route)


def between(of, token):
  """float64 `[nodes, nodes]`: the chances from token to token + 1, over all steps between them."""
  begin, end = of.route.positions[token:token + 2]
  steps = [of.matrices[at % len(of.matrices)] for at in range(begin, end)]
  return functools.reduce(np.matmul, steps)


def check(of, found):
  """Dead ends, and a chi-square test of every node's transitions from every token; its freedom."""
  statistic, free = 0., 0
  assert found.dtype == np.int32 and found.shape[1] == of.length
  there = found >= 0
  assert (there[:, 1:] <= there[:, :-1]).all(), 'something after a dead end'
  for token in range(of.length - 1):
    chances = between(of, token)
    stops = np.maximum(1 - chances.sum(1), 0)  # A column for those that stop.
    chances = np.column_stack([chances, np.where(stops > 1e-9, stops, 0)])
    some = found[there[:, token], token:token + 2]
    seen = np.zeros(chances.shape)
    np.add.at(seen, (some[:, 0], some[:, 1]), 1)  # -1 is the last column.
    assert not seen[chances == 0].any(), 'a step that is no edge'
    expected = chances * seen.sum(1, keepdims=True)
    cells = expected >= 5
    rest = np.stack([np.where(cells, 0, x).sum(1) for x in (seen, expected)])
    for values, wanted in [(seen[cells], expected[cells]), rest[:, rest[1] >= 5]]:
      statistic += ((values - wanted) ** 2 / wanted).sum()
    free += (np.maximum(cells.sum(1) + (rest[1] >= 5) - 1, 0)).sum()
  assert not free or scipy.stats.chi2.sf(statistic, free) > 1e-4
  return free


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('text, length, keep', TRIPS)
def test_walks_follow_the_path(text, length, keep, weighted):
  of = trip(text, length, keep, weighted)
  starts = np.tile(of.starts, 20_000 // len(of.starts))
  for found in on_device(of, starts), on_host(of, starts):
    np.testing.assert_array_equal(found[:, 0], starts)
    assert check(of, found) > 3 * (of.length - 1)


@pytest.mark.parametrize('sample', [on_device, on_host])
@pytest.mark.parametrize('weighted', [False, True])
def test_dead_ends_end_walks(sample, weighted):
  """And no start is no walk."""
  of = trip('user-[follows]->user', 5, (), weighted)
  last = tiny.SIZES['user'] - 1  # Follows nobody.
  found = sample(of, np.int32([last, -1, 0] * 40))
  assert (found[0::3] == [last, -1, -1, -1, -1]).all() and (found[1::3] == -1).all()
  check(of, found[0::3])
  of = trip('item-tag', 2, (), weighted)
  items = of.graph.nodes_of('item')
  found = sample(of, np.arange(items.start, items.stop, dtype=np.int32))
  np.testing.assert_array_equal(found[:, 1] < 0, np.diff(of.csrs[0].ptr) == 0)
  assert (found[:, 1] < 0).any() and (found[:, 1] >= 0).any()


@pytest.mark.parametrize('weighted', [False, True])
def test_large_rows(weighted):
  """A node with 5,000 neighbours between those of few; in weight one of them is all but all."""
  targets = np.arange(5000)
  weights = np.where(targets == 4321, 1e5, 1. + targets % 3) if weighted else None
  table = tables.Table({'a': ['x', 'y', 'z'], 'b': [str(i) for i in targets]}, [tables.Edges(
      'ab', 'a', 'b', np.r_[0, np.ones(5000, int), 2], np.r_[7, targets, 9],
      None if weights is None else np.r_[2., weights, 1.])])
  of = tiny.Trip(network.build(table), 'a-b', 2)
  starts = np.tile(np.int32([0, 1, 2]), 40_000)
  for found in on_device(of, starts), on_host(of, starts):
    first, many, last = found[0::3, 1], found[1::3, 1], found[2::3, 1]
    assert (first == 3 + 7).all() and (last == 3 + 9).all()
    # In 20 bins of equal numbers; the heavy one is a bin of its own.
    chance = np.ones(5000) if weights is None else weights
    bins = np.where(targets == 4321, 20, targets // 250)
    expected = np.bincount(bins, chance) / chance.sum() * len(many)
    seen = np.bincount(bins[many - 3], minlength=21)
    some = expected >= 5
    assert scipy.stats.chisquare(seen[some], expected[some] * seen[some].sum() /
                                 expected[some].sum()).pvalue > 1e-4


def test_same_edges_are_drawn_as_often_as_they_are_there():
  table = tables.Table({'a': ['x'], 'b': ['0', '1']}, [
      tables.Edges('ab', 'a', 'b', np.zeros(4, int), np.int64([0, 1, 1, 1]))])
  of = tiny.Trip(network.build(table), 'a-b', 2)
  for found in (on_device(of, np.zeros(8000, np.int32)), on_host(of, np.zeros(8000, np.int32))):
    assert scipy.stats.binomtest(int((found[:, 1] == 2).sum()), 8000, .75).pvalue > 1e-4


@pytest.mark.parametrize('sample', [on_device, on_host])
def test_keep_drops_tokens_of_the_same_walks(sample):
  whole, kept = (trip('user-item-tag-item-user', *rest) for rest in
                 [(9, ()), (5, ('user', 'tag'))])
  starts = np.tile(whole.starts, 4)
  np.testing.assert_array_equal(sample(whole, starts)[:, ::2], sample(kept, starts))


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('text, length, keep', TRIPS)
def test_visits(text, length, keep, weighted):
  """Against powers of dense matrices, and against the mean of many walks."""
  of = trip(text, length, keep, weighted)
  starts = np.append(of.starts, of.starts[:2])
  want = here = np.bincount(starts, minlength=len(of.graph)).astype(np.float64)
  for token in range(length - 1):
    here = here @ between(of, token)
    want = want + here
  found = walks.visits(of.csrs, starts, of.route, len(of.graph))
  assert found.dtype == np.float64
  # Chances of weighted edges are counted in 2^-32.
  np.testing.assert_allclose(found, want, rtol=1e-6 if weighted else 1e-12)
  times = 400
  drawn = on_host(of, np.tile(starts, times))
  counts = np.stack([np.bincount(some[some >= 0], minlength=len(of.graph))
                     for some in drawn.reshape(times, -1)])
  error = counts.std(0) / np.sqrt(times)
  assert (abs(counts.mean(0) - want) <= 4.5 * error + 1e-9).all()


def test_walks_are_the_same_on_one_device_and_on_eight():
  of = trip('user-item-tag-item-user', 8, (), True)
  starts = np.tile(of.starts, 8)
  mesh = Mesh(np.array(jax.devices()[:8]), ('data',))
  placed = jax.device_put(starts, NamedSharding(mesh, PartitionSpec('data')))
  assert len(placed.sharding.device_set) == 8
  found = compiled(of)(jax.random.key(5), placed)
  np.testing.assert_array_equal(found, on_device(of, starts, 5))
  assert (np.asarray(found) != on_device(of, starts, 6)).any()


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('text', dict.fromkeys(trip[0] for trip in TRIPS))
def test_shapes_are_known_without_the_graph(text, weighted):
  of = trip(text, 2, (), weighted)
  specs = [walks.device_spec(step, of.links, tiny.SIZES) for step in of.path.steps]
  shapes = lambda trees: [{name: (x.shape, x.dtype) for name, x in one.items()} for one in trees]
  assert shapes(specs) == shapes(of.arrays)
  assert ('cum' in specs[0]) == weighted and of.arrays[0]['ptr'].dtype == np.int32
  # So many halvings find any edge of the largest row there could be.
  assert all(2 ** deepest > len(one.col) if weighted else deepest == 0
             for deepest, one in zip(of.route.deepest, of.csrs))


def test_more_edges_than_a_device_counts():
  col = np.broadcast_to(np.int32(0), 2 ** 31)
  with pytest.raises(UserError, match="2,147,483,648 edges, .* --config.data.sampler='host'"):
    walks.device_arrays(walks.Csr(0, np.int64([0, len(col)]), col, None))


def test_undirected_steps_go_both_ways():
  graph = tiny.graph()
  relation = next(r for r in graph.relations if r.name == 'follows')
  both = walks.csr(graph, metapath.Step(graph.relations.index(relation), '-'))
  degree = np.diff(relation.ptr) + np.bincount(relation.col, minlength=tiny.SIZES['user'])
  np.testing.assert_array_equal(np.diff(both.ptr), degree)
  every = walks.csr(graph, metapath.Step(-1, '-'))
  assert len(every.col) == 2 * sum(len(r.col) for r in graph.relations)
