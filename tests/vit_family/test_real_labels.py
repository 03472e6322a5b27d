"""ImageNet-ReaL: the file, the names and the count."""

import json
import types

import numpy as np
import pytest

from core.config import UserError
from vit_family import real_labels


def test_file_names_give_positions():
  assert real_labels.real_index('ILSVRC2012_val_00000001.JPEG') == 0
  assert real_labels.real_index(b'ILSVRC2012_val_00000293.JPEG') == 292
  assert real_labels.real_index('ILSVRC2012_val_00050000.JPEG') == 49_999


@pytest.mark.parametrize('name', [
    'ILSVRC2012_val_00000000.JPEG', 'ILSVRC2012_val_293.JPEG', b'\xff', '',
    'ILSVRC2012_val_00000293.JPEG.png', 'ILSVRC2012_test_00000293.JPEG'])
def test_other_file_names_are_errors(name):
  with pytest.raises(UserError, match='not that of an ILSVRC2012 validation image'):
    real_labels.real_index(name)


def write(path, value):
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return str(path)


@pytest.mark.parametrize('content, match', [
    ('[[1], ', 'not JSON'), ({'a': 1}, 'not a list'), ([], 'not a list'),
    ([[1], 2], 'entry 1 is 2'), ([[1], [2.0]], 'entry 1 is'), ([[True]], 'entry 0 is'),
    ([[1000]], 'between 0 and 999'), ([[0], [-1]], 'entry 1 is'), ([['7']], 'entry 0 is')])
def test_malformed_labels_are_errors(tmp_path, content, match):
  path = write(tmp_path / 'real.json', content)
  with pytest.raises(UserError, match=match) as e:
    real_labels.ReaL('test', path)
  assert path in str(e.value) and '\n' not in str(e.value)


def test_missing_and_binary_files_are_errors(tmp_path):
  with pytest.raises(UserError, match='config.data.real_labels=.*No such file'):
    real_labels.load(tmp_path / 'none.json')
  (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UserError, match='not JSON'):
    real_labels.load(tmp_path / 'binary')


class Run:
  """What the evaluator asks of a run; the model answers with the class that `params` holds."""

  def __init__(self, index, num_classes=1000, spec=('image', 'real_index')):
    self._index = np.asarray(index)
    self.plan = types.SimpleNamespace(task=types.SimpleNamespace(
        num_classes=num_classes, batch_spec=lambda n: dict.fromkeys(spec),
        logits=lambda params, batch: np.eye(1000)[params[batch['real_index']]]))

  def map(self, fn, params, split):
    for part in np.array_split(self._index, 2):
      yield fn(params, {'real_index': part})


def test_images_count_when_they_have_labels(tmp_path):
  path = write(tmp_path / 'real.json', [[5, 7], [], [0], [999], [1, 2]])
  answers = np.array([7, 3, 1, 999, 2])
  evaluator = real_labels.ReaL('test', path)
  # Images come in any order: 7, 999 and 2 are right, 1 is wrong, image 1 has no labels.
  assert evaluator(Run([4, 2, 0, 3, 1]), answers, 0) == {'top1': .75}
  assert evaluator(Run([2, 4]), answers, 0) == {'top1': .5}
  with pytest.raises(UserError, match='no image of the split has a label'):
    evaluator(Run([1, 1]), answers, 0)
  with pytest.raises(UserError, match="labels of 5 images; split 'test' has image 6"):
    evaluator(Run([0, 5]), np.zeros(6, int), 0)


def test_a_task_that_cannot_be_measured(tmp_path):
  evaluator = real_labels.ReaL('test', write(tmp_path / 'real.json', [[1]]))
  with pytest.raises(UserError, match='set config.data.real_labels'):
    evaluator(Run([0], spec=('image',)), np.zeros(1, int), 0)
  with pytest.raises(UserError, match='has 1000 classes, the model 10'):
    evaluator(Run([0], num_classes=10), np.zeros(1, int), 0)


def test_training_images_have_no_place():
  assert real_labels.real_index(b'n01440764_18.JPEG') == -1
