import numpy as np
import pytest

from detection import attention_pictures, canvas
from tests.detection.drawn import GROUND, extent, ground, near, read

NAMES = ['cat', 'dog', 'traffic light', r'$\nope$', '']


def test_attention_is_that_of_those_who_attend_to_the_point():
  """The column: cell (1, 2) looks at cell (0, 1), which itself looks elsewhere."""
  maps = np.zeros((2, 3, 2, 3))
  maps[1, 2, 0, 1] = .75
  maps[0, 1, 1, 0] = .5
  found = attention_pictures.attention_to(maps, (3.9, 9.), 8)
  np.testing.assert_array_equal(found, [[0, 0, 0], [0, 0, .75]])
  found = attention_pictures.attention_to(maps, (8., 0.), 8)
  np.testing.assert_array_equal(found, [[0, .5, 0], [0, 0, 0]])
  # On the very edge of an image that fills its cells.
  found = attention_pictures.attention_to(maps, (16., 24.), 8)
  np.testing.assert_array_equal(found, np.zeros((2, 3)))


def test_encoder_picture_shows_the_column(tmp_path, monkeypatch):
  shown = []
  overlay = attention_pictures.overlay
  monkeypatch.setattr(attention_pictures, 'overlay', lambda image, heat, stride: shown.append(heat)
                      or overlay(image, heat, stride))
  maps = np.random.default_rng(0).random((3, 4, 3, 4))
  image = np.full((20, 30, 3), 90, np.uint8)
  path = tmp_path / 'encoder.png'
  attention_pictures.encoder_attention(image, maps, [(2., 3.), (17., 25.)], 8, path)
  np.testing.assert_array_equal(shown, [maps[:, :, 0, 0], maps[:, :, 2, 3]])
  picture = read(path)
  assert picture.shape[0] > 300 and picture.shape[1] > 600
  assert all(near(picture, colour).sum() > 500 for colour in ((.122, .467, .706), (1, .498, .055)))


def test_overlay_covers_the_image_without_its_padding():
  """3x4 cells of 8 pixels over an image of 20x18: the brightest cell of all is in the padding."""
  heat = np.zeros((3, 4))
  heat[2, 1], heat[2, 3] = .01, .1
  drawn = attention_pictures.overlay(np.zeros((20, 18, 3), np.uint8), heat, 8)
  assert drawn.shape == (20, 18, 3)
  assert drawn[:8].max() < .05
  brightness = drawn[19].sum(-1)
  assert brightness.argmax() in (11, 12)  # Around the middle of the cell, at 12.
  assert drawn[19, 12].max() == pytest.approx(.6 * .988, abs=.02)  # The brightest of inferno.


def test_decoder_pictures(tmp_path):
  """Heat above the box it belongs to; a row more for more objects; none found still draws."""
  image = ground(48, 48)
  maps = np.zeros((3, 6, 6))
  maps[0, 4, 1] = maps[1, 1, 4] = maps[2, 0, 0] = 1
  boxes = np.array([[4., 28, 20, 44], [28, 4, 44, 20], [0, 0, 10, 10]])
  args = np.array([0, 1, 2]), np.array([.9, .8, .7])
  attention_pictures.decoder_attention(image, boxes, *args, maps, 8, NAMES, tmp_path / 'a.png')
  picture = read(tmp_path / 'a.png')
  third = picture.shape[1] // 3
  for i, (row, column) in enumerate(((4, 1), (1, 4))):
    part = picture[:, i * third:(i + 1) * third]
    top, bottom, left, right = extent(near(part, GROUND / 255, .01))
    unit = (right - left) / 48
    assert bottom - top == right - left
    above = part[top - (bottom - top) - 4:top - 4, left:right].sum(-1)
    for drawn in (above > above.max() / 2, near(part, canvas.colour(i))[top:bottom, left:right]):
      np.testing.assert_allclose(np.argwhere(drawn).mean(0) / unit, [8 * row + 4, 8 * column + 4],
                                 atol=1)
  attention_pictures.decoder_attention(image, boxes, *args, maps, 8, NAMES, tmp_path / 'b.png',
                                       columns=2)
  assert read(tmp_path / 'b.png').shape == (2 * picture.shape[0], 2 * third, 3)
  attention_pictures.decoder_attention(image, boxes[:0], args[0][:0], args[1][:0], maps[:0], 8,
                                       NAMES, tmp_path / 'c.png')
  assert near(read(tmp_path / 'c.png'), GROUND / 255, .01).sum() > 400 ** 2
