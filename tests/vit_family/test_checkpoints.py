import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, traverse_util

from configs import vit as vit_config
from core import pretrained
from core.config import UserError
from core.plan import make_plan
from core.weights import Weight, match_layers
from vit_family import bit, checkpoints, vit


def draw(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def shapes_of(model, size=32):
  tree = nn.unbox(jax.eval_shape(model.init, jax.random.key(0),
                                 jnp.zeros((1, size, size, 3))))['params']
  return {k: leaf.shape for k, leaf in traverse_util.flatten_dict(tree, sep='/').items()}


def transformer(**changes):
  sizes = dict(num_classes=5, patch_size=8, width=8, depth=2, mlp_dim=16, heads=2)
  return vit.VisionTransformer(**sizes | changes)


def tables(arrays):
  return {k: Weight(v.shape, lambda v=v: v) for k, v in arrays.items()}


def opened(tmp_path, arrays):
  np.savez(tmp_path / 'x.npz', **arrays)
  return checkpoints.open_weights(tmp_path / 'x.npz')


def same_shapes(weights, shapes):
  assert {k: w.shape for k, w in weights.items()} == shapes


# The public layout (ViT's own code) at width 8, 2 heads, patch 8, 32 pixels.
BLOCK = {
    'LayerNorm_0/scale': (8,), 'LayerNorm_0/bias': (8,),
    **{f'MultiHeadDotProductAttention_1/{n}/kernel': (8, 2, 4) for n in ('query', 'key', 'value')},
    **{f'MultiHeadDotProductAttention_1/{n}/bias': (2, 4) for n in ('query', 'key', 'value')},
    'MultiHeadDotProductAttention_1/out/kernel': (2, 4, 8),
    'MultiHeadDotProductAttention_1/out/bias': (8,),
    'LayerNorm_2/scale': (8,), 'LayerNorm_2/bias': (8,),
    'MlpBlock_3/Dense_0/kernel': (8, 16), 'MlpBlock_3/Dense_0/bias': (16,),
    'MlpBlock_3/Dense_1/kernel': (16, 8), 'MlpBlock_3/Dense_1/bias': (8,)}
ENCODER = {
    'cls': (1, 1, 8), 'Transformer/posembed_input/pos_embedding': (1, 17, 8),
    'Transformer/encoder_norm/scale': (8,), 'Transformer/encoder_norm/bias': (8,),
    'head/kernel': (8, 5), 'head/bias': (5,),
    **{f'Transformer/encoderblock_{i}/{k}': s for i in range(2) for k, s in BLOCK.items()}}
AUGREG = ENCODER | {'embedding/kernel': (8, 8, 3, 8), 'embedding/bias': (8,)}
IMAGENET21K = AUGREG | {'pre_logits/kernel': (8, 8), 'pre_logits/bias': (8,)}


@pytest.mark.parametrize('public, changes', [
    (AUGREG, {}), (IMAGENET21K, dict(representation_size=8))])
def test_vit_files_have_our_shapes_after_renaming_and_back(public, changes, tmp_path):
  arrays = draw(public)
  weights = opened(tmp_path, arrays)
  same_shapes(weights, shapes_of(transformer(**changes)))
  block = 'Transformer/encoderblock_1'
  for ours, theirs in (('LayerNorm_1/scale', 'LayerNorm_2/scale'),
                       ('LayerNorm_0/bias', 'LayerNorm_0/bias'),
                       ('MultiHeadDotProductAttention_0/out/kernel',
                        'MultiHeadDotProductAttention_1/out/kernel'),
                       ('MlpBlock_0/Dense_1/bias', 'MlpBlock_3/Dense_1/bias')):
    np.testing.assert_array_equal(weights[f'{block}/{ours}'].read(), arrays[f'{block}/{theirs}'])
  back(tmp_path, weights, arrays)


def back(tmp_path, weights, arrays):
  """Our parameters write the very file they came from."""
  params = traverse_util.unflatten_dict({k: w.read() for k, w in weights.items()}, sep='/')
  path = checkpoints.write_npz(params, tmp_path / 'again')
  assert path.name == 'again.npz' and not list(tmp_path.glob('*.tmp'))
  with np.load(path, allow_pickle=False) as archive:
    assert set(archive.files) == set(arrays)
    for name, value in arrays.items():
      np.testing.assert_array_equal(archive[name], value)


def hybrid_file():
  """R50+ViT with one unit a stage: widths 64 and 128 inside, group norms shaped like images."""
  image = lambda c: (1, 1, 1, c)
  found = {'conv_root/kernel': (7, 7, 3, 64), 'gn_root/scale': image(64), 'gn_root/bias': image(64)}
  channels = 64
  for b, inner in ((1, 64), (2, 128)):
    unit = f'block{b}/unit1'
    out = 4 * inner
    found |= {f'{unit}/conv1/kernel': (1, 1, channels, inner),
              f'{unit}/conv2/kernel': (3, 3, inner, inner),
              f'{unit}/conv3/kernel': (1, 1, inner, out),
              f'{unit}/conv_proj/kernel': (1, 1, channels, out)}
    for norm, width in (('gn1', inner), ('gn2', inner), ('gn3', out), ('gn_proj', out)):
      found |= {f'{unit}/{norm}/scale': image(width), f'{unit}/{norm}/bias': image(width)}
    channels = out
  return ENCODER | found | {'embedding/kernel': (1, 1, 512, 8), 'embedding/bias': (8,)}


def test_hybrid_files_lose_the_image_shape_of_their_group_norms(tmp_path):
  arrays = draw(hybrid_file())
  weights = opened(tmp_path, arrays)
  same_shapes(weights, shapes_of(transformer(patch_size=1, stages=(1, 1))))
  name = 'block2/unit1/gn_proj/scale'
  np.testing.assert_array_equal(weights[name].read(), arrays[name][0, 0, 0])
  back(tmp_path, weights, arrays)


def bit_file(suffix=lambda: ''):
  def conv(*shape):
    return f'standardized_conv2d{suffix()}/kernel', shape
  found = {}
  def put(where, name_shape):
    found[f'resnet/{where}/{name_shape[0]}'] = name_shape[1]
  put('root_block', conv(7, 7, 3, 32))
  channels = 32
  for i, inner in enumerate((32, 64, 128, 256), 1):
    unit, out = f'block{i}/unit01', 4 * inner
    for part, shape, width in (('a', (1, 1, channels, inner), channels),
                               ('b', (3, 3, inner, inner), inner),
                               ('c', (1, 1, inner, out), inner)):
      put(f'{unit}/{part}', conv(*shape))
      for leaf in ('gamma', 'beta'):
        found[f'resnet/{unit}/{part}/group_norm/{leaf}'] = (width,)
    put(f'{unit}/a/proj', conv(1, 1, channels, out))
    channels = out
  return found | {'resnet/group_norm/gamma': (1024,), 'resnet/group_norm/beta': (1024,),
                  'resnet/head/conv2d/kernel': (1, 1, 1024, 5), 'resnet/head/conv2d/bias': (5,)}


def test_bit_files(tmp_path):
  size = bit.VARIANTS['R14x0.5']
  model = bit.BiT(num_classes=5, stages=size.stages, width_factor=size.width_factor)
  arrays = draw(bit_file())
  weights = opened(tmp_path, arrays)
  same_shapes(weights, shapes_of(model))
  np.testing.assert_array_equal(weights['head/kernel'].read(),
                                arrays['resnet/head/conv2d/kernel'][0, 0])
  back(tmp_path, weights, arrays)


def test_bit_files_with_counters_in_their_names(tmp_path):
  numbers = iter(range(1, 99))
  counted = bit_file(lambda: f'_{next(numbers)}')
  assert any(k.endswith('standardized_conv2d_17/kernel') for k in counted)
  weights = opened(tmp_path, draw(counted))
  plain = {k.removeprefix('resnet/').replace('head/conv2d', 'head') for k in bit_file()}
  assert set(weights) == plain


def linen(name):
  for new, old in (('MultiHeadDotProductAttention_0', 'MultiHeadDotProductAttention_1'),
                   ('LayerNorm_1', 'LayerNorm_2'), ('MlpBlock_0', 'MlpBlock_3')):
    name = name.replace(old, new)
  return name


@pytest.mark.parametrize('wrapper, beside', [
    ('', ()), ('params/', ()), ('params/img/', ('params/txt/head/kernel', 'params/t')),
    ('opt/target/', ('opt/state/step',))])
@pytest.mark.parametrize('stacked', [False, True])
def test_big_vision_files(wrapper, beside, stacked, tmp_path):
  """Linen names, blocks stacked or not, positions on top without an entry for the class token."""
  arrays = {linen(k): v for k, v in draw(AUGREG).items()}
  if stacked:
    for k in BLOCK:
      arrays[f'Transformer/encoderblock/{linen(k)}'] = np.stack(
          [arrays.pop(f'Transformer/encoderblock_{i}/{linen(k)}') for i in range(2)])
  table = arrays.pop('Transformer/posembed_input/pos_embedding')[:, 1:]
  arrays['pos_embedding'] = table
  weights = opened(tmp_path, {wrapper + k: v for k, v in arrays.items()} | {
      k: np.zeros(3, np.float32) for k in beside})
  same_shapes(weights, shapes_of(transformer(scan=stacked)))
  made = weights['Transformer/posembed_input/pos_embedding'].read()
  assert (made[:, 0] == 0).all()
  np.testing.assert_array_equal(made[:, 1:], table)


def test_a_map_head_keeps_its_names_and_positions_their_number(tmp_path):
  shapes = shapes_of(transformer(classifier='map'))
  arrays = draw(shapes)
  arrays['pos_embedding'] = arrays.pop('Transformer/posembed_input/pos_embedding')
  assert arrays['pos_embedding'].shape == (1, 16, 8) and 'MAPHead_0/probe' in arrays
  same_shapes(opened(tmp_path, arrays), shapes)


def test_stacked_parameters_write_the_same_file():
  flat = {k: w.read() for k, w in checkpoints.from_public(tables(draw(AUGREG))).items()}
  one = traverse_util.unflatten_dict(flat, sep='/')
  stacked = match_layers(tables(flat), ['Transformer/encoderblock/x'], 'Transformer/encoderblock')
  other = traverse_util.unflatten_dict({k: w.read() for k, w in stacked.items()}, sep='/')
  one, other = checkpoints.to_public(one), checkpoints.to_public(other)
  assert one.keys() == other.keys() == AUGREG.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name])


