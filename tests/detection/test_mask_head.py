"""The mask head against a plain float64 one: features repeated, joined with the maps, convolved."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from detection import mask_head

BATCH, QUERIES, HEADS, WIDTH = 2, 5, 4, 32
# What a picture of 75 x 100 leaves at strides 32, 16, 8 and 4: 2n and 2n - 1 both occur.
SIZES = ((3, 4), (5, 7), (10, 13), (19, 25))
CHANNELS = (20, 12, 6)


def inputs(levels=3):
  """Features, attention maps and pyramid, float32."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return (normal(BATCH, *SIZES[0], WIDTH), normal(BATCH, QUERIES, HEADS, *SIZES[0]),
          [normal(BATCH, *size, c) for size, c in zip(SIZES[1:levels + 1], CHANNELS)])


def drawn(module, *args):
  """Every parameter away from its init, so that no scale or bias is invisible."""
  shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))['params']
  rng = np.random.default_rng(1)
  draw = lambda path, leaf: (
      float(path[-1].key == 'scale') + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def plain_conv(x, layer):
  kernel, bias = layer['kernel'].astype(np.float64), layer['bias']
  h, w = x.shape[1:3]
  side = kernel.shape[0]
  x = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
  return bias + sum(x[:, i:i + h, j:j + w] @ kernel[i, j] for i in range(side) for j in range(side))


def plain_norm(x, layer):
  groups = math.gcd(8, x.shape[-1])
  split = x.reshape(*x.shape[:3], groups, -1)
  axes = (1, 2, 4)
  split = split - split.mean(axes, keepdims=True)
  split = split / np.sqrt((split ** 2).mean(axes, keepdims=True) + 1e-5)
  return split.reshape(x.shape) * layer['scale'] + layer['bias']


def plain_head(params, features, maps, pyramid):
  """The head query by query, in float64."""
  masks = []
  for q in range(maps.shape[1]):
    x = np.concatenate([features, np.moveaxis(maps[:, q], 1, -1)], -1).astype(np.float64)
    for i in range(1, 3 + len(pyramid)):
      if i > 2:
        level = pyramid[i - 3].astype(np.float64)
        rows, columns = (np.floor(np.arange(n) * m / n).astype(int)
                         for n, m in zip(level.shape[1:3], x.shape[1:3]))
        x = plain_conv(level, params[f'adapter{i - 2}']) + x[:, rows][:, :, columns]
      x = np.maximum(plain_norm(plain_conv(x, params[f'lay{i}']), params[f'gn{i}']), 0)
    masks.append(plain_conv(x, params['out_lay'])[..., 0])
  return np.stack(masks, 1)


@pytest.mark.parametrize('levels', [3, 1])
def test_the_head_equals_the_plain_one_in_one_go_and_in_chunks(levels):
  given = inputs(levels)
  params = drawn(mask_head.MaskHead(), *given)
  want = plain_head(params, *given)
  # Chunks of 2 of 5 queries: the last one is padded.
  for chunk in (0, 2, 5) if levels == 3 else (0,):
    got = jax.jit(mask_head.MaskHead(chunk=chunk).apply)({'params': params}, *given)
    assert got.dtype == jnp.float32
    # The size of the finest level: stride 4 of a picture of 75 x 100.
    assert got.shape == (BATCH, QUERIES, *SIZES[levels])
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_the_gradient_of_chunks_is_the_slope_of_the_plain_head():
  given = inputs(0)
  at = (drawn(mask_head.MaskHead(), *given), *given[:2])
  rng = np.random.default_rng(2)
  probe = rng.normal(size=(BATCH, QUERIES, *SIZES[0])).astype(np.float32)
  loss = lambda params, features, maps: (mask_head.MaskHead(chunk=2).apply(
      {'params': params}, features, maps, []) * probe).sum()
  grad = jax.jit(jax.grad(loss, (0, 1, 2)))(*at)
  way = jax.tree.map(lambda x: rng.normal(size=x.shape), at)
  ahead, behind = (
      (plain_head(*jax.tree.map(lambda x, d: x + step * d, at, way), []) * probe).sum()
      for step in (1e-6, -1e-6))
  along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.vdot(g, d), grad, way)))
  np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-3)


