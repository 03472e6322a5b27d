import json
import pathlib
import types

import pytest

from configs import bert4rec
from core import sweep
from core import task as task_lib
from recsys import ablations


def test_variants_change_the_model_and_what_is_shown_is_of_the_test_split(
    monkeypatch, tmp_path, capsys):
  started = []

  def run(command):
    flags = dict(flag.removeprefix('--').split('=', 1) for flag in command[3:])
    started.append(flags)
    workdir = pathlib.Path(flags['workdir'])
    workdir.mkdir(parents=True)
    end = {f'{split}/{protocol}/{name}': value - .05 * ('config.model.positions' in flags)
           for split, value in (('validation', .9), ('test', .1))
           for protocol in ('unseen', 'pop100', 'all')
           for name in ('HR@1', 'HR@10', 'NDCG@10')}
    (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 2, **end}) + '\n')
    return types.SimpleNamespace(returncode=0)
  monkeypatch.setattr(sweep.subprocess, 'run', run)
  workdir = tmp_path / 'runs'
  assert not ablations.main(['--config=configs/bert4rec.py', f'--workdir={workdir}', '--seeds=2',
                             '--only=default,no_positions', '--config.steps=5'])
  assert [pathlib.Path(flags['workdir']).name for flags in started] == [
      'default-0', 'default-1', 'no_positions-0', 'no_positions-1']
  assert 'config.model.positions' not in started[0]
  assert started[2]['config.model.positions'] == 'False' and started[2]['config.steps'] == '5'
  rows = (workdir / 'table.md').read_text().splitlines()
  assert rows[0] == ('| variant | test/unseen/HR@10 | test/unseen/NDCG@10 | test/pop100/HR@10 | '
                     'test/pop100/NDCG@10 |')
  assert rows[3].startswith('| no_positions | 0.0500 (0.0500 to 0.0500) |')
  assert rows[3] in capsys.readouterr().out
  assert (workdir / 'ablations.png').stat().st_size > 3000


@pytest.mark.parametrize('name', ablations.VARIANTS)
def test_every_variant_is_a_model(name):
  config = bert4rec.get_config('beauty')
  config.model.update(ablations.VARIANTS[name])
  task = task_lib.load(config)
  assert task.model.width % task.model.heads == 0
  if name == 'width256':
    assert (task.model.width, task.model.heads) == (256, 8)
