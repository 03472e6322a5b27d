"""Layouts of OpenAI and Hugging Face, on files made up here under their names."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import image_gpt
from core.config import UserError
from core.nn import blocks
from core.weights import Weight
from generative import checkpoints, palette
from tests.generative import tiny


def openai(params):
  """Our unrolled parameters as the released variables: written out, not by the code under test."""
  out = {'model/wte': params['wte'], 'model/wtet': params['wtet'], 'model/wpe': params['wpe'],
         'model/sos': params['sos'], 'model/ln_f/g': params['ln_f']['scale']}
  for i in range(tiny.DEPTH):
    h, name = params[f'h_{i}'], f'model/h{i}'
    out |= {f'{name}/ln_1/g': h['ln_1']['scale'], f'{name}/ln_2/g': h['ln_2']['scale'],
            f'{name}/attn/c_proj': h['attn']['out']['kernel'],
            f'{name}/mlp/c_fc/w': h['c_fc']['kernel'],
            f'{name}/mlp/c_proj/w': h['c_proj']['kernel']}
    for ours, theirs in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj')):
      out[f'{name}/attn/{theirs}'] = np.einsum('ehd->hde', h['attn'][ours]['kernel'])
  return out


def read(weights):
  return {name: weight.read() for name, weight in weights.items()}


def flat(params):
  return {'/'.join(key.key for key in path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def shapes(params):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_same(got, want):
  assert sorted(got) == sorted(want)
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize('stacked', [False, True])
def test_openai_variables(tmp_path, stacked):
  params = tiny.params(tiny.model())
  np.savez(tmp_path / 'igpt.npz', **openai(params), **{
      'model/wte/adam_m': np.ones(3), 'global_step': np.ones(())})
  want = blocks.stack_layers(params, 'h') if stacked else params
  weights, notes = checkpoints.adapt(
      checkpoints.open_weights(tmp_path / 'igpt.npz'), shapes(want), False)
  assert_same(read(weights), flat(want))
  assert notes.looks_like == '3 layers of width 12 at 3 px with 7 colours'


def exported(tmp_path, params):
  config = image_gpt.get_config('smoke')
  config.model.colors = tiny.COLORS
  colors = palette.Palette(np.linspace(-1, 1, tiny.COLORS)[:, None])
  return checkpoints.write_huggingface(params, tmp_path / 'export', colors, config)


@pytest.mark.parametrize('stacked', [False, True])
def test_hugging_face_out_and_in(tmp_path, stacked):
  params = tiny.params(tiny.model(num_classes=4))
  want = blocks.stack_layers(params, 'h') if stacked else params
  folder = exported(tmp_path, want)
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert tensors['transformer.wte.weight'].shape == (tiny.COLORS + 1, tiny.WIDTH)
  np.testing.assert_array_equal(tensors['transformer.wte.weight'][-1], params['sos'])
  width = tiny.WIDTH
  qkv = tensors['transformer.h.1.attn.c_attn.weight']
  assert qkv.shape == (width, 3 * width)
  np.testing.assert_array_equal(qkv[:, width:2 * width].reshape(width, tiny.HEADS, -1),
                                params['h_1']['attn']['key']['kernel'])
  weights, _ = checkpoints.adapt(checkpoints.open_weights(folder), shapes(want), False)
  assert_same(read(weights), flat(want))
  assert json.loads((folder / 'config.json').read_text())['architectures'] == [
      'ImageGPTForImageClassification']
  found = checkpoints.find_palette(str(folder))
  np.testing.assert_allclose(palette.load(found, tiny.COLORS, 1).centers[:, 0],
                             np.linspace(-1, 1, tiny.COLORS), atol=1e-6)


def test_masks_are_ignored_and_biases_refused(tmp_path):
  folder = exported(tmp_path, tiny.params(tiny.model()))
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  tensors['transformer.h.0.attn.bias'] = np.ones((1, 1, 9, 9), np.float32)
  tensors['transformer.h.0.attn.masked_bias'] = np.array(-1e4, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / 'old.safetensors')
  weights = checkpoints.open_weights(tmp_path / 'old.safetensors')
  assert not [name for name in weights if 'bias' in name]
  tensors['transformer.h.2.mlp.c_fc.bias'][3] = .1
  safetensors.numpy.save_file(tensors, tmp_path / 'trained.safetensors')
  with pytest.raises(UserError, match='h.2.mlp.c_fc.bias is not zero'):
    checkpoints.open_weights(tmp_path / 'trained.safetensors')


def test_transfer_keeps_a_fresh_head_and_leaves_others_out():
  source = {name: Weight(value.shape, lambda value=value: value)
            for name, value in flat(tiny.params(tiny.model(num_classes=5))).items()}
  want = shapes(tiny.params(tiny.model(num_classes=4)))
  weights, notes = checkpoints.adapt(source, want, True)
  assert notes.fresh == notes.unused == ('wclf',) and 'wclf' not in weights
  same = shapes(tiny.params(tiny.model(num_classes=5)))
  weights, notes = checkpoints.adapt(source, same, True)
  assert not notes.fresh and 'wclf' in weights
  weights, notes = checkpoints.adapt(source, shapes(tiny.params(tiny.model())), False)
  assert notes.unused == ('wclf',) and 'wclf' not in weights
  weights, notes = checkpoints.adapt(source, shapes(tiny.params(tiny.model(bert=True))), False)
  assert set(notes.unused) == {'wclf', 'sos'}


def test_bert_has_no_place_at_hugging_face(tmp_path):
  with pytest.raises(UserError, match='cannot hold'):
    exported(tmp_path, tiny.params(tiny.model(bert=True)))


@pytest.mark.parametrize('name, words', [
    ('model.bin', 'pickles are never read'), ('folder', 'no model.safetensors')])
def test_what_cannot_be_read(tmp_path, name, words):
  path = pathlib.Path(tmp_path / name)
  path.mkdir() if name == 'folder' else path.write_bytes(b'x')
  with pytest.raises(UserError, match=words):
    checkpoints.open_weights(path)
