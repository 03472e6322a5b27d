"""The size of an encoded image, without decoding it."""

from core.data import images
from core.data.images import ImageError

# Start-of-frame segments of JPEG: all of C0..CF but the tables (C4), extensions (C8) and
# arithmetic conditioning (CC).
_FRAMES = frozenset(range(0xc0, 0xd0)) - {0xc4, 0xc8, 0xcc}


def image_size(data: bytes) -> tuple[int, int]:
  """(height, width) in pixels that `core.data.images.decode` would give.

  That of a JPEG or PNG is read off its header, with the orientation that cameras write there
  (which `decode` applies). WebP, BMP and the rare PNG with EXIF data are decoded.

  Args:
    data: the encoded file.

  Raises:
    ImageError: not an image, or cut off within its header.
  """
  fmt = images.kind(data[:16])
  if fmt == 'jpeg':
    return _jpeg_size(data)
  if fmt == 'png' and b'eXIf' not in data:
    if len(data) < 24 or data[12:16] != b'IHDR':
      raise ImageError('png image without a header')
    return int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
  return images.decode(data).shape[:2]


def _jpeg_size(data: bytes) -> tuple[int, int]:
  at, turned = 2, None
  while at + 9 <= len(data) and data[at] == 0xff:
    marker = data[at + 1]
    if marker == 0xff:  # Padding between segments.
      at += 1
      continue
    if marker in _FRAMES:
      height = int.from_bytes(data[at + 5:at + 7], 'big')
      width = int.from_bytes(data[at + 7:at + 9], 'big')
      return (width, height) if turned else (height, width)
    length = int.from_bytes(data[at + 2:at + 4], 'big')
    if marker == 0xe1 and turned is None and data[at + 4:at + 10] == b'Exif\0\0':
      turned = _orientation(data[at + 10:at + 2 + length]) >= 5
    at += 2 + length
  raise ImageError(f'jpeg image is cut off within its header ({len(data)} bytes)')


def _orientation(tiff: bytes) -> int:
  """EXIF's orientation, 1..8; from 5 on rows and columns are exchanged. 1 where it is not told."""
  order = {b'II': 'little', b'MM': 'big'}.get(tiff[:2])
  if order is None:
    return 1
  number = lambda start, size: int.from_bytes(tiff[start:start + size], order)
  directory = number(4, 4)
  for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
    if number(entry, 2) == 0x0112:
      value = number(entry + 8, 2)
      return value if 1 <= value <= 8 else 1
  return 1
