import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@pytest.mark.parametrize('bias', [0.0, -10.0])
@pytest.mark.parametrize('classifier', ['token', 'gap'])
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


@pytest.mark.parametrize('classifier, tokens', [('token', 17), ('gap', 16)])
@pytest.mark.parametrize('representation_size', [None, 16, 24])
def test_shapes_of_both_classifiers_with_and_without_representation(
    classifier, tokens, representation_size):
  model = tiny(depth=1, classifier=classifier, representation_size=representation_size)
  x = images()
  (logits, features), boxed = jax.jit(model.init_with_output)(RNG, x)
  params = nn.meta.unbox(boxed)['params']
  assert logits.shape == (3, 10)
  assert features['encoded'].shape == (3, tokens, 16)
  assert features['pooled'].shape == (3, 16)
  assert features['pre_logits'].shape == (3, representation_size or 16)
  encoded = features['encoded']
  np.testing.assert_allclose(
      features['pooled'], encoded[:, 0] if classifier == 'token' else encoded.mean(1), atol=1e-6)
  if representation_size:
    dense = params['pre_logits']
    np.testing.assert_allclose(
        features['pre_logits'], np.tanh(features['pooled'] @ dense['kernel'] + dense['bias']),
        atol=1e-5)
  else:
    assert 'pre_logits' not in params


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
  params = init(unrolled, x)
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), (16, 10))
  stacked = params | {'Transformer': blocks.stack_layers(params['Transformer'], 'encoderblock')}
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, init(scanned, x))
  a, _ = jax.jit(unrolled.apply)({'params': params}, x)
  b, _ = jax.jit(scanned.apply)({'params': stacked}, x)
  assert a.dtype == b.dtype == jnp.float32
  # The logits reach 10; bfloat16 has under three digits, and the two compile differently.
  np.testing.assert_allclose(a, b, atol=1e-4 if dtype == jnp.float32 else 0.3)


def test_dropout_acts_in_training_only():
  model = tiny(depth=1, dropout_rate=0.3, attention_dropout_rate=0.2)
  x = images()
  params = init(model, x)
  calm, never = (jax.jit(m.apply)({'params': params}, x)[1]['encoded']
                 for m in (model, tiny(depth=1)))
  np.testing.assert_array_equal(calm, never)
  encoded = jax.jit(lambda rng: model.apply(
      {'params': params}, x, train=True, rngs={'dropout': rng})[1]['encoded'])
  a, b = (encoded(jax.random.key(i)) for i in (0, 1))
  assert not np.allclose(a, b)


@pytest.mark.parametrize('rules', ['fsdp', 'fsdp_tp'])
def test_a_sharded_step_equals_one_on_a_single_device(rules):
  x = images(batch=8)
  model = tiny(scan=True)
  labels = jnp.arange(8)

  def loss(params, x):
    logits, features = model.apply({'params': params}, x)
    return (losses.softmax_cross_entropy(logits, labels).mean()
            + (features['pooled'] ** 2).mean())
  params = init(model, x)
  want, want_grads = jax.jit(jax.value_and_grad(loss))(params, x)
  mesh = jax.make_mesh((1, 4, 2), partition.AXES, axis_types=(AxisType.Auto,) * 3)
  layout = partition.Layout(mesh, partition.RULES[rules])
  boxed = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = jax.device_put(params, partition.param_shardings(boxed, layout))
  x = jax.device_put(x, layout.sharding(('batch', None, None, None), x.shape))
  with partition.use(layout):
    got, grads = jax.jit(lambda p, x: jax.value_and_grad(loss)(p, x))(params, x)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, want_grads)


def test_a_mistyped_classifier_is_named():
  with pytest.raises(ValueError, match='classifier='):
    tiny(classifier='map').init(jax.random.key(0), images())
