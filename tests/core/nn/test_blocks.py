import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from core.nn import blocks


def layer_norm(x, p, epsilon):
  mean = x.mean(-1, keepdims=True)
  var = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + epsilon) * p['scale'] + p['bias']


def attend(x, memory, p, mask):
  q, k, v = (np.einsum('bld,dhk->bhlk', y, p[n]['kernel']) + p[n]['bias'][:, None]
             for n, y in (('query', x), ('key', memory), ('value', memory)))
  scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
  scores = np.where(mask, scores, -np.inf)
  weights = scipy.special.softmax(scores, axis=-1)
  return np.einsum('bhlk,hkd->bld', weights @ v, p['out']['kernel']) + p['out']['bias']


ACTIVATIONS = {
    'gelu_tanh': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))),
    'gelu_erf': lambda x: x * scipy.special.ndtr(x),
    'quick_gelu': lambda x: x * scipy.special.expit(1.702 * x),
    'relu': lambda x: np.maximum(x, 0),
    'swish': lambda x: x * scipy.special.expit(x),
}


def mlp(x, p, activation):
  hidden = ACTIVATIONS[activation](x @ p['Dense_0']['kernel'] + p['Dense_0']['bias'])
  return hidden @ p['Dense_1']['kernel'] + p['Dense_1']['bias']


def oracle(x, p, norm, epsilon, activation, mask, memory, memory_mask):
  """A block in float64, written from the papers' equations."""
  branches = [lambda x: attend(x, x, p['MultiHeadDotProductAttention_0'], mask)]
  if memory is not None:
    branches.append(lambda x: attend(x, memory, p['MultiHeadDotProductAttention_1'], memory_mask))
  branches.append(lambda x: mlp(x, p['MlpBlock_0'], activation))
  for i, branch in enumerate(branches):
    q = p[f'LayerNorm_{i}']
    if norm == 'pre':
      x = x + branch(layer_norm(x, q, epsilon))
    else:
      x = layer_norm(x + branch(x), q, epsilon)
  return x


def random_params(module, *args, **kwargs):
  """Every parameter away from its init, so that no scale or bias is invisible."""
  # Only the shapes are asked for: compiling an init takes longer than most tests.
  shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.4 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize('norm, activation, causal, padded, cross, epsilon', [
    ('pre', 'gelu_tanh', False, False, False, 1e-6),
    ('pre', 'quick_gelu', True, False, False, 1e-5),
    ('post', 'gelu_erf', False, True, False, 1e-2),
    ('post', 'relu', True, True, True, 1e-6),
    ('pre', 'relu', False, True, True, 1e-5),
])
def test_block_matches_a_float64_oracle(norm, activation, causal, padded, cross, epsilon):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 6, 12)).astype(np.float32)
  memory = rng.normal(size=(2, 5, 10)).astype(np.float32) if cross else None
  mask = np.ones((2, 1, 1, 6), bool)
  memory_mask = np.ones((2, 1, 1, 5), bool)
  if padded:
    mask[1, ..., 4:] = False
    memory_mask[0, ..., 3:] = False
  block = blocks.TransformerBlock(
      heads=3, mlp_dim=20, norm=norm, activation=activation, causal=causal, cross=cross,
      epsilon=epsilon)
  inputs = {'mask': mask if padded else None, 'memory': memory,
            'memory_mask': memory_mask if cross and padded else None}
  params = random_params(block, x, **inputs)
  out = jax.jit(block.apply)({'params': params}, x, **inputs)
  want = oracle(x.astype(np.float64), jax.tree.map(lambda a: a.astype(np.float64), params), norm,
                epsilon, activation, mask & np.tri(6, dtype=bool) if causal else mask, memory,
                memory_mask)
  np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


def test_bfloat16_computes_in_bfloat16_over_float32_parameters():
  block = blocks.TransformerBlock(heads=2, mlp_dim=16, dtype=jnp.bfloat16)
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  params = nn.meta.unbox(jax.jit(block.init)(jax.random.key(1), x))['params']
  assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype('float32')}
  out = jax.jit(block.apply)({'params': params}, x)
  assert out.dtype == jnp.bfloat16
  full = jax.jit(block.clone(dtype=jnp.float32).apply)({'params': params}, x)
  np.testing.assert_allclose(out.astype(jnp.float32), full, atol=0.1)


