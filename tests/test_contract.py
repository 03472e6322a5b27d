"""What every paper's config and task must do; runs over every file in configs/."""

import functools
import importlib
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import pytest
from flax import linen as nn

from core import checkpoint, config as config_lib, metrics, task as task_lib, train
from core.data import devices, pipeline
from core.plan import make_plan


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
  """Makes a workdir in which the smoke config of a paper is prepared, once for all tests."""
  @functools.cache
  def make(paper):
    workdir = tmp_path_factory.mktemp(paper)
    make_plan(importlib.import_module(f'configs.{paper}').get_config('smoke'),
              workdir=workdir).prepare()
    return workdir
  return make


def _first_batch(plan):
  """(bucket, batch, rows of it that this process has)."""
  sizes = [spec['mask'].shape[0] for spec in plan.specs]
  rows = [devices.process_rows(plan.batch_sharding['mask'], size) for size in sizes]
  stream = pipeline.bucket_stream(
      plan.task.dataset('train'), functools.partial(plan.task.transform, train=True),
      batch_sizes=sizes, rows=rows, seed=plan.config.seed)
  bucket, batch = next(stream)
  stream.close()
  return bucket, batch, rows[bucket]


def test_top_level_keys_are_the_same_everywhere(paper):
  module = importlib.import_module(f'configs.{paper}')
  for arg in ('', 'smoke', *module.PARAMETERS):
    config_lib.validate(module.get_config(arg))


def test_specs_are_what_the_pipeline_gives(paper, smoke, prepared):
  plan = make_plan(smoke(paper), workdir=prepared(paper))
  bucket, batch, _ = _first_batch(plan)
  pipeline.check_against_spec(batch, plan.specs[bucket])
  assert len(batch['mask']) == plan.specs[bucket]['mask'].shape[0]
  # What mode compile compiles is one of the shapes that training has.
  assert plan.task.batch_spec(plan.config.batch_size) in plan.specs


def test_loss_falls_when_one_batch_is_memorised(smoke, prepared):
  _memorise('vit', smoke, prepared)


@pytest.mark.slow
def test_so_does_every_paper_s_loss(paper, smoke, prepared):
  _memorise(paper, smoke, prepared)


def _memorise(paper, smoke, prepared) -> None:
  config = smoke(paper)
  config.steps = '40 steps'
  config.optim.lr = max(config.optim.lr, 3e-3)
  config.optim.schedule.name = 'constant'
  plan = make_plan(config, workdir=prepared(paper))
  _, batch, rows = _first_batch(plan)
  batch = devices.to_device(batch, plan.batch_sharding, len(batch['mask']), rows)
  batch |= plan.resident()
  state = plan.init(jax.random.key(0))
  losses = []
  for _ in range(plan.steps):
    state, found = plan.train_step(state, batch)
    total, weight = found['loss']
    losses.append(float(total) / float(weight))
  assert losses[-1] < 0.7 * losses[0], losses
  assert plan.train_step._cache_size() == 1, 'the step compiled more than once'


def _state(workdir: pathlib.Path, config):
  plan = make_plan(config)
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints')
  state, _ = checkpoints.restore(plan.state_shape)
  checkpoints.close()
  return jax.device_get(state)


def _timeless(workdir: pathlib.Path):
  return [{k: v for k, v in line.items() if not k.startswith('time/')}
          for line in metrics.read(workdir / 'metrics.jsonl')]


def test_resumed_run_is_bitwise_the_unbroken_one(smoke, tmp_path):
  _resume(smoke('vit'), tmp_path)


@pytest.mark.slow
def test_so_is_every_paper_s(paper, smoke, tmp_path):
  _resume(smoke(paper), tmp_path)


def _resume(config, tmp_path: pathlib.Path) -> None:
  """Also runs every evaluator, and resumes in the middle of a logging window."""
  config.log_every = '3 steps'
  config.checkpoint.keep = 5
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  train.train(config, whole)
  assert _state(whole, config).step == 4
  # The broken run died after step 3 was logged, and its newest checkpoint is step 2.
  broken.mkdir()
  shutil.copy(whole / 'config.json', broken)
  shutil.copytree(whole / 'checkpoints' / '2', broken / 'checkpoints' / '2')
  lines = (whole / 'metrics.jsonl').read_text().splitlines()
  (broken / 'metrics.jsonl').write_text(lines[0] + '\n' + lines[1][:20])
  train.train(config, broken)
  chex.assert_trees_all_equal(_state(whole, config), _state(broken, config))
  assert _timeless(whole) == _timeless(broken)
  names = {k for line in _timeless(whole) for k in line}
  plan = make_plan(config)
  silent = [name for name in plan.task.evaluators()
            if not any(k.startswith(f'{name}/') for k in names)]
  drawn = {p.stem for p in (whole / 'pictures').glob('*.png')} - {'learning_curves'}
  assert len(drawn) >= len(silent), f'{silent} measured nothing, and drawn were only {drawn}'


def test_published_parameter_counts(paper):
  module = importlib.import_module(f'configs.{paper}')
  assert module.PARAMETERS, 'a paper has published sizes'
  for arg, expected in module.PARAMETERS.items():
    task = task_lib.load(module.get_config(arg))
    shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    count = task_lib.parameter_count(task, shapes)
    assert count == expected, f'{arg}: {count:,} parameters, published {expected:,}'


def test_task_opens_no_file_when_made(paper, monkeypatch):
  module = importlib.import_module(f'configs.{paper}')
  config = module.get_config('')
  config.data.data_dir = '/nowhere'
  monkeypatch.setenv('TFDS_DATA_DIR', '/nowhere')
  task_lib.load(config).batch_spec(2)
  assert not pathlib.Path('/nowhere').exists()


def test_a_config_imports_no_jax(paper):
  """Mode compile must set JAX's environment first, and the config comes before the mode."""
  code = f"import sys, configs.{paper} as c; c.get_config(''); sys.exit('jax' in sys.modules)"
  root = pathlib.Path(__file__).resolve().parent.parent
  assert subprocess.run([sys.executable, '-c', code], cwd=root).returncode == 0
