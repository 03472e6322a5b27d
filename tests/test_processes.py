"""Several processes under jax.distributed on loopback, through the command line."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import jax
import pytest

from core import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARGS = ('--config=configs/vit.py:smoke', '--config.steps=12', '--config.log_every=3',
        '--config.eval.every=6', '--config.checkpoint.every=4', '--config.checkpoint.keep=9',
        '--config.model.dropout_rate=0.1')

pytestmark = pytest.mark.slow


def launch(args, processes, devices=1):
  """Starts `main` in so many processes of so many CPU devices each."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  started = []
  for index in range(processes):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_HEARTBEAT_TIMEOUT_SECONDS': '10',
           'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
    if processes > 1:
      env.update(JAX_COORDINATOR_ADDRESS=f'localhost:{port}', JAX_NUM_PROCESSES=str(processes),
                 JAX_PROCESS_ID=str(index))
    started.append(subprocess.Popen([sys.executable, '-m', 'main', *args], cwd=ROOT, env=env,
                                    text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
  return started


def finish(started, timeout=180):
  outputs = [p.communicate(timeout=timeout)[0] for p in started]
  assert [p.returncode for p in started] == [0] * len(started), '\n'.join(outputs)[-4000:]
  return outputs


def timeless(workdir):
  return [{k: v for k, v in line.items() if not k.startswith('time/')}
          for line in metrics.read(workdir / 'metrics.jsonl')]


def checkpoint(workdir, step):
  checkpointer = ocp.PyTreeCheckpointer()
  path = workdir / 'checkpoints' / str(step) / 'state'
  # As numpy: it may have been saved on devices that this process does not have.
  tree = checkpointer.metadata(path).item_metadata.tree
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  return [np.asarray(x) for x in jax.tree.leaves(checkpointer.restore(path, restore_args=args))]


def assert_same(a, b, step):
  assert [line['step'] for line in timeless(a)] == [line['step'] for line in timeless(b)]
  for x, y in zip(timeless(a), timeless(b)):
    assert x.keys() == y.keys()
    np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-5)
  for x, y in zip(checkpoint(a, step), checkpoint(b, step)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('rules', ['dp', 'fsdp'])
def test_two_processes_are_one(tmp_path, rules):
  """Same metrics and checkpoint; then one process resumes what two have begun."""
  args = (*ARGS, f'--config.rules={rules}')
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(launch((*args, f'--workdir={one}'), 1, devices=2))
  outputs = finish(launch((*args, f'--workdir={two}'), 2))
  assert '2 process(es)' in outputs[0] and 'train 3/12' not in outputs[1]
  assert_same(one, two, 12)
  # Back to step 8, as after a kill, and on in one process.
  (two / 'checkpoints' / '12').rename(tmp_path / 'gone')
  outputs = finish(launch((*args, f'--workdir={two}'), 1, devices=2))
  assert 'resumed at step 8' in outputs[0]
  assert_same(one, two, 12)


def test_the_first_process_prepares_what_both_read(tmp_path):
  """A palette is fitted once; two processes train and evaluate with it as one does."""
  args = ('--config=configs/image_gpt.py:smoke', '--config.data.channels=3')
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(launch((*args, f'--workdir={one}'), 1, devices=2))
  finish(launch((*args, f'--workdir={two}'), 2))
  np.testing.assert_array_equal(np.load(one / 'palette.npy'), np.load(two / 'palette.npy'))
  assert_same(one, two, 4)
  assert (two / 'pictures' / 'completions.png').exists()


def test_two_processes_train_on_the_same_buckets(tmp_path):
  """One vocabulary, batches of several shapes, translations gathered from both."""
  args = ('--config=configs/transformer.py:smoke',)
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(launch((*args, f'--workdir={one}'), 1, devices=2))
  finish(launch((*args, f'--workdir={two}'), 2))
  for name in ('vocabulary.json', 'translations/test.txt'):
    assert (one / name).read_text() == (two / name).read_text()
  assert_same(one, two, 4)


def _wait_for(path, step, started):
  end = time.monotonic() + 120
  while time.monotonic() < end and all(p.poll() is None for p in started):
    if path.exists() and any(line['step'] >= step for line in metrics.read(path)):
      return
    time.sleep(0.05)
  raise AssertionError('\n'.join(p.communicate()[0][-3000:] for p in started))


@pytest.mark.parametrize('victim', [0, 1])
def test_the_death_of_one_ends_the_other(tmp_path, victim):
  started = launch((*ARGS, f'--workdir={tmp_path}', '--config.steps=1000000',
                    '--config.eval.every=1000000', '--config.checkpoint.every=1000000'), 2)
  _wait_for(tmp_path / 'metrics.jsonl', 30, started)
  started[victim].send_signal(signal.SIGKILL)
  began = time.monotonic()
  started[1 - victim].communicate(timeout=60)
  assert started[1 - victim].returncode not in (0, None)
  assert time.monotonic() - began < 60


def test_sigterm_to_one_stops_both_at_one_step(tmp_path):
  started = launch((*ARGS, f'--workdir={tmp_path}', '--config.steps=1000000',
                    '--config.eval.every=1000000', '--config.checkpoint.every=1000000'), 2)
  _wait_for(tmp_path / 'metrics.jsonl', 30, started)
  started[1].send_signal(signal.SIGTERM)
  outputs = finish(started)
  step = int(outputs[0].split('stopped by a signal; saved step ')[1].split()[0])
  assert (tmp_path / 'checkpoints' / str(step)).is_dir()
