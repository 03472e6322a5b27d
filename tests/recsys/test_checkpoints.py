"""The layout of transformers' BertForMaskedLM, written out here by hand under its names."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from core.checkpoint import shapes
from core.config import UserError
from recsys import checkpoints
from tests.recsys import tiny

TABLE = 'bert.embeddings.word_embeddings.weight'


def task_of(**changes):
  return tiny.task_of([np.arange(1, tiny.ITEMS + 1)], **{**dict(
      model__length=tiny.LENGTH, model__width=tiny.WIDTH, model__depth=tiny.DEPTH,
      model__heads=tiny.HEADS, model__mlp_dim=20), **changes})


def theirs(p):
  """Our parameters as a BertForMaskedLM has them: not by the code under test."""
  out = {TABLE: p['item_embedding'],
         'bert.embeddings.position_embeddings.weight': p['position_embedding'],
         'bert.embeddings.token_type_embeddings.weight': p['segment_embedding'],
         'bert.embeddings.LayerNorm.weight': p['embedding_norm']['scale'],
         'bert.embeddings.LayerNorm.bias': p['embedding_norm']['bias'],
         'cls.predictions.bias': p['output_bias'],
         'cls.predictions.transform.dense.weight': p['transform']['kernel'].T,
         'cls.predictions.transform.dense.bias': p['transform']['bias'],
         'cls.predictions.transform.LayerNorm.weight': p['transform_norm']['scale'],
         'cls.predictions.transform.LayerNorm.bias': p['transform_norm']['bias']}
  for i in range(tiny.DEPTH):
    block, name = p[f'encoderblock_{i}'], f'bert.encoder.layer.{i}'
    attention = block['MultiHeadDotProductAttention_0']
    for part in ('query', 'key', 'value'):
      # Rows of theirs are outputs, a head after the other.
      out[f'{name}.attention.self.{part}.weight'] = np.concatenate(
          [attention[part]['kernel'][:, head].T for head in range(tiny.HEADS)])
      out[f'{name}.attention.self.{part}.bias'] = np.concatenate(attention[part]['bias'])
    out[f'{name}.attention.output.dense.weight'] = np.concatenate(
        list(attention['out']['kernel'])).T
    out[f'{name}.attention.output.dense.bias'] = attention['out']['bias']
    for part, ours in (('attention.output.LayerNorm', 'LayerNorm_0'),
                       ('output.LayerNorm', 'LayerNorm_1')):
      out[f'{name}.{part}.weight'] = block[ours]['scale']
      out[f'{name}.{part}.bias'] = block[ours]['bias']
    for part, ours in (('intermediate', 'Dense_0'), ('output', 'Dense_1')):
      out[f'{name}.{part}.dense.weight'] = block['MlpBlock_0'][ours]['kernel'].T
      out[f'{name}.{part}.dense.bias'] = block['MlpBlock_0'][ours]['bias']
  return out


def params(seed=0):
  return tiny.params(tiny.model(), seed=seed)


def flat(tree):
  return {'/'.join(key.key for key in path): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save(path, tensors):
  safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
  return path


def assert_read(weights, want):
  assert {name: w.shape for name, w in weights.items()} == shapes(want)
  for name, value in flat(want).items():
    np.testing.assert_array_equal(weights[name].read(), value, err_msg=name)


def test_what_is_written(tmp_path):
  task, p = task_of(), params()
  folder = task.export(p, tmp_path / 'export')
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  want = theirs(p)
  assert sorted(tensors) == sorted(want)
  for name, value in want.items():
    np.testing.assert_array_equal(tensors[name], value, err_msg=name)
  described = json.loads((folder / 'config.json').read_text())
  assert {key: described[key] for key in (
      'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size',
      'max_position_embeddings', 'mask_token_id', 'layer_norm_eps', 'hidden_act')} == {
          'vocab_size': 15, 'hidden_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 3,
          'intermediate_size': 20, 'max_position_embeddings': 7, 'mask_token_id': 13,
          'layer_norm_eps': 1e-12, 'hidden_act': 'gelu'}
  assert_read(task.open_weights(folder), p)
  (folder / 'config.json').unlink()
  (folder / 'items.txt').unlink()
  assert_read(task.open_weights(folder), p)


def test_line_n_is_the_name_of_item_n(tmp_path):
  task = task_of()
  names = [f'item {i}' for i in range(1, tiny.ITEMS + 1)]
  names[4], names[7] = 'two\r\nlines\x85', 'Am\u00e9lie \u2028'
  object.__setattr__(task.log, 'items', np.array(names))
  lines = (task.export(params(), tmp_path / 'export') / 'items.txt').read_bytes().split(b'\n')
  names[4] = 'two lines\x85'
  assert lines == [name.encode() for name in names] + [b'']


def test_tied_copies_and_buffers_are_left_out(tmp_path):
  p = params()
  tensors = theirs(p)
  old = {**tensors, 'cls.predictions.decoder.weight': tensors[TABLE],
         'cls.predictions.decoder.bias': tensors['cls.predictions.bias'],
         'bert.embeddings.position_ids': np.arange(tiny.LENGTH)[None]}
  assert_read(checkpoints.open_weights(save(tmp_path / 'old.safetensors', old), tiny.HEADS), p)
  del old['cls.predictions.bias'], old[TABLE]  # Which of two shared ones is saved is by chance.
  assert_read(checkpoints.open_weights(save(tmp_path / 'one.safetensors', old), tiny.HEADS), p)
  for name, original in (('weight', TABLE), ('bias', 'cls.predictions.bias')):
    other = tensors[original].copy()
    other[3] += 1
    path = save(tmp_path / f'{name}.safetensors', {
        **tensors, f'cls.predictions.decoder.{name}': other})
    with pytest.raises(UserError, match=f'decoder.{name} differs from {original}'):
      checkpoints.open_weights(path, tiny.HEADS)


def test_what_is_no_item_model_is_left_for_the_comparison(tmp_path):
  tensors = {**theirs(params()), 'bert.pooler.dense.weight': np.ones((12, 12))}
  path = save(tmp_path / 'more.safetensors', tensors)
  weights = checkpoints.open_weights(path, tiny.HEADS)
  assert set(weights) - set(shapes(params())) == {'bert.pooler.dense.weight'}
  odd = checkpoints.open_weights(path, 5)['encoderblock_1/MultiHeadDotProductAttention_0/key/bias']
  assert odd.shape == (12,)


@pytest.mark.parametrize('change, words', [
    (dict(kind='sasrec', segments=False), "kind='sasrec', segments=False; .*kind='bert4rec'"),
    (dict(transform=False), 'has transform=False;'), (dict(positions=False), 'positions=False;'),
    (dict(residual=False), 'residual=False;')])
def test_what_bert_cannot_hold(tmp_path, change, words):
  task = task_of(**{f'model__{key}': value for key, value in change.items()})
  with pytest.raises(UserError, match=words):
    task.export(params(), tmp_path / 'export')
  assert not (tmp_path / 'export').exists()


@pytest.mark.parametrize('key, value, words', [
    ('num_attention_heads', 2, 'needs config.model.heads=2, not 3'),
    ('hidden_act', 'relu', "hidden_act='relu'; only 'gelu'"),
    ('layer_norm_eps', 1e-5, 'only 1e-12'),
    ('is_decoder', True, 'is_decoder=True')])
def test_what_shapes_do_not_show(tmp_path, key, value, words):
  folder = task_of().export(params(), tmp_path / 'export')
  described = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**described, key: value}))
  with pytest.raises(UserError, match=words):
    checkpoints.open_weights(folder, tiny.HEADS)


@pytest.mark.parametrize('text', ['{', '[]', '\xff'])
def test_a_damaged_description(tmp_path, text):
  folder = task_of().export(params(), tmp_path / 'export')
  (folder / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(UserError, match='config.json: not JSON of a model'):
    checkpoints.open_weights(folder, tiny.HEADS)


@pytest.mark.parametrize('name, words', [
    ('model.bin', 'pickles are never read'), ('folder', 'no model.safetensors'),
    ('cut.safetensors', 'not a .safetensors file'), ('none.safetensors', 'none.safetensors')])
def test_what_cannot_be_read(tmp_path, name, words):
  path = tmp_path / name
  if name == 'folder':
    path.mkdir()
  elif not name.startswith('none'):
    path.write_bytes(b'x')
  with pytest.raises(UserError, match=words):
    checkpoints.open_weights(path, tiny.HEADS)
