"""The command line as a user types it, in processes of its own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from core import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = '--config=configs/vit.py:smoke'


def environment(**extra):
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return {**env, 'JAX_PLATFORMS': 'cpu', **extra}


def start(*args, **env):
  return subprocess.Popen([sys.executable, '-m', 'main', *map(str, args)], cwd=ROOT, text=True,
                          env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*args, code=0, timeout=180, **env):
  process = start(*args, **env)
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == code, f'exit {process.returncode}\n{out[-2000:]}\n{err[-4000:]}'
  return out, err


def one_line(err):
  """The single error line; nothing like a traceback around it."""
  assert 'Traceback' not in err, err
  found = [line for line in err.splitlines() if line.startswith('error: ')]
  assert len(found) == 1, err
  return found[0]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained')
  run(SMOKE, f'--workdir={workdir}')
  return workdir


def test_help_is_quick_and_imports_no_jax():
  began = time.monotonic()
  out, _ = run('--help')
  assert '--workdir' in out and 'predict' in out
  seconds = time.monotonic() - began
  code = ('import sys; sys.argv=["main", "--help"]; import main; main.main(sys.argv); '
          'assert "jax" not in sys.modules and "tensorflow_datasets" not in sys.modules')
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  assert seconds < 30  # a bound on hanging only; the benchmark measures it


def test_evaluate_reproduces_what_training_logged(trained):
  logged = metrics.read(trained / 'metrics.jsonl')[-1]
  run(SMOKE, f'--workdir={trained}', '--mode=evaluate')
  again = metrics.read(trained / 'metrics.jsonl')[-1]
  assert again == logged and again['step'] == 4 and 'test/accuracy' in again


def test_predict_an_image_and_a_folder(trained, tmp_path):
  folder = tmp_path / 'images'
  folder.mkdir()
  for name, shape in (('a.png', (40, 50, 3)), ('b.jpg', (9, 8))):
    cv2.imwrite(str(folder / name), np.random.default_rng(0).integers(0, 255, shape, np.uint8))
  run(SMOKE, f'--workdir={trained}', '--mode=predict', f'--input={folder}')
  records = json.loads((trained / 'predictions' / 'predictions.json').read_text())
  assert [pathlib.Path(r['input']).name for r in records] == ['a.png', 'b.jpg']
  for record in records:
    chances = [t['probability'] for t in record['top5']]
    assert len(chances) == 5 and chances == sorted(chances, reverse=True) and sum(chances) <= 1.001
    assert cv2.imread(str(trained / 'predictions' / record['picture'])) is not None
  run(SMOKE, f'--workdir={trained}', '--mode=predict', f'--input={folder / "a.png"}')
  (folder / 'c.png').write_bytes((folder / 'a.png').read_bytes()[:60])
  _, err = run(SMOKE, f'--workdir={trained}', '--mode=predict', f'--input={folder}', code=2)
  assert 'c.png' in one_line(err)


@pytest.mark.slow
def test_profile_window(tmp_path):
  """In a process of its own: the profiler cannot start where a TPU's compiler was loaded."""
  run(SMOKE, f'--workdir={tmp_path}', '--config.profile.first=2', '--config.profile.steps=2',
      '--config.data.splits.test=', '--config.data.splits.validation=',
      '--config.checkpoint.best=')
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_export_writes_the_public_names_and_loads_back(trained, tmp_path):
  run(SMOKE, f'--workdir={trained}', '--mode=export')
  with np.load(trained / 'export.npz', allow_pickle=False) as archive:
    names = set(archive.files)
  assert {'cls', 'embedding/kernel', 'Transformer/posembed_input/pos_embedding',
          'Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel',
          'Transformer/encoderblock_0/LayerNorm_2/scale', 'head/bias',
          'Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias'} <= names
  logged = metrics.read(trained / 'metrics.jsonl')[-1]
  run(SMOKE, f'--workdir={tmp_path}', '--mode=evaluate',
      f'--config.init_from={trained / "export.npz"}')
  again = metrics.read(tmp_path / 'metrics.jsonl')[-1]
  assert again.pop('step') == 0 and logged.pop('step') == 4
  assert again == logged


def test_inspect_and_prepare(tmp_path):
  out, _ = run(SMOKE, '--mode=inspect')
  for text in ('Transformer/encoderblock/MlpBlock_0/Dense_0/kernel', '15,370', 'sharding on mesh',
               'image: (8, 16, 16, 1) uint8', 'mask: (8,) float32', 'one element'):
    assert text in out, text
  out, _ = run(SMOKE, '--mode=prepare', f'--workdir={tmp_path}')
  assert '64 training examples' in out


