"""Weights of Image GPT from elsewhere: OpenAI's TensorFlow variables, Hugging Face `imagegpt`.

OpenAI's come as a `.npz` with one array a variable, under its name (`model/h0/attn/q_proj`).
Hugging Face has the start vector as the last row of the token table, heads folded into the width,
queries, keys and values side by side, and biases that were never trained.
"""

import json
import pathlib
import re

import flax
import jax
import numpy as np

from core import partition
from core.config import UserError
from core.nn import blocks
from core.weights import Notes, Weight, Weights, appearing, match_layers, open_npz
from core.weights import open_safetensors
from generative import gpt, palette, variants

_OPTIMIZER = re.compile(r'adam_[mv]|global_step')
_TF_LAYER = re.compile(r'h(\d+)/(.+)')
_HF_LAYER = re.compile(r'h\.(\d+)\.(.+)')
_ATTENTION = {'q_proj': 'query', 'k_proj': 'key', 'v_proj': 'value'}
_HF_TOP = {'wpe.weight': 'wpe', 'ln_f.weight': 'ln_f/scale', 'lm_head.weight': 'wtet',
           'score.weight': 'wclf'}
_HF_BLOCK = {'ln_1.weight': 'ln_1/scale', 'ln_2.weight': 'ln_2/scale',
             'attn.c_proj.weight': 'attn/out/kernel', 'mlp.c_fc.weight': 'c_fc/kernel',
             'mlp.c_proj.weight': 'c_proj/kernel'}
_PREPROCESSOR = 'preprocessor_config.json'


def open_weights(path: pathlib.Path) -> dict[str, Weight]:
  """Foreign weights under our names, unread.

  Args:
    path: OpenAI's variables as `.npz`, Hugging Face's `.safetensors`, or the folder that holds a
      `model.safetensors`.

  Raises:
    UserError: none of these, cut short, or biases that are not zero.
  """
  if path.is_dir():
    if not (path / 'model.safetensors').exists():
      raise UserError(f'{path}: neither a workdir (no checkpoints/) nor a folder of transformers '
                      '(no model.safetensors)')
    path = path / 'model.safetensors'
  if path.suffix == '.npz':
    return from_openai(open_npz(path))
  if path.suffix == '.safetensors':
    return from_huggingface(open_safetensors(path))
  raise UserError(f'{path}: not a .npz or .safetensors file; TensorFlow checkpoints are dumped to '
                  '.npz first, one array a variable, and pickles are never read')


def find_palette(init_from: str) -> pathlib.Path | None:
  """The palette that comes with weights: of a workdir, or of a folder of Hugging Face."""
  folder = pathlib.Path(init_from)
  folder = folder if folder.is_dir() else folder.parent
  names = ('palette.npy', _PREPROCESSOR)
  return next((folder / name for name in names if (folder / name).exists()), None)


def from_openai(weights: Weights) -> dict[str, Weight]:
  """TensorFlow's names and shapes to ours; what an optimizer left is dropped."""
  result = {}
  for name, weight in weights.items():
    if _OPTIMIZER.search(name):
      continue
    name = name.removeprefix('model/').removeprefix('clf/')
    match = _TF_LAYER.fullmatch(name)
    layer, rest = (f'{gpt.LAYERS}_{match[1]}/', match[2]) if match else ('', name)
    part, _, leaf = rest.rpartition('/')
    if part == 'attn' and leaf in _ATTENTION:
      heads, head_dim, width = weight.shape
      rest = f'attn/{_ATTENTION[leaf]}/kernel'
      weight = weight.map((width, heads, head_dim), lambda value: value.transpose(2, 0, 1))
    elif rest == 'attn/c_proj':
      rest = 'attn/out/kernel'
    elif part.startswith('mlp/'):
      rest = f'{part.removeprefix("mlp/")}/kernel'
    elif leaf == 'g':
      rest = f'{part}/scale'
    result[layer + rest] = weight
  return result


