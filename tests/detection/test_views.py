"""Views of a source: how they are counted, and which bucket each is of."""

import pickle

import numpy as np
import pytest

from core.config import UserError
from detection import augment
from detection import views


class Sizes:
  """A source of examples that are their sizes."""

  def __init__(self, sizes):
    self.sizes = np.array(sizes, np.int32)
    self.image_ids = np.arange(len(sizes), dtype=np.int64) + 100

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, index):
    return {'image_id': int(self.image_ids[index]), 'height': self.sizes[index, 0]}

  def __repr__(self):
    return 'Sizes'


SHAPES = ((100, 200), (200, 100), (120, 120), (200, 200))


def given(sizes):
  made = np.zeros((len(sizes), 1), augment.View)
  made['height'][:, 0], made['width'][:, 0] = np.array(sizes).T
  return made


def test_smallest_bucket_that_holds_a_view():
  sizes = [(120, 120), (100, 121), (100, 200), (200, 100), (121, 101), (10, 10), (1, 130), (130, 1)]
  viewed = views.Viewed(Sizes(sizes), given(sizes), SHAPES)
  assert viewed.buckets.tolist() == [2, 0, 0, 1, 3, 2, 0, 1]
  assert np.issubdtype(viewed.buckets.dtype, np.integer)
  assert viewed[4]['shape'] == (200, 200) and viewed[0]['shape'] == (120, 120)
  # Equal areas: the first.
  assert views.Viewed(Sizes([(5, 5)]), given([(5, 5)]), SHAPES[1::-1]).buckets.tolist() == [0]


def test_views_of_an_image_are_next_to_each_other():
  source = Sizes([[48, 64], [64, 48], [50, 50]])
  drawn = np.zeros((3, 4), augment.View)
  drawn['height'], drawn['width'] = np.arange(1, 13).reshape(3, 4), 7
  viewed = views.Viewed(source, drawn, ((4, 8), (16, 8)))
  assert len(viewed) == 12 and viewed.source is source
  for j in range(12):
    made = viewed[j]
    assert made['image_id'] == 100 + j // 4 and made['view']['height'] == j + 1
    assert made['shape'] == ((4, 8) if j < 4 else (16, 8))
  assert viewed.buckets.tolist() == [0] * 4 + [1] * 8
  for index in (-1, 12):
    with pytest.raises(IndexError):
      viewed[index]
  copy = pickle.loads(pickle.dumps(viewed))
  assert copy[5]['view'] == viewed[5]['view'] and repr(copy) == repr(viewed)
  np.testing.assert_array_equal(copy.buckets, viewed.buckets)


def test_evaluation_keeps_the_order():
  source = Sizes([[48, 64], [64, 48], [50, 50]])
  viewed = views.Viewed(source, augment.evaluation_views(source.sizes, 80, 133),
                        ((80, 106), (106, 80)))
  assert [viewed[i]['image_id'] for i in range(len(viewed))] == [100, 101, 102]
  assert viewed.buckets.tolist() == [0, 1, 0]


def test_a_view_that_no_bucket_holds():
  sizes = [(10, 10), (90, 201), (300, 300)]
  with pytest.raises(UserError, match='image 101 is 90x201.*2 of 3 views.*is 200x200'):
    views.Viewed(Sizes(sizes), given(sizes), SHAPES)
  with pytest.raises(UserError, match=r'config.data.buckets=\(\)'):
    views.Viewed(Sizes(sizes), given(sizes), ())
