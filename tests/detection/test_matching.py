import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import optimize

from core import partition
from detection import matching

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize('implementation', ['lockstep', 'scipy'])


@functools.cache
def compiled(implementation):
  return jax.jit(lambda cost, objects: matching.assign(cost, objects, implementation))


def solve(implementation, cost, objects):
  """The matching, after a check that it is one: real slots have distinct queries, others -1."""
  objects = np.asarray(objects, np.int32)
  found = np.asarray(compiled(implementation)(np.asarray(cost, np.float32), objects))
  layers, batch, queries, slots = cost.shape
  assert found.shape == (layers, batch, slots) and found.dtype == np.int32
  real = np.arange(slots) < objects[:, None]
  assert (found[:, ~real] == -1).all()
  assert ((found[:, real] >= 0) & (found[:, real] < queries)).all()
  for row, mask in zip(found.reshape(-1, slots), np.tile(real, (layers, 1))):
    assert len(set(row[mask])) == mask.sum(), row
  return found


def totals(cost, objects, found):
  """Sums of the matched costs in float64: `[layers, batch]`."""
  real = np.arange(cost.shape[-1]) < np.asarray(objects)[:, None]
  hit = np.take_along_axis(cost.astype(float), np.maximum(found, 0)[:, :, None], 2)[:, :, 0]
  return np.where(real, hit, 0).sum(-1)


def least(cost, objects):
  """The least totals, by trying every injection of slots into queries in float64."""
  real = np.arange(cost.shape[-1]) < np.asarray(objects)[:, None]
  cost = np.where(real[:, None], cost.astype(float), 0)
  best = np.full(cost.shape[:2], np.inf)
  for chosen in itertools.permutations(range(cost.shape[2]), cost.shape[3]):
    best = np.minimum(best, cost[:, :, chosen, np.arange(cost.shape[3])].sum(-1))
  return best


def least_by_scipy(cost, objects):
  best = np.zeros(cost.shape[:2])
  for layer, row in np.ndindex(*best.shape):
    part = cost[layer, row, :, :objects[row]].astype(float)
    best[layer, row] = part[optimize.linear_sum_assignment(part)].sum()
  return best


# Values that differ in what they ask of a solver; `shape` is [layers, batch, queries, slots].
VALUES = {
    'uniform': lambda rng, shape: rng.random(shape),
    'both signs': lambda rng, shape: rng.normal(size=shape),
    'small integers, many ties': lambda rng, shape: rng.integers(-1, 3, shape),
    'all equal': lambda rng, shape: np.full(shape, -2.5),
    'huge': lambda rng, shape: 1e6 * rng.normal(size=shape),
    'large and nearly equal': lambda rng, shape: 1e6 + rng.random(shape),
    # All objects want the same queries in the same order: long searches, long paths.
    'products': lambda rng, shape: (
        rng.random((*shape[:3], 1)) * rng.random((*shape[:2], 1, shape[3]))),
    # One way is far cheaper than any other, and greedy choices miss it.
    'ladder': lambda rng, shape: np.abs(
        np.arange(shape[2])[:, None] - np.arange(shape[3]) - 1) ** 1.5 + 1e-3 * rng.random(shape),
}


@BOTH
@pytest.mark.parametrize('values', VALUES)
def test_no_injection_costs_less(values, implementation):
  """1,000 problems of each kind, 0 to 4 objects, against all 360 injections."""
  rng = np.random.default_rng(0)
  cost = VALUES[values](rng, (2, 500, 6, 4)).astype(np.float32)
  objects = rng.integers(0, 5, 500)
  objects[:3] = 0, 1, 4
  total, want = totals(cost, objects, solve(implementation, cost, objects)), least(cost, objects)
  if values in ('small integers, many ties', 'all equal'):
    np.testing.assert_array_equal(total, want)
  np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-6 * np.abs(cost).max())


@pytest.mark.parametrize('values', VALUES)
def test_lockstep_is_exact_at_the_papers_size(values):
  rng = np.random.default_rng(1)
  cost = VALUES[values](rng, (3, 8, 100, 63)).astype(np.float32)
  objects = [63, 0, 1, 7, 20, 2, 63, 40]
  total = totals(cost, objects, solve('lockstep', cost, objects))
  want = least_by_scipy(cost, objects)
  np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-6 * np.abs(cost).max())


@pytest.mark.parametrize('values', VALUES)
def test_lockstep_is_exact_with_an_object_for_every_query(values):
  cost = VALUES[values](np.random.default_rng(2), (2, 8, 24, 24)).astype(np.float32)
  objects = [24] * 7 + [5]
  total = totals(cost, objects, solve('lockstep', cost, objects))
  np.testing.assert_allclose(total, least_by_scipy(cost, objects), rtol=1e-6,
                             atol=1e-6 * np.abs(cost).max())


