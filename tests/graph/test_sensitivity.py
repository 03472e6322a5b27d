import json
import pathlib
import types

import matplotlib.figure
import numpy as np
import pytest

from core import sweep
from graph import sensitivity

CONFIG = '''
import ml_collections
def get_config(arg=''):
  config = ml_collections.ConfigDict(dict(steps=arg or '5 epochs', seed=0))
  config.model = dict(length=100, dim=128, window=7)
  return config
'''
MEASURES = ('classification/author/macro_f1@50%', 'clustering/author/nmi',
            'classification/venue/macro_f1@50%')


@pytest.fixture
def config(tmp_path):
  (tmp_path / 'config.py').write_text(CONFIG)
  return str(tmp_path / 'config.py')


@pytest.fixture
def runs(monkeypatch):
  """Commands that would have been started; F1 is dim / 1000 + seed / 100, NMI a tenth of it."""
  started = []

  def run(command):
    flags = dict(flag.removeprefix('--').split('=', 1) for flag in command[3:])
    started.append(flags)
    workdir = pathlib.Path(flags['workdir'])
    workdir.mkdir(parents=True)
    f1 = int(flags.get('config.model.dim', 128)) / 1000 + int(flags['config.seed']) / 100
    end = dict(zip(MEASURES, (f1, f1 / 10, f1 / 2)), **{
        'classification/author/macro_f1@20%': .9, 'classification/author/macro_f1_std@50%': .9,
        'clustering/author/nmi_std': .9, 'clustering/author/nmi_normalised': .9})
    (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 3, **end}) + '\n')
    return types.SimpleNamespace(returncode=0)
  monkeypatch.setattr(sweep.subprocess, 'run', run)
  return started


@pytest.fixture
def panels(monkeypatch):
  """Axis label -> axes of the picture that was drawn."""
  drawn = {}
  save = matplotlib.figure.Figure.savefig

  def savefig(figure, *args, **kwargs):
    drawn.update({axes.get_xlabel(): axes for axes in figure.axes})
    drawn['legend'] = [text.get_text() for text in figure.legends[0].get_texts()]
    return save(figure, *args, **kwargs)
  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', savefig)
  return drawn


def test_one_value_at_a_time_is_another_than_the_default(runs, config, tmp_path):
  workdir = tmp_path / 'runs'
  assert not sensitivity.main([f'--config={config}', f'--workdir={workdir}',
                               '--config.model.window=3'])
  changed = [{key.removeprefix('config.'): value for key, value in flags.items()
              if key.startswith('config.') and key != 'config.seed'} for flags in runs]
  # The 5 epochs, length 100, dimension 128 and, as the flag says, window 3 are the default's.
  same = {'model.window': '3'}
  assert changed == [
      same, *({**same, 'steps': f'{n} epochs'} for n in (1, 2, 10, 20)),
      *({**same, 'model.length': str(n)} for n in (20, 40, 60, 80, 150, 200)),
      *({**same, 'model.dim': str(n)} for n in (16, 32, 64, 256)),
      *({'model.window': str(n)} for n in (1, 5, 7, 9, 11, 15))]
  rows = (workdir / 'table.md').read_text().splitlines()
  assert rows[0] == f'| variant | {" | ".join(MEASURES)} |'
  assert len(rows) == 2 + 1 + 4 + 6 + 4 + 6


def test_lines_are_means_and_the_default_is_a_point_of_every_panel(runs, panels, config, tmp_path):
  assert not sensitivity.main([f'--config={config}', f'--workdir={tmp_path / "runs"}', '--seeds=2',
                               '--only=dim256,default,dim16,walks1'])
  assert list(panels) == ['walks a start', 'walk length', 'dimensions', 'window', 'legend']
  assert panels['legend'] == ['author Macro-F1', 'venue Macro-F1', 'author NMI']
  lines = {(line.get_color(), line.get_linestyle()): line for line in panels['dimensions'].lines
           if len(line.get_xdata()) == 3}
  # Two seeds: the first's value + .005.
  for style, values in ((('C0', '-'), [.021, .133, .261]), (('C1', '-'), [.0105, .0665, .1305]),
                        (('C0', '--'), [.0021, .0133, .0261])):
    np.testing.assert_array_equal(lines[style].get_xdata(), [16, 128, 256])
    np.testing.assert_allclose(lines[style].get_ydata(), values)
  seeds = [sorted(np.round(line.get_ydata(), 6)) for line in panels['dimensions'].lines
           if line.get_marker() == '.']
  assert [.256, .266] in seeds and len(seeds) == 6
  for name, value in (('walks a start', 5), ('walk length', 100), ('dimensions', 128),
                      ('window', 7)):
    assert [value, value] in [list(line.get_xdata()) for line in panels[name].lines
                              if line.get_color() == 'black']
  assert [text.get_text() for text in panels['walks a start'].get_xticklabels()] == ['1', '5']
  assert (tmp_path / 'runs' / 'sensitivity.png').stat().st_size > 3000


def test_steps_that_are_no_epochs_have_no_place_among_the_walks(runs, panels, config, tmp_path):
  assert sensitivity.defaults(config, ['--config.steps=40 steps']) == {
      'length': 100, 'dim': 128, 'window': 7}
  assert not sensitivity.main([f'--config={config}:40 steps', f'--workdir={tmp_path / "runs"}',
                               '--only=default,walks5'])
  assert len(panels['walks a start'].lines[0].get_xdata()) == 1
  assert not [line for line in panels['walks a start'].lines if line.get_color() == 'black']


@pytest.mark.parametrize('steps, walks', [('10 epochs', 10), (' 1e1epoch ', 10), ('.5 Epochs', .5)])
def test_walks_a_start_are_the_epochs(config, steps, walks):
  assert sensitivity.defaults(config, [f'--config.steps={steps}'])['walks'] == walks


def test_only_what_was_run_has_a_panel(runs, panels, config, tmp_path):
  assert not sensitivity.main([f'--config={config}', f'--workdir={tmp_path / "runs"}',
                               '--only=dim64'])
  assert list(panels) == ['dimensions', 'legend']


@pytest.mark.parametrize('more, words', [
    (['--config=nowhere.py'], '--config=nowhere.py: no such file'),
    (['--config=configs/vit.py'], 'no config.model.length to change'),
    (['--config.model.dmi=3'], 'dmi'), (['--config.model.dim=many'], 'many'),
    (['--config.steps=1.2.3 epochs'], '1.2.3'), (['--only=dim128'], "unknown name 'dim128'")])
def test_what_cannot_be_done_is_said_in_a_line(runs, config, tmp_path, capsys, more, words):
  assert sensitivity.main([f'--config={config}', f'--workdir={tmp_path / "runs"}', *more]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count('\n') == 1 and not runs
