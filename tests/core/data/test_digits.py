"""The embedded digits: their split, and how they are prepared."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from core.config import UserError
from core.data import images
from core.data import sources
from core.data.datasets import digits

SIZES = {'train': 1257, 'validation': 180, 'test': 360}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp('tfds'))


def start(code, *args):
  """Runs code in a fresh interpreter; its working directory is the checkout."""
  root = pathlib.Path(digits.__file__).resolve().parents[3]
  return subprocess.Popen([sys.executable, '-c', code, *args], cwd=root, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


def test_splits_partition_the_digits_and_never_change():
  indices = {split: digits.split_indices(split) for split in SIZES}
  assert {split: len(i) for split, i in indices.items()} == SIZES
  np.testing.assert_array_equal(np.sort(np.concatenate(list(indices.values()))), np.arange(1797))
  # Part of version 1.0.0: whoever changes this changes everybody's test set.
  digest = hashlib.sha256(b''.join(i.astype('<i8').tobytes() for i in indices.values()))
  assert digest.hexdigest().startswith('12f2a64e0ce97372')


def test_no_digit_is_in_two_splits():
  pixels = {split: {image.tobytes() for image in digits.digits(split)[0]} for split in SIZES}
  assert sum(map(len, pixels.values())) == 1797
  assert not pixels['train'] & pixels['test'] and not pixels['train'] & pixels['validation']


def test_digits_are_scaled_and_every_class_is_in_every_split():
  for split, size in SIZES.items():
    grey, labels = digits.digits(split)
    assert grey.shape == (size, 8, 8) and grey.dtype == np.uint8
    assert labels.shape == (size,) and labels.dtype == np.int64
    assert grey.min() == 0 and grey.max() == 255
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 0.06 * size and counts.max() < 0.15 * size


def test_prepared_files_hold_the_digits(data_dir):
  for split, size in SIZES.items():
    source = sources.open_source('digits', split, data_dir=data_dir, features=('image', 'label'))
    grey, labels = digits.digits(split)
    assert len(source) == size and source.class_names == list('0123456789')
    decoded = np.stack([images.decode(source[i]['image'], 1)[..., 0] for i in range(size)])
    np.testing.assert_array_equal(decoded, grey)
    np.testing.assert_array_equal([source[i]['label'] for i in range(size)], labels)
    np.testing.assert_array_equal([source[i]['id'] for i in range(size)],
                                  digits.split_indices(split))


def test_reading_imports_neither_tensorflow_nor_sklearn(data_dir):
  sources.open_source('digits', 'test', data_dir=data_dir)
  code = '''
import json, sys
from core.data import sources
source = sources.open_source('digits', 'test[:50%]', data_dir=sys.argv[1])
source[3]
heavy = ('tensorflow', 'sklearn', 'torch', 'jax')
print(json.dumps([len(source), [m for m in heavy if m in sys.modules]]))
'''
  out, err = start(code, data_dir).communicate(timeout=120)
  assert out, err
  assert json.loads(out.splitlines()[-1]) == [180, []]


@pytest.mark.slow
def test_survives_a_killed_process_and_two_at_once(tmp_path):
  prepare = '''
import sys
from core.data import sources
print(len(sources.open_source('digits', 'train', data_dir=sys.argv[1])))
'''
  die = '''
import os, signal
from core.data.datasets import digits
real = digits.Digits._generate_examples
def fatal(self, split):
  for n, example in enumerate(real(self, split)):
    if n == 5: os.kill(os.getpid(), signal.SIGKILL)
    yield example
digits.Digits._generate_examples = fatal
''' + prepare
  killed = start(die, str(tmp_path))
  killed.communicate(timeout=120)
  assert killed.returncode == -signal.SIGKILL
  left = os.listdir(tmp_path / 'digits')
  assert left and all(name.startswith('incomplete') for name in left)

  both = [start(prepare, str(tmp_path)) for _ in range(2)]
  for process in both:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ['1257']
  assert '1.0.0' in os.listdir(tmp_path / 'digits')


def test_second_to_finish_uses_the_first_ones_files(tmp_path, monkeypatch):
  """The race made certain: another process finishes while this one writes."""
  real = digits.Digits._generate_examples

  def slow(self, split):
    monkeypatch.setattr(digits.Digits, '_generate_examples', real)
    sources.prepare_embedded('digits', tmp_path)
    yield from real(self, split)

  monkeypatch.setattr(digits.Digits, '_generate_examples', slow)
  assert len(sources.open_source('digits', 'train', data_dir=str(tmp_path))) == 1257
  assert os.listdir(tmp_path / 'digits') == ['1.0.0']


def test_unwritable_directory_is_a_user_error(tmp_path):
  blocked = tmp_path / 'file'
  blocked.write_text('not a directory')
  with pytest.raises(UserError, match='cannot be written.*data_dir'):
    sources.open_source('digits', 'train', data_dir=str(blocked))
