"""The Transformer (Vaswani et al., "Attention Is All You Need", 2017).

configs/transformer.py                     number words, English to German, minutes on two cores
configs/transformer.py:smoke               the same in seconds, for tests
configs/transformer.py:MODEL,DATA          MODEL base, big, or a row of table 3: h1 h4 h16 h32, dk16
                                           dk32, n2 n4 n8, d256 d1024, ff1024 ff4096, drop0 drop2,
                                           ls0 ls2, learned; DATA wmt14_de, wmt14_fr, tsv
configs/transformer.py:MODEL,tsv           your own pairs: --config.data.name=tsv:PATH
configs/transformer.py:CLAIM               a claim at laptop size, see CLAIMS
"""

import ml_collections

from configs import common
from core.config import UserError, choose

# Table 3: what differs from the base model.
MODELS = {
    'base': {}, 'big': dict(width=1024, mlp_dim=4096, heads=16, dropout=.3),
    'h1': dict(heads=1), 'h4': dict(heads=4), 'h16': dict(heads=16), 'h32': dict(heads=32),
    'dk16': dict(head_dim=16), 'dk32': dict(head_dim=32),
    'n2': dict(depth=2), 'n4': dict(depth=4), 'n8': dict(depth=8),
    'd256': dict(width=256), 'd1024': dict(width=1024),
    'ff1024': dict(mlp_dim=1024), 'ff4096': dict(mlp_dim=4096),
    'drop0': dict(dropout=.0), 'drop2': dict(dropout=.2),
    'ls0': dict(label_smoothing=.0), 'ls2': dict(label_smoothing=.2),
    'learned': dict(positions='learned')}

# WMT 2014 has about 4.5 and 36 million pairs; newstest2013 validates, newstest2014 tests.
DATASETS = {
    'wmt14_de': dict(name='wmt14_translate/de-en', target='de', size=37_000, kind='bpe'),
    'wmt14_fr': dict(name='wmt14_translate/fr-en', target='fr', size=32_000, kind='wordpiece'),
    'tsv': dict(name='tsv:', target='de', size=8_000, kind='bpe')}

# Counted from the paper's shapes at 37,000 entries (of the paper's table only sums in millions are
# known, which fit about 41,000).
PARAMETERS = {
    'base,wmt14_de': 63_045_632, 'big,wmt14_de': 214_171_648, 'base,wmt14_fr': 60_485_632,
    'h1,wmt14_de': 63_045_632, 'h4,wmt14_de': 63_045_632, 'h16,wmt14_de': 63_045_632,
    'h32,wmt14_de': 63_045_632, 'dk16,wmt14_de': 55_967_744, 'dk32,wmt14_de': 58_327_040,
    'n2,wmt14_de': 33_644_544, 'n4,wmt14_de': 48_345_088, 'n8,wmt14_de': 77_746_176,
    'd256,wmt14_de': 26_816_512, 'd1024,wmt14_de': 163_815_424, 'ff1024,wmt14_de': 50_450_432,
    'ff4096,wmt14_de': 88_236_032}

# On two CPU cores minutes, and an hour for Multi30k; configs/seq2seq.py has the recurrent models.
CLAIMS = {
    'numbers': 'the embedded number words at the size of the recurrent models',
    'multi30k': 'Multi30k, English to German: --config.data.name=tsv:.../en-de.{split}.tsv'}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', 'MODEL,DATA' or a claim."""
  if arg in ('', 'smoke', 'numbers'):
    return numbers(_base(), arg)
  if arg == 'multi30k':
    return _multi30k()
  parts = arg.split(',')
  if len(parts) != 2:
    raise UserError(f'configs/transformer.py:{arg}: write MODEL,DATA, e.g. base,wmt14_de; models: '
                    f'{", ".join(MODELS)}; data: {", ".join(DATASETS)}; or a claim: '
                    f'{", ".join(CLAIMS)}')
  return _published(choose('configs/transformer.py model', parts[0], MODELS),
                    choose('configs/transformer.py data', parts[1], DATASETS), parts[0] == 'big')


def base() -> ml_collections.ConfigDict:
  """What every translation config has, whatever the model."""
  config = common.base()
  config.task = 'translation.translate'
  config.model = ml_collections.ConfigDict(dict(
      kind='', label_smoothing=.1,
      loss_per='tokens'))           # a mean over tokens, or over sentences
  config.data.update(dict(
      source='en', target='de',     # languages, of a tfds data set
      # kind: bpe, wordpiece, unigram or word. source_size: 0 shares one vocabulary between both
      # sides. Files; '' makes WORKDIR/vocabulary.json from the training pairs, or takes init_from's
      vocab=dict(kind='bpe', size=37_000, source_size=0, path='', source_path=''),
      # Lengths, in tokens with the end, that sentences are padded to. A batch holds batch_size of
      # the last, and of the others as many as fit into the same number of tokens, or of sentences.
      buckets=(16, 32, 64, 128, 256), batch_of='tokens',
      packed=False,                 # train on rows of the longest length that hold several pairs
      splits=dict(train='train', validation='validation', test='test', extra=())))
  config.eval.translate = 'end'     # when the test splits are translated and scored
  config.eval.search = ml_collections.ConfigDict(dict(
      method='beam', beams=4, alpha=.6, coverage=.0,   # section 6.1; coverage: Wu et al. 2016
      extra=50,                     # a translation may have so many more tokens than its source
      temperature=1.0, top_k=0, top_p=1.0,             # of method 'sample'; temperature 0 is greedy
      pictures=8,                   # alignments that mode predict draws
      layer=-1, heads=()))          # whose attention is drawn; () draws every head
  return config


