"""Pictures that tests make and read: a ground of a colour of its own, and where colours are."""

import types

import cv2
import numpy as np

# No text, line or heat has this colour.
GROUND = np.array([0, 0, 40], np.uint8)


def ground(height, width):
  return np.tile(GROUND, (height, width, 1))


def read(path):
  """RGB float `[h, w, 3]` in [0, 1]."""
  return cv2.imread(str(path))[..., ::-1] / 255


def near(picture, colour, tolerance=.04):
  return (abs(picture - np.array(colour)) < tolerance).all(-1)


def extent(mask):
  """First row, one past the last, first column, one past the last."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def run_of(tmp_path, task, batches):
  """What an evaluator asks of a run, on the host."""
  return types.SimpleNamespace(
      plan=types.SimpleNamespace(task=task), writes=True, pictures=tmp_path,
      map=lambda fn, params, split: ({**fn(params, batch), 'index': batch} for batch in batches))
