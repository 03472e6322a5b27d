"""Losses over the catalogue against float64, their memory, and what negatives are drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from core import partition
from recsys import encoder, losses

ROWS, ITEMS, WIDTH, POSITIONS = 40, 37, 8, 21
MANY = 2 ** 15


def setup(rows=ROWS, positions=POSITIONS, scale=1., seed=0, bias=True):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)
  params = {encoder.TABLE: normal(rows, WIDTH)} | ({encoder.BIAS: normal(rows)} if bias else {})
  return params, normal(positions, WIDTH), rng.integers(1, ITEMS + 1, positions).astype(np.int32)


def exact_scores(params, states):
  table, states = np.float64(params[encoder.TABLE]), np.float64(states)
  return states @ table.T + np.float64(params.get(encoder.BIAS, 0))


def label_scores(scores, labels):
  return scores[np.arange(len(labels)), labels]


# --- The full softmax ----------------------------------------------------------------------------


def weighted(mebibytes):
  """A sum of losses that weighs each otherwise, and its gradients."""
  def total(params, states, labels):
    each = losses.full_softmax(params, states, labels, mebibytes)
    return (each * jnp.arange(1., len(labels) + 1)).sum(), each
  return jax.grad(total, (0, 1), has_aux=True)


def exact_gradients(params, states, labels):
  """Losses, and of their weighted sum the gradients for the parameters and the states."""
  scores = exact_scores(params, states)
  slope = scipy.special.softmax(scores, axis=1)
  slope[np.arange(len(labels)), labels] -= 1
  slope *= np.arange(1, len(labels) + 1)[:, None]
  return (scipy.special.logsumexp(scores, axis=1) - label_scores(scores, labels),
          {encoder.TABLE: slope.T @ np.float64(states), encoder.BIAS: slope.sum(0)},
          slope @ np.float64(params[encoder.TABLE]))


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


# A table of MANY rows takes 1 MiB for every 8 positions.
@pytest.mark.parametrize('positions', [POSITIONS, 8])
def test_full_softmax_and_its_gradients_are_those_of_float64(positions):
  params, states, labels = setup(rows=MANY, positions=positions)
  (got_params, got_states), each = jax.jit(weighted(1))(params, states, labels)
  want, want_params, want_states = exact_gradients(params, states, labels)
  np.testing.assert_allclose(each, want, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, got_params, want_params)
  close(got_states, want_states)


def test_a_table_without_a_bias_has_plain_products():
  params, states, labels = setup(bias=False)
  scores = exact_scores(params, states)
  np.testing.assert_allclose(
      losses.full_softmax(params, states, labels, 1),
      scipy.special.logsumexp(scores, axis=1) - label_scores(scores, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rows, count', [(21, 30), (21, 5), (20, 5)])
def test_what_is_computed_in_chunks_is_the_same_and_in_order(rows, count):
  sizes = []

  def some(x, y):
    sizes.append(len(x))
    return {'sum': x.sum(1) + y, 'twice': 2 * x}
  x, y = jnp.arange(3. * rows).reshape(rows, 3), jnp.arange(rows)
  made = losses.in_chunks(some, count, x, y)
  np.testing.assert_array_equal(made['sum'], x.sum(1) + y)
  np.testing.assert_array_equal(made['twice'], 2 * x)
  assert sizes == [min(rows, count)]


def test_memory_says_how_many_fit():
  # 2^28 bytes over 4 million of a position.
  assert losses.rows_within(256, 1_000_000) == 67
  assert losses.rows_within(1, 10_000_000) == 1
  assert losses.rows_within(256, 26_748) == 2508


def test_memory_is_bounded_whatever_the_catalogue():
  """A million items and 5,120 positions: 20 GB of scores at once, twice that in training."""
  shape = jax.ShapeDtypeStruct
  params = {encoder.TABLE: shape((1_000_000, 8), np.float32),
            encoder.BIAS: shape((1_000_000,), np.float32)}
  inputs = params, shape((5120, 8), np.float32), shape((5120,), np.int32)

  def temporary(mebibytes):
    loss = lambda params, states, labels: losses.full_softmax(
        params, states, labels, mebibytes).mean()
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2 ** 20
  used = temporary(256)
  assert 200 < used < 4 * 256, used
  assert temporary(2 ** 20) > 19_000


# --- Negatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize('proposal', losses.PROPOSALS)
def test_negatives_are_drawn_with_the_chance_that_is_said(proposal):
  ids = np.arange(1, ITEMS + 1)
  chance = np.exp(np.float64(losses.log_chance(ids, ITEMS, proposal)))
  np.testing.assert_allclose(chance.sum(), 1, rtol=1e-5)
  want = np.full(ITEMS, 1 / ITEMS) if proposal == 'uniform' else (
      np.log((ids + 1) / ids) / np.log(ITEMS + 1))
  np.testing.assert_allclose(chance, want, rtol=1e-5)
  drawn = np.asarray(losses.draw_negatives(jax.random.key(0), (100, 400), ITEMS, proposal))
  assert drawn.shape == (100, 400) and drawn.dtype == np.int32
  counts = np.bincount(drawn.ravel(), minlength=ITEMS + 1)
  assert counts[0] == 0 and len(counts) == ITEMS + 1
  assert scipy.stats.chisquare(counts[1:], 40_000 * want).pvalue > 1e-3


@pytest.mark.parametrize('proposal', losses.PROPOSALS)
def test_every_item_of_a_large_catalogue_can_be_drawn(proposal):
  """One float32 of 23 bits would leave out half of these: there are fewer repeats than that."""
  items, count = 16_000_000, 200_000
  drawn = np.asarray(losses.draw_negatives(jax.random.key(0), (count,), items, proposal))
  assert drawn.min() >= 1 and drawn.max() <= items
  rare = drawn[drawn > items // 2]
  share = .5 if proposal == 'uniform' else np.log(2) / np.log(items)
  assert abs(len(rare) - share * count) < 5 * np.sqrt(share * (1 - share) * count)
  repeats = len(rare) + items / 2 * np.expm1(-len(rare) / (items / 2))
  assert abs(len(rare) - len(np.unique(rare)) - repeats) < 5 * np.sqrt(repeats + 1)


# --- Losses of drawn negatives -------------------------------------------------------------------


@pytest.mark.parametrize('shared', [True, False])
def test_sampled_softmax_is_that_of_float64(shared):
  params, states, labels = setup()
  rng = np.random.default_rng(1)
  negatives = rng.integers(1, ITEMS + 1, (12,) if shared else (POSITIONS, 12)).astype(np.int32)
  chances = tuple(losses.log_chance(ids, ITEMS, 'log_uniform') for ids in (labels, negatives))
  got = losses.sampled_softmax(params, states, labels, negatives, chances)
  scores, each = exact_scores(params, states), np.broadcast_to(negatives, (POSITIONS, 12))
  assert (each == labels[:, None]).any(), 'no negative is a label'
  log_q = np.log(np.log1p(1 / np.arange(1, ITEMS + 1)) / np.log(ITEMS + 1))
  for i, label in enumerate(labels):
    others = [j for j in each[i] if j != label]
    corrected = [scores[i, j] - log_q[j - 1] for j in [label, *others]]
    np.testing.assert_allclose(got[i], scipy.special.logsumexp(corrected) - corrected[0],
                               rtol=1e-4, atol=1e-5)


def test_sampled_softmax_with_every_item_is_the_full_one_over_items():
  params, states, labels = setup()
  everything = jnp.arange(1, ITEMS + 1)
  chances = tuple(losses.log_chance(ids, ITEMS, 'uniform') for ids in (labels, everything))
  scores = exact_scores(params, states)[:, 1:ITEMS + 1]
  np.testing.assert_allclose(
      losses.sampled_softmax(params, states, labels, everything, chances),
      scipy.special.logsumexp(scores, axis=1) - label_scores(scores, labels - 1), rtol=1e-5,
      atol=1e-5)


def test_the_correction_leaves_the_right_scores_where_they_are():
  """Where the scores are the logarithms of how often items follow, the loss pulls at none of them,
  though popular items are drawn more often; uncorrected, it pulls those down. (Not quite none:
  negatives that are the label are left out.)"""
  often = np.random.default_rng(0).dirichlet(np.ones(ITEMS))
  params = {encoder.TABLE: np.zeros((ROWS, WIDTH), np.float32),
            encoder.BIAS: np.append(0, np.append(np.log(often), [0, 0])).astype(np.float32)}
  labels, states = jnp.arange(1, ITEMS + 1), jnp.zeros((ITEMS, WIDTH))

  def pull(params, rng, corrected):
    negatives = losses.draw_negatives(rng, (4,), ITEMS, 'log_uniform')
    chances = tuple(corrected * losses.log_chance(ids, ITEMS, 'log_uniform')
                    for ids in (labels, negatives))
    return (losses.sampled_softmax(params, states, labels, negatives, chances) * often).sum()
  mean = jax.jit(jax.vmap(jax.grad(pull), (None, 0, None)))
  rngs = jax.random.split(jax.random.key(0), 2000)
  right, wrong = (np.abs(mean(params, rngs, corrected)[encoder.BIAS].mean(0)).sum()
                  for corrected in (1., 0.))
  assert right < .05 and wrong > .3, (right, wrong)


# --- Binary cross entropy ------------------------------------------------------------------------


def exact_gbce(scores, labels, negatives, items, calibration):
  alpha = negatives.shape[1] / (items - 1)
  beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
  positive = label_scores(scores, labels)
  # log sigmoid(x) = -log(1 + exp(-x)).
  logs = -beta * np.logaddexp(0, -positive)
  logs -= np.logaddexp(0, np.take_along_axis(scores, negatives, 1)).sum(1)
  return -logs / (negatives.shape[1] + 1)


@pytest.mark.parametrize('calibration', [0., .75, 1.])
@pytest.mark.parametrize('shape', [(12,), (POSITIONS, 12), (POSITIONS, 1)])
def test_gbce_is_that_of_float64_also_of_large_scores(shape, calibration):
  params, states, labels = setup(scale=6.)
  scores = exact_scores(params, states)
  assert np.abs(scores).max() > 200
  negatives = np.random.default_rng(1).integers(1, ITEMS + 1, shape).astype(np.int32)
  loss = lambda states: losses.gbce(params, states, labels, negatives, ITEMS, calibration)
  each = np.broadcast_to(negatives, (POSITIONS, shape[-1]))
  np.testing.assert_allclose(loss(states), exact_gbce(scores, labels, each, ITEMS, calibration),
                             rtol=1e-4, atol=1e-5)
  if shape == (12,) and calibration == .75:
    assert np.isfinite(jax.jit(jax.grad(lambda states: loss(states).sum()))(states)).all()


def test_gbce_at_its_ends():
  """t=0 is the plain binary cross entropy, and with one negative SASRec's; t=1 weighs the label by
  the share of items that are drawn."""
  params, states, labels = setup()
  scores = exact_scores(params, states)
  for count in (1, 9):
    negatives = np.random.default_rng(count).integers(1, ITEMS + 1, (POSITIONS, count))
    plain, full = (losses.gbce(params, states, labels, negatives, ITEMS, t) for t in (0., 1.))
    positive = -np.log(scipy.special.expit(label_scores(scores, labels)))
    negative = -np.log(scipy.special.expit(-np.take_along_axis(scores, negatives, 1))).sum(1)
    np.testing.assert_allclose(plain, (positive + negative) / (count + 1), rtol=1e-5)
    np.testing.assert_allclose(full, (count / (ITEMS - 1) * positive + negative) / (count + 1),
                               rtol=1e-5)


# --- On a mesh -----------------------------------------------------------------------------------


def test_a_table_that_is_split_gives_what_one_device_does():
  """Eight devices: positions on two, rows of the table on four; in two chunks and without ever
  bringing the table together."""
  params, states, labels = setup(rows=MANY, positions=16)
  mesh = jax.make_mesh((2, 1, 4), partition.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
  layout = partition.Layout(mesh, partition.RULES['tp'])
  place = lambda names, x: jax.device_put(x, layout.sharding(names, x.shape))
  split = {encoder.TABLE: place(('vocab', 'embed'), params[encoder.TABLE]),
           encoder.BIAS: place(('vocab',), params[encoder.BIAS])}
  assert split[encoder.TABLE].sharding.shard_shape((MANY, WIDTH)) == (MANY // 4, WIDTH)
  inputs = split, place(('batch', None), states), place(('batch',), labels)
  with partition.use(layout):
    compiled = jax.jit(weighted(1)).lower(*inputs).compile()
  (got_params, got_states), each = compiled(*inputs)
  want, want_params, want_states = exact_gradients(params, states, labels)
  np.testing.assert_allclose(each, want, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, got_params, want_params)
  close(got_states, want_states)
  assert got_params[encoder.TABLE].sharding.shard_shape((MANY, WIDTH)) == (MANY // 4, WIDTH)
  assert f'[{MANY}' not in compiled.as_text()
