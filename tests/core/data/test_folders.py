"""Folders of images, and everything a user can get wrong with them."""

import os
import pathlib
import pickle
import shutil

import cv2
import numpy as np
import pytest
from absl import logging

from core.config import UserError
from core.data import folders
from core.data import images
from core.data import pipeline
from core.data import sources
from tests.core.data.examples import png


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
  full = folders._hash_split('cat/a.png')
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
