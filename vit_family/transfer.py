"""Fitting saved weights to a model: layers, heads, position embeddings (ViT sections 3.2 and 4)."""

import math

import jax
import numpy as np
from absl import logging

from core import partition
from core.config import UserError
from core.weights import Notes, Weight, Weights, match_layers

LAYERS = 'Transformer/encoderblock'
POSITIONS = 'Transformer/posembed_input/pos_embedding'

# What a model may have that its pretraining had not; it then starts fresh.
_MAY_BE_FRESH = ('head', 'pre_logits', 'cls', 'MAPHead_0', 'patch_head', 'mask_token')


def adapt(weights: Weights, params_shape, transfer: bool) -> tuple[dict[str, Weight], Notes]:
  """Fits weights to a model of this package.

  Layers are stacked or unstacked as the model has them. For a transfer, the head of the
  pretraining is left out (ViT section 3.2: a new zero-initialised one takes its place), and so is
  its `pre_logits` unless the model has one of the same width; position embeddings are interpolated
  to the model's grid, with or without an entry for the class token; whatever else the model has
  no use for is left out. All of it is noted.

  Args:
    weights: under our names; attention kernels may have their heads folded, as torch stores them.
    params_shape: the model's parameters, as shapes.
    transfer: False wants the weights as they are.

  Raises:
    UserError: position embeddings of another grid that is not square.
  """
  want = {partition.path_name(path): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params_shape)}
  source = match_layers(weights, want, LAYERS)
  source = {name: _unfolded(name, weight, want.get(name)) for name, weight in source.items()}
  looks_like = _looks_like({name: weight.shape for name, weight in source.items()})
  if not transfer:
    if head := source.get('head/kernel'):
      source['head/kernel'] = head.map(head.shape, _warn_if_zero)
    return source, Notes(looks_like)

  used = {name: weight for name, weight in source.items()
          if name in want and not name.startswith('head/')}
  kernel = source.get('pre_logits/kernel')
  if kernel is not None and kernel.shape != want.get('pre_logits/kernel'):
    used = {name: weight for name, weight in used.items() if not name.startswith('pre_logits/')}
  resized = ()
  if POSITIONS in used and used[POSITIONS].shape[2:] == want[POSITIONS][2:]:
    used[POSITIONS], resized = _positions(
        used[POSITIONS], want[POSITIONS], 'cls' in source, 'cls' in want)
  fresh = tuple(name for name in want
                if name not in used and name.split('/')[0] in _MAY_BE_FRESH)
  unused = tuple(name for name in source if name not in used)
  return used, Notes(looks_like, unused, fresh, resized)


def _looks_like(shapes: dict[str, tuple[int, ...]]) -> str:
  """The model's name; where heads are still folded, they are those of a variant of that width."""
  from vit_family import vit, zoo  # they know all models; weights need them for one phrase

  def split(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    layers = name.startswith(f'{LAYERS}/')
    if not name.endswith('MultiHeadDotProductAttention_0/query/kernel') or len(shape) - layers != 2:
      return shape
    heads = next((v.heads for v in vit.VARIANTS.values() if v.width == shape[-1]), 1)
    return (*shape[:-1], heads, shape[-1] // heads)
  return zoo.looks_like({name: split(name, shape) for name, shape in shapes.items()})


def _warn_if_zero(kernel: np.ndarray) -> np.ndarray:
  # The original ImageNet-21k files were published with their heads erased.
  if not kernel.any():
    logging.warning('the head of these weights is zero: every class gets the same score until '
                    'they are fine-tuned')
  return kernel


def _unfolded(name: str, weight: Weight, want: tuple[int, ...] | None) -> Weight:
  """Splits attention heads that are folded into the width, `[D, D]` to `[D, heads, D / heads]`."""
  folded = (want is not None and 'MultiHeadDotProductAttention_' in name
            and len(weight.shape) == len(want) - 1
            and math.prod(weight.shape) == math.prod(want))
  return weight.map(want, lambda value: value.reshape(want)) if folded else weight


def _positions(weight: Weight, want: tuple[int, ...], has_cls: bool,
               wants_cls: bool) -> tuple[Weight, tuple[str, ...]]:
  """Position embeddings `[1, tokens, width]` for another grid or another classifier, and a note.

  The class token's entry is never interpolated. Where there was none it is zero, which changes
  nothing: it would be added to a class token that starts fresh.
  """
  old, new = weight.shape[1] - has_cls, want[1] - wants_cls
  if (old, has_cls) == (new, wants_cls):
    return weight, ()
  side, new_side = math.isqrt(old), math.isqrt(new)
  if side ** 2 != old or new_side ** 2 != new:
    raise UserError(f'config.init_from: {POSITIONS} has {old} positions and the model {new}; only '
                    'square grids can be interpolated')

  def fit(table: np.ndarray) -> np.ndarray:
    table = np.asarray(table, np.float32)
    cls, grid = table[:, :int(has_cls)], table[0, int(has_cls):]
    grid = zoom(grid.reshape(side, side, -1), new_side).reshape(1, new, -1)
    if not wants_cls:
      return grid
    return np.concatenate([cls if has_cls else np.zeros_like(grid[:, :1]), grid], axis=1)

  change = f'{POSITIONS} {side}x{side} to {new_side}x{new_side}'
  if has_cls != wants_cls:
    change += f' {"with" if wants_cls else "without"} a class token'
  return weight.map(want, fit), (change,)


def zoom(grid: np.ndarray, size: int) -> np.ndarray:
  """Linear interpolation of a square grid whose corners stay corners (ViT section 3.2).

  This is the interpolation of the public ViT code, scipy.ndimage.zoom of order 1; the half-pixel
  rule of image resizing gives other values.

  Args:
    grid: `[side, side, width]`.
    size: the new side.

  Returns:
    float32 `[size, size, width]`, computed in float64.
  """
  matrix = interpolation_matrix(grid.shape[0], size)
  return np.einsum('ai,bj,ijd->abd', matrix, matrix, grid.astype(np.float64),
                   optimize=True).astype(np.float32)


def interpolation_matrix(old: int, new: int) -> np.ndarray:
  """float64 `[new, old]`; row j weighs the two neighbours of position j (old - 1) / (new - 1)."""
  at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 1.)
  return np.maximum(0., 1. - np.abs(at[:, None] - np.arange(old)))
