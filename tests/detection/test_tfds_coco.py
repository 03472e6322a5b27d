"""COCO with the features that tfds documents, made small."""

import pickle

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from core.config import UserError
from core.data import images
from core.data import sources
from detection import categories
from detection import tfds_coco
from tests.core.data.examples import png

SIZES = [(24, 16), (24, 16), (24, 16)]
# Area, box yxyx, is_crowd, label; the last box of image 1 has no width.
OBJECTS = [
    [(9, (.25, .5, .75, 1.), False, 0), (50, (0., 0., .5, .25), True, 79)],
    [(7, (.125, .25, .25, .75), False, 12), (3, (.5, .5, .75, .5), False, 1)],
    []]
SEGMENTS = {70_001: 80, 300: 2}  # Segment id -> label: 80 is 'banner'.


def picture():
  ids = np.zeros((24, 16), np.int64)
  ids[12:] = 70_001
  ids[3:6, 2:9] = 300
  return ids


def encoded(ids):
  rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
  return cv2.imencode('.png', rgb[..., ::-1])[1].tobytes()


with tfds.core.registered.skip_registration():  # tfds has a 'coco' of its own.
  class Coco(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.1.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n) for n in ('2017', '2017_panoptic')]
    url_infos = None

    def _info(self):
      panoptic = self.builder_config.name == '2017_panoptic'
      one = {'id': np.int64, 'area': np.int64, 'bbox': tfds.features.BBoxFeature(),
             'label': tfds.features.ClassLabel(num_classes=133 if panoptic else 80),
             'is_crowd': np.bool_}
      features = {'image': tfds.features.Image(encoding_format='jpeg'),
                  'image/filename': tfds.features.Text(), 'image/id': np.int64}
      features |= {
          'panoptic_image': tfds.features.Image(encoding_format='png'),
          'panoptic_image/filename': tfds.features.Text(),
          'panoptic_objects': tfds.features.Sequence(one)} if panoptic else {
              'objects': tfds.features.Sequence(one)}
      return tfds.core.DatasetInfo(builder=self, disable_shuffling=True,
                                   features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(3), 'validation': self._generate_examples(2)}

    def _generate_examples(self, n):
      for i in range(n):
        image = cv2.imencode('.jpg', np.full((*SIZES[i], 3), i, np.uint8))[1].tobytes()
        example = {'image': image, 'image/filename': f'{i}.jpg', 'image/id': 100 + i}
        if self.builder_config.name == '2017':
          example['objects'] = [
              {'id': 10 * i + j, 'area': a, 'bbox': tfds.features.BBox(*b), 'label': label,
               'is_crowd': c} for j, (a, b, c, label) in enumerate(OBJECTS[i])]
        else:
          example |= {'panoptic_image': encoded(picture()), 'panoptic_image/filename': f'{i}.png',
                      'panoptic_objects': [
                          {'id': k, 'area': 5, 'bbox': tfds.features.BBox(.5, 0., 1., 1.),
                           'label': v, 'is_crowd': False} for k, v in SEGMENTS.items()]}
        yield i, example


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp('tfds')
  for config in ('2017', '2017_panoptic'):
    Coco(config=config, data_dir=str(root), file_format='array_record').download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    for split in ('train', 'validation'):
      tfds_coco.scan(sources.open_source(f'coco/{config}', split, data_dir=str(root)),
                     root / 'sizes' / f'{config}-{split}.npz')
  return root


def opened(root, config='2017', split='train', **more):
  return tfds_coco.TfdsCoco(f'coco/{config}', split, data_dir=str(root),
                            **{'sizes_file': root / 'sizes' / f'{config}-{split}.npz'} | more)


def test_examples(data_dir):
  source = pickle.loads(pickle.dumps(opened(data_dir)))
  assert len(source) == 3 and len(source.class_names) == 80 and all(source.is_thing)
  assert source.sizes.tolist() == [list(s) for s in SIZES] and source.sizes.dtype == np.int32
  assert source.image_ids.tolist() == [100, 101, 102] and source.objects.tolist() == [1, 1, 0]
  example = source[0]
  assert images.decode(example['image']).shape == (24, 16, 3)
  assert (example['image_id'], example['height'], example['width']) == (100, 24, 16)
  assert example['boxes'].tolist() == [[8, 6, 16, 18], [0, 0, 4, 12]]
  assert example['labels'].tolist() == [0, 79] and example['crowd'].tolist() == [False, True]
  assert example['area'].tolist() == [9, 50]
  assert {k: str(example[k].dtype) for k in ('boxes', 'labels', 'area', 'crowd')} == dict(
      boxes='float32', labels='int32', area='float32', crowd='bool')
  assert source[1]['boxes'].tolist() == [[4, 3, 12, 6]]  # The one without width is left out.
  assert source[2]['boxes'].shape == (0, 4)
  assert set(source.target(2)) == set(example) - {'image'}


