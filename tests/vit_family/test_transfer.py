import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import linen as nn

from core import partition
from core.config import UserError
from core.weights import Weight
from vit_family import transfer, vit

POSITIONS = transfer.POSITIONS


def model(**changes):
  sizes = dict(num_classes=3, patch_size=4, width=8, depth=2, mlp_dim=16, heads=2, scan=True)
  return vit.VisionTransformer(**sizes | changes)


@functools.cache
def shapes(size=12, **changes):
  """name -> shape, and the tree, of a model for images of `size` pixels."""
  tree = nn.unbox(jax.eval_shape(model(**changes).init, jax.random.key(0),
                                 jnp.zeros((1, size, size, 3))))['params']
  return {partition.path_name(path): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}, tree


def unread(shapes):
  def read():
    raise AssertionError('read')
  return {name: Weight(shape, read) for name, shape in shapes.items()}


def adapt(source, target, **values):
  weights = unread(shapes(**source)[0])
  for name, value in values.items():
    name = POSITIONS if name == 'positions' else name
    weights[name] = Weight(value.shape, lambda value=value: value)
  found, notes = transfer.adapt(weights, shapes(**target)[1], transfer=True)
  want = shapes(**target)[0]
  assert {k: w.shape for k, w in found.items()} == {
      k: s for k, s in want.items() if k not in notes.fresh}
  return found, notes


def test_interpolation_by_hand():
  """0,1,2,3 -> 7 gives halves; 0,1 -> 3 gives the middle; equal sizes give the same."""
  ramp = transfer.interpolation_matrix(4, 7) @ np.arange(4.)
  np.testing.assert_allclose(ramp, [0, .5, 1, 1.5, 2, 2.5, 3])
  np.testing.assert_allclose(transfer.interpolation_matrix(2, 3) @ [0, 1], [0, .5, 1])
  np.testing.assert_array_equal(transfer.interpolation_matrix(5, 5), np.eye(5))
  np.testing.assert_array_equal(transfer.interpolation_matrix(3, 1), [[1, 0, 0]])


@pytest.mark.parametrize('old, new', [(14, 24), (7, 12), (16, 37), (24, 14), (3, 1), (5, 5)])
def test_zoom_is_that_of_scipy(old, new):
  grid = np.random.default_rng(old).normal(size=(old, old, 3)).astype(np.float32)
  want = scipy.ndimage.zoom(grid.astype(np.float64), (new / old, new / old, 1), order=1)
  got = transfer.zoom(grid, new)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_head_is_always_fresh_and_reported():
  found, notes = adapt({}, {})
  assert set(notes.fresh) == set(notes.unused) == {'head/kernel', 'head/bias'}
  assert not notes.resized and 'cls' in found


@pytest.mark.parametrize('file, wanted, fresh, unused', [
    (8, None, False, True), (8, 8, False, False), (8, 6, True, True), (None, 8, True, False)])
def test_pre_logits_stay_only_at_the_same_width(file, wanted, fresh, unused):
  _, notes = adapt(dict(representation_size=file), dict(representation_size=wanted))
  parts = {'pre_logits/kernel', 'pre_logits/bias'}
  assert (parts <= set(notes.fresh), parts <= set(notes.unused)) == (fresh, unused)
  assert bool(parts & set(notes.fresh + notes.unused)) == (fresh or unused)


TABLE = np.arange(10 * 8, dtype=np.float32).reshape(1, 10, 8)  # a class token and 3x3


@pytest.mark.parametrize('target', ['gap', 'map', 'token'])
def test_positions_from_a_token_checkpoint_to_a_larger_grid(target):
  found, notes = adapt({}, dict(size=20, classifier=target), positions=TABLE)
  table = found[POSITIONS].read()
  grid = TABLE[0, 1:].reshape(3, 3, 8)
  if target == 'token':
    np.testing.assert_array_equal(table[0, 0], TABLE[0, 0])
  else:
    assert 'cls' in notes.unused
  corners = table[0, -25:].reshape(5, 5, 8)
  np.testing.assert_array_equal(corners[::4, ::4], grid[::2, ::2])
  np.testing.assert_allclose(corners[1, 2], (grid[0, 1] + grid[1, 1]) / 2)
  assert notes.resized[0].startswith(f'{POSITIONS} 3x3 to 5x5')
  assert ('without a class token' in notes.resized[0]) == (target != 'token')
  assert any(name.startswith('MAPHead_0/') for name in notes.fresh) == (target == 'map')


