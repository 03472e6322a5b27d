"""tfds directories and folders of images, and everything a user can get wrong with them."""

import concurrent.futures
import json
import os
import pathlib
import pickle
import shutil

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging

from core.config import UserError
from core.data import images
from core.data import pipeline
from core.data import sources


def png(value, size=4):
  return cv2.imencode('.png', np.full((size, size, 3), value, np.uint8))[1].tobytes()


class TinySet(tfds.core.GeneratorBasedBuilder):
  """Ten images for training, four for testing; the pixel value is the index."""

  VERSION = tfds.core.Version('1.2.0')
  url_infos = None  # No downloads; see `core.data.datasets.digits`.

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=(
        tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(None, None, 3)),
            'label': tfds.features.ClassLabel(names=['cat', 'dog']),
            'text': tfds.features.Text(),
            'box': tfds.features.BBoxFeature()})))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(10), 'test': self._generate_examples(4)}

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {'image': png(i), 'label': i % 2, 'text': f'number {i}',
                'box': tfds.features.BBox(0.0, 0.0, 0.5, 1.0)}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp('tfds')
  TinySet(data_dir=str(root), file_format='array_record').download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  return str(root)


@pytest.fixture
def copy(data_dir, tmp_path):
  """A writable copy of the data set: (root, version directory)."""
  root = tmp_path / 'copy'
  shutil.copytree(data_dir, root)
  return root, root / 'tiny_set' / '1.2.0'


# --- tfds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tiny_set', 'tfds:tiny_set', 'tfds:tiny_set:1.2.0'])
def test_reads_a_prepared_set(data_dir, name):
  source = sources.open_source(name, 'train', data_dir=data_dir, features=('image', 'text'))
  assert len(source) == 10 and source.class_names == ['cat', 'dog']
  assert set(source.features) == {'image', 'label', 'text', 'box'}
  for i in range(10):
    example = source[i]
    assert example['image'] == png(i)  # Still encoded.
    assert (example['label'], example['text']) == (i % 2, f'number {i}'.encode())
    np.testing.assert_array_equal(example['box'], [0, 0, 0.5, 1])


@pytest.mark.parametrize('split, numbers', [
    ('train[:80%]', range(8)), ('train[80%:]', range(8, 10)), ('train[2:5]', range(2, 5)),
    ('test', range(4))])
def test_split_slices(data_dir, split, numbers):
  source = sources.open_source('tiny_set', split, data_dir=data_dir)
  assert [images.decode(source[i]['image'])[0, 0, 0] for i in range(len(source))] == list(numbers)


@pytest.mark.parametrize('keep', [True, False])
def test_pickles_and_reads_from_threads(data_dir, keep, monkeypatch):
  if not keep:
    monkeypatch.setattr(sources, '_KEEP_BYTES', -1)
  source = pickle.loads(pickle.dumps(sources.open_source('tiny_set', 'train', data_dir=data_dir)))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    labels = list(pool.map(lambda i: source[i % 10]['label'], range(400)))
  assert labels == [i % 2 for i in range(400)]
  source[0]['label'] = 7  # Adding to an example must not change what others read.
  assert source[0]['label'] == 0


