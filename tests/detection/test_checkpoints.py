"""Checkpoints of DETR, fabricated under the names of the public files."""

import functools
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import detr as configs
from core.checkpoint import compare_shapes
from core.config import UserError
from core.weights import Weight
from detection import checkpoints, detector, layouts

WIDTH, HEADS, MLP, QUERIES, CLASSES, CHANNELS = 32, 4, 24, 5, 7, 4
ENCODER, DECODER = 1, 2


def config(**changes):
  made = configs.get_config('')
  made.model.update(dict(
      backbone_norm='frozen', norm='post', positions_at='attention', positions='sine',
      dilation=False, width=WIDTH, heads=HEADS, mlp_dim=MLP, encoder_layers=ENCODER,
      decoder_layers=DECODER, queries=QUERIES, num_classes=CLASSES, masks='none', scan=True)
      | changes)
  return made


@functools.cache
def shapes(masks='none', scan=True, classes=CLASSES, queries=QUERIES, **changes):
  made = detector.DETR(**dict(
      classes=classes, queries=queries, width=WIDTH, stages=(1, 1, 1, 2), channels=CHANNELS,
      encoder_layers=ENCODER, decoder_layers=DECODER, heads=HEADS, mlp_dim=MLP, masks=masks,
      scan=scan) | changes)
  made = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8),
                        jnp.ones((1, 2), jnp.int32))
  return flax.linen.unbox(made)['params']


def names(tree):
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return {name: tuple(x.shape) for name, x in flat.items()}


def norm(name, size):
  return {f'{name}.{leaf}': (size,) for leaf in ('weight', 'bias', 'running_mean', 'running_var')}


def linear(name, out, inputs):
  return {f'{name}.weight': (out, inputs), f'{name}.bias': (out,)}


def conv(name, out, inputs, size):
  return {f'{name}.weight': (out, inputs, size, size), f'{name}.bias': (out,)}


def pair(name, size):
  return {f'{name}.weight': (size,), f'{name}.bias': (size,)}


def resnet(prefix=''):
  """Names and shapes of torchvision."""
  out = {f'{prefix}conv1.weight': (CHANNELS, 3, 7, 7), **norm(f'{prefix}bn1', CHANNELS)}
  inputs = CHANNELS
  for stage, units in enumerate((1, 1, 1, 2)):
    inside = CHANNELS * 2 ** stage
    for i in range(units):
      unit = f'{prefix}layer{stage + 1}.{i}'
      for j, (o, n, k) in enumerate(((inside, inputs, 1), (inside, inside, 3),
                                     (4 * inside, inside, 1)), 1):
        out |= {f'{unit}.conv{j}.weight': (o, n, k, k)} | norm(f'{unit}.bn{j}', o)
      if i == 0:
        out |= {f'{unit}.downsample.0.weight': (4 * inside, inputs, 1, 1)}
        out |= norm(f'{unit}.downsample.1', 4 * inside)
      inputs = 4 * inside
  return out


