"""Self-supervised masked patch prediction (ViT section 4.6, appendix B.1.2).

As BERT does with words: half of the patch embeddings are corrupted, and the colours of those
patches are predicted from their output tokens. Fine-tuning takes over every parameter of the same
name; `mask_token` and `patch_head` stay behind.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

from core import keys, task
from core.config import UserError, choose
from core.data import images as images_lib
from core.evaluate import Mean
from core.nn import losses
from core.pictures import show
from vit_family import classification, patches, vit

TARGETS = ('mean_color', 'downsampled', 'l2')
_CELLS = 4  # side of the downsampled patch
# Where a patch is hidden, pictures have a colour that grey and most coloured images do not.
_HIDDEN = np.array([.62, .72, .95])


class MaskedPatchModel(nn.Module):
  """A Vision Transformer without a classifier that predicts corrupted patches.

  Parameters are those of `vit.VisionTransformer` but for its head, under the same names, and
  `mask_token` `[1, 1, width]` and `patch_head`.

  Attributes:
    outputs: numbers predicted for a patch.
    token: whether there is a class token, so that fine-tuning can read it.
    others: see `vit.VisionTransformer`.
  """
  outputs: int
  patch_size: int
  width: int
  depth: int
  mlp_dim: int
  heads: int
  token: bool = True
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth: float = 0.0
  activation: str = 'gelu_tanh'
  dtype: Any = jnp.float32
  scan: bool = False
  remat: str = 'none'

  @nn.compact
  def __call__(
      self, images: jax.Array, corruption: patches.Corruption, *, train: bool = False) -> jax.Array:
    """`[batch, height, width, channels]` in [-1, 1] -> float32 `[batch, count, outputs]`.

    The predictions are for `corruption.chosen`, in its order; `train` switches dropout on.
    """
    x = vit.PatchEmbedding(self.patch_size, self.width, dtype=self.dtype, name='embedding')(images)
    mask_token = self.param(
        'mask_token', nn.with_logical_partitioning(
            nn.initializers.normal(.02), (None, None, 'embed')),
        (1, 1, self.width), jnp.float32)
    other = jnp.take_along_axis(x, corruption.source[..., None], axis=1)
    x = jnp.where(corruption.replaced[..., None], other, x)
    x = jnp.where(corruption.masked[..., None], mask_token.astype(self.dtype), x)
    if self.token:
      x = vit.prepend_class_token(self, x)
    x = vit.Encoder(
        depth=self.depth, mlp_dim=self.mlp_dim, heads=self.heads, dropout_rate=self.dropout_rate,
        attention_dropout_rate=self.attention_dropout_rate,
        stochastic_depth=self.stochastic_depth, activation=self.activation, dtype=self.dtype,
        scan=self.scan, remat=self.remat, name='Transformer')(x, train=train)
    x = jnp.take_along_axis(x, corruption.chosen[..., None] + int(self.token), axis=1)
    return nn.Dense(
        self.outputs, name='patch_head', dtype=jnp.float32,
        kernel_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'classes')),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('classes',)))(x)


class Task(classification.Task):
  """Predicts the colours of corrupted patches; data and encoder are those of classification.

  `config.model.mask_rate` (0.5) is the share of corrupted patches, `config.model.target` what is
  predicted of each (appendix B.1.2):
    'mean_color': its mean colour as one of 512 classes (8 in grey);
    'downsampled': the mean colours of its 4x4 parts, each as such a class, in parallel;
    'l2': all its pixels in [-1, 1], by squared error (the mean over pixels and channels).
  The metric 'accuracy' is the share of right classes; for 'l2', of the mean of what is predicted.
  """

  def __init__(self, config):
    super().__init__(config)
    model = config.model
    choose('config.model.target', model.target, TARGETS)
    choose('config.model.variant, with masked patches,', model.variant, vit.VARIANTS)
    if model.backbone:
      raise UserError(f'config.model.backbone={model.backbone!r}: masked patches are patches of '
                      'pixels, which a hybrid does not embed; set it to the empty string')
    if not 0 < model.mask_rate <= 1:
      raise UserError(f'config.model.mask_rate={model.mask_rate}; it must be above 0, at most 1')
    if model.target == 'downsampled' and model.patch_size % _CELLS:
      raise UserError(f"config.model.target='downsampled' splits a patch into {_CELLS}x{_CELLS}: "
                      f'config.model.patch_size={model.patch_size} must be a multiple of {_CELLS}')

  @functools.cached_property
  def model(self) -> MaskedPatchModel:
    model = self.config.model
    size = vit.VARIANTS[model.variant]
    return MaskedPatchModel(
        self._outputs, model.patch_size, size.width, size.depth, size.mlp_dim, size.heads,
        token=model.classifier == 'token', dropout_rate=model.dropout_rate,
        attention_dropout_rate=model.attention_dropout_rate,
        stochastic_depth=model.stochastic_depth, activation=model.activation,
        dtype=jnp.dtype(self.config.precision), scan=model.scan, remat=self.config.remat)

  @property
  def _outputs(self) -> int:
    channels = self.config.data.channels
    if self.config.model.target == 'l2':
      return self.config.model.patch_size ** 2 * channels
    cells = _CELLS ** 2 if self.config.model.target == 'downsampled' else 1
    return cells * patches.LEVELS ** channels

  @property
  def _patches(self) -> int:
    return (self.config.data.image_size // self.config.model.patch_size) ** 2

  def init(self, rng):
    image = jnp.zeros(self.batch_spec(1)['image'].shape, jnp.float32)
    corruption = patches.draw_corruption(rng[None], self._patches, self.config.model.mask_rate)
    return self.model.init(rng, image, corruption)['params']

  def _predict(self, params, batch, rng, train: bool):
    """(predictions, corruption, pixels of the chosen patches `[batch, count, P, P, channels]`)."""
    images = self.inputs(batch)
    pixels = jnp.round((images + 1) * 127.5).astype(jnp.int32)
    mask_rng, dropout_rng = jax.random.split(rng)
    corruption = patches.draw_corruption(
        keys.example_keys(mask_rng, pixels), self._patches, self.config.model.mask_rate)
    outputs = self.model.apply({'params': params}, images, corruption, train=train,
                               rngs={'dropout': dropout_rng})
    chosen = corruption.chosen[:, :, None, None, None]
    truth = jnp.take_along_axis(
        patches.to_patches(pixels, self.config.model.patch_size), chosen, axis=1)
    return outputs, corruption, truth

  def _cells(self, pixels):
    """Pixels of patches `[..., P, P, channels]` as `[..., cells, pixels, channels]`: what is
    averaged to one colour."""
    *lead, size, _, channels = pixels.shape
    if self.config.model.target != 'downsampled':
      return pixels.reshape(*lead, 1, size * size, channels)
    cells = patches.to_patches(pixels.reshape(-1, size, size, channels), size // _CELLS)
    return cells.reshape(*lead, _CELLS ** 2, -1, channels)

  def loss(self, params, batch, rng, train):
    outputs, _, pixels = self._predict(params, batch, rng, train)
    truth = patches.color_classes(self._cells(pixels))
    if self.config.model.target == 'l2':
      error = outputs.reshape(pixels.shape) - (pixels / 127.5 - 1)
      each = (error ** 2).mean((-3, -2, -1))
      answer = patches.color_classes(self._cells(self._pixels(outputs, pixels.shape)))
    else:
      logits = outputs.reshape(*truth.shape, -1)
      each = losses.softmax_cross_entropy(logits, truth).mean(-1)
      answer = logits.argmax(-1)
    mask = batch['mask'][:, None]
    weight = mask.sum() * each.shape[1]
    right = ((answer == truth).mean(-1) * mask).sum()
    return ((each * mask).sum() / jnp.maximum(weight, 1),
            task.Aux(weight, {'accuracy': (right, weight)}))

  def _pixels(self, outputs, shape):
    """Predictions as integer pixels `shape` `[batch, count, P, P, channels]` in [0, 255]."""
    if self.config.model.target == 'l2':
      values = (outputs.reshape(shape) + 1) * 127.5
    else:
      batch, count, size, _, channels = shape
      side = _CELLS if self.config.model.target == 'downsampled' else 1
      classes = outputs.reshape(batch, count, side, side, -1).argmax(-1)
      values = patches.class_colors(classes, channels) * 255
      values = values.repeat(size // side, 2).repeat(size // side, 3)
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.int32)

  def fill(self, params, batch) -> dict[str, jax.Array]:
    """What a person looks at, with the masks of evaluation.

    Returns:
      uint8 `[batch, height, width, channels]`: 'image'; 'seen', with replaced patches in place;
      'filled', corrupted patches as predicted; 'best', as an all-knowing model would predict them.
      bool `[batch, height, width, 1]`: 'masked', which pixels of 'seen' the model did not see.
      float32 `[batch]`: 'accuracy'.
    """
    image = batch['image']
    outputs, corruption, truth = self._predict(params, batch, jax.random.key(0), False)
    cut = patches.to_patches(image, self.config.model.patch_size)
    classes = patches.color_classes(self._cells(truth))
    answer = self._pixels(outputs, truth.shape)
    best = truth
    if self.config.model.target != 'l2':
      one_hot = jax.nn.one_hot(classes, patches.LEVELS ** truth.shape[-1])
      best = self._pixels(one_hot, truth.shape)
    right = patches.color_classes(self._cells(answer)) == classes
    expand = lambda x: x[:, :, None, None, None]
    whole = lambda x: patches.from_patches(x, *image.shape[1:3])
    put = jax.vmap(lambda into, at, values: into.at[at].set(values.astype(into.dtype)))
    other = jnp.take_along_axis(cut, expand(corruption.source), axis=1)
    masked = jnp.broadcast_to(expand(corruption.masked), (*cut.shape[:-1], 1))
    return {'image': image, 'masked': whole(masked),
            'seen': whole(jnp.where(expand(corruption.replaced), other, cut)),
            'filled': whole(put(cut, corruption.chosen, answer)),
            'best': whole(put(cut, corruption.chosen, best)),
            'accuracy': right.astype(jnp.float32).mean((1, 2))}

  def evaluators(self):
    found: dict[str, Any] = {}
    if self.config.data.splits.validation:
      found['validation'] = Mean('validation')
    if self.config.data.splits.test:
      found['test'] = Mean('test', every='end')
      found['pictures'] = Filled('test')
    return found

  def predict(self, params, inputs, out):
    """Fills in half of the patches of each image at `inputs`; one picture an image."""
    fill = jax.jit(self.fill)
    records = []
    for path in images_lib.files(inputs):
      image = self._eval_crop(images_lib.read(path, self.config.data.channels))
      rows = jax.device_get(fill(params, {'image': image[None]}))
      picture = out / f'{path.stem}.png'
      draw(rows, picture)
      records.append({'input': str(path), 'accuracy': round(float(rows['accuracy'][0]), 4),
                      'picture': picture.name})
    return records


class Filled:
  """Evaluator that leaves `masked_patches.png`: images, what is hidden, what the model answers."""

  def __init__(self, split: str, every: str = 'end', shown: int = 8):
    self.split, self.every, self.shown = split, every, shown
    self._fn = None

  def __call__(self, run, params, step) -> dict[str, float]:
    if self._fn is None:
      self._fn = lambda params, batch: run.plan.task.fill(
          params, {name: x[:self.shown] for name, x in batch.items()})
    batch = next(run.batches(self.split))
    rows, mask = jax.device_get((run.jit(self._fn)(params, batch),
                                 run.plan.fetch(batch['mask'])[:self.shown]))
    if run.writes and mask.any():
      draw({name: values[mask > 0] for name, values in rows.items()},
           run.pictures / 'masked_patches.png')
    return {}


def draw(rows: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Writes a PNG with a column an image.

  Args:
    rows: from `Task.fill`, on the host.
    path: the PNG to write.
  """
  seen = np.broadcast_to(rows['seen'] / 255, (*rows['seen'].shape[:3], 3))
  seen = np.where(rows['masked'], _HIDDEN, seen)
  named = {'image': rows['image'], 'what the model sees\n(blue: hidden)': seen,
           'its answer': rows['filled'], 'the best possible\nanswer': rows['best']}
  count = len(rows['image'])
  figure = Figure(figsize=(1.3 * count + 1.5, 6), layout='constrained')
  cells = figure.subplots(len(named), count, squeeze=False)
  for line, (name, shown) in zip(cells, named.items()):
    for axes, one in zip(line, shown):
      show(axes, one)
    line[0].text(-.1, .5, name, transform=line[0].transAxes, ha='right', va='center', fontsize=9)
  for axes, accuracy in zip(cells[2], rows['accuracy']):
    axes.set_title(f'{accuracy:.0%} right', fontsize=8)
  figure.savefig(path, dpi=120)
