"""Image classification with a Vision Transformer: the task behind configs/vit.py."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import task
from core.config import UserError, choose
from core.data import images, sources
from core.evaluate import Mean
from core.nn import losses
from vit_family import checkpoints, pictures, vit

_CROPS = ('inception', 'affine', 'none')
_EVAL_CROPS = ('resize_small', 'resize')
_LOSSES = ('softmax', 'sigmoid')


class Task(task.Task):
  """Single-label classification; loss is softmax or per-class sigmoid cross-entropy."""

  def __init__(self, config):
    super().__init__(config)
    choose('config.model.variant', config.model.variant, vit.VARIANTS)
    choose('config.model.classifier', config.model.classifier, ('token', 'gap'))
    choose('config.model.loss', config.model.loss, _LOSSES)
    choose('config.data.crop', config.data.crop, _CROPS)
    choose('config.data.eval_crop', config.data.eval_crop, _EVAL_CROPS)
    if config.data.image_size % config.model.patch_size:
      raise UserError(f'config.data.image_size={config.data.image_size} is not a multiple of '
                      f'config.model.patch_size={config.model.patch_size}')

  @functools.cached_property
  def num_classes(self) -> int:
    return self.config.model.num_classes or len(self.class_names)

  @functools.cached_property
  def class_names(self) -> list[str]:
    """Names of the classes when the data can be read; else their numbers."""
    try:
      return self.dataset('train').class_names
    except UserError:
      if not self.config.model.num_classes:
        raise
      return [str(i) for i in range(self.config.model.num_classes)]

  @functools.cached_property
  def model(self) -> vit.VisionTransformer:
    model, size = self.config.model, vit.VARIANTS[self.config.model.variant]
    return vit.VisionTransformer(
        num_classes=self.num_classes, patch_size=model.patch_size, width=size.width,
        depth=size.depth, mlp_dim=size.mlp_dim, heads=size.heads, classifier=model.classifier,
        representation_size=model.representation_size or None,
        head_bias_init=model.head_bias_init, dropout_rate=model.dropout_rate,
        attention_dropout_rate=model.attention_dropout_rate,
        dtype=jnp.dtype(self.config.precision), scan=model.scan, remat=self.config.remat)

  def batch_spec(self, batch_size):
    data = self.config.data
    shape = (batch_size, data.image_size, data.image_size, data.channels)
    return {'image': jax.ShapeDtypeStruct(shape, np.uint8),
            'label': jax.ShapeDtypeStruct((batch_size,), np.int32),
            'mask': jax.ShapeDtypeStruct((batch_size,), np.float32)}

  def init(self, rng):
    image = jnp.zeros(self.batch_spec(1)['image'].shape, jnp.float32)
    return self.model.init(rng, image)['params']

  @functools.cache
  def dataset(self, split):
    data = self.config.data
    return sources.open_source(data.name, data.splits[split], data_dir=data.data_dir or None,
                               features=('image', 'label'))

  def transform(self, example, rng, train):
    data = self.config.data
    image = images.decode(example['image'], data.channels)
    if train:
      if data.crop == 'inception':
        image = images.inception_crop(image, data.image_size, rng)
      else:
        image = images.resize(image, data.image_size)
        if data.crop == 'affine':
          image = images.random_affine(image, rng, degrees=12., translate=.08, scale=(.85, 1.15))
      if data.flip:
        image = images.flip(image, rng)
    else:
      image = self._eval_crop(image)
    return {'image': image, 'label': np.asarray(example['label'], np.int32)}

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

  def loss(self, params, batch, rng, train):
    logits = self.logits(params, batch, train, {'dropout': rng})
    mask = batch['mask']
    if self.config.model.loss == 'softmax':
      each = losses.softmax_cross_entropy(
          logits, batch['label'], label_smoothing=self.config.model.label_smoothing)
    else:
      each = losses.sigmoid_cross_entropy(logits, jax.nn.one_hot(batch['label'], self.num_classes))
    weight = mask.sum()
    correct = (logits.argmax(-1) == batch['label']) * mask
    metrics = {'accuracy': (correct.sum(), weight)}
    return (each * mask).sum() / jnp.maximum(weight, 1), task.Aux(weight, metrics)

  def evaluators(self):
    found: dict[str, Any] = {}
    if self.config.data.splits.validation:
      found['validation'] = Mean('validation')
    if self.config.data.splits.test:
      found['test'] = Mean('test', every='end')
      found['pictures'] = pictures.Pictures('test', every='end')
    return found

  def load_pretrained(self, path, params):
    return checkpoints.read_npz(path, params)

  def export(self, params, path):
    return checkpoints.write_npz(params, path)

  def predict(self, params, inputs, out):
    """Top-5 classes of each image at `inputs`, a file or a folder; one picture an image."""
    paths = _image_files(inputs)
    attend = jax.jit(functools.partial(pictures.attention, self))
    records = []
    for path in paths:
      try:
        original = images.decode(path.read_bytes(), self.config.data.channels)
      except images.ImageError as e:
        raise UserError(f'{path}: {e}') from e
      image = self._eval_crop(original)
      logits, weights = jax.device_get(attend(params, {'image': image[None]}))
      probabilities = _probabilities(logits[0], self.config.model.loss)
      order = np.argsort(-probabilities, kind='stable')[:5]
      top = [{'class': self.class_names[i], 'index': int(i),
              'probability': round(float(probabilities[i]), 6)} for i in order]
      picture = out / f'{path.stem}.png'
      pictures.prediction(image, pictures.rollout(weights[:, 0]), top, picture,
                          token=self.config.model.classifier == 'token')
      records.append({'input': str(path), 'top5': top, 'picture': picture.name})
    return records


def _probabilities(logits: np.ndarray, loss: str) -> np.ndarray:
  logits = logits.astype(np.float64)
  if loss == 'sigmoid':
    return 1 / (1 + np.exp(-logits))
  scores = np.exp(logits - logits.max())
  return scores / scores.sum()


def _image_files(inputs: pathlib.Path) -> list[pathlib.Path]:
  if not inputs.exists():
    raise UserError(f'--input={inputs}: no such file or folder')
  if inputs.is_file():
    return [inputs]
  found = sorted(p for p in inputs.iterdir() if p.suffix.lower() in images.EXTENSIONS)
  if not found:
    raise UserError(f'--input={inputs}: no images in this folder; known endings: '
                    f'{", ".join(sorted(images.EXTENSIONS))}')
  return found