def reference(masks=False, learned=False):
  """Names and shapes of the files of the reference implementation."""
  out = resnet('backbone.0.body.')
  if learned:
    out |= {f'backbone.1.{axis}_embed.weight': (50, WIDTH // 2) for axis in ('row', 'col')}
  out |= {'query_embed.weight': (QUERIES, WIDTH), 'transformer.decoder.norm.weight': (WIDTH,),
          'transformer.decoder.norm.bias': (WIDTH,)}
  out |= conv('input_proj', WIDTH, 32 * CHANNELS, 1)
  for side, depth, attentions in (('encoder', ENCODER, ['self_attn']),
                                  ('decoder', DECODER, ['self_attn', 'multihead_attn'])):
    for i in range(depth):
      layer = f'transformer.{side}.layers.{i}'
      for name in attentions:
        out |= {f'{layer}.{name}.in_proj_weight': (3 * WIDTH, WIDTH),
                f'{layer}.{name}.in_proj_bias': (3 * WIDTH,)}
        out |= linear(f'{layer}.{name}.out_proj', WIDTH, WIDTH)
      out |= linear(f'{layer}.linear1', MLP, WIDTH) | linear(f'{layer}.linear2', WIDTH, MLP)
      for n in range(len(attentions) + 1):
        out |= pair(f'{layer}.norm{n + 1}', WIDTH)
  out |= linear('class_embed', CLASSES + 1, WIDTH)
  for i, size in enumerate((WIDTH, WIDTH, 4)):
    out |= linear(f'bbox_embed.layers.{i}', size, WIDTH)
  if masks:
    out = {f'detr.{name}': shape for name, shape in out.items()}
    out |= linear('bbox_attention.q_linear', WIDTH, WIDTH)
    out |= linear('bbox_attention.k_linear', WIDTH, WIDTH)
    channels = [WIDTH + HEADS, WIDTH + HEADS, *(WIDTH >> i for i in range(1, 5))]
    for i, (n, o) in enumerate(zip(channels, channels[1:]), 1):
      out |= conv(f'mask_head.lay{i}', o, n, 3) | pair(f'mask_head.gn{i}', o)
    for i, level in enumerate((16, 8, 4), 1):
      out |= conv(f'mask_head.adapter{i}', channels[i + 1], level * CHANNELS, 1)
    out |= conv('mask_head.out_lay', 1, channels[-1], 3)
  return out


def drawn(table, seed=0):
  rng = np.random.default_rng(seed)
  return {name: (rng.uniform(.5, 2, shape) if name.endswith('running_var') else
                 rng.normal(size=shape)).astype(np.float32) for name, shape in table.items()}


def tables(arrays):
  return {name: Weight(value.shape, lambda value=value: value) for name, value in arrays.items()}


def adapted(weights, want, transfer=False):
  """What a load would read: as `core.pretrained` does it, without devices."""
  found, notes = checkpoints.adapt(weights, want, transfer)
  expected = {name: shape for name, shape in names(want).items() if name not in notes.fresh}
  compare_shapes({name: weight.shape for name, weight in found.items()}, expected, 'x')
  return {name: weight.read() for name, weight in found.items()}, notes


@pytest.mark.parametrize('masks', ['none', 'joint'])
@pytest.mark.parametrize('scan', [False, True])
def test_files_of_the_reference(masks, scan):
  arrays = drawn(reference(masks == 'joint'))
  got, notes = adapted(layouts.from_torch(tables(arrays)), shapes(masks, scan))
  assert not notes.unused and not notes.fresh
  assert notes.looks_like == (f'DETR R17, {CLASSES} classes, {QUERIES} queries'
                              + (', mask head' if masks == 'joint' else ''))
  assert all(got[name].shape == shape for name, shape in names(shapes(masks, scan)).items())
  p = 'detr.' if masks == 'joint' else ''
  layer = lambda side, i, name: (got[f'transformer/{side}/layers/{name}'][i] if scan else
                                 got[f'transformer/{side}/layers_{i}/{name}'])
  fused = arrays[f'{p}transformer.decoder.layers.1.multihead_attn.in_proj_weight']
  x = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
  for i, part in enumerate(('query', 'key', 'value')):
    # Heads are consecutive rows of torch's matrix.
    np.testing.assert_allclose(
        np.einsum('d,dnh->nh', x, layer('decoder', 1, f'cross_attn/{part}/kernel')).ravel(),
        fused[i * WIDTH:(i + 1) * WIDTH] @ x, rtol=1e-4, atol=1e-4)
  bias = arrays[f'{p}transformer.encoder.layers.0.self_attn.in_proj_bias']
  np.testing.assert_array_equal(layer('encoder', 0, 'self_attn/key/bias').ravel(),
                                bias[WIDTH:2 * WIDTH])
  np.testing.assert_array_equal(
      layer('decoder', 0, 'self_attn/out/kernel').reshape(WIDTH, WIDTH),
      arrays[f'{p}transformer.decoder.layers.0.self_attn.out_proj.weight'].T)
  np.testing.assert_array_equal(got['input_proj/kernel'],
                                arrays[f'{p}input_proj.weight'][:, :, 0, 0].T)
  np.testing.assert_array_equal(got['query_embed'], arrays[f'{p}query_embed.weight'])
  unit = {k: arrays[f'{p}backbone.0.body.layer4.1.bn2.{k}'].astype(float)
          for k in ('weight', 'bias', 'running_mean', 'running_var')}
  # y = (x - mean) / sqrt(variance + 1e-5) weight + bias
  y = (.7 - unit['running_mean']) / np.sqrt(unit['running_var'] + 1e-5) * unit['weight']
  np.testing.assert_allclose(
      .7 * got['backbone/layer4_1/conv2/scale'] + got['backbone/layer4_1/conv2/bias'],
      y + unit['bias'], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
      got['backbone/layer4_1/conv2/kernel'][2, 0],
      arrays[f'{p}backbone.0.body.layer4.1.conv2.weight'][:, :, 2, 0].T)


def test_learned_positions():
  arrays = drawn(reference(learned=True))
  got, _ = adapted(layouts.from_torch(tables(arrays)), shapes(positions='learned'))
  for axis in ('row', 'col'):
    np.testing.assert_array_equal(got[f'position_embedding/{axis}_embed'],
                                  arrays[f'backbone.1.{axis}_embed.weight'])
  for transfer in (False, True):
    with pytest.raises(UserError, match=r'position_embedding/col_embed: .* there, not used'):
      adapted(layouts.from_torch(tables(arrays)), shapes(), transfer)


def test_what_starts_fresh():
  weights = layouts.from_torch(tables(drawn(reference())))
  got, notes = adapted(weights, shapes(classes=3), True)
  assert set(notes.fresh) == {'class_embed/kernel', 'class_embed/bias'} == set(notes.unused)
  assert 'query_embed' in got and 'bbox_embed_2/kernel' in got
  with pytest.raises(UserError, match=r'class_embed/bias: \(8,\) there, \(4,\) in the model'):
    adapted(weights, shapes(classes=3))
  _, notes = adapted(weights, shapes(queries=9), True)
  assert notes.fresh == ('query_embed',) == notes.unused
  # The second stage of panoptic training (section 4.4).
  got, notes = adapted(weights, shapes('frozen'), True)
  assert {name.split('/')[0] for name in notes.fresh} == {'bbox_attention', 'mask_head'}
  assert set(got) == set(names(shapes())) and not notes.unused
  with pytest.raises(UserError, match='bbox_attention/key/bias: missing there'):
    adapted(weights, shapes('frozen'))
  # Other sizes are another model.
  with pytest.raises(UserError, match='is of another model: .*encoder/layers'):
    adapted(weights, shapes(encoder_layers=2), True)


def test_a_detector_cut_out_of_a_panoptic_one():
  weights = layouts.from_torch(tables(drawn(reference(True))))
  for transfer in (False, True):
    got, notes = adapted(weights, shapes(), transfer)
    assert set(got) == set(names(shapes())) and not notes.fresh
    assert {name.split('/')[0] for name in notes.unused} == {'bbox_attention', 'mask_head'}


HF_RESNET = {'conv1': 'embedder.embedder.convolution', 'bn1': 'embedder.embedder.normalization'}


def as_huggingface_resnet(name):
  """torchvision's name of a tensor in transformers' ResNet."""
  module, leaf = name.rsplit('.', 1)
  if module in HF_RESNET:
    return f'resnet.{HF_RESNET[module]}.{leaf}'
  stage, unit, part = module.split('.', 2)
  kind = 'convolution' if part.startswith('conv') or part == 'downsample.0' else 'normalization'
  part = 'shortcut' if part.startswith('down') else f'layer.{int(part[-1]) - 1}'
  return (f'resnet.encoder.stages.{int(stage[-1]) - 1}.layers.{unit}.{part}.{kind}.{leaf}')


@pytest.mark.parametrize('rename', [str, as_huggingface_resnet])
def test_a_backbone_alone(tmp_path, rename):
  """Of torchvision and timm, or of transformers: with a classifier and counters of batches."""
  arrays = {rename(name): value for name, value in drawn(resnet()).items()}
  arrays |= {'fc.weight': np.ones((3, 2), np.float32), 'fc.bias': np.ones(3, np.float32),
             rename('bn1.weight').replace('weight', 'num_batches_tracked'): np.array(7)}
  safetensors.numpy.save_file(arrays, tmp_path / 'r.safetensors')
  weights = checkpoints.open_weights(tmp_path / 'r.safetensors', config())
  got, notes = adapted(weights, shapes('joint'), True)
  assert set(got) == {name for name in names(shapes()) if name.startswith('backbone/')}
  assert set(notes.fresh) == set(names(shapes('joint'))) - set(got)
  assert set(notes.unused) == {'fc.weight', 'fc.bias'}
  assert notes.looks_like == 'the backbone R17 alone'
  np.testing.assert_array_equal(got['backbone/layer2_0/downsample/kernel'][0, 0],
                                arrays[rename('layer2.0.downsample.0.weight')][:, :, 0, 0].T)
  with pytest.raises(UserError, match='backbone R17 alone.* bbox_embed_0/bias: missing there'):
    found, notes = checkpoints.adapt(weights, shapes(), False)
    compare_shapes({name: w.shape for name, w in found.items()}, names(shapes()), notes.looks_like)
  with pytest.raises(UserError, match="batch norm; config.model.backbone_norm='group' must be"):
    checkpoints.open_weights(tmp_path / 'r.safetensors', config(backbone_norm='group'))


def test_a_norm_without_statistics_is_not_taken_for_one():
  arrays = {name: value for name, value in drawn(reference()).items() if 'running' not in name}
  found = layouts.from_torch(tables(arrays))
  with pytest.raises(UserError, match=r'backbone.0.body.bn1.bias: \(4,\) there, not used'):
    adapted(found, shapes())


def params(want, seed=3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), want)


@pytest.mark.parametrize('masks', ['none', 'joint'])
def test_a_folder_for_transformers(tmp_path, masks):
  # Heads such that transformers' group norms of 8 groups fit.
  made = config(masks=masks, heads=8)
  want = shapes(masks, heads=8)
  written = params(want)
  folder = checkpoints.write(written, tmp_path / 'export', made, ['cat', '', 'dog'])
  assert folder == tmp_path / 'export'
  assert sorted(p.name for p in folder.iterdir()) == [
      'config.json', 'model.safetensors', 'preprocessor_config.json']
  described = json.loads((folder / 'config.json').read_text())
  assert described['architectures'] == [
      'DetrForSegmentation' if masks == 'joint' else 'DetrForObjectDetection']
  assert described['backbone_config']['depths'] == [1, 1, 1, 2]
  assert described['backbone_config']['hidden_sizes'] == [16, 32, 64, 128]
  assert list(described['id2label'].values()) == ['cat', 'N/A', 'dog', *['N/A'] * 4]
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  p = 'detr.' if masks == 'joint' else ''
  stem = f'{p}model.backbone.conv_encoder.model.embedder.embedder.normalization'
  np.testing.assert_array_equal(tensors[f'{stem}.running_var'] + np.float32(1e-5), 1)
  np.testing.assert_array_equal(tensors[f'{stem}.weight'], written['backbone']['conv1']['scale'])
  got, notes = adapted(checkpoints.open_weights(folder, made), want)
  assert not notes.unused and not notes.fresh
  for name, value in flax.traverse_util.flatten_dict(written, sep='/').items():
    np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)
  with pytest.raises(UserError, match='needs config.model.heads=8 .encoder_attention_heads'):
    checkpoints.open_weights(folder, config(masks=masks, heads=2))
  described['activation_function'] = 'gelu'
  (folder / 'config.json').write_text(json.dumps(described))
  with pytest.raises(UserError, match="activation_function='gelu'"):
    checkpoints.open_weights(folder, made)
  (folder / 'config.json').write_text('[')
  with pytest.raises(UserError, match='config.json: not JSON'):
    checkpoints.open_weights(folder, made)


