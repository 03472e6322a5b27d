"""Names of DETR's weights in the torch world, and ours.

Four layouts hold the same tensors: that of the reference implementation, those of Hugging Face
transformers (of files, and of modules since version 5) and, of the backbone alone, those that
torchvision and timm share and that of transformers' ResNet. No name means two things, so each is
translated by itself. torch stores a matrix as `[outputs, inputs]` and a convolution as `[outputs,
inputs, height, width]`; attention heads are folded into the width, and none of the layouts says how
many there are.
"""

import re
from collections.abc import Mapping

import numpy as np

from core.weights import Weight, Weights
from detection.transformer import LAYERS

# What torchvision adds to the variance of a batch norm, frozen or not.
BATCH_NORM_EPSILON = 1e-5
_STATISTICS = ('weight', 'bias', 'running_mean', 'running_var')

_BACKBONE = re.compile(
    r'(?:backbone\.0\.body\.|model\.backbone\.(?:conv_encoder\.)?model\.|resnet\.)?(.+)')
_TORCHVISION = re.compile(r'(?:layer(\d)\.(\d+)\.)?(?:(?:conv|bn)(\d)|(downsample)\.[01])')
_HF_UNIT = re.compile(r'encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d)|(shortcut))\.'
                      r'(?:convolution|normalization)')
_HF_STEM = re.compile(r'embedder\.embedder\.(?:convolution|normalization)')

_SIDE = re.compile(r'(?:transformer|model)\.(encoder|decoder)\.(?:layers\.(\d+)\.(.+)|(.+))')
_REFERENCE_LAYER = {
    'linear1': 'linear1', 'linear2': 'linear2', 'self_attn': 'self_attn',
    'multihead_attn': 'cross_attn', 'self_attn.out_proj': 'self_attn/out',
    'multihead_attn.out_proj': 'cross_attn/out', **{f'norm{i}': f'norm{i}' for i in (1, 2, 3)}}
_HF_ATTENTION = {'q_proj': 'query', 'k_proj': 'key', 'v_proj': 'value', 'out_proj': 'out'}
_HF_LAYER = {
    'fc1': 'linear1', 'fc2': 'linear2',
    **{f'{its}.{theirs}': f'{mine}/{ours}' for its, mine in (
        ('self_attn', 'self_attn'), ('encoder_attn', 'cross_attn'))
       for theirs, ours in _HF_ATTENTION.items()}}
_HF_NORMS = {
    'encoder': {'self_attn_layer_norm': 'norm1', 'final_layer_norm': 'norm2'},
    'decoder': {'self_attn_layer_norm': 'norm1', 'encoder_attn_layer_norm': 'norm2',
                'final_layer_norm': 'norm3'}}

_REFERENCE = {
    'input_proj': 'input_proj', 'query_embed': 'query_embed', 'class_embed': 'class_embed',
    **{f'bbox_embed.layers.{i}': f'bbox_embed_{i}' for i in range(3)},
    'backbone.1.row_embed': 'position_embedding/row_embed',
    'backbone.1.col_embed': 'position_embedding/col_embed'}
_HF = {
    'model.input_projection': 'input_proj', 'model.query_position_embeddings': 'query_embed',
    'class_labels_classifier': 'class_embed',
    **{f'bbox_predictor.layers.{i}': f'bbox_embed_{i}' for i in range(3)},
    'model.position_embedding.row_embeddings': 'position_embedding/row_embed',
    'model.position_embedding.column_embeddings': 'position_embedding/col_embed'}
# The same in files of the reference implementation and of transformers.
_MASKS = {
    'bbox_attention.q_linear': 'bbox_attention/query',
    'bbox_attention.k_linear': 'bbox_attention/key',
    **{f'mask_head.{name}': f'mask_head/{name}' for name in (
        *(f'{kind}{i}' for kind in ('lay', 'gn') for i in range(1, 6)),
        'adapter1', 'adapter2', 'adapter3', 'out_lay')}}
