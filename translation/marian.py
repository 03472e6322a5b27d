"""The Transformer in the layout of Hugging Face transformers' `MarianMTModel` (opus-mt models).

Marian is the paper's model with biases in attention, the printed frequencies of positions as all
sines before all cosines, and epsilon 1e-5: config.model must say so, see `_NEEDED`. It has padding
and the start of a sentence as entries of its vocabulary, while ours begins with a zero vector:

- written, the start is one entry more than ours, at the end: a row of zeros, which a logits bias
  keeps from ever being drawn. All other logits, and so all probabilities, are exactly ours.
- read, the start may be such an entry, which is dropped, or padding itself, whose row must be zero.
  Ids become ours: padding first, the end of a sentence second, the others in their own order (of an
  opus-mt model, whose last entry is padding and whose first is the end: id + 1).
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import ml_collections
import numpy as np

from core import partition
from core.config import UserError
from core.nn import blocks
from core.weights import Notes, Weight, Weights, appearing, match_layers, open_safetensors
from translation import transformer, vocabulary

# What our models must be, and what theirs always are.
_NEEDED = dict(kind='transformer', norm='post', positions='marian', attention_bias=True,
               epsilon=1e-5)
_THEIRS = dict(model_type='marian', scale_embedding=True, tie_word_embeddings=True)
_MAYBE = dict(normalize_before=False, normalize_embedding=False, add_final_layer_norm=False,
              static_position_embeddings=True)  # Only older files have these.
_SIZES = {'d_model': 'width', 'encoder_layers': 'depth', 'decoder_layers': 'depth',
          'encoder_ffn_dim': 'mlp_dim', 'decoder_ffn_dim': 'mlp_dim',
          'encoder_attention_heads': 'heads', 'decoder_attention_heads': 'heads'}
_ACTIVATIONS = {'relu': 'relu', 'swish': 'swish', 'gelu_erf': 'gelu', 'quick_gelu': 'quick_gelu',
                'gelu_tanh': 'gelu_pytorch_tanh'}

_ATTENTION = {'q_proj': 'query', 'k_proj': 'key', 'v_proj': 'value', 'out_proj': 'out'}
_LAYER = re.compile(r'model\.(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)')
_BIAS = 'final_logits_bias'
_NEVER = -1e4  # A logit whose probability is 0 in float32, and that half precision still has.


def _parts(side: str) -> dict[str, str]:
  """Their modules of a layer of the encoder or decoder, and ours."""
  attentions = ['self_attn'] + (['encoder_attn'] if side == 'decoder' else [])
  found = {'fc1': 'MlpBlock_0/Dense_0', 'fc2': 'MlpBlock_0/Dense_1',
           'final_layer_norm': f'LayerNorm_{len(attentions)}'}
  for number, name in enumerate(attentions):
    found[f'{name}_layer_norm'] = f'LayerNorm_{number}'
    for theirs, ours in _ATTENTION.items():
      found[f'{name}.{theirs}'] = f'MultiHeadDotProductAttention_{number}/{ours}'
  return found


def _require(config: ml_collections.ConfigDict, why: str) -> None:
  """Raises UserError unless the model is one that Marian's layout can hold."""
  model = config.model
  wrong = [key for key, value in _NEEDED.items() if model.get(key) != value]
  if 'kind' in wrong:
    raise UserError(f"{why}: config.model.kind={model.kind!r}; Marian's layout is that of a "
                    'Transformer')
  wrong = [f'config.model.{key}={_NEEDED[key]!r} (it is {model[key]!r})' for key in wrong]
  for key in ('head_dim', 'value_dim'):
    if model[key] and model[key] * model.heads != model.width:
      wrong.append(f'config.model.{key}=0 (it is {model[key]})')
  if model.activation not in _ACTIVATIONS:
    wrong.append(f'config.model.activation one of {", ".join(_ACTIVATIONS)}')
  if wrong:
    raise UserError(f"{why}: Marian's layout needs {', '.join(wrong)}")


