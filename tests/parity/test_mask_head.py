"""Our mask head and its losses against Hugging Face transformers', with equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detection import mask_head
from tests.detection import test_mask_head

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from transformers.loss import loss_for_object_detection as their_losses
from transformers.models.detr import modeling_detr

pytestmark = pytest.mark.parity

# Narrower heads have norms with one channel a group, which leave biases without a gradient.
QUERIES, HEADS, WIDTH = 3, 8, 256


def rename(params):
  """Our parameters, or their gradients, in transformers' names and orientation."""
  out = {}
  for name, layer in params.items():
    kind, number = name.rstrip('0123456789'), int(name[-1]) if name[-1].isdigit() else 0
    if kind == 'out_lay':
      scope = 'output_conv'
    elif kind == 'adapter':
      scope = f'fpn_stages.{number - 1}.fpn_adapter'
    else:
      block = f'conv{number}' if number < 3 else f'fpn_stages.{number - 3}.refine'
      scope = f'{block}.{"norm" if kind == "gn" else "conv"}'
    weight = layer['scale'] if kind == 'gn' else layer['kernel'].transpose(3, 2, 0, 1)
    out |= {f'{scope}.weight': weight, f'{scope}.bias': layer['bias']}
  return out


def to_torch(x):
  return torch.tensor(np.ascontiguousarray(x), requires_grad=np.asarray(x).dtype == np.float32)


def channels_first(x):
  return to_torch(np.moveaxis(x, -1, 1))


def assert_close(got, want, relative, what=None):
  """The largest difference is a small share of the largest value."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, what
  assert abs(want).max() > 0, what
  assert abs(got - want).max() <= relative * abs(want).max(), what


def test_attention_maps():
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(2, QUERIES, WIDTH)).astype(np.float32)
  memory = rng.normal(size=(2, 3, 4, WIDTH)).astype(np.float32)
  valid = np.ones((2, 3, 4), bool)
  valid[1, 2:] = valid[1, :, 3:] = False
  ours = mask_head.BoxAttention(HEADS, WIDTH)
  params = test_mask_head.drawn(ours, queries, memory, valid)
  theirs = modeling_detr.DetrMHAttentionMap(WIDTH, HEADS).eval()
  theirs.load_state_dict({
      f'{its}_proj.{part}': to_torch(params[name][mine].T)
      for its, name in (('q', 'query'), ('k', 'key'))
      for part, mine in (('weight', 'kernel'), ('bias', 'bias'))}, strict=True)
  hidden = torch.where(to_torch(valid), 0.0, torch.finfo(torch.float32).min)[:, None, None]
  want = theirs(to_torch(queries), channels_first(memory), hidden).detach()
  assert_close(jax.jit(ours.apply)({'params': params}, queries, memory, valid), want, 1e-4)


@pytest.mark.parametrize('chunk', [0, 2])
def test_the_head_and_its_gradients(chunk):
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  sizes, channels = test_mask_head.SIZES, test_mask_head.CHANNELS
  features = normal(2, *sizes[0], WIDTH)
  maps = normal(2, QUERIES, HEADS, *sizes[0])
  pyramid = [normal(2, *size, c) for size, c in zip(sizes[1:], channels)]
  probe = normal(2, QUERIES, *sizes[-1])
  ours = mask_head.MaskHead(chunk=chunk)
  params = test_mask_head.drawn(ours, features, maps, pyramid)
  theirs = modeling_detr.DetrMaskHeadSmallConv(WIDTH + HEADS, list(channels), WIDTH)
  theirs.load_state_dict({k: to_torch(v) for k, v in rename(params).items()}, strict=True)
  their_maps = to_torch(maps)
  want = theirs(channels_first(features), their_maps, [channels_first(x) for x in pyramid])
  want = want.reshape(probe.shape)
  (want * to_torch(probe)).sum().backward()

  def loss(params, maps):
    masks = ours.apply({'params': params}, features, maps, pyramid)
    return (masks * probe).sum(), masks
  (grads, map_grads), masks = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, maps)
  assert_close(masks, want.detach(), 1e-4)
  assert_close(map_grads, their_maps.grad, 1e-3)
  wanted = {name: p.grad for name, p in theirs.named_parameters()}
  got = rename(grads)
  assert got.keys() == wanted.keys()
  for name, grad in wanted.items():
    assert_close(got[name], grad, 1e-3, name)


def test_losses():
  masks, segments, objects = test_mask_head.pictures()
  weight = np.array([1, 1, 1, 0], np.float32)
  source = to_torch(masks)
  target = segments[:, None] == np.arange(1, masks.shape[1] + 1)[:, None, None]
  real = to_torch((np.arange(masks.shape[1]) < objects[:, None]) & (weight[:, None] > 0))
  upsampled = torch.nn.functional.interpolate(
      source[real][:, None], size=segments.shape[1:], mode='bilinear',
      align_corners=False)[:, 0].flatten(1)
  chosen = torch.tensor(target)[real].flatten(1).float()
  focal = their_losses.sigmoid_focal_loss(upsampled, chosen, 7.0)
  dice = their_losses.dice_loss(upsampled, chosen, 7.0)
  (focal + dice).backward()

  def loss(masks):
    pair = mask_head.mask_losses(masks, segments, objects, weight, 7.0)
    return pair[0] + pair[1], jnp.stack(pair)
  grads, pair = jax.jit(jax.grad(loss, has_aux=True))(masks)
  assert_close(pair, [focal.item(), dice.item()], 1e-5)
  assert_close(grads, source.grad, 1e-4)
