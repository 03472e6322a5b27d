import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import checkpoint, metrics, pretrained, train
from core.config import RunFailed, UserError
from core.plan import make_plan
from vit_family import classification


def lines(workdir):
  return metrics.read(workdir / 'metrics.jsonl')


@pytest.fixture
def short(smoke):
  """Without evaluators, the loop alone."""
  config = smoke()
  config.data.splits.validation = config.data.splits.test = ''
  return config


def test_leaves_what_it_promises(smoke, tmp_path, capfd):
  train.train(smoke(), tmp_path)
  for name in ('config.json', 'metrics.jsonl', 'checkpoints/4', 'pictures/learning_curves.png',
               'pictures/predictions.png', 'pictures/rollout.png',
               'pictures/position_similarity.png'):
    assert (tmp_path / name).exists(), name
  assert list(tmp_path.glob('events.out.tfevents*'))
  assert json.loads((tmp_path / 'config.json').read_text())['batch_size'] == 8
  found = lines(tmp_path)
  assert [line['step'] for line in found] == [2, 4, 4]
  assert {'train/loss', 'train/accuracy', 'train/grad_norm', 'train/learning_rate'} <= set(found[0])
  assert {'validation/loss', 'validation/accuracy', 'test/loss', 'test/accuracy'} <= set(found[2])
  out = capfd.readouterr().out
  assert 'train 2/4  loss' in out and 'ETA' in out and 'sharding on mesh' in out


def test_a_finished_run_starts_and_ends_again_without_a_step(short, tmp_path, capfd):
  train.train(short, tmp_path)
  before = (tmp_path / 'metrics.jsonl').read_text()
  train.train(short, tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text() == before
  assert 'is complete' in capfd.readouterr().out


class Scripted:
  """Evaluator whose values are written beforehand, by step; remembers what it was given."""

  def __init__(self, values, every=''):
    self.values, self.every, self.calls = values, every, {}

  def __call__(self, run, params, step):
    self.calls[step] = jax.device_get(params['head']['bias'])
    return {'x': self.values.get(step, 0.)}


@pytest.fixture
def scripted(short, monkeypatch):
  """A run of eight steps, measured after each; the best is step 3."""
  def make(**options):
    found = {'dev': Scripted({1: .1, 2: .2, 3: .5, 4: .4, 5: .5, 6: .3, 7: .2, 8: .1}),
             'test': Scripted({}, 'end')}
    monkeypatch.setattr(classification.Task, 'evaluators', lambda self: found)
    short.steps, short.eval.every, short.checkpoint.every = '8 steps', '1 steps', '4 steps'
    short.checkpoint.update(dict(best='dev/x', **options))
    return short, found
  return make


def test_a_run_ends_when_nothing_gets_better(scripted, tmp_path, capfd):
  config, found = scripted(patience=3)
  train.train(config, tmp_path)
  assert sorted(found['dev'].calls) == [1, 2, 3, 4, 5, 6], 'an equal value is not better'
  assert list(found['test'].calls) == [6]
  assert 'nothing better since step 3' in capfd.readouterr().out
  assert lines(tmp_path)[-1] == {'step': 6, 'dev/x': .3, 'test/x': 0.}
  before = (tmp_path / 'metrics.jsonl').read_text()
  train.train(config, tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text() == before
  assert 'the run of 6 steps' in capfd.readouterr().out


def test_what_ends_a_run_survives_a_kill(scripted, tmp_path):
  """Resumed from step 4, which is one evaluation after the best."""
  config, found = scripted(patience=3)
  train.train(config, tmp_path)
  for step in (tmp_path / 'checkpoints').iterdir():
    if step.name == '6':
      shutil.rmtree(step)
  found['dev'].calls.clear()
  train.train(config, tmp_path)
  assert sorted(found['dev'].calls) == [5, 6]


@pytest.mark.parametrize('patience', [0, 3])
def test_the_best_is_measured_at_the_end(scripted, tmp_path, patience):
  """And saved although it is no step to save at; so do the other modes."""
  config, found = scripted(patience=patience, select='best')
  train.train(config, tmp_path)
  (measured,), best = found['test'].calls.values(), found['dev'].calls[3]
  np.testing.assert_array_equal(measured, best)
  assert not np.array_equal(found['dev'].calls[4], best)
  _, step = pretrained.restore_params(make_plan(config), tmp_path)
  assert step == 3
  config.checkpoint.select = 'newest'
  _, step = pretrained.restore_params(make_plan(config), tmp_path)
  assert step == (6 if patience else 8)


def test_of_equals_the_one_that_was_kept_is_the_best(scripted, tmp_path):
  config, found = scripted(select='best', keep=1)
  config.checkpoint.every = '1 steps'
  train.train(config, tmp_path)
  (measured,) = found['test'].calls.values()
  assert any(np.array_equal(measured, found['dev'].calls[step]) for step in (3, 5))


def test_a_best_that_is_not_there_or_not_readable(scripted, tmp_path):
  config, _ = scripted(select='best')
  train.train(config, tmp_path)
  plan = make_plan(config)
  (tmp_path / 'checkpoints' / '3' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with pytest.raises(UserError, match=r'checkpoint 3 in .* cannot be read \(\w+\)$'):
    pretrained.restore_params(plan, tmp_path)
  config.checkpoint.best = 'dev/y'
  with pytest.raises(UserError, match="was measured by config.checkpoint.best='dev/y'"):
    pretrained.restore_params(plan, tmp_path)


@pytest.mark.parametrize('options', [dict(best='', patience=2), dict(best='', select='best'),
                                     dict(best='dev/x', select='best', average=2)])
def test_options_that_need_another(short, tmp_path, options):
  short.checkpoint.update(options)
  with pytest.raises(UserError, match='config.checkpoint.best|average=2'):
    train.train(short, tmp_path)


def test_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    short, tmp_path, monkeypatch):
  real = classification.Task.loss

  def breaks(self, params, batch, rng, train):
    value, aux = real(self, params, batch, rng, train)
    # The key is fold_in(seed, step): the one of the sixth update identifies it inside the step.
    bad = jnp.all(jax.random.key_data(rng) == jax.random.key_data(
        jax.random.fold_in(jax.random.key(0), 5)))
    return jnp.where(bad, jnp.nan, 1.) * value, aux
  monkeypatch.setattr(classification.Task, 'loss', breaks)
  short.steps = '9 steps'
  short.log_every = '8 steps'
  short.checkpoint.every = '4 steps'
  with pytest.raises(RunFailed, match='step 6: grad_norm is nan; .*last good checkpoint is step 4'
                     '|step 6: loss is nan; .*last good checkpoint is step 4'):
    train.train(short, tmp_path)
  plan = make_plan(short)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  assert checkpoints.steps() == [4]
  state, _ = checkpoints.restore(plan.state_shape)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))


