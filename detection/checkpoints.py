"""Weights of DETR from elsewhere, and ours for elsewhere.

Read: the `.pth` files of the reference implementation; folders and `.safetensors` of Hugging Face
transformers (`DetrForObjectDetection`, `DetrForSegmentation`); a ResNet of torchvision, timm or
transformers, for the backbone alone; and what `write` wrote.

Written: a folder for transformers where it has such a model, else a `.safetensors` file under our
own names.
"""

import json
import math
import pathlib
import re
from typing import Any

import flax
import jax
import ml_collections
import numpy as np
from absl import logging

from core import partition
from core.config import UserError
from core.nn import blocks
from core.weights import (Notes, Weight, Weights, appearing, match_layers, open_safetensors,
                          open_torch)
from detection import layouts
from detection.transformer import LAYERS

_SIDES = ('transformer/encoder', 'transformer/decoder')
_MASK_PARTS = ('bbox_attention/', 'mask_head/')
# Sized by the data: of another size they start fresh.
_RESIZABLE = ('class_embed/', 'query_embed')
# What a model is beyond the shapes of its parameters; a file under our own names says so.
_SETTINGS = ('norm', 'positions_at', 'backbone_norm', 'dilation')
_ATTENTION = re.compile(r'/(self|cross)_attn/(query|key|value|out)/')


def open_weights(path: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Weight]:
  """Foreign weights under our names, unread; attention heads folded, layers single.

  Args:
    path: a `.pth`, a `.safetensors`, or the folder of a `model.safetensors`.
    config: the run's.

  Raises:
    UserError: none of these, damaged, or of a model that this one cannot be.
  """
  file = path
  if path.is_dir():
    file = path / 'model.safetensors'
    if not file.exists():
      raise UserError(f'{path}: neither a workdir (no checkpoints/) nor a folder of transformers '
                      'with a model.safetensors (a pytorch_model.bin is never read: rewrite it in '
                      'transformers with from_pretrained and save_pretrained)')
  if file.suffix in ('.pth', '.pt'):
    weights = open_torch(file, ('model', 'state_dict'))
  elif file.suffix == '.safetensors':
    weights = open_safetensors(file)
    if weights and all(re.fullmatch(r'\w+(/\w+)*', name) for name in weights):
      _check_settings(file, config.model)
      return weights
  else:
    raise UserError(f'{path}: not a .pth, a .safetensors or a folder of transformers')
  _check_folder(file, config.model)
  found = layouts.from_torch(weights)
  if not any(name.startswith('backbone/') for name in found):
    raise UserError(f'{path}: neither a DETR nor a ResNet; it has {", ".join(list(weights)[:3])}')
  if config.model.backbone_norm != 'frozen':
    raise UserError(f'{path}: its backbone has batch norm; config.model.backbone_norm='
                    f"{config.model.backbone_norm!r} must be 'frozen'")
  return found


def _check_settings(file: pathlib.Path, model: ml_collections.ConfigDict) -> None:
  """Raises UserError where a file under our names is of another model than its shapes show."""
  import safetensors
  with safetensors.safe_open(file, framework='numpy') as opened:
    described = (opened.metadata() or {}).get('model')
  if described is None:
    raise UserError(f'{file}: no model is described in its metadata; not an export of ours')
  wrong = [f'config.model.{key}={value!r} (it is {model.get(key)!r})'
           for key, value in json.loads(described).items() if model.get(key) != value]
  if wrong:
    raise UserError(f'{file} is of another model; it needs {", ".join(wrong)}')


def _check_folder(file: pathlib.Path, model: ml_collections.ConfigDict) -> None:
  """Holds the config.json beside a file of transformers, if there is one, against the model."""
  beside = file.parent / 'config.json'
  if file.name != 'model.safetensors' or not beside.exists():
    return
  try:
    theirs = json.loads(beside.read_text(encoding='utf-8'))
    if not isinstance(theirs, dict):
      raise ValueError('not an object')
  except ValueError as e:
    raise UserError(f'{beside}: not JSON of a model ({e})') from e
  if theirs.get('model_type') != 'detr':
    return
  for key in ('encoder_attention_heads', 'decoder_attention_heads'):
    if theirs.get(key, model.heads) != model.heads:
      raise UserError(f'{file.parent} is another model: it needs config.model.heads={theirs[key]} '
                      f'({key} in config.json)')
  if theirs.get('activation_function', 'relu') != 'relu':
    raise UserError(f'{beside}: activation_function={theirs["activation_function"]!r}; only '
                    "'relu' can be read")
  if (theirs.get('backbone_config') or {}).get('downsample_in_bottleneck'):
    raise UserError(f'{beside}: downsample_in_bottleneck; only backbones with the stride in the '
                    '3x3 convolution can be read')
  # Not refused: a detector may be fine-tuned at another resolution.
  if bool(theirs.get('dilation')) != model.dilation:
    logging.warning('%s was trained with dilation=%s, config.model.dilation is %s', file.parent,
                    bool(theirs.get('dilation')), model.dilation)