def test_half_precision_gives_float32_logits_near_those_of_float32():
  given = inputs(1)
  params = drawn(mask_head.MaskHead(), *given)
  got = jax.jit(mask_head.MaskHead(jnp.bfloat16).apply)({'params': params}, *given)
  want = plain_head(params, *given)
  assert got.dtype == jnp.float32
  assert np.sqrt(np.mean((got - want) ** 2)) < 0.03 * want.std()


def test_sizes_that_do_not_fit_are_refused():
  features, maps, pyramid = inputs()
  init = lambda *args: jax.eval_shape(mask_head.MaskHead().init, jax.random.key(0), *args)
  with pytest.raises(ValueError, match='4 cells a side cannot be upsampled to 13'):
    init(features, maps, [pyramid[0][:, :, :4], pyramid[1]])
  with pytest.raises(ValueError, match='width 8 cannot be halved 4 times'):
    init(features[..., :8], maps, pyramid)
  with pytest.raises(ValueError, match='width 30 does not divide into 4 heads'):
    jax.eval_shape(mask_head.BoxAttention(4, 30).init, jax.random.key(0), features[:, 0, :, :30],
                   features[..., :30], features[..., 0] > 0)


def test_published_size_and_init():
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  cells = f32(1, 25, 34, 256)
  queries, valid = f32(1, 100, 256), jax.ShapeDtypeStruct((1, 25, 34), bool)
  init = lambda module: lambda *args: module.init(jax.random.key(0), *args)
  attend = jax.eval_shape(init(mask_head.BoxAttention()), queries, cells, valid)
  maps = jax.eval_shape(mask_head.BoxAttention().apply, attend, queries, cells, valid)
  assert maps.shape == (1, 100, 8, 25, 34)
  pyramid = [f32(1, 50, 67, 1024), f32(1, 100, 134, 512), f32(1, 200, 267, 256)]
  head, made = jax.eval_shape(
      lambda *args: mask_head.MaskHead(chunk=30).init_with_output(jax.random.key(0), *args)[::-1],
      cells, maps, pyramid)
  assert made.shape == (1, 100, 200, 267)
  # Fact of the published files: 42,899,288 parameters less a detector with 251 outputs.
  assert sum(math.prod(p.shape) for p in jax.tree.leaves((attend, head))) == 1_333_657
  shapes = jax.tree.map(lambda p: p.shape, nn.meta.unbox(head)['params'])
  assert {name: kernel['kernel'][2:] for name, kernel in shapes.items() if 'kernel' in kernel} == {
      'lay1': (264, 264), 'lay2': (264, 128), 'lay3': (128, 64), 'lay4': (64, 32),
      'lay5': (32, 16), 'out_lay': (16, 1), 'adapter1': (1024, 128), 'adapter2': (512, 64),
      'adapter3': (256, 32)}


def test_init_is_uniform_within_the_bounds_of_the_reference():
  features, maps, pyramid = inputs(1)
  made = lambda module, *args: nn.meta.unbox(
      jax.jit(module.init)(jax.random.key(0), *args))['params']
  params = made(mask_head.MaskHead(), features, maps, pyramid)
  context = WIDTH + HEADS
  for name, inputs_of in (('lay1', 9 * context), ('lay2', 9 * context), ('adapter1', CHANNELS[0])):
    # kaiming_uniform(a=1): sqrt(6 / ((1 + a^2) fan_in)), whatever the split of lay1.
    bound = math.sqrt(3 / inputs_of)
    assert 0.95 * bound < abs(params[name]['kernel']).max() <= bound
  assert not any(layer['bias'].any() for layer in params.values())
  attend = made(mask_head.BoxAttention(HEADS, WIDTH), features[:, 0], features,
                np.ones(features.shape[:3], bool))
  for layer in attend.values():
    bound = math.sqrt(6 / (2 * WIDTH))
    assert 0.95 * bound < abs(layer['kernel']).max() <= bound
    assert not layer['bias'].any()