@BOTH
def test_a_case_by_hand(implementation):
  """Both objects like query 1 best; the second loses less by going elsewhere."""
  cost = np.array([[5., 3.], [1., 2.], [9., 9.]])[None, None]
  np.testing.assert_array_equal(solve(implementation, cost, [2]), [[[1, 0]]])
  np.testing.assert_array_equal(solve(implementation, cost, [1]), [[[1, -1]]])
  np.testing.assert_array_equal(solve(implementation, cost[:, :, 1:2, :1], [1]), [[[0]]])


@BOTH
def test_what_is_in_padded_slots_does_not_matter(implementation):
  rng = np.random.default_rng(3)
  cost = rng.normal(size=(2, 500, 6, 4))
  objects = rng.integers(0, 4, 500)
  padded = np.broadcast_to(np.arange(4) >= objects[:, None, None], cost.shape)
  want = solve(implementation, cost, objects)
  for garbage in (np.nan, np.inf, -np.inf, -1e9):
    np.testing.assert_array_equal(
        solve(implementation, np.where(padded, garbage, cost), objects), want)


@BOTH
def test_objects_in_another_order_get_the_same_queries(implementation):
  rng = np.random.default_rng(4)
  cost = rng.random((2, 500, 6, 4))
  order = rng.permutation(4)
  objects = np.full(500, 4)
  np.testing.assert_array_equal(solve(implementation, cost[..., order], objects),
                                solve(implementation, cost, objects)[..., order])


@BOTH
def test_infinity_forbids_and_nothing_hangs_on_what_is_not_a_number(implementation):
  rng = np.random.default_rng(5)
  cost = rng.random((2, 500, 6, 4)).astype(np.float32)
  objects = rng.integers(0, 5, 500)
  # Every object may still have the query of its own number, so there is a finite matching.
  forbidden = (rng.random(cost.shape) < .5) & ~np.eye(6, 4, dtype=bool)
  for bad in (np.inf, np.nan, 3e38):
    total = totals(cost, objects, solve(implementation, np.where(forbidden, bad, cost), objects))
    want = least_by_scipy(np.where(forbidden, np.inf, cost), objects)
    np.testing.assert_allclose(total, want, rtol=1e-6)
  # In a diverged run anything may be anywhere; `solve` checks that it still is a matching.
  wild = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 0., 1.], cost.shape)
  for cost in (wild, np.full(cost.shape, np.nan), np.full(cost.shape, -np.inf)):
    solve(implementation, cost, objects)


def loss(x, targets, objects, implementation):
  """A loss of matched pairs like training's: x `[layers, batch, queries, 4]`."""
  cost = ((x[:, :, :, None] - targets[:, None]) ** 2).sum(-1)
  found = matching.assign(cost, objects, implementation)
  hit = jnp.take_along_axis(cost, jnp.maximum(found, 0)[:, :, None], axis=2)[:, :, 0]
  return jnp.where(found >= 0, hit, 0).sum(), found


def pairs(layers=2, batch=16, queries=12, slots=5):
  rng = np.random.default_rng(6)
  return (rng.random((layers, batch, queries, 4), np.float32),
          rng.random((batch, slots, 4), np.float32),
          rng.integers(0, slots + 1, batch).astype(np.int32))


def expected(x, targets, objects):
  """Float64 gradient of `loss` with the matching held fixed, and that matching."""
  grad, found = np.zeros(x.shape), np.full((*x.shape[:2], targets.shape[1]), -1)
  for layer, row in np.ndindex(*x.shape[:2]):
    gap = x[layer, row, :, None].astype(float) - targets[row, :objects[row]]
    query, slot = optimize.linear_sum_assignment((gap ** 2).sum(-1))
    grad[layer, row, query] = 2 * gap[query, slot]
    found[layer, row, slot] = query
  return grad, found


@BOTH
@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2)])
def test_devices_solve_their_own_images_and_gather_nothing(implementation, mesh):
  layout = partition.Layout(
      jax.make_mesh(mesh, partition.AXES, axis_types=(AxisType.Auto,) * 3),
      partition.RULES['fsdp_tp'])
  inputs = pairs()
  place = lambda *spec: NamedSharding(layout.mesh, PartitionSpec(*spec))
  batch = ('data', 'fsdp')
  function = jax.jit(
      jax.grad(functools.partial(loss, implementation=implementation), has_aux=True),
      in_shardings=(place(None, batch), place(batch), place(batch)),
      out_shardings=(place(None, batch), place(None, batch)))
  with partition.use(layout):
    run = function.lower(*inputs).compile()
  text = run.as_text()
  assert ('callback' in text) == (implementation == 'scipy')
  for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert collective not in text, collective
  grad, found = run(*inputs)
  want_grad, want = expected(*inputs)
  np.testing.assert_array_equal(found, want)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6)