# From the names of modules since transformers 5, and of older files, to those of files.
_HF_RENAMED = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r'\.o_proj$', '.out_proj'), (r'\.mlp\.(fc\d)$', r'.\1'),
    (r'^model\.backbone\.position_embedding\.', 'model.position_embedding.'),
    (r'^bbox_attention\.([qk])_proj$', r'bbox_attention.\1_linear'),
    (r'^mask_head\.conv(\d)\.conv$', r'mask_head.lay\1'),
    (r'^mask_head\.conv(\d)\.norm$', r'mask_head.gn\1'),
    (r'^mask_head\.output_conv$', 'mask_head.out_lay'),
    *((rf'^mask_head\.fpn_stages\.{i}\.{theirs}$', f'mask_head.{file}') for i in range(3)
      for theirs, file in (('fpn_adapter', f'adapter{i + 1}'), (r'refine\.conv', f'lay{i + 3}'),
                           (r'refine\.norm', f'gn{i + 3}'))))]

# Parameters that are tables: as they are, without a name of their own for the array.
_TABLES = ('query_embed', 'position_embedding/row_embed', 'position_embedding/col_embed')
_NORM = re.compile(r'/(norm\d?|gn\d)$')
_ATTENTION = re.compile(r'(?:self|cross)_attn/(query|key|value|out)$')


def from_torch(weights: Weights) -> dict[str, Weight]:
  """Names, orientation and batch norms of any of the layouts to ours, unread.

  A batch norm becomes the scale weight / sqrt(running_var + 1e-5) and the bias bias - running_mean
  scale. Attention keeps its heads folded, `[width, width]` and `[width]`; layers are single.
  Names that it does not know stay as they are.
  """
  result: dict[str, Weight] = {}
  norms: dict[str, dict[str, tuple[str, Weight]]] = {}
  for name, weight in weights.items():
    module, _, leaf = name.removeprefix('detr.').rpartition('.')
    if leaf == 'num_batches_tracked':
      continue
    ours = _module(module)
    if ours is None:
      result[name] = weight
    elif leaf in ('in_proj_weight', 'in_proj_bias'):
      # One matrix [3 width, width] for query, key and value.
      leaf = leaf.removeprefix('in_proj_')
      for i, part in enumerate(('query', 'key', 'value')):
        result[_leaf(f'{ours}/{part}', leaf)] = _flax(ours, _third(weight, i))
    elif ours.startswith('backbone/') and len(weight.shape) != 4:
      norms.setdefault(ours, {})[leaf] = (name, weight)
    else:
      result[_leaf(ours, leaf)] = _flax(ours, weight)
  for ours, found in norms.items():
    if set(found) == set(_STATISTICS):
      result |= _folded_norm(ours, *(found[leaf][1] for leaf in _STATISTICS))
    else:
      result |= dict(found.values())
  return result


def _module(name: str) -> str | None:
  """Our name of a module of theirs; None for one that no DETR has."""
  for pattern, replacement in _HF_RENAMED:
    name = pattern.sub(replacement, name)
  if match := _SIDE.fullmatch(name):
    side, layer, part, rest = match.groups()
    if layer is None:
      return f'transformer/{side}/norm' if rest in ('norm', 'layernorm') else None
    ours = (_REFERENCE_LAYER | _HF_LAYER | _HF_NORMS[side]).get(part)
    return ours and f'transformer/{side}/{LAYERS}_{layer}/{ours}'
  return (_REFERENCE | _HF | _MASKS).get(name) or _backbone_module(_BACKBONE.fullmatch(name)[1]
                                                                  if name else '')


def _backbone_module(name: str) -> str | None:
  """Our name of a convolution, and of the norm behind it."""
  if _HF_STEM.fullmatch(name):
    return 'backbone/conv1'
  if match := _HF_UNIT.fullmatch(name):
    stage, unit, conv, _ = match.groups()
    last = 'downsample' if conv is None else f'conv{int(conv) + 1}'
    return f'backbone/layer{int(stage) + 1}_{unit}/{last}'
  if match := _TORCHVISION.fullmatch(name):
    stage, unit, conv, downsample = match.groups()
    last = downsample or f'conv{conv}'
    return f'backbone/layer{stage}_{unit}/{last}' if stage else f'backbone/{last}'
  return None


def _leaf(module: str, leaf: str) -> str:
  if module in _TABLES:
    return module
  if leaf == 'weight':
    leaf = 'scale' if _NORM.search(module) else 'kernel'
  return f'{module}/{leaf}'


