import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from core.config import UserError
from translation import search

EOS, VOCAB, ROOM = 1, 4, 5
NODES = sum(VOCAB ** depth for depth in range(ROOM))


def tables(items, seed=0, scale=1.5):
  """Logits and attention (over a source of 3) after every prefix, in the order of `node`."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(scale=scale, size=(items, NODES, VOCAB)).astype(np.float32)
  attention = rng.dirichlet(np.ones(3), size=(items, NODES)).astype(np.float32)
  return logits, attention


def node(prefix):
  """Prefixes are numbered as the nodes of a tree are, level after level."""
  return functools.reduce(lambda number, token: number * VOCAB + token + 1, prefix, 0)


def decoder(logits, attention, beams):
  """A step whose logits depend on everything drawn before, which its state remembers."""
  def step(tokens, state):
    at = state['at']
    number = jnp.where(at == 0, 0, state['numbers'][:, 0] * VOCAB + tokens + 1)
    state = {'at': at + 1, 'numbers': number[:, None], 'item': state['item']}
    return logits[state['item'], number], state, attention[state['item'], number]

  rows = len(logits) * beams
  state = {'at': jnp.int32(0), 'numbers': jnp.zeros((rows, 1), jnp.int32),
           'item': jnp.repeat(jnp.arange(len(logits)), beams)}
  return step, state


@functools.partial(jax.jit, static_argnames=('beams', 'alpha', 'coverage'))
def compiled(logits, attention, limits, mask, beams, alpha, coverage):
  step, state = decoder(logits, attention, beams)
  return search.beam_search(step, state, batch=len(logits), beams=beams, limits=limits, room=ROOM,
                            alpha=alpha, coverage=coverage, eos=EOS, source_mask=mask)


def run(logits, attention, limits, mask=None, *, beams=3, alpha=.6, coverage=0.):
  limits = np.asarray(limits, np.int32)
  found = compiled(logits, attention, limits, mask, beams, alpha, coverage)
  return jax.tree.map(np.asarray, found)


def log_softmax(logits):
  logits = logits.astype(np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Oracle:
  """One item in float64, a hypothesis at a time."""

  def __init__(self, logits, attention, limit, mask=(True,) * 3, alpha=.6, coverage=0.):
    self.log_probs, self.attention = log_softmax(logits), attention.astype(np.float64)
    self.limit, self.mask, self.alpha, self.coverage = limit, np.asarray(mask), alpha, coverage

  def log_prob(self, tokens):
    return sum(self.log_probs[node(tokens[:i]), token] for i, token in enumerate(tokens))

  def score(self, tokens):
    score = self.log_prob(tokens) / ((5 + len(tokens)) / 6) ** self.alpha
    if self.coverage:
      attended = sum(self.attention[node(tokens[:i])] for i in range(len(tokens)))
      score += self.coverage * np.log(np.minimum(attended, 1))[self.mask].sum()
    return score

  def ranked(self, hypotheses):
    return sorted(hypotheses, key=self.score, reverse=True)

  def exhaustive(self):
    """All that there is, the best first."""
    others = [token for token in range(VOCAB) if token != EOS]
    return self.ranked([(*body, EOS) for length in range(self.limit)
                        for body in itertools.product(others, repeat=length)])

  def beam_search(self, beams):
    """Never stops early."""
    live, ended = [()], []
    for _ in range(self.limit):
      more = sorted(((*prefix, token) for prefix in live for token in range(VOCAB)),
                    key=self.log_prob, reverse=True)
      ended = self.ranked(ended + [x for x in more[:beams] if x[-1] == EOS])[:beams]
      live = [x for x in more if x[-1] != EOS][:beams]
    return ended or self.ranked(live)


def agrees(found, oracle, want, item):
  """The hypotheses of an item are `want`, with their scores, and there is nothing else."""
  for beam in range(found.tokens.shape[1]):
    length = found.lengths[item, beam]
    if beam >= len(want):
      assert length == 0 and found.scores[item, beam] == found.log_probs[item, beam] == -np.inf
    else:
      assert tuple(found.tokens[item, beam, :length]) == want[beam]
      for got, exact in ((found.scores, oracle.score), (found.log_probs, oracle.log_prob)):
        np.testing.assert_allclose(got[item, beam], exact(want[beam]), rtol=2e-5)
    assert not found.tokens[item, beam, length:].any()


def check(seed, limits, beams, expected, mask, scale=1.5, **settings):
  logits, attention = tables(len(limits), seed, scale)
  found = run(logits, attention, limits, mask, beams=beams, **settings)
  for item, limit in enumerate(limits):
    oracle = Oracle(logits[item], attention[item], limit, mask[item], **settings)
    agrees(found, oracle, expected(oracle), item)


def test_the_length_penalty():
  # To three decimals for the alpha of Vaswani et al. 2017.
  for length, want in ((1, 1), (10, 1.733), (20, 2.354), (30, 2.881), (50, 3.779), (100, 5.570)):
    assert float(search.length_penalty(length, .6)) == pytest.approx(want, abs=6e-4)
  assert float(search.length_penalty(7, 0.)) == 1 and float(search.length_penalty(7, 1.)) == 2


@pytest.mark.parametrize('seed, alpha, coverage', [(0, .6, 0.), (2, 1.5, .7)])
def test_a_beam_as_wide_as_the_tree_finds_everything(seed, alpha, coverage):
  mask = np.array([[True, True, True], [True, True, False], [True, False, False]])
  check(seed, [4, 3, 1], VOCAB ** 4, Oracle.exhaustive, mask, alpha=alpha, coverage=coverage)


@pytest.mark.parametrize('beams, alpha, coverage', [(2, 0., 0.), (4, 1., 0.), (3, .6, .4)])
def test_narrow_beams_are_those_of_a_search_that_never_stops_early(beams, alpha, coverage):
  limits = [5, 4, 5, 3, 5, 1, 2, 5] * 3
  mask = np.random.default_rng(5).random((len(limits), 3)) < .7
  check(beams, limits, beams, lambda oracle: oracle.beam_search(beams), mask, scale=2.5,
        alpha=alpha, coverage=coverage)


def test_one_beam_is_greedy():
  logits, attention = tables(12, seed=3)
  limits = np.full(12, 5)
  found = run(logits, attention, limits, beams=1, alpha=0.)
  for item in range(12):
    want = []
    while len(want) < 5 and EOS not in want:
      want.append(int(logits[item, node(want)].argmax()))
    assert list(found.tokens[item, 0]) == want + [0] * (5 - len(want))
  assert len(np.unique(found.lengths)) > 2
  drawn = draws(logits, attention, limits, temperature=0.)
  np.testing.assert_array_equal(found.tokens, drawn.tokens)
  np.testing.assert_array_equal(found.lengths, drawn.lengths)
  np.testing.assert_allclose(found.scores, drawn.scores, rtol=1e-5)


def chances(after):
  """Logits of one item with these chances after some prefixes, and EOS for sure after others."""
  chance = np.broadcast_to([0., 1., 0., 0.], (1, NODES, VOCAB)).copy()
  for prefix, tokens in after.items():
    chance[0, node(prefix)] = tokens
  with np.errstate(divide='ignore'):
    return np.log(chance, dtype=np.float32)


def test_the_length_penalty_lets_a_longer_one_win():
  logits = chances({(): (0, .4, .6, 0), (2,): (0, .4, .6, 0)})
  flat = np.full((1, NODES, 3), 1 / 3, np.float32)
  for alpha, tokens, score in ((0., [1, 0, 0], math.log(.4)),
                               (1., [2, 2, 1], math.log(.36) / (8 / 6))):
    found = run(logits, flat, [5], alpha=alpha)
    assert list(found.tokens[0, 0, :3]) == tokens
    assert found.scores[0, 0] == pytest.approx(score, rel=1e-5)


def test_the_coverage_penalty_by_hand():
  logits = chances({(): (0, .2, .5, .3)})
  attention = np.zeros((1, NODES, 3), np.float32)
  attention[0, node(())] = .8, .2, 0
  attention[0, node((2,))] = .8, .2, 0  # In all 1.6 and .4: the second is not covered.
  attention[0, node((3,))] = .2, .8, 0  # In all 1 and 1.
  found = run(logits, attention, [5], np.array([[True, True, False]]), alpha=0., coverage=1.)
  want = [((3, 1), math.log(.3)), ((2, 1), math.log(.5 * .4)), ((1,), math.log(.2 * .8 * .2))]
  for beam, (tokens, score) in enumerate(want):
    assert tuple(found.tokens[0, beam, :len(tokens)]) == tokens
    assert found.scores[0, beam] == pytest.approx(score, rel=1e-5)
  free = run(logits, attention, [5], alpha=0.)
  np.testing.assert_array_equal(free.tokens[0, :, 0], [2, 3, 1])
  # A source position that nothing attends to leaves a hypothesis possible.
  blind = run(logits, attention, [5], np.ones((1, 3), bool), alpha=0., coverage=1.)
  assert np.isfinite(blind.scores).all() and blind.lengths.all()


def test_an_item_is_found_alike_in_any_batch():
  logits, attention = tables(8, seed=4, scale=3.)
  limits = np.array([5, 2, 5, 3, 1, 5, 4, 5])
  whole = run(logits, attention, limits)
  for some in (np.random.default_rng(0).permutation(8), [6, 0, 1], [1, 4, 3]):
    part = run(logits[some], attention[some], limits[some])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[some], y), whole, part)


def test_without_eos_the_live_ones_are_found():
  logits, attention = tables(3, seed=6)
  logits[:2, :, EOS] = -np.inf
  found = run(logits, attention, [3, 0, 5])
  for item, limit in ((0, 3), (2, 5)):
    oracle = Oracle(logits[item], attention[item], limit)
    agrees(found, oracle, oracle.beam_search(3), item)
  assert (found.lengths[0] == 3).all() and not (found.tokens[0] == EOS).any()
  assert not found.tokens[1].any() and not found.lengths[1].any()
  # The coverage of an item is that of its own tokens, while another goes on.
  settings = {'alpha': .6, 'coverage': .4}
  found = run(logits, attention, [3, 0, 5], np.ones((3, 3), bool), **settings)
  oracle = Oracle(logits[0], attention[0], 3, **settings)
  agrees(found, oracle, oracle.beam_search(3), 0)


def test_the_search_stops_when_nothing_can_be_beaten():
  # One token distribution an item. The first ends three hypotheses in two steps: .9, .05 * .9 and
  # again; the worst scores log(.045) / (7 / 6) ** .6 = -2.83. What lives then can at best reach
  # 2 * log(.05) / (17 / 6) ** .6 = -3.21. The second item hardly ends at all.
  chance = np.array([[1e-9, .9, .05, .05], [.3, 1e-9, .3, .4]], np.float32)

  @jax.jit
  def poisoned(steps):
    """What is found when logits are NaN after so many steps of each item."""
    def step(tokens, state):
      logits = jnp.where(state < steps[:, None], jnp.log(chance), jnp.nan)
      return jnp.repeat(logits, 3, axis=0), state + 1, jnp.zeros((len(tokens), 1))
    return search.beam_search(step, jnp.int32(0), batch=2, beams=3, limits=jnp.full(2, 12), room=12)

  want = poisoned(np.array([12, 12]))
  assert list(np.asarray(want.lengths[0])) == [1, 2, 2]
  assert (np.asarray(want.lengths[1]) == 12).all() and np.isfinite(want.scores).all()
  # The first item is done after two steps, and stays what it is while the second goes on.
  jax.tree.map(np.testing.assert_array_equal, poisoned(np.array([2, 12])), want)
  assert (np.asarray(poisoned(np.array([1, 12])).lengths[0]) != want.lengths[0]).any()


@pytest.mark.parametrize('width, k', [(64, 3), (67, 3), (67, 1)])
def test_the_largest_of_a_row_are_found_in_its_blocks(width, k):
  rng = np.random.default_rng(width)
  x = rng.integers(0, 6, (400, width)).astype(np.float32)
  x[rng.random(x.shape) < .2] = -np.inf
  x[:50, 3:] = -np.inf
  x[-50:] = rng.normal(size=(50, width))
  values, at = search._top_k(x, k, block=8)
  want = np.argsort(-x, axis=-1, kind='stable')[:, :k]
  np.testing.assert_array_equal(at, want)
  np.testing.assert_array_equal(values, np.take_along_axis(x, want, 1))


@functools.partial(jax.jit, static_argnames='top_k')
def compiled_draws(logits, attention, limits, items, temperature, top_k):
  step, state = decoder(logits, attention, 1)
  return search.sample(step, state, rng=jax.random.key(7), batch=len(logits), limits=limits,
                       room=ROOM, temperature=temperature, top_k=top_k, eos=EOS, items=items)


def draws(logits, attention, limits, items=None, temperature=1., top_k=0):
  items = np.arange(len(logits)) if items is None else items
  found = compiled_draws(logits, attention, limits, items, temperature, top_k)
  return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize('temperature, top_k', [(1., 0), (.6, 3)])
def test_draws_follow_the_model(temperature, top_k):
  count, limit = 4000, 3
  logits, attention = tables(1, seed=8)
  same = lambda x: np.broadcast_to(x, (count, *x.shape[1:]))
  found = draws(same(logits), same(attention), np.full(count, limit), temperature=temperature,
                top_k=top_k)
  changed = logits[0] / temperature
  if top_k:
    changed = np.where(changed >= np.sort(changed, -1)[:, -top_k, None], changed, -np.inf)
  chance, oracle = Oracle(changed, attention[0], limit), Oracle(logits[0], attention[0], limit)
  others = [token for token in range(VOCAB) if token != EOS]
  possible = chance.exhaustive() + list(itertools.product(others, repeat=limit))
  expected = {x: math.exp(chance.log_prob(x)) for x in possible if chance.log_prob(x) > -np.inf}
  assert sum(expected.values()) == pytest.approx(1)
  seen = dict.fromkeys(expected, 0)
  for tokens, length, score in zip(found.tokens[:, 0], found.lengths[:, 0], found.scores[:, 0]):
    drawn = tuple(tokens[:length].tolist())
    assert not tokens[length:].any()
    assert score == pytest.approx(oracle.log_prob(drawn), rel=1e-4)
    seen[drawn] += 1
  common = [x for x in expected if expected[x] * count >= 5]
  rare = [x for x in expected if x not in common]
  grouped = lambda counts: np.array([*map(counts.get, common), sum(map(counts.get, rare))])
  some = grouped(expected) > 0
  p = scipy.stats.chisquare(grouped(seen)[some], grouped(expected)[some] * count).pvalue
  assert p > .01


def test_a_draw_does_not_depend_on_the_batch():
  logits, attention = tables(12, seed=9)
  limits = np.array([5, 0, 2, 5] * 3)
  whole = draws(logits, attention, limits)
  order = np.random.default_rng(1).permutation(12)
  part_logits, part_limits, numbers = logits[order], limits[order], order.copy()
  part_logits[7:] *= 2
  part_limits[7:] = 3
  numbers[7:] += 50
  part = draws(part_logits, attention[order], part_limits, numbers)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[order[:7]], y[:7]), whole, part)
  assert (whole.lengths[:, 0] <= limits).all()
  # Alike but for their numbers, items draw different sentences.
  same = draws(logits[:1].repeat(12, 0), attention, np.full(12, 5))
  assert len(np.unique(same.tokens, axis=0)) > 4


def test_one_compilation_serves_all_limits():
  logits, attention = tables(3, seed=10)
  run(logits, attention, [5, 5, 5])
  before = compiled._cache_size()
  for limits in ([1, 3, 3], [0, 2, 5]):
    run(logits, attention, limits)
  assert compiled._cache_size() == before


def test_settings_that_cannot_be():
  step, state = decoder(*tables(1), 1)
  make = functools.partial(search.beam_search, step, state, batch=1, limits=np.array([5]), room=5)
  for wrong in ({'beams': 0}, {'beams': 1, 'alpha': -.1}, {'beams': 1, 'coverage': -1.}):
    with pytest.raises(UserError, match='at least'):
      make(**wrong)
  with pytest.raises(ValueError, match='source_mask'):
    make(beams=1, coverage=.2)