def test_raw_ids(data_dir):
  source = opened(data_dir, labels='ids')
  assert len(source.class_names) == 91 and source.class_names[90] == 'toothbrush'
  assert source[0]['labels'].tolist() == [1, 90] and source[1]['labels'].tolist() == [14]
  assert source.class_ids[13] == 13 and source.class_ids[12] == -1 and not source.class_names[12]


@pytest.mark.parametrize('labels, classes, want', [
    ('contiguous', 133, [80, 2]), ('ids', 250, [92, 3])])
def test_panoptic(data_dir, labels, classes, want):
  source = opened(data_dir, '2017_panoptic', masks=True, labels=labels)
  example = source[1]
  assert len(source.class_names) == classes and example['labels'].tolist() == want
  assert [source.class_names[i] for i in want] == ['banner', 'car']
  assert [source.is_thing[i] for i in want] == [False, True]
  ids = picture()
  np.testing.assert_array_equal(example['segments'], np.select([ids == 70_001, ids == 300], [1, 2]))
  assert example['boxes'].tolist() == [[0, 12, 15, 23], [2, 3, 8, 5]]


def test_ground_truth(data_dir):
  pycocotools = pytest.importorskip('pycocotools.mask')
  truth = opened(data_dir).coco()
  assert [c['id'] for c in truth['categories']] == list(categories.THINGS)
  assert truth['images'][0] == {'id': 100, 'height': 24, 'width': 16}
  assert truth['annotations'] == [
      {'id': 1, 'image_id': 100, 'category_id': 1, 'bbox': [8, 6, 8, 12], 'area': 9, 'iscrowd': 0},
      {'id': 2, 'image_id': 100, 'category_id': 90, 'bbox': [0, 0, 4, 12], 'area': 50,
       'iscrowd': 1},
      {'id': 3, 'image_id': 101, 'category_id': 14, 'bbox': [4, 3, 8, 3], 'area': 7, 'iscrowd': 0}]
  truth = opened(data_dir, '2017_panoptic', 'validation', masks=True).coco()
  assert truth['annotations'][0]['bbox'] == [0, 12, 16, 12]
  np.testing.assert_array_equal(
      pycocotools.decode(truth['annotations'][0]['segmentation']), picture() == 70_001)


def test_mistakes(data_dir, tmp_path):
  with pytest.raises(UserError, match='no masks; use coco/2017_panoptic'):
    opened(data_dir, masks=True)
  with pytest.raises(UserError, match='no such file; --mode=prepare'):
    opened(data_dir, sizes_file=tmp_path / 'none.npz')
  with pytest.raises(UserError, match='of other images than'):
    opened(data_dir, sizes_file=data_dir / 'sizes' / '2017-validation.npz')
  with pytest.raises(UserError, match='of other images than'):
    opened(data_dir, split='train[1:]', sizes_file=data_dir / 'sizes' / '2017-validation.npz')
  for name, data in (('text', b'hello'), ('empty', b''),
                     ('cut', (data_dir / 'sizes' / '2017-train.npz').read_bytes()[:200])):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match='cannot be read.*--mode=prepare'):
      opened(data_dir, sizes_file=tmp_path / name)


class Broken:
  features = ('image', 'image/id', 'objects')

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return {'image': png(0)[:20], 'image/id': 1,
            'objects': {name: [] for name in ('bbox', 'id', 'area', 'label', 'is_crowd')}}

  def __repr__(self):
    return 'Broken()'


def test_scan_leaves_no_half_file(tmp_path):
  with pytest.raises(UserError, match=r'example 0 of Broken\(\)'):
    tfds_coco.scan(Broken(), tmp_path / 'sizes.npz')
  assert not list(tmp_path.iterdir())
  source = Broken()
  source.features = ('image', 'label')
  with pytest.raises(UserError, match='it has image, label'):
    tfds_coco.scan(source, tmp_path / 'sizes.npz')
