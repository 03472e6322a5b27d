"""RandAugment's operations against Pillow where they agree, and against hand-worked cases."""

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps
import pytest

from vit_family import randaugment as ra


def noise(h=40, w=56, channels=3, low=0, high=256, seed=0):
  return np.random.default_rng(seed).integers(low, high, (h, w, channels), np.uint8)


def pil(image):
  return PIL.Image.fromarray(image)


def row(*values):
  """One row of grey pixels, `[1, n, 1]`."""
  return np.array(values, np.uint8).reshape(1, -1, 1)


def column(*values):
  return row(*values).reshape(-1, 1, 1)


def constant(factor, degenerate, values):
  """Blending worked in float64; none of the cases here lies on a whole number's edge."""
  mixed = degenerate + factor * (values.astype(np.float64) - degenerate)
  return np.clip(np.floor(mixed + 1e-4), 0, 255)


# --- One value at a time -------------------------------------------------------------------------


@pytest.mark.parametrize('low, high', [(0, 256), (30, 200), (90, 93), (7, 8)])
def test_autocontrast_and_equalize_agree_with_pillow(low, high):
  image = noise(low=low, high=high)
  np.testing.assert_array_equal(ra.equalize(image), np.array(PIL.ImageOps.equalize(pil(image))))
  # A product such as 254.99999 may fall to either side.
  np.testing.assert_allclose(ra.autocontrast(image).astype(int),
                             np.array(PIL.ImageOps.autocontrast(pil(image))), atol=1)


def test_channels_are_stretched_apart():
  image = np.concatenate([row(10, 20, 30), row(0, 0, 255), row(5, 5, 5)], -1)
  np.testing.assert_array_equal(ra.autocontrast(image)[0].T,
                                [[0, 127, 255], [0, 0, 255], [5, 5, 5]])


@pytest.mark.parametrize('bits', [1, 4, 6, 8])
def test_invert_posterize_solarize_agree_with_pillow(bits):
  image = noise()
  np.testing.assert_array_equal(ra.invert(image), np.array(PIL.ImageOps.invert(pil(image))))
  np.testing.assert_array_equal(ra.posterize(image, bits),
                                np.array(PIL.ImageOps.posterize(pil(image), bits)))
  for threshold in (0, 1, 128, 255, 256, 512):
    np.testing.assert_array_equal(ra.solarize(image, threshold),
                                  np.array(PIL.ImageOps.solarize(pil(image), threshold)))


def test_solarize_add():
  image = row(0, 17, 127, 128, 255)
  np.testing.assert_array_equal(ra.solarize_add(image, 110).ravel(), [110, 127, 237, 128, 255])
  np.testing.assert_array_equal(ra.solarize_add(image, 220).ravel(), [220, 237, 255, 128, 255])


# --- Blending ------------------------------------------------------------------------------------


@pytest.mark.parametrize('factor', [.1, .46, 1., 1.9, 2.8, 3.7])
def test_brightness_color_and_sharpness_agree_with_pillow(factor):
  """Pillow rounds the degenerate image, we drop its fraction: one level, times the factor."""
  image = noise(low=60, high=180)
  slack = 1 + abs(1 - factor)
  for ours, theirs in ((ra.brightness, PIL.ImageEnhance.Brightness),
                       (ra.color, PIL.ImageEnhance.Color),
                       (ra.sharpness, PIL.ImageEnhance.Sharpness)):
    np.testing.assert_allclose(ours(image, factor).astype(int),
                               np.array(theirs(pil(image)).enhance(factor)), atol=slack)


def test_brightness_drops_fractions():
  np.testing.assert_array_equal(ra.brightness(row(5, 19, 100, 200), 1.9).ravel(),
                                [9, 36, 190, 255])


@pytest.mark.parametrize('h, w, grey', [(16, 32, 2), (224, 224, 196), (256, 256, 255), (9, 9, 0)])
def test_contrast_blends_towards_the_pixel_count(h, w, grey):
  for level in (40, 210):  # The mean luminance has no say.
    image = np.full((h, w, 3), level, np.uint8)
    for factor in (0., .13, 1.9):
      want = constant(factor, grey, image)
      np.testing.assert_array_equal(ra.contrast(image, factor), want)


