import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn
from jax.sharding import AxisType

from core import partition
from core.nn import blocks
from core.nn import losses
from vit_family import vit


# One instruction to the compiler, where the default generator is twenty rounds of them for each
# parameter: most of the time that compiling an init takes.
RNG = jax.random.key(0, impl='unsafe_rbg')


def shapes(name, patch, size=224, classes=1000, **kwargs):
  """Parameter shapes of a published model, without memory or compilation."""
  model = vit.VisionTransformer(classes, patch, **dataclasses.asdict(vit.VARIANTS[name]), **kwargs)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))['params']


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_sizes_of_a_head_are_the_published_ones():
  # Parameter counts do not depend on the number of heads.
  want = {'Ti': 64, 'S': 64, 'B': 64, 'L': 64, 'H': 80, 'g': 88, 'G': 104, 'M': 64, 'So400m': 72,
          'mini': 16, 'mu': 16, 'testing': 5}
  assert {name: size.width // size.heads for name, size in vit.VARIANTS.items()} == want
  assert all(size.width % size.heads == 0 for size in vit.VARIANTS.values())


@pytest.mark.parametrize('name, patch, size, want', [
    ('Ti', 16, 224, 5_717_416), ('Ti', 16, 384, 5_790_376),
    ('S', 16, 224, 22_050_664), ('S', 16, 384, 22_196_584),
    ('S', 32, 224, 22_878_952), ('S', 32, 384, 22_915_432),
    ('B', 8, 224, 86_576_872),
    ('B', 16, 224, 86_567_656), ('B', 16, 384, 86_859_496),
    ('B', 32, 224, 88_224_232), ('B', 32, 384, 88_297_192),
    ('L', 16, 224, 304_326_632), ('L', 16, 384, 304_715_752),
    ('L', 32, 224, 306_535_400), ('L', 32, 384, 306_632_680),
    # 27 patches of 14 make the published 384 px count of H/14; 384 itself does not divide.
    ('H', 14, 224, 632_045_800), ('H', 14, 378, 632_651_240),
    ('g', 14, 224, 1_012_611_432), ('G', 14, 224, 1_844_440_680),
])
def test_parameter_counts(name, patch, size, want):
  assert count(shapes(name, patch, size, scan=True)) == want


@pytest.mark.parametrize('name, patch, trunk, plain, with_pre_logits', [
    ('Ti', 16, 5_524_416, 9_740_115, 9_777_171),
    ('S', 16, 21_665_664, 30_075_219, 30_223_059),
    ('B', 16, 85_798_656, 102_595_923, 103_186_515),
    ('B', 32, 87_455_232, 104_252_499, 104_843_091),
    ('L', 16, 303_301_632, 325_690_707, 326_740_307),
    ('L', 32, 305_510_400, 327_899_475, 328_949_075),
    ('H', 14, 630_764_800, 658_745_683, 660_385_363),
])
def test_parameter_counts_of_imagenet21k_models(name, patch, trunk, plain, with_pre_logits):
  params = shapes(name, patch, classes=21_843, scan=True)
  assert count(params) == plain
  assert count({k: v for k, v in params.items() if k != 'head'}) == trunk
  width = vit.VARIANTS[name].width
  assert count(shapes(name, patch, classes=21_843, representation_size=width,
                      scan=True)) == with_pre_logits


@pytest.mark.parametrize('name, patch, want', [
    ('S', 16, 22_049_896), ('S', 32, 22_878_184), ('B', 16, 86_566_120), ('B', 32, 88_222_696)])
def test_parameter_counts_with_global_average_pooling(name, patch, want):
  params = shapes(name, patch, classifier='gap', scan=True)
  assert count(params) == want
  assert 'cls' not in params


@pytest.mark.parametrize('name, patch', [('B', 16), ('g', 14)])
def test_parameter_counts_with_a_map_head(name, patch):
  size = vit.VARIANTS[name]
  width, mlp_dim = size.width, size.mlp_dim
  params = shapes(name, patch, classifier='map', scan=True)
  head = {'/'.join(k.key for k in path): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(params['MAPHead_0'])}
  heads, head_dim = size.heads, width // size.heads
  attention = 'MultiHeadDotProductAttention_0'
  want = {'probe': (1, 1, width), f'{attention}/out/kernel': (heads, head_dim, width),
          f'{attention}/out/bias': (width,),
          'LayerNorm_0/scale': (width,), 'LayerNorm_0/bias': (width,),
          'MlpBlock_0/Dense_0/kernel': (width, mlp_dim), 'MlpBlock_0/Dense_0/bias': (mlp_dim,),
          'MlpBlock_0/Dense_1/kernel': (mlp_dim, width), 'MlpBlock_0/Dense_1/bias': (width,)}
  for part in ('query', 'key', 'value'):
    want |= {f'{attention}/{part}/kernel': (width, heads, head_dim),
             f'{attention}/{part}/bias': (heads, head_dim)}
  assert head == want
  # Beside the head it has what global average pooling has.
  assert count(params) - count(params['MAPHead_0']) == count(
      shapes(name, patch, classifier='gap', scan=True))


def test_a_hybrid_has_its_resnet_at_the_top_level():
  params = shapes('Ti', 1, stages=(1, 2), scan=True)
  flat = {'/'.join(k.key for k in path): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  plain = shapes('Ti', 16, scan=True)
  assert set(params) - set(plain) == {'conv_root', 'gn_root', 'block1', 'block2'}
  assert set(params['block1']) == {'unit1'} and set(params['block2']) == {'unit1', 'unit2'}
  unit = {k.removeprefix('block2/unit1/'): v for k, v in flat.items() if 'block2/unit1/' in k}
  assert unit == {
      'conv1/kernel': (1, 1, 256, 128), 'gn1/scale': (128,), 'gn1/bias': (128,),
      'conv2/kernel': (3, 3, 128, 128), 'gn2/scale': (128,), 'gn2/bias': (128,),
      'conv3/kernel': (1, 1, 128, 512), 'gn3/scale': (512,), 'gn3/bias': (512,),
      'conv_proj/kernel': (1, 1, 256, 512), 'gn_proj/scale': (512,), 'gn_proj/bias': (512,)}
  assert flat['conv_root/kernel'] == (7, 7, 3, 64) and flat['gn_root/scale'] == (64,)
  assert flat['embedding/kernel'] == (1, 1, 512, 192)
  # Stride 8 after the second stage.
  assert flat['Transformer/posembed_input/pos_embedding'] == (1, 28 * 28 + 1, 192)
  assert shapes('mu', 1, stages=(1,), width_factor=2)['embedding']['kernel'].shape[2] == 512


def test_names_and_shapes_are_the_public_ones():
  params = shapes('S', 16, representation_size=384)
  flat = {'/'.join(k.key for k in path): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  block = 'Transformer/encoderblock_11'
  attention = f'{block}/MultiHeadDotProductAttention_0'
  want = {
      'cls': (1, 1, 384),
      'embedding/kernel': (16, 16, 3, 384), 'embedding/bias': (384,),
      'Transformer/posembed_input/pos_embedding': (1, 197, 384),
      f'{block}/LayerNorm_0/scale': (384,), f'{block}/LayerNorm_0/bias': (384,),
      f'{attention}/query/kernel': (384, 6, 64), f'{attention}/query/bias': (6, 64),
      f'{attention}/key/kernel': (384, 6, 64), f'{attention}/key/bias': (6, 64),
      f'{attention}/value/kernel': (384, 6, 64), f'{attention}/value/bias': (6, 64),
      f'{attention}/out/kernel': (6, 64, 384), f'{attention}/out/bias': (384,),
      f'{block}/LayerNorm_1/scale': (384,), f'{block}/LayerNorm_1/bias': (384,),
      f'{block}/MlpBlock_0/Dense_0/kernel': (384, 1536),
      f'{block}/MlpBlock_0/Dense_0/bias': (1536,),
      f'{block}/MlpBlock_0/Dense_1/kernel': (1536, 384), f'{block}/MlpBlock_0/Dense_1/bias': (384,),
      'Transformer/encoder_norm/scale': (384,), 'Transformer/encoder_norm/bias': (384,),
      'pre_logits/kernel': (384, 384), 'pre_logits/bias': (384,),
      'head/kernel': (384, 1000), 'head/bias': (1000,),
  }
  assert {k: v for k, v in flat.items() if 'encoderblock' not in k or block in k} == want
  assert len(flat) == len(want) + 11 * 16
  assert count(params) == count(shapes('S', 16, representation_size=384, scan=True))


def tiny(**kwargs):
  return vit.VisionTransformer(
      **{'num_classes': 10, 'patch_size': 4, 'width': 16, 'depth': 3, 'mlp_dim': 32, 'heads': 2}
      | kwargs)


def images(batch=3, size=16):
  return np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def init(model, x):
  return nn.meta.unbox(jax.jit(model.init)(RNG, x))['params']


def random_params(model, x):
  """Parameters of the size that an init has, without compiling one; the head is not zero."""
  tree = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), x))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize('classifier, bias', [('token', 0.0), ('gap', -10.0)])
