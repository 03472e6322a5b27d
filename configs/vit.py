"""Vision Transformer (arXiv 2010.11929).

configs/vit.py                   handwritten digits on two CPU cores, a minute and a half
configs/vit.py:smoke             the same in seconds, for tests
configs/vit.py:b16,imagenet2012  a published size on a data set of this file
configs/vit.py:b16,folder        ... on your own images: --config.data.name=folder:PATH
"""

import ml_collections

from configs import common
from core.config import UserError, choose

# Name -> (variant, patch size).
MODELS = {
    'ti16': ('Ti', 16), 's16': ('S', 16), 's32': ('S', 32), 'b8': ('B', 8), 'b16': ('B', 16),
    'b32': ('B', 32), 'l16': ('L', 16), 'l32': ('L', 32), 'h14': ('H', 14)}

DATASETS = ('imagenet2012', 'folder')

# Published settings and their parameters (224 px, 1,000 classes, no pre_logits).
PARAMETERS = {
    'ti16,imagenet2012': 5_717_416, 's16,imagenet2012': 22_050_664,
    's32,imagenet2012': 22_878_952, 'b8,imagenet2012': 86_576_872,
    'b16,imagenet2012': 86_567_656, 'b32,imagenet2012': 88_224_232,
    'l16,imagenet2012': 304_326_632, 'l32,imagenet2012': 306_535_400,
    'h14,imagenet2012': 632_045_800}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', or 'MODEL,DATASET'."""
  if arg in ('', 'smoke'):
    return _digits() if not arg else common.smoke(_digits(smoke=True))
  parts = arg.split(',')
  if len(parts) != 2:
    raise UserError(f'configs/vit.py:{arg}: write MODEL,DATASET, e.g. b16,imagenet2012; models: '
                    f'{", ".join(MODELS)}; data sets: {", ".join(DATASETS)}')
  variant, patch_size = choose('configs/vit.py model', parts[0], MODELS)
  choose('configs/vit.py data set', parts[1], DATASETS)
  return _imagenet(_base(variant, patch_size), variant, folder=parts[1] == 'folder')


def _base(variant: str, patch_size: int) -> ml_collections.ConfigDict:
  config = common.base()
  config.task = 'vit_family.classification'
  config.model = ml_collections.ConfigDict(dict(
      variant=variant, patch_size=patch_size, classifier='token',
      representation_size=0,        # width of the tanh layer before the head; 0 for none
      num_classes=0,                # 0 asks the data
      dropout_rate=0.0, attention_dropout_rate=0.0, scan=True,
      loss='softmax', label_smoothing=0.0, head_bias_init=0.0))
  config.data.update(dict(
      image_size=224, channels=3,
      crop='inception',             # training crop: inception, affine or none
      flip=True,
      eval_crop='resize_small',     # resize_small: shorter side to 8/7, centre crop; or resize
      splits=dict(train='train', validation='', test='test')))
  return config


def _digits(smoke: bool = False) -> ml_collections.ConfigDict:
  """1,257 training digits of 8x8 pixels, embedded in scikit-learn."""
  config = _base('mini', 8)
  config.data.update(dict(name='digits', image_size=32, channels=1, crop='affine', flip=False,
                          eval_crop='resize'))
  config.data.splits.validation = 'validation'
  config.batch_size = 64
  # A CPU waits for memory sooner than for arithmetic: computing again is 1.7 times faster here.
  config.remat = 'dots'
  config.steps = '45 epochs'
  config.optim.lr = 2e-3
  config.optim.weight_decay = 0.05
  config.optim.schedule.warmup = '5%'
  config.eval.every = '15 epochs'
  config.checkpoint.every = '15 epochs'
  config.checkpoint.best = 'validation/accuracy'
  if smoke:
    config.model.variant = 'mu'
    config.batch_size = 8
    config.data.image_size = 16
    # A slice of each split keeps an evaluation to a few batches.
    config.data.splits.update(dict(train='train[:64]', validation='validation[:20]',
                                   test='test[:20]'))
  return config


def _imagenet(config: ml_collections.ConfigDict, variant: str,
              folder: bool) -> ml_collections.ConfigDict:
  """ImageNet-1k from scratch, ViT table 3 (its last row): 300 epochs, batch 4096, lr 3e-3."""
  if folder:
    config.data.name = 'folder:'    # --config.data.name=folder:PATH
    config.data.splits.validation = 'validation'
  else:
    config.data.name = 'imagenet2012'
    config.data.examples = 1_268_355   # of 1,281,167; the last 1% is held out to choose on
    config.data.splits = ml_collections.ConfigDict(dict(
        train='train[:99%]', validation='train[99%:]', test='validation'))
    config.model.num_classes = 1000
  config.data.workers = 8
  config.batch_size = 4096
  config.steps = '300 epochs'
  config.model.dropout_rate = 0.1
  config.model.loss = 'sigmoid'
  config.model.head_bias_init = -10.0  # vit sheet, T5: what the authors trained with
  config.optim.lr = 3e-3
  config.optim.weight_decay = 0.3
  config.optim.schedule.warmup = '10000 steps'
  config.precision = 'bfloat16'
  config.eval.every = '5 epochs'
  config.checkpoint.every = '1 epochs'
  config.checkpoint.best = 'validation/accuracy'
  config.log_every = '100 steps'
  # What makes batch 4096 fit: keep matrix products, compute the rest again; shard the large ones.
  config.remat = 'dots'
  config.rules = 'fsdp' if variant in ('L', 'H') else 'dp'
  config.topology = {'L': 'v5e:8x8', 'H': 'v5e:16x16'}.get(variant, 'v5e:4x4')
  return config
