"""Image GPT (Chen et al., "Generative Pretraining from Pixels", 2020).

configs/image_gpt.py                       handwritten digits of 8x8 pixels, minutes on two cores
configs/image_gpt.py:smoke                 the same in seconds, for tests
configs/image_gpt.py:SIZE,DATA             SIZE s, m, l, xl; DATA imagenet32, imagenet48, imagenet64
                                           (pretraining), cifar10, cifar100, stl10 (fine-tuning)
configs/image_gpt.py:s,folder              your own images: --config.data.name=folder:PATH
configs/image_gpt.py:SIZE,DATA,RECIPE      ar or bert (pretraining), finetune, finetune_bert, probe
configs/image_gpt.py:CLAIM,...             a claim of the paper at laptop size, see CLAIMS
"""

import ml_collections

from configs import common
from core.config import UserError, choose
from generative import variants

SIZES = {'s': 'S', 'm': 'M', 'l': 'L', 'xl': 'XL'}

# Splits hold out 4% of ImageNet's training images and 10% of the others' (paper section 3.1).
DATASETS = {
    **{f'imagenet{size}': dict(
        name='imagenet2012', image_size=size, classes=1000, examples=1_229_920,
        splits=('train[:96%]', 'train[96%:]', 'validation')) for size in (32, 48, 64)},
    'cifar10': dict(name='cifar10', image_size=32, classes=10, examples=45_000,
                    splits=('train[:90%]', 'train[90%:]', 'test')),
    'cifar100': dict(name='cifar100', image_size=32, classes=100, examples=45_000,
                     splits=('train[:90%]', 'train[90%:]', 'test')),
    # 96 pixels, brought to 32; the unlabelled split is a part of ImageNet and left out.
    'stl10': dict(name='stl10', image_size=32, classes=10, examples=4_500,
                  splits=('train[:90%]', 'train[90%:]', 'test')),
    'folder': dict(name='folder:', image_size=32, classes=0, examples=0,
                   splits=('train', 'validation', 'test'))}

_PHOTOGRAPHS = ('imagenet2012', 'folder:')  # of any size: crops of 224 pixels, then brought down

RECIPES = ('ar', 'bert', 'finetune', 'finetune_bert', 'probe')

# Paper table 5, (objective, size, side) -> learning rate. What the table does not have follows the
# nearest: M at 48 and 64 pixels, S and XL at other sides than 32 and 64.
_RATES = {
    ('ar', 'S', 32): 3e-3, ('ar', 'M', 32): 3e-3, ('ar', 'L', 32): 1e-3, ('ar', 'L', 48): 1e-2,
    ('ar', 'XL', 64): 3e-4, ('bert', 'S', 32): 1e-2, ('bert', 'M', 32): 3e-3,
    ('bert', 'L', 32): 1e-3}

# Published settings and their parameters, counted from the released code's shapes. The paper's
# tables quote the count at 32 pixels for every resolution (1362M and 6801M).
PARAMETERS = {
    's,imagenet32': 76_571_648, 'm,imagenet32': 455_157_760, 'l,imagenet32': 1_362_250_752,
    'l,imagenet48': 1_364_216_832, 'xl,imagenet32': 6_801_438_720,
    'xl,imagenet64': 6_810_875_904, 's,imagenet32,bert': 76_571_136,
    's,cifar10,finetune': 76_576_768, 'l,imagenet32,probe': 1_363_786_752}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', 'SIZE,DATA[,RECIPE]' or a claim."""
  if arg in ('', 'smoke'):
    return _digits() if not arg else common.smoke(_digits(smoke=True))
  parts = arg.split(',')
  if parts[0] in CLAIMS:
    return _claim(*parts)
  if len(parts) not in (2, 3):
    raise UserError(f'configs/image_gpt.py:{arg}: write SIZE,DATA[,RECIPE], e.g. s,imagenet32; '
                    f'sizes: {", ".join(SIZES)}; data sets: {", ".join(DATASETS)}; recipes: '
                    f'{", ".join(RECIPES)}; or a claim: {", ".join(CLAIMS)}')
  size = choose('configs/image_gpt.py size', parts[0], SIZES)
  found = choose('configs/image_gpt.py data set', parts[1], DATASETS)
  usual = 'ar' if found['name'] in _PHOTOGRAPHS else 'finetune'
  recipe = choose('configs/image_gpt.py recipe', (parts + [usual])[2], RECIPES)
  config = _published(size, found)
  if recipe in ('ar', 'bert'):
    _pretrain(config, recipe)
  elif recipe == 'probe':
    _probe(config, found['name'])
  else:
    _finetune(config, 'bert' if recipe == 'finetune_bert' else 'ar')
  return config


