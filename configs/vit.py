"""Vision Transformer (arXiv 2010.11929), hybrids, BiT (1912.11370), AugReg (2106.10270).

configs/vit.py                          handwritten digits on two CPU cores, a minute and a half
configs/vit.py:smoke                    the same in seconds, for tests
configs/vit.py:MODEL,DATASET            the recipe that is usual for the data set
configs/vit.py:MODEL,DATASET,RECIPE     another one; both are listed in MODELS, DATASETS, RECIPES
configs/vit.py:b16,cifar10              fine-tuning: --config.init_from=B_16.npz
configs/vit.py:b16,folder,finetune      ... on your own images: --config.data.name=folder:PATH
configs/vit.py:b16,vtab_dmlab           ... on one of the 19 VTAB-1k tasks
configs/vit.py:CLAIM,...                a claim of the paper at laptop size, see CLAIMS
"""

import ml_collections

from configs import common
from core.config import UserError, choose
from vit_family import randaugment, variants, vtab

# Name -> (variant, kernel of the embedding, ResNet before it).
MODELS = {
    'ti16': ('Ti', 16, ''), 's16': ('S', 16, ''), 's32': ('S', 32, ''), 'b8': ('B', 8, ''),
    'b16': ('B', 16, ''), 'b32': ('B', 32, ''), 'l16': ('L', 16, ''), 'l32': ('L', 32, ''),
    'h14': ('H', 14, ''), 'g14': ('g', 14, ''), 'bigg14': ('G', 14, ''),
    'r_ti16': ('Ti', 8, 'R'), 'r26_s32': ('S', 1, 'R26'), 'r26_b32': ('B', 1, 'R26'),
    'r50_b16': ('B', 1, 'R50/16'), 'r50_b32': ('B', 1, 'R50'), 'r50_l16': ('L', 1, 'R50/16'),
    'r50_l32': ('L', 1, 'R50'),
    **{name.lower(): (name, 16, '') for name in variants.BIT}}

# Name -> tfds name, classes, training images, splits; and what fine-tuning uses: steps, warm-up,
# learning rate (ViT table 4; where it has a grid, a middle value that you may move).
DATASETS = {
    'imagenet2012': dict(
        name='imagenet2012', classes=1000, examples=1_268_355, splits=(
            'train[:99%]', 'train[99%:]', 'validation'), finetune=(20_000, 500, .03)),
    'imagenet21k': dict(
        name='imagenet21k', classes=21_843, examples=14_145_922, splits=(
            'train[51200:]', 'train[:25600]', 'train[25600:51200]')),
    # Google's own; here so that its recipes can be read, compiled and adapted.
    'jft': dict(name='jft300m', classes=18_291, examples=303_000_000, splits=(
        'train', '', 'validation')),
    'cifar10': dict(
        name='cifar10', classes=10, examples=49_000, splits=('train[:98%]', 'train[98%:]', 'test'),
        finetune=(10_000, 500, .01)),
    'cifar100': dict(
        name='cifar100', classes=100, examples=49_000, splits=(
            'train[:98%]', 'train[98%:]', 'test'), finetune=(10_000, 500, .01)),
    'pets': dict(
        name='oxford_iiit_pet', classes=37, examples=3_312, splits=(
            'train[:90%]', 'train[90%:]', 'test'), finetune=(500, 100, .01)),
    'flowers': dict(
        name='oxford_flowers102', classes=102, examples=1_938, splits=(
            'train+validation[:90%]', 'validation[90%:]', 'test'), finetune=(500, 100, .01)),
    'folder': dict(
        name='folder:', classes=0, examples=0, splits=('train', 'validation', 'test'),
        finetune=(2_500, 200, .01)),
}
DATASETS.update({
    f'vtab_{task}': dict(name=found.data, classes=found.classes, examples=1_000,
                         splits=(found.trainval, '', found.test), vtab=task,
                         finetune=(2_500, 200, .01))
    for task, found in vtab.TASKS.items()})

RECIPES = ('pretrain', 'augreg', *(f'augreg_{name}' for name in randaugment.PRESETS), 'finetune',
           'finetune512', 'hyperrule', 'masked')

