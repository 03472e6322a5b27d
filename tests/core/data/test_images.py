"""Image operations against Pillow and plain numpy."""

import io
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from core.data import images


def picture(h=60, w=80, channels=3, seed=0):
  """A smooth picture, so that lossy codecs stay close to it."""
  coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), np.uint8)
  out = cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)
  return out.reshape(h, w, channels)


def encode(image, fmt, mode=None, **options):
  pil = PIL.Image.fromarray(image)
  buffer = io.BytesIO()
  (pil.convert(mode) if mode else pil).save(buffer, fmt, **options)
  return buffer.getvalue()


FORMATS = [('JPEG', {'quality': 95}), ('JPEG', {'progressive': True}), ('PNG', {}),
           ('WEBP', {'lossless': True}), ('BMP', {})]


@pytest.mark.parametrize('fmt, options', FORMATS)
def test_decode_agrees_with_pillow(fmt, options):
  data = encode(picture(), fmt, **options)
  want = PIL.Image.open(io.BytesIO(data))
  rgb, grey = images.decode(data), images.decode(data, 1)
  assert rgb.shape == (60, 80, 3) and rgb.dtype == np.uint8
  assert grey.shape == (60, 80, 1) and grey.dtype == np.uint8
  np.testing.assert_allclose(rgb.astype(int), np.array(want.convert('RGB')), atol=2)
  np.testing.assert_allclose(grey[..., 0].astype(int), np.array(want.convert('L')), atol=6)


@pytest.mark.parametrize('fmt, options', FORMATS)
@pytest.mark.parametrize('share', [0.01, 0.3, 0.9, 'last bytes'])
def test_truncated_images_are_errors(fmt, options, share):
  data = encode(picture(), fmt, **options)
  cut = len(data) - 3 if share == 'last bytes' else int(len(data) * share)
  with pytest.raises(images.ImageError):
    images.decode(data[:cut])


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_decode_reduces_other_modes(mode):
  data = encode(picture(), 'JPEG' if mode == 'CMYK' else 'PNG', mode)
  want = np.array(PIL.Image.open(io.BytesIO(data)).convert('RGB'))
  np.testing.assert_allclose(images.decode(data).astype(int), want, atol=2)
  assert images.decode(data, 1).shape == (60, 80, 1)


@pytest.mark.parametrize('fmt, options', [
    ('PNG', {}), ('WEBP', {'lossless': True, 'exact': True}), ('BMP', {})])
def test_alpha_is_dropped_and_colours_stay(fmt, options):
  alpha = np.random.default_rng(1).integers(0, 256, (60, 80), np.uint8)
  alpha[:30] = 0  # Whoever composites, over whatever, loses the upper half.
  data = encode(np.dstack([picture(), alpha]), fmt, **options)
  np.testing.assert_array_equal(images.decode(data), picture())
  np.testing.assert_allclose(
      images.decode(data, 1)[..., 0].astype(int),
      np.array(PIL.Image.fromarray(picture()).convert('L')), atol=1)


def test_grey_alpha_is_dropped():
  grey = picture(channels=1)[..., 0]
  data = encode(np.dstack([grey, 255 - grey]), 'PNG')
  assert PIL.Image.open(io.BytesIO(data)).mode == 'LA'
  np.testing.assert_array_equal(images.decode(data, 1)[..., 0], grey)
  np.testing.assert_array_equal(images.decode(data), np.dstack([grey] * 3))


@pytest.mark.parametrize('transparency', [None, 3, bytes(range(0, 160, 10))])
@pytest.mark.parametrize('fmt', ['PNG', 'BMP'])
def test_palettes_are_looked_up(fmt, transparency):
  """One transparent colour of a palette, or an alpha for each, keeps its colour."""
  palette = PIL.Image.fromarray(picture()).quantize(16)
  options = {} if transparency is None or fmt == 'BMP' else {'transparency': transparency}
  buffer = io.BytesIO()
  palette.save(buffer, fmt, **options)
  want = palette.convert('RGB')
  np.testing.assert_array_equal(images.decode(buffer.getvalue()), np.array(want))
  np.testing.assert_allclose(images.decode(buffer.getvalue(), 1)[..., 0].astype(int),
                             np.array(want.convert('L')), atol=1)


