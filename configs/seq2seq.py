"""Translation with recurrent networks, with and without attention.

configs/seq2seq.py                         number words, English to German, LSTM with Luong's
                                           attention, minutes on two cores
configs/seq2seq.py:smoke                   the same in seconds, for tests
configs/seq2seq.py:MODEL,DATA              MODEL sutskever (Sutskever et al. 2014), bahdanau
                                           (Bahdanau et al. 2015), luong (Luong et al. 2015);
                                           DATA wmt14_fr, wmt14_de, tsv
configs/seq2seq.py:CLAIM,MODEL             a claim at laptop size, see CLAIMS and MODELS
"""

import ml_collections

from configs import transformer
from core.config import UserError, choose

# The story in steps: cells, then reversed sources, then attention as its authors had it.
MODELS = {
    'rnn': dict(cell='rnn'), 'lstm': dict(cell='lstm'), 'gru': dict(cell='gru'),
    'reversed': dict(cell='lstm', reverse=True),
    'bahdanau': dict(cell='gru', attention='bahdanau', bidirectional=True),
    'luong': dict(cell='lstm', attention='general', bidirectional=True, input_feeding=True)}

CLAIMS = {'numbers': transformer.CLAIMS['numbers'], 'multi30k': transformer.CLAIMS['multi30k']}

# Published settings: model, vocabulary of the target and of the source (whole words).
PUBLISHED = {
    'sutskever': (dict(cell='lstm', width=1000, embed=1000, layers=4, reverse=True,
                       initializer='sutskever'), 80_000, 160_000),
    'bahdanau': (dict(cell='gru', width=1000, embed=620, attention='bahdanau', bidirectional=True,
                      initializer='bahdanau'), 30_000, 30_000),
    'luong': (dict(cell='lstm', width=1000, embed=1000, layers=4, reverse=True,
                   attention='general', input_feeding=True, dropout=.2, initializer='luong'),
              50_000, 50_000)}

# Counted from the papers' shapes (Sutskever et al. say 384M; the others do not say).
PARAMETERS = {'sutskever,wmt14_fr': 384_112_000, 'bahdanau,wmt14_fr': 80_441_000,
              'luong,wmt14_de': 221_032_000}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', 'MODEL,DATA' or 'CLAIM,MODEL'."""
  if arg in ('', 'smoke'):
    return transformer.numbers(_small('luong'), arg)
  first, _, second = arg.partition(',')
  if first in CLAIMS and second:
    choose(f'configs/seq2seq.py:{first} model', second, MODELS)
    config = _small(second)
    return (transformer.numbers(config, first) if first == 'numbers'
            else transformer.multi30k(config))
  if not second or ',' in second:
    raise UserError(f'configs/seq2seq.py:{arg}: write MODEL,DATA, e.g. bahdanau,wmt14_fr; models: '
                    f'{", ".join(PUBLISHED)}; data: {", ".join(transformer.DATASETS)}; or a claim '
                    f'and its model: {", ".join(CLAIMS)}; {", ".join(MODELS)}')
  choose('configs/seq2seq.py model', first, PUBLISHED)
  return _published(first, choose('configs/seq2seq.py data', second, transformer.DATASETS))


def _base() -> ml_collections.ConfigDict:
  config = transformer.base()
  config.model.update(dict(
      kind='recurrent', label_smoothing=.0, width=256, embed=256, layers=1,
      cell='lstm',                  # rnn, lstm or gru
      attention='none',             # none, bahdanau (additive), dot, general or concat (Luong's)
      bidirectional=False,          # the encoder
      reverse=False,                # source words from last to first
      input_feeding=False,          # Luong's: the attentional state goes into the next step
      dropout=.0, initializer='modern'))  # modern, sutskever, luong or bahdanau
  # The gradient's norm is limited in all three papers.
  config.optim.update(dict(name='adam', args=dict(), lr=2e-3, clip_norm=1.0))
  config.optim.schedule.warmup = '100 steps'
  return config


def _small(model: str) -> ml_collections.ConfigDict:
  config = _base()
  config.model.update(dict(MODELS[model], width=128, embed=128, dropout=.1, label_smoothing=.1))
  return config


def _published(name: str, found: dict) -> ml_collections.ConfigDict:
  """Lengths of runs are those of the paper's data: epochs of the pairs it had, in its batches."""
  config = _base()
  model, target, source = PUBLISHED[name]
  # Batches are of sentences of one length, and gradients means over them.
  config.model.update(dict(model, loss_per='sentences'))
  config.data.update(dict(name=found['name'], target=found['target'], workers=4,
                          buckets=(10, 20, 30, 40, 50), batch_of='sentences'))
  config.data.vocab.update(dict(kind='word', size=target, source_size=source))
  config.optim.clip_norm = 5.0
  config.batch_size = 128
  if name == 'bahdanau':
    # RNNsearch-50: 2.88e5 updates of 80 sentences.
    config.batch_size = 80
    config.steps = '288000 steps'
    config.optim.update(dict(name='adadelta', args=dict(rho=.95, eps=1e-6), lr=1.0, clip_norm=1.0))
    config.optim.schedule.update(dict(name='constant', warmup='0 steps'))
    config.eval.search.update(dict(beams=12, alpha=.0))
  else:
    sutskever = name == 'sutskever'
    epoch = 12_000_000 // 128 if sutskever else 4_500_000 // 128
    first, every, last = (5, .5, 7.5) if sutskever else (8, 1, 12)
    config.steps = f'{int(last * epoch)} steps'
    halvings = [first + every * n for n in range(1 if sutskever else 0, 20)
                if first + every * n < last]
    config.optim.update(dict(name='sgd', args=dict(momentum=.0), lr=.7 if sutskever else 1.0))
    config.optim.schedule.update(dict(
        name='step', warmup='0 steps', factor=.5,
        boundaries=tuple(f'{int(at * epoch)} steps' for at in halvings)))
    config.eval.search.update(dict(beams=12 if sutskever else 10, alpha=.0 if sutskever else 1.0))
  config.precision = 'bfloat16'
  config.eval.every = config.checkpoint.every = '5%'
  config.eval.batch_size = 16
  config.log_every = '100 steps'
  config.topology = 'v5e:2x4'
  return config
