"""The mask head of panoptic DETR, and its losses (section 4.4, figure 8).

Each query looks at the encoder's output once more, and a small convolutional network turns the
attention maps of its heads, beside the picture's features, into a mask. No query sees another, so
the masks of some queries are the same whether or not the others are asked for.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from core import partition
from core.nn import attention

# Of the focal loss (Lin et al., arXiv 1708.02002): the share of the positives, and the exponent.
_ALPHA, _GAMMA = 0.25, 2
_GROUPS = 8
_EPSILON = 1e-5


class BoxAttention(nn.Module):
  """Where in the picture each query looks: attention weights without values.

  Parameters: `query` and `key`, each a kernel `[width, width]` and a bias `[width]`.

  Attributes:
    heads: number of heads; it divides `width`.
    width: of queries and memory, and of what both are projected to.
    dtype: computation dtype of the projections; scores and weights are float32.
  """
  heads: int = 8
  width: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, queries: jax.Array, memory: jax.Array, valid: jax.Array) -> jax.Array:
    """Attends from every query to every cell.

    The softmax runs over heads and cells together, not over the cells of each head: the maps of
    one query sum to 1, not to `heads`. So does the reference implementation.

    Args:
      queries: `[batch, queries, width]`, the last decoder layer's output.
      memory: `[batch, h, w, width]`, the encoder's output.
      valid: bool `[batch, h, w]`, False on padding, which gets weight zero.

    Returns:
      float32 `[batch, queries, heads, h, w]`.

    Raises:
      ValueError: `heads` does not divide `width`.
    """
    if self.width % self.heads:
      raise ValueError(f'width {self.width} does not divide into {self.heads} heads')
    head_dim = self.width // self.heads

    def project(x, name):
      x = nn.Dense(
          self.width, dtype=self.dtype, name=name,
          kernel_init=nn.with_logical_partitioning(
              nn.initializers.xavier_uniform(), ('embed', 'heads')),
          bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('heads',)))(x)
      return x.reshape(*x.shape[:-1], self.heads, head_dim)

    query = project(queries, 'query') * jnp.asarray(head_dim ** -0.5, self.dtype)
    key = project(memory, 'key')
    scores = jnp.einsum('bqnd,bhwnd->bqnhw', query, key, preferred_element_type=jnp.float32)
    rows = scores.shape[:2] + (-1,)
    seen = jnp.broadcast_to(valid[:, None, None], scores[:, :1].shape)
    maps = attention.masked_softmax(
        scores.reshape(rows), seen.reshape(scores.shape[0], 1, -1)).reshape(scores.shape)
    return partition.constrain(maps, ('batch', None, None, None, None))


class MaskHead(nn.Module):
  """Turns attention maps into masks, from the coarsest features to stride 4.

  Convolutions of 3x3 with group norm and ReLU: `lay1` and `lay2` on features and maps side by
  side, then for every level of the pyramid an upsampling, the level through a 1x1 convolution
  (`adapter{i}`) added, and a `lay{i + 2}`; `out_lay` makes the logits. The channels are
  width + heads, then width / 2, / 4, / 8 and / 16. Names and arithmetic are those of the reference
  implementation; parameters are a `kernel` `[size, size, inputs, outputs]` and a `bias` for each
  convolution, a `scale` and a `bias` for each norm (`gn{i}`).

  The reference repeats the picture's features for every query. But a convolution is linear, so
  that of `lay1` over features and maps side by side is the sum of one over the features, the same
  for all queries of a picture and computed once, and one over the few maps. For 100 queries of
  width 256 this leaves 1/25 of the multiplications of `lay1`, 2/3 of those of the whole head, and
  no copies of the features. The adapters, too, run once a picture.

  A norm has 8 groups, or where 8 does not divide the channels (heads narrower than the published
  one) the largest divisor of 8 that does.

  Attributes:
    dtype: computation dtype; statistics of the norms and parameters are float32.
    chunk: how many queries of a picture to compute at once, at most; 0 for all. Chunks keep only
      the maps for the backward pass and compute the rest again: at 800 x 1333 pixels and 100
      queries what `lay5` reads alone is 0.9 GB of float32 a picture. The values are the same.
  """
  dtype: Any = jnp.float32
  chunk: int = 0

  @nn.compact
  def __call__(
      self, features: jax.Array, maps: jax.Array, pyramid: Sequence[jax.Array]) -> jax.Array:
    """Computes the mask of every query.

    Args:
      features: `[batch, h, w, width]`, the projected output of the backbone (not of the encoder).
      maps: `[batch, queries, heads, h, w]` from `BoxAttention`.
      pyramid: finer maps of the backbone, the coarsest first: `[batch, h_i, w_i, c_i]`, each the
        size of the one before or twice that, less a last odd row or column.

    Returns:
      float32 logits `[batch, queries, h', w']`, the size of the pyramid's last level.

    Raises:
      ValueError: the width is too small for so many levels, or a level has another size.
    """
    queries, heads = maps.shape[1:3]
    width, levels = features.shape[-1], len(pyramid)
    if width < 2 ** (levels + 1):
      raise ValueError(f'width {width} cannot be halved {levels + 1} times for a pyramid of '
                       f'{levels} levels')
    channels = [width + heads, width + heads] + [width >> i for i in range(1, levels + 2)]

    def conv(size, inputs, outputs, name):
      # The reference's kaiming_uniform(a=1) is a variance of 1 / fan_in.
      return _Pair('kernel', nn.initializers.lecun_uniform(), (size, size, inputs, outputs),
                   name=name)()

    stages = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(channels), 1):
      norm = _Pair('scale', nn.initializers.ones, (outputs,), name=f'gn{i}')()
      stages.append((conv(3, inputs, outputs, f'lay{i}'), norm))
    ((first, first_bias), first_norm), second, *refine = stages
    out = conv(3, channels[-1], 1, 'out_lay')
    shared = _conv(features, first[:, :, :width], first_bias, self.dtype)
    adapted = [
        _conv(level, *conv(1, level.shape[-1], channels[i + 1], f'adapter{i}'), self.dtype)
        for i, level in enumerate(pyramid, 1)]

    def masks_of(maps):
      """`[batch, n, heads, h, w]` -> `[batch, n, h', w']`."""
      n = maps.shape[1]

      def add(x, picture):
        """Adds what belongs to the picture `[batch, ...]` to each query's `[batch * n, ...]`."""
        x = x.reshape(-1, n, *x.shape[1:]) + picture[:, None]
        return x.reshape(-1, *x.shape[2:])

      x = jnp.moveaxis(maps, 2, -1).reshape(-1, *maps.shape[3:], heads)
      x = add(_conv(x, first[:, :, width:], None, self.dtype), shared)
      x = nn.relu(_group_norm(x, *first_norm))
      x = _stage(x, *second, self.dtype)
      for level, stage in zip(adapted, refine):
        x = _stage(add(_upsample(x, level.shape[1:3]), level), *stage, self.dtype)
      x = _conv(x, *out, self.dtype)[..., 0].astype(jnp.float32)
      return x.reshape(-1, n, *x.shape[1:])

    if not 0 < self.chunk < queries:
      return masks_of(maps)
    count = -(-queries // self.chunk)
    # As even as they can be, so that little is computed for the sake of equal shapes.
    size = -(-queries // count)
    maps = jnp.pad(maps, ((0, 0), (0, count * size - queries), (0, 0), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(maps.reshape(-1, count, size, *maps.shape[2:]), 1, 0)
    masks = jnp.moveaxis(lax.map(jax.checkpoint(masks_of), chunks), 0, 1)
    return masks.reshape(-1, count * size, *masks.shape[3:])[:, :queries]


class _Pair(nn.Module):
  """The parameters of a convolution or a norm; the caller applies them, a chunk at a time.

  Attributes:
    kind: 'kernel' or 'scale'; the other one is a 'bias' of zeros.
    initializer: of the first.
    shape: of the first; the last dimension is the output channels.
  """
  kind: str
  initializer: Any
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    names = (None,) * (len(self.shape) - 1) + ('embed',)
    first = self.param(self.kind, nn.with_logical_partitioning(self.initializer, names),
                       self.shape, jnp.float32)
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
                      self.shape[-1:], jnp.float32)
    return first, bias


def _conv(x, kernel, bias, dtype):
  """Convolution that keeps the size, zeros all around: `[n, h, w, inputs]` -> `[.., outputs]`."""
  padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
  x = lax.conv_general_dilated(x.astype(dtype), kernel.astype(dtype), (1, 1), padding,
                               dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  x = partition.constrain(x, ('batch', None, None, None))
  return x if bias is None else x + bias.astype(dtype)


def _group_norm(x, scale, bias):
  """Group norm of `[n, h, w, channels]`, computed in float32, in the dtype of x."""
  channels = x.shape[-1]
  groups = math.gcd(_GROUPS, channels)

  def mean(x):
    # Over space first: splitting the channels of a whole map costs a new layout on a TPU.
    means = x.mean((1, 2)).reshape(-1, groups, channels // groups).mean(-1)
    return jnp.repeat(means, channels // groups, axis=-1)[:, None, None]

  y = x.astype(jnp.float32)
  y = y - mean(y)
  return (y * lax.rsqrt(mean(y * y) + _EPSILON) * scale + bias).astype(x.dtype)


def _stage(x, conv, norm, dtype):
  return nn.relu(_group_norm(_conv(x, *conv, dtype), *norm))


def _upsample(x, size):
  """Nearest neighbour as torch has it, cell i reads floor(i * inputs / outputs).

  From n cells to 2n or 2n - 1 that is each cell twice, a broadcast. Indexing would do for any
  sizes, but its gradient is a scatter, which accelerators are slow at.
  """
  for axis, length in zip((1, 2), size):
    cells = x.shape[axis]
    times = -(-length // cells)
    target = np.arange(length)
    if (target * cells // length != target // times).any():
      raise ValueError(f'a map of {cells} cells a side cannot be upsampled to {length}: a level of '
                       f'the pyramid is as large as the one before or twice as large')
    x = lax.slice_in_dim(jnp.repeat(x, times, axis=axis), 0, length, axis=axis)
  return x


def mask_losses(
    masks: jax.Array, segments: jax.Array, objects: jax.Array, weight: jax.Array,
    num_boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Focal and Dice loss of the masks of matched queries (section 4.4; Milletari et al. 2016).

  Masks are upsampled to the pixels of the padded picture (bilinear, half-pixel centres), where the
  padding counts as pixels outside of the object, as in the reference implementation; so the focal
  loss, a mean over pixels, depends on the bucket.

  Only one slot's full-size mask a picture exists at a time, in the backward pass too, and slots
  that are empty in the whole batch cost nothing.

  Args:
    masks: `[batch, slots, h, w]` float logits of the query that each target slot is matched to.
    segments: int `[batch, height, width]`: slot + 1 of the object that a pixel belongs to, 0 for
      none.
    objects: int `[batch]`; the first so many slots are real, the others add nothing.
    weight: float `[batch]`, 0 for rows that do not count, else 1.
    num_boxes: scalar, what both sums over objects are divided by; at least 1.

  Returns:
    two float32 scalars: the focal loss (mean over pixels) and the Dice loss, each summed over
    objects and divided by `num_boxes`.

  Raises:
    ValueError: more slots than the dtype of `segments` can number.
  """
  batch, slots = masks.shape[:2]
  size = segments.shape[1:]
  if slots > jnp.iinfo(segments.dtype).max:
    raise ValueError(f'{slots} slots cannot be told apart in segments of {segments.dtype}')

  def full_size(masks, slot):
    logits = jax.image.resize(masks.astype(jnp.float32), (batch, *size), 'bilinear',
                              antialias=False)
    return _focal_and_dice(logits, segments == slot + 1)

  @jax.checkpoint
  def losses(inputs):
    masks, slot = inputs
    nothing = (jnp.zeros(batch), jnp.zeros(batch))
    return lax.cond(slot < filled, full_size, lambda *_: nothing, masks, slot)

  filled = objects.max()
  slot = jnp.arange(slots)
  counted = jnp.where(slot[:, None] < objects, weight, 0.0)
  focal, dice = lax.map(losses, (jnp.moveaxis(masks, 1, 0), slot))
  return (focal * counted).sum() / num_boxes, (dice * counted).sum() / num_boxes


def _focal_and_dice(logits, target):
  """Both losses of float32 logits against a bool target, each `[batch, height, width]`."""
  sign = jnp.where(target, logits, -logits)
  share = jnp.where(target, _ALPHA, 1 - _ALPHA)
  focal = share * jax.nn.sigmoid(-sign) ** _GAMMA * -jax.nn.log_sigmoid(sign)
  total = lambda x: x.sum((1, 2))
  p, t = jax.nn.sigmoid(logits), target.astype(jnp.float32)
  dice = 1 - (2 * total(p * t) + 1) / (total(p) + total(t) + 1)
  return focal.mean((1, 2)), dice