@BOTH
def test_a_batch_that_does_not_divide_is_solved_whole(implementation):
  layout = partition.Layout(
      jax.make_mesh((8, 1, 1), partition.AXES, axis_types=(AxisType.Auto,) * 3),
      partition.RULES['dp'])
  x, targets, objects = pairs(batch=3)
  with partition.use(layout):
    _, found = jax.jit(functools.partial(loss, implementation=implementation))(x, targets, objects)
  np.testing.assert_array_equal(found, expected(x, targets, objects)[1])


_STRESS = """
import os, sys
cores, devices, calls = (int(x) for x in sys.argv[1:])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from core import partition
from detection import matching
layout = partition.Layout(jax.make_mesh((devices, 1, 1), partition.AXES,
                                        axis_types=(AxisType.Auto,) * 3), partition.RULES['dp'])
def loss(w, x, objects):
  x = x @ w  # Weights of each image's own: the devices have nothing to say to each other.
  cost = x * x - x
  found = matching.assign(cost, objects, 'scipy')
  hit = jnp.take_along_axis(cost, jnp.maximum(found, 0)[:, :, None], axis=2)
  hit = jnp.where(found[:, :, None] >= 0, hit, 0)
  value = hit.mean((0, 2, 3)) + jnp.tanh(cost).mean((0, 2, 3))
  return value.sum(), value
place = lambda *spec: NamedSharding(layout.mesh, PartitionSpec(*spec))
rng = np.random.default_rng(0)
x = jax.device_put(rng.normal(size=(2, 32, 300, 64)).astype(np.float32), place(None, 'data'))
objects = jax.device_put(rng.integers(0, 6, 32).astype(np.int32), place('data'))
w = jax.device_put(rng.normal(size=(32, 64, 100)).astype(np.float32), place('data'))
step = jax.jit(jax.grad(loss, has_aux=True))
with partition.use(layout):
  # With steps queued up, fake devices may wait for each other in a collective for good, whatever
  # they compute: here there is none.
  assert 'all-reduce' not in step.lower(w, x, objects).compile().as_text()
  for _ in range(calls):
    grad, value = step(w, x, objects)
    w = w - .1 * grad
  assert np.isfinite(np.asarray(value)).all()
"""


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='cannot pin cores here')
@pytest.mark.parametrize('cores, devices, calls', [
    (1, 1, 60), pytest.param(2, 8, 100, marks=pytest.mark.slow)])
def test_asking_the_host_never_hangs(cores, devices, calls):
  """Costs of megabytes, other work queued behind them, and no thread to spare."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-c', _STRESS, *map(str, (cores, devices, calls))],
                        env=env, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stderr[-3000:]


def test_the_platform_chooses_and_mistakes_are_named(monkeypatch):
  cost, objects = jnp.zeros((1, 2, 3, 2)), jnp.zeros(2, jnp.int32)

  def primitives(platform, slots):
    monkeypatch.setattr(partition, 'platform', lambda: platform)
    costs = jnp.zeros((1, 2, 20, slots))
    return str(jax.make_jaxpr(lambda *x: matching.assign(*x))(costs, objects))
  for platform, slots, host in (('cpu', 17, True), ('cpu', 16, False), ('gpu', 17, False),
                                ('tpu', 17, False)):
    text = primitives(platform, slots)
    assert ('buffer_callback' in text) == host and ('while' in text) != host
  with pytest.raises(ValueError, match='CPU, not on tpu'):
    matching.assign(cost, objects, 'scipy')
  with pytest.raises(ValueError, match="expected 'lockstep' or 'scipy'"):
    matching.assign(cost, objects, 'greedy')
  with pytest.raises(ValueError, match='4 slots for objects, but only 3 queries'):
    matching.assign(jnp.zeros((1, 2, 3, 4)), objects)
  with pytest.raises(ValueError, match='2 images'):
    matching.assign(cost, jnp.zeros(3, jnp.int32))


_TPU = """
from core import topologies
devices = topologies.devices(topologies.parse('v5e:2x2'))
import jax, jax.numpy as jnp, numpy as np
from core import partition
from detection import matching
mesh = jax.sharding.Mesh(np.asarray(devices).reshape(2, 2, 1), partition.AXES)
layout = partition.Layout(mesh, partition.RULES['fsdp'])
struct = lambda shape, dtype, *names: jax.ShapeDtypeStruct(
    shape, dtype, sharding=layout.sharding(names, shape))
with partition.use(layout):
  lowered = jax.jit(matching.assign).trace(
      struct((6, 16, 100, 63), jnp.float32, None, 'batch', None, None),
      struct((16,), jnp.int32, 'batch')).lower(lowering_platforms=('tpu',))
  text = lowered.compile().as_text()
assert 'while' in text and 'callback' not in text
assert not any(x in text for x in ('all-gather', 'all-reduce', 'all-to-all')), text
"""


@pytest.mark.tpu
def test_it_compiles_for_a_tpu_and_its_chips_need_not_talk():
  pytest.importorskip('libtpu')
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  done = subprocess.run([sys.executable, '-c', _TPU], env={**env, 'PYTHONPATH': str(ROOT)},
                        capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
