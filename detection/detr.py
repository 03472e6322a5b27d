"""DETR as a task: what it trains on, what it measures, what it answers; for configs/detr.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from core import task
from core.config import UserError, choose
from core.data import images
from core.evaluate import Mean
from detection import (
    augment, average_precision, backbone, boxes, categories, checkpoints, criterion, detector,
    mask_head, matching, panoptic, pictures, predict, query_pictures, sources, views)

_NORMS, _POSITIONS = ('post', 'pre'), ('sine', 'learned')
_POSITIONS_AT = ('attention', 'input')


class Task(task.Task):
  """Set prediction of boxes, and of masks with the mask head.

  The loss is the sum over decoder layers of the cross entropy, `bbox_loss` times L1 and `giou_loss`
  times GIoU, with the mask head plus focal and Dice losses of the last layer's. Metrics carry the
  names of the reference implementation: 'loss_ce', 'loss_bbox' and 'loss_giou' of the last layer,
  'loss_ce_0' and so on of the others, 'class_error' in percent and 'cardinality_error'.
  """

  def __init__(self, config):
    super().__init__(config)
    model, data = config.model, config.data
    choose('config.model.backbone', model.backbone, backbone.BACKBONES)
    choose('config.model.backbone_norm', model.backbone_norm, backbone.NORMS)
    choose('config.model.norm', model.norm, _NORMS)
    choose('config.model.positions', model.positions, _POSITIONS)
    choose('config.model.positions_at', model.positions_at, _POSITIONS_AT)
    choose('config.model.masks', model.masks, detector.MASKS)
    choose('config.data.labels', data.labels, categories.LABELS)
    if model.width % 4 or model.width % model.heads:
      raise UserError(f'config.model.width={model.width} must be a multiple of 4 and of '
                      f'config.model.heads={model.heads}')
    if model.masks != 'none':
      levels = len(backbone.BACKBONES[model.backbone]['stages']) - 1
      if model.width < 2 ** (levels + 1):
        raise UserError(f'config.model.width={model.width} is too small for a mask head, which '
                        f'halves it {levels + 1} times')
      if model.queries > 254:
        raise UserError(f'config.model.queries={model.queries}: with masks at most 254')
    if model.decoder_layers < 1:
      raise UserError(f'config.model.decoder_layers={model.decoder_layers}; at least 1 is needed')
    layer = config.eval.decoder_layer
    if not -model.decoder_layers <= layer < model.decoder_layers:
      raise UserError(f'config.eval.decoder_layer={layer}; there are {model.decoder_layers}, '
                      'counted from 0, or from -1 backwards')

  @functools.cached_property
  def model(self) -> detector.DETR:
    model = self.config.model
    return detector.DETR(
        self.num_classes, model.queries, model.width, **backbone.BACKBONES[model.backbone],
        dilation=model.dilation, backbone_norm=model.backbone_norm, freeze_at=model.freeze_at,
        encoder_layers=model.encoder_layers, decoder_layers=model.decoder_layers,
        heads=model.heads, mlp_dim=model.mlp_dim, norm=model.norm, positions=model.positions,
        positions_at=model.positions_at, dropout=model.dropout, masks=model.masks,
        mask_chunk=model.mask_chunk, scan=model.scan, remat=self.config.remat,
        dtype=jnp.dtype(self.config.precision))

  @property
  def frozen(self):
    model = self.config.model
    if model.masks == 'frozen':
      return '^(?!bbox_attention/|mask_head/)'
    return backbone.frozen_pattern(model.backbone_norm, model.freeze_at)

  @property
  def constants(self):
    return f'^backbone/{backbone.CONSTANTS}' if self.config.model.backbone_norm == 'frozen' else ''

  @functools.cached_property
  def num_classes(self) -> int:
    return self.config.model.num_classes or len(self.source(self.train_split).class_names)

  @functools.cached_property
  def classes(self) -> categories.Classes:
    """Names and ids of the classes: the data's when it can be read, else COCO's or numbers."""
    try:
      source = self.source(self.train_split)
    except UserError:
      return categories.of_count(self.num_classes)
    return categories.Classes(source.class_names, source.class_ids, source.is_thing)

  @property
  def class_names(self) -> list[str]:
    return self.classes.names

  @property
  def class_ids(self) -> list[int]:
    return self.classes.ids

  @property
  def is_thing(self) -> list[bool]:
    return self.classes.is_thing

  # Data.

  def specs(self, batch_size, train):
    data = self.config.data
    return [self._spec(batch_size, shape) for shape in (data.buckets if train else
                                                        data.eval_buckets)]

  def batch_spec(self, batch_size):
    return max(self.specs(batch_size, True), key=lambda spec: spec['image'].size)

  def _spec(self, batch_size, shape):
    slots = self.config.model.queries
    spec = {'image': ((*shape, 3), np.uint8), 'image_size': ((2,), np.int32),
            'boxes': ((slots, 4), np.float32), 'labels': ((slots,), np.int32),
            'objects': ((), np.int32), 'mask': ((), np.float32)}
    if self.masks:
      spec['segments'] = (tuple(shape), np.uint8)
    return {name: jax.ShapeDtypeStruct((batch_size, *rows), dtype)
            for name, (rows, dtype) in spec.items()}

  @property
  def masks(self) -> bool:
    return self.config.model.masks != 'none'

  @functools.cache
  def source(self, split: str) -> Any:
    """The images of a split and what is on them, as `detection.sources` gives them."""
    source = sources.open_source(self.config, split, self.workdir)
    most, queries = source.objects.max(initial=0), self.config.model.queries
    if most > queries:
      image = source.image_ids[source.objects.argmax()]
      raise UserError(f'{source!r}: image {image} has {most} objects, more than '
                      f'config.model.queries={queries}; at least one query an object is needed')
    if len(source.class_names) > (self.config.model.num_classes or len(source.class_names)):
      raise UserError(f'{source!r} has {len(source.class_names)} classes, more than '
                      f'config.model.num_classes={self.config.model.num_classes}')
    return source

  @functools.cache
  def dataset(self, split):
    """The images of a split in the sizes they are seen in; those of 'train' are augmented."""
    train = split == self.train_split
    data = self.config.data
    source = self.source(split)
    if train:
      seen = augment.draw_views(source.sizes, data.views, self.config.seed, data)
    else:
      seen = augment.evaluation_views(source.sizes, data.eval_short, data.longest)
    return views.Viewed(source, seen, data.buckets if train else data.eval_buckets)

  def transform(self, example, rng, train):
    data = self.config.data
    return augment.to_targets(
        example, images.decode(example['image']), rng, flip=train and data.flip,
        shape=example['shape'], slots=self.config.model.queries, keep_crowd=data.panoptic)

  def prepare(self):
    sources.scan_sizes(self.config, self.workdir)
    if (self.config.model.backbone_norm == 'frozen' and not self.config.init_from
        and not (self.workdir / 'checkpoints').exists()):
      logging.warning(
          "a frozen batch norm wants a trained backbone, and config.init_from is empty: name "
          "ImageNet weights there, or set config.model.backbone_norm='group'")

  def examples(self):
    return self.config.data.examples or len(self.source(self.train_split))

  # What the step computes.

  def init(self, rng):
    shape = self.batch_spec(1)['image'].shape
    return self.model.init(rng, jnp.zeros(shape, jnp.uint8), jnp.ones((1, 2), jnp.int32))['params']

  def forward(self, params, batch, rng=None) -> dict[str, jax.Array]:
    """What `detector.DETR` returns; dropout is on when there is a key."""
    return self.model.apply({'params': params}, batch['image'], batch['image_size'],
                            train=rng is not None, rngs={'dropout': rng} if rng is not None else {})

  def update(self, state, batch, rng, optimizer):
    # What losses are divided by is counted over the whole batch, also when microbatches share it.
    each = jnp.broadcast_to(_mean_objects(batch), batch['mask'].shape)
    return super().update(state, {**batch, 'mean_objects': each}, rng, optimizer)

  def loss(self, params, batch, rng, train):
    config = self.config.model
    outputs = self.forward(params, batch, rng if train else None)
    if not config.aux_loss:
      outputs = {**outputs, 'logits': outputs['logits'][-1:], 'boxes': outputs['boxes'][-1:]}
    matched = matching.assign(criterion.match_cost(outputs, batch, config), batch['objects'])
    by_layer, metrics = criterion.set_losses(outputs, batch, matched, config.eos_coef)

    rows = batch['mask'].sum()
    objects = batch['mean_objects'][0] if 'mean_objects' in batch else _mean_objects(batch)
    objects = objects * rows
    weights = objects + config.eos_coef * (config.queries * rows - objects)
    divisors = {'loss_ce': (1., weights), 'loss_bbox': (config.bbox_loss, objects),
                'loss_giou': (config.giou_loss, objects)}
    total = 0.
    for i, sums in enumerate(by_layer):
      suffix = '' if i == len(by_layer) - 1 else f'_{i}'
      for name, (value, weight) in sums.items():
        factor, divisor = divisors[name]
        total += factor * value / jnp.maximum(divisor, 1e-9)
        metrics[name + suffix] = (value, weight)
    if self.masks:
      at = jnp.maximum(matched[-1], 0)[..., None, None]
      focal, dice = mask_head.mask_losses(
          jnp.take_along_axis(outputs['masks'], at, axis=1), batch['segments'], batch['objects'],
          batch['mask'], jnp.maximum(objects, 1e-9))
      total += config.mask_loss * focal + config.dice_loss * dice
      metrics |= {'loss_mask': (focal * objects, objects), 'loss_dice': (dice * objects, objects)}
    return total, task.Aux(rows, metrics)

  # Use.

  def detect(self, params, batch) -> dict[str, jax.Array]:
    """What decoder layer `eval.decoder_layer` sees: the best real class of every query, also where
    'no object' is likelier (section 4).

    Returns:
      'boxes' float32 `[batch, queries, 4]`, xyxy relative to the image, 'scores' float32 and
      'labels' int32 `[batch, queries]`.
    """
    outputs = self.forward(params, batch)
    layer = self.config.eval.decoder_layer
    scores = jax.nn.softmax(outputs['logits'][layer])[..., :-1]
    return {'boxes': boxes.to_xyxy(outputs['boxes'][layer]), 'scores': scores.max(-1),
            'labels': scores.argmax(-1).astype(jnp.int32)}

  def segment(self, params, batch) -> dict[str, jax.Array]:
    """Like `detect`, with the mask of every query instead of its box.

    Returns:
      'scores' and 'labels' as there, 'masks' float32 `[batch, queries, height/4, width/4]`, logits
      over the padded picture, and 'image_size' int32 `[batch, 2]`.
    """
    outputs = self.forward(params, batch)
    scores = jax.nn.softmax(outputs['logits'][-1])[..., :-1]
    return {'scores': scores.max(-1), 'labels': scores.argmax(-1).astype(jnp.int32),
            'masks': outputs['masks'], 'image_size': batch['image_size']}

  def evaluators(self):
    average_precision.pycocotools()  # Whoever lacks it shall know before training, not after.
    splits = self.config.data.splits
    found: dict[str, Any] = {}
    if splits.validation:
      found['validation'] = Mean('validation')
      found['validation_boxes'] = average_precision.Detection('validation')
      found['examples'] = pictures.Examples('validation', 'end')
      found['queries'] = query_pictures.Slots('validation', 'end')
    if splits.test:
      found['test'] = Mean('test', 'end')
      found['test_boxes'] = average_precision.Detection('test', 'end')
    if self.masks:
      threshold = self.config.eval.mask_threshold
      found |= {f'{split}_masks': panoptic.Panoptic(split, 'end', threshold)
                for split in ('validation', 'test') if splits[split]}
    return found

  def predict(self, params, inputs, out):
    return predict.predict(self, params, inputs, out)

  def open_weights(self, path):
    return checkpoints.open_weights(path, self.config)

  def adapt(self, weights, params_shape, transfer):
    return checkpoints.adapt(weights, params_shape, transfer)

  def export(self, params, path):
    return checkpoints.write(params, path, self.config, self.class_names)


def _mean_objects(batch) -> jax.Array:
  """Targets an image, float32 scalar."""
  return (batch['objects'] * batch['mask']).sum() / jnp.maximum(batch['mask'].sum(), 1e-9)
