"""The detector and its set loss against numpy, published numbers and symmetries."""

import math
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from configs import detr as configs
from detection import backbone, boxes, criterion, detector, detr, matching, positions, transformer

# What the class head, the query table and the mask head of the published models are made for.
PUBLISHED = {
    ('r50', 91, 'none'): (41_524_768, 41_302_368),
    ('r101', 91, 'none'): (60_464_672, 60_242_272),
    ('r50', 250, 'joint'): (42_899_288, None),
    ('r101', 250, 'joint'): (61_839_192, None),
}
CONVOLUTIONS = {'r50': 23_454_912, 'r101': 42_394_816}
BUFFERS = {'r50': 106_240, 'r101': 210_688}


def names(tree):
  return flax.traverse_util.flatten_dict(flax.linen.unbox(tree), sep='/')


@pytest.mark.parametrize('name, classes, masks', PUBLISHED)
def test_parameters_are_those_of_the_paper(name, classes, masks):
  dilation = masks == 'joint'  # It changes none of the counts.
  config = configs.get_config('')
  config.model.update(dict(
      backbone=name, backbone_norm='frozen', freeze_at=2, dilation=dilation, width=256, heads=8,
      mlp_dim=2048, encoder_layers=6, decoder_layers=6, norm='post', positions='sine',
      positions_at='attention', queries=100, num_classes=classes, masks=masks))
  config.data.buckets = ((64, 64),)
  task = detr.Task(config)
  sizes = {k: math.prod(x.shape) for k, x in names(jax.eval_shape(
      task.init, jax.random.key(0))).items()}
  constants = sum(n for k, n in sizes.items() if re.search(task.constants, k))
  fixed = sum(n for k, n in sizes.items() if re.search(task.frozen, k))
  counted, trained = PUBLISHED[name, classes, masks]
  count = lambda prefix: sum(n for k, n in sizes.items() if k.startswith(prefix))
  # Four buffers a channel in torch, two here.
  assert constants == BUFFERS[name] // 2
  assert count('backbone/') == CONVOLUTIONS[name] + constants
  assert count('transformer/') == 17_363_456
  assert count('mask_head/') + count('bbox_attention/') == (1_333_657 if masks == 'joint' else 0)
  assert sum(sizes.values()) - constants == counted
  assert fixed == constants + 222_400
  if trained is not None:
    assert sum(sizes.values()) - fixed == trained


def test_sines_of_25_by_34_cells():
  """Values of the reference implementation."""
  sine = jax.jit(positions.sine, static_argnums=1)
  made = np.asarray(sine(np.ones((1, 25, 34), bool), 256))[0]
  assert made.dtype == np.float32
  np.testing.assert_allclose(made[0, 0, :4], [.24868987, .96858317, .21592644, .97640963],
                             rtol=2e-6)
  np.testing.assert_allclose(made[0, 0, 128:132], [.18374952, .9829731, .15934766, .98722253],
                             rtol=2e-6)
  np.testing.assert_allclose(made[-1, -1, :2], [0, 1], atol=2e-6)