def test_logits_start_at_the_head_bias(bias, classifier):
  model = tiny(depth=1, head_bias_init=bias, classifier=classifier)
  x = images()
  (logits, _), _ = jax.jit(model.init_with_output)(RNG, x)
  np.testing.assert_array_equal(logits, np.full((3, 10), bias))
  onehot = jax.nn.one_hot(jnp.arange(3), 10)
  np.testing.assert_allclose(losses.softmax_cross_entropy(logits, onehot), np.log(10), rtol=1e-6)
  if bias == -10.0:
    np.testing.assert_allclose(
        losses.sigmoid_cross_entropy(logits, onehot), 10 * 4.54e-5 + 10, rtol=1e-5)


def test_the_first_token_starts_the_same_for_all_images():
  model = tiny(depth=1)
  x = images()
  params = init(model, x)
  assert not params['cls'].any()
  # Before the encoder the first token is `cls` plus its own position, whatever the image.
  _, state = model.apply(
      {'params': params}, x, mutable=['intermediates'],
      capture_intermediates=lambda module, _: module.name == 'posembed_input')
  tokens = state['intermediates']['Transformer']['posembed_input']['__call__'][0]
  assert tokens.shape == (3, 17, 16)
  position = params['Transformer']['posembed_input']['pos_embedding'][0, 0]
  np.testing.assert_array_equal(tokens[:, 0], np.broadcast_to(position, (3, 16)))
  assert not np.allclose(tokens[0, 1], tokens[1, 1])


