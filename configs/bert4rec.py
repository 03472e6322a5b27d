"""BERT4Rec (Sun et al., 2019), with SASRec and gSASRec beside it.

configs/bert4rec.py                    an embedded log drawn from a known model, minutes on 2 cores
configs/bert4rec.py:smoke              the same in seconds, for tests
configs/bert4rec.py:[MODEL,]DATA       a model on a data set; MODEL bert4rec (default), sasrec (one
                                       negative, as published), sasrec_ce (full softmax), gsasrec
configs/bert4rec.py:[MODEL,]DATA,converged
                                       trained until nothing becomes better, see `_converged`
configs/bert4rec.py:[MODEL,]own        your own interactions: --config.data.name=interactions:PATH
configs/bert4rec.py:large              a catalogue of 10 million items, to compile
"""

import ml_collections

from configs import common
from core.config import UserError, choose

MODELS = ('bert4rec', 'sasrec', 'sasrec_ce', 'gsasrec')
RECIPES = ('paper', 'converged')

# The paper's hyper-parameters and, where it has none, those of its authors' scripts at width 64.
# beauty and steam are the authors' own files (data/ of FeiSun/BERT4Rec): say where they are with
# --config.data.name=interactions:PATH. `items` is the catalogue after the filters; it is checked.
DATASETS = {
    'beauty': dict(name='interactions:beauty.txt', items=54_542, length=50, mask_rate=.6,
                   max_masks=30, sliding=.1, dropout=.5, attention_dropout=.2, steps=400_000,
                   lengths=(8, 16, 50)),
    'steam': dict(name='interactions:steam.txt', items=13_044, length=50, mask_rate=.4,
                  max_masks=20, sliding=.5, dropout=.1, attention_dropout=.1, steps=800_000,
                  lengths=()),
    # Movies with fewer than five ratings are not there in the file that the paper took from SASRec.
    'ml1m': dict(name='movielens/1m-ratings', items=3_416, length=200, mask_rate=.2, max_masks=40,
                 sliding=.5, dropout=.2, attention_dropout=.2, steps=400_000, lengths=(),
                 min_item_count=5),
    'ml20m': dict(name='movielens/20m-ratings', items=26_744, length=200, mask_rate=.2,
                  max_masks=20, sliding=.5, dropout=.1, attention_dropout=.1, steps=400_000,
                  lengths=()),
    # Not of the paper: its ML-1M settings, with shorter and more windows.
    'ml100k': dict(name='movielens/100k-ratings', items=0, length=50, mask_rate=.2, max_masks=40,
                   sliding=.1, dropout=.2, attention_dropout=.2, steps=20_000, lengths=()),
    'amazon_beauty': dict(name='amazon_us_reviews/Beauty_v1_00', items=0, length=50, mask_rate=.6,
                          max_masks=30, sliding=.1, dropout=.5, attention_dropout=.2,
                          steps=400_000, lengths=(8, 16, 50)),
    'own': dict(name='interactions:', items=0, length=50, mask_rate=.2, max_masks=40, sliding=.5,
                dropout=.2, attention_dropout=.2, steps=20_000, lengths=())}

# Counted from the shapes of the released code.
PARAMETERS = {'ml1m': 339_612, 'beauty': 3_653_202, 'steam': 955_832, 'ml20m': 1_855_932}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', 'large' or '[MODEL,]DATA[,RECIPE]'."""
  if arg in ('', 'smoke'):
    return _markov() if not arg else common.smoke(_markov(smoke=True))
  if arg == 'large':
    return _large()
  parts = arg.split(',')
  if parts[0] not in MODELS:
    choose('configs/bert4rec.py model or data set', parts[0], (*MODELS, *DATASETS))
    parts = ['bert4rec', *parts]
  if not 2 <= len(parts) <= 3:
    raise UserError(f'configs/bert4rec.py:{arg}: write [MODEL,]DATA[,RECIPE], e.g. ml1m; models: '
                    f'{", ".join(MODELS)}; data sets: {", ".join(DATASETS)}; recipes: '
                    f'{", ".join(RECIPES)}')
  model = parts[0]
  data = choose('configs/bert4rec.py data set', parts[1], DATASETS)
  converged = model != 'bert4rec' or parts[1] in ('ml100k', 'own')
  usual = 'converged' if converged else 'paper'
  recipe = choose('configs/bert4rec.py recipe', (parts + [usual])[2], RECIPES)
  config = _base()
  config.data.update(dict(name=data['name'], sliding=data['sliding'], lengths=data['lengths'],
                          min_item_count=data.get('min_item_count', 0)))
  config.model.update({key: data[key] for key in (
      'length', 'mask_rate', 'max_masks', 'dropout', 'attention_dropout')})
  config.model.catalogue = data['items']
  config.steps = f'{data["steps"]} steps'
  if model != 'bert4rec':
    _unidirectional(config, model)
  if recipe == 'converged':
    _converged(config, parts[1])
  return config