@pytest.mark.parametrize('epsilon', [1e-6, 1e-2])
def test_layer_norm_and_its_gradients_match_float64(epsilon):
  rng = np.random.default_rng(0)
  # A large mean: computing the variance as E[x^2] - E[x]^2 in float32 would show.
  x = (rng.normal(size=(3, 4, 16)) + 20).astype(np.float32)
  probe = rng.normal(size=x.shape)
  module = blocks.layer_norm(epsilon, jnp.float32, 'norm')
  params = random_params(module, x)

  def loss(params, x):
    out = module.apply({'params': params}, x)
    return (out * probe).sum(), out
  grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  start = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
  np.testing.assert_allclose(out, layer_norm(start[1], start[0], epsilon), atol=3e-5)
  for _ in range(4):
    step = jax.tree.map(lambda a: 1e-6 * rng.normal(size=a.shape), start)
    ends = [(layer_norm(q, p, epsilon) * probe).sum() for p, q in (
        jax.tree.map(lambda a, d, s=s: a + s * d, start, step) for s in (1, -1))]
    got = sum(jax.tree.leaves(jax.tree.map(
        lambda g, d: (np.asarray(g, np.float64) * d).sum(), grads, step)))
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2, rtol=2e-4, atol=1e-9)


POINTS = np.concatenate([np.linspace(-12, 12, 201), [-60, -1e-3, 0.5, 60]])
POINTS = POINTS[POINTS != 0].astype(np.float32)

_GRADIENTS = '''
import sys
import jax, numpy as np
from core.nn import blocks
x = np.load(sys.argv[1])
np.savez(sys.argv[2], **{name: jax.vmap(jax.grad(f))(x) for name, f in blocks.ACTIVATIONS.items()})
'''


@pytest.fixture(scope='module')
def gradients(tmp_path_factory):
  """Of all activations, by a process that compiles as usual: the tests' way has another tanh."""
  folder = tmp_path_factory.mktemp('gradients')
  np.save(folder / 'x.npy', POINTS)
  subprocess.run([sys.executable, '-c', _GRADIENTS, str(folder / 'x.npy'), str(folder / 'y.npz')],
                 cwd=pathlib.Path(__file__).resolve().parents[3], check=True)
  return np.load(folder / 'y.npz')