def test_box_attention_is_one_softmax_over_heads_and_valid_cells():
  rng = np.random.default_rng(3)
  queries = rng.normal(size=(BATCH, QUERIES, WIDTH)).astype(np.float32)
  memory = rng.normal(size=(BATCH, 3, 4, WIDTH)).astype(np.float32)
  valid = np.ones((BATCH, 3, 4), bool)
  valid[1, 2:] = valid[1, :, 3:] = False
  module = mask_head.BoxAttention(HEADS, WIDTH)
  params = drawn(module, queries, memory, valid)
  got = jax.jit(module.apply)({'params': params}, queries, memory, valid)
  assert got.shape == (BATCH, QUERIES, HEADS, 3, 4) and got.dtype == jnp.float32

  def project(x, layer):
    y = x.astype(np.float64) @ layer['kernel'] + layer['bias']
    return y.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)
  scores = np.einsum('bqnd,bhwnd->bqnhw', project(queries, params['query']),
                     project(memory, params['key'])) / math.sqrt(WIDTH // HEADS)
  scores = np.where(valid[:, None, None], scores, -np.inf)
  np.testing.assert_allclose(got, scipy.special.softmax(scores, (2, 3, 4)), atol=1e-6)
  np.testing.assert_allclose(got.sum((2, 3, 4)), 1, atol=1e-6)
  assert not got[1][..., 2:, :].any() and not got[1][..., 3:].any()


def bilinear(length, cells):
  """Weights `[length, cells]` of bilinear upsampling with half-pixel centres, clamped at edges."""
  weights = np.zeros((length, cells))
  for i in range(length):
    x = min(max((i + 0.5) * cells / length - 0.5, 0), cells - 1)
    low = min(int(x), cells - 2)
    weights[i, low:low + 2] += (1 - (x - low), x - low)
  return weights


def plain_losses(masks, segments, objects, weight, num_boxes):
  focal = dice = 0.0
  for b, n in enumerate(objects):
    for i in range(n):
      rows, columns = (bilinear(*sizes) for sizes in zip(segments.shape[1:], masks.shape[2:]))
      p = scipy.special.expit(rows @ masks[b, i].astype(np.float64) @ columns.T)
      t = segments[b] == i + 1
      hit = np.where(t, p, 1 - p)
      focal += weight[b] * (np.where(t, .25, .75) * (1 - hit) ** 2 * -np.log(hit)).mean()
      dice += weight[b] * (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
  return focal / num_boxes, dice / num_boxes


def pictures():
  """Logits at stride 4 of 17 x 30 pixels, six slots of which 3, 0, 5 and 2 are real."""
  rng = np.random.default_rng(4)
  masks = 2 * rng.normal(size=(4, 6, 5, 8)).astype(np.float32)
  objects = np.array([3, 0, 5, 2], np.int32)
  segments = rng.integers(0, objects[:, None, None] + 1, (4, 17, 30)).astype(np.uint8)
  segments[:, 14:] = 0
  return masks, segments, objects


def test_losses_and_their_gradient():
  masks, segments, objects = pictures()
  weight = np.array([1, 1, 1, 0], np.float32)
  both = lambda masks: mask_head.mask_losses(masks, segments, objects, weight, 7.0)
  np.testing.assert_allclose(
      jax.jit(both)(masks), plain_losses(masks, segments, objects, weight, 7.0), rtol=1e-5)
  total = lambda masks: 3 * both(masks)[0] + both(masks)[1]
  grad = np.asarray(jax.jit(jax.grad(total))(masks))
  # Slots that are empty, and the row that does not count, get nothing.
  real = (np.arange(6) < objects[:, None]) & (weight[:, None] > 0)
  assert (abs(grad).max((2, 3)) > 0).tolist() == real.tolist()
  plain = lambda masks: np.dot((3, 1), plain_losses(masks, segments, objects, weight, 7.0))
  for b, i, y, x in ((0, 0, 0, 0), (0, 2, 2, 3), (2, 4, 4, 7)):
    step = np.zeros(masks.shape)
    step[b, i, y, x] = 1e-4
    slope = (plain(masks + step) - plain(masks - step)) / 2e-4
    np.testing.assert_allclose(grad[b, i, y, x], slope, rtol=1e-3)


def test_losses_worked_by_hand():
  # Logit 0 everywhere, 4 x 8 pixels, object 1 covers 10 of them: p = 1/2. Focal: (10 x .25 + 22 x
  # .75) / 32 x .25 x ln 2. Dice: 1 - (2 x 5 + 1) / (16 + 10 + 1).
  segments = np.zeros((1, 4, 8), np.uint8)
  segments[0, :2, :5] = 1
  focal, dice = mask_head.mask_losses(
      jnp.zeros((1, 1, 1, 2)), segments, np.array([1]), np.ones(1), 1.0)
  np.testing.assert_allclose(focal, (2.5 + 16.5) / 32 * 0.25 * math.log(2), rtol=1e-6)
  np.testing.assert_allclose(dice, 1 - 11 / 27, rtol=1e-6)


def test_perfect_masks_cost_nothing():
  _, segments, objects = pictures()
  masks = np.where(segments[:, None] == np.arange(1, 7)[:, None, None], 40.0, -40.0)
  focal, dice = mask_head.mask_losses(masks, segments, objects, np.ones(4), 1.0)
  assert 0 <= focal < 1e-6 and abs(dice) < 1e-5


def test_no_objects_and_extreme_logits():
  masks, segments, objects = pictures()
  total = lambda masks, objects: sum(
      mask_head.mask_losses(masks, segments, objects, np.ones(4), 1.0))
  grad = jax.jit(jax.value_and_grad(total))
  loss, slope = grad(masks, np.zeros_like(objects))
  assert loss == 0 and not slope.any()
  loss, slope = grad(1e4 * masks, objects)
  assert np.isfinite(loss) and np.isfinite(slope).all()


def test_more_slots_than_the_map_can_number_are_refused():
  with pytest.raises(ValueError, match='256 slots .* segments of uint8'):
    mask_head.mask_losses(jnp.zeros((1, 256, 1, 1)), np.zeros((1, 2, 2), np.uint8),
                          np.array([1]), np.ones(1), 1.0)


def kept(f, *args):
  """Bytes that the backward pass of f keeps."""
  backward = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(backward))


def test_no_full_size_mask_is_kept_for_the_backward_pass():
  size, slots = 128, 10
  loss = lambda masks: sum(mask_head.mask_losses(
      masks, np.zeros((1, size, size), np.uint8), np.array([slots]), np.ones(1), 1.0))
  # All that is kept, the map of segments among it, is less than one float32 mask.
  assert kept(loss, jnp.zeros((1, slots, 4, 4))) < 4 * size * size


def test_chunks_keep_nothing_but_maps_and_features():
  features, maps, pyramid = inputs()
  params = drawn(mask_head.MaskHead(), features, maps, pyramid)

  def of(chunk, repeats):
    apply = lambda maps: mask_head.MaskHead(chunk=chunk).apply(
        {'params': params}, features, maps, pyramid)
    return kept(apply, maps.repeat(repeats, 1))
  assert of(5, 12) - of(5, 2) == 10 * maps.nbytes
  assert of(0, 12) - of(0, 2) > 100 * maps.nbytes
