"""Scenes as a detection source: the examples, and ground truth that pycocotools reads."""

import contextlib
import io
import pickle

import cv2
import numpy as np
import pytest

from core.config import UserError
from core.data.datasets import scenes as drawing
from detection import scenes


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """`Scenes` over a data set of few scenes."""
  data_dir = str(tmp_path_factory.mktemp('scenes'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(drawing, 'SIZES', {'train': 6, 'validation': 4, 'test': 4})
    scenes.Scenes('train', data_dir)
  return lambda split='train', **kw: scenes.Scenes(split, data_dir, **kw)


@pytest.fixture(scope='module')
def drawn():
  generator = drawing.scenes('train')
  return [next(generator) for _ in range(6)]


def test_digits_alone(opened, drawn):
  source = opened()
  assert len(source) == 6 and source.class_names == list('0123456789')
  assert source.class_ids == list(range(10)) and source.is_thing == [True] * 10
  assert source.sizes.dtype == np.int32 and source.sizes.tolist() == [[64, 64]] * 6
  assert source.image_ids.tolist() == list(range(6)) and source.image_ids.dtype == np.int64
  assert source.objects.tolist() == [len(s.labels) for s in drawn]
  for i, s in enumerate(drawn):
    example = source[i]
    assert (example['image_id'], example['height'], example['width']) == (i, 64, 64)
    pixels = cv2.imdecode(np.frombuffer(example['image'], np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(pixels, s.image)
    for name, dtype in (('boxes', np.float32), ('labels', np.int32), ('area', np.float32),
                        ('crowd', bool)):
      assert example[name].dtype == dtype and len(example[name]) == len(s.labels)
    np.testing.assert_array_equal(example['boxes'], s.boxes)
    np.testing.assert_array_equal(example['labels'], s.labels)
    assert 'segments' not in example and not example['crowd'].any()


def test_masks_with_and_without_stuff(opened, drawn):
  things, everything = opened(masks=True), opened(masks=True, stuff=True)
  assert everything.class_names[10:] == ['paper', 'grid', 'stripes', 'dots']
  assert everything.is_thing == [True] * 10 + [False] * 4
  assert everything.objects.tolist() == [len(s.labels) + len(s.stuff) for s in drawn]
  for i, s in enumerate(drawn):
    n = len(s.labels)
    target = things.target(i)
    assert 'image' not in target and target['segments'].dtype == np.int32
    np.testing.assert_array_equal(target['segments'], np.where(s.segments <= n, s.segments, 0))
    target = everything[i]
    np.testing.assert_array_equal(target['segments'], s.segments)
    np.testing.assert_array_equal(target['labels'], [*s.labels, *s.stuff])
    np.testing.assert_array_equal(target['boxes'], [*s.boxes, *s.stuff_boxes])
    np.testing.assert_array_equal(
        target['area'], np.bincount(s.segments.ravel(), minlength=len(target['labels']) + 1)[1:])


def test_slices_workers_and_unknown_splits(opened):
  source = opened('train[2:4]', masks=True, stuff=True)
  assert len(source) == 2 and source.image_ids.tolist() == [2, 3] and source.objects.shape == (2,)
  copy = pickle.loads(pickle.dumps(source))
  assert repr(copy) == repr(source) and 'stuff=True' in repr(source)
  np.testing.assert_array_equal(copy[1]['segments'], source[1]['segments'])
  with pytest.raises(UserError, match='does not exist'):
    opened('holdout')


def test_pycocotools_reads_the_ground_truth(opened, drawn):
  coco = pytest.importorskip('pycocotools.coco')
  source = opened(masks=True, stuff=True)
  index = coco.COCO()
  index.dataset = source.coco()
  with contextlib.redirect_stdout(io.StringIO()):
    index.createIndex()
  assert [c['name'] for c in index.loadCats(index.getCatIds())] == source.class_names
  for i, s in enumerate(drawn):
    annotations = index.loadAnns(index.getAnnIds(imgIds=[i]))
    assert len(annotations) == source.objects[i] and all(a['id'] > 0 for a in annotations)
    for n, annotation in enumerate(annotations):
      np.testing.assert_array_equal(index.annToMask(annotation), s.segments == n + 1)
      assert annotation['area'] == (s.segments == n + 1).sum()
    x0, y0, x1, y1 = s.boxes[0].tolist()
    assert annotations[0]['bbox'] == [x0, y0, x1 - x0, y1 - y0]
  plain = opened().coco()['annotations']
  assert 'segmentation' not in plain[0] and len(plain) == sum(len(s.labels) for s in drawn)
