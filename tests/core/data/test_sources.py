"""tfds directories, and everything a user can get wrong with them."""

import concurrent.futures
import json
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from core.config import UserError
from core.data import images
from core.data import sources
from tests.core.data.examples import png


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
