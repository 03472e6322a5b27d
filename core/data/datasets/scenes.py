"""Scenes of handwritten digits on patterned grounds: boxes, masks and stuff to learn from.

A scene is 64x64 pixels. Its ground is one to three regions, each of another kind of stuff: plain
`paper`, a `grid` of lines, `stripes`, `dots`. On it lie one to four digits (none in one scene of a
hundred) in coloured ink, enlarged to 18..30 pixels, of `core.data.datasets.digits`: the digits of a
split occur in the scenes of that split alone. Colours say nothing of the class.

Which digits, sizes and places a scene has follows from its split and number alone; drawing is
OpenCV's. Both are part of the version below.
"""

import colorsys
import dataclasses
from collections.abc import Iterator

import cv2
import numpy as np
import tensorflow_datasets as tfds

from core.data.datasets import digits

SIDE = 64
STUFF = ('paper', 'grid', 'stripes', 'dots')
CLASS_NAMES = (*'0123456789', *STUFF)
SIZES = {'train': 6000, 'validation': 500, 'test': 1000}

_MOST = 4  # Digits a scene.
_SMALLEST, _LARGEST = 18, 30  # Pixels that the eight of a digit become.
_OVERLAP = .1  # Highest IoU of two digits' boxes.
_VISIBLE = .8  # Share of a digit's ink that others leave to be seen.
_TRIES = 20  # Places tried for a digit before there is one digit fewer.
_LUMINANCE = np.array([.299, .587, .114], np.float32)  # Of Rec. 601.
_Y, _X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture and what is in it.

  Attributes:
    image: uint8 `[64, 64, 3]`, RGB.
    segments: uint8 `[64, 64]`: 1..n are the n digits in the order of `labels`, n+1.. the stuff in
      the order of `stuff`; every pixel belongs to one.
    boxes: int32 `[n, 4]`, x0, y0, x1, y1 of the pixels of each digit that are seen; x1 and y1 are
      one past the last pixel.
    labels: int32 `[n]`, 0..9.
    sources: int32 `[n]`, which digits of the split these are.
    colours: uint8 `[n, 3]`, the inks, RGB.
    stuff: int32 `[s]`, 10.. for the names in `STUFF`, ascending; each occurs once.
    stuff_boxes: int32 `[s, 4]`, of the pixels seen, as panoptic targets have them: x1 and y1 are
      the last pixel.
  """
  image: np.ndarray
  segments: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  sources: np.ndarray
  colours: np.ndarray
  stuff: np.ndarray
  stuff_boxes: np.ndarray


def scene(split_digits: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> Scene:
  """Draws a scene.

  Args:
    split_digits: images uint8 `[n, 8, 8]` and labels `[n]`, as `digits.digits(split)` gives them.
    rng: all randomness.
  """
  images, labels = split_digits
  picture, kinds = _ground(rng)
  digit_map = np.zeros((SIDE, SIDE), np.int32)
  boxes, sources, colours = [], [], []
  inked, seen = np.zeros(_MOST, np.int64), np.zeros(_MOST, np.int64)  # Pixels of each digit.
  hue = rng.random()
  for _ in range(0 if rng.random() < .01 else int(rng.integers(1, _MOST + 1))):
    source = int(rng.integers(len(images)))
    ink = _enlarge(images[source], int(rng.integers(_SMALLEST, _LARGEST + 1)))
    mask = ink >= .5
    x0, y0, x1, y1 = _box(mask)
    hue += .381966  # The golden angle: no two digits of a scene have the same ink.
    colour = _colour(hue, rng.uniform(.5, 1), rng.uniform(.03, .28))  # Dark on light ground.
    for _ in range(_TRIES):
      top, left = (int(rng.integers(SIDE - n + 1)) for n in ink.shape)
      place = np.s_[top:top + ink.shape[0], left:left + ink.shape[1]]
      box = (left + x0, top + y0, left + x1, top + y1)
      if any(_iou(box, other) > _OVERLAP for other in boxes):
        continue
      covered = np.bincount(digit_map[place][mask], minlength=_MOST + 1)[1:]
      if np.all(seen - covered >= _VISIBLE * inked):
        seen -= covered
        inked[len(boxes)] = seen[len(boxes)] = mask.sum()
        boxes.append(box)
        sources.append(source)
        colours.append(colour)
        digit_map[place][mask] = len(boxes)
        picture[place] += ink[..., None] * (colour - picture[place])
        break

  n = len(boxes)
  stuff = np.flatnonzero(np.bincount(kinds[digit_map == 0]))
  segments = np.where(digit_map > 0, digit_map, n + 1 + np.searchsorted(stuff, kinds))
  return Scene(
      image=_uint8(picture), segments=segments.astype(np.uint8),
      boxes=_array([_box(segments == i + 1) for i in range(n)], (n, 4)),
      labels=labels[sources].astype(np.int32) if n else np.zeros(0, np.int32),
      sources=_array(sources, (n,)), colours=_uint8(np.reshape(colours, (n, 3))),
      stuff=(10 + stuff).astype(np.int32),
      stuff_boxes=_array([_box(segments == n + 1 + i) for i in range(len(stuff))],
                         (len(stuff), 4)) - np.array([0, 0, 1, 1], np.int32))


def scenes(split: str) -> Iterator[Scene]:
  """Yields the scenes of a split in order.

  Raises:
    KeyError: the split is none of train, validation and test.
  """
  split_digits = digits.digits(split)
  for number in range(SIZES[split]):
    yield scene(split_digits, np.random.default_rng((list(SIZES).index(split), number)))


# --- Drawing -------------------------------------------------------------------------------------


def _ground(rng) -> tuple[np.ndarray, np.ndarray]:
  """Picture float32 `[64, 64, 3]` in 0..1, and of each pixel the number of its stuff."""
  count = int(rng.integers(1, len(STUFF)))
  kinds = rng.permutation(len(STUFF))[:count]
  while True:
    part = np.zeros((SIDE, SIDE), np.int64)
    for new in range(1, count):
      # Halves the largest part.
      largest = part == np.bincount(part.ravel()).argmax()
      part[largest & _one_side(rng, largest)] = new
    areas = np.bincount(part.ravel(), minlength=count)
    if areas.min() >= SIDE * SIDE // 8:
      break
  colours = np.empty((2, count, 3), np.float32)
  amount = np.empty((count, SIDE, SIDE), np.float32)
  for number, kind in enumerate(kinds):
    colours[0, number], colours[1, number], amount[number] = _texture(STUFF[kind], rng)
  amount = np.take_along_axis(amount, part[None], 0)[0, ..., None]
  base, other = colours[:, part]
  return base + amount * (other - base), kinds[part]


def _one_side(rng, within: np.ndarray) -> np.ndarray:
  """Bool `[64, 64]`: the pixels on one side of a straight or wavy line near the middle of a set."""
  angle = rng.uniform(0, 2 * np.pi)
  bend = rng.uniform(3, 8) * (rng.random() < .6)
  across = np.cos(angle) * _X + np.sin(angle) * _Y
  along = np.cos(angle) * _Y - np.sin(angle) * _X
  inside = across[within]
  middle = inside.mean() + rng.uniform(-.4, .4) * inside.std()
  return across + bend * np.sin(along * (2 * np.pi / rng.uniform(30, 70)) + rng.uniform(0, 6.28)
                                ) > middle


def _texture(kind: str, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Two colours float32 `[3]`, and how much of the second each pixel has, `[64, 64]` in 0..1."""
  luminance, contrast = rng.uniform(.8, .94), rng.uniform(.08, .14)
  hue = rng.random()
  base = _colour(hue, rng.uniform(.1, .7), luminance)
  other = _colour(hue + rng.uniform(-.3, .3), rng.uniform(.2, .8), luminance - contrast)
  period = rng.uniform(6, 10)
  x, y = _X / period + rng.random(), _Y / period + rng.random()  # In periods.
  if kind == 'paper':  # No pattern, a shade from one side to the other.
    angle = rng.uniform(0, 2 * np.pi)
    amount = .125 + (np.cos(angle) * (_X - SIDE / 2) + np.sin(angle) * (_Y - SIDE / 2)) / 512
  elif kind == 'grid':
    amount = np.minimum(x - np.floor(x), y - np.floor(y)) < 1.3 / period
  elif kind == 'stripes':
    angle = rng.uniform(0, np.pi)
    across = np.cos(angle) * x + np.sin(angle) * y
    amount = across - np.floor(across) < .5
  else:
    row = np.floor(y)
    x = x + row * .5  # Every other row of dots is shifted by half.
    amount = (x - np.floor(x) - .5)**2 + (y - row - .5)**2 < .09
  return base, other, amount


