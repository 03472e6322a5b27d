"""ViT weights in the torch world: names of Hugging Face transformers and of timm.

Both store a matrix as `[outputs, inputs]`, a convolution as `[outputs, inputs, height, width]`, and
attention heads folded into the width; timm fuses query, key and value.
"""

import json
import pathlib
import re

import flax
import numpy as np

from core.config import UserError
from core.nn import blocks
from core.weights import Weight, Weights, appearing
from vit_family.transfer import LAYERS, POSITIONS

_ATTENTION = 'MultiHeadDotProductAttention_0'
_NORM = re.compile(r'(LayerNorm_\d|encoder_norm|gn\d|gn_root|gn_proj)$')
_HF_LAYER = re.compile(r'(?:encoder\.layer|layers)\.(\d+)\.(.+)')
# The names of files, which are the older ones, and those of modules since transformers 5.
_HF_BLOCK = {
    'layernorm_before': 'LayerNorm_0', 'layernorm_after': 'LayerNorm_1',
    'attention.attention.query': f'{_ATTENTION}/query',
    'attention.attention.key': f'{_ATTENTION}/key',
    'attention.attention.value': f'{_ATTENTION}/value',
    'attention.output.dense': f'{_ATTENTION}/out',
    'intermediate.dense': 'MlpBlock_0/Dense_0', 'output.dense': 'MlpBlock_0/Dense_1'}
_HF_BLOCK_NEW = {
    'attention.q_proj': f'{_ATTENTION}/query', 'attention.k_proj': f'{_ATTENTION}/key',
    'attention.v_proj': f'{_ATTENTION}/value', 'attention.o_proj': f'{_ATTENTION}/out',
    'mlp.fc1': 'MlpBlock_0/Dense_0', 'mlp.fc2': 'MlpBlock_0/Dense_1'}
_HF = {
    'embeddings.cls_token': 'cls', 'embeddings.position_embeddings': POSITIONS,
    'embeddings.patch_embeddings.projection': 'embedding', 'layernorm': 'Transformer/encoder_norm',
    'classifier': 'head'}
# The tanh layer of the original pretraining; transformers has it in ViTModel alone.
_HF_POOLER = {'pooler.dense': 'pre_logits'}
_TIMM_LAYER = re.compile(r'blocks\.(\d+)\.(.+)')
_TIMM_BLOCK = {
    'norm1': 'LayerNorm_0', 'norm2': 'LayerNorm_1', 'attn.proj': f'{_ATTENTION}/out',
    'mlp.fc1': 'MlpBlock_0/Dense_0', 'mlp.fc2': 'MlpBlock_0/Dense_1'}
_TIMM = {
    'cls_token': 'cls', 'pos_embed': POSITIONS, 'patch_embed.proj': 'embedding',
    'norm': 'Transformer/encoder_norm', 'pre_logits.fc': 'pre_logits', 'head': 'head',
    'patch_embed.backbone.stem.conv': 'conv_root', 'patch_embed.backbone.stem.norm': 'gn_root',
    # A stem without stages behind it is the whole backbone.
    'patch_embed.backbone.conv': 'conv_root', 'patch_embed.backbone.norm': 'gn_root'}
_TIMM_UNIT = re.compile(r'patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.+)')
_TIMM_CONVS = {
    **{f'conv{i}': f'conv{i}' for i in (1, 2, 3)}, **{f'norm{i}': f'gn{i}' for i in (1, 2, 3)},
    'downsample.conv': 'conv_proj', 'downsample.norm': 'gn_proj'}


def from_torch(weights: Weights) -> dict[str, Weight]:
  """Names and orientation of transformers or timm to ours; unknown names stay as they are.

  Attention keeps its heads folded, `[D, D]` and `[D]`: neither layout says how many there are.
  """
  timm = any(name.startswith(('blocks.', 'patch_embed.')) for name in weights)
  result = {}
  for name, weight in weights.items():
    module, leaf = name.rsplit('.', 1) if name.endswith(('.weight', '.bias')) else (name, '')
    if timm and module.endswith('attn.qkv') and (match := _TIMM_LAYER.fullmatch(module)):
      for i, part in enumerate(('query', 'key', 'value')):
        ours = f'{LAYERS}_{match[1]}/{_ATTENTION}/{part}'
        result[_leaf(ours, leaf)] = _flax(_third(weight, i))
      continue
    ours = _timm_module(module) if timm else _hf_module(module.removeprefix('vit.'))
    if ours is None:
      result[name] = weight
    else:
      result[_leaf(ours, leaf)] = _flax(weight)
  return result


def _hf_module(name: str) -> str | None:
  if match := _HF_LAYER.fullmatch(name):
    ours = (_HF_BLOCK | _HF_BLOCK_NEW).get(match[2])
    return ours and f'{LAYERS}_{match[1]}/{ours}'
  return (_HF | _HF_POOLER).get(name)


def _timm_module(name: str) -> str | None:
  if match := _TIMM_LAYER.fullmatch(name):
    ours = _TIMM_BLOCK.get(match[2])
    return ours and f'{LAYERS}_{match[1]}/{ours}'
  if match := _TIMM_UNIT.fullmatch(name):  # blocks and units count from 1 with us
    ours = _TIMM_CONVS.get(match[3])
    return ours and f'block{int(match[1]) + 1}/unit{int(match[2]) + 1}/{ours}'
  return _TIMM.get(name)


