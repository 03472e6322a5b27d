"""Vision Transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.

Parameters have the names and shapes of the public Google checkpoints in today's linen spelling, so
that loading one is a renaming.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from core import partition
from core.nn import attention
from core.nn import blocks
from core.nn import positions
from vit_family import resnet
from vit_family.variants import VIT as VARIANTS
from vit_family.variants import ViT as Variant

CLASSIFIERS = ('token', 'gap', 'map')


class VisionTransformer(nn.Module):
  """Image classifier: patches, position embeddings, pre-norm encoder, head (section 3.1).

  With `stages` it is a hybrid: the patches are cut from the feature map of a ResNet, whose
  parameters sit beside those of the encoder, as in the public files.

  Attributes:
    num_classes: size of the head.
    patch_size: side of a square patch in pixels, in a hybrid in cells of the feature map.
    width, depth, mlp_dim, heads: size of the encoder, see `VARIANTS`.
    classifier: 'token' reads an extra first token, 'gap' averages all tokens and has no extra one,
      'map' reads them through `MAPHead` and has no extra one.
    stages: residual units in each stage of the ResNet (see `resnet.BACKBONES`), () for its stem
      alone, None for no ResNet.
    width_factor: multiplies all channels of the ResNet.
    representation_size: width of the tanh layer `pre_logits` of the original pretraining; None for
      none, as in fine-tuning and in the AugReg checkpoints.
    head_bias_init: constant the head's bias starts at; -10 for sigmoid pretraining.
    dropout_rate: after the position embeddings, the attention projection and both MLP layers.
    attention_dropout_rate: of the attention weights, 0 in every published configuration.
    stochastic_depth: how often the last block's branches are left out for an example in training;
      the rate grows linearly from 0 at the first block ("How to train your ViT" section 3.3).
    activation: of the MLPs, a key of `blocks.ACTIVATIONS`: the public JAX code has the tanh form of
      GELU, torch ports the exact one.
    dtype: computation dtype; parameters, statistics and logits are float32.
    scan: one compiled encoder block instead of `depth`.
    remat: what the backward pass computes again, of blocks and residual units: 'none', 'dots' (all
      but matrix products and convolutions) or 'full'.
  """
  num_classes: int
  patch_size: int
  width: int
  depth: int
  mlp_dim: int
  heads: int
  classifier: str = 'token'
  stages: tuple[int, ...] | None = None
  width_factor: int = 1
  representation_size: int | None = None
  head_bias_init: float = 0.0
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth: float = 0.0
  activation: str = 'gelu_tanh'
  dtype: Any = jnp.float32
  scan: bool = False
  remat: str = 'none'

  @nn.compact
  def __call__(
      self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classifies images.

    Args:
      images: `[batch, height, width, channels]` float in [-1, 1]; the sides are multiples of the
        patch size, in a hybrid times the downsampling of the ResNet.
      train: switches dropout and stochastic depth on, drawn from the rng 'dropout'.

    Returns:
      float32 logits `[batch, classes]`, and what few-shot evaluation and pictures read:
      'encoded' `[batch, tokens, width]`, 'pooled' `[batch, width]` and 'pre_logits', the input of
      the head, `[batch, representation_size or width]`.
    """
    if self.classifier not in CLASSIFIERS:
      raise ValueError(f'classifier={self.classifier!r}: expected one of {CLASSIFIERS}')
    x = images
    if self.stages is not None:
      x = resnet.backbone(x, self.stages, self.width_factor, dtype=self.dtype, remat=self.remat)
    x = PatchEmbedding(self.patch_size, self.width, dtype=self.dtype, name='embedding')(x)
    if self.classifier == 'token':
      x = prepend_class_token(self, x)
    x = Encoder(
        depth=self.depth, mlp_dim=self.mlp_dim, heads=self.heads, dropout_rate=self.dropout_rate,
        attention_dropout_rate=self.attention_dropout_rate,
        stochastic_depth=self.stochastic_depth, activation=self.activation,
        dtype=self.dtype, scan=self.scan, remat=self.remat, name='Transformer')(x, train=train)
    features = {'encoded': x}
    if self.classifier == 'token':
      x = x[:, 0]
    elif self.classifier == 'gap':
      x = x.mean(axis=1)
    else:
      x = MAPHead(self.heads, self.mlp_dim, activation=self.activation, dtype=self.dtype,
                  name='MAPHead_0')(x)
    features['pooled'] = x
    if self.representation_size is not None:
      x = jnp.tanh(nn.Dense(
          self.representation_size, dtype=self.dtype, name='pre_logits',
          kernel_init=nn.with_logical_partitioning(
              nn.initializers.lecun_normal(), ('embed', 'mlp')),
          bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('mlp',)))(x))
    features['pre_logits'] = x
    # The head is float32 in every precision: it is small, and the loss reads it.
    logits = nn.Dense(
        self.num_classes, name='head', dtype=jnp.float32,
        kernel_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'classes')),
        bias_init=nn.with_logical_partitioning(
            nn.initializers.constant(self.head_bias_init), ('classes',)))(x)
    return logits, features


