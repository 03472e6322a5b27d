import json

import pytest

from configs import vit
from core import config as config_lib
from core.config import UserError, choose, duration


@pytest.mark.parametrize('text, steps', [
    ('300', 300), (300, 300), ('300 steps', 300), ('1 step', 1), ('5 epochs', 79),
    ('1e3 examples', 16), ('6400 examples', 100), ('10%', 50), ('0', 0), ('0.5 epochs', 8)])
def test_durations(text, steps):
  assert duration(text, batch_size=64, examples=1000, total=500) == steps


@pytest.mark.parametrize('text', ['soon', '5 weeks', '-3 steps', '', '1e400x'])
def test_bad_duration_is_named(text):
  with pytest.raises(UserError, match='config.steps'):
    duration(text, batch_size=64, examples=1000, what='config.steps')


def test_epochs_without_a_count_of_examples():
  with pytest.raises(UserError, match='config.data.examples'):
    duration('5 epochs', batch_size=64, examples=None, what='config.steps')


def test_choose_lists_the_valid_names():
  with pytest.raises(UserError, match="did you mean 'adam'.*valid: adam, sgd"):
    choose('config.optim.name', 'adm', {'adam': 1, 'sgd': 2})
  assert choose('x', 'sgd', {'adam': 1, 'sgd': 2}) == 2


def test_differences_name_values_that_matter_only():
  config = vit.get_config()
  saved = json.loads(config_lib.to_json(config))
  assert config_lib.differences(saved, config) == []
  config.rules = 'fsdp'
  config.mesh.fsdp = 4
  config.data.workers = 3
  assert config_lib.differences(saved, config) == []
  config.batch_size = 32
  config.optim.lr = 0.5
  assert config_lib.differences(saved, config) == [
      'batch_size: 64 -> 32', f'optim.lr: {saved["optim"]["lr"]} -> 0.5']


@pytest.mark.parametrize('key, value, match', [
    ('batch_size', 0, 'config.batch_size'), ('accum', 3, 'equal microbatches'),
    ('precision', 'float8', 'valid: float32, bfloat16'), ('remat', 'all', 'valid: none, full')])
def test_validate(key, value, match):
  config = vit.get_config('smoke')
  config[key] = value
  with pytest.raises(UserError, match=match):
    config_lib.validate(config)


@pytest.mark.parametrize('text', ['2 epochs', '1000 examples'])
def test_batches_that_differ_in_size_leave_only_steps(text):
  with pytest.raises(UserError, match='config.steps=.*give steps'):
    duration(text, batch_size=None, examples=100, what='config.steps')
  assert duration('7 steps', batch_size=None) == 7
  assert duration('50%', batch_size=None, total=8) == 4