def test_one_bit_is_black_and_white():
  data = encode(picture(channels=1)[..., 0], 'PNG', '1')
  want = np.array(PIL.Image.open(io.BytesIO(data))) * 255
  for channels in (1, 3):
    np.testing.assert_array_equal(images.decode(data, channels),
                                  np.repeat(want[..., None], channels, -1))


@pytest.mark.parametrize('samples', [1, 2, 3, 4])
def test_sixteen_bits_become_eight(samples):
  """Grey, grey and alpha, RGB, RGBA of 16 bits, written by hand: not every library can."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 65536, (9, 12, samples)).astype('>u2')
  image[0, 0], image[0, 1] = 0, 65535
  chunk = lambda tag, body: (struct.pack('>I', len(body)) + tag + body
                             + struct.pack('>I', zlib.crc32(tag + body)))
  color_type = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
  rows = b''.join(b'\0' + row.tobytes() for row in image)  # 0: no filter.
  data = (b'\x89PNG\r\n\x1a\n'
          + chunk(b'IHDR', struct.pack('>IIBBBBB', 12, 9, 16, color_type, 0, 0, 0))
          + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
  rgb = np.broadcast_to(image[..., :1] if samples < 3 else image[..., :3], (9, 12, 3))
  got = images.decode(data)
  np.testing.assert_array_equal(got, rgb >> 8)
  assert np.abs(got - rgb / 257).max() < 1 and got[0, 0, 0] == 0 and got[0, 1, 0] == 255
  np.testing.assert_allclose(images.decode(data, 1)[..., 0], rgb / 257 @ [.299, .587, .114],
                             atol=1.01)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation):
  exif = PIL.Image.Exif()
  exif[0x112] = orientation
  data = encode(picture(), 'JPEG', exif=exif, quality=95)
  want = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
  np.testing.assert_allclose(images.decode(data).astype(int), np.array(want), atol=2)


def test_no_image_is_an_error():
  with pytest.raises(images.ImageError, match=r'image is empty \(0 bytes\)'):
    images.decode(b'')
  for data in (b'x', b'<html>not found</html>', b'GIF89a' + bytes(50)):
    with pytest.raises(images.ImageError):
      images.decode(data)
  assert issubclass(images.ImageError, ValueError)


def test_corrupt_png_is_an_error():
  data = bytearray(encode(picture(), 'PNG'))
  data[60:80] = bytes(20)
  with pytest.raises(images.ImageError):
    images.decode(bytes(data))


def test_end_marker_behind_appended_data_and_in_thumbnails():
  data = encode(picture(), 'JPEG')
  assert images.is_complete(data + bytes(100_000))  # Motion photos append a film.
  # A thumbnail in an application segment has an end marker; it is not the picture's.
  thumbnail = encode(picture(12, 16), 'JPEG')
  segment = b'\xff\xe1' + (len(thumbnail) + 2).to_bytes(2, 'big') + thumbnail
  nested = data[:2] + segment + data[2:]
  assert images.is_complete(nested)
  assert not images.is_complete(nested[:-2])
  assert images.decode(nested).shape == (60, 80, 3)


# --- Oracles: every output pixel as an explicit weighted sum -------------------------------------


def linear_weights(n_in, n_out):
  """[n_out, n_in]: pixel centres at half integers, two neighbours, clamped at the borders."""
  x = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
  return np.maximum(0, 1 - np.abs(np.clip(x, 0, n_in - 1)[:, None] - np.arange(n_in)))


def area_weights(n_in, n_out):
  """[n_out, n_in]: the share of each input pixel in the interval of an output pixel."""
  edges = np.arange(n_out + 1) * n_in / n_out
  left = np.maximum(edges[:-1, None], np.arange(n_in))
  right = np.minimum(edges[1:, None], np.arange(n_in) + 1)
  return np.maximum(0, right - left) * n_out / n_in


def apply(weights_h, weights_w, image):
  return np.einsum('yh,xw,hwc->yxc', weights_h, weights_w, image.astype(np.float64), optimize=True)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('h, w, size', [(60, 80, 32), (8, 8, 28), (37, 91, 64), (40, 40, 40)])
def test_resize_is_bilinear_without_antialiasing(h, w, size, channels):
  image = np.random.default_rng(1).integers(0, 256, (h, w, channels), np.uint8)
  want = apply(linear_weights(h, size), linear_weights(w, size), image)
  got = images.resize(image, size)
  assert got.shape == (size, size, channels) and got.dtype == np.uint8
  np.testing.assert_allclose(got, want, atol=1.01)  # Rounding to uint8.
  np.testing.assert_allclose(images.resize(image.astype(np.float32), size), want, atol=2e-2)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('h, w, size, shape', [
    (60, 80, 30, (30, 40)), (375, 500, 256, (256, 341)), (91, 37, 16, (39, 16)),
    (20, 30, 48, (48, 72)), (8, 8, 8, (8, 8))])
def test_resize_small_takes_the_mean_of_areas(h, w, size, shape, channels):
  image = np.random.default_rng(2).integers(0, 256, (h, w, channels), np.uint8)
  got = images.resize_small(image, size)
  assert got.shape == (*shape, channels) and got.dtype == np.uint8
  want = apply(area_weights(h, shape[0]), area_weights(w, shape[1]), image)
  np.testing.assert_allclose(got, want, atol=1.01)


def test_central_crop_rounds_down():
  image = np.arange(7 * 10).reshape(7, 10, 1)
  np.testing.assert_array_equal(images.central_crop(image, 4), image[1:5, 3:7])
  with pytest.raises(ValueError, match='8x8 from an image of 7x10'):
    images.central_crop(image, 8)


def test_random_crop_reaches_every_position():
  image = np.arange(5 * 6).reshape(5, 6, 1)
  rng = np.random.default_rng(0)
  corners = [int(images.random_crop(image, 3, rng)[0, 0, 0]) for _ in range(1200)]
  values, counts = np.unique(corners, return_counts=True)
  np.testing.assert_array_equal(values, [y * 6 + x for y in range(3) for x in range(4)])
  assert counts.min() > 60 and counts.max() < 140  # 100 each, 4 sigma.
  with pytest.raises(ValueError):
    images.random_crop(image, 6, rng)


@pytest.mark.parametrize('h, w', [(375, 500), (500, 333), (224, 224), (40, 300), (9, 7)])
def test_inception_box_stays_within_bounds(h, w):
  rng = np.random.default_rng(0)
  boxes = np.array([images.inception_box(h, w, rng) for _ in range(500)])
  top, left, bh, bw = boxes.T
  assert (top >= 0).all() and (left >= 0).all()
  assert (top + bh <= h).all() and (left + bw <= w).all()
  assert (bh * bw >= 0.05 * h * w).all()
  # Sides are whole pixels: the ratio is off by half a pixel of width at most.
  assert ((bw + 0.5 + 1e-6) / bh >= 3 / 4).all() and ((bw - 0.5 - 1e-6) / bh <= 4 / 3).all()


def test_inception_box_statistics():
  """Mean area and height against the law integrated numerically, for a large square."""
  side, n = 2000, 20000
  rng = np.random.default_rng(0)
  boxes = np.array([images.inception_box(side, side, rng) for _ in range(n)])
  area = boxes[:, 2] * boxes[:, 3] / side**2
  height = boxes[:, 2] / side
  ratio = boxes[:, 3] / boxes[:, 2]
  aspect = np.linspace(3 / 4, 4 / 3, 2001)[:, None]
  low = np.sqrt(0.05 / aspect)
  high = np.minimum(np.sqrt(1 / aspect), np.minimum(1, 1 / aspect))
  heights = low + (high - low) * np.linspace(0, 1, 2001)
  for got, want in ((area, heights**2 * aspect), (height, heights),
                    (ratio, np.broadcast_to(aspect, heights.shape))):
    assert abs(got.mean() - want.mean()) < 5 * want.std() / np.sqrt(n)
    assert abs(got.std() / want.std() - 1) < 0.03


def test_inception_crop_falls_back_to_the_whole_image():
  image = picture(300, 3)  # No box with an aspect near 1 has 5% of such a strip's area.
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(
      images.inception_crop(image, 32, rng, area=(0.5, 1.0)), images.resize(image, 32))
  assert images.inception_crop(picture(1, 1), 8, rng).shape == (8, 8, 3)


def test_inception_crop_is_the_resized_box():
  image = picture(120, 160)
  got = images.inception_crop(image, 32, np.random.default_rng(7))
  top, left, h, w = images.inception_box(120, 160, np.random.default_rng(7))
  np.testing.assert_array_equal(got, images.resize(image[top:top + h, left:left + w], 32))
  # The same generator, the same pixels: what makes runs repeatable.
  np.testing.assert_array_equal(
      got, images.inception_crop(image, 32, np.random.default_rng(7)))


def test_flip_is_fair_and_mirrors():
  image = picture()
  rng = np.random.default_rng(0)
  flipped = 0
  for _ in range(1000):
    out = images.flip(image, rng)
    if not np.array_equal(out, image):
      np.testing.assert_array_equal(out, image[:, ::-1])
      flipped += 1
  assert 437 < flipped < 563  # 4 sigma.


class FixedRng:
  """A generator whose draws are given."""

  def __init__(self, *values):
    self._values = list(values)

  def uniform(self, low, high, size=None):
    value = self._values.pop(0)
    assert np.all(np.asarray(value) >= low) and np.all(np.asarray(value) <= high)
    return np.asarray(value) if size else value


@pytest.mark.parametrize('angle, shift, scale', [
    (0, (0, 0), 1), (0, (0.125, -0.25), 1), (30, (0.1, 0.05), 1.2), (-15, (0, 0), 0.7)])
def test_random_affine_against_inverse_mapping(angle, shift, scale):
  image = picture(16, 24, 1).astype(np.float32)
  got = images.random_affine(image, FixedRng(angle, shift, scale), 45, 0.5, (0.5, 2))
  t = np.deg2rad(angle)
  want = np.zeros((16, 24))
  padded = np.pad(image[..., 0], 1)
  for y in range(16):
    for x in range(24):
      # Undo the shift, then turn and scale about the middle; y points down.
      dx, dy = x - 11.5 - shift[0] * 24, y - 7.5 - shift[1] * 16
      sx = (np.cos(t) * dx - np.sin(t) * dy) / scale + 11.5
      sy = (np.sin(t) * dx + np.cos(t) * dy) / scale + 7.5
      if not (-1 < sx < 24 and -1 < sy < 16):
        continue
      ix, iy = int(np.floor(sx)), int(np.floor(sy))
      fx, fy = sx - ix, sy - iy
      block = padded[iy + 1:iy + 3, ix + 1:ix + 3]
      want[y, x] = (np.array([1 - fy, fy])[:, None] * np.array([1 - fx, fx]) * block).sum()
  # OpenCV rounds positions to 1/32 pixel; neighbours here differ by up to some 60 levels.
  np.testing.assert_allclose(got[..., 0], want, atol=4)
  assert got.shape == image.shape and got.dtype == np.float32


def test_random_affine_keeps_uint8_and_colour():
  out = images.random_affine(picture(), np.random.default_rng(0), 10, 0.1, (0.9, 1.1))
  assert out.shape == (60, 80, 3) and out.dtype == np.uint8
