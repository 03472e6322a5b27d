"""The ResNet under DETR, as torchvision has it: V1.5, symmetric padding, batch norm frozen.

Every convolution carries the norm behind it. A frozen batch norm is a constant scale and shift a
channel (`scale` = weight / sqrt(variance + 1e-5), `bias` = bias - mean * scale); the scale is
folded into the kernel when it is used, so the kernels themselves keep the published values, and
learning rate and decay act on what they act on in the paper.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from core import partition
from core.nn import remat as remat_lib
from detection import convolution

# Units of each stage, and channels inside those of the first. The small ones are for pictures of
# 64 pixels on a CPU.
BACKBONES = {
    'r50': dict(stages=(3, 4, 6, 3), channels=64),
    'r101': dict(stages=(3, 4, 23, 3), channels=64),
    'r11x0.25': dict(stages=(1, 1, 1), channels=16),
    'r8x0.25': dict(stages=(1, 1), channels=16),
}
NORMS = ('frozen', 'group')


class ConvNorm(nn.Module):
  """A convolution without bias, and its norm.

  Attributes:
    features: output channels.
    size: side of the kernel; zeros are padded on all sides, as torch does (flax's SAME would shift
      the picture at stride 2).
    stride: of both dimensions.
    dilation: of both dimensions.
    norm: 'frozen' or 'group'.
    scale_init: of `scale`, the same for every channel.
    dtype: computation dtype; `kernel` `[size, size, inputs, features]`, `scale` and `bias`
      `[features]` are float32.
  """
  features: int
  size: int
  stride: int = 1
  dilation: int = 1
  norm: str = 'frozen'
  scale_init: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, height, width, inputs]` -> `[batch, ceil(height/stride), ..., features]`."""
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(nn.initializers.he_normal(),
                                               (None, None, None, 'embed')),
        (self.size, self.size, x.shape[-1], self.features), jnp.float32)
    scale, bias = (
        self.param(name, nn.with_logical_partitioning(nn.initializers.constant(value), ('embed',)),
                   (self.features,), jnp.float32)
        for name, value in (('scale', self.scale_init), ('bias', 0.)))
    if self.norm == 'frozen':
      scale, bias = lax.stop_gradient((scale, bias))
      kernel = kernel * scale
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.size == 1:
      # As the matrix product it is: XLA's gradient of a convolution is slow on a CPU.
      x = x[:, ::self.stride, ::self.stride]
      y = lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    else:
      y = convolution.convolve(x, kernel, self.stride, self.dilation)
    y = partition.constrain(y, ('batch', None, None, None))
    if self.norm == 'frozen':
      return y + bias.astype(self.dtype)
    # Group norm (Wu and He, arXiv 1803.08494): one multiplication and addition a value.
    y = y.astype(jnp.float32)
    mean, variance = _group_moments(y, min(32, max(self.features // 4, 1)))
    factor = scale * lax.rsqrt(variance + 1e-5)
    return (y * factor + (bias - mean * factor)).astype(self.dtype)


def _group_moments(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of each group of channels over space, at every channel: `[b, 1, 1, c]`."""
  channels = x.shape[-1]

  def spread(means):
    means = means.reshape(-1, groups, channels // groups).mean(-1, keepdims=True)
    means = jnp.broadcast_to(means, (*means.shape[:2], channels // groups))
    return means.reshape(-1, 1, 1, channels)

  # Over space first, where the long sums are: two sums a channel, in one pass over the map. What
  # the norm divides is near zero mean (He initialisation), so the difference of squares is safe.
  mean = spread(x.mean((1, 2)))
  return mean, jnp.maximum(spread(jnp.square(x).mean((1, 2))) - jnp.square(mean), 0.)


class Bottleneck(nn.Module):
  """1x1, 3x3 (with the stride) and 1x1 convolution around a shortcut (He et al. 2016, figure 5).

  Attributes:
    channels: inside; the output has four times as many.
    stride, dilation: of the 3x3 convolution.
    project: whether the shortcut is a convolution too.
    norm, dtype: see `ConvNorm`.
    last_scale: initial scale of the last norm: small where nothing else keeps a deep stack of
      untrained units from growing.
  """
  channels: int
  stride: int = 1
  dilation: int = 1
  project: bool = False
  norm: str = 'frozen'
  last_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, h, w, inputs]` -> `[batch, ceil(h/stride), ceil(w/stride), 4 channels]`."""
    conv = lambda features, size, name, **kwargs: ConvNorm(
        features, size, norm=self.norm, dtype=self.dtype, name=name, **kwargs)
    y = nn.relu(conv(self.channels, 1, 'conv1')(x))
    y = nn.relu(conv(self.channels, 3, 'conv2', stride=self.stride, dilation=self.dilation)(y))
    y = conv(4 * self.channels, 1, 'conv3', scale_init=self.last_scale)(y)
    if self.project:
      x = conv(4 * self.channels, 1, 'downsample', stride=self.stride)(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Stem `conv1`, then `layer{1..}_{0..}`, named after torchvision's.

  Attributes:
    stages: units of each stage.
    channels: of the stem and inside the units of the first stage; every stage doubles them.
    dilation: the last stage keeps its resolution and is dilated instead (DC5). As in torchvision
      its first unit keeps the dilation of the stage before, 1.
    norm: 'frozen' batch norm, or 'group' norm, which can be trained from scratch.
    freeze_at: how many of (stem, layer1, layer2, ...) get no gradient: 2 in the paper.
    remat: what a unit keeps for the backward pass, see `core.nn.remat`.
    dtype: computation dtype.
  """
  stages: Sequence[int]
  channels: int = 64
  dilation: bool = False
  norm: str = 'frozen'
  freeze_at: int = 0
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> list[jax.Array]:
    """`[batch, height, width, 3]` -> the stages' outputs; stage i is `[batch, ceil(height / s),
    ceil(width / s), 4 channels 2^i]` with s = 4, 8, 16, 32 (16 where the last is dilated)."""
    unit = remat_lib.remat(Bottleneck, self.remat)
    x = nn.relu(ConvNorm(self.channels, 7, 2, norm=self.norm, dtype=self.dtype, name='conv1')(
        images))
    x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    if self.freeze_at > 0:
      x = lax.stop_gradient(x)
    last_scale = 0. if self.norm == 'group' else sum(self.stages) ** -.5
    outputs = []
    for stage, units in enumerate(self.stages):
      dilated = self.dilation and stage == len(self.stages) - 1
      for i in range(units):
        x = unit(self.channels * 2 ** stage,
                 stride=2 if i == 0 and stage and not dilated else 1,
                 dilation=2 if dilated and i else 1, project=i == 0, norm=self.norm,
                 last_scale=last_scale, dtype=self.dtype, name=f'layer{stage + 1}_{i}')(x)
      if self.freeze_at > stage + 1:
        x = lax.stop_gradient(x)
      outputs.append(x)
    return outputs


def frozen_pattern(norm: str, freeze_at: int) -> str:
  """Regular expression of the parameters below `backbone/` that training never changes."""
  parts = ['conv1/', *(rf'layer{stage}_\d+/' for stage in range(1, freeze_at))][:freeze_at]
  if norm == 'frozen':
    parts.append(CONSTANTS)
  return f'^backbone/({"|".join(parts)})' if parts else ''


# What a frozen batch norm keeps: buffers in torch, which nobody counts as parameters.
CONSTANTS = '.*(scale|bias)$'