def open_weights(path: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Weight]:
  """Marian's weights under our names (layers unrolled), unread but for one bias.

  Args:
    path: the folder with config.json and model.safetensors, or the latter.
    config: the run's; sizes of layers must be those of the folder.

  Raises:
    UserError: no such folder, or a model that ours cannot be: other settings, untied embeddings,
      logits with a bias. When it is read: a start of sentences that is not zero.
  """
  _require(config, str(path))
  folder = path if path.is_dir() else path.parent
  file = folder / 'model.safetensors' if path.is_dir() else path
  for needed in (folder / 'config.json', file):
    if not needed.exists() or file.suffix != '.safetensors':
      raise UserError(f'{path}: neither a workdir (no checkpoints/) nor a folder of transformers '
                      'with config.json and model.safetensors (pickles are never read: rewrite '
                      'them in transformers with from_pretrained and save_pretrained)')
  try:
    theirs = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    if not isinstance(theirs, dict):
      raise ValueError('not an object')
  except ValueError as e:
    raise UserError(f'{folder / "config.json"}: not JSON of a model ({e})') from e
  _compare(folder, theirs, config.model)
  return from_huggingface(open_safetensors(file), theirs)


def _compare(folder: pathlib.Path, theirs: dict[str, Any],
             model: ml_collections.ConfigDict) -> None:
  """Raises UserError where a folder's config.json is not what the run's config says."""
  fixed = _THEIRS | {key: value for key, value in _MAYBE.items() if key in theirs}
  given = {'tie_word_embeddings': True} | theirs
  for key, value in fixed.items():
    if given.get(key) != value:
      raise UserError(f'{folder}: {key}={given.get(key)!r} in config.json; only models with '
                      f'{value!r} can be read')
  wrong = [f'config.model.{ours}={theirs.get(key)!r} ({key})' for key, ours in _SIZES.items()
           if theirs.get(key) != model[ours]]
  activation = theirs.get('activation_function')
  activation = {'silu': 'swish'}.get(activation, activation)  # Two names of theirs.
  if activation != _ACTIVATIONS[model.activation]:
    name = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}.get(activation, activation)
    wrong.append(f'config.model.activation={name!r} (activation_function)')
  if wrong:
    raise UserError(f'{folder} is another model: by its config.json it needs {", ".join(wrong)}')


def from_huggingface(weights: Weights, theirs: Mapping[str, Any]) -> dict[str, Weight]:
  """Their names, shapes and ids to ours.

  Args:
    weights: of `MarianMTModel`.
    theirs: their config.json.

  Raises:
    UserError: see `open_weights`.
  """
  result: dict[str, Weight] = {}
  heads = theirs['encoder_attention_heads']
  shared = theirs.get('share_encoder_decoder_embeddings', True)
  for name, weight in weights.items():
    match = _LAYER.fullmatch(name)
    part = _parts(match[1]).get(match[3]) if match else None
    if part:
      ours, weight = _layer(f'{match[1]}/{transformer.LAYERS}_{match[2]}/{part}', match[4], weight,
                            heads)
      result[ours] = weight
    elif name.endswith(('embed_tokens.weight', 'embed_positions.weight')) or name in (
        _BIAS, 'model.shared.weight', 'lm_head.weight'):
      continue  # One matrix under several names, numbers that are known, and what comes below.
    else:
      result[name] = weight

  table = lambda *names: next((weights[name] for name in names if name in weights), None)
  found = table('model.shared.weight', 'lm_head.weight', 'model.decoder.embed_tokens.weight')
  if found is not None:
    ids = _order(theirs, found.shape[0], drop_start=True)
    _check_bias(weights, theirs, ids)
    result['embedding'] = _table(found, ids, theirs)
  if not shared and (found := table('model.encoder.embed_tokens.weight')) is not None:
    ids = _order(theirs, found.shape[0], drop_start=False)
    result['source_embedding'] = found.map((len(ids), found.shape[1]), lambda value: value[ids])
  return result


