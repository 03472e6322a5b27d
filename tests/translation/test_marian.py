"""Marian's layout, on folders made up here under its names."""

import functools
import json
import pathlib

import flax
import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import seq2seq as seq2seq_configs
from configs import transformer as configs
from core.config import UserError
from core.nn import blocks
from translation import marian, transformer, vocabulary

VOCAB, SOURCE_VOCAB, WIDTH, DEPTH, HEADS, MLP = 11, 7, 8, 2, 2, 6
SETTINGS = dict(norm='post', positions='marian', attention_bias=True, epsilon=1e-5)


def model(**changes):
  return transformer.Transformer(**dict(vocab=VOCAB, width=WIDTH, depth=DEPTH, heads=HEADS,
                                        mlp_dim=MLP) | SETTINGS | changes)


@functools.cache
def shapes(made):
  ids = np.zeros((1, 2), np.int32)
  return flax.linen.unbox(jax.eval_shape(made.init, jax.random.key(0), ids, ids))['params']


def params(made, seed=0):
  """Random numbers everywhere, in norms and biases too."""
  rng = np.random.default_rng(seed)
  draw = lambda path, leaf: (path[-1].key == 'scale') + rng.normal(
      0, leaf.shape[0] ** -.5 if leaf.ndim > 1 else .2, leaf.shape).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes(made))


def config(made=None, **changes):
  made, config = made or model(), configs.get_config('smoke')
  config.model.update({key: getattr(made, key) for key in (
      'width', 'depth', 'heads', 'mlp_dim', 'activation', *SETTINGS)} | changes)
  config.data.vocab.update(dict(size=made.vocab, source_size=made.source_vocab))
  return config


def theirs_of(params):
  """The tensors of MarianMTModel, written out here and not by the code under test."""
  start = np.zeros((1, WIDTH), np.float32)
  table = np.concatenate([params['embedding'], start])
  if 'source_embedding' in params:
    out = {'model.encoder.embed_tokens.weight': params['source_embedding'],
           'model.decoder.embed_tokens.weight': table}
  else:
    out = {'model.shared.weight': table}
  out['final_logits_bias'] = np.array([[0.] * VOCAB + [-1e4]], np.float32)
  for side in ('encoder', 'decoder'):
    for i in range(DEPTH):
      layer, to = params[side][f'layers_{i}'], f'model.{side}.layers.{i}.'
      attentions = ['self_attn', 'encoder_attn'][:1 if side == 'encoder' else 2]
      for number, name in enumerate([*attentions, 'final']):
        norm = layer[f'LayerNorm_{number}']
        out[f'{to}{name}_layer_norm.weight'] = norm['scale']
        out[f'{to}{name}_layer_norm.bias'] = norm['bias']
      for number, name in enumerate(attentions):
        attention = layer[f'MultiHeadDotProductAttention_{number}']
        for short, part in (('q', 'query'), ('k', 'key'), ('v', 'value')):
          out[f'{to}{name}.{short}_proj.weight'] = np.einsum(
              'ehd->hde', attention[part]['kernel']).reshape(WIDTH, WIDTH)
          out[f'{to}{name}.{short}_proj.bias'] = np.concatenate(list(attention[part]['bias']))
        out[f'{to}{name}.out_proj.weight'] = np.einsum(
            'hde->ehd', attention['out']['kernel']).reshape(WIDTH, WIDTH)
        out[f'{to}{name}.out_proj.bias'] = attention['out']['bias']
      for number in (0, 1):
        dense = layer['MlpBlock_0'][f'Dense_{number}']
        out[f'{to}fc{number + 1}.weight'] = dense['kernel'].T
        out[f'{to}fc{number + 1}.bias'] = dense['bias']
  return out


# Their config.json, as opus-mt's.
DESCRIBED = dict(
    model_type='marian', d_model=WIDTH, encoder_layers=DEPTH, decoder_layers=DEPTH,
    encoder_ffn_dim=MLP, decoder_ffn_dim=MLP, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, activation_function='relu', scale_embedding=True,
    vocab_size=VOCAB, pad_token_id=VOCAB - 1, eos_token_id=0, decoder_start_token_id=VOCAB - 1,
    normalize_before=False, add_final_layer_norm=False, static_position_embeddings=True)


