import types

import numpy as np

from detection import query_pictures
from tests.detection.drawn import near, read, run_of


def test_query_boxes(tmp_path):
  """Kinds by hand; the one query's small boxes are green and where their centres are."""
  boxes = np.array([[.4, .3, .6, .6], [.3, .4, .6, .6], [0, .45, 1, .55], [.45, 0, .55, 1.],
                    [.25, .25, .75, .75]])
  assert query_pictures.kinds_of(boxes).tolist() == [0, 0, 1, 2, 1]
  boxes = np.tile([.2, .7, .3, .8], (40, 2, 1))
  boxes[:, 1] = .05, .25, .95, .75
  query_pictures.query_boxes(boxes, tmp_path / 'one.png', count=1)
  picture = read(tmp_path / 'one.png')
  grey = near(picture, [.827] * 3, .02)
  rows, columns = (np.flatnonzero(grey.sum(axis) > 150) for axis in (1, 0))
  frame = rows[0], rows[-1], columns[0], columns[-1]
  green = np.argwhere((picture[..., 1] - picture[..., 0] > .3)
                      & (np.arange(len(picture)) < frame[1])[:, None]).mean(0)
  place = (green - [frame[0], frame[2]]) / [frame[1] - frame[0], frame[3] - frame[2]]
  np.testing.assert_allclose(place, [.75, .25], atol=.02)
  query_pictures.query_boxes(boxes, tmp_path / 'both.png')
  red = [(read(tmp_path / f'{name}.png')[:frame[1]] @ [1, -1, 0] > .4).any()
         for name in ('one', 'both')]
  assert red == [False, True]


def test_slots_take_all_images(tmp_path, monkeypatch):
  seen = np.random.default_rng(0).random((4, 5, 4))  # Batch, queries.
  task = types.SimpleNamespace(detect=lambda params, batch: {'boxes': seen + batch})
  drawn = []
  monkeypatch.setattr(query_pictures, 'query_boxes',
                      lambda boxes, path: drawn.append((boxes, path)))
  query_pictures.Slots('test')(run_of(tmp_path, task, [0, 1]), {}, 5)
  (boxes, path), = drawn
  np.testing.assert_array_equal(boxes, np.concatenate([seen, seen + 1]))
  assert path == tmp_path / 'queries.png'