def adapt(weights: Weights, params_shape, transfer: bool) -> tuple[dict[str, Weight], Notes]:
  """Fits weights to a detector, unread.

  Layers are stacked or unstacked and heads unfolded as the model has them. The mask head of a
  panoptic model is left out where the model has none. For a transfer also: classes or queries of
  another number start fresh, so does a mask head that the weights lack (section 4.4, the second
  stage), and of a ResNet alone everything but the backbone does; names that no DETR has are left
  out.

  Args:
    weights: under our names.
    params_shape: the model's parameters, as shapes.
    transfer: False wants the weights as they are.
  """
  want = {partition.path_name(path): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params_shape)}
  source = dict(weights)
  for side in _SIDES:
    source = match_layers(source, want, f'{side}/{LAYERS}')
  source = {name: _unfolded(name, weight, want.get(name)) for name, weight in source.items()}
  looks_like = _looks_like(source)
  masks = any(name.startswith(_MASK_PARTS) for name in want)
  unused = [name for name in source if name.startswith(_MASK_PARTS) and not masks]
  fresh: tuple[str, ...] = ()
  if transfer:
    known = {name.split('/')[0] for name in want} | {'position_embedding'}
    unused += [name for name in source if name not in unused and name.split('/')[0] not in known]
    for part in _RESIZABLE:
      mine = {name: shape for name, shape in want.items() if name.startswith(part)}
      theirs = {name: source[name].shape for name in source if name.startswith(part)}
      if mine != theirs:
        unused += theirs
    may = (*_RESIZABLE, *_MASK_PARTS)
    if source and all(name.startswith('backbone/') for name in source if name not in unused):
      may = tuple({name.split('/')[0] for name in want} - {'backbone'})
    fresh = tuple(name for name in want
                  if name.startswith(may) and (name not in source or name in unused))
  used = {name: weight for name, weight in source.items() if name not in unused}
  return used, Notes(looks_like, tuple(unused), fresh)


def _unfolded(name: str, weight: Weight, want: tuple[int, ...] | None) -> Weight:
  """Splits attention heads that are folded into the width, `[D, D]` to `[D, heads, D / heads]`."""
  folded = (want is not None and _ATTENTION.search(name) and len(weight.shape) == len(want) - 1
            and math.prod(weight.shape) == math.prod(want))
  return weight.map(want, lambda value: value.reshape(want)) if folded else weight


def _looks_like(weights: Weights) -> str:
  """Such as 'DETR R50, 91 classes, 100 queries'."""
  units = {match[0] for name in weights if (match := re.match(r'backbone/layer\d_\d+/', name))}
  if not units:
    return ''
  # The stem and the classifier of the original count as layers.
  backbone = f'R{3 * len(units) + 2}'
  if 'class_embed/kernel' not in weights or 'query_embed' not in weights:
    return f'the backbone {backbone} alone'
  masks = ', mask head' if any(name.startswith('mask_head/') for name in weights) else ''
  return (f'DETR {backbone}, {weights["class_embed/kernel"].shape[-1] - 1} classes, '
          f'{weights["query_embed"].shape[0]} queries{masks}')


def write(params, path: pathlib.Path, config: ml_collections.ConfigDict,
          class_names: list[str]) -> pathlib.Path:
  """Writes a folder that transformers opens, or else a file under our own names.

  transformers has ResNets with frozen batch norm and without dilation (dilated ones only through
  timm), and layers with post-norm, a feed-forward network and positions of their own. The folder is
  for `DetrForObjectDetection.from_pretrained`, with the mask head for
  `DetrForSegmentation.from_pretrained`, and for `DetrImageProcessor.from_pretrained`. Its backbone
  is transformers' own ResNet, so that timm is not needed to open it.

  Args:
    params: of a `detector.DETR`.
    path: the folder; the file gets the ending .safetensors instead.
    config: the run's.
    class_names: one a class, '' for one that nobody uses; those at the end may be missing.

  Returns:
    What was written; every file appears only when it is whole.
  """
  import safetensors.numpy  # only an export writes it
  params = flax.core.unfreeze(params)
  transformer = dict(params['transformer'])
  for side in ('encoder', 'decoder'):
    if LAYERS in transformer.get(side, {}):
      transformer[side] = blocks.unstack_layers(transformer[side], LAYERS)
  flat = flax.traverse_util.flatten_dict({**params, 'transformer': transformer}, sep='/')
  flat = {name: np.ascontiguousarray(np.asarray(value, np.float32))
          for name, value in flat.items()}
  if reason := _not_in_transformers(flat, config.model):
    logging.warning('transformers has no DETR with %s; written under our own names', reason)
    path = path.with_suffix('.safetensors')
    settings = json.dumps({key: config.model[key] for key in _SETTINGS})
    with appearing(path) as file:
      safetensors.numpy.save_file(flat, file, metadata={'model': settings})
    return path
  path.mkdir(parents=True, exist_ok=True)
  with appearing(path / 'model.safetensors') as file:
    safetensors.numpy.save_file(layouts.to_huggingface(flat), file, metadata={'format': 'pt'})
  for name, content in (('config.json', _described(flat, config, class_names)),
                        ('preprocessor_config.json', _preprocessor(config))):
    with appearing(path / name) as file:
      file.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
  return path


