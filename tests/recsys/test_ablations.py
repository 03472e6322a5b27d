import json
import pathlib
import types

import pytest

from configs import bert4rec
from core import task as task_lib
from recsys import ablations


@pytest.fixture
def runs(monkeypatch):
  """Commands that would have been started; each leaves a line of metrics instead."""
  started = []

  def run(command):
    flags = dict(flag.removeprefix('--').split('=', 1) for flag in command[3:])
    started.append(flags)
    workdir = pathlib.Path(flags['workdir'])
    workdir.mkdir(parents=True)
    value = .1 * (1 + int(flags['config.seed'])) - .05 * (
        flags.get('config.model.positions') == 'False')
    lines = [{'step': 1, 'validation/unseen/HR@10': 1.},
             {'step': 2, **{f'test/{name}': value for name in ablations._SHOWN}}]
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return types.SimpleNamespace(returncode=flags.get('config.steps') == '0')
  monkeypatch.setattr(ablations.subprocess, 'run', run)
  return started


def test_variants_are_runs_and_the_table_has_their_ends(runs, tmp_path, capsys):
  workdir = tmp_path / 'runs'
  assert not ablations.main(['--config=configs/bert4rec.py', f'--workdir={workdir}', '--seeds=2',
                             '--only=default,no_positions', '--config.steps=5'])
  assert [run['workdir'] for run in runs] == [
      str(workdir / name) for name in ('default-0', 'default-1', 'no_positions-0',
                                       'no_positions-1')]
  assert runs[2]['config.model.positions'] == 'False' and runs[2]['config.steps'] == '5'
  rows = (workdir / 'table.md').read_text().splitlines()
  assert rows[2].startswith('| default | 0.1500 (0.1000 to 0.2000) |')
  assert rows[3].startswith('| no_positions | 0.1000 (0.0500 to 0.1500) |')
  assert rows[3] in capsys.readouterr().out
  assert json.loads((workdir / 'table.json').read_text())['default'][1]['test/unseen/HR@10'] == .2
  assert (workdir / 'ablations.png').stat().st_size > 3000


@pytest.mark.parametrize('flags, code, words', [
    (['--only=defualt'], 2, "did you mean 'default'"), (['--confg.steps=3'], 2, 'unexpected'),
    (['--only=default', '--config.steps=0'], 1, 'default-0 ended with exit code')])
def test_what_cannot_be_done_is_said_in_a_line(runs, tmp_path, capsys, flags, code, words):
  assert ablations.main(['--config=x', f'--workdir={tmp_path / "runs"}', *flags]) == code
  error = capsys.readouterr().err
  assert words in error and error.count('\n') == 1


def test_a_run_that_was_stopped_is_not_taken_for_a_finished_one(monkeypatch, tmp_path):
  (tmp_path / 'default-0').mkdir()
  (tmp_path / 'default-0' / 'metrics.jsonl').write_text('{"step": 1}\n')
  monkeypatch.setattr(ablations.subprocess, 'run', lambda c: types.SimpleNamespace(returncode=0))
  with pytest.raises(ablations.RunFailed, match='was it stopped'):
    ablations.run('x', tmp_path, ['default'], 1, [])


@pytest.mark.parametrize('name', ablations.VARIANTS)
def test_every_variant_is_a_model(name):
  config = bert4rec.get_config('beauty')
  config.model.update(ablations.VARIANTS[name])
  task = task_lib.load(config)
  assert task.model.width % task.model.heads == 0
  if name == 'width256':
    assert (task.model.width, task.model.heads) == (256, 8)