def test_another_config_is_refused_and_named(short, tmp_path):
  train.train(short, tmp_path)
  short.optim.lr = 0.5
  with pytest.raises(UserError, match=r'another config \(optim.lr: 0.002 -> 0.5\).*--force'):
    train.train(short, tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['optim']['lr'] == 0.002
  short.steps = '5 steps'
  train.train(short, tmp_path, force=True)
  assert lines(tmp_path)[-1]['step'] == 5


def test_starts_from_another_run(short, tmp_path):
  train.train(short, tmp_path / 'a')
  short.init_from = str(tmp_path / 'a')
  short.optim.lr = 0.
  train.train(short, tmp_path / 'b')
  plan = make_plan(short)
  read = lambda name: checkpoint.Checkpoints(
      tmp_path / name / 'checkpoints').restore_params(plan.params_shape)[0]
  before, after = read('a'), read('b')
  assert np.any(before.pop('head')['kernel']) and not np.any(after.pop('head')['kernel'])
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize('path, match', [('/no/such/file.npz', 'no such file'),
                                         (__file__, 'not a .npz')])
def test_bad_init_from(short, tmp_path, path, match):
  short.init_from = path
  with pytest.raises(UserError, match=match):
    train.train(short, tmp_path)


def test_reuse_batch(short, tmp_path):
  short.data.reuse_batch = True
  short.steps = '12 steps'
  short.log_every = '1'
  train.train(short, tmp_path)
  losses = [line['train/loss'] for line in lines(tmp_path)]
  assert losses[-1] < losses[0] - 0.1


def test_the_step_compiles_once_in_a_run(short, tmp_path, monkeypatch):
  plans = []
  monkeypatch.setattr(
      train, 'make_plan', lambda c, **kw: plans.append(make_plan(c, **kw)) or plans[-1])
  short.steps = '7 steps'
  train.train(short, tmp_path)
  assert plans[0].train_step._cache_size() == 1


def test_fake_devices_take_one_step_at_a_time(short, tmp_path, monkeypatch):
  idle = []

  def plan_of(config, **kwargs):
    plan = make_plan(config, **kwargs)

    def watched(state, batch):
      idle.append(all(leaf.is_ready() for leaf in jax.tree.leaves(state)))
      return plan.train_step(state, batch)
    return dataclasses.replace(plan, train_step=watched)
  monkeypatch.setattr(train, 'make_plan', plan_of)
  short.steps = '12 steps'
  train.train(short, tmp_path)
  assert len(idle) == 12 and all(idle[2:])


def test_the_window_sums_in_any_number_of_pieces():
  rng = np.random.default_rng(0)
  steps = [{'loss': (np.float32(a), np.float32(b))} for a, b in rng.uniform(.1, 3, (7, 2))]
  whole = metrics.Window()
  for i, m in enumerate(steps):
    whole.add(i, m)
  first = metrics.Window()
  for i, m in enumerate(steps[:3]):
    first.add(i, m)
  second = metrics.Window(json.loads(json.dumps(first.sums())))
  for i, m in enumerate(steps[3:]):
    second.add(i, m)
  mean = whole.flush()
  assert mean == second.flush()
  totals, weights = zip(*(m['loss'] for m in steps))
  np.testing.assert_allclose(mean['loss'], np.sum(totals) / np.sum(weights), rtol=1e-6)


def test_the_window_names_the_step_that_was_not_finite():
  window = metrics.Window()
  window.add(7, {'loss': (np.float32('nan'), np.float32(1))})
  with pytest.raises(RunFailed, match='step 7: loss is nan'):
    window.sums()


def test_what_a_checkpoint_got_of_a_window_no_later_step_changes():
  # It is written in the background, perhaps after the next step was summed.
  window = metrics.Window()
  window.add(1, {'loss': (np.float32(3), np.float32(1))})
  saved = window.sums()
  window.add(2, {'loss': (np.float32(5), np.float32(1))})
  assert window.flush() == {'loss': 4.}
  assert saved == {'loss': [3., 1.]}