# ViT table 3: epochs, learning rate. Decay is linear for these two, dropout and weight decay are in
# _pretrain. What has no row follows the nearest: Ti and S follow B/16; H, g, G and all ResNets on
# ImageNet-21k follow L/16.
_TABLE_3 = {
    'jft': {
        'b16': (7, 8e-4), 'b32': (7, 8e-4), 'l32': (7, 6e-4), 'l16': (14, 4e-4),
        'h14': (14, 3e-4), 'r50x1': (7, 1e-3), 'r50x2': (7, 1e-3), 'r101x1': (7, 8e-4),
        'r152x1': (7, 6e-4), 'r152x2': (7, 6e-4), 'r50_b16': (7, 8e-4), 'r50_b32': (7, 8e-4),
        'r50_l32': (7, 2e-4), 'r50_l16': (14, 4e-4)},
    'imagenet21k': {'b16': (90, 1e-3), 'b32': (90, 1e-3), 'l16': (90, 1e-3), 'l32': (90, 1e-3)}}

# "How to train your ViT", the public code's choice where a model and data set are trained once.
_AUGREG = {
    'imagenet2012': {'Ti': 'light1', 'S/32': 'medium1', 'S': 'medium2', 'B': 'medium2',
                     'L': 'medium2'},
    'imagenet21k': {'Ti': 'none', 'S/32': 'none', 'S': 'light1', 'B': 'light2', 'L': 'medium2'}}

# Published settings and their parameters: 224 px and 1,000 classes without pre_logits; the
# original ImageNet-21k models have pre_logits.
PARAMETERS = {
    'ti16,imagenet2012': 5_717_416, 's16,imagenet2012': 22_050_664,
    's32,imagenet2012': 22_878_952, 'b8,imagenet2012': 86_576_872,
    'b16,imagenet2012': 86_567_656, 'b32,imagenet2012': 88_224_232,
    'l16,imagenet2012': 304_326_632, 'l32,imagenet2012': 306_535_400,
    'h14,imagenet2012': 632_045_800, 'g14,imagenet2012': 1_012_611_432,
    'bigg14,imagenet2012': 1_844_440_680, 'r_ti16,imagenet2012': 6_337_704,
    'r26_s32,imagenet2012': 36_431_912, 'r26_b32,imagenet2012': 101_383_976,
    'r50_b16,imagenet2012': 98_659_112, 'r50_l32,imagenet2012': 328_994_856,
    'b16,imagenet21k': 103_186_515, 'l16,imagenet21k': 326_740_307,
    'h14,imagenet21k': 660_385_363, 's16,imagenet21k,augreg': 30_075_219,
    'b16,imagenet2012,finetune': 86_859_496, 'l32,imagenet2012,finetune': 306_632_680,
    'r50x1,imagenet2012': 25_549_352, 'r152x4,imagenet21k': 1_107_299_923}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', 'MODEL,DATASET[,RECIPE]' or a claim."""
  if arg in ('', 'smoke'):
    return _digits() if not arg else common.smoke(_digits(smoke=True))
  parts = arg.split(',')
  if parts[0] in CLAIMS:
    return _claim(*parts)
  if len(parts) not in (2, 3):
    raise UserError(f'configs/vit.py:{arg}: write MODEL,DATASET[,RECIPE], e.g. b16,imagenet2012; '
                    f'models: {", ".join(MODELS)}; data sets: {", ".join(DATASETS)}; recipes: '
                    f'{", ".join(RECIPES)}; or a claim: {", ".join(CLAIMS)}')
  model, data = parts[:2]
  choose('configs/vit.py model', model, MODELS)
  found = choose('configs/vit.py data set', data, DATASETS)
  is_bit = MODELS[model][0] in variants.BIT
  transfers = 'finetune' in found and data not in ('imagenet2012', 'folder')
  usual = 'pretrain' if not transfers else 'hyperrule' if is_bit else 'finetune'
  recipe = choose('configs/vit.py recipe', (parts + [usual])[2], RECIPES)
  if recipe.startswith('finetune') and 'finetune' not in found:
    raise UserError(f'configs/vit.py:{arg}: nobody fine-tunes on {data}; data sets for that: '
                    f'{", ".join(name for name, d in DATASETS.items() if "finetune" in d)}')
  config = _base(*MODELS[model])
  _data(config, data)
  _large(config, model)
  if recipe == 'pretrain':
    (_bit_pretrain if is_bit and data not in _TABLE_3 else _pretrain)(config, model, data)
  elif recipe.startswith('augreg'):
    _augreg(config, data, recipe.removeprefix('augreg').removeprefix('_'))
  elif recipe == 'masked':
    _masked(config)
  elif recipe == 'hyperrule':
    _hyperrule(config, data)
  else:
    _finetune(config, model, data, large=recipe == 'finetune512')
  return config