def from_huggingface(weights: Weights) -> dict[str, Weight]:
  """Hugging Face's names and shapes to ours, still with heads folded into the width.

  Raises:
    UserError: a bias that is not zero; the model has none.
  """
  result = {}
  for name, weight in weights.items():
    name = name.removeprefix('transformer.')
    if name == 'wte.weight':
      rows, width = weight.shape
      result['wte'] = weight.map((rows - 1, width), lambda value: value[:-1])
      result['sos'] = weight.map((width,), lambda value: value[-1])
      continue
    match = _HF_LAYER.fullmatch(name)
    if not match:
      result[_HF_TOP.get(name, name)] = weight
      continue
    layer, rest = f'{gpt.LAYERS}_{match[1]}/', match[2]
    if rest in ('attn.bias', 'attn.masked_bias'):
      continue  # A triangular mask, which older files carry along.
    if rest.endswith('.bias'):
      if np.any(weight.read()):
        raise UserError(f'{name} is not zero: these weights were trained with biases, which Image '
                        'GPT does not have')
    elif rest == 'attn.c_attn.weight':
      width = weight.shape[0]
      for i, part in enumerate(_ATTENTION.values()):
        result[f'{layer}attn/{part}/kernel'] = weight.map(
            (width, width), lambda value, i=i, width=width: value[:, i * width:(i + 1) * width])
    else:
      result[layer + _HF_BLOCK.get(rest, rest)] = weight
  return result


def adapt(weights: Weights, params_shape, transfer: bool) -> tuple[dict[str, Weight], Notes]:
  """Fits weights to a model: layers stacked or not, heads unfolded, for a transfer a fresh head.

  Args:
    weights: under our names.
    params_shape: the model's parameters, as shapes.
    transfer: False wants the weights as they are.
  """
  want = {partition.path_name(path): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params_shape)}
  single = {}
  for name, weight in weights.items():
    if re.search(r'attn/\w+/kernel$', name) and len(weight.shape) == 2:
      weight = _unfolded(name, weight, want)
    single[name] = weight
  source = match_layers(single, want, gpt.LAYERS)
  looks_like = _looks_like(source)
  if not transfer:
    # A class head is of no use to a model without one; nor is the start vector to BERT.
    extra = [name for name in ('wclf', 'sos') if name in source and name not in want]
    used = {name: weight for name, weight in source.items() if name not in extra}
    return used, Notes(looks_like, unused=tuple(extra))
  used = {name: weight for name, weight in source.items()
          if name in want and (name != 'wclf' or weight.shape == want[name])}
  fresh = ('wclf',) if 'wclf' in want and 'wclf' not in used else ()
  return used, Notes(looks_like, unused=tuple(n for n in source if n not in used), fresh=fresh)


def _unfolded(name: str, weight: Weight, want: dict[str, tuple[int, ...]]) -> Weight:
  """`[width, width]` of a layer as the model splits it into heads, if it fits."""
  part = name.split('/')[-2]
  shape = next((shape for other, shape in want.items()
                if other.endswith(f'attn/{part}/kernel')), ())[-3:]
  if len(shape) != 3 or np.prod(shape) != np.prod(weight.shape):
    return weight
  return weight.map(shape, lambda value: value.reshape(shape))


def _looks_like(weights: Weights) -> str:
  if 'wte' not in weights or 'wpe' not in weights:
    return ''
  colors, width = weights['wte'].shape
  depth = max((weight.shape[0] if name.startswith(f'{gpt.LAYERS}/') else
               int(match[1]) + 1 if (match := re.match(rf'{gpt.LAYERS}_(\d+)/', name)) else 0
               for name, weight in weights.items()), default=0)
  name = next((f'iGPT-{name}' for name, size in variants.GPTS.items()
               if (size.width, size.depth) == (width, depth)), f'{depth} layers of width {width}')
  side = round(weights['wpe'].shape[0] ** .5)
  return f'{name} at {side} px with {colors} colours'