def test_environment_names_the_directory(data_dir, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', data_dir)
  assert len(sources.open_source('tiny_set', 'test')) == 4


def test_newest_version_and_half_built_ones(copy):
  root, version = copy
  for name in ('1.10.0', '1.9.0'):
    shutil.copytree(version, version.parent / name)
  shutil.copytree(version, version.parent / 'incomplete.ABC123_2.0.0')
  (version.parent / '3.0.0').mkdir()  # No dataset_info.json.
  assert '1.10.0' in repr(sources.open_source('tiny_set', 'train', data_dir=str(root)))
  assert '1.2.0' in repr(sources.open_source('tiny_set:1.2.0', 'train', data_dir=str(root)))
  with pytest.raises(UserError, match='no version 4.0.0; it has 1.10.0, 1.9.0, 1.2.0'):
    sources.open_source('tiny_set:4.0.0', 'train', data_dir=str(root))


def test_configs(copy):
  root, version = copy
  for name in ('small', 'large'):
    shutil.copytree(version, root / 'both' / name / '1.0.0')
  shutil.copytree(version, root / 'single' / 'only' / '1.0.0')
  assert len(sources.open_source('both/small', 'test', data_dir=str(root))) == 4
  assert len(sources.open_source('single', 'test', data_dir=str(root))) == 4
  with pytest.raises(UserError, match='several configs; name one of both/large, both/small'):
    sources.open_source('both', 'test', data_dir=str(root))
  with pytest.raises(UserError, match='tfds build both/huge --file_format=array_record'):
    sources.open_source('both/huge', 'test', data_dir=str(root))


@pytest.mark.parametrize('name, split, words', [
    ('tiny_set', 'dev', ["split 'dev'", 'train (10 examples), test (4 examples)']),
    ('tiny_set', 'train[:0%]', ['is empty']),
    ('tiny_set', 'train[5', ['does not exist', 'train[:98%]']),
    ('imagenet2012', 'train', ['no data set', 'tiny_set',
                               'tfds build imagenet2012 --file_format=array_record --data_dir=',
                               'pip install -e .[prepare]']),
    ('two words', 'train', ['NAME/CONFIG:1.0.0'])])
def test_errors_say_what_is_right(data_dir, name, split, words):
  with pytest.raises(UserError) as error:
    sources.open_source(name, split, data_dir=data_dir)
  for word in words:
    assert word in str(error.value)
  assert '\n' not in str(error.value)


def test_missing_directory(tmp_path):
  with pytest.raises(UserError, match='does not exist.*tfds build mnist'):
    sources.open_source('mnist', 'train', data_dir=str(tmp_path / 'nowhere'))


def test_missing_feature(data_dir):
  with pytest.raises(UserError, match="no feature 'caption'; it has box, image, label, text"):
    sources.open_source('tiny_set', 'train', data_dir=data_dir, features=('image', 'caption'))


def test_wrong_format_says_how_to_convert(copy):
  root, version = copy
  info = json.loads((version / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  (version / 'dataset_info.json').write_text(json.dumps(info))
  with pytest.raises(UserError) as error:
    sources.open_source('tiny_set', 'train', data_dir=str(root))
  for word in ('tfrecord', 'python -m tensorflow_datasets.scripts.convert_format '
               f'--dataset_version_dir={version} --out_file_format=array_record'):
    assert word in str(error.value)
  # What that command leaves: both formats in one directory.
  info['alternativeFileFormats'] = ['array_record']
  (version / 'dataset_info.json').write_text(json.dumps(info))
  assert len(sources.open_source('tiny_set', 'train', data_dir=str(root))) == 10


# --- Folders -------------------------------------------------------------------------------------


def write(path, data=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(png(7) if data is None else data)


def jpeg(size=64, seed=0):
  noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
  return cv2.imencode('.jpg', noise)[1].tobytes()


def open_folder(path, split='train'):
  return sources.open_source(f'folder:{path}', split)


@pytest.mark.parametrize('validation', ['val', 'validation'])
def test_folder_with_split_folders(tmp_path, validation):
  for split, n in (('train', 3), (validation, 2), ('test', 1)):
    for name in ('dog', 'cat'):
      for i in range(n):
        write(tmp_path / split / name / f'{i}.png', png(i))
  for split, n in (('train', 3), ('val', 2), ('validation', 2), ('test', 1)):
    source = open_folder(tmp_path, split)
    assert source.class_names == ['cat', 'dog'] and len(source) == 2 * n
    assert [source[i]['label'] for i in range(2 * n)] == [0] * n + [1] * n
    assert images.decode(source[n - 1]['image'])[0, 0, 0] == n - 1
  assert open_folder(tmp_path)[0]['id'] == 'train/cat/0.png'


def test_folder_of_classes_is_split_by_hash(tmp_path):
  for name in ('cat', 'dog', 'test'):  # A class may be called like a split.
    for i in range(100):
      write(tmp_path / name / f'{i}.png')
  found = {s: {x['id'] for x in map(open_folder(tmp_path, s).__getitem__,
                                    range(len(open_folder(tmp_path, s))))}
           for s in ('train', 'validation', 'test')}
  assert open_folder(tmp_path).class_names == ['cat', 'dog', 'test']
  assert sum(map(len, found.values())) == len(set().union(*found.values())) == 300
  assert 210 < len(found['train']) < 270
  assert 15 < len(found['validation']) < 45 and 15 < len(found['test']) < 45
  # Moving the folder, and adding images, leaves every image in its split.
  moved = tmp_path.parent / f'{tmp_path.name}-moved'
  shutil.copytree(tmp_path, moved)
  write(moved / 'cat' / 'new.png')
  source = open_folder(moved)
  assert {source[i]['id'] for i in range(len(source))} - {'cat/new.png'} == found['train']


def test_folder_file_names(tmp_path):
  for name in ('a.jpg', 'b.JPG', 'c.jpeg', 'd.Png', 'deep/er/e.webp', 'f.bmp'):
    image = np.zeros((4, 4, 3), np.uint8)
    write(tmp_path / 'train' / 'x' / name,
          cv2.imencode(pathlib.Path(name).suffix.lower(), image)[1].tobytes())
  for name in ('.hidden.png', 'notes.txt', '.thumbnails/a.png', 'Thumbs.db'):
    write(tmp_path / 'train' / 'x' / name)
  write(tmp_path / 'train' / '.git' / 'a.png')
  source = open_folder(tmp_path)
  assert source.class_names == ['x'] and not source.skipped
  assert [source[i]['id'] for i in range(len(source))] == [
      f'train/x/{n}' for n in ('a.jpg', 'b.JPG', 'c.jpeg', 'd.Png', 'deep/er/e.webp', 'f.bmp')]
  for i in range(6):
    assert images.decode(source[i]['image']).shape == (4, 4, 3)


def test_folder_skips_broken_files_with_one_warning(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, 'warning', lambda text, *args: warnings.append(text % args))
  for i in range(5):
    write(tmp_path / 'train' / 'x' / f'good{i}.jpg', jpeg(seed=i))
  write(tmp_path / 'train' / 'x' / 'half.jpg', jpeg()[:1000])
  write(tmp_path / 'train' / 'x' / 'empty.png', b'')
  write(tmp_path / 'train' / 'x' / 'page.jpg', b'<html>404</html>')
  write(tmp_path / 'train' / 'x' / 'appended.jpg', jpeg() + bytes(9999))
  source = open_folder(tmp_path)
  assert len(source) == 6
  assert sorted(source.skipped) == [f'train/x/{n}' for n in ('empty.png', 'half.jpg', 'page.jpg')]
  assert len(warnings) == 1 and 'skipped 3 files' in warnings[0] and 'half.jpg' in warnings[0]


def make_empty_class(root):
  write(root / 'cat' / 'a.png')
  (root / 'dog').mkdir()


def make_broken_class(root):
  write(root / 'cat' / 'a.png')
  write(root / 'dog' / 'a.png', b'no image')


def make_train_without_a_class(root):
  for split in ('train', 'test'):
    write(root / split / 'cat' / 'a.png')
  write(root / 'test' / 'dog' / 'a.png')


def make_two_validations(root):
  for split in ('train', 'val', 'validation'):
    write(root / split / 'cat' / 'a.png')


def make_flat(root):
  write(root / 'a.png')


def make_train_and_test(root):
  for split in ('train', 'test'):
    write(root / split / 'cat' / 'a.png')


@pytest.mark.parametrize('make, split, words', [
    (lambda root: None, 'train', 'holds no images'),
    (make_flat, 'train', 'subfolder'),
    (make_empty_class, 'train', "class 'dog' has no images"),
    (make_broken_class, 'train', "class 'dog' has no images"),
    (make_train_without_a_class, 'train', 'test has classes that train has not: dog'),
    (make_two_validations, 'train', 'both validation and val'),
    (make_train_and_test, 'val', "no split 'val'; it has train, test"),
    (make_train_and_test, 'train[:50%]', 'valid: train, validation, test')])
def test_folder_errors(tmp_path, make, split, words):
  make(tmp_path)
  with pytest.raises(UserError, match=words.replace('[', r'\[')) as error:
    open_folder(tmp_path, split)
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_folder_that_is_none(tmp_path):
  with pytest.raises(UserError, match='is not a folder'):
    open_folder(tmp_path / 'nowhere')


def test_folder_split_can_be_empty_when_there_are_few_images(tmp_path):
  write(tmp_path / 'cat' / 'a.png')
  full = sources._hash_split('cat/a.png')
  assert len(open_folder(tmp_path, full)) == 1
  for split in {'train', 'validation', 'test'} - {full}:
    with pytest.raises(UserError, match='is empty; it needs more images'):
      open_folder(tmp_path, split)


def decode_value(example, rng):
  del rng
  return {'value': images.decode(example['image'])[0, 0, :1].astype(np.int32)}


def test_file_that_breaks_after_listing_is_replaced(tmp_path):
  for i in range(6):
    write(tmp_path / 'train' / 'x' / f'{i}.png', png(10 + i))
  source = pickle.loads(pickle.dumps(open_folder(tmp_path)))
  (tmp_path / 'train' / 'x' / '2.png').write_bytes(png(12)[:50])  # Decoding fails.
  os.remove(tmp_path / 'train' / 'x' / '5.png')  # Reading fails.
  kw = dict(batch_size=6, rows=range(6))
  stream = pipeline.train_stream(source, decode_value, seed=0, **kw)
  batch = next(stream)  # One epoch.
  stream.close()
  assert sorted(batch['value'][:, 0].tolist()) == [10, 10, 11, 13, 13, 14]
  np.testing.assert_array_equal(batch['mask'], np.ones(6))
  batch, = pipeline.eval_stream(source, decode_value, **kw)
  np.testing.assert_array_equal(batch['mask'], [1, 1, 0, 1, 1, 0])
  np.testing.assert_array_equal(batch['index'], [0, 1, -1, 3, 4, -1])
  np.testing.assert_array_equal(batch['value'][[0, 1, 3, 4], 0], [10, 11, 13, 14])
