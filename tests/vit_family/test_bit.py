import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core import flops
from vit_family import bit


def shapes(name, classes=1000):
  """Flat parameter shapes of a published model, without memory or compilation."""
  model = bit.BiT(classes, **dataclasses.asdict(bit.VARIANTS[name]))
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))['params']
  return {k: v.shape for k, v in flax.traverse_util.flatten_dict(params, sep='/').items()}


def count(flat):
  return sum(int(np.prod(shape)) for shape in flat.values())


def test_names_say_the_depth_and_the_width():
  # Three convolutions a unit, the root and the head.
  for name, size in bit.VARIANTS.items():
    assert name == f'R{3 * sum(size.stages) + 2}x{size.width_factor}'


# With the test above, each depth and each width factor once: tracing the deep ones takes seconds.
@pytest.mark.parametrize('name, want', [
    ('R50x1', 25_549_352), ('R50x2', 97_988_712), ('R101x3', 387_934_888),
    ('R152x4', 936_533_224), ('R200x3', 568_633_000),
])
def test_parameter_counts(name, want):
  assert count(shapes(name)) == want


def test_names_and_shapes_are_the_public_ones():
  flat = shapes('R50x1', classes=21_843)
  assert count(flat) == 68_256_659
  conv, norm = 'standardized_conv2d/kernel', 'group_norm'
  unit = {}
  for scope, channels, kernel in (
      ('a', 512, (1, 1, 512, 256)), ('b', 256, (3, 3, 256, 256)), ('c', 256, (1, 1, 256, 1024))):
    unit |= {f'{scope}/{conv}': kernel, f'{scope}/{norm}/gamma': (channels,),
             f'{scope}/{norm}/beta': (channels,)}
  unit[f'a/proj/{conv}'] = (1, 1, 512, 1024)
  prefix = 'block3/unit01/'
  assert {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)} == unit
  assert {k: v for k, v in flat.items() if not k.startswith('block')} == {
      f'root_block/{conv}': (7, 7, 3, 64), f'{norm}/gamma': (2048,), f'{norm}/beta': (2048,),
      'head/kernel': (2048, 21_843), 'head/bias': (21_843,)}
  units = {k.rsplit('/', 3)[0] for k in flat if k.endswith(f'/b/{conv}')}
  assert units == {f'block{i + 1}/unit{j + 1:02d}' for i, n in enumerate((3, 4, 6, 3))
                   for j in range(n)}


def conv(x, kernel, stride=1, padding=0):
  """Weight-standardised convolution with zeros around, in float64."""
  kernel = kernel - kernel.mean((0, 1, 2))
  kernel = kernel / np.sqrt((kernel ** 2).mean((0, 1, 2)) + 1e-10)
  x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
  x = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
  return np.einsum('bhwcij,ijcf->bhwf', x, kernel)


def norm_relu(x, p):
  grouped = x.reshape(*x.shape[:3], 32, -1)
  grouped = grouped - grouped.mean((1, 2, 4), keepdims=True)
  grouped = grouped / np.sqrt((grouped ** 2).mean((1, 2, 4), keepdims=True) + 1e-5)
  return np.maximum(grouped.reshape(x.shape) * p['gamma'] + p['beta'], 0)


def unit_oracle(x, p, stride):
  kernel = lambda scope: scope['standardized_conv2d']['kernel']
  y = norm_relu(x, p['a']['group_norm'])
  shortcut = conv(y, kernel(p['a']['proj']), stride) if 'proj' in p['a'] else x
  y = norm_relu(conv(y, kernel(p['a'])), p['b']['group_norm'])
  y = norm_relu(conv(y, kernel(p['b']), stride, 1), p['c']['group_norm'])
  return shortcut + conv(y, kernel(p['c']))


def root_oracle(x, kernel, fill=0.0):
  x = np.pad(conv(x, kernel, 2, 3), [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=fill)
  return np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))


