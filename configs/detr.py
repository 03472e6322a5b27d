"""DETR (Carion et al., "End-to-End Object Detection with Transformers", 2020).

configs/detr.py                        scenes of handwritten digits, ten minutes on two cores
configs/detr.py:smoke                  the same in seconds, for tests
configs/detr.py:panoptic               the same scenes with their stuff, and the mask head
configs/detr.py:MODEL,DATA             MODEL r50, r50_dc5, r101, r101_dc5, small (from scratch, for
                                       a CPU); DATA coco (500 epochs), coco300 (the ablations' 300),
                                       panoptic (things and stuff as boxes, stage one), masks (stage
                                       two: the mask head alone, on init_from stage one), own
configs/detr.py:MODEL,own              your data: --config.data.name=coco:PATH
configs/detr.py:CLAIM                  a claim at laptop size, see CLAIMS
"""

import ml_collections

from configs import common
from core.config import UserError, choose

MODELS = {
    'r50': {}, 'r50_dc5': dict(dilation=True),
    'r101': dict(backbone='r101'), 'r101_dc5': dict(backbone='r101', dilation=True),
    'small': dict(backbone='r11x0.25', backbone_norm='group', freeze_at=0, width=128, heads=4,
                  mlp_dim=256, encoder_layers=1, decoder_layers=3,
                  positions_at='input', dropout=0.)}

DATASETS = ('coco', 'coco300', 'panoptic', 'masks', 'own')

# Of table 1, to the unit; those with a mask head were counted in the public code.
PARAMETERS = {
    'r50,coco': 41_524_768, 'r50_dc5,coco': 41_524_768, 'r101,coco': 60_464_672,
    'r101_dc5,coco': 60_464_672, 'r50,masks': 42_899_288, 'r50_dc5,masks': 42_899_288,
    'r101,masks': 61_839_192}

# What differs from the embedded run.
CLAIMS = {
    'no_aux': 'without auxiliary losses (section 3.2)',
    'no_giou': 'L1 as the only box loss (table 4)',
    'no_l1': 'GIoU as the only box loss (table 4)',
    'decoder1': 'one decoder layer',
    'encoder0': 'no encoder (table 2)',
    'at_attention': 'positions in every attention, as published, not at the input (table 3)'}
_CLAIM_MODELS = {
    'no_aux': dict(aux_loss=False), 'no_giou': dict(giou_loss=0., giou_cost=0.),
    'no_l1': dict(bbox_loss=0., bbox_cost=0.), 'decoder1': dict(decoder_layers=1),
    'encoder0': dict(encoder_layers=0), 'at_attention': dict(positions_at='attention')}

