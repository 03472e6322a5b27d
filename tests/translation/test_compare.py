import json

import pytest

from translation import compare


@pytest.fixture
def runs(tmp_path):
  """Two seeds of one config and one of another, with two groups of lengths each."""
  def make(name, width, seed, bleu):
    (tmp_path / name / 'translations').mkdir(parents=True)
    (tmp_path / name / 'config.json').write_text(json.dumps({'model': width, 'seed': seed}))
    groups = [{'from': start, 'to': start + 4, 'sentences': count, 'bleu': bleu - start,
               'exact_match': .5} for start, count in ((1, 40), (6, 10), (11, 9))]
    (tmp_path / name / 'translations' / 'test.json').write_text(json.dumps(
        {'bleu': bleu, 'chrf': 50., 'exact_match': .25, 'by_source_words': groups}))
    return tmp_path / name
  return [make('small', 8, 0, 20.), make('large', 16, 0, 31.), make('small_1', 8, 1, 24.)]


def test_seeds_of_one_config_are_one_row(runs, capsys):
  assert compare.main([str(r) for r in runs]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith('| small | 2 | 22.0 (20.0 to 24.0) | 50.0 (50.0 to 50.0) | 25.0 ')
  assert lines[3] == '| large | 1 | 31.0 | 50.0 | 25.0 |'
  assert (runs[0].parent / 'test_compared.png').stat().st_size > 5000


def test_small_groups_are_not_drawn(runs, monkeypatch, tmp_path):
  drawn = []
  from matplotlib.axes import Axes
  plot = Axes.plot
  monkeypatch.setattr(Axes, 'plot', lambda self, x, y, *a, **k: (
      drawn.append((list(x), list(y))), plot(self, x, y, *a, **k))[1])
  compare.draw(compare.groups(runs, 'test'), tmp_path / 'x.png')
  assert drawn[0] == ([3.0, 8.0], [21.0, 16.0])  # the mean of both seeds; nothing of 9 sentences
  assert drawn[3] == ([3.0, 8.0], [50.0, 50.0])


def test_a_run_without_translations_is_named(runs, capsys):
  assert compare.main(['--split=test_range', str(runs[1])]) == 2
  assert 'has translated test' in capsys.readouterr().err
