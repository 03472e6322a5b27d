"""Image classification with ViT, hybrids and BiT: the task behind configs/vit.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import metrics as metrics_lib
from core import task
from core.config import UserError, choose
from core.data import images, sources
from core.evaluate import Mean
from core.nn import losses
from vit_family import analysis, checkpoints, pictures, probes, randaugment, real_labels
from vit_family import torch_layouts, vtab, zoo
from vit_family import transfer as transfer_lib

_CROPS = ('inception', 'random', 'affine', 'none')
_EVAL_CROPS = ('resize_small', 'resize')
_LOSSES = ('softmax', 'sigmoid')


class Task(task.Task):
  """Single-label classification; loss is softmax or per-class sigmoid cross-entropy."""

  def __init__(self, config):
    super().__init__(config)
    data = config.data
    zoo.check(config.model, data.image_size)
    choose('config.model.loss', config.model.loss, _LOSSES)
    choose('config.model.export', config.model.export, ('npz', 'huggingface'))
    choose('config.data.crop', data.crop, _CROPS)
    choose('config.data.eval_crop', data.eval_crop, _EVAL_CROPS)
    if config.model.mixup < 0:
      raise UserError(f'config.model.mixup={config.model.mixup}: the alpha of a Beta distribution '
                      'is positive; 0 switches mixup off')
    if data.vtab:
      choose('config.data.vtab', data.vtab, vtab.TASKS)
    if data.crop == 'random' and data.resize < data.image_size:
      raise UserError(f"config.data.crop='random' cuts {data.image_size} pixels out of "
                      f'config.data.resize={data.resize}; it must be at least as large')

  @functools.cached_property
  def num_classes(self) -> int:
    return self.config.model.num_classes or len(self.class_names)

  @functools.cached_property
  def class_names(self) -> list[str]:
    """Names of the classes when the data can be read; else their numbers."""
    if self.config.data.vtab:
      return [str(i) for i in range(self.num_classes)]  # VTAB derives labels of its own.
    return sources.class_names(lambda: self.dataset('train'), self.config.model.num_classes)

  @functools.cached_property
  def model(self):
    return zoo.build(self.config.model, self.num_classes, jnp.dtype(self.config.precision),
                     self.config.remat)

  def batch_spec(self, batch_size):
    data = self.config.data
    shape = (batch_size, data.image_size, data.image_size, data.channels)
    spec = {'image': jax.ShapeDtypeStruct(shape, np.uint8),
            'label': jax.ShapeDtypeStruct((batch_size,), np.int32),
            'mask': jax.ShapeDtypeStruct((batch_size,), np.float32)}
    if data.real_labels:
      spec['real_index'] = jax.ShapeDtypeStruct((batch_size,), np.int32)
    return spec

  def init(self, rng):
    image = jnp.zeros(self.batch_spec(1)['image'].shape, jnp.float32)
    return self.model.init(rng, image)['params']

  @functools.cache
  def dataset(self, split):
    data = self.config.data
    features = ('image', vtab.TASKS[data.vtab].key if data.vtab else 'label')
    if data.real_labels:
      features += ('file_name',)
    source = sources.open_source(data.name, data.splits[split], data_dir=data.data_dir or None,
                                 features=features)
    return sources.OnlyClasses(source, tuple(data.classes)) if data.classes else source

  def transform(self, example, rng, train):
    data = self.config.data
    image = images.decode(example['image'], data.channels)
    if data.vtab and (scale := vtab.TASKS[data.vtab].scale) != 1:
      image = image * np.uint8(scale)
    if train:
      image = self._train_crop(image, rng)
      if data.flip:
        image = images.flip(image, rng)
      if data.randaugment_layers:
        image = randaugment.rand_augment(
            image, data.randaugment_layers, data.randaugment_magnitude, rng)
    else:
      image = self._eval_crop(image)
    label = vtab.label(data.vtab, example) if data.vtab else example['label']
    made = {'image': image, 'label': np.asarray(label, np.int32)}
    if data.real_labels:
      made['real_index'] = np.int32(real_labels.real_index(example['file_name']))
    return made

  def _train_crop(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    data = self.config.data
    if data.crop == 'inception':
      return images.inception_crop(image, data.image_size, rng)
    if data.crop == 'random':
      return images.random_crop(images.resize(image, data.resize), data.image_size, rng)
    image = images.resize(image, data.image_size)
    if data.crop == 'affine':
      image = images.random_affine(image, rng, degrees=12., translate=.08, scale=(.85, 1.15))
    return image

  def _eval_crop(self, image: np.ndarray) -> np.ndarray:
    size = self.config.data.image_size
    if self.config.data.eval_crop == 'resize':
      return images.resize(image, size)
    return images.central_crop(images.resize_small(image, size * 8 // 7), size)

  def inputs(self, batch) -> jax.Array:
    """float32 images in [-1, 1] from the batch's uint8; runs on the device."""
    return batch['image'].astype(jnp.float32) / 127.5 - 1

  def logits(self, params, batch, train: bool = False, rngs=None):
    """float32 `[batch, classes]`."""
    return self.model.apply({'params': params}, self.inputs(batch), train=train, rngs=rngs)[0]

  def features(self, params, batch) -> jax.Array:
    """What the head reads, float32 `[batch, width]`: for few-shot and nearest neighbours."""
    _, found = self.model.apply({'params': params}, self.inputs(batch))
    return found['pre_logits'].astype(jnp.float32)

  def loss(self, params, batch, rng, train):
    model, mask = self.config.model, batch['mask']
    images_, targets = self.inputs(batch), batch['label']
    mixing = train and model.mixup
    if mixing or model.loss == 'sigmoid':
      targets = jax.nn.one_hot(targets, self.num_classes)
    if mixing:
      images_, targets = mixup(images_, targets, jax.random.fold_in(rng, 1), model.mixup)
    logits, _ = self.model.apply({'params': params}, images_, train=train,
                                 rngs={'dropout': rng} if train else None)
    if model.loss == 'softmax':
      each = losses.softmax_cross_entropy(logits, targets, label_smoothing=model.label_smoothing)
    else:
      each = losses.sigmoid_cross_entropy(logits, targets)
    weight = mask.sum()
    correct = (logits.argmax(-1) == batch['label']) * mask
    metrics = {'accuracy': (correct.sum(), weight)}
    if self.num_classes > 5:
      metrics['top5_accuracy'] = ((in_top(logits, batch['label'], 5) * mask).sum(), weight)
    return (each * mask).sum() / jnp.maximum(weight, 1), task.Aux(weight, metrics)

  def evaluators(self):
    data, splits = self.config.data, self.config.data.splits
    found: dict[str, Any] = {}
    if splits.validation:
      found['validation'] = Mean('validation')
    if splits.test:
      found['test'] = Mean('test', every='end')
      if data.real_labels:
        found['real'] = real_labels.ReaL('test', data.real_labels)
      if splits.support:
        found['fewshot'] = probes.FewShot('support', 'test', every='end')
        found['knn'] = probes.KNN('support', 'test', every='end')
      found['pictures'] = pictures.Pictures('test', every='end')
      if zoo.is_vit(self.config.model):
        found['learned'] = pictures.Learned('test', every='end')
    return found

  def open_weights(self, path):
    return checkpoints.open_weights(path)

  def adapt(self, weights, params_shape, transfer):
    return transfer_lib.adapt(weights, params_shape, transfer)

  def export(self, params, path):
    model = self.config.model
    if model.export == 'npz':
      return checkpoints.write_npz(params, path)
    return torch_layouts.write_huggingface(
        params, path, image_size=self.config.data.image_size, class_names=self.class_names,
        activation=model.activation)

  def predict(self, params, inputs, out):
    """Top-5 classes of each image at `inputs`, a file or a folder; one picture an image.

    For models with attention also its mean distance in pixels, layer by layer.
    """
    paths = images.files(inputs)
    token = self.config.model.classifier == 'token'
    is_vit = zoo.is_vit(self.config.model)
    if is_vit:
      look = jax.jit(functools.partial(analysis.attention, self))
    else:
      look = jax.jit(lambda params, batch: (self.logits(params, batch), None))
    records = []
    for path in paths:
      image = self._eval_crop(images.read(path, self.config.data.channels))
      logits, weights = jax.device_get(look(params, {'image': image[None]}))
      probabilities = _probabilities(logits[0], self.config.model.loss)
      top = metrics_lib.best_classes(probabilities, self.class_names)
      picture = out / f'{path.stem}.png'
      record = {'input': str(path), 'top5': top, 'picture': picture.name}
      if is_vit:
        distances = analysis.attention_distance(weights, image.shape[:2], token)
        record['attention_distance'] = np.round(distances.mean((1, 2)), 3).tolist()
      pictures.prediction(image, analysis.rollout(weights[:, 0]) if is_vit else None, top, picture,
                          token=token)
      records.append(record)
    return records


