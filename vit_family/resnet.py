"""ResNets with weight standardisation and group normalisation, and the stem of hybrid ViTs.

`StdConv`, `GroupNorm` and `run_stages` serve both families: the hybrids here, whose units normalise
after each convolution (ResNet V1, ViT section 3.1 "Hybrid Architecture"), and BiT in `bit.py`,
whose units normalise before (ResNet V2). The two differ in every epsilon and in their padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from core import partition
from core.nn import remat as remat_lib

# Residual units of each stage, by the name that stands before the plus of a hybrid. R50/16 has the
# three units of the last stage moved to the one before: it downsamples 16 times instead of 32.
BACKBONES = {
    'R': (),
    'R26': (2, 2, 2, 2),
    'R50': (3, 4, 6, 3),
    'R50/16': (3, 4, 9),
}


def downsampling(stages: Sequence[int]) -> int:
  """Pixels per side of a cell of the feature map: 4 for the stem, 2 for every stage after one."""
  return 4 * 2 ** max(len(stages) - 1, 0)


def standardize(kernel: jax.Array, inside: float, outside: float) -> jax.Array:
  """Weight standardisation (Qiao et al., arXiv 1903.10520), each output channel by itself.

  Args:
    kernel: float32 `[height, width, inputs, outputs]`.
    inside: added to the variance, under the root.
    outside: added to the standard deviation.

  Returns:
    (kernel - mean) / (sqrt(variance + inside) + outside), like `kernel`.
  """
  axes = (0, 1, 2)
  deviation = jnp.sqrt(kernel.var(axes) + inside) + outside
  return (kernel - kernel.mean(axes)) / deviation


class StdConv(nn.Module):
  """Convolution without bias whose kernel is standardised, in float32, before every use.

  Attributes:
    features: output channels.
    size: side of the kernel.
    stride: of both dimensions.
    padding: 'SAME' (at stride 2 asymmetric on even sizes), or zeros on each side.
    inside, outside: see `standardize`.
    dtype: computation dtype; the kernel `[size, size, channels, features]` is float32.
  """
  features: int
  size: int
  stride: int = 1
  padding: str | int = 'SAME'
  inside: float = 0.0
  outside: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, height, width, channels]` -> `[batch, height', width', features]`."""
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (None, None, None, 'embed')),
        (self.size, self.size, x.shape[-1], self.features), jnp.float32)
    kernel = standardize(kernel, self.inside, self.outside).astype(self.dtype)
    padding = self.padding
    if not isinstance(padding, str):
      padding = [(padding, padding)] * 2
    x = lax.conv_general_dilated(
        x.astype(self.dtype), kernel, (self.stride, self.stride), padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return partition.constrain(x, ('batch', None, None, None))


class GroupNorm(nn.Module):
  """Normalises each group of neighbouring channels over space (Wu and He, arXiv 1803.08494).

  Attributes:
    epsilon: added to the variance.
    groups: number of groups; it divides the channels.
    names: of the parameters that scale and shift each channel.
    scale_init: initializer of the scale.
    dtype: of the output; statistics and parameters are float32.
  """
  epsilon: float
  groups: int = 32
  names: tuple[str, str] = ('scale', 'bias')
  scale_init: Callable = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, height, width, channels]` -> the same."""
    channels = x.shape[-1]
    if channels % self.groups:
      raise ValueError(f'{channels} channels do not divide into {self.groups} groups')
    scale, bias = (
        self.param(name, nn.with_logical_partitioning(init, ('embed',)), (channels,), jnp.float32)
        for name, init in zip(self.names, (self.scale_init, nn.initializers.zeros)))

    def group_mean(x):
      """Mean over space and group, at every channel: `[batch, 1, 1, channels]`."""
      # Over space first: splitting the channels of the whole map costs a new layout on a TPU.
      means = x.mean((1, 2)).reshape(-1, self.groups, channels // self.groups)
      means = jnp.broadcast_to(means.mean(-1, keepdims=True), means.shape)
      return means.reshape(-1, 1, 1, channels)

    x = x.astype(jnp.float32)
    x = x - group_mean(x)
    x = x * lax.rsqrt(group_mean(x * x) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


class Stage(nn.Module):
  """Residual units in a row, the first of which may halve the resolution.

  Attributes:
    unit: makes a unit from the keywords features, stride, dtype and name.
    units: number of units.
    features: channels inside the units; they put out four times as many.
    stride: of the first unit; the others have stride 1.
    unit_name: format of the units' names, which count from 1.
    dtype: computation dtype.
  """
  unit: Callable[..., nn.Module]
  units: int
  features: int
  stride: int
  unit_name: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, height, width, channels]` -> `[batch, height/stride, width/stride, 4 features]`."""
    for i in range(self.units):
      x = self.unit(features=self.features, stride=self.stride if i == 0 else 1, dtype=self.dtype,
                    name=self.unit_name.format(i + 1))(x)
    return x


def run_stages(
    x: jax.Array, unit: type[nn.Module], stages: Sequence[int], channels: int, *, unit_name: str,
    dtype: Any, remat: str) -> jax.Array:
  """Runs the stages `block1`, `block2`, ... of a ResNet; call it inside a compact module.

  Args:
    x: what the stem puts out, `[batch, height, width, channels]`.
    unit: class of the residual units.
    stages: units in each stage.
    channels: inside the units of the first stage; every stage doubles them.
    unit_name: see `Stage`.
    dtype: computation dtype.
    remat: what a unit keeps for the backward pass, see `core.nn.remat`.

  Returns:
    the last stage's output, `[batch, height', width', 4 channels 2^(stages - 1)]`; x without
    stages.
  """
  unit = remat_lib.remat(unit, remat)
  for i, units in enumerate(stages):
    x = Stage(unit, units, channels * 2 ** i, 1 if i == 0 else 2, unit_name, dtype,
              name=f'block{i + 1}')(x)
  return x


class PostActivationUnit(nn.Module):
  """Bottleneck unit of the hybrids: relu(shortcut + norm(conv(...))) (ResNet V1).

  Attributes:
    features: channels inside; the output has four times as many.
    stride: of the 3x3 convolution and of the projected shortcut.
    dtype: computation dtype.
  """
  features: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, height, width, channels]` -> `[batch, height/stride, width/stride, 4 features]`."""
    shortcut = x.astype(self.dtype)
    if x.shape[-1] != 4 * self.features or self.stride != 1:
      shortcut = _conv(4 * self.features, 1, self.stride, self.dtype, 'conv_proj')(x)
      shortcut = _norm(self.dtype, 'gn_proj')(shortcut)
    y = _conv(self.features, 1, 1, self.dtype, 'conv1')(x)
    y = nn.relu(_norm(self.dtype, 'gn1')(y))
    y = _conv(self.features, 3, self.stride, self.dtype, 'conv2')(y)
    y = nn.relu(_norm(self.dtype, 'gn2')(y))
    y = _conv(4 * self.features, 1, 1, self.dtype, 'conv3')(y)
    # A unit starts as its shortcut.
    y = _norm(self.dtype, 'gn3', nn.initializers.zeros)(y)
    return nn.relu(shortcut + y)