def _base() -> ml_collections.ConfigDict:
  """The paper's model and training (section 4.3), and its authors' code's."""
  config = common.base()
  config.task = 'recsys.bert4rec'
  config.model = ml_collections.ConfigDict(dict(
      kind='bert4rec',              # bert4rec, or sasrec: causal, predicts each next item
      catalogue=0,                  # items; 0 asks the data
      specials=4,                   # rows of the table that are no items: 4 (authors) or 2
      rows_multiple=1,              # rows are brought to a multiple, so that a mesh can split them
      length=50, width=64, depth=2, heads=2, mlp_dim=0,  # mlp_dim 0: 4 times the width
      dropout=.1, attention_dropout=.1,
      positions=True, residual=True,  # ablations (table 5)
      segments=True, transform=True,  # of the authors' code, not in the paper
      padding='right',              # right (authors) or left (most others)
      mask_rate=.2, max_masks=20,   # share of a sequence that is masked; the most in one sequence
      masking='fixed',              # fixed number, or bernoulli
      last_share=1 / 11,            # of the sequences, those of which only the last item is masked
      loss='softmax',               # softmax, or with drawn negatives: sampled, gbce
      negatives=256, shared_negatives=True,  # shared by all positions of a batch, or each its own
      proposal='log_uniform',       # of sampled: log_uniform or uniform
      calibration=.75,              # of gbce: t
      logits_mib=256,               # memory for scores of the catalogue; more are made in blocks
  ))
  config.data.update(dict(
      threads=1,                    # examples are a row of numbers: more only wait for each other
      # Of files and of tfds sets that we do not know; 'a/b' is b inside a.
      columns=dict(user='user_id', item='item_id', time='timestamp'),
      split='train',                # of a tfds set
      min_length=5, min_item_count=0,  # users and items with fewer events are left out
      core=0,                       # k: instead, both over and over until all have k
      sliding=.5,                   # step between windows, as a share of their length
      lengths=(),                   # of batches, each compiled once; () for the model's alone
      # See recsys.sequences.VALIDATIONS; paper: none.
      validation='none', validation_users=2048))
  config.eval.update(dict(negatives=100, negatives_seed=12345, top=10))
  config.batch_size = 256
  config.optim.update(dict(
      name='bert_adam', args=dict(b1=.9, b2=.999, eps=1e-6), lr=1e-4, clip_norm=5.,
      weight_decay=.01, decay_mask='kernel$|embedding$'))
  config.optim.schedule.update(dict(name='linear', warmup='100 steps'))
  config.log_every = '100 steps'
  config.eval.every = config.checkpoint.every = '5%'
  config.topology = 'v5e:2x4'
  return config


def _unidirectional(config: ml_collections.ConfigDict, model: str) -> None:
  """SASRec (Kang and McAuley, 2018) on the same encoder, with its loss or gSASRec's."""
  config.model.update(dict(kind='sasrec', segments=False, transform=False, specials=2))
  config.data.sliding = max(config.data.sliding, .5)  # Every position of a window is learned from.
  if model == 'sasrec':
    config.model.update(dict(loss='gbce', negatives=1, shared_negatives=False, calibration=0.))
  elif model == 'gsasrec':
    config.model.update(dict(loss='gbce', negatives=256, calibration=.75))


def _converged(config: ml_collections.ConfigDict, data: str) -> None:
  """To convergence, as the replicability study wants it: Adam at a constant 1e-3, until the
  validation's NDCG@10 among unseen items has not become better for 20 evaluations; what is
  measured at the end is the best.

  Fewer, larger steps than the paper's. Validation is of users that training does not see; of small
  data, of everyone's last but one item.
  """
  small = data in ('ml100k', 'own')
  config.data.validation = 'item' if small else 'users'
  config.steps = '1000 epochs' if small else '200 epochs'
  config.optim.update(dict(name='adam', args={}, lr=1e-3, clip_norm=0., weight_decay=0.))
  config.optim.schedule.update(dict(name='constant', warmup='0 steps'))
  if small:
    # Eight sequences fit a CPU's cache: twice as fast as all at once. Elsewhere set accum=1.
    # On MovieLens-100K the average's validation NDCG@10 rises steadily to .11, where that of the
    # parameters themselves wanders about .10.
    config.update(dict(batch_size=64, accum=8, ema=.999))
  else:
    config.batch_size = 128
  config.eval.every = config.checkpoint.every = '4 epochs' if small else '1 epochs'
  config.checkpoint.update(dict(best='validation/unseen/NDCG@10', select='best', patience=20))


def _markov(smoke: bool = False) -> ml_collections.ConfigDict:
  config = _base()
  config.data.update(dict(name='markov', validation='item', min_length=0))
  config.model.update(dict(length=24, mask_rate=.2, max_masks=8))
  config.update(dict(batch_size=128, accum=8))  # Sixteen sequences fit a CPU's cache.
  config.steps = '6000 steps'
  config.optim.lr = 2e-3
  config.optim.schedule.warmup = '5%'
  config.eval.every = config.checkpoint.every = '10%'
  config.eval.batch_size = 500
  if smoke:
    config.model.update(dict(length=8, width=16, mlp_dim=32))
    config.update(dict(batch_size=16, accum=1))
  return config


def _large() -> ml_collections.ConfigDict:
  """Ten million items: the full softmax would be 102 GB of scores a step; sampled it is 21 MB."""
  config = _base()
  config.data.update(dict(name='interactions:', lengths=()))
  config.model.update(dict(catalogue=10_000_000, rows_multiple=1024, loss='sampled',
                           negatives=2048))
  config.rules = 'tp'
  config.mesh.update(dict(data=4, tensor=4))
  config.topology = 'v5e:4x4'
  return config
