"""Image GPT: pretraining on pixels, and fine-tuning; the task behind configs/image_gpt.py."""

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from core import keys, metrics as metrics_lib, task
from core.config import UserError, choose
from core.data import images, sources
from core.evaluate import Mean
from core.nn import decode, losses
from generative import checkpoints, gpt, palette, pictures, probe, sampling, variants

_OBJECTIVES = ('ar', 'bert')
_ORDERS = ('raster', 'snake')
_CROPS = ('imagenet', 'cifar', 'affine', 'none')
_EVAL_CROPS = ('imagenet', 'none')
# k-means sees at most so many training images and pixels; the paper does not say how many.
_FIT_IMAGES, _FIT_PIXELS = 4096, 2 ** 19


class Task(task.Task):
  """Next-pixel or masked-pixel prediction, with or without a class head.

  The loss is `gen_weight` times L_GEN plus `clf_weight` times L_CLF (section 2.3), in nats. L_GEN
  of an image is the mean over its pixels, for BERT over its hidden pixels. Metrics:
  'generative_loss' (L_GEN), 'bits_per_dim' (the same in bits, a pixel's palette index being one
  dimension) and, with a class head, 'accuracy'.
  """

  def __init__(self, config):
    super().__init__(config)
    model, data = config.model, config.data
    size = choose('config.model.variant', model.variant, variants.GPTS)
    choose('config.model.objective', model.objective, _OBJECTIVES)
    choose('config.model.initializer', model.initializer, gpt.INITS)
    choose('config.data.order', data.order, _ORDERS)
    choose('config.data.crop', data.crop, _CROPS)
    choose('config.data.eval_crop', data.eval_crop, _EVAL_CROPS)
    if data.channels not in (1, 3):
      raise UserError(f'config.data.channels={data.channels}; images have 1 or 3')
    if model.colors < 2:
      raise UserError(f'config.model.colors={model.colors}; a palette has at least 2')
    if not 0 < model.mask_rate < 1:
      raise UserError(f'config.model.mask_rate={model.mask_rate}; it must be between 0 and 1')
    if min(model.gen_weight, model.clf_weight) < 0 or not model.gen_weight + model.clf_weight:
      raise UserError(f'config.model.gen_weight={model.gen_weight} and clf_weight='
                      f'{model.clf_weight}: neither is negative, and not both are 0')
    if bad := [layer for layer in model.head_layers if not 0 <= layer <= size.depth]:
      raise UserError(f'config.model.head_layers names layer {bad[0]}; {model.variant} has 0 to '
                      f'{size.depth}, the last being the final norm')
    sampling.check(model.sample, data.image_size)

  @functools.cached_property
  def model(self) -> gpt.ImageGPT:
    model = self.config.model
    size = variants.GPTS[model.variant]
    return gpt.ImageGPT(
        model.colors, self.config.data.image_size ** 2, size.width, size.depth, size.heads,
        bert=model.objective == 'bert', num_classes=self.num_classes if model.clf_weight else 0,
        head_layers=tuple(model.head_layers), frozen=model.frozen, initializer=model.initializer,
        dtype=jnp.dtype(self.config.precision), scan=model.scan, remat=self.config.remat)

  @functools.cached_property
  def num_classes(self) -> int:
    return self.config.model.num_classes or len(self.class_names)

  @functools.cached_property
  def class_names(self) -> list[str]:
    """Names of the classes when the data can be read; else their numbers."""
    return sources.class_names(lambda: self.dataset('train'), self.config.model.num_classes)

  # Palette and order.

  @functools.cached_property
  def palette(self) -> palette.Palette:
    model, data = self.config.model, self.config.data
    if self.workdir is not None and (self.workdir / 'palette.npy').exists():
      return palette.load(self.workdir / 'palette.npy', model.colors, data.channels)
    if data.palette:
      return palette.load(pathlib.Path(data.palette), model.colors, data.channels)
    if data.channels == 1:
      return palette.grey_levels(model.colors)
    raise UserError('there is no palette yet: give the --workdir of a run, or config.data.palette, '
                    'or make one with --mode=prepare')

  def prepare(self):
    """Leaves `palette.npy`: the named one, that of `init_from`, or one fitted to the data."""
    config, path = self.config, self.workdir / 'palette.npy'
    check = lambda file: palette.load(file, config.model.colors, config.data.channels)
    named = config.data.palette and check(pathlib.Path(config.data.palette))
    if path.exists():
      if named and not np.array_equal(named.centers, check(path).centers):
        raise UserError(f'{path} is another palette than config.data.palette='
                        f'{config.data.palette!r}; use another --workdir')
      check(path)
      return
    if named:
      named.save(path)
      return
    if config.init_from:
      source = checkpoints.find_palette(config.init_from)
      if source is None and config.data.channels > 1:
        raise UserError(f'config.init_from={config.init_from!r} comes without its palette; name '
                        'the one it was trained with in config.data.palette (OpenAI: '
                        'kmeans_centers.npy, Hugging Face: preprocessor_config.json)')
      if source is not None:
        check(source).save(path)
        return
    if config.data.channels == 1:
      palette.grey_levels(config.model.colors).save(path)
      return
    logging.info('fitting a palette of %d colours', config.model.colors)
    palette.fit(self._some_pixels(), config.model.colors, config.seed).save(path)

  def _some_pixels(self) -> np.ndarray:
    """Pixels of evenly spaced training images, as the model sees images: uint8 `[n, channels]`."""
    source = self.dataset(self.train_split)
    rng = np.random.default_rng(self.config.seed)
    chosen = np.unique(np.linspace(0, len(source) - 1, _FIT_IMAGES).astype(int))
    each = max(_FIT_PIXELS // len(chosen), 1)
    pixels = []
    for index in chosen:
      image = self.eval_image(self._decode(source[int(index)]))
      flat = image.reshape(-1, image.shape[-1])
      pixels.append(flat if len(flat) <= each else rng.choice(flat, each, replace=False))
    return np.concatenate(pixels)

  @functools.cached_property
  def order(self) -> np.ndarray:
    """int `[pixels]`: which pixel, counted row by row, stands where in the sequence."""
    grid = np.arange(self.config.data.image_size ** 2).reshape(self.config.data.image_size, -1)
    if self.config.data.order == 'snake':
      grid[1::2] = grid[1::2, ::-1].copy()
    return grid.reshape(-1)

  def tokens(self, image: np.ndarray) -> np.ndarray:
    """uint8 `[size, size, channels]` -> int32 `[pixels]` in the order of the sequence."""
    return self.palette.encode(image)[self.order]

  def image(self, tokens: np.ndarray) -> np.ndarray:
    """The inverse, but for the palette's loss: `[..., pixels]` -> `[..., size, size, channels]`."""
    colors = self.palette.decode(tokens)
    size = self.config.data.image_size
    return colors[..., np.argsort(self.order), :].reshape(*tokens.shape[:-1], size, size, -1)

  # Data.

  def batch_spec(self, batch_size):
    shape = (batch_size, self.config.data.image_size ** 2)
    return {'tokens': jax.ShapeDtypeStruct(shape, np.int32),
            'label': jax.ShapeDtypeStruct((batch_size,), np.int32),
            'mask': jax.ShapeDtypeStruct((batch_size,), np.float32)}

  @functools.cache
  def dataset(self, split):
    data = self.config.data
    return sources.open_source(data.name, data.splits[split], data_dir=data.data_dir or None,
                               features=('image', 'label'))

  def _decode(self, example) -> np.ndarray:
    return images.decode(example['image'], self.config.data.channels)

  def transform(self, example, rng, train):
    image = self._decode(example)
    image = self._train_image(image, rng) if train else self.eval_image(image)
    return {'tokens': self.tokens(image), 'label': np.asarray(example['label'], np.int32)}

  def _train_image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the paper's augmentations (section 3.1), or the digits'."""
    size, crop = self.config.data.image_size, self.config.data.crop
    if crop == 'imagenet':
      image = images.resize_small(image, int(rng.integers(256, 385)))
      return images.resize_small(images.random_crop(image, 224, rng), size)
    image = self.eval_image(image)
    if crop == 'cifar':
      return images.random_crop(images.reflect_pad(images.flip(image, rng), 4), size, rng)
    if crop == 'affine':
      return images.random_affine(image, rng, degrees=8., translate=.06, scale=(.9, 1.1))
    return image

  def eval_image(self, image: np.ndarray) -> np.ndarray:
    """uint8 `[h, w, channels]` -> `[size, size, channels]`, the middle of it.

    'imagenet' takes the middle 224 pixels of an image whose shorter side is 224 (section 3.1), and
    nothing of it where only the shorter side has to be brought to size. Smaller sizes are means of
    areas: which filter OpenAI used is not known.
    """
    size = self.config.data.image_size
    if self.config.data.eval_crop == 'imagenet':
      image = images.central_crop(images.resize_small(image, 224), 224)
    return images.central_crop(images.resize_small(image, size), size)

  # What the step computes.

  def init(self, rng):
    tokens = jnp.zeros(self.batch_spec(1)['tokens'].shape, jnp.int32)
    return self.model.init(rng, tokens, keep=jnp.ones(tokens.shape))['params']

  def apply(self, params, tokens: jax.Array, rng: jax.Array, pooled: bool = False):
    """Runs the model on whole images, for BERT with pixels hidden by `rng`.

    Returns:
      What `gpt.ImageGPT` returns, and bool `[batch, pixels]`: which pixels were to be predicted.
    """
    if self.config.model.objective == 'ar':
      return self.model.apply({'params': params}, tokens, pooled=pooled), jnp.ones(
          tokens.shape, bool)
    rate = self.config.model.mask_rate
    hidden = jax.vmap(lambda key: jax.random.bernoulli(key, rate, tokens.shape[1:]))(
        keys.example_keys(rng, tokens))
    return self.model.apply({'params': params}, tokens, keep=~hidden, pooled=pooled), hidden

  def loss(self, params, batch, rng, train):
    model, mask = self.config.model, batch['mask']
    made, predicted = self.apply(params, batch['tokens'], rng)
    weight = mask.sum()
    mean = lambda each: (each * mask).sum() / jnp.maximum(weight, 1)
    each = losses.softmax_cross_entropy(made['logits'], batch['tokens']) * predicted
    generative = mean(each.sum(-1) / jnp.maximum(predicted.sum(-1), 1))
    metrics = {'generative_loss': (generative * weight, weight),
               'bits_per_dim': (generative * weight / math.log(2), weight)}
    total = model.gen_weight * generative
    if model.clf_weight:
      logits, labels = made['class_logits'], batch['label']
      total += model.clf_weight * mean(losses.softmax_cross_entropy(logits, labels))
      metrics['accuracy'] = (((logits.argmax(-1) == labels) * mask).sum(), weight)
    return total, task.Aux(weight, metrics)

  def features(self, params, tokens: jax.Array, draw: jax.Array | int = 0) -> jax.Array:
    """What probes read of every layer: float32 `[batch, depth + 1, width]`.

    BERT's inputs are masked here too; `draw` numbers the masks.
    """
    made, _ = self.apply(params, tokens, jax.random.key(draw), pooled=True)
    return made['features'].swapaxes(0, 1)

  def class_logits(self, params, tokens: jax.Array, draw: int = 0) -> jax.Array:
    """float32 `[batch, classes]`; `draw` as in `features`."""
    return self.apply(params, tokens, jax.random.key(draw))[0]['class_logits']

  # Use.

  def evaluators(self):
    config, splits = self.config, self.config.data.splits
    found: dict[str, Any] = {}
    if splits.validation:
      found['validation'] = Mean('validation')
    if splits.test:
      found['test'] = Mean('test', every='end')
      if splits.probe:
        found['probe'] = probe.Probe('probe', 'test', config.eval.probe, every='end')
      if config.model.clf_weight and config.model.objective == 'bert':
        found['vote'] = probe.MaskVote('test', config.eval.probe.masks, every='end')
      if config.model.objective == 'ar' and config.model.gen_weight:
        found['samples'] = pictures.Samples('test', config.model.sample, every='end')
    return found

  def open_weights(self, path):
    return checkpoints.open_weights(path)

  def adapt(self, weights, params_shape, transfer):
    return checkpoints.adapt(weights, params_shape, transfer)

  def export(self, params, path):
    return checkpoints.write_huggingface(params, path, self.palette, self.config)

  def predict(self, params, inputs, out):
    """Completes the lower half of each image at `inputs`, a file or a folder, n times.

    One picture an image, and one file a completion; with a class head also the best classes.
    """
    settings = self.config.model.sample
    if self.config.model.objective != 'ar':
      raise UserError("config.model.objective='bert' predicts hidden pixels from all others; only "
                      "'ar' completes images")
    complete = jax.jit(functools.partial(sampling.complete, self.model, settings=settings),
                       compiler_options=decode.compiler_options())
    classify = jax.jit(lambda params, tokens: jax.nn.softmax(self.class_logits(params, tokens)))
    size, resized = self.config.data.image_size, False
    given = sampling.given_rows(settings, size) * size
    records = []
    for number, path in enumerate(images.files(inputs)):
      original = images.read(path, self.config.data.channels)
      if original.shape[:2] != (size, size) and not resized:
        resized = True
        logging.warning('images of other sizes, such as %s of %dx%d, are resized: shorter side, '
                        'then the middle %dx%d', path.name, *original.shape[:2], size, size)
      tokens = self.tokens(self.eval_image(original))
      prompts = jnp.asarray(np.repeat(tokens[None, :given], settings.count, axis=0))
      rng = jax.random.fold_in(jax.random.key(self.config.seed), number)
      completed = self.image(np.asarray(complete(params, prompts, rng)))
      record = {'input': str(path), 'picture': f'{path.stem}.png', 'completions': []}
      pictures.completions(self.image(tokens)[None], completed[None], given // size,
                           out / record['picture'])
      for i, image in enumerate(completed):
        record['completions'].append(f'{path.stem}_{i}.png')
        images.write(out / record['completions'][-1], image)
      if self.config.model.clf_weight:
        record['top5'] = metrics_lib.best_classes(
            np.asarray(classify(params, tokens[None]))[0], self.class_names)
      records.append(record)
    return records