def mixup(images_: jax.Array, targets: jax.Array, rng: jax.Array,
          alpha: float) -> tuple[jax.Array, jax.Array]:
  """Blends every image, and its target, with its neighbour's (Zhang et al., arXiv 1710.09412).

  One share a ~ Beta(alpha, alpha) for the whole (micro)batch, taken as max(a, 1 - a) so that an
  image stays the larger part of its blend; the neighbour is the row before ("How to train your
  ViT", public code).

  Args:
    images_: `[batch, height, width, channels]` float.
    targets: `[batch, classes]` float.
    rng: key.
    alpha: of the Beta distribution, > 0.
  """
  share = jax.random.beta(rng, alpha, alpha)
  share = jnp.maximum(share, 1 - share)
  blend = lambda x: share * x + (1 - share) * jnp.roll(x, 1, axis=0)
  return blend(images_), blend(targets)


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether fewer than k other classes score at least as high as the label: bool `[batch]`."""
  score = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  return (logits >= score).sum(-1) <= k


def _probabilities(logits: np.ndarray, loss: str) -> np.ndarray:
  logits = logits.astype(np.float64)
  if loss == 'sigmoid':
    return 1 / (1 + np.exp(-logits))
  scores = np.exp(logits - logits.max())
  return scores / scores.sum()