def _base(variant: str, patch_size: int, backbone: str = '') -> ml_collections.ConfigDict:
  config = common.base()
  config.task = 'vit_family.classification'
  config.model = ml_collections.ConfigDict(dict(
      variant=variant, patch_size=patch_size,
      backbone=backbone,            # ResNet before the encoder: '', R, R26, R50, R50/16
      classifier='token',           # token, gap or map
      representation_size=0,        # width of the tanh layer before the head; 0 for none
      num_classes=0,                # 0 asks the data
      dropout_rate=0.0, attention_dropout_rate=0.0,
      stochastic_depth=0.0,         # of the last block; grows linearly from 0 at the first
      activation='gelu_tanh',       # gelu_erf for checkpoints that torch trained
      scan=True, loss='softmax', label_smoothing=0.0, head_bias_init=0.0,
      mixup=0.0,                    # alpha; 0 is off
      export='npz'))                # npz (Google's names) or huggingface
  config.data.update(dict(
      image_size=224, channels=3,
      crop='inception',             # training crop: inception, random, affine or none
      resize=0,                     # crop='random': squashed to this side before the crop
      flip=True, randaugment_layers=0, randaugment_magnitude=0,
      eval_crop='resize_small',     # resize_small: shorter side to 8/7, centre crop; or resize
      classes=(),                   # only these, renumbered from 0; () for all
      vtab='',                      # a VTAB task, whose labels are made from the examples
      real_labels='',               # path of ImageNet-ReaL's real.json
      # support: what few-shot and nearest-neighbour evaluation learn from; '' for neither
      splits=dict(train='train', validation='', test='test', support='')))
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


def _data(config: ml_collections.ConfigDict, name: str) -> None:
  found = DATASETS[name]
  train, validation, test = found['splits']
  config.data.update(dict(name=found['name'], examples=found['examples'], workers=8,
                          vtab=found.get('vtab', '')))
  config.data.splits.update(dict(train=train, validation=validation, test=test))
  config.model.num_classes = found['classes']
  if validation:
    config.checkpoint.best = 'validation/accuracy'


def _large(config: ml_collections.ConfigDict, model: str) -> None:
  """What makes batch 4096 fit: keep matrix products, compute the rest again; shard the large."""
  variant = config.model.variant
  config.precision = 'bfloat16'
  config.log_every = '100 steps'
  config.remat = 'dots'
  big = variant in ('L', 'H', 'g', 'G') or model in ('r101x3', 'r152x2', 'r152x4', 'r200x3')
  config.rules = 'fsdp' if big else 'dp'
  config.topology = {
      'l16': 'v5e:8x8', 'l32': 'v5e:8x8', 'r50_l32': 'v5e:8x8', 'r50_l16': 'v5e:8x8',
      'h14': 'v5e:16x16', 'g14': 'v5e:16x16', 'bigg14': 'v5e:16x16',
      'r152x4': 'v5e:16x16', 'r200x3': 'v5e:16x16', 'r101x3': 'v5e:16x16',
      'r152x2': 'v5e:8x8'}.get(model, 'v5e:4x4')


def _pretrain(config: ml_collections.ConfigDict, model: str, data: str) -> None:
  """ViT table 3. The loss is not in the paper: its authors say sigmoid, with head bias -10."""
  config.batch_size = 4096
  config.model.loss = 'sigmoid'
  config.model.head_bias_init = -10.0
  config.optim.schedule.warmup = '10000 steps'
  config.eval.every = '5 epochs'
  config.checkpoint.every = '1 epochs'
  if data not in _TABLE_3:  # ImageNet-1k, and one's own images alike
    config.steps = '300 epochs'
    config.optim.update(dict(lr=3e-3, weight_decay=.3))
    config.model.dropout_rate = 0.1
    return
  table = _TABLE_3[data]
  width = {'Ti': 'b16', 'S': 'b16', 'B': 'b16', 'L': 'l16'}.get(config.model.variant)
  neighbour = width or ('r152x2' if config.model.variant in variants.BIT else 'h14')
  epochs, lr = table.get(model) or table.get(neighbour) or table['l16']
  config.steps = f'{epochs} epochs'
  config.optim.lr = lr
  config.optim.schedule.update(dict(name='linear', end_lr=1e-5))
  config.optim.weight_decay = .1 if data == 'jft' else .03
  if config.model.variant not in variants.BIT:
    config.model.dropout_rate = 0.0 if data == 'jft' else 0.1
    # Section 3.1: an MLP with one hidden layer at pre-training time, dropped at transfer.
    config.model.representation_size = variants.VIT[config.model.variant].width
  config.checkpoint.every = config.eval.every = '2%'


