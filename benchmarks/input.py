"""How fast images reach the model: JPEG decoding, random crop to 224, flip.

    python -m benchmarks.input [--seconds=3] [--images=64] [--cores=2]

Photographs are imitated (500x375, some 65 kB), so nothing needs to be downloaded.
The peer is Pillow, given the same bytes and the same boxes in the same run: once with the same
filter (bilinear without antialiasing, `Image.transform`), once as torchvision uses it
(`Image.resize`, antialiased: other pixels, but what people run). `loop` is the bare function in one
thread; the other rows are the training pipeline (`core.data.pipeline.train_stream`), where only the
transform differs. The sides take turns; a rate is the median of the turns, a ratio that of the
rounds.
"""

import functools
import io
import os
import statistics
import time

import cv2
import numpy as np
from absl import app
from absl import flags

from core.data import images
from core.data import pipeline

_SECONDS = flags.DEFINE_float('seconds', 3, 'length of one turn of one side')
_TURNS = flags.DEFINE_integer('turns', 3, 'turns of each side')
_IMAGES = flags.DEFINE_integer('images', 64, 'different images')
_CORES = flags.DEFINE_integer('cores', 0, 'threads or processes; 0 for all cores')
_SIZE = 224
_BATCH = 32


class Photographs:
  """A source of made-up JPEGs: noise of several scales, as natural pictures have."""

  def __init__(self, n: int, height: int = 375, width: int = 500):
    rng = np.random.default_rng(0)
    self._files = []
    for _ in range(n):
      picture = np.full((height, width, 3), 128, np.float32)
      for octave in range(8):
        grid = rng.normal(0, 50 / 1.35**octave, (3 * 2**octave, 4 * 2**octave, 3))
        picture += cv2.resize(grid.astype(np.float32), (width, height),
                              interpolation=cv2.INTER_CUBIC)
      pixels = np.clip(picture, 0, 255).astype(np.uint8)
      options = [cv2.IMWRITE_JPEG_QUALITY, 90]
      self._files.append(cv2.imencode('.jpg', pixels, options)[1].tobytes())

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, bytes]:
    return {'image': self._files[index]}

  @property
  def bytes_each(self) -> float:
    return statistics.mean(map(len, self._files))


def ours(example, rng):
  image = images.inception_crop(images.decode(example['image']), _SIZE, rng)
  return {'image': np.ascontiguousarray(images.flip(image, rng))}


def pillow(example, rng, antialias: bool = False):
  import PIL.Image
  image = PIL.Image.open(io.BytesIO(example['image'])).convert('RGB')
  top, left, h, w = images.inception_box(image.height, image.width, rng)
  box = (left, top, left + w, top + h)
  if antialias:
    image = image.resize((_SIZE, _SIZE), PIL.Image.Resampling.BILINEAR, box=box)
  else:
    image = image.transform((_SIZE, _SIZE), PIL.Image.Transform.EXTENT, box,
                            PIL.Image.Resampling.BILINEAR)
  if rng.random() < 0.5:
    image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
  return {'image': np.asarray(image)}


SIDES = {'throughline': ours, 'Pillow': pillow,
         'Pillow resize': functools.partial(pillow, antialias=True)}


def loop_rate(source, transform, seconds: float) -> float:
  """Images per second of the bare function, in CPU time: other programs do not count."""
  rng = np.random.default_rng(0)
  done, start = 0, time.process_time()
  while time.process_time() - start < seconds:
    transform(source[done % len(source)], rng)
    done += 1
  return done / (time.process_time() - start)


def stream_rate(source, transform, seconds: float, *, threads: int, workers: int) -> float:
  """Images per second out of the pipeline, once it runs."""
  stream = pipeline.train_stream(source, transform, batch_size=_BATCH, rows=range(_BATCH), seed=0,
                                 threads=threads, workers=workers)
  for _ in range(2 + 2 * workers):  # What was read ahead while starting would flatter.
    next(stream)
  done, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    next(stream)
    done += _BATCH
  rate = done / (time.perf_counter() - start)
  stream.close()
  return rate


def check_same_work(source) -> float:
  """Returns the mean difference of both sides' pixels, in levels of 255; they must agree."""
  differences = []
  for i in range(min(8, len(source))):
    a, b = (f(source[i], np.random.default_rng(i))['image'].astype(int) for f in (ours, pillow))
    differences.append(np.abs(a - b).mean())
  difference = statistics.mean(differences)
  if difference > 2:
    raise AssertionError(f'not the same work: pixels differ by {difference:.1f} levels')
  return difference


def main(argv):
  del argv
  cores = _CORES.value or len(os.sched_getaffinity(0))
  source = Photographs(_IMAGES.value)
  print(f'{len(source)} JPEGs of 500x375, {source.bytes_each / 1e3:.0f} kB each; {cores} cores; '
        'pixels of throughline and Pillow differ by '
        f'{check_same_work(source):.2f} of 255 on average')
  settings = {
      'loop, 1 thread (CPU time)': loop_rate,
      'pipeline, 1 thread': functools.partial(stream_rate, threads=1, workers=0),
      f'pipeline, {cores} threads': functools.partial(stream_rate, threads=cores, workers=0),
      f'pipeline, {cores} processes': functools.partial(stream_rate, threads=1, workers=cores),
  }
  print(f'{"images/s":28}' + ''.join(f'{side:>15}' for side in SIDES) + '   ratios')
  for name, rate in settings.items():
    rounds = [[rate(source, side, _SECONDS.value) for side in SIDES.values()]
              for _ in range(_TURNS.value)]
    rates = [statistics.median(side) for side in zip(*rounds)]
    ratios = [statistics.median(r[0] / r[peer] for r in rounds) for peer in (1, 2)]
    print(f'{name:28}' + ''.join(f'{r:15.0f}' for r in rates)
          + ''.join(f'{r:8.2f}' for r in ratios), flush=True)


if __name__ == '__main__':
  app.run(main)