@pytest.mark.parametrize('activation', blocks.ACTIVATIONS)
def test_activations_and_their_gradients_match_float64(activation, gradients):
  x = POINTS
  f = blocks.ACTIVATIONS[activation]
  exact = ACTIVATIONS[activation]
  np.testing.assert_allclose(f(x), exact(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
  x64 = x.astype(np.float64)
  slope = (exact(x64 + 1e-5) - exact(x64 - 1e-5)) / 2e-5
  # In float32 the tanh form rounds to zero below about -5, where the slope is -3e-6.
  np.testing.assert_allclose(gradients[activation], slope, rtol=1e-4, atol=5e-6)


class Tower(nn.Module):
  """A stack of decoder blocks for the tests below."""
  scan: bool
  remat: str = 'none'
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x, memory, mask, train=False):
    def make(name):
      return blocks.TransformerBlock(heads=2, mlp_dim=16, cross=True, causal=True, name=name,
                                     dropout_rate=self.dropout_rate)
    return blocks.run_blocks(make, 2, x, prefix='layer', scan=self.scan, remat=self.remat,
                             train=train, memory=memory, memory_mask=mask)


def tower_inputs():
  rng = np.random.default_rng(0)
  mask = np.ones((2, 1, 1, 4), bool)
  mask[0, ..., 2:] = False
  return rng.normal(size=(2, 5, 8)).astype(np.float32), rng.normal(
      size=(2, 4, 6)).astype(np.float32), mask


@functools.cache
def run_tower(scan, remat):
  """Gradients, output and attention of a tower, in the scanned layout."""
  inputs = tower_inputs()
  params = random_params(Tower(False), *inputs)

  def loss(params):
    out, state = Tower(scan, remat).apply({'params': params}, *inputs, mutable=['intermediates'])
    return (out ** 2).mean(), (out, state['intermediates'])
  stack = functools.partial(blocks.stack_layers, prefix='layer')
  grads, (out, seen) = jax.jit(jax.grad(loss, has_aux=True))(stack(params) if scan else params)
  return (grads, out, seen) if scan else (stack(grads), out, stack(seen))


@pytest.mark.parametrize('scan, remat', [(True, 'none'), (True, 'dots'), (False, 'full')])
def test_scanned_and_recomputed_stacks_agree_with_the_plain_one(scan, remat):
  want, got = run_tower(False, 'none'), run_tower(scan, remat)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
  # What the blocks sow is stacked like the parameters.
  weights = got[2]['layer']['MultiHeadDotProductAttention_1']['attention'][0]
  assert weights.shape == (2, 2, 2, 5, 4)


def test_scanned_layers_start_different_and_are_named():
  boxed = jax.jit(Tower(True).init)(jax.random.key(0), *tower_inputs())['params']
  kernel = boxed['layer']['MlpBlock_0']['Dense_0']['kernel']
  assert kernel.names == ('layers', 'embed', 'mlp')
  value = kernel.unbox()
  assert value.shape == (2, 8, 16)
  assert not np.allclose(value[0], value[1])


@pytest.mark.parametrize('scan', [False, True])
def test_dropout_differs_from_layer_to_layer_and_is_off_in_evaluation(scan):
  inputs = tower_inputs()
  tower = Tower(scan, dropout_rate=0.5)
  params = {'params': random_params(tower, *inputs)}
  apply = jax.jit(lambda seed: tower.apply(params, *inputs, train=True, rngs={'dropout': seed}))
  a, b, again = apply(jax.random.key(1)), apply(jax.random.key(2)), apply(jax.random.key(1))
  assert not np.allclose(a, b)
  np.testing.assert_array_equal(a, again)
  calm, never = (jax.jit(t.apply)(params, *inputs) for t in (tower, Tower(scan)))
  np.testing.assert_array_equal(calm, never)

  # One layer's weights in every layer: were the masks equal, so would be the branches' zeros.
  class Drops(nn.Module):

    @nn.compact
    def __call__(self, x, *, train):
      y = nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x))
      self.sow('intermediates', 'mask', y)
      return x + y

  class Stack(nn.Module):

    @nn.compact
    def __call__(self, x):
      return blocks.run_blocks(lambda name: Drops(name=name), 2, x, prefix='d', scan=scan,
                               train=True)
  _, state = Stack().apply({}, jnp.zeros((1, 2, 32)), rngs={'dropout': jax.random.key(0)},
                           mutable=['intermediates'])
  masks = state['intermediates']
  masks = masks['d']['mask'][0] if scan else [masks[f'd_{i}']['mask'][0] for i in range(2)]
  assert not np.array_equal(masks[0], masks[1])


@pytest.mark.parametrize('scan, remat', [(False, 'none'), (True, 'none'), (True, 'full')])
def test_layer_inputs_give_each_block_its_own_row(scan, remat):
  class Affine(nn.Module):

    @nn.compact
    def __call__(self, x, *, factor, shift, offset, train):
      return x * factor + shift + offset + self.param('b', nn.initializers.zeros, ())

  class Stack(nn.Module):

    @nn.compact
    def __call__(self, x, offset):
      rows = {'factor': np.array([2.0, 3.0, 5.0]), 'shift': jnp.array([[1.0], [10.0], [100.0]])}
      return blocks.run_blocks(lambda name: Affine(name=name), 3, x, prefix='b', scan=scan,
                               remat=remat, layer_inputs=rows, offset=offset)
  x = jnp.full((1, 1, 1), 7.0)
  out, _ = Stack().init_with_output(jax.random.key(0), x, 0.5)
  np.testing.assert_array_equal(out, ((7 * 2 + 1.5) * 3 + 10.5) * 5 + 100.5)