def smoke_plan(**model):
  config = vit_config.get_config('smoke')
  config.model.update(model)
  return make_plan(config, jax.devices()[:1])


def test_from_file_to_state_and_what_is_refused(tmp_path, capsys):
  plan = smoke_plan()
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), plan.params_shape)
  path = str(checkpoints.write_npz(params, tmp_path / 'model'))
  jax.tree.map(np.testing.assert_array_equal, params, pretrained.read_params(plan, path))
  assert '24 tensors read; not used: none; fresh: none' in capsys.readouterr().out

  state = plan.init(jax.random.key(0))
  loaded = pretrained.load_into(plan, state, path)
  assert (np.asarray(loaded.params['head']['kernel']) == 0).all()  # always the fresh one
  jax.tree.map(np.testing.assert_array_equal, loaded.params | {'head': 0}, params | {'head': 0})

  other = smoke_plan(variant='testing')
  for load in (pretrained.read_params, lambda plan, path: pretrained.load_into(
      plan, state.replace(params=plan.params_shape), path)):
    with pytest.raises(UserError, match='model.npz, which looks like mu/8 at 16 px, is of another '
                       'model: .*there, .*; .*; .* and [0-9]+ more'):
      load(other, path)


def test_a_folder_of_something_else(tmp_path):
  with pytest.raises(UserError, match='neither a workdir .* nor a folder of transformers'):
    checkpoints.open_weights(tmp_path)
  with pytest.raises(UserError, match='pytorch_model.bin: not a .npz or .safetensors file'):
    checkpoints.open_weights(tmp_path / 'pytorch_model.bin')
