"""Pictures of translation, looked at through their pixels."""

import importlib.util
import pathlib
import shutil
import warnings

import cv2
import matplotlib
import matplotlib.figure
import numpy as np
import pytest
from matplotlib import font_manager

from translation import pictures, vocabulary

SOURCE = ['▁the', '▁red', '▁house', '.', '</s>']
TARGET = ['▁das', '▁rote', '▁Haus', '</s>']


@pytest.fixture
def figures(monkeypatch):
  """The figures that were made, in order."""
  made = []

  class Kept(matplotlib.figure.Figure):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      made.append(self)
  monkeypatch.setattr(pictures, 'Figure', Kept)
  return made


@pytest.fixture
def no_fonts(monkeypatch):
  """A machine that has no font with Hangul, nor the package that brings one."""
  monkeypatch.setattr(font_manager.fontManager, 'ttflist', [])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  pictures._hangul.cache_clear()
  yield
  pictures._hangul.cache_clear()


def weights_of(maps, seed=0, shape=(len(TARGET), len(SOURCE))):
  random = np.random.default_rng(seed).gamma(.3, size=(maps, *shape)) + 1e-3
  return random / random.sum(-1, keepdims=True)


def cells(path, figure, axes, shape):
  """Greys of the middles of a panel's cells in the file: 0 is white, 1 is black."""
  image = 1 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) / 255
  rows, columns = np.mgrid[:shape[0], :shape[1]]
  places = axes.transData.transform(np.stack([columns.ravel(), rows.ravel()], axis=1))
  places *= image.shape[1] / figure.bbox.width
  across, up = places.round().astype(int).T
  return image[image.shape[0] - 1 - up, across].reshape(shape)


def test_a_cell_is_as_dark_as_its_weight(figures, tmp_path):
  path = tmp_path / 'one.png'
  weights = np.zeros((1, 4, 5))
  for target, source in enumerate((0, 3, 1, 2)):  # No symmetry: transposed or mirrored is wrong.
    weights[0, target, source] = 1
  weights[0, 3] = (0, 0, .5, .5, 0)
  pictures.alignment(path, SOURCE, TARGET, weights, [''])
  got = cells(path, figures[0], figures[0].axes[0], (4, 5))
  assert (got[:3].argmax(1) == (0, 3, 1)).all() and (got[weights[0] == 1] > .95).all()
  assert (got[weights[0] == 0] < .05).all() and (np.abs(got[3, 2:4] - .5) < .15).all()


def test_every_map_has_a_panel_and_every_piece_a_label(figures, tmp_path):
  path = tmp_path / 'maps.png'
  titles = ['mean of heads', *(f'head {h}' for h in range(8))]
  weights = weights_of(9)
  pictures.alignment(path, SOURCE, TARGET, weights, titles)
  shown = [axes for axes in figures[0].axes if axes.axison]
  assert [axes.get_title() for axes in shown] == titles
  for axes, panel in zip(shown, weights):
    assert [t.get_text() for t in axes.get_xticklabels()] == SOURCE
    assert [t.get_text() for t in axes.get_yticklabels()] == TARGET
    # A scale of its own would make an even row look like a sharp one.
    assert axes.images[0].get_clim() == (0, 1)
    got = cells(path, figures[0], axes, panel.shape)
    np.testing.assert_array_equal(got.argmax(1), panel.argmax(1))
    # Darker where there is more, over the whole panel.
    assert (np.diff(got.ravel()[panel.argsort(axis=None)]) > -.02).all()


def test_size_follows_the_sentences(tmp_path):
  sizes = []
  for target, source in ((4, 5), (4, 40), (60, 5)):
    path = tmp_path / f'{target}_{source}.png'
    pictures.alignment(path, ['a'] * source, ['b'] * target, weights_of(1, shape=(target, source)),
                       [''])
    sizes.append(cv2.imread(str(path)).shape[:2])
  small, wide, high = sizes
  assert 100 < small[0] < 400 and 100 < small[1] < 400
  # Wide enough for a word each, 35 and 56 of them more.
  assert 700 < wide[1] - small[1] < 1500 and 1200 < high[0] - small[0] < 2000
  assert wide[0] == small[0] and high[1] == small[1]


def test_long_sentences_put_their_maps_below_each_other(figures, tmp_path):
  pictures.alignment(tmp_path / 'long.png', ['a'] * 60, ['b'] * 3, weights_of(3, shape=(3, 60)),
                     ['one', 'two', 'three'])
  places = [axes.get_position() for axes in figures[0].axes]
  assert len({round(p.x0, 2) for p in places}) == 1
  assert [p.y0 for p in places] == sorted((p.y0 for p in places), reverse=True)
  assert cv2.imread(str(tmp_path / 'long.png')).shape[1] < 2500


