"""What test files of this folder share: made-up examples, streams of them, and a comparison."""

import cv2
import numpy as np

from core.data import images
from core.data import pipeline


class Numbers:
  """A source whose examples are their indices; some of them can be broken."""

  def __init__(self, n, broken=()):
    self._n, self._broken = n, frozenset(broken)

  def __len__(self):
    return self._n

  def __getitem__(self, index):
    if not 0 <= index < self._n:
      raise IndexError(index)
    if index in self._broken:
      raise images.ImageError(f'number {index} is broken')
    return {'number': index}


def with_noise(example, rng):
  return {'number': np.int32(example['number']), 'noise': rng.random(3).astype(np.float32)}


def take(stream, n):
  try:
    return [next(stream) for _ in range(n)]
  finally:
    stream.close()


def train(rows, *, n=23, batch_size=8, seed=3, start_step=0, steps=9, **kw):
  return take(pipeline.train_stream(Numbers(n), with_noise, batch_size=batch_size, rows=rows,
                                    seed=seed, start_step=start_step, **kw), steps)


def assert_same(got, want):
  assert len(got) == len(want)
  for g, w in zip(got, want):
    assert set(g) == set(w)
    for name in w:
      assert g[name].dtype == w[name].dtype
      np.testing.assert_array_equal(g[name], w[name])


def png(value, size=4):
  return cv2.imencode('.png', np.full((size, size, 3), value, np.uint8))[1].tobytes()