def to_huggingface(params) -> dict[str, np.ndarray]:
  """Parameters of ours as the tensors of `ImageGPTForCausalImageModeling`, biases of 0 included.

  Raises:
    UserError: a BERT model, which it cannot hold: it attends causally.
  """
  if 'sos' not in params:
    raise UserError("Hugging Face's imagegpt attends causally and cannot hold a model of "
                    "config.model.objective='bert'")
  params = flax.core.unfreeze(params)
  if gpt.LAYERS in params:
    params = blocks.unstack_layers(params, gpt.LAYERS)
  value = lambda x: np.ascontiguousarray(np.asarray(x, np.float32))
  tensors = {
      'transformer.wte.weight': value(np.concatenate([params['wte'], params['sos'][None]])),
      'transformer.wpe.weight': value(params['wpe']),
      'transformer.ln_f.weight': value(params['ln_f']['scale']),
      'lm_head.weight': value(params['wtet'])}
  if 'wclf' in params:
    tensors['score.weight'] = value(params['wclf'])
  width = params['wte'].shape[1]
  depth = sum(name.startswith(f'{gpt.LAYERS}_') for name in params)
  for i in range(depth):
    block, prefix = params[f'{gpt.LAYERS}_{i}'], f'transformer.h.{i}'
    tensors[f'{prefix}.ln_1.weight'] = value(block['ln_1']['scale'])
    tensors[f'{prefix}.ln_2.weight'] = value(block['ln_2']['scale'])
    kernels = {
        'attn.c_attn': np.concatenate([np.reshape(block['attn'][part]['kernel'], (width, width))
                                       for part in _ATTENTION.values()], axis=1),
        'attn.c_proj': np.reshape(block['attn']['out']['kernel'], (width, width)),
        'mlp.c_fc': block['c_fc']['kernel'], 'mlp.c_proj': block['c_proj']['kernel']}
    for name, kernel in kernels.items():
      tensors[f'{prefix}.{name}.weight'] = value(kernel)
      tensors[f'{prefix}.{name}.bias'] = np.zeros(kernel.shape[1], np.float32)
  return tensors


def write_huggingface(params, path: pathlib.Path, colors: palette.Palette, config) -> pathlib.Path:
  """Writes a folder that `ImageGPTForCausalImageModeling.from_pretrained` reads.

  Args:
    params: of an autoregressive model.
    path: the folder; gets model.safetensors, config.json and, for the palette,
      preprocessor_config.json, each only when it is whole.
    colors: the palette.
    config: the run's.

  Returns:
    The folder.
  """
  import safetensors.numpy  # only an export writes it
  tensors = to_huggingface(params)
  size = variants.GPTS[config.model.variant]
  image_size = config.data.image_size
  model = 'ImageClassification' if 'score.weight' in tensors else 'CausalImageModeling'
  described = {
      'architectures': [f'ImageGPTFor{model}'], 'model_type': 'imagegpt',
      'vocab_size': config.model.colors + 1, 'n_positions': image_size ** 2,
      'n_embd': size.width, 'n_layer': size.depth, 'n_head': size.heads,
      'activation_function': 'quick_gelu', 'layer_norm_epsilon': 1e-5, 'resid_pdrop': 0.0,
      'embd_pdrop': 0.0, 'attn_pdrop': 0.0, 'tie_word_embeddings': False, 'torch_dtype': 'float32'}
  if 'score.weight' in tensors:
    described['num_labels'] = len(tensors['score.weight'])
  preprocessor = {
      'image_processor_type': 'ImageGPTImageProcessor', 'do_color_quantize': True,
      'do_normalize': True, 'do_resize': True, 'resample': 2,
      'size': {'height': image_size, 'width': image_size}, 'clusters': colors.centers.tolist()}
  path.mkdir(parents=True, exist_ok=True)
  with appearing(path / 'model.safetensors') as file:
    safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  for name, content in (('config.json', described), (_PREPROCESSOR, preprocessor)):
    with appearing(path / name) as file:
      file.write_text(json.dumps(content, indent=2) + '\n')
  return path