@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_a_dropped_branch_is_the_examples_own_and_the_others_are_scaled_up(norm):
  block = blocks.TransformerBlock(heads=1, mlp_dim=4, norm=norm)
  one = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
  x = np.repeat(one, 2000, axis=0)
  params = random_params(block, one)
  rate = 0.375

  def run(x, rng):
    return block.apply({'params': params}, x, branch_drop_rate=rate, train=True,
                       rngs={'dropout': rng})
  out = np.asarray(jax.jit(run)(x, jax.random.key(0)), np.float64)

  # The four ways through the block, in float64.
  p = jax.tree.map(np.float64, params)
  branches = [lambda y: attend(y, y, p['MultiHeadDotProductAttention_0'], True),
              lambda y: mlp(y, p['MlpBlock_0'], 'gelu_tanh')]
  for kept in ((0, 0), (0, 1), (1, 0), (1, 1)):
    want = one.astype(np.float64)
    for i, branch in enumerate(branches):
      q, factor = p[f'LayerNorm_{i}'], kept[i] / (1 - rate)
      if norm == 'pre':
        want = want + factor * branch(layer_norm(want, q, 1e-6))
      else:
        want = layer_norm(want + factor * branch(want), q, 1e-6)
    share = (abs(out - want).max((1, 2)) < 1e-4).mean()
    expected = np.prod([1 - rate if k else rate for k in kept])
    # Five standard deviations of a binomial share.
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 2000), (kept, share)
  # In evaluation nothing is dropped, and nobody asks for random numbers.
  np.testing.assert_array_equal(
      block.apply({'params': params}, one, branch_drop_rate=rate),
      block.apply({'params': params}, one))


def test_stacking_and_unstacking_are_inverse_and_leave_the_rest_alone():
  tree = {f'layer_{i}': {'a': np.full((2,), i), 'b': {'c': np.arange(i, i + 3)}}
          for i in range(11)}
  tree |= {'norm': {'scale': np.ones(3)}, 'layer_norm': np.zeros(2)}
  stacked = blocks.stack_layers(tree, 'layer')
  assert sorted(stacked) == ['layer', 'layer_norm', 'norm']
  assert isinstance(stacked['layer']['a'], np.ndarray)
  # In the order of the numbers, not of the names: 10 comes last.
  np.testing.assert_array_equal(stacked['layer']['a'][:, 0], range(11))
  back = blocks.unstack_layers(stacked, 'layer')
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)
  with pytest.raises(ValueError, match='no block_0'):
    blocks.stack_layers(tree, 'block')


def test_mistakes_are_named():
  x = jnp.zeros((1, 2, 4))
  with pytest.raises(ValueError, match='norm='):
    blocks.TransformerBlock(heads=1, mlp_dim=4, norm='middle').init(jax.random.key(0), x)
  with pytest.raises(ValueError, match='with memory'):
    blocks.TransformerBlock(heads=1, mlp_dim=4).init(jax.random.key(0), x, memory=x)
  with pytest.raises(ValueError, match='remat='):
    Tower(True, remat='some').init(jax.random.key(0), *tower_inputs())


@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_without_residuals_a_branch_is_all_that_goes_on(norm):
  """The ablation of BERT4Rec's table 5: x = LN(f(x)), or f(LN(x)), with the same parameters."""
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  block = blocks.TransformerBlock(heads=2, mlp_dim=12, norm=norm, activation='relu',
                                  residual=False)
  params = random_params(block, x)
  assert jax.tree.structure(params) == jax.tree.structure(
      random_params(block.clone(residual=True), x))
  p = jax.tree.map(np.float64, params)
  want = x.astype(np.float64)
  for i, branch in enumerate([
      lambda y: attend(y, y, p['MultiHeadDotProductAttention_0'], np.bool_(True)),
      lambda y: mlp(y, p['MlpBlock_0'], 'relu')]):
    normed = functools.partial(layer_norm, p=p[f'LayerNorm_{i}'], epsilon=1e-6)
    want = branch(normed(want)) if norm == 'pre' else normed(branch(want))
  got = jax.jit(block.apply)({'params': params}, x)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_positions_alone_in_the_context_of_all_are_the_same():
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)[:, None, None]
  block = blocks.TransformerBlock(heads=2, mlp_dim=12, norm='post')
  params = {'params': random_params(block, x)}
  whole, some = jax.jit(lambda: (
      block.apply(params, x, mask=mask),
      block.apply(params, x[:, [4, 1, 1]], context=x, mask=mask)))()
  np.testing.assert_allclose(some, np.asarray(whole)[:, [4, 1, 1]], rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match='no context'):
    block.clone(norm='pre').apply(params, x, context=x)
