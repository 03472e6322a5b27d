"""Published settings of the Transformer and of the recurrent models, beside what papers print."""

import json

import pytest

from configs import seq2seq, transformer
from core import config as config_lib, optim, task as task_lib
from core.config import UserError
from core.plan import make_plan

PUBLISHED = ([(transformer, f'{model},{data}') for model in transformer.MODELS
              for data in transformer.DATASETS]
             + [(seq2seq, f'{model},{data}') for model in seq2seq.PUBLISHED
                for data in transformer.DATASETS])
CLAIMS = ([(transformer, claim) for claim in ('', 'smoke', *transformer.CLAIMS)]
          + [(seq2seq, arg) for arg in ('', 'smoke')]
          + [(seq2seq, f'{claim},{model}') for claim in seq2seq.CLAIMS for model in seq2seq.MODELS])


def named(module, arg):
  return f'{module.__name__.split(".")[-1]}:{arg}'


def changes(module, a, b):
  """What differs between two configs: 'key: value -> value'."""
  saved = json.loads(config_lib.to_json(module.get_config(a)))
  return config_lib.differences(saved, module.get_config(b))


def rates(config):
  """The learning rate as a function of the number of the step, from 1."""
  steps_of = lambda text, what: config_lib.duration(text, batch_size=None, what=what)
  schedule = optim.make_schedule(config.optim.schedule, config.optim.lr, steps_of,
                                 steps_of(config.steps, 'config.steps'))
  return lambda number: float(schedule(number - 1))


@pytest.mark.parametrize('module, arg', PUBLISHED + CLAIMS,
                         ids=[named(*found) for found in PUBLISHED + CLAIMS])
def test_every_config_makes_a_task(module, arg):
  config = module.get_config(arg)
  config_lib.validate(config)
  task = task_lib.load(config)
  assert task.model.vocab == config.data.vocab.size
  *_, last = task.specs(config.batch_size, train=True)
  assert last['target'].shape == (config.batch_size, config.data.buckets[-1])
  # A run of a known length: how many sentences a batch holds depends on their lengths.
  assert config.steps.endswith(' steps')


@pytest.mark.parametrize('module, arg', [
    (transformer, 'numbers'), (transformer, 'big,wmt14_de'), (seq2seq, 'sutskever,wmt14_fr'),
    (seq2seq, 'luong,wmt14_de'), (seq2seq, 'bahdanau,wmt14_fr')])
def test_plans_are_made_without_data(module, arg):
  """Every duration can be read, and every parameter has its shape."""
  config = module.get_config(arg)
  plan = make_plan(config)
  assert plan.steps == int(config.steps.split()[0])
  for text in (config.eval.every, config.checkpoint.every, config.log_every):
    assert 1 <= plan.steps_of(text, 'x') < plan.steps


# --- The Transformer ------------------------------------------------------------------------------

TABLE_3 = {
    'h1': 'model.heads: 8 -> 1', 'h4': 'model.heads: 8 -> 4',
    'h16': 'model.heads: 8 -> 16', 'h32': 'model.heads: 8 -> 32',
    'dk16': 'model.head_dim: 0 -> 16', 'dk32': 'model.head_dim: 0 -> 32',
    'n2': 'model.depth: 6 -> 2', 'n4': 'model.depth: 6 -> 4', 'n8': 'model.depth: 6 -> 8',
    'd256': 'model.width: 512 -> 256', 'd1024': 'model.width: 512 -> 1024',
    'ff1024': 'model.mlp_dim: 2048 -> 1024', 'ff4096': 'model.mlp_dim: 2048 -> 4096',
    'drop0': 'model.dropout: 0.1 -> 0.0', 'drop2': 'model.dropout: 0.1 -> 0.2',
    'ls0': 'model.label_smoothing: 0.1 -> 0.0', 'ls2': 'model.label_smoothing: 0.1 -> 0.2',
    'learned': "model.positions: 'paper' -> 'learned'"}


@pytest.mark.parametrize('row', TABLE_3)
def test_rows_of_table_3_differ_in_one_thing(row):
  found = changes(transformer, 'base,wmt14_de', f'{row},wmt14_de')
  if row in ('d256', 'd1024'):
    # The schedule is a function of the width.
    assert found.pop().startswith('optim.lr: ')
  assert found == [TABLE_3[row]]


