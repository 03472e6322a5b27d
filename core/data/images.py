"""Images on the way to the model: decode, resize, crop, flip.

Everything is numpy and OpenCV, takes and gives `[height, width, channels]` arrays, and draws
randomness only from the `numpy.random.Generator` it is handed, so an example's pixels are a
function of its seed. Conventions are those of the Vision Transformer's public code: bilinear
without antialiasing, area for `resize_small`. Values stay uint8; models scale them on the device.
"""

import pathlib
import struct

import cv2
import numpy as np

from core.config import UserError

# One image is far too little work for a thread pool, and every grain worker would start its own.
cv2.setNumThreads(0)


# Endings of the files that `decode` reads.
EXTENSIONS = frozenset({'.jpg', '.jpeg', '.png', '.webp', '.bmp'})


class ImageError(ValueError):
  """Bytes that are no image we can read, or only a part of one."""


# --- Bytes ---------------------------------------------------------------------------------------

_PNG = b'\x89PNG\r\n\x1a\n'
_PNG_END = b'IEND\xaeB`\x82'
TAIL = 4096  # Bytes at the end of a file that `looks_complete` wants to see.


def kind(head: bytes) -> str | None:
  """Names the format that a file's first 12 or more bytes announce, or None."""
  if head.startswith(b'\xff\xd8\xff'):
    return 'jpeg'
  if head.startswith(_PNG):
    return 'png'
  if head[:4] == b'RIFF' and head[8:12] == b'WEBP':
    return 'webp'
  if head[:2] == b'BM' and len(head) >= 6:
    return 'bmp'
  return None


def looks_complete(head: bytes, tail: bytes, size: int) -> bool:
  """Tells from a file's two ends whether it is an image that was written to its end.

  OpenCV fills the missing part of a JPEG with grey and says nothing, so half-copied files would
  train silently. A JPEG or PNG carries an end marker, WebP and BMP carry their length.

  Args:
    head: the first 16 or more bytes.
    tail: the last `TAIL` bytes, or all of a smaller file. Cameras append to the end marker, so
      it may lie anywhere in there (compressed data cannot contain it). For what looks incomplete
      because more than that was appended, ask `is_complete`.
    size: bytes in the file.
  """
  fmt = kind(head)
  if fmt == 'jpeg':
    return b'\xff\xd9' in tail
  if fmt == 'png':
    return _PNG_END in tail
  if fmt == 'webp':
    return size >= struct.unpack('<I', head[4:8])[0] + 8
  if fmt == 'bmp':
    return size >= struct.unpack('<I', head[2:6])[0]
  return False


def is_complete(data: bytes) -> bool:
  """Like `looks_complete`, with the whole file at hand: exact whatever is appended or embedded."""
  fmt = kind(data[:16])
  if fmt == 'png':
    return data.rfind(_PNG_END) >= 0
  if fmt != 'jpeg':
    return looks_complete(data[:16], b'', len(data))
  # Walk the segments up to the first scan: an EXIF thumbnail has an end marker of its own.
  at = 2
  while at + 4 <= len(data) and data[at] == 0xff:
    if data[at + 1] == 0xff:  # Padding between segments.
      at += 1
      continue
    if data[at + 1] == 0xda:
      return data.rfind(b'\xff\xd9') > at
    at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
  return False


def decode(data: bytes, channels: int = 3) -> np.ndarray:
  """Decodes a JPEG, PNG, WebP or BMP.

  EXIF orientation is applied, palettes are looked up, 16-bit samples are reduced to their upper
  byte (within 1 of sample / 257), grey and colour are converted into each other as asked.
  Transparency is dropped and the colours beneath it stay, as in TensorFlow's `decode_image` and
  Pillow's `convert('RGB')`.

  Args:
    data: the encoded file.
    channels: 3 for RGB, 1 for grey.

  Returns:
    uint8 `[height, width, channels]`.

  Raises:
    ImageError: not an image, truncated, or corrupt.
  """
  if channels not in (1, 3):
    raise ValueError(f'channels must be 1 or 3, not {channels}')
  if not data:
    raise ImageError('image is empty (0 bytes)')
  if kind(data[:16]) is None:
    raise ImageError(f'not a JPEG, PNG, WebP or BMP image (begins with {data[:8]!r})')
  if not is_complete(data):
    raise ImageError(f'{kind(data[:16])} image is truncated ({len(data)} bytes)')
  flag = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
  except cv2.error as e:
    raise ImageError(f'{kind(data[:16])} image cannot be decoded: {e.err or e}') from e
  if image is None:
    raise ImageError(f'{kind(data[:16])} image is corrupt ({len(data)} bytes)')
  return image[..., None] if channels == 1 else image


# --- Files ---------------------------------------------------------------------------------------


def files(inputs: pathlib.Path) -> list[pathlib.Path]:
  """An image file itself, or the images of a folder by name. Raises `UserError` for neither."""
  if not inputs.exists():
    raise UserError(f'--input={inputs}: no such file or folder')
  if inputs.is_file():
    return [inputs]
  found = sorted(p for p in inputs.iterdir() if p.suffix.lower() in EXTENSIONS)
  if not found:
    raise UserError(f'--input={inputs}: no images in this folder; known endings: '
                    f'{", ".join(sorted(EXTENSIONS))}')
  return found


def read(path: pathlib.Path, channels: int) -> np.ndarray:
  """A user's image file, see `decode`. Raises `UserError` when it cannot be read."""
  try:
    return decode(path.read_bytes(), channels)
  except ImageError as e:
    raise UserError(f'{path}: {e}') from e


