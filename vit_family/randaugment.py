"""RandAugment as the AugReg models were trained with (arXiv 1909.13719, 2106.10270 section 3.3).

Each image goes through `layers` operations drawn uniformly with replacement from sixteen, every one
applied, all at one `magnitude`. Magnitudes are nominally 0 to 10; the strong presets extrapolate.
What an operation does at a magnitude is what the public TensorFlow code does, oddities included:

- Magnitude 0 is far from the identity: `solarize` inverts every pixel, `posterize` keeps one bit,
  and the four enhancements blend nine parts of the degenerate image with one of the original.
- `contrast` blends towards the grey (pixel count) / 256, not towards the mean luminance.
- Blending, colour and sharpening drop the fraction of a value instead of rounding it.

Two cases the public code leaves to its runtime are settled here. `posterize` at magnitude 0 asks to
shift bytes by all their 8 bits: TensorFlow's kernels clamp that to 7, so the top bit stays, and so
it does here. `solarize` at magnitude 10 and above has a threshold beyond 255, which a byte cannot
hold: here it means what it says, no pixel reaches it and the image stays.

Images are uint8 `[h, w, 3]` or `[h, w, 1]` and are never written into; results may share memory
with their argument.
"""

import cv2
import numpy as np

# AugReg's amounts of augmentation: name -> (layers, magnitude, Beta parameter of MixUp).
PRESETS = {
    'none': (0, 0, 0.), 'light1': (2, 0, 0.), 'light2': (2, 10, .2), 'medium1': (2, 15, .2),
    'medium2': (2, 15, .5), 'strong1': (2, 20, .5), 'strong2': (2, 20, .8)}

_FILL = 128  # What comes in from beyond the border, and what `cutout` leaves.
_BYTES = np.arange(256)


def rand_augment(image: np.ndarray, layers: int, magnitude: float,
                 rng: np.random.Generator) -> np.ndarray:
  """Applies `layers` random operations.

  Args:
    image: uint8 `[h, w, 3]` or `[h, w, 1]`.
    layers: number of operations.
    magnitude: strength of all of them, at least 0.
    rng: source of randomness.

  Returns:
    uint8 of the same shape.

  Raises:
    ValueError: another dtype or number of channels, or a negative magnitude.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise ValueError(f'RandAugment takes uint8 [h, w, 1 or 3], not {image.dtype} '
                     f'{list(image.shape)}')
  if magnitude < 0:
    raise ValueError(f'the magnitude of RandAugment must be at least 0, not {magnitude}')
  names = list(OPS)
  for _ in range(layers):
    image = OPS[names[rng.integers(len(names))]](image, magnitude / 10, rng)
  return image


# --- One value at a time -------------------------------------------------------------------------


def _lookup(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Maps values through a table `[256]`, or `[256, c]` with a column a channel."""
  table = np.ascontiguousarray(table.astype(np.uint8).reshape(1, 256, -1))
  return cv2.LUT(image, table).reshape(image.shape)