def test_every_row_of_table_3_is_there():
  assert set(transformer.MODELS) == {'base', 'big', *TABLE_3}


def test_base_is_the_paper_s():
  """Sections 3 and 5, and what its authors' code says where they are silent."""
  config = transformer.get_config('base,wmt14_de')
  model = config.model
  assert (model.depth, model.width, model.mlp_dim, model.heads) == (6, 512, 2048, 8)
  assert (model.dropout, model.label_smoothing, model.norm) == (.1, .1, 'post')
  assert (model.attention_dropout, model.hidden_dropout, model.attention_bias) == (0, False, False)
  task = task_lib.load(config)
  assert (task.model.head_dim, task.model.value_dim, task.model.source_vocab) == (None, None, 0)
  assert config.data.vocab.size == 37_000 and config.data.vocab.kind == 'bpe'
  assert config.optim.name == 'adam'
  assert config.optim.args.to_dict() == {'b2': .98, 'eps': 1e-9}
  assert config.optim.clip_norm == 0 and config.optim.weight_decay == 0
  assert config.steps == '100000 steps'
  # The mean of the last five, one every ten minutes at 0.4 seconds a step.
  assert (config.checkpoint.keep, config.checkpoint.average) == (5, 5)
  assert config.checkpoint.every == f'{int(600 / .4)} steps'
  search = config.eval.search
  assert (search.method, search.beams, search.alpha, search.extra) == ('beam', 4, .6, 50)
  assert search.coverage == 0
  # About 25,000 tokens of either side, in rows that are 94 percent full.
  assert abs(.94 * config.batch_size * config.data.buckets[-1] - 25_000) < 500


def test_big_is_the_paper_s():
  config = transformer.get_config('big,wmt14_de')
  model = config.model
  assert (model.depth, model.width, model.mlp_dim, model.heads) == (6, 1024, 4096, 16)
  assert model.dropout == .3 and config.steps == '300000 steps'
  assert (config.checkpoint.keep, config.checkpoint.average) == (20, 20)
  assert config.checkpoint.every == '600 steps'  # Ten minutes of a second a step.
  french = transformer.get_config('big,wmt14_fr')
  assert french.model.dropout == .1
  assert (french.data.vocab.size, french.data.vocab.kind) == (32_000, 'wordpiece')
  assert (french.data.source, french.data.target) == ('en', 'fr')
  assert transformer.get_config('base,wmt14_fr').model.dropout == .1


@pytest.mark.parametrize('arg, golden', [
    ('base,wmt14_de', {1: 1.747e-7, 1000: 1.747e-4, 4000: 6.988e-4, 10_000: 4.419e-4,
                       100_000: 1.398e-4}),
    ('big,wmt14_de', {4000: 4.941e-4, 300_000: 5.705e-5}),
    ('d256,wmt14_de', {4000: (256 * 4000) ** -.5})])
def test_learning_rates_are_those_of_equation_3(arg, golden):
  rate = rates(transformer.get_config(arg))
  for number, want in golden.items():
    assert rate(number) == pytest.approx(want, rel=1e-3), number
  assert max(rate(number) for number in (3990, 3999, 4000, 4001, 4010)) == rate(4000)


@pytest.mark.parametrize('row', [row for row in transformer.PARAMETERS if row.endswith('wmt14_de')])
def test_parameters_are_those_of_the_paper_s_shapes(row):
  """No biases in attention, two numbers a channel in a norm, one matrix of embeddings."""
  model = transformer.get_config(row).model
  width, hidden, heads = model.width, model.mlp_dim, model.heads
  keys, values = model.head_dim or width // heads, model.value_dim or width // heads
  attention = 2 * width * heads * (keys + values)
  feed_forward = 2 * width * hidden + hidden + width
  encoder = attention + feed_forward + 2 * 2 * width
  decoder = 2 * attention + feed_forward + 3 * 2 * width
  count = model.depth * (encoder + decoder) + 37_000 * width
  assert transformer.PARAMETERS[row] == count