def _layer(module: str, leaf: str, weight: Weight, heads: int) -> tuple[str, Weight]:
  """One parameter of a layer: torch's matrices are `[out, in]` with heads folded."""
  if 'LayerNorm' in module:
    return f'{module}/{"scale" if leaf == "weight" else "bias"}', weight
  part = module.rpartition('/')[2]
  if leaf == 'bias':
    width, = weight.shape
    shape = (heads, width // heads) if part in ('query', 'key', 'value') else (width,)
    return f'{module}/bias', weight.map(shape, lambda value: value.reshape(shape))
  width, inputs = weight.shape
  shape = {'out': (heads, inputs // heads, width), 'Dense_0': (inputs, width),
           'Dense_1': (inputs, width)}.get(part, (inputs, heads, width // heads))
  return f'{module}/kernel', weight.map(shape, lambda value: value.T.reshape(shape))


def _ids(theirs: Mapping[str, Any]) -> tuple[int, int, int]:
  """Their ids of padding, end and start."""
  names = ('pad_token_id', 'eos_token_id', 'decoder_start_token_id')
  found = tuple(theirs.get(name) for name in names)
  if not all(isinstance(i, int) for i in found) or found[0] == found[1] or found[1] == found[2]:
    raise UserError(f'config.json: {", ".join(f"{n}={i!r}" for n, i in zip(names, found))}; '
                    'expected a number each, and an end that is neither of the others')
  return found


def _order(theirs: Mapping[str, Any], size: int, drop_start: bool) -> np.ndarray:
  """int `[entries]`: their id of each of our ids."""
  pad, eos, start = _ids(theirs)
  if max(pad, eos) >= size or (drop_start and start >= size):
    raise UserError(f'config.json: ids {pad}, {eos}, {start} of padding, end and start, in a '
                    f'vocabulary of {size}')
  first = [pad, eos]
  without = first + ([start] if drop_start else [])
  return np.array(first + [i for i in range(size) if i not in without])


def _check_bias(weights: Weights, theirs: Mapping[str, Any], ids: np.ndarray) -> None:
  pad, _, start = _ids(theirs)
  size = len(ids) + (start != pad)
  bias = weights[_BIAS].read().reshape(-1) if _BIAS in weights else np.zeros(size)
  if len(bias) != size:
    raise UserError(f'{_BIAS} has {len(bias)} entries, the embedding {size}')
  if np.any(bias[ids]):
    raise UserError(f'{_BIAS} is not zero: these weights were trained with a bias of the logits, '
                    'which our Transformer does not have')
  if start != pad and bias[start] > _NEVER:
    raise UserError(f'entry {start} begins sentences and can be drawn as well ({_BIAS} is '
                    f'{bias[start]:g}); ours has no such entry')


def _table(weight: Weight, ids: np.ndarray, theirs: Mapping[str, Any]) -> Weight:
  start = _ids(theirs)[2]

  def read(value):
    if np.any(value[start]):
      raise UserError(f'row {start} of the embedding, with which the decoder begins, is not zero; '
                      'ours begins with a zero vector')
    return value[ids]
  return weight.map((len(ids), weight.shape[1]), read)


def adapt(weights: Weights, params_shape, transfer: bool) -> tuple[dict[str, Weight], Notes]:
  """Brings layers to what a model has, stacked or single; everything must be used."""
  del transfer  # A vocabulary of another size is another model.
  want = [partition.path_name(path)
          for path, _ in jax.tree_util.tree_leaves_with_path(params_shape)]
  source = dict(weights)
  for side in ('encoder', 'decoder'):
    source = match_layers(source, want, f'{side}/{transformer.LAYERS}')
  return source, Notes(_looks_like(source))


def _looks_like(weights: Weights) -> str:
  if 'embedding' not in weights:
    return ''
  layers = [weight.shape[0] if name.startswith(f'encoder/{transformer.LAYERS}/') else
            int(match[1]) + 1 if (match := re.match(r'encoder/\w+_(\d+)/', name)) else 0
            for name, weight in weights.items()]
  size, width = weights['embedding'].shape
  return f'a Transformer of {max(layers)} layers, width {width}, {size:,} entries'


def to_huggingface(params) -> dict[str, np.ndarray]:
  """Parameters of ours, stacked or not, as the tensors of `MarianMTModel`, heads folded."""
  params = flax.core.unfreeze(params)
  value = lambda x: np.ascontiguousarray(np.asarray(x, np.float32))
  table = value(params['embedding'])
  table = np.concatenate([table, np.zeros_like(table[:1])])
  tensors = {_BIAS: np.zeros((1, len(table)), np.float32)}
  tensors[_BIAS][0, -1] = _NEVER
  if 'source_embedding' in params:
    tensors['model.encoder.embed_tokens.weight'] = value(params['source_embedding'])
    tensors['model.decoder.embed_tokens.weight'] = table
  else:
    tensors['model.shared.weight'] = table
  for side in ('encoder', 'decoder'):
    layers = params[side]
    if transformer.LAYERS in layers:
      layers = blocks.unstack_layers(layers, transformer.LAYERS)
    layers = flax.traverse_util.flatten_dict(layers, sep='/')
    names = {ours: theirs for theirs, ours in _parts(side).items()}
    for name, array in layers.items():
      layer, _, rest = name.partition('/')
      part, _, leaf = rest.rpartition('/')
      if leaf == 'kernel':
        # All but the last projection of an attention have one dimension of inputs.
        inputs = array.shape[0] * (array.shape[1] if part.endswith('/out') else 1)
        array = np.reshape(array, (inputs, -1)).T
      theirs = f'model.{side}.layers.{layer.rpartition("_")[2]}.{names[part]}'
      tensors[f'{theirs}.{"bias" if leaf == "bias" else "weight"}'] = value(
          np.reshape(array, -1) if leaf == 'bias' else array)
  return tensors


def write(params, path: pathlib.Path, config: ml_collections.ConfigDict,
          vocabularies: Mapping[str, vocabulary.Vocabulary] | None = None) -> pathlib.Path:
  """Writes a folder that `MarianMTModel.from_pretrained` reads.

  Its `generate` searches with as many beams, and divides by length ** alpha where we divide by
  ((5 + length) / 6) ** alpha: only with config.eval.search.alpha=0 are scores the same.

  Args:
    params: of a Transformer with Marian's settings, layers stacked or not.
    path: the folder; gets model.safetensors, config.json and generation_config.json, each only when
      it is whole.
    config: the run's.
    vocabularies: 'source' and 'target', if `AutoTokenizer` shall read them: as tokenizer.json in
      the folder, and where the target's is another in the folder `target` in it.

  Returns:
    The folder.

  Raises:
    UserError: a model that Marian's layout cannot hold; it names the config keys.
  """
  import safetensors.numpy  # only an export writes it
  _require(config, 'not exported')
  model, search = config.model, config.eval.search
  tensors = to_huggingface(params)
  rows, width = tensors.get('model.shared.weight', tensors.get(
      'model.decoder.embed_tokens.weight')).shape
  shared = 'model.shared.weight' in tensors
  room = config.data.buckets[-1] + search.extra
  ids = {'pad_token_id': vocabulary.PAD, 'eos_token_id': vocabulary.EOS, 'bos_token_id': None,
         'decoder_start_token_id': rows - 1, 'forced_eos_token_id': None}
  described = {
      'architectures': ['MarianMTModel'], **_THEIRS, **ids,
      **{theirs: model[ours] for theirs, ours in _SIZES.items()},
      'activation_function': _ACTIVATIONS[model.activation],
      'vocab_size': rows if shared else len(tensors['model.encoder.embed_tokens.weight']),
      'decoder_vocab_size': rows, 'share_encoder_decoder_embeddings': shared,
      'max_position_embeddings': max(512, room), 'dropout': model.dropout,
      'attention_dropout': model.attention_dropout,
      'activation_dropout': model.dropout if model.hidden_dropout else 0.0,
      'init_std': width ** -.5, 'is_encoder_decoder': True, 'dtype': 'float32'}
  generation = {
      **ids, 'max_length': room + 1, 'num_beams': search.beams if search.method == 'beam' else 1,
      'length_penalty': search.alpha, 'early_stopping': 'never'}
  path.mkdir(parents=True, exist_ok=True)
  with appearing(path / 'model.safetensors') as file:
    safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  for name, content in (('config.json', described), ('generation_config.json', generation)):
    with appearing(path / name) as file:
      file.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
  if vocabularies is not None:
    _write_tokenizer(vocabularies['source'], path, room)
    if vocabularies['target'] is not vocabularies['source']:
      _write_tokenizer(vocabularies['target'], path / 'target', room)
  return path


def _write_tokenizer(vocab: vocabulary.Vocabulary, folder: pathlib.Path, longest: int) -> None:
  """A vocabulary as `AutoTokenizer` reads it: with the end of a sentence, and the way back."""
  import tokenizers
  folder.mkdir(exist_ok=True)
  pad, eos, unknown = vocabulary.SPECIAL
  with appearing(folder / 'tokenizer.json') as file:
    vocab.save(file)
    made = tokenizers.Tokenizer.from_file(str(file))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f'$A {eos}', pair=f'$A {eos} $B {eos}', special_tokens=[(eos, vocabulary.EOS)])
    made.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(' ', 1, 0)])
    file.write_text(made.to_str(pretty=True), encoding='utf-8')
  described = {'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': pad, 'eos_token': eos,
               'unk_token': unknown, 'model_max_length': longest, 'padding_side': 'right',
               'clean_up_tokenization_spaces': False}
  with appearing(folder / 'tokenizer_config.json') as file:
    file.write_text(json.dumps(described, indent=2) + '\n', encoding='utf-8')