def test_positions_without_a_class_token_get_a_zero_entry():
  found, notes = adapt(dict(classifier='gap'), {}, positions=TABLE[:, 1:])
  table = found[POSITIONS].read()
  assert (table[:, 0] == 0).all() and 'cls' in notes.fresh
  np.testing.assert_array_equal(table[:, 1:], TABLE[:, 1:])


def test_equal_positions_are_not_touched():
  found, notes = adapt({}, {}, positions=TABLE)
  assert found[POSITIONS].read() is TABLE and not notes.resized


def test_grids_that_are_not_square_are_refused():
  weights = unread(shapes()[0] | {POSITIONS: (1, 13, 8)})
  with pytest.raises(UserError, match='has 12 positions and the model 25; only square'):
    transfer.adapt(weights, shapes(size=20)[1], transfer=True)


def test_extras_are_dropped_in_a_transfer_and_left_to_be_refused_otherwise():
  extras = {'patch_head/kernel': (8, 512), 'mask_token': (1, 1, 8)}
  weights = unread(shapes()[0] | extras)
  found, notes = transfer.adapt(weights, shapes()[1], transfer=True)
  assert set(extras) <= set(notes.unused) and not set(extras) & set(found)
  found, notes = transfer.adapt(weights, shapes()[1], transfer=False)
  assert set(found) == set(weights) and not notes.fresh + notes.unused + notes.resized


def test_a_lost_trunk_parameter_is_not_fresh():
  weights = unread(shapes()[0])
  del weights['embedding/bias']
  found, notes = transfer.adapt(weights, shapes()[1], transfer=True)
  assert 'embedding/bias' not in notes.fresh and 'embedding/bias' not in found


@pytest.mark.parametrize('scan', [True, False])
def test_layers_come_as_the_model_has_them(scan):
  found, _ = adapt(dict(scan=not scan), dict(scan=scan))
  assert ('Transformer/encoderblock/LayerNorm_0/scale' in found) == scan


def test_evaluating_an_erased_head_warns(caplog):
  """Original ImageNet-21k files have a zero head, which classifies nothing."""
  for head, warned in ((np.ones((8, 3)), False), (np.zeros((8, 3)), True)):
    weights = unread(shapes()[0]) | {'head/kernel': Weight((8, 3), lambda head=head: head)}
    found, _ = transfer.adapt(weights, shapes()[1], transfer=False)
    assert found['head/kernel'].read() is head
    assert ('head of these weights is zero' in caplog.text) == warned


def test_heads_are_split_only_where_they_were_folded():
  names = shapes()[0]
  query = 'Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel'
  assert names[query] == (2, 8, 2, 4)
  folded = np.arange(2 * 64.).reshape(2, 8, 8)
  weights = unread(names) | {query: Weight(folded.shape, lambda: folded)}
  found, _ = transfer.adapt(weights, shapes()[1], transfer=False)
  assert found[query].read()[1, 3, 1, 2] == folded[1, 3, 6]
  other = transfer.adapt(unread(names | {query: (2, 8, 4, 2)}), shapes()[1], transfer=True)[0]
  assert other[query].shape == (2, 8, 4, 2)  # four heads are another model


@pytest.mark.parametrize('scan', [True, False])
def test_a_file_of_another_size_is_recognised_with_its_heads_folded(scan):
  """torch's S/16 offered to this small model, whose heads cannot split it."""
  width, block = 384, f'{transfer.LAYERS}_{{}}'
  query = 'MultiHeadDotProductAttention_0/query/kernel'
  names = {'embedding/kernel': (16, 16, 3, width), POSITIONS: (1, 197, width),
           'cls': (1, 1, width)}
  for i in range(12):
    names |= {f'{block.format(i)}/{query}': (width, width),
              f'{block.format(i)}/MlpBlock_0/Dense_0/kernel': (width, 1536)}
  _, notes = transfer.adapt(unread(names), shapes(scan=scan)[1], transfer=True)
  assert notes.looks_like == 'S/16 at 224 px'