def opus(tmp_path, params, tensors=(), **changes):
  """A folder with ids like opus-mt's: the end is 0, padding the last, with which decoders begin."""
  found = {name: np.ascontiguousarray(value) for name, value in theirs_of(params).items()}
  table = np.roll(params['embedding'], -1, axis=0)
  table[-1] = 0
  found |= {'model.shared.weight': table, 'final_logits_bias': np.zeros((1, VOCAB), np.float32),
            'model.encoder.embed_positions.weight': np.ones((5, WIDTH), np.float32)} | dict(tensors)
  folder = tmp_path / 'opus'
  folder.mkdir()
  safetensors.numpy.save_file(found, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(DESCRIBED | changes))
  return folder


def flat(params):
  return {'/'.join(key.key for key in path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_same(got, want):
  assert sorted(got) == sorted(want)
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def read(folder, made, found=None):
  weights, notes = marian.adapt(marian.open_weights(folder, found or config(made)), shapes(made),
                                False)
  return {name: weight.read() for name, weight in weights.items()}, notes


@pytest.mark.parametrize('source_vocab', [0, SOURCE_VOCAB])
@pytest.mark.parametrize('scan', [False, True])
def test_out_and_in(tmp_path, source_vocab, scan):
  made = model(source_vocab=source_vocab)
  single = params(made)
  want = single
  if scan:
    made = made.clone(scan=True)
    want = {name: blocks.stack_layers(part, 'layers') if name in ('encoder', 'decoder') else part
            for name, part in single.items()}
  folder = marian.write(want, tmp_path / 'export', config(made))
  assert sorted(file.name for file in folder.iterdir()) == [
      'config.json', 'generation_config.json', 'model.safetensors']
  assert_same(safetensors.numpy.load_file(folder / 'model.safetensors'), theirs_of(single))
  got, notes = read(folder, made)
  assert_same(got, flat(want))
  assert notes.looks_like == 'a Transformer of 2 layers, width 8, 11 entries'
  assert not notes.unused and not notes.fresh


def test_the_description(tmp_path):
  made = model(source_vocab=SOURCE_VOCAB)
  found = config(made, dropout=.3, attention_dropout=.2, hidden_dropout=True)
  found.data.buckets, found.eval.search.extra, found.eval.search.alpha = (16, 600), 30, .5
  found.eval.search.beams = 3
  folder = marian.write(params(made), tmp_path / 'export', found)
  described = json.loads((folder / 'config.json').read_text())
  for key, value in dict(
      model_type='marian', vocab_size=SOURCE_VOCAB, decoder_vocab_size=VOCAB + 1, d_model=WIDTH,
      share_encoder_decoder_embeddings=False, scale_embedding=True, tie_word_embeddings=True,
      pad_token_id=0, eos_token_id=1, decoder_start_token_id=VOCAB, forced_eos_token_id=None,
      activation_function='relu', max_position_embeddings=630, dropout=.3, attention_dropout=.2,
      activation_dropout=.3, encoder_ffn_dim=MLP, decoder_attention_heads=HEADS).items():
    assert described[key] == value, key
  generation = json.loads((folder / 'generation_config.json').read_text())
  # The start counts as a token there.
  assert generation == dict(
      pad_token_id=0, eos_token_id=1, bos_token_id=None, decoder_start_token_id=VOCAB,
      forced_eos_token_id=None, max_length=631, num_beams=3, length_penalty=.5,
      early_stopping='never')


def test_ids_of_opus_become_ours(tmp_path):
  made = model()
  want = params(made)
  want['embedding'][0] = 0
  got, _ = read(opus(tmp_path, want), made)
  assert_same(got, flat(want))


def test_a_bias_of_padding_and_start_apart(tmp_path):
  """Padding in the middle, a start of its own before it: the others keep their order."""
  made = model(vocab=VOCAB - 1)
  table = np.arange(VOCAB, dtype=np.float32)[:, None] * np.ones(WIDTH, np.float32)
  table[3] = 0
  bias = np.zeros((1, VOCAB), np.float32)
  bias[0, 3] = -1e9
  tensors = {'model.shared.weight': table, 'final_logits_bias': bias}
  folder = opus(tmp_path, params(model()), tensors, pad_token_id=5, eos_token_id=2,
                decoder_start_token_id=3)
  assert read(folder, made)[0]['embedding'][:, 0].tolist() == [5, 2, 0, 1, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize('changes, named', [
    (dict(norm='pre'), "config.model.norm='post' (it is 'pre')"),
    (dict(positions='paper'), "config.model.positions='marian' (it is 'paper')"),
    (dict(positions='learned'), "config.model.positions='marian' (it is 'learned')"),
    (dict(attention_bias=False), 'config.model.attention_bias=True'),
    (dict(epsilon=1e-6), 'config.model.epsilon=1e-05'),
    (dict(head_dim=3), r'config.model.head_dim=0 (it is 3)'),
    (dict(activation='tanh'), 'config.model.activation one of relu, swish')])
def test_models_that_cannot_be_written(tmp_path, changes, named):
  found = config(**changes)
  with pytest.raises(UserError) as raised:
    marian.write(params(model()), tmp_path / 'export', found)
  assert named in str(raised.value)
  assert not (tmp_path / 'export').exists()
  with pytest.raises(UserError, match="Marian's layout needs"):
    marian.open_weights(opus(tmp_path, params(model())), found)


def test_a_recurrent_model_cannot_be_written(tmp_path):
  with pytest.raises(UserError, match="config.model.kind='recurrent'"):
    marian.write({}, tmp_path / 'export', seq2seq_configs.get_config('smoke'))


@pytest.mark.parametrize('changes, named', [
    (dict(model_type='bart'), "model_type='bart'"),
    (dict(scale_embedding=False), 'scale_embedding=False'),
    (dict(tie_word_embeddings=False), 'tie_word_embeddings=False'),
    (dict(normalize_before=True), 'normalize_before=True'),
    (dict(static_position_embeddings=False), 'static_position_embeddings=False'),
    (dict(decoder_layers=3), r'config.model.depth=3 \(decoder_layers\)'),
    (dict(encoder_attention_heads=4), r'config.model.heads=4 \(encoder_attention_heads\)'),
    (dict(activation_function='silu'), "config.model.activation='swish'"),
    (dict(activation_function='gelu'), "config.model.activation='gelu_erf'"),
    (dict(pad_token_id=None), 'pad_token_id=None'),
    (dict(eos_token_id=VOCAB - 1), 'an end that is neither'),
    (dict(eos_token_id=VOCAB), 'in a vocabulary of 11'),
    (dict(decoder_start_token_id=4), 'entry 4 begins sentences and can be drawn')])
def test_settings_that_are_not_ours(tmp_path, changes, named):
  with pytest.raises(UserError, match=named):
    marian.open_weights(opus(tmp_path, params(model()), **changes), config())


def test_numbers_that_ours_cannot_hold(tmp_path):
  made = model()
  bias = np.zeros((1, VOCAB), np.float32)
  bias[0, 4] = 1
  (tmp_path / 'a').mkdir()
  with pytest.raises(UserError, match='final_logits_bias is not zero'):
    marian.open_weights(opus(tmp_path / 'a', params(made), {'final_logits_bias': bias}), config())
  weights = marian.open_weights(
      opus(tmp_path, params(made), {'model.shared.weight': params(made)['embedding']}), config())
  with pytest.raises(UserError, match='row 10 of the embedding'):
    weights['embedding'].read()


def test_what_the_model_has_no_place_for_is_named(tmp_path):
  got, _ = read(opus(tmp_path, params(model()), {
      'model.encoder.layer_norm.weight': np.ones(WIDTH, np.float32)}), model())
  assert 'model.encoder.layer_norm.weight' in got


def test_files_that_are_not_there(tmp_path):
  folder = opus(tmp_path, params(model()))
  assert marian.open_weights(folder / 'model.safetensors', config())
  (folder / 'pytorch_model.bin').write_bytes(b'')
  for path in (tmp_path, tmp_path / 'nothing', folder / 'pytorch_model.bin'):
    with pytest.raises(UserError, match='pickles are never read'):
      marian.open_weights(path, config())
  for broken in ('{', '[]'):
    (folder / 'config.json').write_text(broken)
    with pytest.raises(UserError, match='config.json: not JSON of a model'):
      marian.open_weights(folder, config())


def test_the_vocabulary_goes_along(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  texts = ['a bush, and "bushes" are green.', 'grün ist der Busch; Büsche sind grün'] * 3
  source, target = (vocabulary.train([text], 'bpe', 60) for text in texts[:2])
  made = model(source_vocab=60, vocab=60)
  folder = marian.write(params(made), tmp_path / 'export', config(made),
                        dict(source=source, target=target))
  for at, vocab, text in ((folder, source, texts[0]), (folder / 'target', target, texts[1])):
    tokenizer = tokenizers.Tokenizer.from_file(str(at / 'tokenizer.json'))
    coded = tokenizer.encode(text).ids
    assert coded == vocab.encode([text])[0] + [vocabulary.EOS]
    assert tokenizer.decode([0, *coded, 0]) == text
    assert json.loads((at / 'tokenizer_config.json').read_text())['eos_token'] == '</s>'
  one = marian.write(params(made), pathlib.Path(tmp_path / 'one'), config(made),
                     dict(source=target, target=target))
  assert not (one / 'target').exists()