def random_params(module, *args):
  """Every parameter away from its init, so that no scale, bias or zero head is invisible."""
  tree = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'gamma' else 0.0
    return (mean + 0.4 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize('channels, stride, size', [(64, 1, 5), (128, 2, 6), (128, 2, 7),
                                                    (128, 1, 4)])
def test_a_unit_matches_a_float64_oracle(channels, stride, size):
  x = np.random.default_rng(1).normal(size=(2, size, size, channels)).astype(np.float32)
  unit = bit.PreActivationUnit(32, stride)
  params = random_params(unit, x)
  assert ('proj' in params['a']) == ((channels, stride) != (128, 1))
  out = jax.jit(unit.apply)({'params': params}, x)
  want = unit_oracle(x.astype(np.float64), jax.tree.map(np.float64, params), stride)
  assert out.shape == want.shape
  np.testing.assert_allclose(out, want, atol=2e-5 * abs(want).max())


def images(size=20):
  return np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def test_a_whole_model_matches_a_float64_oracle_and_pads_its_pooling_with_zeros():
  model = bit.BiT(5, (1,), 0.5)
  x = images()
  params = random_params(model, x)
  logits, features = jax.jit(model.apply)({'params': params}, x)
  p = jax.tree.map(np.float64, params)

  def oracle(fill):
    y = root_oracle(x.astype(np.float64), p['root_block']['standardized_conv2d']['kernel'], fill)
    y = norm_relu(unit_oracle(y, p['block1']['unit01'], 1), p['group_norm'])
    return y.reshape(2, -1, 128)
  want = oracle(0.0)
  assert features['encoded'].shape == (2, 25, 128)
  np.testing.assert_allclose(features['encoded'], want, atol=2e-4)
  np.testing.assert_allclose(features['pooled'], want.mean(1), atol=2e-4)
  np.testing.assert_array_equal(features['pre_logits'], features['pooled'])
  np.testing.assert_allclose(logits, want.mean(1) @ p['head']['kernel'] + p['head']['bias'],
                             atol=1e-3)
  # What the pooling of the hybrids would give is off by a hundred times the tolerance.
  assert abs(oracle(-np.inf) - want).max() > 0.02


def test_a_small_model_of_four_stages_takes_any_size_and_starts_at_the_bias():
  model = bit.BiT(5, **dataclasses.asdict(bit.VARIANTS['R14x0.5']), head_bias_init=-10.0)
  x = np.zeros((1, 65, 96, 1), np.float32)
  (logits, features), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  # 65 -> 33 -> 17 -> 9 -> 5 -> 3 and 96 -> 48 -> 24 -> 12 -> 6 -> 3.
  assert features['encoded'].shape == (1, 9, 1024)
  assert features['pooled'].shape == features['pre_logits'].shape == (1, 1024)
  assert logits.shape == (1, 5)
  small = model.clone(stages=(1,))
  head = jax.jit(lambda rng: small.init(rng, images())['params']['head'])(jax.random.key(0))
  assert head['kernel'].names == ('embed', 'classes')
  np.testing.assert_array_equal(head['kernel'].value, np.zeros((128, 5)))
  np.testing.assert_array_equal(head['bias'].value, np.full(5, -10.0))


def test_bfloat16_keeps_parameters_and_logits_in_float32_and_stays_close():
  x = images()
  model = bit.BiT(5, (1,), 0.5)
  params = random_params(model, x)
  half = model.clone(dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(
      half.init, jax.random.key(0), x))} == {np.dtype('float32')}
  full, _ = jax.jit(model.apply)({'params': params}, x)
  # In training too: nothing asks for random numbers.
  got, features = jax.jit(lambda p: half.apply({'params': p}, x, train=True))(params)
  assert got.dtype == jnp.float32
  assert features['encoded'].dtype == jnp.bfloat16
  np.testing.assert_allclose(got, full, atol=0.05 * abs(full).max())


def test_remat_recomputes_convolutions_only_when_it_is_full():
  x = images()
  model = bit.BiT(5, (1,), 0.5)
  params = random_params(model, x)

  def gradient(remat):
    return jax.grad(
        lambda p: (model.clone(remat=remat).apply({'params': p}, x)[0] ** 2).mean())
  work = {remat: flops.count_flops(gradient(remat), params) for remat in ('none', 'dots', 'full')}
  assert work['none'] == work['dots'] < work['full']
