"""Our BiT and the ResNet of our hybrids against Hugging Face transformers', with equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.nn import losses
from vit_family import bit
from vit_family import resnet

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

STAGES, CLASSES = (1, 2), 7


def random_params(module, images):
  """Every parameter away from its init, so that no scale, bias or zero head is invisible."""
  shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), images))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key in ('scale', 'gamma') else 0.0
    return (mean + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def units():
  return [(i, j, f'encoder.stages.{i}.layers.{j}')
          for i, count in enumerate(STAGES) for j in range(count)]


def bit_names(params):
  """Our parameters, or their gradients, in transformers' names and orientation."""
  conv = lambda scope: scope['standardized_conv2d']['kernel'].transpose(3, 2, 0, 1)
  norm = lambda name, scope: {f'{name}.weight': scope['group_norm']['gamma'],
                              f'{name}.bias': scope['group_norm']['beta']}
  out = {'embedder.convolution.weight': conv(params['root_block'])} | norm('norm', params)
  for i, j, name in units():
    unit = params[f'block{i + 1}'][f'unit{j + 1:02d}']
    for k, step in enumerate('abc'):
      out |= {f'{name}.conv{k + 1}.weight': conv(unit[step])}
      out |= norm(f'{name}.norm{k + 1}', unit[step])
    if 'proj' in unit['a']:
      out[f'{name}.downsample.conv.weight'] = conv(unit['a']['proj'])
  head = params['head']
  return {f'bit.{k}': v for k, v in out.items()} | {
      'classifier.1.weight': head['kernel'].T, 'classifier.1.bias': head['bias']}


def hybrid_names(params):
  conv = lambda scope: scope['kernel'].transpose(3, 2, 0, 1)
  norm = lambda name, scope: {f'{name}.weight': scope['scale'], f'{name}.bias': scope['bias']}
  out = {'embedder.convolution.weight': conv(params['conv_root'])}
  out |= norm('embedder.norm', params['gn_root'])
  for i, j, name in units():
    unit = params[f'block{i + 1}'][f'unit{j + 1}']
    for k in (1, 2, 3):
      out |= {f'{name}.conv{k}.weight': conv(unit[f'conv{k}'])}
      out |= norm(f'{name}.norm{k}', unit[f'gn{k}'])
    if 'conv_proj' in unit:
      out[f'{name}.downsample.conv.weight'] = conv(unit['conv_proj'])
      out |= norm(f'{name}.downsample.norm', unit['gn_proj'])
  return out


def assert_close(got, want, relative, what=None):
  """The largest difference is a small share of the largest value."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, what
  assert abs(want).max() > 0, what
  assert abs(got - want).max() <= relative * abs(want).max(), what


def tensors(named):
  return {k: torch.tensor(np.ascontiguousarray(v)) for k, v in named.items()}


def to_torch(images):
  return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize('size', [40, 33])
def test_bit_and_its_gradients_equal_those_of_transformers(size):
  images = np.random.default_rng(1).uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
  labels = np.array([5, 0, 3], np.int32)
  model = bit.BiT(CLASSES, STAGES, 0.5)
  params = random_params(model, images)
  peer = transformers.BitForImageClassification(transformers.BitConfig(
      embedding_size=32, hidden_sizes=(128, 256), depths=STAGES, num_labels=CLASSES)).eval()
  peer.load_state_dict(tensors(bit_names(params)), strict=True)
  out = peer(to_torch(images), output_hidden_states=True)
  peer_loss = torch.nn.functional.cross_entropy(out.logits, torch.from_numpy(labels).long())
  peer_loss.backward()

  def loss(params):
    logits, features = model.apply({'params': params}, images)
    return losses.softmax_cross_entropy(logits, labels).mean(), (logits, features)
  (value, (logits, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert_close(logits, out.logits.detach(), 1e-4)
  np.testing.assert_allclose(value, peer_loss.item(), rtol=1e-4)
  got = bit_names(grads)
  wanted = {name: p.grad for name, p in peer.named_parameters()}
  assert got.keys() == wanted.keys()
  for name, want in wanted.items():
    assert_close(got[name], want, 2e-3, name)


@pytest.mark.parametrize('size', [40, 33])
def test_the_resnet_of_a_hybrid_equals_that_of_transformers(size):
  images = np.random.default_rng(1).uniform(-1, 1, (3, size, size, 3)).astype(np.float32)

  class Backbone(nn.Module):

    @nn.compact
    def __call__(self, images):
      return resnet.backbone(images, STAGES, 1, dtype=jnp.float32, remat='none')
  params = random_params(Backbone(), images)
  peer = transformers.BitModel(transformers.BitConfig(
      hidden_sizes=(256, 512), depths=STAGES, layer_type='bottleneck', global_padding='SAME',
      embedding_dynamic_padding=True)).eval()
  peer.load_state_dict(tensors(hybrid_names(params)), strict=True)
  with torch.no_grad():
    want = peer(to_torch(images)).last_hidden_state.numpy().transpose(0, 2, 3, 1)
  # Its epsilons are 1e-8 within the root of the kernels' variance and 1e-5 in the norms.
  assert_close(jax.jit(Backbone().apply)({'params': params}, images), want, 1e-4)