def _base(variant: str) -> ml_collections.ConfigDict:
  config = common.base()
  config.task = 'generative.image_gpt'
  config.model = ml_collections.ConfigDict(dict(
      variant=variant,
      colors=512,                   # size of the palette
      objective='ar',               # ar or bert
      mask_rate=.15,                # of bert
      gen_weight=1.0, clf_weight=0.0,  # of L_GEN and L_CLF; a class head exists when it counts
      num_classes=0,                # 0 asks the data
      head_layers=(),               # layers that the class head reads; () for the final norm
      frozen=False,                 # the class head alone learns
      initializer='code',           # code (released), sparse (Child et al. 2019) or huggingface
      scan=True,
      # Completions: temperature 1 and all colours are OpenAI's; rows given, 0 for half of them.
      sample=dict(temperature=1.0, top_k=0, top_p=1.0, count=4, rows=0)))
  config.data.update(dict(
      image_size=32, channels=3,
      palette='',                   # a palette file; '' makes WORKDIR/palette.npy, or takes it
                                    # from init_from
      order='raster',               # raster or snake (every second row from right to left)
      crop='none',                  # of training: imagenet, cifar, affine or none
      eval_crop='none',             # imagenet (the middle 224 of 224) or none
      # probe: what linear probes learn from; '' for none
      splits=dict(train='train', validation='', test='test', probe='')))
  config.eval.probe = ml_collections.ConfigDict(dict(
      strengths=(.001, .01, .1, 1.), max_iter=1000,
      labels=(4, 25, 400), subsets=5,  # low-data protocol: labels a class, subsets drawn
      masks=5))                     # of bert: masks that vote
  # Adam (section 3.3): no decay, no dropout; neither clipping nor epsilon is mentioned.
  config.optim.update(dict(name='adam', args=dict(b2=.95), clip_norm=0.0))
  return config


def _digits(smoke: bool = False) -> ml_collections.ConfigDict:
  """1,257 training digits of 8x8 pixels, embedded in scikit-learn, in 16 levels of grey."""
  config = _base('medium')
  config.model.colors = 16
  config.data.update(dict(name='digits', image_size=8, channels=1, crop='affine'))
  config.data.splits.update(dict(validation='validation', probe='train'))
  config.eval.probe.labels = (4, 25)
  config.batch_size = 64
  config.remat = 'dots'
  config.steps = '45 epochs'
  config.optim.lr = 3e-3
  config.optim.schedule.warmup = '5%'
  config.eval.every = config.checkpoint.every = '15 epochs'
  config.checkpoint.best = '-validation/generative_loss'
  if smoke:
    config.model.variant = 'mu'
    config.batch_size = 8
    config.model.clf_weight = 1.0
    config.eval.probe.update(dict(strengths=(.1,), labels=(2,), subsets=2))
    config.data.splits.update(dict(train='train[:64]', validation='validation[:20]',
                                   test='test[:20]', probe='train[:64]'))
  return config


def _published(variant: str, found: dict) -> ml_collections.ConfigDict:
  config = _base(variant)
  train, validation, test = found['splits']
  config.data.update(dict(name=found['name'], image_size=found['image_size'],
                          examples=found['examples'], workers=8))
  config.data.splits.update(dict(train=train, validation=validation, test=test))
  config.model.num_classes = found['classes']
  if found['name'] in _PHOTOGRAPHS:
    config.data.update(dict(crop='imagenet', eval_crop='imagenet'))
  config.batch_size = 64 if variant == 'XL' else 128
  # The paper trained in float32; bfloat16 is what flash attention and these slices are made for.
  config.precision = 'bfloat16'
  config.log_every = '100 steps'
  config.remat = 'full' if variant == 'XL' else 'dots'
  config.rules = 'dp' if variant == 'S' else 'fsdp'
  config.topology = {'S': 'v5e:4x4', 'M': 'v5e:4x4', 'L': 'v5e:8x8', 'XL': 'v5e:8x8'}[variant]
  return config


