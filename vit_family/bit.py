"""BiT ResNets: Kolesnikov et al., "Big Transfer (BiT)", arXiv 1912.11370.

The convolutional baseline of the ViT paper (its section 4.1). Parameters have the names and shapes
of the public BiT files without their `resnet/` prefix, but for the head, which is a plain matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit_family import resnet
from vit_family.variants import BIT as VARIANTS
from vit_family.variants import BiT as Variant


class BiT(nn.Module):
  """Image classifier: ResNet V2 with group norm and weight standardisation (BiT section 3.1).

  Attributes:
    num_classes: size of the head.
    stages, width_factor: size of the network, see `VARIANTS`; the first stage has
      64 * width_factor channels inside its units, a multiple of 32.
    head_bias_init: constant the head's bias starts at.
    dtype: computation dtype; parameters, statistics and logits are float32.
    remat: what the backward pass computes again: 'none', 'full' (all but the inputs of the residual
      units) or 'dots' (all but those and the results of the convolutions).
  """
  num_classes: int
  stages: tuple[int, ...]
  width_factor: float
  head_bias_init: float = 0.0
  dtype: Any = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(
      self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classifies images.

    Args:
      images: `[batch, height, width, channels]` float in [-1, 1], of any size.
      train: taken so that all models are called alike: nothing here is random.

    Returns:
      float32 logits `[batch, classes]`, and the features that a ViT returns too: 'encoded'
      `[batch, cells, width]`, the last feature map in raster order, and 'pooled' and 'pre_logits'
      `[batch, width]`, both its mean; width is 2048 * width_factor.
    """
    del train
    channels = int(64 * self.width_factor)
    x = _ScopedConv(channels, 7, stride=2, padding=3, dtype=self.dtype, name='root_block')(images)
    # Zeros win over negative activations here; the pooling of the hybrids pads with -inf.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = nn.max_pool(x, (3, 3), (2, 2), 'VALID')
    x = resnet.run_stages(x, PreActivationUnit, self.stages, channels, unit_name='unit{:02d}',
                          dtype=self.dtype, remat=self.remat)
    x = nn.relu(_norm(self.dtype)(x))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    pooled = x.mean(axis=1)
    # The head is float32 in every precision: it is small, and the loss reads it.
    logits = nn.Dense(
        self.num_classes, name='head', dtype=jnp.float32,
        kernel_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'classes')),
        bias_init=nn.with_logical_partitioning(
            nn.initializers.constant(self.head_bias_init), ('classes',)))(pooled)
    return logits, {'encoded': x, 'pooled': pooled, 'pre_logits': pooled}


class PreActivationUnit(nn.Module):
  """Bottleneck unit: shortcut + conv(relu(norm(...))), three times (ResNet V2).

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
    out = 4 * self.features
    project = x.shape[-1] != out or self.stride != 1
    y, projected = _Step(self.features, 1, projection=(out, self.stride) if project else None,
                         dtype=self.dtype, name='a')(x)
    y, _ = _Step(self.features, 3, stride=self.stride, padding=1, dtype=self.dtype, name='b')(y)
    y, _ = _Step(out, 1, dtype=self.dtype, name='c')(y)
    return y + (projected if project else x.astype(self.dtype))


class _Step(nn.Module):
  """Norm, relu, convolution; the first of a unit may also project what the relu puts out.

  Attributes:
    features, size, stride, padding: of the convolution.
    projection: channels and stride of the projection, or None for none.
    dtype: computation dtype.
  """
  features: int
  size: int
  stride: int = 1
  padding: int = 0
  projection: tuple[int, int] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x = nn.relu(_norm(self.dtype)(x))
    projected = None
    if self.projection is not None:
      features, stride = self.projection
      projected = _ScopedConv(features, 1, stride, dtype=self.dtype, name='proj')(x)
    return _conv(self.features, self.size, self.stride, self.padding, self.dtype)(x), projected


class _ScopedConv(nn.Module):
  """A convolution that the public files keep in a scope of its own."""
  features: int
  size: int
  stride: int = 1
  padding: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _conv(self.features, self.size, self.stride, self.padding, self.dtype)(x)


def _conv(features, size, stride, padding, dtype):
  return resnet.StdConv(features, size, stride, padding, inside=1e-10, dtype=dtype,
                        name='standardized_conv2d')


def _norm(dtype):
  return resnet.GroupNorm(1e-5, names=('gamma', 'beta'), dtype=dtype, name='group_norm')