def prepend_class_token(module: nn.Module, x: jax.Array) -> jax.Array:
  """Puts `module`'s parameter `cls` `[1, 1, width]` before x `[batch, tokens, width]`.

  Call it inside the compact module whose parameter the class token is to be.
  """
  batch, _, width = x.shape
  cls = module.param(
      'cls', nn.with_logical_partitioning(nn.initializers.zeros, (None, None, 'embed')),
      (1, 1, width), jnp.float32)
  return jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, width)), x], axis=1)


class PatchEmbedding(nn.Module):
  """Linear projection of non-overlapping patches (section 3.1, equation 1).

  The kernel is stored as that of a convolution whose stride is its size, `[P, P, channels, width]`,
  but computed as one matrix product, which is faster on every platform.

  Attributes:
    patch_size: P.
    width: width of a token.
    dtype: computation dtype.
  """
  patch_size: int
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """`[batch, height, width, channels]` -> `[batch, tokens, width]` in raster order."""
    batch, height, width, channels = images.shape
    size = self.patch_size
    if height % size or width % size:
      raise ValueError(f'images of {height}x{width} do not divide into patches of {size}x{size}')
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (None, None, None, 'embed')),
        (size, size, channels, self.width), jnp.float32)
    bias = self.param(
        'bias', nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
        (self.width,), jnp.float32)
    rows, columns = height // size, width // size
    patches = images.astype(self.dtype).reshape(batch, rows, size, columns, size * channels)
    patches = patches.swapaxes(2, 3).reshape(batch, rows * columns, size * size * channels)
    tokens = patches @ kernel.astype(self.dtype).reshape(-1, self.width) + bias.astype(self.dtype)
    return partition.constrain(tokens, ('batch', 'length', 'embed'))


class Encoder(nn.Module):
  """Position embeddings, pre-norm blocks, final layer norm (section 3.1, equations 1-4)."""
  depth: int
  mlp_dim: int
  heads: int
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth: float = 0.0
  activation: str = 'gelu_tanh'
  dtype: Any = jnp.float32
  scan: bool = False
  remat: str = 'none'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """`[batch, tokens, width]` -> the same."""
    if not 0.0 <= self.stochastic_depth < 1.0:
      raise ValueError(f'stochastic_depth={self.stochastic_depth}: expected a rate in [0, 1)')
    x = positions.LearnedPositions(dtype=self.dtype, name='posembed_input')(x)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)

    def make_block(name):
      return blocks.TransformerBlock(
          heads=self.heads, mlp_dim=self.mlp_dim, dropout_rate=self.dropout_rate,
          attention_dropout_rate=self.attention_dropout_rate, activation=self.activation,
          dtype=self.dtype, name=name)

    layer_inputs = {}
    if self.stochastic_depth and train:
      layer_inputs['branch_drop_rate'] = np.linspace(
          0.0, self.stochastic_depth, self.depth, dtype=np.float32)
    x = blocks.run_blocks(make_block, self.depth, x, prefix='encoderblock', scan=self.scan,
                          remat=self.remat, train=train, layer_inputs=layer_inputs)
    return blocks.layer_norm(1e-6, self.dtype, 'encoder_norm')(x)


class MAPHead(nn.Module):
  """Multihead attention pooling ("Scaling Vision Transformers", arXiv 2106.04560).

  A learned query attends to all tokens; an MLP around a residual follows. The parameters are those
  of big_vision's files.

  Attributes:
    heads: attention heads.
    mlp_dim: hidden width of the MLP.
    activation: of the MLP, a key of `blocks.ACTIVATIONS`.
    dtype: computation dtype.
  """
  heads: int
  mlp_dim: int
  activation: str = 'gelu_tanh'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[batch, tokens, width]` -> `[batch, width]`."""
    batch, _, width = x.shape
    probe = self.param(
        'probe', nn.with_logical_partitioning(
            nn.initializers.xavier_uniform(), (None, None, 'embed')), (1, 1, width), jnp.float32)
    probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
    x = attention.MultiHeadAttention(
        heads=self.heads, dtype=self.dtype, name='MultiHeadDotProductAttention_0')(probe, x)
    y = blocks.layer_norm(1e-6, self.dtype, 'LayerNorm_0')(x)
    y = blocks.MlpBlock(self.mlp_dim, activation=self.activation, dtype=self.dtype,
                        name='MlpBlock_0')(y)
    return (x + y)[:, 0]