def invert(image: np.ndarray) -> np.ndarray:
  return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the upper bits of every value: at least 1 (see above) and at most all 8."""
  shift = 8 - min(max(bits, 1), 8)
  return _lookup(image, _BYTES >> shift << shift)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
  """Inverts the values that reach the threshold."""
  return _lookup(image, np.where(_BYTES < threshold, _BYTES, 255 - _BYTES))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
  """Adds to the values below 128, up to 255."""
  return _lookup(image, np.where(_BYTES < 128, np.minimum(_BYTES + addition, 255), _BYTES))


def autocontrast(image: np.ndarray) -> np.ndarray:
  """Stretches each channel so that its extremes become 0 and 255; a constant channel stays."""
  low = image.min(0).min(0).astype(np.float32)  # Both axes at once is far slower.
  high = image.max(0).max(0).astype(np.float32)
  scale = np.float32(255) / np.where(high > low, high - low, 1)
  values = _BYTES[:, None].astype(np.float32)
  table = np.clip(values * scale - low * scale, 0, 255)
  return _lookup(image, np.where(high > low, table, values))


def equalize(image: np.ndarray) -> np.ndarray:
  """Flattens the histogram of each channel; a channel of too few values for that stays."""
  tables = []
  for channel in range(image.shape[-1]):
    counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(int)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    if step == 0:
      tables.append(_BYTES)
    else:
      below = np.cumsum(counts) - counts
      tables.append(np.minimum((below + step // 2) // step, 255))
  return _lookup(image, np.stack(tables, -1))


# --- Blending with a degenerate image ------------------------------------------------------------


def _blend(degenerate: np.ndarray | float, image: np.ndarray, factor: float) -> np.ndarray:
  """0 is the degenerate image, 1 the original, beyond extrapolates within 0 to 255."""
  mixed = image.astype(np.float32)
  mixed -= degenerate
  mixed *= np.float32(factor)
  mixed += degenerate
  return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends with black."""
  return _lookup(image, _blend(0, _BYTES, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends with the grey (pixel count) / 256, 255 at most: 196 at 224x224."""
  grey = min(image.shape[0] * image.shape[1] // 256, 255)
  return _lookup(image, _blend(grey, _BYTES, factor))


def color(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends with the grey image; a grey image stays as it is."""
  if image.shape[-1] == 1:
    return image
  # TensorFlow's weights; it goes through [0, 1] and comes back by 255.5, dropping the fraction.
  weights = np.array([[.2989, .5870, .1140]], np.float32) * np.float32(255.5 / 255)
  grey = np.floor(cv2.transform(image.astype(np.float32), weights))
  return _blend(grey[..., None], image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends with a 3x3 mean that counts the centre five times; the outermost pixels stay."""
  kernel = np.ones((3, 3), np.float32)
  kernel[1, 1] = 5
  total = cv2.filter2D(image, cv2.CV_16S, kernel).reshape(image.shape)  # Whole numbers: exact.
  out = image.copy()
  inner = slice(1, -1)
  out[inner, inner] = _blend(total[inner, inner] // 13, image[inner, inner], factor)
  return out


# --- Moving pixels -------------------------------------------------------------------------------


def _warp(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
  """Fills each pixel from the nearest one at (a x + b y + c, d x + e y + f), grey beyond borders.

  Args:
    image: uint8 `[h, w, c]`, sides below 32,767.
    matrix: a, b, c, d, e, f in pixels; x counts columns, y rows, both from 0.
  """
  h, w = image.shape[:2]
  a, b, c, d, e, f = np.asarray(matrix, np.float32)
  x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
  source = np.empty((h, w, 2), np.int16)
  for axis, where, size in ((0, a * x + b * y + c, w), (1, d * x + e * y + f, h)):
    # Halves round away from zero, as in C; -1 and `size` are beyond the border.
    where = np.clip(where, -1, size)
    source[..., axis] = where + np.copysign(np.float32(.5), where)
  out = cv2.remap(image, source, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT,
                  borderValue=(_FILL,) * 3)
  return out.reshape(image.shape)


def shear_x(image: np.ndarray, level: float) -> np.ndarray:
  return _warp(image, (1, level, 0, 0, 1, 0))


def shear_y(image: np.ndarray, level: float) -> np.ndarray:
  return _warp(image, (1, 0, 0, level, 1, 0))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
  """Moves the image to the left."""
  return _warp(image, (1, 0, pixels, 0, 1, 0))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
  """Moves the image up."""
  return _warp(image, (1, 0, 0, 0, 1, pixels))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """Turns counter-clockwise about the middle."""
  angle = np.deg2rad(degrees)
  cos, sin = np.cos(angle), np.sin(angle)
  x, y = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
  return _warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def cutout(image: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
  """Greys a square of side 2 * half about a random pixel, as much of it as lies in the image."""
  y, x = int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1]))
  out = image.copy()
  out[max(y - half, 0):y + half, max(x - half, 0):x + half] = _FILL
  return out


# --- What a magnitude means ----------------------------------------------------------------------


def _plain(op):
  return lambda image, ratio, rng: op(image)


def _scaled(op, scale):
  """A whole number, rounded down."""
  return lambda image, ratio, rng: op(image, int(ratio * scale))


def _enhanced(op):
  return lambda image, ratio, rng: op(image, ratio * 1.8 + .1)


def _signed(op, scale):
  """Either direction, with equal chances."""
  return lambda image, ratio, rng: op(image, ratio * scale * (1 if rng.random() < .5 else -1))


# Name -> operation(image, magnitude / 10, rng).
OPS = {
    'AutoContrast': _plain(autocontrast), 'Equalize': _plain(equalize), 'Invert': _plain(invert),
    'Rotate': _signed(rotate, 30.), 'Posterize': _scaled(posterize, 4),
    'Solarize': _scaled(solarize, 256), 'Color': _enhanced(color),
    'Contrast': _enhanced(contrast), 'Brightness': _enhanced(brightness),
    'Sharpness': _enhanced(sharpness), 'ShearX': _signed(shear_x, .3),
    'ShearY': _signed(shear_y, .3), 'TranslateX': _signed(translate_x, 100.),
    'TranslateY': _signed(translate_y, 100.),
    'Cutout': lambda image, ratio, rng: cutout(image, int(ratio * 40), rng),
    'SolarizeAdd': _scaled(solarize_add, 110)}
