from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from core import flops
from core import partition
from vit_family import resnet


def same(length, size, stride):
  """Zeros before and after: as few as let every `stride`-th position have a window."""
  total = max((-(-length // stride) - 1) * stride + size - length, 0)
  return total // 2, total - total // 2


def windows(x, size, stride, fill):
  """`[batch, height', width', channels, size, size]` of a SAME-padded float64 image."""
  pads = [(0, 0), *(same(n, size, stride) for n in x.shape[1:3]), (0, 0)]
  x = np.pad(x, pads, constant_values=fill)
  return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def std_conv(x, kernel, stride=1):
  """Weight-standardised SAME convolution: epsilon beside the standard deviation."""
  mean, std = kernel.mean((0, 1, 2)), kernel.std((0, 1, 2))
  return np.einsum('bhwcij,ijcf->bhwf', windows(x, kernel.shape[0], stride, 0.0),
                   (kernel - mean) / (std + 1e-5))


def group_norm(x, scale, bias, groups=32, epsilon=1e-6):
  grouped = x.reshape(*x.shape[:3], groups, -1)
  mean = grouped.mean((1, 2, 4), keepdims=True)
  var = grouped.var((1, 2, 4), keepdims=True)
  return ((grouped - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * scale + bias


def unit_oracle(x, p, stride):
  norm = lambda y, name: group_norm(y, p[name]['scale'], p[name]['bias'])
  relu = lambda y: np.maximum(y, 0)
  shortcut = x
  if 'conv_proj' in p:
    shortcut = norm(std_conv(x, p['conv_proj']['kernel'], stride), 'gn_proj')
  y = relu(norm(std_conv(x, p['conv1']['kernel']), 'gn1'))
  y = relu(norm(std_conv(y, p['conv2']['kernel'], stride), 'gn2'))
  return relu(shortcut + norm(std_conv(y, p['conv3']['kernel']), 'gn3'))


def random_params(module, *args):
  """Every parameter away from its init, so that no scale or bias is invisible."""
  shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.4 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


class Backbone(nn.Module):
  stages: tuple[int, ...]
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    return resnet.backbone(images, self.stages, 1, dtype=self.dtype, remat=self.remat)


@pytest.mark.parametrize('channels, stride, size', [
    (48, 1, 5),    # projected because the channels change
    (128, 2, 6),   # projected because the resolution does; SAME is asymmetric
    (128, 2, 7),
    (128, 1, 4),   # not projected
])
def test_a_unit_matches_a_float64_oracle(channels, stride, size):
  x = np.random.default_rng(1).normal(size=(2, size, size, channels)).astype(np.float32)
  unit = resnet.PostActivationUnit(32, stride)
  params = random_params(unit, x)
  assert ('conv_proj' in params) == ('gn_proj' in params) == ((channels, stride) != (128, 1))
  out = jax.jit(unit.apply)({'params': params}, x)
  want = unit_oracle(x.astype(np.float64), jax.tree.map(np.float64, params), stride)
  assert out.shape == (2, -(-size // stride), -(-size // stride), 128)
  np.testing.assert_allclose(out, want, atol=2e-4)


@pytest.mark.parametrize('size', [12, 13])
def test_the_stem_matches_a_float64_oracle(size):
  x = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
  params = random_params(Backbone(()), x)
  assert jax.tree.map(np.shape, params) == {
      'conv_root': {'kernel': (7, 7, 3, 64)}, 'gn_root': {'scale': (64,), 'bias': (64,)}}
  p = jax.tree.map(np.float64, params)
  y = std_conv(x.astype(np.float64), p['conv_root']['kernel'], 2)
  y = np.maximum(group_norm(y, p['gn_root']['scale'], p['gn_root']['bias']), 0)
  want = windows(y, 3, 2, -np.inf).max((-2, -1))
  out = jax.jit(Backbone(()).apply)({'params': params}, x)
  np.testing.assert_allclose(out, want, atol=1e-4)


def test_epsilons_are_those_of_the_public_code():
  rng = np.random.default_rng(0)
  # Kernels and images so small that the epsilons weigh as much as the deviations.
  kernel = (1e-5 * rng.normal(size=(3, 3, 8, 4))).astype(np.float32)
  x = (1e-3 * rng.normal(size=(2, 5, 5, 32))).astype(np.float32)
  hybrid = resnet.standardize(kernel, 0.0, 1e-5)
  centred = kernel - kernel.mean((0, 1, 2), dtype=np.float64)
  std = centred.std((0, 1, 2))
  np.testing.assert_allclose(hybrid, centred / (std + 1e-5), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(resnet.standardize(kernel, 1e-10, 0.0),
                             centred / np.sqrt(std ** 2 + 1e-10), rtol=1e-4, atol=1e-5)
  ones, zeros = np.ones(32), np.zeros(32)
  for epsilon in (1e-6, 1e-5):
    out = resnet.GroupNorm(epsilon).apply({'params': {'scale': ones, 'bias': zeros}}, x)
    np.testing.assert_allclose(
        out, group_norm(x.astype(np.float64), ones, zeros, epsilon=epsilon), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('inside, outside', [(0.0, 1e-5), (1e-10, 0.0)])
def test_a_standardised_kernel_has_mean_zero_and_deviation_one(inside, outside):
  kernel = np.random.default_rng(0).normal(3.0, 0.2, (3, 3, 16, 8)).astype(np.float32)
  out = np.asarray(resnet.standardize(kernel, inside, outside), np.float64)
  np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(out.std((0, 1, 2)), 1, rtol=1e-4)


def test_group_norm_keeps_its_digits_far_from_zero_and_in_bfloat16():
  rng = np.random.default_rng(0)
  # E[x^2] - E[x]^2 in float32 would be off by tens of percent here.
  x = (rng.normal(size=(2, 4, 4, 64)) + 500).astype(np.float32)
  ones, zeros = np.ones(64), np.zeros(64)
  params = {'params': {'scale': ones, 'bias': zeros}}
  want = group_norm(x.astype(np.float64), ones, zeros)
  np.testing.assert_allclose(resnet.GroupNorm(1e-6).apply(params, x), want, atol=1e-3)
  half = jnp.asarray(rng.normal(size=(2, 4, 4, 64)) + 8, jnp.bfloat16)
  out = resnet.GroupNorm(1e-6, dtype=jnp.bfloat16).apply(params, half)
  assert out.dtype == jnp.bfloat16
  want = group_norm(np.asarray(half, np.float64), ones, zeros)
  np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.02)
  with pytest.raises(ValueError, match='48 channels do not divide into 32 groups'):
    resnet.GroupNorm(1e-6).init(jax.random.key(0), np.zeros((1, 2, 2, 48)))


@pytest.mark.parametrize('name, want, parameters', [
    ('R', (56, 56, 64), 9_536),
    ('R26', (7, 7, 2048), 13_946_176),
    ('R50', (7, 7, 2048), 23_508_032),
    ('R50/16', (14, 14, 1024), 11_894_848),
])
def test_feature_maps_and_parameters_of_the_published_backbones(name, want, parameters):
  stages = resnet.BACKBONES[name]
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  out, variables = jax.eval_shape(Backbone(stages).init_with_output, jax.random.key(0), image)
  assert out.shape == (1, *want)
  assert 224 // resnet.downsampling(stages) == want[0]
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_a_unit_starts_as_its_shortcut():
  x = np.random.default_rng(0).uniform(size=(1, 3, 3, 128)).astype(np.float32)
  unit = resnet.PostActivationUnit(32)
  out, _ = jax.jit(unit.init_with_output)(jax.random.key(0, impl='unsafe_rbg'), x)
  np.testing.assert_array_equal(out, x)


def test_remat_says_what_is_computed_twice():
  x = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
  params = random_params(Backbone((1,)), x)

  def gradient(remat):
    return jax.grad(lambda p: (Backbone((1,), remat).apply({'params': p}, x) ** 2).mean())
  work = {remat: flops.count_flops(gradient(remat), params) for remat in ('none', 'dots', 'full')}
  assert work['none'] == work['dots'] < work['full']
  # Convolutions are kept, but norms are not.
  divisions = {remat: str(jax.make_jaxpr(gradient(remat))(params)).count('rsqrt')
               for remat in ('none', 'dots')}
  assert divisions['none'] < divisions['dots']
  with pytest.raises(ValueError, match='remat='):
    jax.eval_shape(Backbone((1,), 'some').init, jax.random.key(0), x)


def test_fsdp_splits_every_parameter():
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  boxed = jax.eval_shape(Backbone((1, 1)).init, jax.random.key(0), image)['params']
  mesh = jax.make_mesh((1, 8, 1), partition.AXES, axis_types=(AxisType.Auto,) * 3)
  layout = partition.Layout(mesh, partition.RULES['fsdp'])
  shardings = partition.param_shardings(boxed, layout)
  whole = [partition.path_name(path) for path, s in jax.tree_util.tree_leaves_with_path(shardings)
           if 'fsdp' not in s.spec]
  assert not whole
