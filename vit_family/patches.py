"""Patches for self-supervision: cut, corrupted, their colours as classes (ViT appendix B.1.2)."""

import flax
import jax
import jax.numpy as jnp

LEVELS = 8  # 3 bits a channel
# Of the corrupted patches: replaced by the mask vector, and by another patch; the rest stay.
_MASKED, _REPLACED = .8, .1


@flax.struct.dataclass
class Corruption:
  """What happens to each patch of each image.

  Attributes:
    chosen: int32 `[batch, count]`, the corrupted patches in random order: those to predict.
    masked: bool `[batch, patches]`, whose embedding becomes the mask vector.
    replaced: bool `[batch, patches]`, whose embedding becomes that of `source`.
    source: int32 `[batch, patches]`, another patch of the same image.
  """
  chosen: jax.Array
  masked: jax.Array
  replaced: jax.Array
  source: jax.Array


def draw_corruption(keys: jax.Array, patches: int, rate: float) -> Corruption:
  """Corrupts a share of the patches of each image (appendix B.1.2).

  The number of corrupted patches is fixed, `rate * patches` rounded down but at least one, so that
  only their tokens need predictions; which they are is uniform. Each is masked with probability
  0.8, replaced with 0.1 and kept with 0.1, independently. The paper's "random other patch
  embedding" is any other of the same image with equal chance: one of another image would have to
  travel between devices, and an image's loss would depend on its neighbours in the batch.

  Args:
    keys: `[batch]`, a key an image.
    patches: in an image.
    rate: share to corrupt, 0.5 in the paper.
  """
  count = max(1, int(rate * patches))

  def one(key):
    where, kind, away = jax.random.uniform(key, (3, patches))
    # Sorts and no scatter: each device orders its own images.
    order = jnp.argsort(where)
    corrupted = jnp.argsort(order) < count
    step = 1 + (away * (patches - 1)).astype(jnp.int32)
    return Corruption(
        chosen=order[:count].astype(jnp.int32), masked=corrupted & (kind < _MASKED),
        replaced=corrupted & (kind >= _MASKED) & (kind < _MASKED + _REPLACED),
        source=(jnp.arange(patches) + step) % patches)

  return jax.vmap(one)(keys)


def to_patches(images: jax.Array, size: int) -> jax.Array:
  """`[batch, height, width, channels]` -> `[batch, patches, size, size, channels]`, row by row."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // size, size, width // size, size, channels)
  return x.swapaxes(2, 3).reshape(batch, -1, size, size, channels)


def from_patches(patches: jax.Array, height: int, width: int) -> jax.Array:
  """The inverse of `to_patches`."""
  batch, _, size, _, channels = patches.shape
  x = patches.reshape(batch, height // size, width // size, size, size, channels)
  return x.swapaxes(2, 3).reshape(batch, height, width, channels)


def color_classes(pixels: jax.Array) -> jax.Array:
  """The class of a mean colour: 3 bits a channel, the first channel highest (appendix B.1.2).

  Args:
    pixels: integer `[..., pixels, channels]` in [0, 255]; the mean is over the pixels. A bin is an
      eighth of that range and includes its lower end; the last also includes 255.

  Returns:
    int32 `[...]` below 8 ** channels: 512 classes in colour, 8 in grey.
  """
  # In integers, so that a mean on the edge of two bins is the same on every device.
  level = pixels.astype(jnp.int32).sum(-2) * LEVELS // (255 * pixels.shape[-2])
  level = jnp.minimum(level, LEVELS - 1)
  return (level * _powers(pixels.shape[-1])).sum(-1)


def class_colors(classes: jax.Array, channels: int) -> jax.Array:
  """The middle of a class's bins: int `[...]` -> float32 `[..., channels]` in [0, 1]."""
  level = classes[..., None] // _powers(channels) % LEVELS
  return (level + .5) / LEVELS


def _powers(channels: int) -> jax.Array:
  return LEVELS ** jnp.arange(channels - 1, -1, -1, dtype=jnp.int32)