def test_claims_are_of_laptop_size():
  numbers = transformer.get_config('numbers')
  # The plain run may be longer than the claim, in which all models get the same.
  assert {change.split(':')[0] for change in changes(transformer, '', 'numbers')} <= {'steps'}
  assert numbers.data.name == 'numbers_en_de' and numbers.model.width == 128
  assert rates(numbers)(300) == pytest.approx((128 * 300) ** -.5, rel=1e-5)
  captions = transformer.get_config('multi30k')
  assert (captions.data.splits.validation, captions.data.splits.test) == ('val', 'test2016')
  for config in (numbers, captions):
    assert task_lib.load(config).model.width <= 128 and int(config.steps.split()[0]) <= 4000


# --- Recurrent models -----------------------------------------------------------------------------


def test_sutskever():
  """Section 3.4: SGD without momentum at 0.7 for 5 epochs of 12M sentences, 128 a batch, then half
  of it every half epoch, 7.5 epochs in all."""
  config = seq2seq.get_config('sutskever,wmt14_fr')
  model = config.model
  assert (model.cell, model.layers, model.width, model.embed) == ('lstm', 4, 1000, 1000)
  assert (model.reverse, model.attention, model.bidirectional) == (True, 'none', False)
  assert (model.initializer, model.dropout, model.label_smoothing) == ('sutskever', 0, 0)
  vocab = config.data.vocab
  assert (vocab.kind, vocab.source_size, vocab.size) == ('word', 160_000, 80_000)
  assert (config.optim.name, config.optim.args.momentum, config.optim.lr) == ('sgd', 0, .7)
  assert (config.batch_size, config.optim.clip_norm) == (128, 5)
  epoch = 12_000_000 / 128
  assert config.steps == f'{7.5 * epoch:.0f} steps'
  rate = rates(config)
  assert rate(1) == rate(5 * int(epoch) + 1) == pytest.approx(.7)
  # The half epoch after the fifth is the first at whose end the rate is halved.
  for n, boundary in enumerate((5.5, 6, 6.5, 7), 1):
    step = int(boundary * epoch)
    assert (rate(step), rate(step + 1)) == pytest.approx((.7 * .5 ** (n - 1), .7 * .5 ** n))
  assert rate(int(7.5 * epoch)) == pytest.approx(.7 / 16)
  assert (config.eval.search.beams, config.eval.search.alpha) == (12, 0)


def test_luong():
  """Section 4.1, with dropout: 12 epochs of 4.5M pairs, halved every epoch after the eighth."""
  config = seq2seq.get_config('luong,wmt14_de')
  model = config.model
  assert (model.cell, model.layers, model.width, model.embed) == ('lstm', 4, 1000, 1000)
  assert (model.reverse, model.attention, model.input_feeding) == (True, 'general', True)
  assert (model.bidirectional, model.dropout, model.initializer) == (False, .2, 'luong')
  vocab = config.data.vocab
  assert (vocab.kind, vocab.source_size, vocab.size) == ('word', 50_000, 50_000)
  assert config.data.buckets[-1] == 50
  assert (config.optim.name, config.optim.args.momentum, config.optim.lr) == ('sgd', 0, 1)
  assert (config.batch_size, config.optim.clip_norm) == (128, 5)
  epoch = 4_500_000 // 128
  assert config.steps == f'{12 * epoch} steps'
  rate = rates(config)
  assert rate(1) == rate(8 * epoch) == 1
  assert [rate(at * epoch + 1) for at in (8, 9, 10, 11)] == [.5, .25, .125, .0625]
  assert rate(9 * epoch) == .5 and rate(12 * epoch) == .0625
  assert config.eval.search.beams == 10