def _bit_pretrain(config: ml_collections.ConfigDict, model: str, data: str) -> None:
  """BiT-S (its section 3.2): SGD, 90 epochs, divided by 10 at 30, 60 and 80."""
  del model, data
  config.batch_size = 4096
  config.steps = '90 epochs'
  # Its decay of 1e-4 is in the gradient, where momentum 0.9 makes ten times that of it; ours is
  # decoupled.
  config.optim.update(dict(name='sgd', lr=.03 * 4096 / 256, weight_decay=1e-3, clip_norm=0.0))
  config.optim.schedule.update(dict(name='step', warmup='5000 steps', factor=.1,
                                    boundaries=('30 epochs', '60 epochs', '80 epochs')))
  config.eval.every = config.checkpoint.every = '5 epochs'


def _augreg(config: ml_collections.ConfigDict, data: str, preset: str) -> None:
  """"How to train your ViT" section 3: Adam, 300 epochs, augmentation by name."""
  variant, patch = config.model.variant, config.model.patch_size
  if not preset:
    table = _AUGREG.get(data, _AUGREG['imagenet2012'])
    size = 'S/32' if (variant, patch) in (('S', 32), ('S', 1)) else variant
    if size not in table:
      raise UserError(f'configs/vit.py:...,augreg: there is no public choice for {size}; name one: '
                      f'{", ".join(f"augreg_{name}" for name in randaugment.PRESETS)}')
    preset = table[size]
  layers, magnitude, mixup = randaugment.PRESETS[preset]
  config.data.update(dict(randaugment_layers=layers, randaugment_magnitude=magnitude))
  config.model.update(dict(mixup=mixup, loss='sigmoid', head_bias_init=(
      -10.0 if data == 'imagenet21k' else -6.9)))  # -6.9 = ln(1/1000)
  config.batch_size = 4096
  config.steps = '300 epochs'
  config.optim.update(dict(lr=1e-3, weight_decay=.1))
  config.optim.schedule.warmup = '10000 steps'
  config.eval.every = '5 epochs'
  config.checkpoint.every = '1 epochs'
  if (variant, config.model.backbone) == ('L', 'R50'):
    config.model.update(dict(dropout_rate=.1, stochastic_depth=.1))