def _pretrain(config: ml_collections.ConfigDict, objective: str) -> None:
  """Sections 3.3 and 3.4: one epoch of warm-up, then cosine to 0; 128 million images."""
  variant, side = config.model.variant, config.data.image_size
  config.model.objective = objective
  config.steps = '2000000 steps' if variant == 'XL' else '1000000 steps'
  config.optim.lr = _RATES.get((objective, variant, side)) or next(
      rate for (kind, size, _), rate in _RATES.items()
      if kind == objective and size == ('L' if variant == 'XL' and kind == 'bert' else variant))
  config.optim.schedule.warmup = '1 epochs'
  config.eval.every = config.checkpoint.every = '1%'
  config.checkpoint.best = '-validation/generative_loss'


def _finetune(config: ml_collections.ConfigDict, objective: str) -> None:
  """Section 3.4: the joint loss, a tenth of the learning rate, no cosine, the best checkpoint.

  The paper stops when the validation accuracy is best; a length it does not give, so that this one
  is ours: `steps` may be cut short at any time, the best checkpoint is kept.
  """
  variant, photographs = config.model.variant, config.data.name in _PHOTOGRAPHS
  config.model.objective = objective
  config.model.clf_weight = 1.0
  if not photographs:
    config.data.crop = 'cifar'
  config.steps = '30 epochs' if photographs else '100 epochs'
  rate = _RATES.get((objective, variant, config.data.image_size)) or _RATES.get(
      (objective, variant, 32)) or 3e-4
  config.optim.lr = rate / 10
  config.optim.schedule.name = 'constant'
  config.eval.every = config.checkpoint.every = '1 epochs'
  config.checkpoint.best = 'validation/accuracy'


def _probe(config: ml_collections.ConfigDict, name: str) -> None:
  """Section 3.4. ImageNet: the class head alone, SGD for a million steps, on the middle layer (set
  `head_layers` to the layer of your choice, or to five for iGPT-XL's 15,360 features). The others:
  logistic regression on every layer; run it with --mode=evaluate."""
  if name != 'imagenet2012':
    config.data.splits.probe = 'train'
    config.steps = '1 steps'
    return
  depth = variants.GPTS[config.model.variant].depth
  config.model.update(dict(gen_weight=0.0, clf_weight=1.0, frozen=True,
                           head_layers=(depth * 5 // 12,)))
  config.steps = '1000000 steps'
  config.optim.update(dict(name='sgd', args=dict(momentum=.9), lr=3.0, freeze='^(?!wclf)'))
  config.eval.every = config.checkpoint.every = '1%'
  config.checkpoint.best = 'validation/accuracy'


# --- Claims of the paper at laptop size -----------------------------------------------------------

# First argument -> what follows it. Each is a run of minutes on two CPU cores.
CLAIMS = {
    'pretrain': 'DATA,SIZE,OBJECTIVE: DATA cifar10 or fashion_mnist at 16 pixels, SIZE small, '
                'medium or large, OBJECTIVE ar or bert; ends with a linear probe of every layer',
    'finetune': 'DATA,PERCENT,OBJECTIVE on 1 or 10% of the labels (config.init_from: a medium run '
                'of pretrain; without it, from scratch)'}


def _claim(name: str, *what: str) -> ml_collections.ConfigDict:
  usage = f'configs/image_gpt.py:{name},... takes {CLAIMS[name]}'
  if len(what) != 3 or what[0] not in ('cifar10', 'fashion_mnist') or what[2] not in ('ar', 'bert'):
    raise UserError(usage)
  data, argument, objective = what
  config = _base('medium')
  grey = data == 'fashion_mnist'
  config.model.update(dict(objective=objective, colors=16 if grey else 64))
  config.data.update(dict(name=data, image_size=16, channels=1 if grey else 3))
  config.batch_size = 32
  config.remat = 'dots'
  # Nothing trains on the validation images; of the official test these are the first 2,000.
  config.data.splits.update(dict(validation='train[98%:]', test='test[:2000]'))
  config.eval.probe.labels = (4, 25)
  # Fine-tuning after pretraining, 3e-3 was better on the validation images than 1e-3; nothing else
  # was tried.
  config.optim.lr = 3e-3
  config.optim.schedule.warmup = '5%'
  config.eval.every = config.checkpoint.every = '100%'
  if name == 'pretrain' and argument in ('small', 'medium', 'large'):
    config.model.variant = argument
    config.data.splits.update(dict(train='train[:98%]', probe='train[:4000]'))
    config.steps = '250 steps'
  elif name == 'finetune' and argument in ('1', '10'):
    config.data.splits.train = f'train[:{argument}%]'
    config.model.clf_weight = 1.0
    config.steps = '100 steps'
  else:
    raise UserError(usage)
  return config
