"""DETR: backbone, Transformer, and a class and a box for every object query (section 3.2)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from detection import backbone, mask_head, positions, transformer

# Of ImageNet, for values in [0, 1].
_MEAN, _STD = (.485, .456, .406), (.229, .224, .225)
MASKS = ('none', 'joint', 'frozen')


def normalize(images: jax.Array, image_size: jax.Array) -> jax.Array:
  """uint8 `[batch, height, width, 3]` -> float32 with ImageNet's mean and deviation, 0 outside
  the `image_size` int `[batch, 2]` (height and width) of each image."""
  x = (images.astype(jnp.float32) / 255 - jnp.asarray(_MEAN)) / jnp.asarray(_STD)
  inside = positions.valid_cells(image_size, images.shape[1:3], images.shape[1:3])
  return jnp.where(inside[..., None], x, 0.)


class DETR(nn.Module):
  """Detector, with or without the mask head.

  Attributes:
    classes: real classes; the class head has one more, the last, for 'no object'.
    queries: object queries, at least the most objects of an image.
    width: of the Transformer.
    stages, channels, dilation, backbone_norm, freeze_at: see `backbone.ResNet`.
    encoder_layers, decoder_layers, heads, mlp_dim, norm, dropout, positions_at, scan: see
      `transformer.Transformer`.
    positions: 'sine' or 'learned'.
    masks: 'none'; 'joint': with the mask head; 'frozen': the detector beneath it gets no gradient
      (section 4.4, in two stages).
    mask_chunk: see `mask_head.MaskHead`.
    remat: of backbone and Transformer: none, dots or full.
    dtype: computation dtype; heads compute in float32.
  """
  classes: int
  queries: int = 100
  width: int = 256
  stages: Sequence[int] = (3, 4, 6, 3)
  channels: int = 64
  dilation: bool = False
  backbone_norm: str = 'frozen'
  freeze_at: int = 2
  encoder_layers: int = 6
  decoder_layers: int = 6
  heads: int = 8
  mlp_dim: int = 2048
  norm: str = 'post'
  positions: str = 'sine'
  positions_at: str = 'attention'
  dropout: float = 0.1
  masks: str = 'none'
  mask_chunk: int = 0
  scan: bool = True
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, image_size: jax.Array, *,
               train: bool = False) -> dict[str, jax.Array]:
    """Detects.

    Args:
      images: uint8 `[batch, height, width, 3]`, padded below and to the right.
      image_size: int `[batch, 2]`, height and width without the padding.
      train: draws dropout from the rng 'dropout'.

    Returns:
      'logits' float32 `[layers, batch, queries, classes + 1]` and 'boxes' float32 `[layers, batch,
      queries, 4]`, cxcywh relative to the unpadded image, of every decoder layer; with the mask
      head 'masks' float32 `[batch, queries, height/4, width/4]`, logits of the last layer's.
    """
    pyramid = backbone.ResNet(
        tuple(self.stages), self.channels, self.dilation, self.backbone_norm, self.freeze_at,
        self.remat, self.dtype, name='backbone')(normalize(images, image_size))
    batch, *cells, channels = pyramid[-1].shape
    features = transformer.dense(self.width, channels, 'input_proj', dtype=self.dtype)(pyramid[-1])
    valid = positions.valid_cells(image_size, images.shape[1:3], tuple(cells))
    at = (positions.sine(valid, self.width) if self.positions == 'sine' else
          positions.Learned(self.width, name='position_embedding')(valid))
    flat = lambda x: x.reshape(batch, cells[0] * cells[1], *x.shape[3:])
    queries = self.param(
        'query_embed', nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, 'embed')),
        (self.queries, self.width), jnp.float32)
    # With the detector frozen nothing in it is random either, as in evaluation.
    random = train and self.masks != 'frozen'
    found, memory = transformer.Transformer(
        self.encoder_layers, self.decoder_layers, self.heads, self.mlp_dim, self.norm,
        self.dropout, self.positions_at, self.scan, self.remat, self.dtype, name='transformer')(
            flat(features), flat(at), flat(valid), queries, train=random)

    found32 = found.astype(jnp.float32)
    logits = transformer.dense(self.classes + 1, self.width, 'class_embed',
                               names=('embed', 'classes'))(found32)
    x = found32
    for i in range(2):
      x = nn.relu(transformer.dense(self.width, self.width, f'bbox_embed_{i}')(x))
    boxes = nn.sigmoid(transformer.dense(4, self.width, 'bbox_embed_2', names=('embed', None))(x))
    outputs = {'logits': logits, 'boxes': boxes}
    if self.masks == 'none':
      return outputs

    memory = memory.reshape(features.shape)
    inputs = (found[-1], memory, features, pyramid[-2::-1])
    if self.masks == 'frozen':
      outputs, inputs = lax.stop_gradient((outputs, inputs))
    queried, memory, features, pyramid = inputs
    maps = mask_head.BoxAttention(self.heads, self.width, self.dtype, name='bbox_attention')(
        queried, memory, valid)
    outputs['masks'] = mask_head.MaskHead(
        dtype=self.dtype, chunk=self.mask_chunk, name='mask_head')(features, maps, pyramid)
    return outputs
