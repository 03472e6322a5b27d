"""The models of the ViT papers by name: ViT, hybrids and BiT from one `config.model`."""

import math
import re
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from core.config import UserError, choose
from vit_family import bit, resnet, vit

_ACTIVATIONS = ('gelu_tanh', 'gelu_erf')
_RATES = ('dropout_rate', 'attention_dropout_rate', 'stochastic_depth')


def is_vit(model_config) -> bool:
  """Whether the config names a ViT or a hybrid, and not a BiT ResNet."""
  return model_config.variant in vit.VARIANTS


def build(model_config, num_classes: int, dtype: Any, remat: str) -> nn.Module:
  """Makes the model that `config.model` describes; `check` says whether it describes one.

  Args:
    model_config: `variant` (a key of `vit.VARIANTS` or `bit.VARIANTS`) and `head_bias_init`; a ViT
      also reads `patch_size`, `backbone` ('' or a key of `resnet.BACKBONES`), `classifier`,
      `representation_size` (0 for none), `dropout_rate`, `attention_dropout_rate`,
      `stochastic_depth`, `activation` and `scan`, which mean nothing to a BiT.
    num_classes: size of the head.
    dtype: computation dtype.
    remat: 'none', 'dots' or 'full'.
  """
  if not is_vit(model_config):
    size = bit.VARIANTS[model_config.variant]
    return bit.BiT(num_classes, size.stages, size.width_factor,
                   head_bias_init=model_config.head_bias_init, dtype=dtype, remat=remat)
  size = vit.VARIANTS[model_config.variant]
  return vit.VisionTransformer(
      num_classes, model_config.patch_size, size.width, size.depth, size.mlp_dim, size.heads,
      classifier=model_config.classifier,
      stages=resnet.BACKBONES[model_config.backbone] if model_config.backbone else None,
      representation_size=model_config.representation_size or None,
      head_bias_init=model_config.head_bias_init, dropout_rate=model_config.dropout_rate,
      attention_dropout_rate=model_config.attention_dropout_rate,
      stochastic_depth=model_config.stochastic_depth, activation=model_config.activation,
      dtype=dtype, scan=model_config.scan, remat=remat)


def downsampling(model_config) -> int:
  """Pixels per side of a token; the sides of images are multiples of it. 1 for a BiT: any size."""
  if not is_vit(model_config):
    return 1
  if not model_config.backbone:
    return model_config.patch_size
  return model_config.patch_size * resnet.downsampling(resnet.BACKBONES[model_config.backbone])


def check(model_config, image_size: int) -> None:
  """Raises `UserError` for a `config.model` that names no model, or not one for this image size.

  Args:
    model_config: see `build`.
    image_size: side of the square images in pixels.
  """
  choose('config.model.variant', model_config.variant, (*vit.VARIANTS, *bit.VARIANTS))
  if not is_vit(model_config):
    return
  if model_config.backbone:
    choose('config.model.backbone', model_config.backbone, resnet.BACKBONES)
  choose('config.model.classifier', model_config.classifier, vit.CLASSIFIERS)
  choose('config.model.activation', model_config.activation, _ACTIVATIONS)
  for name in _RATES:
    if not 0 <= model_config[name] < 1:
      raise UserError(f'config.model.{name}={model_config[name]} is not a rate; it must be at '
                      'least 0 and less than 1')
  if model_config.patch_size < 1:
    raise UserError(f'config.model.patch_size={model_config.patch_size}; it must be at least 1')
  side = downsampling(model_config)
  if image_size < 1 or image_size % side:
    of = f'config.model.patch_size={model_config.patch_size}'
    if model_config.backbone:
      of = (f'{side}, which is {of} times the downsampling of config.model.backbone='
            f'{model_config.backbone!r}')
    near = max(round(image_size / side), 1) * side
    raise UserError(f'config.data.image_size={image_size} is not a multiple of {of}; the nearest '
                    f'is {near}')


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str:
  """Names the model that parameters belong to, for people.

  Args:
    shapes: shapes of the parameters by their flat names, such as 'embedding/kernel'; the encoder's
      blocks may be stacked or not, and the head may be missing.

  Returns:
    'B/16 at 224 px', 'R50+L/32 at 384 px', 'g/14 at 224 px with map', 'BiT-R50x1', or 'an unknown
    model'. As in the papers, R+Ti/16 is named without the factor of its max-pooling.
  """
  root = shapes.get('root_block/standardized_conv2d/kernel')
  if root is not None:
    stages = _stages(shapes, 'a/standardized_conv2d/kernel')
    found = [name for name, size in bit.VARIANTS.items()
             if (size.stages, int(64 * size.width_factor)) == (stages, root[-1])]
    return f'BiT-{found[0]}' if found else 'an unknown model'

  variant = _variant(shapes)
  kernel = shapes.get('embedding/kernel')
  if variant is None or kernel is None:
    return 'an unknown model'
  side = number = kernel[0]
  prefix = ''
  if 'conv_root/kernel' in shapes:
    stages = _stages(shapes, 'conv1/kernel')
    backbones = [name for name, known in resnet.BACKBONES.items() if known == stages]
    if not backbones:
      return 'an unknown model'
    prefix = backbones[0].split('/')[0] + '+'
    side *= resnet.downsampling(stages)
    number = side if stages else side // 2
  name = f'{prefix}{variant}/{number}'
  positions = shapes.get('Transformer/posembed_input/pos_embedding')
  if positions is not None:
    tokens = positions[1] - ('cls' in shapes)
    grid = math.isqrt(tokens)
    name += f' at {grid * side} px' if grid ** 2 == tokens else f' of {tokens} tokens'
  if 'cls' not in shapes:
    name += ' with map' if 'MAPHead_0/probe' in shapes else ' with gap'
  return name


def _stages(shapes: Mapping[str, tuple[int, ...]], one_a_unit: str) -> tuple[int, ...]:
  """Residual units in each stage, counted by a parameter that every unit has."""
  found = [int(match[1]) for match in (
      re.fullmatch(rf'block(\d+)/unit\d+/{one_a_unit}', name) for name in shapes) if match]
  return tuple(found.count(i + 1) for i in range(max(found, default=0)))


def _variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """The key of `vit.VARIANTS` that the encoder's shapes fit."""
  tree = {name.removeprefix('Transformer/'): shape for name, shape in shapes.items()
          if name.startswith('Transformer/encoderblock')}
  query, dense = 'MultiHeadDotProductAttention_0/query/kernel', 'MlpBlock_0/Dense_0/kernel'
  stacked = f'encoderblock/{query}' in tree
  first = 'encoderblock' if stacked else 'encoderblock_0'
  if f'{first}/{query}' not in tree or f'{first}/{dense}' not in tree:
    return None
  width, heads, _ = tree[f'{first}/{query}'][-3:]
  depth = (tree[f'{first}/{query}'][0] if stacked
           else sum(name.endswith(query) for name in tree))
  size = vit.Variant(width, depth, tree[f'{first}/{dense}'][-1], heads)
  return next((name for name, known in vit.VARIANTS.items() if known == size), None)