def _finetune(config: ml_collections.ConfigDict, model: str, data: str, large: bool) -> None:
  """ViT table 4: SGD with momentum, cosine to 0, no decay; 384 px, or 512 with averaging."""
  steps, warmup, lr = DATASETS[data]['finetune']
  config.batch_size = 512
  config.steps = f'{steps} steps'
  config.optim.update(dict(name='sgd', lr=lr))
  config.optim.schedule.warmup = f'{warmup} steps'
  config.data.image_size = 384
  if large:
    config.data.image_size = 512
    config.ema = .9999
  if config.model.patch_size == 14:
    config.data.image_size = 518 if large else 392
  # The public code evaluates on the whole image, squashed to a square.
  config.data.eval_crop = 'resize'
  if model in ('l16', 'h14', 'r50_b16', 'r50_l32'):
    config.model.dropout_rate = .1
  config.eval.every = config.checkpoint.every = '10%'
  if DATASETS[data].get('vtab'):
    found = vtab.TASKS[DATASETS[data]['vtab']]
    config.data.update(dict(flip=found.flip, crop='random' if found.crop else 'none',
                            resize=config.data.image_size * 7 // 6))  # 448 for 384


def _hyperrule(config: ml_collections.ConfigDict, data: str) -> None:
  """BiT-HyperRule (section 3.3): schedule, resolution and mixup from the size of the data set."""
  size = DATASETS[data]['examples']
  if size < 20_000:
    first, *rest, last = 100, 200, 300, 400, 500
  elif size < 500_000:
    first, *rest, last = 500, 3_000, 6_000, 9_000, 10_000
  else:
    first, *rest, last = 500, 6_000, 12_000, 18_000, 20_000
  config.batch_size = 512
  config.steps = f'{last} steps'
  config.optim.update(dict(name='sgd', lr=.003, clip_norm=0.0))
  config.optim.schedule.update(dict(name='step', warmup=f'{first} steps', factor=.1,
                                    boundaries=tuple(f'{step} steps' for step in rest)))
  small = data in ('cifar10', 'cifar100')  # images of fewer than 96 x 96 pixels
  config.data.update(dict(crop='random', resize=160 if small else 512,
                          image_size=128 if small else 480, eval_crop='resize'))
  config.model.mixup = 0.0 if size < 20_000 else .1
  config.eval.every = config.checkpoint.every = '10%'
  if DATASETS[data].get('vtab'):
    config.data.flip = vtab.TASKS[DATASETS[data]['vtab']].flip


def _masked(config: ml_collections.ConfigDict) -> None:
  """Masked patch prediction, ViT appendix B.1.2."""
  config.task = 'vit_family.masked_patches'
  config.model.update(dict(target='mean_color', mask_rate=.5))
  config.batch_size = 4096
  config.steps = '1000000 steps'
  config.optim.lr = 2e-4
  config.optim.schedule.warmup = '10000 steps'
  config.eval.every = config.checkpoint.every = '1%'
  if config.checkpoint.best:
    config.checkpoint.best = '-validation/loss'


# --- Claims of the paper at laptop size -----------------------------------------------------------

# First argument -> what follows it. Each is a run of minutes on two CPU cores, on CIFAR-10.
CLAIMS = {
    'hunger': 'MODEL,PERCENT of the training images: MODEL vit or bit, PERCENT 1, 10 or 100',
    'transfer': 'pretrain (six classes), then finetune or scratch (the other four, 48 pixels)',
    'masked': 'pretrain (no labels), then finetune or scratch (1% of the labels)'}


def _claim(name: str, *what: str) -> ml_collections.ConfigDict:
  usage = f'configs/vit.py:{name},... takes {CLAIMS[name]}'
  config = _base('mini', 4)
  config.data.update(dict(name='cifar10', image_size=32, crop='random', resize=36,
                          eval_crop='resize', examples=0))
  config.data.splits.update(dict(train='train', validation='', test='test'))
  config.batch_size = 128
  config.remat = 'dots'  # see _digits
  # On 1,000 images kept out of training, 3e-3 was better than 1e-3 for the ViT after 150 steps; the
  # ResNet learned as fast with 1e-3 in the 50 steps compared.
  config.optim.update(dict(lr=3e-3, weight_decay=.05))
  config.optim.schedule.warmup = '10%'
  config.eval.every = config.checkpoint.every = '50%'
  if name == 'hunger' and len(what) == 2 and what[0] in ('vit', 'bit') and what[1] in (
      '1', '10', '100'):
    # Forward, an image takes the ViT 32.4 MFLOP in matrix products, the ResNet 15.5 in
    # convolutions, which are slower here: about 400 and 300 images/s in training. All six runs see
    # the same number of images.
    config.steps = '300 steps'
    config.data.splits.train = f'train[:{what[1]}%]'
    if what[0] == 'bit':
      config.model.variant = 'R14x0.5'
      config.remat = 'none'
      config.optim.lr = 1e-3
  elif name == 'transfer' and what in (('pretrain',), ('finetune',), ('scratch',)):
    config.model.patch_size = 8
    if what == ('pretrain',):
      config.steps = '800 steps'
      config.data.classes = (0, 1, 2, 3, 4, 5)
    else:
      config.steps = '200 steps'
      config.data.update(dict(classes=(6, 7, 8, 9), image_size=48, resize=54))
      config.data.splits.train = 'train[:10%]'
  elif name == 'masked' and what in (('pretrain',), ('finetune',), ('scratch',)):
    if what == ('pretrain',):
      config.task = 'vit_family.masked_patches'
      config.model.update(dict(target='mean_color', mask_rate=.5))
      config.steps = '600 steps'
    else:
      config.steps = '100 steps'
      config.data.splits.train = 'train[:1%]'
  else:
    raise UserError(usage)
  return config