# Height and width that the pictures of a batch are padded to. Whatever has a shorter side of at
# most 800 pixels and a longer one of at most 1333 fits into one of them.
_BUCKETS = ((640, 896), (896, 640), (800, 1088), (1088, 800), (800, 1344), (1344, 800))


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Returns the config named by `arg`: '', 'smoke', 'panoptic', 'MODEL,DATA' or a claim."""
  if arg in ('', 'smoke', 'panoptic') or arg in CLAIMS:
    return _digits(_base(), arg)
  parts = arg.split(',')
  if len(parts) != 2:
    raise UserError(f'configs/detr.py:{arg}: write MODEL,DATA, e.g. r50,coco; models: '
                    f'{", ".join(MODELS)}; data: {", ".join(DATASETS)}; or panoptic, or a claim: '
                    f'{", ".join(CLAIMS)}')
  model = choose('configs/detr.py model', parts[0], MODELS)
  return _full(_base(), parts[0], model, choose('configs/detr.py data', parts[1], DATASETS))


def _base() -> ml_collections.ConfigDict:
  config = common.base()
  config.task = 'detection.detr'
  config.model = ml_collections.ConfigDict(dict(
      backbone='r50',               # r50, r101, r11x0.25, r8x0.25
      backbone_norm='frozen',       # frozen (needs ImageNet weights) or group (from scratch)
      freeze_at=2,                  # stem and layer1 are not trained
      dilation=False,               # DC5
      width=256, heads=8, mlp_dim=2048, encoder_layers=6, decoder_layers=6,
      norm='post',                  # post (published) or pre
      positions='sine',             # sine or learned
      positions_at='attention',     # attention (published: of every layer) or input (table 3)
      queries=100, num_classes=0,   # 0 asks the data
      dropout=.1, scan=True,
      masks='none',                 # none, joint, frozen (the mask head alone is trained)
      mask_chunk=10,                # queries that the mask head takes at once; 0 is all
      aux_loss=True,
      class_cost=1., bbox_cost=5., giou_cost=2.,            # of a match
      bbox_loss=5., giou_loss=2., mask_loss=1., dice_loss=1., eos_coef=.1))
  config.data.update(dict(
      labels='contiguous',          # class indices: in order, or the file's own ids
      panoptic=False,               # stuff regions are objects too
      strict=True,                  # refuse annotations that are wrong, or skip and count them
      buckets=_BUCKETS, eval_buckets=_BUCKETS,
      views=16,                     # sizes and crops drawn for every image before they recur
      scales=tuple(range(480, 801, 32)), longest=1333, eval_short=800, flip=True,
      crop=True, crop_scales=(400, 500, 600), crop_min=384, crop_max=600,
      splits=dict(train='train', validation='validation', test='')))
  # Section A.4; everything decays, biases and norms too.
  config.optim.update(dict(
      name='adamw', lr=1e-4, weight_decay=1e-4, decay_mask='.', clip_norm=.1,
      lr_multipliers=(('^backbone/', .1),)))
  config.optim.schedule.name = 'step'
  config.eval.update(dict(
      decoder_layer=-1,             # whose boxes are measured: the last (figure 4 has all)
      nms=.0,                       # drop boxes that overlap a better one of their class so much
      threshold=.7,                 # score from which a box is drawn
      mask_threshold=.85))          # and from which a segment is kept (section 4.4)
  return config


def _full(config: ml_collections.ConfigDict, name: str, model: dict,
          data: str) -> ml_collections.ConfigDict:
  config.model.update(model)
  epochs, drop = {'coco': (500, 400), 'masks': (25, 15), 'own': (150, 100)}.get(data, (300, 200))
  config.steps = f'{epochs} epochs'
  config.optim.schedule.boundaries = (f'{drop} epochs',)
  config.data.workers = 4
  config.checkpoint.every = '1 epochs'
  config.log_every = '100 steps'
  config.topology = 'v5e:4x4'
  if data == 'own':
    config.data.name = 'coco:'
    config.batch_size = 16
    config.eval.update(dict(every='10 epochs', batch_size=8))
  else:
    stuff = data in ('panoptic', 'masks')
    config.data.update(dict(
        name='coco/2017_panoptic' if stuff else 'coco/2017', labels='ids', panoptic=stuff,
        examples=118_287))
    config.model.update(dict(num_classes=250 if stuff else 91,
                             masks='frozen' if data == 'masks' else 'none'))
    config.batch_size = 64
    config.eval.update(dict(every='10 epochs', batch_size=16))
    config.precision = 'bfloat16'
    config.remat = 'dots'
  if name == 'small':
    _small(config)
  return config


def _small(config: ml_collections.ConfigDict) -> None:
  """Pictures a quarter as long, and a recipe without pretrained weights."""
  config.data.update(dict(
      workers=0, scales=tuple(range(128, 225, 16)), longest=320, eval_short=192,
      crop_scales=(128, 160, 192), crop_min=128, crop_max=192,
      buckets=((224, 320), (320, 224)), eval_buckets=((192, 256), (256, 192), (192, 320),
                                                      (320, 192))))
  config.batch_size = 8
  _from_scratch(config)


def _from_scratch(config: ml_collections.ConfigDict) -> None:
  config.optim.update(dict(lr=5e-4, lr_multipliers=(), clip_norm=1.0, decay_mask='kernel$'))
  config.optim.schedule.update(dict(name='cosine', warmup='2%'))


def _digits(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
  """Scenes of 64 pixels; digits must not be mirrored, so there is no augmentation."""
  config.model.update(MODELS['small'])
  config.model.update(dict(
      backbone='r8x0.25', width=64, mlp_dim=128, queries=10, mask_chunk=0))
  config.data.update(dict(
      name='digit_scenes', buckets=((64, 64),), eval_buckets=((64, 64),), views=1, scales=(64,),
      longest=64, eval_short=64, flip=False, crop=False, splits=dict(test='test')))
  config.batch_size = 16
  config.steps = '7500 steps'
  _from_scratch(config)
  config.eval.update(dict(every='25%', batch_size=50, threshold=.5))
  config.checkpoint.best = 'validation_boxes/AP50'
  if arg in CLAIMS:
    config.model.update(_CLAIM_MODELS[arg])
  if arg == 'panoptic':
    config.data.panoptic = True
    config.model.masks = 'joint'
  if arg == 'smoke':
    config = common.smoke(config)
    config.data.splits.update(dict(train='train[:64]', validation='validation[:10]',
                                   test='test[:10]'))
    config.model.update(dict(width=32, encoder_layers=1, decoder_layers=2, heads=2, mlp_dim=32))
    config.batch_size = 8
    config.eval.batch_size = 16
    config.optim.lr = 3e-3
  return config