def test_bahdanau():
  """RNNsearch-50: appendix B and table 2."""
  config = seq2seq.get_config('bahdanau,wmt14_fr')
  model = config.model
  assert (model.cell, model.layers, model.width, model.embed) == ('gru', 1, 1000, 620)
  assert (model.attention, model.bidirectional, model.reverse) == ('bahdanau', True, False)
  assert (model.initializer, model.dropout, model.input_feeding) == ('bahdanau', 0, False)
  vocab = config.data.vocab
  assert (vocab.kind, vocab.source_size, vocab.size) == ('word', 30_000, 30_000)
  assert (config.data.buckets[-1], config.batch_size, config.steps) == (50, 80, '288000 steps')
  assert config.optim.name == 'adadelta' and config.optim.clip_norm == 1
  assert config.optim.args.to_dict() == {'rho': .95, 'eps': 1e-6}
  rate = rates(config)
  assert rate(1) == rate(288_000) == 1


def test_recurrent_parameters():
  """Sutskever et al. count 64M in two LSTMs of four layers, 240M in embeddings, 80M in the softmax.
  """
  biases = 2 * 4 * 4 * 1000
  assert seq2seq.PARAMETERS['sutskever,wmt14_fr'] == 384_000_000 + biases + 80_000
  # Luong et al.: the same layers; what is fed is read by the first, and W_a and W_c are there.
  matrices = 64_000_000 + (50_000 + 50_000 + 50_000) * 1000
  assert seq2seq.PARAMETERS['luong,wmt14_de'] == matrices + biases + (4 + 1 + 2) * 1000 * 1000
  # Bahdanau et al., appendix A: n 1000, m 620, maxout 500; three matrices for a GRU's gates.
  n, m, words = 1000, 620, 30_000
  encoder, decoder = 2 * 3 * (n * (m + n) + n), 3 * (n * (m + n + 2 * n) + n)
  alignment, start = n * n + 2 * n * n + n, n * n
  readout = (n + m + 2 * n + 1) * n
  assert seq2seq.PARAMETERS['bahdanau,wmt14_fr'] == (
      encoder + decoder + alignment + start + readout + 2 * words * m + (500 + 1) * words)


@pytest.mark.parametrize('before, after, different', [
    ('rnn', 'lstm', {'cell'}), ('lstm', 'gru', {'cell'}), ('lstm', 'reversed', {'reverse'}),
    ('gru', 'bahdanau', {'attention', 'bidirectional'}),
    ('lstm', 'luong', {'attention', 'bidirectional', 'input_feeding'})])
def test_the_story_goes_step_by_step(before, after, different):
  found = changes(seq2seq, f'numbers,{before}', f'numbers,{after}')
  assert {change.split(':')[0] for change in found} == {f'model.{name}' for name in different}


def test_both_kinds_are_compared_on_the_same_data():
  for claim in seq2seq.CLAIMS:
    ours, theirs = seq2seq.get_config(f'{claim},luong'), transformer.get_config(claim)
    assert ours.data.vocab == theirs.data.vocab and ours.data.splits == theirs.data.splits
    assert (ours.data.name, ours.steps, ours.data.buckets) == (
        theirs.data.name, theirs.steps, theirs.data.buckets)
    assert ours.eval == theirs.eval


# --- Wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize('module, arg, words', [
    (transformer, 'bas,wmt14_de', "did you mean 'base'.*base, big, h1"),
    (transformer, 'base,wmt15_de', 'wmt14_de, wmt14_fr, tsv'),
    (transformer, 'base', 'MODEL,DATA.*h32.*wmt14_fr.*numbers, multi30k'),
    (transformer, 'base,wmt14_de,tsv', 'write MODEL,DATA'), (transformer, ',', 'valid: base'),
    (seq2seq, 'sutskever', 'MODEL,DATA.*sutskever, bahdanau, luong.*wmt14_de.*numbers.*rnn, lstm'),
    (seq2seq, 'sutskever,wmt', 'wmt14_de, wmt14_fr, tsv'),
    (seq2seq, 'cho,wmt14_fr', 'sutskever, bahdanau, luong'),
    (seq2seq, 'numbers,transformer', 'rnn, lstm, gru, reversed, bahdanau, luong'),
    (seq2seq, 'numbers', 'write MODEL,DATA'), (seq2seq, 'numbers,lstm,gru', 'lstm'),
    (seq2seq, 'luong,wmt14_de,x', 'write MODEL,DATA')])
def test_wrong_arguments_say_what_is_right(module, arg, words):
  with pytest.raises(UserError, match=words):
    module.get_config(arg)
