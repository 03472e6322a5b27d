import logging
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from core import checkpoint
from core.config import UserError
from core.plan import make_plan


@pytest.fixture
def saved(smoke, tmp_path):
  """Checkpoints 1 and 2 of a small run, kept open by nobody."""
  plan = make_plan(smoke())
  state = plan.init(jax.random.key(0))
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', plan.config.checkpoint)
  for step in (1, 2):
    state = state.replace(step=jnp.int32(step),
                          params=jax.tree.map(lambda p: p + step, state.params))
    checkpoints.save(step, state, {'window': {'loss': [0.1 + step, 3.0]}})
  checkpoints.wait()
  checkpoints.close()
  return plan, jax.device_get(state), tmp_path / 'checkpoints'


def _reopen(plan, directory):
  return checkpoint.Checkpoints(directory, plan.config.checkpoint)


def test_round_trip(saved):
  plan, state, directory = saved
  found, extra = _reopen(plan, directory).restore(plan.state_shape)
  chex.assert_trees_all_equal(jax.device_get(found), state)
  assert extra == {'window': {'loss': [2.1, 3.0]}}


@pytest.mark.parametrize('rules, mesh', [('fsdp', {}), ('fsdp_tp', {}), ('fsdp', {'data': 2})])
def test_restores_onto_another_mesh(saved, smoke, rules, mesh):
  _, state, directory = saved
  config = smoke()
  config.rules = rules
  config.mesh.update(mesh)
  plan = make_plan(config)
  found, _ = _reopen(plan, directory).restore(plan.state_shape)
  chex.assert_trees_all_equal(jax.device_get(found), state)
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, found), plan.state_sharding)


def test_reading_leaves_the_log_as_it_was(saved):
  _, _, directory = saved
  logger = logging.getLogger('absl')
  before = logger.level
  logger.setLevel(logging.NOTSET)
  try:
    checkpoint.Checkpoints(directory).close()
    assert logger.level == logging.NOTSET
  finally:
    logger.setLevel(before)


def _files(directory, step):
  return sorted(p for p in (directory / str(step)).rglob('*') if p.is_file())


def test_a_damaged_newest_checkpoint_is_skipped(saved, caplog):
  """Every file of the newest checkpoint in turn: it is read whole, or the one before is used."""
  plan, state, directory = saved
  skipped = 0
  for number, file in enumerate(_files(directory, 2)):
    damage = ('half', 'gone', 'half', 'empty')[number % 4]
    copy = directory.parent / 'copy' / 'checkpoints'
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(directory, copy)
    victim = copy / file.relative_to(directory)
    if damage == 'gone':
      victim.unlink()
    else:
      victim.write_bytes(victim.read_bytes()[:victim.stat().st_size // 2] if damage == 'half'
                         else b'')
    caplog.clear()
    found, extra = _reopen(plan, copy).restore(plan.state_shape)
    if int(found.step) == 2:
      chex.assert_trees_all_equal(jax.device_get(found), state)
      assert extra['window']['loss'][0] == 2.1
    else:
      skipped += 1
      assert int(found.step) == 1
      assert extra['window']['loss'][0] == 1.1
      assert 'cannot be read' in caplog.text
      assert not (copy / '2').exists(), 'the name is free for the run to save step 2 again'
      assert any((copy.parent / 'unreadable').iterdir()), 'and nothing was deleted'
  assert skipped >= 4


def test_an_unfinished_save_is_not_a_checkpoint(saved):
  plan, _, directory = saved
  shutil.copytree(directory / '2', directory / '3.orbax-checkpoint-tmp-12')
  assert _reopen(plan, directory).steps() == [1, 2]


def test_only_damaged_checkpoints_is_an_error(saved):
  plan, _, directory = saved
  for step in (1, 2):
    (directory / str(step) / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with pytest.raises(UserError, match=r'none of the checkpoints \[2, 1\] can be read'):
    _reopen(plan, directory).restore(plan.state_shape)


def test_another_model_is_named(saved, smoke):
  _, _, directory = saved
  config = smoke()
  config.model.patch_size = 4
  plan = make_plan(config)
  for restore in (lambda c: c.restore(plan.state_shape),
                  lambda c: c.restore_params(plan.params_shape)):
    with pytest.raises(UserError, match=r'another model: .*pos_embedding: \(1, 5, 32\) there, '
                                        r'\(1, 17, 32\) in the model.*embedding/kernel'):
      restore(_reopen(plan, directory))
  assert (directory / '2').exists()


def test_params_alone_prefer_the_average(smoke, tmp_path):
  config = smoke()
  config.ema = 0.5
  plan = make_plan(config)
  state = plan.init(jax.random.key(0))
  state = state.replace(ema=jax.tree.map(lambda p: p + 1, state.params))
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', config.checkpoint)
  checkpoints.save(7, state, {'window': {}})
  checkpoints.wait()
  params, step = checkpoints.restore_params(plan.params_shape)
  assert step == 7
  chex.assert_trees_all_equal(params, state.ema)
  checkpoints.close()


def test_the_mean_of_the_newest(saved):
  plan, state, directory = saved
  # Parameters of step 2 are those of step 1 plus 2.
  params, step = _reopen(plan, directory).restore_params(plan.params_shape, average=2)
  assert step == 2
  chex.assert_trees_all_close(params, jax.tree.map(lambda p: p - 1, state.params), atol=1e-6)
  with pytest.raises(UserError, match=r'average=3, but .* holds the checkpoints \[1, 2\]'):
    _reopen(plan, directory).restore_params(plan.params_shape, average=3)
  (directory / '1' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with pytest.raises(UserError, match='checkpoint 1 in .* cannot be read'):
    _reopen(plan, directory).restore_params(plan.params_shape, average=2)


def test_keeps_the_last_and_the_best(smoke, tmp_path):
  config = smoke()
  config.checkpoint.keep = 2
  config.checkpoint.best = 'validation/accuracy'
  plan = make_plan(config)
  state = plan.init(jax.random.key(0))
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', config.checkpoint)
  for step, accuracy in enumerate([.2, .9, .3, .4, .5], 1):
    checkpoints.save(step, state, {'window': {}}, {'validation/accuracy': accuracy})
    checkpoints.wait()
  checkpoints.save(6, state, {'window': {}})  # a save without an evaluation, as on SIGTERM
  checkpoints.wait()
  assert checkpoints.steps() == [2, 5, 6]
  with pytest.raises(UserError, match='config.checkpoint.best'):
    checkpoints.save(7, state, {'window': {}}, {'test/accuracy': .1})
  checkpoints.close()
  # A resumed run still knows which was best.
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', config.checkpoint)
  checkpoints.save(7, state, {'window': {}}, {'validation/accuracy': .6})
  checkpoints.wait()
  assert checkpoints.steps() == [2, 6, 7] and checkpoints.best_step('validation/accuracy') == 2
  assert checkpoints.best_step('-validation/accuracy') == 7
  checkpoints.close()