def test_positions_do_not_see_the_padding():
  valid = np.zeros((1, 7, 9), bool)
  valid[:, :4, :6] = True
  sine = jax.jit(positions.sine, static_argnums=1)
  np.testing.assert_allclose(sine(valid, 16)[:, :4, :6], sine(np.ones((1, 4, 6), bool), 16),
                             rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('stride', [16, 32])
def test_cells_on_the_image_are_found_by_the_floor_rule(stride):
  """torch's 'nearest': cell i looks at pixel floor(i pixels / cells)."""
  for pixels in (64, 97, 800, 1066):
    cells = -(-pixels // stride)
    sizes = np.arange(1, pixels + 1)
    got = jax.jit(lambda at, pixels=pixels, cells=cells: positions.valid_cells(
        at, (pixels, pixels), (cells, 1)))(np.stack([sizes, sizes], 1))[:, :, 0]
    looks_at = np.array([math.floor(i * pixels / cells) for i in range(cells)])
    np.testing.assert_array_equal(got, looks_at < sizes[:, None])


@pytest.mark.parametrize('dilation, last', [(False, (25, 34)), (True, (50, 67))])
def test_sizes_of_the_features_of_800_by_1066_pixels(dilation, last):
  made = backbone.ResNet(**backbone.BACKBONES['r50'], dilation=dilation)
  x = jax.ShapeDtypeStruct((1, 800, 1066, 3), jnp.float32)
  features, _ = jax.eval_shape(made.init_with_output, jax.random.key(0), x)
  assert [f.shape for f in features] == [
      (1, 200, 267, 256), (1, 100, 134, 512), (1, 50, 67, 1024), (1, *last, 2048)]


@pytest.mark.parametrize('size, stride, dilation', [(7, 2, 1), (3, 2, 1), (3, 1, 2), (1, 2, 1)])
@pytest.mark.parametrize('shape', [(8, 11), (9, 10)])
def test_convolutions_pad_on_all_sides_alike(size, stride, dilation, shape):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, *shape, 2)).astype(np.float32)
  kernel = rng.normal(size=(size, size, 2, 3)).astype(np.float32)
  scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
  made = backbone.ConvNorm(3, size, stride, dilation)
  got = made.apply({'params': dict(kernel=kernel, scale=scale, bias=bias)}, x)
  spread = np.zeros((dilation * (size - 1) + 1,) * 2 + (2, 3))
  spread[::dilation, ::dilation] = kernel
  padded = np.pad(x[0].astype(float), [(dilation * (size // 2),) * 2] * 2 + [(0, 0)])
  want = [sum(signal.correlate(padded[..., i], spread[..., i, o], 'valid') for i in range(2))
          for o in range(3)]
  want = np.stack(want, -1)[::stride, ::stride] * scale + bias
  assert got.shape[1:3] == tuple(-(-n // stride) for n in shape)
  np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)


WIDTH, QUERIES, CLASSES = 32, 6, 91


def small(**changes):
  return detector.DETR(**dict(
      classes=CLASSES, queries=QUERIES, width=WIDTH, stages=(1, 1), channels=4,
      encoder_layers=1, decoder_layers=2, heads=2, mlp_dim=24) | changes)


SIZES = np.array([[32, 48], [20, 33]], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)


def drawn(made):
  """Parameters from numpy: nothing to compile."""
  rng = np.random.default_rng(2)
  shapes = flax.linen.unbox(jax.eval_shape(made.init, jax.random.key(0), IMAGES, SIZES))['params']

  def draw(path, leaf):
    spread = (2 / math.prod(leaf.shape[:-1])) ** .5 if leaf.ndim > 1 else .1
    return rng.normal(path[-1].key == 'scale', spread, leaf.shape).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes) | {
      'query_embed': rng.normal(size=(QUERIES, WIDTH)).astype(np.float32)}


def test_order_of_queries_means_nothing():
  """Permuted queries give permuted outputs, and the same loss; so do permuted targets."""
  apply = jax.jit(small().apply)
  params = drawn(small())
  order = np.random.default_rng(1).permutation(QUERIES)
  out = apply({'params': params}, IMAGES, SIZES)
  turned = apply({'params': {**params, 'query_embed': params['query_embed'][order]}}, IMAGES, SIZES)
  for name, value in out.items():
    assert value.shape[:3] == (2, 2, QUERIES)
    np.testing.assert_allclose(turned[name], value[:, :, order], rtol=1e-4, atol=1e-5)
  assert out['boxes'].std(2).max() > 1e-3

  targets = made_targets()
  again = {**targets, 'labels': targets['labels'][:, [1, 0, 2]],
           'boxes': targets['boxes'][:, [1, 0, 2]]}
  for other in (losses(turned, targets), losses(out, again)):
    for name, value in losses(out, targets).items():
      np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)


def test_the_transformer_does_not_see_the_padding():
  """A map of 3x4 cells, alone and in one of 5x6 whose other cells hold anything."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  inside = np.zeros((1, 5, 6), bool)
  inside[:, :3, :4] = True
  padded = [normal(1, 30, WIDTH), normal(1, 30, WIDTH)]
  alone = [x[:, inside[0].ravel()] for x in padded]
  queries = normal(QUERIES, WIDTH)
  made = transformer.Transformer(1, 2, 2, 24)
  apply = jax.jit(made.apply)
  full = (*alone, np.ones((1, 12), bool), queries)
  params = jax.tree.map(lambda x: normal(*x.shape) * .3, flax.linen.unbox(
      jax.eval_shape(made.init, jax.random.key(0), *full)))
  found, memory = apply(params, *full)
  same, longer = apply(params, *padded, inside.reshape(1, -1), queries)
  np.testing.assert_allclose(same, found, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(longer[:, inside[0].ravel()], memory, rtol=1e-4, atol=1e-5)
  seen, _ = apply(params, *padded, np.ones((1, 30), bool), queries)
  assert abs(seen - found).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('masks', ['none', 'frozen'])
def test_what_is_frozen_gets_no_gradient(masks):
  made = small(freeze_at=2, masks=masks, encoder_layers=0)
  rng = np.random.default_rng(0)

  def loss(params):
    out = made.apply({'params': params}, IMAGES[:1], SIZES[:1])
    return sum((x * rng.normal(size=x.shape)).sum() for x in out.values())
  grads = names(jax.jit(jax.grad(loss))(drawn(made)))
  config = configs.get_config('')
  config.model.update(dict(backbone_norm='frozen', freeze_at=2, masks=masks))
  frozen = re.compile(detr.Task(config).frozen)
  moving = {name for name, grad in grads.items() if abs(grad).max() > 0}
  assert not [name for name in moving if frozen.search(name)]
  # Nothing else stands still, but keys' biases may, which move all scores of a query alike.
  still = set(grads) - moving
  assert not [name for name in still
              if not frozen.search(name) and not name.endswith('/key/bias')]
  assert {'backbone/conv1/kernel', 'backbone/layer1_0/conv2/kernel',
          'backbone/layer2_0/conv3/scale', 'backbone/layer2_0/conv3/bias'} <= still
  assert ('backbone/layer2_0/conv1/kernel' in moving) == (masks == 'none')
  assert ('mask_head/lay1/kernel' in moving) == (masks == 'frozen')


def test_initial_values_are_those_of_torch():
  made = small(stages=(1,), encoder_layers=0, decoder_layers=1)
  params = names(jax.jit(made.init)(jax.random.key(0), IMAGES[:1], SIZES[:1])['params'])
  limits = {'class_embed': WIDTH ** -.5, 'bbox_embed_0': WIDTH ** -.5, 'bbox_embed_2': WIDTH ** -.5,
            'input_proj': 16 ** -.5}  # Fans in; weights and biases alike.
  limits = {f'{name}/{leaf}': limit for name, limit in limits.items()
            for leaf in ('kernel', 'bias')}
  # Query, key and value are drawn as one matrix of 3 widths by one.
  stack = 'transformer/decoder/layers'
  for attention in ('self_attn', 'cross_attn'):
    for part in ('query', 'key', 'value'):
      limits[f'{stack}/{attention}/{part}/kernel'] = (6 / (4 * WIDTH)) ** .5
      assert not params[f'{stack}/{attention}/{part}/bias'].any()
    limits[f'{stack}/{attention}/out/kernel'] = (6 / (2 * WIDTH)) ** .5
    assert not params[f'{stack}/{attention}/out/bias'].any()
  for name, inputs in (('linear1', WIDTH), ('linear2', 24)):
    limits[f'{stack}/{name}/kernel'] = (6 / (WIDTH + 24)) ** .5
    limits[f'{stack}/{name}/bias'] = inputs ** -.5
  for name, limit in limits.items():
    size = params[name].size
    # Of so many uniform draws the largest is all but surely above this share of the limit.
    assert limit * (1 - 7 / size) <= abs(params[name]).max() <= limit * (1 + 1e-6), name
  queries = params['query_embed']
  assert abs(queries.std() - 1) < .2 and abs(queries).max() > 2


COSTS = configs.get_config('').model


def made_targets():
  rng = np.random.default_rng(5)
  place = np.concatenate([rng.uniform(.3, .7, (2, 3, 2)), rng.uniform(.1, .5, (2, 3, 2))], -1)
  return dict(labels=rng.integers(0, CLASSES, (2, 3)).astype(np.int32),
              boxes=place.astype(np.float32), objects=np.array([2, 3], np.int32),
              mask=np.ones(2, np.float32))


@jax.jit
def sums(out, targets):
  """What is logged, of every layer: sums, and what they are divided by."""
  matched = matching.assign(criterion.match_cost(out, targets, COSTS), targets['objects'])
  by_layer, extra = criterion.set_losses(out, targets, matched, .1)
  return extra | {f'{name}_{i}': pair for i, found in enumerate(by_layer)
                  for name, pair in found.items()}


def losses(out, targets):
  return {name: value / weight for name, (value, weight) in sums(out, targets).items()}


def drawn_outputs():
  rng = np.random.default_rng(6)
  place = np.concatenate([rng.uniform(.3, .7, (2, 2, QUERIES, 2)),
                          rng.uniform(.1, .5, (2, 2, QUERIES, 2))], -1)
  return dict(logits=rng.normal(size=(2, 2, QUERIES, CLASSES + 1)).astype(np.float32),
              boxes=place.astype(np.float32))


def test_uniform_logits_and_no_objects_cost_the_logarithm_of_the_classes():
  out = drawn_outputs()
  out['logits'] = np.full_like(out['logits'], .3)
  for counts in ([0, 0], [2, 3]):  # The weights of the classes do not change it.
    found = sums(out, made_targets() | dict(objects=np.array(counts, np.int32)))
    objects = sum(counts)
    for layer in range(2):
      value, weight = found[f'loss_ce_{layer}']
      np.testing.assert_allclose(value / weight, math.log(92), rtol=1e-5)
      np.testing.assert_allclose(weight, .1 * (2 * QUERIES - objects) + objects, rtol=1e-6)
      if not objects:
        assert found[f'loss_bbox_{layer}'] == found[f'loss_giou_{layer}'] == (0, 0)


def test_a_batch_twice_has_the_same_losses():
  out, targets = drawn_outputs(), made_targets()
  twice = jax.tree.map(lambda x: np.concatenate([x, x], 1), out)
  found = losses(twice, jax.tree.map(lambda x: np.concatenate([x, x]), targets))
  for name, value in losses(out, targets).items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_a_perfect_answer_costs_nothing():
  out, targets = drawn_outputs(), made_targets()
  order = [4, 0, 3]
  out['boxes'][:, :, order] = targets['boxes']
  out['logits'][..., :] = 0
  out['logits'][..., CLASSES] = 40
  for row, (labels, n) in enumerate(zip(targets['labels'], targets['objects'])):
    for query, label in list(zip(order, labels))[:n]:
      out['logits'][:, row, query] = 80 * np.eye(CLASSES + 1)[label]
  for name, value in losses(out, targets).items():
    np.testing.assert_allclose(value, 0, atol=1e-5, err_msg=name)


def test_generalised_overlap():
  overlaps = jax.jit(boxes.giou)
  giou = lambda a, b: float(overlaps(np.array(a, np.float32), np.array(b, np.float32)))
  box = [.1, .2, .5, .8]
  assert giou(box, box) == pytest.approx(1, abs=1e-6)
  # Squares of side 2, one apart: 2 shared of 6 in a hull of 6; then 1 of 7 in 9.
  assert giou([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(1 / 3)
  assert giou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7 - 2 / 9)
  # Apart: nothing shared, and 2 of a hull of 8 x 1 covered.
  assert giou([0, 0, 1, 1], [7, 0, 8, 1]) == pytest.approx(-6 / 8)
  rng = np.random.default_rng(0)
  low, size = rng.uniform(0, 1, (2, 1000, 2)), rng.uniform(1e-4, 1, (2, 1000, 2))
  a, b = np.concatenate([low, low + size], -1).astype(np.float32)
  found = np.asarray(overlaps(a, b))
  assert -1 <= found.min() < -.9 and found.max() <= 1
  np.testing.assert_allclose(overlaps(b, a), found, rtol=1e-5, atol=1e-6)
  # Padded slots hold boxes of no size.
  grad = jax.jit(jax.grad(lambda a, b: boxes.giou(a, b).sum(), (0, 1)))
  for pair in (([0, 0, 0, 0], [0, 0, 0, 0]), (box, [0, 0, 0, 0]), ([.3, .3, .3, .3], box)):
    assert np.isfinite(grad(*np.array(pair, np.float32))).all()