@pytest.mark.parametrize('args, expected', [
    ((), '--config is missing'),
    ((SMOKE,), '--workdir is missing'),
    (('--config=configs/vti.py', '--workdir=W'), 'configs/vit.py'),
    (('--config=configs/vit.py:b17,imagenet2012', '--workdir=W'), 'b16'),
    (('--config=configs/vit.py:b16,imagenet', '--workdir=W'), 'imagenet2012'),
    ((SMOKE, '--workdir=W', '--config.batch_sise=4'), 'batch_sise'),
    ((SMOKE, '--workdir=W', '--config.optim.larning_rate=4'), 'larning_rate'),
    ((SMOKE, '--workdir=W', '--config.batch_size=four'), 'batch_size'),
    ((SMOKE, '--workdir=W', '--workdri=4'), 'workdri'),
    ((SMOKE, '--workdir=W', '--mode=tran'), 'train, prepare'),
    ((SMOKE, '--workdir=W', 'train'), "unexpected argument 'train'"),
    ((SMOKE, '--workdir=W', '--config.task=vit_family.clasification'),
     'vit_family.classification'),
    *(pytest.param((SMOKE, '--workdir=W', flag), names, marks=pytest.mark.slow)
      for flag, names in (('--config.rules=ddp', 'dp, fsdp, tp, fsdp_tp'),
                          ('--config.optim.name=adan', 'adamw'),
                          ('--config.model.variant=XL', 'Ti, S, B, L, H'))),
    ((SMOKE, '--workdir=W', '--config.steps=soon'), 'config.steps'),
    ((SMOKE, '--workdir=W', '--config.data.name=cifar10', '--config.data.data_dir=/nowhere'),
     'tfds build'),
    ((SMOKE, '--workdir=W', '--config.data.name=folder:/nowhere'), '/nowhere'),
    ((SMOKE, '--workdir=/proc/nowhere'), 'cannot be written'),
    ((SMOKE, '--workdir=W', '--mode=evaluate'), 'no checkpoint'),
    ((SMOKE, '--workdir=W', '--mode=predict'), '--input is missing'),
    ((SMOKE, '--workdir=W', '--mode=predict', '--input=/nowhere.png'), '/nowhere.png'),
    ((SMOKE, '--workdir=W', '--mode=compile', '--topology=v5e:3x5'), 'v5e:2x2'),
])
def test_bad_usage_is_one_line_and_exit_code_2(args, expected, tmp_path):
  args = [a.replace('=W', f'={tmp_path}') for a in args]
  _, err = run(*args, code=2)
  assert expected in one_line(err)


def _timeless(workdir):
  return [{k: v for k, v in line.items() if not k.startswith('time/')}
          for line in metrics.read(workdir / 'metrics.jsonl')]


def _final(workdir, step):
  """Every array of a checkpoint, bit for bit, through an export of all it holds."""
  import orbax.checkpoint as ocp  # only this test looks into a checkpoint
  import jax
  state = ocp.PyTreeCheckpointer().restore(workdir / 'checkpoints' / str(step) / 'state')
  return [np.asarray(x) for x in jax.tree.leaves(state)]


LONG = (SMOKE, '--config.steps=400', '--config.log_every=15', '--config.checkpoint.every=20',
        '--config.eval.every=100', '--config.model.dropout_rate=0.1', '--config.ema=0.9')


def _wait_for_step(workdir, step, process, timeout=120):
  path = workdir / 'metrics.jsonl'
  end = time.monotonic() + timeout
  while time.monotonic() < end and process.poll() is None:
    if path.exists() and any(line['step'] >= step for line in metrics.read(path)):
      return
    time.sleep(0.02)
  raise AssertionError(f'step {step} never came: {process.communicate()}')


@pytest.mark.slow
def test_killed_and_started_again_ends_bitwise_equal(tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  run(*LONG, f'--workdir={whole}')
  for step in (30, 135, 315):
    process = start(*LONG, f'--workdir={broken}')
    _wait_for_step(broken, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  out, _ = run(*LONG, f'--workdir={broken}')
  assert 'resumed at step' in out
  assert _timeless(whole) == _timeless(broken)
  a, b = _final(whole, 400), _final(broken, 400)
  assert len(a) == len(b) > 50
  for x, y in zip(a, b):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_0(tmp_path):
  process = start(*LONG, f'--workdir={tmp_path}', '--config.steps=100000',
                  '--config.checkpoint.every=100000', '--config.eval.every=100000')
  _wait_for_step(tmp_path, 30, process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  step = int(out.split('stopped by a signal; saved step ')[1].split()[0])
  assert (tmp_path / 'checkpoints' / str(step)).is_dir()
