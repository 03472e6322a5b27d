"""What a training leaves: vectors in which the planted areas are, files, neighbours."""

import functools

import jax
import numpy as np
import pytest

from core.config import UserError
from core.plan import make_plan
from graph import evaluation, neighbours, vectors
from tests.graph import tiny


@functools.cache
def trained(metapath):
  """The embedded config, smaller: (plan, parameters, losses)."""
  config = tiny.config_of('', model__metapath=metapath, model__dim=16, model__length=24,
                          optim__lr=.05, steps='6 epochs')
  plan = make_plan(config, jax.devices()[:1])
  state, resident, losses = plan.init(jax.random.key(0)), plan.resident(), []
  for step in range(plan.steps):
    batch = tiny.first_batch(plan.task, 16, step)
    state, metrics = plan.train_step(state, {**batch, **resident})
    losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
  return plan, jax.device_get(state.params), losses


def nmi(metapath):
  plan, params, _ = trained(metapath)
  task = plan.task
  some = next(found for found in evaluation.labelled(task.graph, task.occurs(params))
              if found.type == 'author')
  found = evaluation.clustering(task.vectors(params)[some.ids], some.labels, 4, 1, 0)
  return found['nmi'], found['nmi_normalised']


def test_venues_tell_the_planted_areas_and_coauthors_do_not():
  by_venue, by_coauthor = nmi('APVPA'), nmi('APA')
  assert min(by_venue) > .7, by_venue
  assert max(by_coauthor) < .4, by_coauthor
  _, _, losses = trained('APVPA')
  assert losses[-1] < .7 * losses[0], losses


def test_a_run_on_walks_of_the_host_learns():
  config = tiny.config_of(data__sampler='host', data__block=32, model__length=24, model__window=7,
                          model__walks_per_update=1, model__shared_negatives=64, optim__lr=.05)
  plan = make_plan(config, jax.devices()[:1])
  assert set(plan.task.resident_spec()) == {'accept', 'alias'}
  assert plan.task.batch_spec(8)['walks'].shape == (8, 32, 24)
  state, resident, losses = plan.init(jax.random.key(0)), plan.resident(), []
  for step in range(6):
    state, metrics = plan.train_step(state, {**tiny.first_batch(plan.task, 8, step), **resident})
    losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
  assert losses[-1] < .9 * losses[0], losses
  assert 0 < float(metrics['dead_ends'][0]) < float(metrics['dead_ends'][1]) <= 256


@pytest.mark.parametrize('kind, ending', [('text', '.txt'), ('binary', '.bin')])
def test_export_and_back(tmp_path, kind, ending):
  task = tiny.task_of(model__export=kind, model__min_count=3, model__rows_multiple=8)
  _, params, _ = trained('APVPA')
  counts = np.append(params['counts'], [0] * 4)
  counts[[7, 900, 3219]] = [2, 3, 0]
  params = {**{name: np.concatenate([params[name], np.ones((4, 16), np.float32)])
               for name in ('input', 'output')}, 'counts': counts}
  path = task.export(params, tmp_path / 'export')
  assert path == tmp_path / f'export{ending}'
  tokens, values = vectors.read(path)
  there = np.flatnonzero(counts >= 3)
  assert 7 not in there and 3219 not in there and 900 in there and len(there) < 3218
  assert tokens == task.graph.tokens[there].tolist()
  np.testing.assert_array_equal(values, params['input'][there])
  found = {name: weight.read() for name, weight in task.open_weights(path).items()}
  assert {name: x.shape for name, x in found.items()} == {
      'input': (3224, 16), 'output': (3224, 16), 'counts': (3224,)}
  np.testing.assert_array_equal(found['input'][there], values)
  missing = np.setdiff1d(np.arange(3224), there)
  assert not found['input'][missing].any() and not found['output'].any()
  nothing = {**params, 'counts': 0 * counts}
  with pytest.raises(UserError, match='no node has occurred in a walk yet'):
    task.export(nothing, tmp_path / 'nothing')


def test_predicted_neighbours_are_of_the_area(tmp_path):
  plan, params, _ = trained('APVPA')
  task, graph = plan.task, plan.task.graph
  asked = ['venue 1-2', 'author 0003', 'author 0799']  # The last one writes nothing.
  inputs = tmp_path / 'asked.txt'
  inputs.write_text('\n'.join(asked))
  records = task.predict(params, inputs, tmp_path)
  assert [record['node'] for record in records] == asked
  assert records[-1]['neighbours'] == {} and 'does not occur' in records[-1]['note']
  for record in records[:-1]:
    assert (tmp_path / record['picture']).exists()
    assert record['occurrences'] == params['counts'][graph.find(record['node'])] > 0
    assert [len(record['neighbours'][type]) for type in graph.types] == [10, 10, 10]
  # Of all authors, not only of those asked.
  authors = np.flatnonzero(task.occurs(params)[:800])
  ids, _ = neighbours.nearest(task.vectors(params), authors, slice(0, 800),
                              task.occurs(params), 10)
  label = graph.label_col[graph.label_ptr[:800]]
  assert records[1]['neighbours']['author'][0]['node'] == graph.names[ids[3, 0]]
  assert np.mean(label[ids] == label[authors][:, None]) > .7
