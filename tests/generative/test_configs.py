import pytest

from configs import image_gpt
from core import config as config_lib, task as task_lib
from core.config import UserError

ARGS = ([f'{size},{data}' for size in image_gpt.SIZES for data in image_gpt.DATASETS]
        + [f'l,imagenet32,{recipe}' for recipe in image_gpt.RECIPES]
        + [f's,cifar10,{recipe}' for recipe in image_gpt.RECIPES]
        + [f'pretrain,cifar10,{size},{kind}' for size in ('small', 'medium', 'large')
           for kind in ('ar', 'bert')]
        + ['finetune,fashion_mnist,1,ar', 'finetune,cifar10,10,bert'])


@pytest.mark.parametrize('arg', ARGS)
def test_every_config_makes_a_task(arg):
  config = image_gpt.get_config(arg)
  config_lib.validate(config)
  spec = task_lib.load(config).batch_spec(2)
  assert spec['tokens'].shape == (2, config.data.image_size ** 2)


@pytest.mark.parametrize('arg, rate', [
    ('s,imagenet32', 3e-3), ('m,imagenet32', 3e-3), ('l,imagenet32', 1e-3), ('l,imagenet48', 1e-2),
    ('xl,imagenet64', 3e-4), ('s,imagenet32,bert', 1e-2), ('m,imagenet32,bert', 3e-3),
    ('l,imagenet32,bert', 1e-3), ('l,cifar10', 1e-4)])
def test_learning_rates_are_those_of_table_5(arg, rate):
  assert image_gpt.get_config(arg).optim.lr == pytest.approx(rate)


def test_pretraining_is_that_of_section_3():
  config = image_gpt.get_config('l,imagenet32')
  assert (config.batch_size, config.steps, config.optim.args.b2) == (128, '1000000 steps', .95)
  assert (config.optim.schedule.name, config.optim.schedule.warmup) == ('cosine', '1 epochs')
  assert config.optim.weight_decay == 0 and config.model.initializer == 'code'
  config = image_gpt.get_config('xl,imagenet64')
  assert (config.batch_size, config.steps, config.data.image_size) == (64, '2000000 steps', 64)


def test_fine_tuning_is_joint_and_has_no_cosine():
  config = image_gpt.get_config('l,cifar10')
  assert config.model.gen_weight == config.model.clf_weight == 1
  assert (config.optim.schedule.name, config.data.crop) == ('constant', 'cifar')


@pytest.mark.parametrize('arg, words', [
    ('s', 'write SIZE,DATA'), ('huge,cifar10', 'valid: s, m, l, xl'), ('s,mnist', 'imagenet32'),
    ('s,cifar10,gan', 'finetune_bert'), ('pretrain,cifar10,huge,ar', 'takes DATA'),
    ('finetune,imagenet,1,ar', 'takes DATA')])
def test_wrong_arguments_say_what_is_right(arg, words):
  with pytest.raises(UserError, match=words):
    image_gpt.get_config(arg)