def _enlarge(digit: np.ndarray, side: int) -> np.ndarray:
  """Ink float32 `[h, w]` in 0..1 of a digit uint8 `[8, 8]` drawn `side` pixels large, trimmed."""
  soft = cv2.resize(digit, (side, side), interpolation=cv2.INTER_CUBIC) / np.float32(255)
  ink = np.clip((soft - .35) / .4, 0, 1)  # Steeper edges, or all digits look out of focus.
  x0, y0, x1, y1 = _box(ink > 0)
  return ink[y0:y1, x0:x1]


def _colour(hue: float, saturation: float, luminance: float) -> np.ndarray:
  """RGB in 0..1 of exactly this luminance: darkened, or mixed with white."""
  pure = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 1), np.float32)
  light = pure @ _LUMINANCE
  if luminance <= light:
    return pure * (luminance / light)
  return pure + (1 - pure) * ((luminance - light) / (1 - light))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
  """x0, y0, x1, y1 of the true pixels; x1 and y1 are one past the last."""
  x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
  return x, y, x + width, y + height


def _iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  common = max(width, 0) * max(height, 0)
  areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
  return common / (sum(areas) - common)


def _uint8(values: np.ndarray) -> np.ndarray:
  return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _array(rows: list, shape: tuple[int, ...]) -> np.ndarray:
  return np.reshape(rows, shape).astype(np.int32)  # `reshape` gives an empty list its columns.


