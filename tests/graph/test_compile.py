"""The step compiled for a slice that is not here: AMiner's tables, by rows over four chips."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.tpu
def test_no_chip_has_a_table_or_the_gradient_of_one(tmp_path):
  pytest.importorskip('libtpu')
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  done = subprocess.run(
      [sys.executable, '-m', 'main', '--config=configs/metapath2vec.py:aminer', '--mode=compile',
       '--topology=v5e:2x2', f'--workdir={tmp_path}', '--config.model.walks_per_update=64',
       '--config.model.shared_negatives=16', '--config.model.length=16',
       '--config.batch_size=4'], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  report = json.loads((tmp_path / 'compile.json').read_text())
  memory, rows = report['gib_per_chip'], 4_892_672
  table = rows * 128 * 4 / 2 ** 30
  # A quarter of both tables and of the counts, and the graph with its noise, whole.
  graph = 2 * (9_323_739 + 3_194_405) + 2 * 3_194_405 + 1_693_531 + 3_883 + 4 + 2 * 4_891_819
  expected = (2 * table + rows * 4 / 2 ** 30) / 4 + graph * 4 / 2 ** 30
  assert memory['arguments'] == pytest.approx(expected, rel=.02)
  assert memory['temporaries'] < table / 10
  # What travels is rows of an update (1,024 tokens and as many negatives, twice), never a table.
  sent = sum(found['bytes'] for found in report['collectives'].values())
  assert 0 < sent < 2 ** 30 * table / 10
