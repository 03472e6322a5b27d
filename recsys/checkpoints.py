"""BERT4Rec in the layout of Hugging Face transformers' `BertForMaskedLM`, read and written.

There, kernels are transposed and heads are folded into the width; the output's weights are the item
table. Ids are the rows of the table; a model trained with `padding='left'` wants its input padded
to `max_position_embeddings` on the left there too, with an `attention_mask`.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from core import partition
from core.config import UserError
from core.weights import Weight, appearing, open_safetensors
from recsys.encoder import BIAS, LAYERS, TABLE

_WEIGHTS, _CONFIG, ITEMS = 'model.safetensors', 'config.json', 'items.txt'
_LAYER = re.compile(r'bert\.encoder\.layer\.(\d+)\.')
_ARRAYS = {
    'bert.embeddings.word_embeddings.weight': TABLE,
    'bert.embeddings.position_embeddings.weight': 'position_embedding',
    'bert.embeddings.token_type_embeddings.weight': 'segment_embedding',
    'cls.predictions.bias': BIAS}
_MODULES = {
    'bert.embeddings.LayerNorm': 'embedding_norm',
    'cls.predictions.transform.dense': 'transform',
    'cls.predictions.transform.LayerNorm': 'transform_norm'}
_BLOCK = {
    'attention.self.query': 'MultiHeadDotProductAttention_0/query',
    'attention.self.key': 'MultiHeadDotProductAttention_0/key',
    'attention.self.value': 'MultiHeadDotProductAttention_0/value',
    'attention.output.dense': 'MultiHeadDotProductAttention_0/out',
    'attention.output.LayerNorm': 'LayerNorm_0',
    'intermediate.dense': 'MlpBlock_0/Dense_0',
    'output.dense': 'MlpBlock_0/Dense_1',
    'output.LayerNorm': 'LayerNorm_1'}
# Older files have them beside what they are copies of.
_COPIES = {'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
           'cls.predictions.decoder.bias': 'cls.predictions.bias'}
# What the shapes of parameters do not show, and transformers' defaults.
_SETTINGS = {'hidden_act': 'gelu', 'layer_norm_eps': 1e-12, 'position_embedding_type': 'absolute',
             'is_decoder': False}
_HELD = {'kind': 'bert4rec', 'transform': True, 'positions': True, 'segments': True,
         'residual': True}


def open_weights(path: pathlib.Path, heads: int) -> dict[str, Weight]:
  """Weights of a `BertForMaskedLM` under our names, unread.

  Args:
    path: a `.safetensors` file, or the folder of a `model.safetensors`. If there is a `config.json`
      beside the file it is held against our model; names of items are not looked for.
    heads: attention heads, which the file does not show.

  Raises:
    UserError: neither of these, damaged, of another number of heads, or a model that ours cannot
      be. Names that a `BertForMaskedLM` does not have are kept, for the comparison to refuse.
  """
  file = path / _WEIGHTS if path.is_dir() else path
  if not file.exists():
    raise UserError(f'{path}: neither a workdir (no checkpoints/) nor a folder of transformers (no '
                    f'{_WEIGHTS})')
  if file.suffix != '.safetensors':
    raise UserError(f'{path}: not a .safetensors file or the folder of one; pickles are never read')
  found = open_safetensors(file)
  _check_config(file.parent / _CONFIG, heads)
  found.pop('bert.embeddings.position_ids', None)  # 0, 1, 2 ...: older files have them.
  for copy, original in _COPIES.items():
    if copy in found:
      weight = found.pop(copy)
      if not np.array_equal(found.setdefault(original, weight).read(), weight.read()):
        raise UserError(f'{file}: {copy} differs from {original}; only models whose output is tied '
                        'to the item table can be read')
  names = _names({match[1] for name in found if (match := _LAYER.match(name))})
  return {names.get(name, name): _unfolded(names.get(name, ''), weight, heads)
          for name, weight in found.items()}


def _check_config(path: pathlib.Path, heads: int) -> None:
  if not path.exists():
    return
  try:
    theirs = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(theirs, dict):
      raise ValueError('not an object')
  except ValueError as e:
    raise UserError(f'{path}: not JSON of a model ({e})') from e
  if theirs.get('num_attention_heads', heads) != heads:
    raise UserError(f'{path}: num_attention_heads={theirs["num_attention_heads"]}, so it needs '
                    f'config.model.heads={theirs["num_attention_heads"]}, not {heads}')
  for key, value in _SETTINGS.items():
    if theirs.get(key, value) != value:
      raise UserError(f'{path}: {key}={theirs[key]!r}; only {value!r} can be read')


def _names(layers: Iterable[Any]) -> dict[str, str]:
  """Their names and ours of all parameters of a model with such numbers of layers."""
  modules = _MODULES | {
      f'bert.encoder.layer.{i}.{theirs}': f'{LAYERS}_{i}/{ours}'
      for i in layers for theirs, ours in _BLOCK.items()}
  names = dict(_ARRAYS)
  for theirs, ours in modules.items():
    names[f'{theirs}.weight'] = f'{ours}/{"scale" if theirs.endswith("Norm") else "kernel"}'
    names[f'{theirs}.bias'] = f'{ours}/bias'
  return names


def _unfolded(name: str, weight: Weight, heads: int) -> Weight:
  """A weight as the parameter `name` of ours has it; a width that has no such heads stays whole."""
  if name.endswith('/kernel'):
    weight = weight.map(weight.shape[::-1], np.transpose)
  shape = list(weight.shape)
  if 'Attention' not in name or name.endswith('/out/bias'):
    return weight
  axis = 0 if '/out/' in name else len(shape) - 1
  if shape[axis] % heads:
    return weight
  shape[axis:axis + 1] = [heads, shape[axis] // heads]
  return weight.map(shape, lambda value: value.reshape(shape))


def _folded(name: str, value: np.ndarray) -> np.ndarray:
  """The parameter `name` of ours as theirs, float32: the inverse of `_unfolded`."""
  value = np.asarray(value, np.float32)
  if name.endswith('/kernel'):
    value = value.reshape((-1, value.shape[-1]) if '/out/' in name else (len(value), -1)).T
  elif name.endswith('/bias'):
    value = value.reshape(-1)
  return np.ascontiguousarray(value)


def write_huggingface(params, path: pathlib.Path, task: Any) -> pathlib.Path:
  """Writes a folder that `BertForMaskedLM.from_pretrained` reads.

  Args:
    params: on the host.
    path: the folder; gets model.safetensors, config.json, whose `mask_token_id` is the [MASK] that
      stands for what is asked, and items.txt, each only when it is whole. Line n of items.txt,
      counted from 1, is the name of the item with id n (line breaks in a name become spaces).
    task: the `bert4rec.Task`; of it `config`, `log` and `mask_id`.

  Returns:
    The folder.

  Raises:
    UserError: a model that BERT cannot be.
  """
  import safetensors.numpy  # only an export writes it
  model = task.config.model
  wrong = [f'{key}={model[key]!r}' for key, value in _HELD.items() if model[key] != value]
  if wrong:
    held = ', '.join(f'{key}={value!r}' for key, value in _HELD.items())
    raise UserError(f'config.model has {", ".join(wrong)}; BertForMaskedLM, which is written, only '
                    f'holds models with {held}')
  flat = {partition.path_name(key): value
          for key, value in jax.tree_util.tree_leaves_with_path(params)}
  tensors = {theirs: _folded(ours, flat[ours])
             for theirs, ours in _names(range(model.depth)).items()}
  rows, width = tensors['bert.embeddings.word_embeddings.weight'].shape
  described = {
      'architectures': ['BertForMaskedLM'], 'model_type': 'bert', 'vocab_size': rows,
      'hidden_size': width, 'num_hidden_layers': model.depth, 'num_attention_heads': model.heads,
      'intermediate_size': len(tensors['bert.encoder.layer.0.intermediate.dense.bias']),
      'hidden_act': 'gelu', 'hidden_dropout_prob': model.dropout,
      'attention_probs_dropout_prob': model.attention_dropout,
      'max_position_embeddings': len(tensors['bert.embeddings.position_embeddings.weight']),
      'type_vocab_size': 2, 'initializer_range': .02, 'layer_norm_eps': 1e-12, 'pad_token_id': 0,
      'mask_token_id': task.mask_id, 'tie_word_embeddings': True, 'torch_dtype': 'float32'}
  names = ''.join(re.sub(r'[\r\n]+', ' ', name) + '\n' for name in task.log.items.tolist())
  path.mkdir(parents=True, exist_ok=True)
  with appearing(path / _WEIGHTS) as file:
    safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  for name, content in ((_CONFIG, json.dumps(described, indent=2) + '\n'), (ITEMS, names)):
    with appearing(path / name) as file:
      file.write_text(content, encoding='utf-8', newline='\n')
  return path