# --- The data set --------------------------------------------------------------------------------


class DigitScenes(tfds.core.GeneratorBasedBuilder):
  """tfds builder of the scenes.

  `objects` are the digits, `stuff` the regions, with `bbox` as in `Scene`, `label` (the place in
  `CLASS_NAMES`) and `area` in pixels seen; `panoptic` is a PNG of `Scene.segments`.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': '6000 / 500 / 1000 scenes of the digits of the same split.'}
  url_infos = None  # No downloads; see `core.data.datasets.digits`.

  def _info(self) -> tfds.core.DatasetInfo:
    things = {
        'bbox': tfds.features.Tensor(shape=(4,), dtype=np.float32),
        'label': tfds.features.ClassLabel(names=CLASS_NAMES),
        'area': tfds.features.Scalar(np.float32),
    }
    return tfds.core.DatasetInfo(
        builder=self,
        description='Handwritten digits (UCI, via scikit-learn, CC BY 4.0) on drawn grounds.',
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(
                shape=(SIDE, SIDE, 3), dtype=np.uint8, encoding_format='png'),
            'image_id': tfds.features.Scalar(np.int64),
            'objects': tfds.features.Sequence(things),
            'stuff': tfds.features.Sequence(things),
            'panoptic': tfds.features.Image(
                shape=(SIDE, SIDE, 1), dtype=np.uint8, encoding_format='png'),
        }),
        homepage='https://doi.org/10.24432/C50P49',
        license='CC BY 4.0',
        disable_shuffling=True,  # The scenes are drawn independently.
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing is downloaded.
    return {split: self._generate_examples(split) for split in SIZES}

  def _generate_examples(self, split: str):
    for number, drawn in enumerate(scenes(split)):
      areas = np.bincount(drawn.segments.ravel())[1:].astype(np.float32)
      n = len(drawn.labels)
      yield number, {
          'image': _png(drawn.image[..., ::-1]),
          'image_id': number,
          'objects': {'bbox': drawn.boxes.astype(np.float32), 'label': drawn.labels,
                      'area': areas[:n]},
          'stuff': {'bbox': drawn.stuff_boxes.astype(np.float32), 'label': drawn.stuff,
                    'area': areas[n:]},
          'panoptic': _png(drawn.segments),
      }


def _png(image: np.ndarray) -> bytes:
  # OpenCV's own choice is the fastest compression, and files half as large again.
  return cv2.imencode('.png', image, (cv2.IMWRITE_PNG_COMPRESSION, 6))[1].tobytes()