@pytest.mark.parametrize('classifier, tokens', [('token', 17), ('gap', 16), ('map', 16)])
@pytest.mark.parametrize('representation_size', [None, 24])
def test_shapes_of_all_classifiers_with_and_without_representation(
    classifier, tokens, representation_size):
  model = tiny(depth=1, classifier=classifier, representation_size=representation_size)
  x = images()
  (logits, features), boxed = jax.eval_shape(model.init_with_output, RNG, x)
  params = boxed['params']
  assert logits.shape == (3, 10)
  assert features['encoded'].shape == (3, tokens, 16)
  assert features['pooled'].shape == (3, 16)
  assert features['pre_logits'].shape == (3, representation_size or 16)
  assert ('pre_logits' in params) == (representation_size is not None)
  assert ('cls' in params, 'MAPHead_0' in params) == (classifier == 'token', classifier == 'map')


@pytest.mark.parametrize('classifier', ['token', 'gap'])
def test_what_is_pooled_and_what_the_head_reads(classifier):
  model = tiny(depth=1, classifier=classifier, representation_size=24)
  x = images()
  params = random_params(model, x)
  logits, features = jax.jit(model.apply)({'params': params}, x)
  encoded = features['encoded']
  np.testing.assert_allclose(
      features['pooled'], encoded[:, 0] if classifier == 'token' else encoded.mean(1), atol=1e-6)
  dense, head = params['pre_logits'], params['head']
  np.testing.assert_allclose(
      features['pre_logits'], np.tanh(features['pooled'] @ dense['kernel'] + dense['bias']),
      atol=1e-5)
  np.testing.assert_allclose(
      logits, features['pre_logits'] @ head['kernel'] + head['bias'], atol=1e-5)


