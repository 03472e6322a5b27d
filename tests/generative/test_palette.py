import json

import numpy as np
import pytest

from core.config import UserError
from generative import palette

RNG = np.random.default_rng(0)


def colours(k=20, channels=3):
  return palette.Palette(RNG.uniform(-1, 1, (k, channels)))


@pytest.mark.parametrize('channels', [1, 3])
def test_encode_finds_the_nearest_colour(channels):
  image = RNG.integers(0, 256, (9, 7, channels), np.uint8)
  found = colours(20, channels)
  tokens = found.encode(image)
  assert tokens.dtype == np.int32 and tokens.shape == (63,)
  pixels = image.reshape(-1, channels) / 127.5 - 1
  away = ((pixels[:, None] - found.centers[None].astype(np.float64)) ** 2).sum(-1)
  np.testing.assert_allclose(away[np.arange(63), tokens], away.min(1), atol=1e-6)


def test_decode_is_rint_of_the_released_code_and_a_round_trip():
  found = colours()
  decoded = found.decode(np.arange(20))
  np.testing.assert_array_equal(decoded, np.rint(127.5 * (found.centers.astype(np.float64) + 1)))
  np.testing.assert_array_equal(found.encode(decoded.reshape(4, 5, 3)), np.arange(20))


@pytest.mark.parametrize('token', [-1, 20])
def test_tokens_out_of_range(token):
  with pytest.raises(UserError, match='colours 0 to 19'):
    colours().decode(np.array([0, token]))


def test_fit_finds_planted_colours_from_dark_to_light():
  planted = np.array([[200, 30, 40], [10, 12, 200], [5, 5, 5], [250, 240, 230]])
  noisy = planted[RNG.integers(0, 4, 4000)] + RNG.integers(-3, 4, (4000, 3))
  pixels = np.clip(noisy, 0, 255).astype(np.uint8)
  found = palette.fit(pixels, 4, seed=0)
  order = np.argsort(planted.sum(1))
  np.testing.assert_allclose((found.centers + 1) * 127.5, planted[order], atol=1.5)
  np.testing.assert_array_equal(palette.fit(pixels, 4, seed=0).centers, found.centers)


def test_too_few_colours_to_fit():
  with pytest.raises(UserError, match='2 different colours; set config.model.colors, now 4'):
    palette.fit(np.array([[0, 0, 0], [1, 1, 1]] * 5, np.uint8), 4, seed=0)


def test_grey_levels_are_even():
  np.testing.assert_array_equal(palette.grey_levels(16).decode(np.arange(16))[:, 0],
                                np.arange(16) * 17)


def test_files_of_openai_and_hugging_face(tmp_path):
  centers = RNG.uniform(-1, 1, (512, 3))
  np.save(tmp_path / 'kmeans_centers.npy', centers)
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps({'clusters': centers.tolist()}))
  for name in ('kmeans_centers.npy', 'preprocessor_config.json'):
    found = palette.load(tmp_path / name, 512, 3)
    assert found.centers.dtype == np.float32
    np.testing.assert_allclose(found.centers, centers, atol=1e-7)
  found.save(tmp_path / 'again.npy')
  np.testing.assert_array_equal(palette.load(tmp_path / 'again.npy', 512, 3).centers, found.centers)


@pytest.mark.parametrize('centers, words', [
    (np.zeros((3, 512)) - .1, r'float64\[3, 512\], but .* float\[512, 3\]'),
    (RNG.uniform(-1, 1, (256, 3)), r'\[256, 3\]'),
    (RNG.uniform(0, 1, (512, 3)), 'scaled to \\[-1, 1\\]'),
    (RNG.integers(0, 256, (512, 3)), 'scaled to'),
    (np.full((512, 3), np.nan), 'scaled to'),
    (np.full((512, 3), 'red'), 'but config.model.colors'),
    (np.full((512, 3), object), 'neither a .npy')])
def test_bad_palettes_say_what_is_right(tmp_path, centers, words):
  np.save(tmp_path / 'p.npy', centers, allow_pickle=True)
  with pytest.raises(UserError, match=words):
    palette.load(tmp_path / 'p.npy', 512, 3)


def test_no_file_and_a_broken_one(tmp_path):
  with pytest.raises(UserError, match='no such file'):
    palette.load(tmp_path / 'p.npy', 512, 3)
  (tmp_path / 'p.npy').write_bytes(b'not numpy')
  with pytest.raises(UserError, match='neither a .npy'):
    palette.load(tmp_path / 'p.npy', 512, 3)
  (tmp_path / 'p.json').write_text('{"other": 1}')
  with pytest.raises(UserError, match='neither a .npy'):
    palette.load(tmp_path / 'p.json', 512, 3)