def _leaf(module: str, leaf: str) -> str:
  if leaf == 'weight':
    leaf = 'scale' if _NORM.search(module) else 'kernel'
  return f'{module}/{leaf}' if leaf else module


def _flax(weight: Weight) -> Weight:
  """A torch tensor in flax's orientation."""
  if len(weight.shape) == 2:
    return weight.map(weight.shape[::-1], np.transpose)
  if len(weight.shape) == 4:
    out, inputs, height, width = weight.shape
    return weight.map((height, width, inputs, out), lambda value: value.transpose(2, 3, 1, 0))
  return weight


def _third(weight: Weight, index: int) -> Weight:
  size = weight.shape[0] // 3
  return weight.map((size, *weight.shape[1:]),
                    lambda value: value[index * size:(index + 1) * size])


def to_huggingface(params) -> dict[str, np.ndarray]:
  """Parameters of ours as the tensors of `ViTForImageClassification`.

  Raises:
    UserError: a model that it cannot hold.
  """
  for part, what in (('MAPHead_0', "classifier='map'"), ('root_block', 'a BiT ResNet'),
                     ('conv_root', 'a hybrid'), ('pre_logits', 'a pre_logits layer')):
    if part in params:
      raise UserError(f"config.model.export='huggingface' cannot hold {what}; use 'npz'")
  if 'cls' not in params:
    raise UserError("config.model.export='huggingface' cannot hold classifier='gap', only "
                    "'token'; use 'npz'")
  if 'encoderblock' in params['Transformer']:
    params = {**params,
              'Transformer': blocks.unstack_layers(params['Transformer'], 'encoderblock')}
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params), sep='/')
  block = {ours: f'encoder.layer.{{}}.{theirs}' for theirs, ours in _HF_BLOCK.items()}
  other = {ours: theirs for theirs, ours in _HF.items()}
  result = {}
  for name, value in flat.items():
    value = np.asarray(value, np.float32)
    if _ATTENTION in name:
      value = _folded(name, value)
    if value.ndim == 2:
      value = value.T
    elif value.ndim == 4:
      value = value.transpose(3, 2, 0, 1)
    module, leaf = name, ''
    if name.endswith(('/kernel', '/scale', '/bias')):
      module, leaf = name.rsplit('/', 1)
      leaf = '.bias' if leaf == 'bias' else '.weight'
    if match := re.fullmatch(rf'{LAYERS}_(\d+)/(.+)', module):
      theirs = block[match[2]].format(match[1])
    else:
      theirs = other[module]
    prefix = '' if theirs == 'classifier' else 'vit.'
    result[f'{prefix}{theirs}{leaf}'] = np.ascontiguousarray(value)
  return result


def _folded(name: str, value: np.ndarray) -> np.ndarray:
  if name.endswith('bias'):
    return value.reshape(-1)
  return value.reshape(-1, value.shape[-1]) if '/out/' in name else value.reshape(len(value), -1)


def write_huggingface(params, path: pathlib.Path, *, image_size: int, activation: str,
                      class_names: list[str]) -> pathlib.Path:
  """Writes a folder that `ViTForImageClassification.from_pretrained` reads.

  Args:
    params: of a `VisionTransformer` with a class token.
    path: the folder; gets model.safetensors and config.json, each only when it is whole.
    image_size: side of the images in pixels.
    activation: 'gelu_tanh' or 'gelu_erf'.
    class_names: one a class, for `id2label`.

  Returns:
    The folder.

  Raises:
    UserError: a model that `ViTForImageClassification` cannot hold.
  """
  import safetensors.numpy  # only this export writes it

  tensors = to_huggingface(params)
  query = flax.traverse_util.flatten_dict(params['Transformer'], sep='/')
  heads = next(value.shape[-2] for name, value in query.items() if name.endswith('query/kernel'))
  layers = {name.split('.')[3] for name in tensors if name.startswith('vit.encoder.layer.')}
  patches = tensors['vit.embeddings.patch_embeddings.projection.weight']
  config = {
      'architectures': ['ViTForImageClassification'], 'model_type': 'vit',
      'hidden_size': patches.shape[0], 'num_hidden_layers': len(layers),
      'num_attention_heads': heads,
      'intermediate_size': len(tensors['vit.encoder.layer.0.intermediate.dense.bias']),
      'hidden_act': {'gelu_tanh': 'gelu_new', 'gelu_erf': 'gelu'}[activation],
      'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0, 'layer_norm_eps': 1e-6,
      'image_size': image_size, 'patch_size': patches.shape[-1], 'num_channels': patches.shape[1],
      'qkv_bias': True, 'torch_dtype': 'float32',
      'id2label': {str(i): name for i, name in enumerate(class_names)},
      'label2id': {name: i for i, name in enumerate(class_names)}}
  path.mkdir(parents=True, exist_ok=True)
  with appearing(path / 'model.safetensors') as file:
    safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  with appearing(path / 'config.json') as file:
    file.write_text(json.dumps(config, indent=2) + '\n')
  return path
