"""Ahead-of-time compilation, through the command line; needs libtpu, not a TPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from core import compile as compile_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(workdir, *args, code=0):
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  done = subprocess.run(
      [sys.executable, '-m', 'main', '--config=configs/vit.py:smoke', f'--workdir={workdir}',
       '--mode=compile', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == code, done.stdout + done.stderr[-3000:]
  return done, json.loads((workdir / 'compile.json').read_text())


@pytest.mark.tpu
@pytest.mark.parametrize('rules', ['dp', 'fsdp', 'fsdp_tp'])
def test_a_small_config_compiles_for_a_slice(tmp_path, rules):
  pytest.importorskip('libtpu')
  done, report = run(tmp_path, '--topology=v5e:2x2', f'--config.rules={rules}')
  assert report['chips'] == 4 and report['params'] == 15_370 and report['fits']
  memory = report['gib_per_chip']
  assert memory['limit'] == pytest.approx(15.748, abs=.001)
  assert 0 < memory['arguments'] < memory['total'] < memory['limit']
  assert report['collectives']['all-reduce']['count'] > 0
  # Eight images of 5 tokens: embedding, one block of width 32 and MLP 128, head; forward and
  # backward, where the embedding needs no gradient of the pixels.
  tokens, width = 5, 32
  block = 4 * tokens * width ** 2 + 2 * tokens ** 2 * width + 2 * tokens * width * 128
  expected = 2 * 8 * (3 * (block + width * 10) + 2 * 4 * 64 * width)
  assert report['flops_per_step'] == pytest.approx(expected, rel=.02)
  assert 'GiB per chip' in done.stdout and 'fits' in done.stdout


@pytest.mark.tpu
def test_what_does_not_fit_says_by_how_much_and_what_to_turn(tmp_path):
  pytest.importorskip('libtpu')
  done, report = run(tmp_path, '--topology=v5e:1x1', '--config.batch_size=65536',
                     '--config.model.variant=B', code=1)
  assert not report['fits']
  line = [l for l in done.stderr.splitlines() if l.startswith('error: ')]
  assert len(line) == 1 and 'GiB too much' in line[0]
  for knob in ('remat', 'accum', 'rules', 'batch_size'):
    assert f'config.{knob}' in line[0]
  over = report['gib_per_chip']['total'] - report['gib_per_chip']['limit']
  assert over > 1 and f'{over:.2f} GiB too much' in line[0]


def test_the_description_reads_for_people():
  text = compile_lib.describe({
      'task': 'a.b', 'topology': 'v5e:4x4', 'chips': 16, 'mesh': {'data': 16}, 'rules': 'dp',
      'batch_size': 32, 'params': 1234567, 'flops_per_step': 2e15, 'seconds_per_step_at_peak': .25,
      'gib_per_chip': {'total': 20.5, 'limit': 15.75}, 'collectives': None, 'fits': False,
      'compile_seconds': 3.})
  assert '1,234,567' in text and 'DOES NOT FIT' in text and '250.0 ms' in text