def _not_in_transformers(flat: dict[str, np.ndarray], model: ml_collections.ConfigDict) -> str:
  """What the model has that transformers' has not; '' for nothing."""
  if model.backbone_norm != 'frozen':
    return f'config.model.backbone_norm={model.backbone_norm!r}'
  if model.dilation:
    return 'config.model.dilation without timm'
  if model.norm != 'post':
    return f'config.model.norm={model.norm!r}'
  if model.positions_at != 'attention':
    return f'config.model.positions_at={model.positions_at!r}'
  if not model.mlp_dim:
    return 'config.model.mlp_dim=0'
  if 'mask_head/lay1/kernel' in flat:
    channels = [len(flat[f'mask_head/lay{i}/bias']) for i in range(1, 6)
                if f'mask_head/lay{i}/bias' in flat]
    if len(channels) < 5 or channels[0] % 8 or any(c % min(8, c) for c in channels):
      return (f'a mask head of config.model.width={model.width}, config.model.heads={model.heads} '
              f'over {len(channels) - 1} stages')
  return ''


def _described(flat: dict[str, np.ndarray], config: ml_collections.ConfigDict,
               class_names: list[str]) -> dict[str, Any]:
  """config.json of transformers."""
  model = config.model
  units = [re.match(r'backbone/layer(\d)_(\d+)/conv3/bias', name) for name in flat]
  units = [(int(match[1]), int(match[2])) for match in units if match]
  stages = range(1, max(stage for stage, _ in units) + 1)
  masks = 'mask_head/lay1/kernel' in flat
  classes = len(flat['class_embed/bias']) - 1
  names = [class_names[i] or 'N/A' if i < len(class_names) else 'N/A' for i in range(classes)]
  return {
      'architectures': ['DetrForSegmentation' if masks else 'DetrForObjectDetection'],
      'model_type': 'detr', 'is_encoder_decoder': True, 'torch_dtype': 'float32',
      'use_timm_backbone': False, 'use_pretrained_backbone': False, 'backbone': None,
      'backbone_config': {
          'model_type': 'resnet', 'layer_type': 'bottleneck', 'hidden_act': 'relu',
          'num_channels': 3, 'embedding_size': len(flat['backbone/conv1/bias']),
          'hidden_sizes': [len(flat[f'backbone/layer{i}_0/conv3/bias']) for i in stages],
          'depths': [sum(stage == i for stage, _ in units) for i in stages],
          'downsample_in_first_stage': False, 'downsample_in_bottleneck': False,
          'out_features': [f'stage{i}' for i in stages]},
      'num_channels': 3, 'd_model': model.width, 'num_queries': len(flat['query_embed']),
      'encoder_layers': model.encoder_layers, 'decoder_layers': model.decoder_layers,
      'encoder_attention_heads': model.heads, 'decoder_attention_heads': model.heads,
      'encoder_ffn_dim': model.mlp_dim, 'decoder_ffn_dim': model.mlp_dim,
      'activation_function': 'relu', 'position_embedding_type': model.positions,
      'dilation': False, 'dropout': model.dropout, 'attention_dropout': model.dropout,
      'activation_dropout': model.dropout, 'auxiliary_loss': False,
      'eos_coefficient': model.eos_coef,
      'id2label': {str(i): name for i, name in enumerate(names)},
      'label2id': {name: i for i, name in enumerate(names)}}


def _preprocessor(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """preprocessor_config.json of transformers."""
  masks = config.model.masks != 'none'
  return {
      'image_processor_type': 'DetrImageProcessor',
      'format': 'coco_panoptic' if masks else 'coco_detection',
      'do_resize': True, 'size': {'shortest_edge': config.data.eval_short,
                                  'longest_edge': config.data.longest},
      'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True,
      'image_mean': [.485, .456, .406], 'image_std': [.229, .224, .225], 'do_pad': True}