def write(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes uint8 `[height, width, 1 or 3]` as a PNG."""
  if image.shape[-1] == 3:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  path.write_bytes(cv2.imencode('.png', image)[1].tobytes())


# --- Sizes ---------------------------------------------------------------------------------------


def _resize(image: np.ndarray, height: int, width: int, method: int) -> np.ndarray:
  if image.shape[:2] == (height, width):
    return image
  out = cv2.resize(image, (width, height), interpolation=method)
  return out[..., None] if out.ndim == 2 else out  # OpenCV drops a single channel.


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Squashes to a square: bilinear, pixel centres at half integers, no antialiasing.

  Args:
    image: `[h, w, c]`, uint8 or float32.
    size: side of the result in pixels.

  Returns:
    `[size, size, c]` of the same dtype.
  """
  return _resize(image, size, size, cv2.INTER_LINEAR)


def resize_small(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes so that the shorter side has `size` pixels; the aspect ratio stays.

  Each new pixel is the mean of the area it covers. Sizes are rounded half to even in float32, as
  big_vision's `resize_small` does.

  Args:
    image: `[h, w, c]`, uint8 or float32.
    size: shorter side of the result in pixels.

  Returns:
    `[h', w', c]` of the same dtype, min(h', w') == size.
  """
  h, w = image.shape[:2]
  ratio = np.float32(size) / np.float32(min(h, w))
  height, width = (int(np.rint(np.float32(side) * ratio)) for side in (h, w))
  return _resize(image, height, width, cv2.INTER_AREA)


def _check_crop(image: np.ndarray, size: int) -> None:
  if min(image.shape[:2]) < size:
    raise ValueError(
        f'cannot crop {size}x{size} from an image of {image.shape[0]}x{image.shape[1]}')


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
  """Cuts the middle `[size, size, c]` out of `[h, w, c]` (offsets rounded down).

  Raises:
    ValueError: the image is smaller than the crop.
  """
  _check_crop(image, size)
  top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
  return image[top:top + size, left:left + size]


def reflect_pad(image: np.ndarray, border: int) -> np.ndarray:
  """Adds `border` pixels on each side of `[h, w, c]`, a mirror image without the outermost row."""
  out = cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_REFLECT_101)
  return out.reshape(*out.shape[:2], -1)


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
  """Cuts `[size, size, c]` out of `[h, w, c]`, every position equally likely.

  Raises:
    ValueError: the image is smaller than the crop.
  """
  _check_crop(image, size)
  top = int(rng.integers(image.shape[0] - size + 1))
  left = int(rng.integers(image.shape[1] - size + 1))
  return image[top:top + size, left:left + size]


def inception_box(
    height: int, width: int, rng: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
  """Draws the box of `inception_crop`.

  The law is that of TensorFlow's `sample_distorted_bounding_box` without an object: the aspect
  ratio is uniform, then the height is uniform among those that keep the area within bounds and
  the box within the image. (Not the area uniform, as torchvision has it.)

  Args:
    height, width: of the image, in pixels.
    rng: source of randomness.
    area: smallest and largest share of the image's area.
    ratio: smallest and largest width / height.

  Returns:
    `top, left, height, width` in pixels; the whole image when a hundred attempts fail.
  """
  low, high = area[0] * height * width, area[1] * height * width
  for _ in range(100):
    aspect = rng.uniform(*ratio)
    # The tallest box: within the area, the image's height, and (rounded) the image's width.
    tallest = min(round((high / aspect) ** 0.5), int((width + 0.5 - 1e-7) / aspect), height)
    h = min(round((low / aspect) ** 0.5), tallest)
    h += int(rng.integers(tallest - h + 1))
    # Rounding may leave the area by a hair: one pixel taller or shorter before giving up.
    if h * round(h * aspect) < low:
      h += 1
    if h * round(h * aspect) > high:
      h -= 1
    w = round(h * aspect)
    if low <= h * w <= high and 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  return 0, 0, height, width


def inception_crop(
    image: np.ndarray, size: int, rng: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Cuts a random box (`inception_box`) and squashes it to a square, bilinear.

  Args:
    image: `[h, w, c]`, uint8 or float32.
    size: side of the result in pixels.
    rng: source of randomness.
    area: smallest and largest share of the image's area.
    ratio: smallest and largest width / height.

  Returns:
    `[size, size, c]` of the same dtype.
  """
  top, left, h, w = inception_box(image.shape[0], image.shape[1], rng, area, ratio)
  return resize(image[top:top + h, left:left + w], size)


# --- Appearance ----------------------------------------------------------------------------------


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors `[h, w, c]` left to right with probability one half."""
  if rng.random() >= 0.5:
    return image
  # Not `image[:, ::-1]`: numpy takes 20 times as long to copy that into a batch.
  return cv2.flip(image, 1).reshape(image.shape)


def random_affine(
    image: np.ndarray, rng: np.random.Generator, degrees: float, translate: float,
    scale: tuple[float, float],
) -> np.ndarray:
  """Turns, shifts and scales about the middle; bilinear, black (0) comes in at the borders.

  Args:
    image: `[h, w, c]`, uint8 or float32.
    rng: source of randomness.
    degrees: the angle is uniform in [-degrees, degrees], counter-clockwise.
    translate: the shift is uniform within this share of each side.
    scale: smallest and largest factor, uniform.

  Returns:
    `[h, w, c]` of the same dtype.
  """
  h, w = image.shape[:2]
  angle = rng.uniform(-degrees, degrees)
  dx, dy = rng.uniform(-translate, translate, size=2) * (w, h)
  matrix = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), angle, rng.uniform(*scale))
  matrix[:, 2] += dx, dy
  out = cv2.warpAffine(image, matrix, (w, h), flags=cv2.INTER_LINEAR)
  return out[..., None] if out.ndim == 2 else out