def _flax(module: str, weight: Weight) -> Weight:
  """A tensor of theirs in our orientation."""
  if module in _TABLES:
    return weight
  if len(weight.shape) == 2:
    return weight.map(weight.shape[::-1], np.transpose)
  if len(weight.shape) == 4:
    out, inputs, height, width = weight.shape
    if module == 'input_proj':  # A 1x1 convolution there.
      return weight.map((inputs, out), lambda value: value[..., 0, 0].T)
    return weight.map((height, width, inputs, out), lambda value: value.transpose(2, 3, 1, 0))
  return weight


def _third(weight: Weight, index: int) -> Weight:
  size = weight.shape[0] // 3
  return weight.map((size, *weight.shape[1:]),
                    lambda value: value[index * size:(index + 1) * size])


def _folded_norm(module: str, weight: Weight, bias: Weight, mean: Weight,
                 variance: Weight) -> dict[str, Weight]:
  def scale():
    wide = variance.read().astype(np.float64)
    return weight.read().astype(np.float64) / np.sqrt(wide + BATCH_NORM_EPSILON)

  def shift():
    return bias.read().astype(np.float64) - mean.read().astype(np.float64) * scale()
  single = lambda fn: Weight(weight.shape, lambda: fn().astype(np.float32))
  return {f'{module}/scale': single(scale), f'{module}/bias': single(shift)}


def to_huggingface(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Parameters of ours as the tensors of `DetrForObjectDetection` over transformers' ResNet, or
  with the mask head of `DetrForSegmentation`.

  Args:
    params: flat, names joined by '/', layers single; the backbone's norms frozen, the Transformer's
      behind their branches ('post').

  Returns:
    float32, heads folded. A batch norm of scale s and bias b has weight s, bias b, mean 0 and the
    variance that 1e-5 makes 1.
  """
  other = {ours: theirs for theirs, ours in (_HF | _MASKS).items()}
  segmentation = any(name.startswith('mask_head/') for name in params)
  result = {}
  for name, value in params.items():
    module, leaf = (name, 'weight') if name in _TABLES else name.rsplit('/', 1)
    value = np.asarray(value, np.float32)
    if match := _ATTENTION.search(module):
      value = _folded_heads(match[1], leaf, value)
    if module == 'input_proj' and leaf == 'kernel':
      value = value.T[..., None, None]
    elif name not in _TABLES:
      value = value.T if value.ndim == 2 else value
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    theirs = _hf_backbone(module, leaf) or _hf_layer(module) or other[module]
    prefix = 'detr.' if segmentation and module not in _MASKS.values() else ''
    leaf = 'bias' if leaf == 'bias' else 'weight'
    result[f'{prefix}{theirs}.{leaf}'] = np.ascontiguousarray(value)
    if name.startswith('backbone/') and name.endswith('/scale'):
      result[f'{prefix}{theirs}.running_mean'] = np.zeros_like(value)
      result[f'{prefix}{theirs}.running_var'] = np.full_like(value, 1 - BATCH_NORM_EPSILON)
  return result


def _folded_heads(part: str, leaf: str, value: np.ndarray) -> np.ndarray:
  if leaf == 'bias':
    return value.reshape(-1)
  return value.reshape(-1, value.shape[-1]) if part == 'out' else value.reshape(len(value), -1)


def _hf_backbone(module: str, leaf: str) -> str | None:
  kind = 'convolution' if leaf == 'kernel' else 'normalization'
  if module == 'backbone/conv1':
    return f'model.backbone.conv_encoder.model.embedder.embedder.{kind}'
  if match := re.fullmatch(r'backbone/layer(\d)_(\d+)/(?:conv(\d)|downsample)', module):
    stage, unit, conv = match.groups()
    part = f'layer.{int(conv) - 1}' if conv else 'shortcut'
    return (f'model.backbone.conv_encoder.model.encoder.stages.{int(stage) - 1}.layers.{unit}.'
            f'{part}.{kind}')
  return None


def _hf_layer(module: str) -> str | None:
  if module == 'transformer/decoder/norm':
    return 'model.decoder.layernorm'
  if match := re.fullmatch(rf'transformer/(encoder|decoder)/{LAYERS}_(\d+)/(.+)', module):
    side, layer, part = match.groups()
    names = {ours: theirs for theirs, ours in (_HF_LAYER | _HF_NORMS[side]).items()}
    return f'model.{side}.layers.{layer}.{names[part]}'
  return None