def backbone(
    images: jax.Array, stages: Sequence[int], width_factor: int, *, dtype: Any,
    remat: str) -> jax.Array:
  """The ResNet of a hybrid; call it inside a compact module, which gets its parameters.

  A function and not a module, because in the public files the parameters (`conv_root`, `gn_root`,
  `block1`, ...) sit at the top level of the model.

  Args:
    images: `[batch, height, width, channels]`.
    stages: units in each stage, see `BACKBONES`.
    width_factor: multiplies all channels.
    dtype: computation dtype.
    remat: see `run_stages`.

  Returns:
    `[batch, height/d, width/d, channels]`, d being `downsampling(stages)`.
  """
  channels = 64 * width_factor
  x = _conv(channels, 7, 2, dtype, 'conv_root')(images)
  x = nn.relu(_norm(dtype, 'gn_root')(x))
  x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
  return run_stages(x, PostActivationUnit, stages, channels, unit_name='unit{}', dtype=dtype,
                    remat=remat)


def _conv(features, size, stride, dtype, name):
  return StdConv(features, size, stride, outside=1e-5, dtype=dtype, name=name)


def _norm(dtype, name, scale_init=nn.initializers.ones):
  return GroupNorm(1e-6, scale_init=scale_init, dtype=dtype, name=name)
