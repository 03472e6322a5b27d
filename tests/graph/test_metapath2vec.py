"""The whole task: its step against dense gradients and over meshes, and what configs may say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from core import step as step_lib
from core.config import UserError
from core.data import devices
from core.plan import make_plan
from graph import network, tables, trips, walks
from tests.graph import tiny

RATE = .05


# --- One step ------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes, updates', [
    (dict(), 1), (dict(model__shared_negatives=0, model__walks_per_update=4), 2),
    (dict(model__negatives_from='context', model__shared_negatives=6, model__walks_per_update=2,
          model__sample=.05), 4),
    (dict(model__piece=5, model__walks_per_update=4), 2),
    (dict(model__piece=5, model__walks_per_update=4, model__walks_per_draw=2), 2),
    (dict(model__piece=5, model__shared_negatives=0), 1)])
def test_a_step_is_the_dense_gradient_of_one_update_after_the_other(changes, updates):
  of = tiny.graph(weighted=True)
  task = tiny.task_of(of, **{'batch_size': 2, 'model__metapath': 'user-item-tag-item-user',
                             'model__row_cap': 0., 'model__walks_per_update': 8, 'model__piece': 0,
                             **changes})
  batch = {**tiny.first_batch(task, 2), **task.resident()}
  assert set(task.resident()) == {
      'accept', 'alias', *(f'{name}_{at}' for name in ('ptr', 'col', 'cum') for at in range(4)),
      *(['kept'] if 'model__sample' in changes else [])}
  optimizer = optax.sgd(RATE)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda key: nn.unbox(task.init(key)), jax.random.key(0))
  params = {name: rng.normal(size=x.shape).astype(x.dtype) if x.ndim == 2 else
            np.arange(x.size, dtype=x.dtype) for name, x in shapes.items()}

  @jax.jit
  def both(params, batch, rng):
    state, metrics = task.update(step_lib.init_state(params, optimizer, 0.), batch, rng, optimizer)
    # The same key splits, whole tables, and autodiff of the mean loss times its pairs.
    key, negative = jax.random.split(rng)
    found = task.walks(key, batch)
    noise, objective = (batch['accept'], batch['alias']), task.objective
    parts, halo = [found[at::updates] for at in range(updates)], 0
    if piece := task.config.model.piece:
      # Twelve tokens: of all walks the first five, the next five, the rest.
      halo = task.config.model.window
      wide = jnp.pad(found, ((0, 0), (halo, halo + 3)), constant_values=-1)
      parts = [wide[at::updates, begin:begin + piece + 2 * halo]
               for at in range(updates) for begin in (0, 5, 10)]
    if objective.shared:
      model = task.config.model
      sets = model.walks_per_update // model.walks_per_draw if model.walks_per_draw else 1
      draws = objective.draw_shared(negative, (len(parts), sets), *noise)
    else:
      keys = jax.random.split(negative, len(parts))
    dense = {name: params[name] for name in ('input', 'output')}
    total = [0., 0.]
    for at, some in enumerate(parts):
      drawn = draws[at] if objective.shared else objective.draw_own(keys[at], some, *noise, halo)

      def loss(tables, some=some, drawn=drawn):
        mean, pairs = objective.loss(tables, some, drawn, halo)
        return mean * pairs, pairs
      (value, pairs), gradient = jax.value_and_grad(loss, has_aux=True)(dense)
      dense = {name: dense[name] - RATE * gradient[name] for name in dense}
      total = [total[0] + value, total[1] + pairs]
    return state.params, metrics, found, dense, total
  got, metrics, found, dense, total = jax.device_get(both(params, batch, jax.random.key(7)))
  for name, want in dense.items():
    assert abs(want - params[name]).max() > .01
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=2e-5)
  assert found.shape == (8, task.config.model.length)
  tokens = np.bincount(found[found >= 0], minlength=len(of))
  np.testing.assert_array_equal(got['counts'], params['counts'] + tokens)
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)
  assert metrics['tokens_per_walk'] == (tokens.sum(), (found[:, 0] >= 0).sum())
  if 'model__sample' in changes:
    assert 'dead_ends' not in metrics and (found < 0).any()
  else:
    stopped = (found[:, -1] < 0) & (found[:, 0] >= 0)
    assert metrics['dead_ends'] == (stopped.sum(), (found[:, 0] >= 0).sum())


@functools.cache
def plan_of(places=1, rules='dp', **changes):
  sizes = dict(zip(('data', 'fsdp', 'tensor'), {'dp': (0, 0, 0), 'fsdp': (2, 4, 0),
                                                'tp': (2, 0, 4)}[rules]))
  config = tiny.config_of(rules=rules, model__rows_multiple=8, model__walks_per_draw=1, **changes)
  config.mesh.update(sizes)
  return make_plan(config, jax.devices()[:places])


def placed(plan, batch):
  size = len(batch['mask'])
  return {**devices.to_device(batch, plan.batch_sharding, size, range(size)), **plan.resident()}


def two_steps(plan, batches):
  state, found = plan.init(jax.random.key(3)), []
  for batch in batches:
    state, metrics = plan.train_step(state, placed(plan, batch))
    found.append(jax.device_get(metrics))
  assert plan.train_step._cache_size() == 1, 'the step compiled more than once'
  return state, found


@functools.cache
def alone():
  """Two steps on one device, their batches and their metrics."""
  plan = plan_of()
  batches = [tiny.first_batch(plan.task, 8, seed) for seed in range(2)]
  return (batches, *two_steps(plan, batches))


@pytest.mark.parametrize('rules', ['tp', 'fsdp'])
def test_tables_over_a_mesh_are_those_of_one_device(rules):
  batches, one, metrics = alone()
  plan = plan_of(8, rules)
  state, found = two_steps(plan, batches)
  assert plan.task.model.rows == 3224  # 3,220 nodes
  for name, want in one.params.items():
    got = state.params[name]
    parts = {tuple(shard.data.shape) for shard in got.addressable_shards}
    assert parts == {(3224 // 4, *want.shape[1:])}, 'rows are not split'
    assert len({shard.index[0].start for shard in got.addressable_shards}) == 4
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  assert abs(np.asarray(one.params['output'])).max() > 1e-3
  assert not np.asarray(one.params['output'])[3220:].any()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, metrics)


@pytest.mark.parametrize('changes', [
    dict(), dict(model__shared_negatives=0), dict(model__metapath='*', model__sample=.01)])
def test_a_step_makes_nothing_as_large_as_a_table(changes):
  """But the tables themselves, by scatters within its loop."""
  plan = plan_of(**changes)
  batch = {**plan.task.batch_spec(8), **plan.task.resident_spec()}
  found = []

  def look(jaxpr):
    for equation in jaxpr.eqns:
      found.extend(equation.primitive.name for x in equation.outvars
                   if np.prod(getattr(x.aval, 'shape', ())) >= 3220 * 16)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        look(inner)
  look(plan.train_step.trace(plan.state_shape, batch).jaxpr.jaxpr)
  assert sorted(found) == ['scan', 'scan', 'scatter-add', 'scatter-add']


def test_compiled_the_step_has_no_copy_of_a_table():
  plan = plan_of()
  alone()  # Compiles it.
  batch = {**plan.task.batch_spec(8), **plan.task.resident_spec()}
  memory = plan.train_step.lower(plan.state_shape, batch).compile().memory_analysis()
  table = 4 * 3224 * 16
  assert memory.alias_size_in_bytes >= 2 * table  # The donated tables are changed in place.
  assert memory.temp_size_in_bytes < table


def test_dead_ends_of_the_embedded_network():
  """24 papers have no venue: a walk ends there, and nowhere else."""
  batches, _, metrics = alone()
  task = plan_of().task
  begun = sum(int((batch['starts'] >= 0).sum()) for batch in batches)
  stopped, all_of = np.sum([one['dead_ends'] for one in metrics], axis=0)
  assert all_of == begun == 64
  # What is left of 790 walks at the last token.
  trip, = task.trips
  left = [walks.visits(trip.csrs, trip.starts, dataclasses.replace(
      trip.route, positions=trip.route.positions[:n]), len(task.graph)).sum() for n in (11, 12)]
  share = 1 - (left[1] - left[0]) / 790
  assert .01 < share < .1
  assert abs(stopped - 64 * share) < 4 * np.sqrt(64 * share)
  some = np.concatenate([trip.sample_host(np.random.default_rng(seed), trip.starts)
                         for seed in range(4)])
  last = some[np.arange(len(some)), (some >= 0).sum(1) - 1][some[:, -1] < 0]
  published = np.diff(walks.csr(task.graph, trip.steps[1]).ptr) > 0
  papers = task.graph.nodes_of('paper')
  assert len(last) and not published[last - papers.start].any() and (~published).sum() == 24
  assert abs(len(last) / len(some) - share) < 4 * np.sqrt(share / len(some))


# --- Walks, starts and sizes ---------------------------------------------------------------------


def test_an_epoch_is_a_walk_from_every_node_that_has_a_way():
  of = tiny.graph()
  task = tiny.task_of(of, model__metapath='user-[follows]->user')
  relation = next(r for r in of.relations if r.name == 'follows')
  assert task.trips[0].starts.tolist() == np.flatnonzero(np.diff(relation.ptr)).tolist()
  assert 7 not in task.trips[0].starts
  source = trips.Blocks([np.arange(10, 23, dtype=np.int32)], 4, 'starts')
  blocks = np.stack([source[i]['starts'] for i in range(len(source))])
  assert blocks.shape == (4, 4) and blocks.dtype == np.int32
  assert sorted(blocks[blocks >= 0]) == list(range(10, 23)) and (blocks < 0).sum() == 3
  # The nodes of a block are apart in the order of the graph.
  assert (np.diff(blocks[0]) == 4).all()
  task = tiny.task_of(network.build(tables.Table({'a': ['x', 'y'], 'b': ['z']}, [
      tables.Edges('ab', 'a', 'b', np.zeros(1, int), np.zeros(1, int)),
      tables.Edges('aa', 'a', 'a', np.zeros(1, int), np.ones(1, int))])),
                      model__metapath='b-a-[aa]->a', model__length=3)
  assert task.trips[0].starts.tolist() == [2]
  np.testing.assert_array_equal(task.expected, [1, 1, 1])


def test_negatives_need_walks_that_come_by():
  of = network.build(tables.Table({'a': ['x'], 'b': ['y', 'z'], 'c': ['w']}, [
      tables.Edges('ab', 'a', 'b', np.zeros(1, int), np.zeros(1, int)),
      tables.Edges('bc', 'b', 'c', np.ones(1, int), np.zeros(1, int))]))
  task = tiny.task_of(of, model__metapath='a-b-c', model__length=3,
                      model__negatives_from='context')
  with pytest.raises(UserError, match="no walk along 'a-b-c' ever comes to a node of type 'c'"):
    task.prepare()
  tiny.task_of(of, model__metapath='a-b-c', model__length=3).prepare()


@pytest.mark.parametrize('metapath', ['APVPA', '*', 'venue-paper-venue'])
def test_sizes_may_be_declared(metapath):
  """To compile for a graph that is not here."""
  nodes = (('author', 800), ('paper', 2400), ('venue', 20))
  counted = tiny.task_of(model__metapath=metapath, model__sample=.01)
  edges = tuple((r.source, r.target, len(r.col)) for r in counted.graph.relations)
  declared = tiny.task_of(model__metapath=metapath, model__sample=.01, model__nodes=nodes,
                          model__edges=edges, data__name='tsv:nowhere')
  assert declared.resident_spec() == counted.resident_spec()
  assert declared.model.rows == counted.model.rows == 3220
  assert 'graph' not in vars(declared)
  arrays = counted.resident()
  assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == {
      name: (x.shape, x.dtype) for name, x in declared.resident_spec().items()}
  # In another order ids would be others' ids.
  for wrong in (*nodes[:2], ('venue', 21)), nodes[::-1]:
    with pytest.raises(UserError, match=r"but 'planted' has .*\('venue', 20\)\)"):
      tiny.task_of(model__nodes=wrong, model__edges=edges).prepare()


@pytest.mark.parametrize('changes, words', [
    (dict(model__negatives_from='pp'), 'negatives_from: unknown name .pp.; .*all, context, centre'),
    (dict(model__export='npz'), 'valid: text, binary'),
    (dict(data__sampler='gpu'), 'valid: device, host'),
    (dict(model__dim=0), 'model.dim=0; it must be at least 1'),
    (dict(model__window=0), 'model.window=0; it must be at least 1'),
    (dict(model__negatives=0), 'model.negatives=0; it must be at least 1'),
    (dict(model__walks_per_update=0), 'model.walks_per_update=0; it must be at least 1'),
    (dict(model__rows_multiple=0), 'model.rows_multiple=0; it must be at least 1'),
    (dict(model__min_count=0), 'model.min_count=0; it must be at least 1'),
    (dict(data__block=0), 'data.block=0; it must be at least 1'),
    (dict(model__length=1), 'model.length=1; a walk has at least 2 tokens'),
    (dict(model__shared_negatives=-1), 'shared_negatives=-1; it must not be negative'),
    (dict(model__walks_per_draw=-1), 'walks_per_draw=-1; it must not be negative'),
    (dict(model__walks_per_draw=3), 'walks_per_update=2 walks do not divide into sets of .*=3'),
    (dict(model__row_cap=-1.), 'row_cap=-1.0; it must not be negative'),
    (dict(model__sample=-.1), 'sample=-0.1; it must not be negative'),
    (dict(model__power=-1.), 'power=-1.0; it must not be negative'),
    (dict(model__walks_per_update=5), 'batch_size=8 blocks of config.data.block=4 walks do not'),
    (dict(optim__args__momentum=.9), 'sgd with args.momentum=0'),
    (dict(optim__clip_norm=1.), 'without clip_norm'), (dict(optim__name='adamw'), 'must be sgd'),
    (dict(optim__weight_decay=.1), 'without .*weight_decay'),
    (dict(optim__lr_multipliers=(('input', .1),)), 'without .*lr_multipliers'),
    (dict(optim__freeze='output'), 'without .*freeze'), (dict(accum=2), 'config.accum=1'),
    (dict(ema=.9), 'config.ema=0')])
def test_bad_configs(changes, words):
  with pytest.raises(UserError, match=words) as error:
    tiny.task_of(**changes)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes, warns', [
    (dict(), False), (dict(model__row_cap=7.), True), (dict(model__row_cap=8.), False),
    (dict(model__row_cap=7., model__walks_per_draw=1), False),
    (dict(model__row_cap=7., model__shared_negatives=0), False), (dict(model__row_cap=0.), False)])
def test_a_negative_that_stands_for_more_than_its_row_may_move_is_told(changes, warns, caplog):
  # Of 2 walks 6 tokens each, 6 contexts, 5 negatives, over 48: 7.5 terms.
  tiny.task_of(**changes).objective  # pylint: disable=expression-not-assigned
  assert ('stands for 8 terms' in caplog.text) == warns


@pytest.mark.parametrize('changes, words', [
    (dict(model__metapath='APX'), "metapath='APX': 'X': no type begins with it"),
    (dict(model__metapath='APV'), "length=12: the meta-path 'APV' begins with"),
    (dict(model__keep=('papers',)), "keep: 'papers' is not on the meta-path"),
    (dict(model__shared_negatives=2, model__negatives_from='context'),
     'shared_negatives=2: there are 3 groups to draw some of each from; 0 draws for every pair')])
def test_bad_paths(changes, words):
  with pytest.raises(UserError, match=words) as error:
    task = tiny.task_of(**changes)
    task.prepare()
    task.objective  # pylint: disable=pointless-statement
  assert '\n' not in str(error.value)
