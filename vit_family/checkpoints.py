"""Public checkpoints of Google: `.npz` files of ViT, its hybrids, big_vision and BiT.

The original ViT files number the parts of a block in one sequence (LayerNorm_0,
MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3), as flax did before linen; our modules
number each type by itself, as big_vision's files do. Blocks are stored one by one, or in
big_vision also stacked.
"""

import pathlib
import re

import flax
import jax
import numpy as np

from core.config import UserError
from core.nn import blocks
from core.weights import Weight, Weights, appearing, open_npz, open_safetensors
from vit_family.transfer import POSITIONS

# Ours -> public, within an encoder block.
_RENAMED = {
    'LayerNorm_0': 'LayerNorm_0',
    'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
    'LayerNorm_1': 'LayerNorm_2',
    'MlpBlock_0': 'MlpBlock_3',
}
_BLOCK = re.compile(r'^(Transformer/encoderblock_\d+)/([^/]+)/(.*)$')
# Group norms of the hybrids, whose public scales and biases have the shape of an image.
_GROUP_NORM = re.compile(r'(^|/)(gn\d|gn_root|gn_proj|group_norm)/')
# Outermost first. What lies beside them (an optimizer's state, a text tower) is no image model.
_WRAPPERS = ('opt/target/', 'params/', 'img/')


def open_weights(path: pathlib.Path) -> dict[str, Weight]:
  """Public weights under our names, unread.

  Args:
    path: Google's `.npz`, a `.safetensors` file with names of transformers or timm, or the folder
      that holds a `model.safetensors`.

  Raises:
    UserError: none of these, or cut short.
  """
  from vit_family import torch_layouts
  if path.is_dir():
    if not (path / 'model.safetensors').exists():
      raise UserError(f'{path}: neither a workdir (no checkpoints/) nor a folder of transformers '
                      '(no model.safetensors)')
    path = path / 'model.safetensors'
  if path.suffix not in ('.npz', '.safetensors'):
    raise UserError(f'{path}: not a .npz or .safetensors file; pickles (.bin, .pth) are never '
                    'read, have transformers or timm save them as .safetensors')
  if path.suffix == '.safetensors':
    return torch_layouts.from_torch(open_safetensors(path))
  return from_public(open_npz(path))


def from_public(weights: Weights) -> dict[str, Weight]:
  """Google's names and shapes to ours; names it does not know stay as they are."""
  for wrapper in _WRAPPERS:
    weights = {name.removeprefix(wrapper): weight for name, weight in weights.items()
               if name.startswith(wrapper)} or weights
  inverse = {public: ours for ours, public in _RENAMED.items()}
  result = {}
  for name, weight in weights.items():
    if name.startswith('resnet/'):
      name, weight = _from_bit(name.removeprefix('resnet/'), weight)
    if _GROUP_NORM.search(name):
      weight = weight.map(weight.shape[-1:], np.ravel)
    if name == 'pos_embedding':
      name, weight = POSITIONS, _with_class_position(weight) if 'cls' in weights else weight
    result[_rename(name, inverse)] = weight
  return result


def to_public(params) -> dict[str, np.ndarray]:
  """Parameters of ours as the flat dictionary of the public files: the inverse of `from_public`."""
  params = jax.tree.map(np.asarray, flax.core.unfreeze(params))
  if 'encoderblock' in params.get('Transformer', {}):
    params = {**params,
              'Transformer': blocks.unstack_layers(params['Transformer'], 'encoderblock')}
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  if 'root_block' in params:
    head = {'head/kernel': 'head/conv2d/kernel', 'head/bias': 'head/conv2d/bias'}
    return {f'resnet/{head.get(name, name)}':
            value[None, None] if name == 'head/kernel' else value for name, value in flat.items()}
  return {_rename(name, _RENAMED):
          value.reshape(1, 1, 1, -1) if _GROUP_NORM.search(name) else value
          for name, value in flat.items()}


def write_npz(params, path: pathlib.Path) -> pathlib.Path:
  """Writes `path` with the ending .npz; returns the file, which appears only when it is whole."""
  path = path.with_suffix('.npz')
  with appearing(path) as temporary, temporary.open('wb') as file:
    np.savez(file, **to_public(params))
  return path


def _rename(name: str, table: dict[str, str]) -> str:
  match = _BLOCK.match(name)
  return f'{match[1]}/{table.get(match[2], match[2])}/{match[3]}' if match else name


def _from_bit(name: str, weight: Weight) -> tuple[str, Weight]:
  # Some files carry the counter of the code that made them.
  name = re.sub(r'standardized_conv2d_\d+', 'standardized_conv2d', name)
  name = name.replace('head/conv2d/', 'head/')
  if name == 'head/kernel':  # a 1x1 convolution there
    weight = weight.map(weight.shape[-2:], lambda value: value.reshape(value.shape[-2:]))
  return name, weight


def _with_class_position(weight: Weight) -> Weight:
  """big_vision adds positions before the class token joins; ours, after: its entry is zero."""
  one, tokens, width = weight.shape
  return weight.map((one, tokens + 1, width),
                    lambda table: np.concatenate([np.zeros_like(table[:, :1]), table], axis=1))
