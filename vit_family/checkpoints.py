"""Public ViT checkpoints: Google's `.npz` layout and the way to and from our parameters.

The public files number the parts of a block in one sequence (LayerNorm_0,
MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3), as flax did before linen; our modules
number each type by itself. Blocks are stored one by one; ours may be stacked by `nn.scan`.
"""

import pathlib
import re
import zipfile

import flax
import jax
import numpy as np

from core.config import UserError
from core.nn import blocks

# Ours -> public, within an encoder block.
_RENAMED = {
    'LayerNorm_0': 'LayerNorm_0',
    'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
    'LayerNorm_1': 'LayerNorm_2',
    'MlpBlock_0': 'MlpBlock_3',
}
_BLOCK = re.compile(r'^(Transformer/encoderblock_\d+)/([^/]+)/(.*)$')


def _rename(name: str, table: dict[str, str]) -> str:
  match = _BLOCK.match(name)
  return f'{match[1]}/{table.get(match[2], match[2])}/{match[3]}' if match else name


def to_public(params) -> dict[str, np.ndarray]:
  """Parameters of a `VisionTransformer` as the flat dictionary of the public files."""
  params = jax.tree.map(np.asarray, flax.core.unfreeze(params))
  if 'encoderblock' in params['Transformer']:
    params = {**params,
              'Transformer': blocks.unstack_layers(params['Transformer'], 'encoderblock')}
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  return {_rename(name, _RENAMED): value for name, value in flat.items()}


def from_public(flat: dict[str, np.ndarray], scan: bool):
  """The inverse of `to_public`; `scan` says whether the blocks are to be stacked."""
  inverse = {public: ours for ours, public in _RENAMED.items()}
  params = flax.traverse_util.unflatten_dict(
      {_rename(name, inverse): np.asarray(value) for name, value in flat.items()}, sep='/')
  if scan and 'encoderblock_0' in params.get('Transformer', {}):
    params['Transformer'] = blocks.stack_layers(params['Transformer'], 'encoderblock')
  return params


def write_npz(params, path: pathlib.Path) -> pathlib.Path:
  """Writes `path` with the ending .npz; returns the file."""
  path = path.with_suffix('.npz')
  np.savez(path, **to_public(params))
  return path


def read_npz(path: str, params):
  """Reads a public file into a tree like `params`.

  Args:
    path: a `.npz` in the public layout.
    params: the model's parameters (shapes are enough).

  Raises:
    UserError: not a `.npz` file.
  """
  try:
    with np.load(path, allow_pickle=False) as archive:
      flat = {name: archive[name] for name in archive.files}
  except (ValueError, OSError, AttributeError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(f'{path}: not a .npz of arrays ({e}); public ViT checkpoints end in '
                    '.npz') from e
  return from_public(flat, scan='encoderblock' in params['Transformer'])