@pytest.mark.parametrize('changes', [
    dict(backbone_norm='group'), dict(norm='pre'), dict(dilation=True), dict(mlp_dim=0),
    dict(positions_at='input'), dict(masks='joint')])
def test_what_transformers_cannot_hold(tmp_path, changes):
  """Such as the norms of a mask head with 36 channels, whose groups would not be even."""
  made = config(**changes)
  want = shapes(**{key: changes[key] for key in ('norm', 'mlp_dim', 'masks') if key in changes})
  written = params(want)
  file = checkpoints.write(written, tmp_path / 'export', made, [])
  assert file == tmp_path / 'export.safetensors'
  weights = checkpoints.open_weights(file, made)
  assert 'transformer/decoder/layers_1/self_attn/query/kernel' in weights
  got, notes = adapted(weights, want)
  assert not notes.unused and not notes.fresh
  for name, value in flax.traverse_util.flatten_dict(written, sep='/').items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  key, value = next(iter(changes.items()))
  if key not in ('mlp_dim', 'masks'):  # These are seen in the shapes.
    with pytest.raises(UserError, match=f"it needs config.model.{key}={value!r} .it is"):
      checkpoints.open_weights(file, config())


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(UserError, match='pytorch_model.bin is never read'):
    checkpoints.open_weights(tmp_path, config())
  with pytest.raises(UserError, match='not a .pth, a .safetensors or a folder'):
    checkpoints.open_weights(tmp_path / 'x.bin', config())
  file = tmp_path / 'x.safetensors'
  safetensors.numpy.save_file({'vit.encoder.x': np.ones(1, np.float32)}, file)
  with pytest.raises(UserError, match='neither a DETR nor a ResNet; it has vit.encoder.x'):
    checkpoints.open_weights(file, config())
  safetensors.numpy.save_file({'a/b': np.ones(1, np.float32)}, file)
  with pytest.raises(UserError, match='not an export of ours'):
    checkpoints.open_weights(file, config())


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pth(tmp_path, zipped):
  """The published files are of before torch 1.6, when they were no archives."""
  torch = pytest.importorskip('torch')
  arrays = drawn(reference())
  state = {name: torch.tensor(value) for name, value in arrays.items()}
  torch.save({'model': state}, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
  got, _ = adapted(checkpoints.open_weights(tmp_path / 'x.pth', config()), shapes())
  wanted, _ = adapted(layouts.from_torch(tables(arrays)), shapes())
  assert got.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
