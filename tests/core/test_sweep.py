import json

import pytest

from core import sweep

# Instead of the real main: writes down its flags, and measures what they say.
MAIN = '''
import json, pathlib, sys
flags = dict(flag.removeprefix('--').split('=', 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags['workdir'])
with open('started', 'a') as started:
  started.write(json.dumps(sys.argv[1:]) + '\\n')
if workdir.name in pathlib.Path('broken').read_text().split():
  sys.exit(3)
workdir.mkdir(parents=True, exist_ok=True)
depth, seed = int(flags.get('config.model.depth', 2)), int(flags['config.seed'])
lines = [{'step': 1, 'test/loss': 9.}, {'step': 2, 'train/loss': 7., 'test/loss': depth + seed},
         {'step': 3, 'train/loss': 5.}]
if seed == 1:
  lines[1]['test/late'] = .25
if flags.get('config.steps') == '1':
  lines = lines[2:]
(workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\\n' for line in lines))
'''


@pytest.fixture
def command(monkeypatch, tmp_path):
  """Runs a sweep over two depths in a folder of its own; with the pictures that it drew."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'main.py').write_text(MAIN)
  (tmp_path / 'broken').write_text('')
  drawn = []

  def run(*flags):
    of = lambda config, more: sweep.Sweep(
        {'default': {}, 'deep': {'model.depth': 5}, 'deeper': {'model.depth': 6}},
        'test/.*', lambda found, workdir: drawn.append((list(found), workdir.name)))
    return sweep.main(['--config=some.py', '--workdir=runs', *flags], 'python -m x', 'About.', of)
  run.drawn = drawn
  run.started = lambda: [json.loads(line) for line in (tmp_path / 'started').read_text().split('\n')
                         if line]
  return run


def test_variants_and_seeds_are_runs_and_the_table_has_their_ends(command, tmp_path, capsys):
  assert not command('--only=default,deep', '--seeds=2', '--config.model.depth=3')
  # What a variant changes is said last: main takes the last of two.
  assert command.started() == [
      ['--config=some.py', f'--workdir=runs/{name}-{seed}', '--config.model.depth=3', *flags,
       f'--config.seed={seed}']
      for name, flags in (('default', []), ('deep', ['--config.model.depth=5'])) for seed in (0, 1)]
  text = (tmp_path / 'runs' / 'table.md').read_text()
  assert text == ('| variant | test/loss | test/late |\n|---|---|---|\n'
                  '| default | 3.5000 (3.0000 to 4.0000) | 0.2500 |\n'
                  '| deep | 5.5000 (5.0000 to 6.0000) | 0.2500 |\n')
  assert text in capsys.readouterr().out
  # The last line that has a measure, whole.
  assert json.loads((tmp_path / 'runs' / 'table.json').read_text())['deep'] == [
      {'step': 2, 'train/loss': 7., 'test/loss': 5},
      {'step': 2, 'train/loss': 7., 'test/loss': 6, 'test/late': .25}]
  assert command.drawn == [(['default', 'deep'], 'runs')]


def test_all_variants_by_default_and_none_twice(command):
  assert not command()
  assert not command('--only=deep,deep')
  assert [flags[1] for flags in command.started()] == [
      f'--workdir=runs/{name}-0' for name in ('default', 'deep', 'deeper', 'deep')]


def test_the_same_command_goes_on_after_a_failed_run(command, tmp_path, capsys):
  (tmp_path / 'broken').write_text('deep-0')
  assert command() == 1
  assert capsys.readouterr().err == 'error: runs/deep-0 ended with exit code 3\n'
  assert not (tmp_path / 'runs' / 'table.md').exists() and not command.drawn
  (tmp_path / 'broken').write_text('')
  assert not command()
  assert len((tmp_path / 'runs' / 'table.md').read_text().splitlines()) == 5


@pytest.mark.parametrize('flags, code, words', [
    (['--only=defualt'], 2, "did you mean 'default'"), (['--only='], 2, 'valid: default, deep'),
    (['--confg.steps=3'], 2, "unexpected argument '--confg.steps=3'"),
    (['--config.steps', '3'], 2, "unexpected argument '3'"),
    (['--seeds=0'], 2, 'at least 1'),
    (['--config.steps=1'], 1, 'runs/default-0 has not been measured (no test/.* in')])
def test_what_cannot_be_done_is_said_in_a_line(command, tmp_path, capsys, flags, code, words):
  assert command(*flags) == code
  error = capsys.readouterr().err
  assert words in error and error.count('\n') == 1
  assert (tmp_path / 'started').exists() == (code == 1)


def test_a_value_that_only_some_runs_have_is_left_out_of_a_cell():
  some = sweep.Sweep({}, 'a|b', picture=None)
  assert some.table({'x': [{'a': 1., 'ab': 2.}], 'y': [{'b': 1., 'a': 2.}, {'a': 3.}]}) == (
      '| variant | a | b |\n|---|---|---|\n'
      '| x | 1.0000 | - |\n| y | 2.5000 (2.0000 to 3.0000) | 1.0000 |\n')