def test_signs_are_not_taken_for_formulas(tmp_path):
  """Two dollars in one label would be a formula; no piece of ours has two."""
  text = 'costs $$ or $x^2$ \\frac{1}_% costs $$ or $x^2$ \\frac{1}_%'
  known = vocabulary.train([text] * 4, 'bpe', 60)
  signs = known.pieces(known.encode([text])[0])
  assert sum('$' in sign for sign in signs) == 8
  pictures.alignment(tmp_path / 'signs.png', signs, ['a'], weights_of(1, shape=(1, len(signs))),
                     [''])
  assert (tmp_path / 'signs.png').stat().st_size > 1000


# --- Hangul ---------------------------------------------------------------------------------------


def test_hangul_is_written_or_missed_aloud(tmp_path, caplog):
  pictures._hangul.cache_clear()
  with warnings.catch_warnings(record=True) as seen, caplog.at_level('WARNING'):
    warnings.simplefilter('always')
    pictures.alignment(tmp_path / 'ko.png', ['▁사십이', ',', '▁칠천삼'], ['▁42'],
                       weights_of(1, shape=(1, 3)), [''])
  boxes = any('missing from' in str(w.message) for w in seen)
  assert boxes == ('no font with Hangul' in caplog.text)
  assert (tmp_path / 'ko.png').stat().st_size > 1000


def test_no_font_with_hangul_is_said_once(no_fonts, caplog):
  with caplog.at_level('WARNING'):
    assert pictures.fonts('사 a') == pictures.fonts('이') == ['DejaVu Sans']
  assert caplog.text.count("pip install -e '.[translation]'") == 1


def test_the_font_of_the_extra_is_taken_from_its_folder(no_fonts, monkeypatch, tmp_path):
  """Another font under its name, so that the test needs no download; nothing is imported."""
  package = tmp_path / 'koreanize_matplotlib'
  (package / 'fonts').mkdir(parents=True)
  (package / '__init__.py').write_text('raise RuntimeError("imported")')
  data = pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
  shutil.copy(data / 'STIXGeneral.ttf', package / 'fonts' / 'NanumGothic.ttf')
  spec = importlib.util.spec_from_file_location('koreanize_matplotlib', package / '__init__.py')
  monkeypatch.setattr(importlib.util, 'find_spec',
                      lambda name: spec if name == 'koreanize_matplotlib' else None)
  assert pictures.fonts('숫자') == ['DejaVu Sans', 'STIXGeneral']
  added = font_manager.fontManager.ttflist
  assert [font.fname for font in added] == [str(package / 'fonts' / 'NanumGothic.ttf')]


def test_a_font_of_the_system_is_preferred(no_fonts, monkeypatch):
  entry = font_manager.FontEntry(fname='x.ttf', name='Malgun Gothic')
  monkeypatch.setattr(font_manager.fontManager, 'ttflist', [entry])
  assert pictures.fonts('가') == ['DejaVu Sans', 'Malgun Gothic']
  assert pictures.fonts('힣')[1:] == ['Malgun Gothic']


def test_other_scripts_need_no_font(no_fonts, caplog):
  with caplog.at_level('WARNING'):
    assert pictures.fonts('▁größe façade ▁日本') == ['DejaVu Sans']
  assert not caplog.text


# --- Quality by length ----------------------------------------------------------------------------


def test_quality_is_drawn_in_the_middle_of_its_lengths(figures, tmp_path):
  path = tmp_path / 'by_length.png'
  groups = [{'from': 1, 'to': 5, 'sentences': 30, 'bleu': 40., 'exact_match': .25},
            {'from': 6, 'to': 10, 'sentences': 7, 'bleu': 20., 'exact_match': .1},
            {'from': 21, 'to': 25, 'sentences': 1, 'bleu': 100., 'exact_match': 0.}]
  pictures.by_length(path, groups)
  axes = figures[0].axes[0]
  assert [t.get_text() for t in axes.get_legend().get_texts()] == ['BLEU', 'exact matches, %']
  bleu, exact = axes.lines
  assert list(bleu.get_xdata()) == [3, 8, 23] and list(bleu.get_ydata()) == [40, 20, 100]
  assert list(exact.get_ydata()) == [25, 10, 0]
  assert [t.get_text() for t in axes.get_xticklabels()] == ['1-5\n(30)', '6-10\n(7)', '21-25\n(1)']
  height, width = cv2.imread(str(path)).shape[:2]
  assert (width, height) == (660, 374)
  # 100 is inside of the picture.
  assert axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] > 100


def test_no_sentences_make_an_empty_picture(tmp_path):
  pictures.by_length(tmp_path / 'none.png', [])
  assert cv2.imread(str(tmp_path / 'none.png')) is not None