def test_a_map_head_matches_a_float64_oracle():
  x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
  module = vit.MAPHead(heads=2, mlp_dim=12)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: rng.normal(0.3, 0.5, leaf.shape).astype(np.float32),
      nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))['params'])
  p = jax.tree.map(np.float64, params)
  a = p['MultiHeadDotProductAttention_0']

  def project(y, part):
    return np.einsum('bld,dhk->bhlk', y, a[part]['kernel']) + a[part]['bias'][:, None]
  query, key, value = project(p['probe'], 'query'), project(x, 'key'), project(x, 'value')
  weights = scipy.special.softmax(query @ key.swapaxes(-1, -2) / 2, axis=-1)
  y = np.einsum('bhlk,hkd->bd', weights @ value, a['out']['kernel']) + a['out']['bias']
  z = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
  z = z * p['LayerNorm_0']['scale'] + p['LayerNorm_0']['bias']
  first, second = p['MlpBlock_0']['Dense_0'], p['MlpBlock_0']['Dense_1']
  z = z @ first['kernel'] + first['bias']
  z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3)))
  want = y + z @ second['kernel'] + second['bias']
  np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, x), want, atol=2e-5)


def test_patches_are_embedded_like_the_convolution_whose_kernel_is_stored():
  x = np.random.default_rng(0).uniform(-1, 1, (2, 12, 20, 3)).astype(np.float32)
  module = vit.PatchEmbedding(4, 8)
  params = init(module, x)
  want = jax.lax.conv_general_dilated(
      x, params['kernel'], (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  np.testing.assert_allclose(
      module.apply({'params': params}, x), want.reshape(2, 15, 8) + params['bias'], atol=1e-5)
  # flax's default conv init: variance 1 / (4 * 4 * 3).
  wide = init(vit.PatchEmbedding(16, 512), np.zeros((1, 16, 16, 3)))
  np.testing.assert_allclose(np.std(wide['kernel']), 768 ** -0.5, rtol=0.02)
  with pytest.raises(ValueError, match='do not divide'):
    module.init(jax.random.key(0), np.zeros((1, 10, 12, 3)))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_scan_and_unrolled_models_agree(dtype):
  x = images()
  unrolled = tiny(depth=2, dtype=dtype)
  scanned = unrolled.clone(scan=True, remat='dots')
  params = random_params(unrolled, x)
  params['head']['kernel'] *= 5
  stacked = params | {'Transformer': blocks.stack_layers(params['Transformer'], 'encoderblock')}
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, random_params(scanned, x))
  a, _ = jax.jit(unrolled.apply)({'params': params}, x)
  b, _ = jax.jit(scanned.apply)({'params': stacked}, x)
  assert a.dtype == b.dtype == jnp.float32
  # The logits reach 10; bfloat16 has under three digits, and the two compile differently.
  np.testing.assert_allclose(a, b, atol=1e-4 if dtype == jnp.float32 else 0.3)


def test_dropout_acts_in_training_only():
  model = tiny(depth=1, dropout_rate=0.3, attention_dropout_rate=0.2)
  x = images()
  params = random_params(model, x)
  calm, never = (jax.jit(m.apply)({'params': params}, x)[1]['encoded']
                 for m in (model, tiny(depth=1)))
  np.testing.assert_array_equal(calm, never)
  encoded = jax.jit(lambda rng: model.apply(
      {'params': params}, x, train=True, rngs={'dropout': rng})[1]['encoded'])
  a, b = (encoded(jax.random.key(i)) for i in (0, 1))
  assert not np.allclose(a, b)


@pytest.mark.parametrize('scan, remat', [(False, 'none'), (True, 'dots')])
def test_stochastic_depth_grows_linearly_over_the_blocks(scan, remat):
  model = tiny(depth=3, classifier='gap', stochastic_depth=0.5, scan=scan, remat=remat)
  # One token that is zero but for what the MLP of each block adds: 1 in a dimension of its own.
  x = np.zeros((4000, 4, 4, 3), np.float32)
  params = jax.tree.map(np.zeros_like, random_params(tiny(depth=3, classifier='gap'), x[:1]))
  for i in range(3):
    params['Transformer'][f'encoderblock_{i}']['MlpBlock_0']['Dense_1']['bias'][i] = 1.0
  params['Transformer']['encoder_norm']['scale'][:] = 1.0
  if scan:
    params['Transformer'] = blocks.stack_layers(params['Transformer'], 'encoderblock')
  pooled = np.asarray(jax.jit(lambda p: model.apply(
      {'params': p}, x, train=True, rngs={'dropout': jax.random.key(0)})[1]['pooled'])(params))
  # The last norm scales an example; the untouched dimensions say where its zero went.
  added = pooled[:, :3] - pooled[:, 3:4]
  kept = added > 1e-3
  np.testing.assert_array_equal(kept[:, 0], True)
  np.testing.assert_allclose(kept.mean(0), [1, 0.75, 0.5], atol=0.04)
  # Blocks drop independently of each other, and examples too.
  np.testing.assert_allclose((kept[:, 1] & kept[:, 2]).mean(), 0.375, atol=0.04)
  for i, rate in ((1, 0.25), (2, 0.5)):
    np.testing.assert_allclose(
        (added[:, i] / added[:, 0])[kept[:, i]], 1 / (1 - rate), rtol=1e-4)


def test_without_stochastic_depth_training_is_the_same_program_and_asks_for_no_rng():
  x = images()
  plain, deep = tiny(depth=2), tiny(depth=2, stochastic_depth=0.3)
  params = random_params(plain, x)

  def program(model, scan, **kwargs):
    p = params
    if scan:
      p = p | {'Transformer': blocks.stack_layers(p['Transformer'], 'encoderblock')}
    fn = functools.partial(model.clone(scan=scan).apply, **kwargs)
    return str(jax.make_jaxpr(fn)({'params': p}, x))
  for scan in (False, True):
    want = program(plain, scan)
    assert program(plain, scan, train=True) == want
    assert program(deep, scan) == want
    dropped = program(deep, scan, train=True, rngs={'dropout': jax.random.key(0)})
    assert dropped != want and 'random_bits' in dropped
  with pytest.raises(ValueError, match='stochastic_depth=1.0'):
    jax.eval_shape(tiny(stochastic_depth=1.0).init, jax.random.key(0), x)


SHARDED = tiny(scan=True)


def loss_of_sharded(params, x):
  logits, features = SHARDED.apply({'params': params}, x)
  return (losses.softmax_cross_entropy(logits, jnp.arange(8)).mean()
          + (features['pooled'] ** 2).mean())


@functools.cache
def step_on_a_single_device():
  x = images(batch=8)
  params = random_params(SHARDED, x)
  return params, jax.jit(jax.value_and_grad(loss_of_sharded))(params, x)


@pytest.mark.parametrize('rules', ['fsdp', 'fsdp_tp'])
def test_a_sharded_step_equals_one_on_a_single_device(rules):
  x = images(batch=8)
  params, (want, want_grads) = step_on_a_single_device()
  mesh = jax.make_mesh((1, 4, 2), partition.AXES, axis_types=(AxisType.Auto,) * 3)
  layout = partition.Layout(mesh, partition.RULES[rules])
  boxed = jax.eval_shape(SHARDED.init, jax.random.key(0), x)['params']
  params = jax.device_put(params, partition.param_shardings(boxed, layout))
  x = jax.device_put(x, layout.sharding(('batch', None, None, None), x.shape))
  with partition.use(layout):
    got, grads = jax.jit(lambda p, x: jax.value_and_grad(loss_of_sharded)(p, x))(params, x)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, want_grads)


def test_a_mistyped_classifier_is_named():
  with pytest.raises(ValueError, match='classifier='):
    tiny(classifier='mean').init(jax.random.key(0), images())