def test_color_blends_towards_luminance():
  image = np.array([[[200, 100, 50], [255, 255, 255], [0, 0, 0]]], np.uint8)
  grey = int((.2989 * 200 + .587 * 100 + .114 * 50) * 255.5 / 255)  # 124.42
  np.testing.assert_array_equal(ra.color(image, 0.)[0], [[grey] * 3, [255] * 3, [0] * 3])
  np.testing.assert_array_equal(ra.color(image, 2.)[0, 0], [255, 76, 0])
  np.testing.assert_array_equal(ra.color(image[..., :1], .1), image[..., :1])


def test_sharpness_keeps_the_border():
  image = noise(5, 6)
  degenerate = ra.sharpness(image, 0.)
  inside = np.zeros((5, 6), bool)
  inside[1:-1, 1:-1] = True
  np.testing.assert_array_equal(degenerate[~inside], image[~inside])
  block = image[:3, :3].astype(int)
  np.testing.assert_array_equal(degenerate[1, 1], (block.sum((0, 1)) + 4 * block[1, 1]) // 13)
  np.testing.assert_array_equal(ra.sharpness(image[:2], .1), image[:2])  # It is all border.


# --- Moving pixels -------------------------------------------------------------------------------


def test_translate():
  image = row(1, 2, 3, 4)
  np.testing.assert_array_equal(ra.translate_x(image, 1).ravel(), [2, 3, 4, 128])
  np.testing.assert_array_equal(ra.translate_x(image, -2).ravel(), [128, 128, 1, 2])
  np.testing.assert_array_equal(ra.translate_x(image, .5).ravel(), [2, 3, 4, 128])  # Halves: up.
  np.testing.assert_array_equal(ra.translate_x(image, -.5).ravel(), [128, 2, 3, 4])
  np.testing.assert_array_equal(ra.translate_x(image, 200).ravel(), [128] * 4)
  np.testing.assert_array_equal(ra.translate_y(column(1, 2, 3), 1).ravel(), [2, 3, 128])
  np.testing.assert_array_equal(ra.translate_y(image, 0), image)


def test_shear():
  image = noise(5, 7)
  for level in (.3, -.3, .6):
    want = np.full_like(image, 128)
    for y in range(5):
      for x in range(7):
        source = int(np.floor(abs(x + level * y) + .5)) * (1 if x + level * y >= 0 else -1)
        if 0 <= source < 7:
          want[y, x] = image[y, source]
    np.testing.assert_array_equal(ra.shear_x(image, level), want)
    np.testing.assert_array_equal(ra.shear_y(image.swapaxes(0, 1), level), want.swapaxes(0, 1))


def test_rotate():
  image = noise(6, 6)
  np.testing.assert_array_equal(ra.rotate(image, 0.), image)
  np.testing.assert_array_equal(ra.rotate(image, 90.), np.rot90(image))  # Counter-clockwise.
  np.testing.assert_array_equal(ra.rotate(image, 180.), image[::-1, ::-1])
  big = noise(41, 61)
  want = pil(big).rotate(24, PIL.Image.Resampling.NEAREST, fillcolor=(128,) * 3)
  assert (ra.rotate(big, 24.) == np.array(want)).all(-1).mean() > .99  # But for halves.


def test_cutout_places_a_square():
  image = np.zeros((9, 12, 3), np.uint8)
  seen = set()
  for seed in range(400):
    out = ra.cutout(image, 2, np.random.default_rng(seed))
    y, x = np.random.default_rng(seed).integers([9, 12])
    want = [[128 if y - 2 <= i < y + 2 and x - 2 <= j < x + 2 else 0 for j in range(12)]
            for i in range(9)]
    np.testing.assert_array_equal(out[..., 0], want)
    seen.add((int(y), int(x)))
  assert len(seen) > 100 and not image.any()  # All over the place; the argument is untouched.


# --- Magnitudes and the whole --------------------------------------------------------------------


class Toss:
  """A generator whose only draw is the side of a coin."""

  def __init__(self, value):
    self._value = value

  def random(self):
    return self._value


IMAGE = noise(30, 30, low=20, high=240)


@pytest.mark.parametrize('name, magnitude, want', [
    ('Posterize', 0, IMAGE & 128), ('Posterize', 10, IMAGE & 0xf0), ('Posterize', 15, IMAGE & 0xfc),
    ('Posterize', 20, IMAGE), ('Solarize', 0, 255 - IMAGE),
    ('Solarize', 5, np.where(IMAGE < 128, IMAGE, 255 - IMAGE)), ('Solarize', 10, IMAGE),
    ('Solarize', 15, IMAGE), ('Solarize', 20, IMAGE), ('SolarizeAdd', 0, IMAGE),
    ('SolarizeAdd', 15, ra.solarize_add(IMAGE, 165)), ('Brightness', 5, IMAGE),
    ('Brightness', 0, ra.brightness(IMAGE, .1)), ('Color', 20, ra.color(IMAGE, 3.7)),
    ('Contrast', 10, ra.contrast(IMAGE, 1.9)), ('Sharpness', 15, ra.sharpness(IMAGE, 2.8)),
    ('Invert', 3, 255 - IMAGE), ('AutoContrast', 3, ra.autocontrast(IMAGE)),
    ('Equalize', 3, ra.equalize(IMAGE))])
def test_what_a_magnitude_means(name, magnitude, want):
  np.testing.assert_array_equal(ra.OPS[name](IMAGE, magnitude / 10, None), want)


@pytest.mark.parametrize('name, op, amount', [
    ('Rotate', ra.rotate, 45.), ('ShearX', ra.shear_x, .45), ('ShearY', ra.shear_y, .45),
    ('TranslateX', ra.translate_x, 15.), ('TranslateY', ra.translate_y, 15.)])
def test_geometry_goes_either_way(name, op, amount):
  magnitude = 1.5 if name.startswith('Translate') else 15
  for toss, sign in ((.2, 1), (.8, -1)):
    np.testing.assert_array_equal(ra.OPS[name](IMAGE, magnitude / 10, Toss(toss)),
                                  op(IMAGE, sign * amount))


def test_cutout_grows_with_the_magnitude():
  image = np.zeros((500, 500, 1), np.uint8)
  rng = np.random.default_rng(0)
  whole = max((ra.OPS['Cutout'](image, 1.5, rng) == 128).sum() for _ in range(10))
  assert whole == 120 ** 2  # Unless the border cuts into it.


def test_operations_are_drawn_uniformly_with_replacement(monkeypatch):
  names = ['AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'Color',
           'Contrast', 'Brightness', 'Sharpness', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY',
           'Cutout', 'SolarizeAdd']
  assert sorted(ra.OPS) == sorted(names)
  calls = []
  for name in names:
    monkeypatch.setitem(ra.OPS, name, lambda image, ratio, rng, name=name:
                        calls.append((name, ratio)) or image)
  rng = np.random.default_rng(0)
  for _ in range(1600):
    ra.rand_augment(IMAGE, 2, 15, rng)
  assert len(calls) == 3200 and {ratio for _, ratio in calls} == {1.5}
  counts = [sum(name == other for other, _ in calls) for name in names]
  assert min(counts) > 145 and max(counts) < 255  # 200 each, 4 sigma.
  assert any(a == b for (a, _), (b, _) in zip(calls[::2], calls[1::2]))


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', list(ra.OPS))
def test_every_operation_keeps_shape_and_argument(name, channels):
  image = noise(33, 47, channels)
  before = image.copy()
  for magnitude in (0, 10, 20):
    out = ra.OPS[name](image, magnitude / 10, np.random.default_rng(1))
    assert out.shape == image.shape and out.dtype == np.uint8
    again = ra.OPS[name](image, magnitude / 10, np.random.default_rng(1))
    np.testing.assert_array_equal(out, again)
  np.testing.assert_array_equal(image, before)


def test_rand_augment_is_a_function_of_its_seed():
  one, two, other = (ra.rand_augment(IMAGE, 2, 10, np.random.default_rng(s)) for s in (5, 5, 6))
  np.testing.assert_array_equal(one, two)
  assert (one != other).any()
  np.testing.assert_array_equal(ra.rand_augment(IMAGE, 0, 10, np.random.default_rng(0)), IMAGE)
  # A pipeline may hand over a view of its crop.
  view = np.tile(IMAGE, (2, 2, 1))[3:33, 5:35]
  assert ra.rand_augment(view, 4, 10, np.random.default_rng(0)).shape == IMAGE.shape


@pytest.mark.parametrize('image, magnitude', [
    (IMAGE.astype(np.float32), 10), (IMAGE[..., 0], 10), (IMAGE[..., :2], 10), (IMAGE, -1)])
def test_rand_augment_refuses(image, magnitude):
  with pytest.raises(ValueError, match='RandAugment'):
    ra.rand_augment(image, 2, magnitude, np.random.default_rng(0))