def _base() -> ml_collections.ConfigDict:
  config = base()
  config.model.update(dict(
      kind='transformer', width=512, depth=6, heads=8, mlp_dim=2048,
      head_dim=0, value_dim=0,      # d_k and d_v; 0 is width / heads
      norm='post',                  # post (the paper) or pre
      positions='paper',            # paper, tensor2tensor, marian (all sinusoidal) or learned
      dropout=.1, attention_dropout=.0, hidden_dropout=False, attention_bias=False,
      activation='relu', epsilon=1e-6, scan=True))
  # Section 5.3. Neither decay nor clipping is mentioned.
  config.optim.update(dict(name='adam', args=dict(b2=.98, eps=1e-9), clip_norm=0.0))
  config.optim.schedule.name = 'noam'
  config.remat = 'dots'
  return config


def noam(config: ml_collections.ConfigDict, warmup: int, factor: float = 1.0) -> None:
  """Section 5.3, equation 3: `lr` is the highest rate, that of step `warmup`."""
  config.optim.lr = factor * (config.model.width * warmup) ** -.5
  config.optim.schedule.warmup = f'{warmup} steps'


def _published(model: dict, found: dict, big: bool) -> ml_collections.ConfigDict:
  config = _base()
  config.model.update(model)
  config.data.update(dict(name=found['name'], target=found['target'], packed=True, workers=4))
  config.data.vocab.update(dict(kind=found['kind'], size=found['size']))
  if big and found['target'] == 'fr':
    config.model.dropout = .1
  # About 25,000 tokens of either side a step.
  config.batch_size = 104
  config.steps = '300000 steps' if big else '100000 steps'
  noam(config, 4000)
  config.precision = 'bfloat16'
  config.eval.every = '5000 steps'
  config.eval.batch_size = 16
  # The mean of the last 5 or 20 checkpoints, written every ten minutes.
  config.checkpoint.update(dict(every='600 steps', keep=20, average=20) if big else
                           dict(every='1500 steps', keep=5, average=5))
  config.log_every = '100 steps'
  config.topology = 'v5e:2x4'
  return config


def numbers(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
  """English number words to German ones; ranges and lengths that training never sees are tests.

  As a claim all models get the same 600 steps.
  """
  config.data.update(dict(name='numbers_en_de', buckets=(16, 32, 64, 128)))
  config.data.vocab.size = 200
  config.data.splits.extra = ('test_range', 'test_length')
  config.batch_size = 8
  config.steps = '1500 steps' if config.model.kind == 'transformer' and not arg else '600 steps'
  config.eval.every = config.checkpoint.every = '300 steps'
  config.checkpoint.best = '-validation/nll'
  if config.model.kind == 'transformer':
    config.model.update(dict(width=128, depth=2, heads=4, mlp_dim=256))
    noam(config, 300)
  if arg == 'smoke':
    config = common.smoke(config)
    config.optim.schedule.warmup = '1 steps'
    config.optim.lr = 3e-3
    config.data.splits.update(dict(train='train[:200]', validation='validation[:16]',
                                   test='test[:8]', extra=()))
    config.data.update(dict(buckets=(16, 64), packed=False))
    config.batch_size = 8
    config.data.vocab.size = 120
    config.eval.search.update(dict(beams=2, extra=4))
    config.model.update(dict(width=16, depth=2, heads=2, mlp_dim=32)
                        if config.model.kind == 'transformer' else
                        dict(width=64, embed=64, dropout=.0, label_smoothing=.0))
  return config


def _multi30k() -> ml_collections.ConfigDict:
  config = multi30k(_base())
  config.model.update(dict(width=128, depth=4, heads=4, mlp_dim=256))
  config.data.packed = True
  noam(config, 800)
  return config


def multi30k(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """29,000 captions of photographs in two languages; validated on `val`, tested on `test2016`."""
  config.data.update(dict(name='tsv:', buckets=(16, 24, 32, 64)))
  config.data.vocab.size = 6_000
  config.data.splits.update(dict(validation='val', test='test2016'))
  config.batch_size = 32
  config.steps = '4000 steps'
  config.eval.every = '500 steps'
  config.checkpoint.update(dict(every='200 steps', keep=5, average=5, best='-validation/nll'))
  return config
