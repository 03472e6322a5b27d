import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_family import analysis


def random_attention(layers=4, heads=3, tokens=10, seed=0):
  weights = np.random.default_rng(seed).exponential(size=(layers, heads, tokens, tokens)) ** 3
  return weights / weights.sum(-1, keepdims=True)


def test_rollout_rows_sum_to_one_at_every_depth():
  weights = random_attention()
  for depth in range(1, 5):
    np.testing.assert_allclose(analysis.rollout(weights[:depth]).sum(-1), 1., rtol=1e-12)


def test_rollout_by_hand():
  """Two layers, one head, two tokens: 0.5 A + 0.5 I, then the product, second layer first."""
  a = np.array([[[[.5, .5], [0., 1.]]], [[[1., 0.], [1., 0.]]]])
  first = np.array([[.75, .25], [0., 1.]])
  second = np.array([[1., 0.], [.5, .5]])
  np.testing.assert_allclose(analysis.rollout(a), second @ first)


def test_heat_of_uniform_attention_is_even():
  heat = analysis.heat(analysis.rollout(np.full((3, 2, 10, 10), .1)), (24, 24), token=True)
  assert heat.shape == (3, 3)
  np.testing.assert_allclose(heat, 1.)
  rolled = analysis.rollout(np.full((3, 2, 8, 8), 1 / 8))
  assert analysis.heat(rolled, (16, 32), token=False).shape == (2, 4)


def test_heat_finds_the_patch_that_is_read():
  """The class token reads patch 5 of a 2x4 grid alone: row 1, column 1."""
  weights = np.eye(9)[None, None].copy()
  weights[0, 0, 0] = np.eye(9)[6]
  heat = analysis.heat(analysis.rollout(weights), (16, 32), token=True)
  np.testing.assert_allclose(heat, [[0, 0, 0, 0], [0, 1, 0, 0]])


def test_grid():
  assert analysis.grid(196, (224, 224)) == (14, 14)
  assert analysis.grid(50, (80, 40)) == (10, 5)
  assert analysis.grid(1, (8, 8)) == (1, 1)
  for patches, size in ((50, (224, 224)), (6, (16, 16)), (6, (20, 30 + 1))):
    with pytest.raises(ValueError, match='do not tile'):
      analysis.grid(patches, size)


def test_attention_distance_by_hand():
  """Four patches of 8 pixels in a square: 0, 8, 8 and 8 sqrt(2) away from each."""
  mean = (0 + 8 + 8 + 8 * np.sqrt(2)) / 4
  uniform = np.full((1, 1, 1, 4, 4), .25, np.float32)
  identity = np.eye(4, dtype=np.float32)[None, None, None]
  far = identity[..., ::-1]
  weights = np.concatenate([uniform, identity, far], axis=2)
  found = analysis.attention_distance(weights, (16, 16), token=False)
  np.testing.assert_allclose(found[0, 0], [mean, 0, 8 * np.sqrt(2)], rtol=1e-6)


def test_attention_distance_leaves_the_class_token_out_and_does_not_renormalise():
  """Half of each patch's attention on the class token: half the distance of the other half."""
  weights = np.zeros((1, 1, 1, 5, 5), np.float32)
  weights[..., 0, 1:] = .25
  weights[..., 1:, 0] = .5
  weights[..., 1:, 1:] = .125
  found = analysis.attention_distance(weights, (16, 16), token=True)
  np.testing.assert_allclose(found, (16 + 8 * np.sqrt(2)) / 8, rtol=1e-6)


def test_attention_distance_of_a_grid_that_is_not_square():
  """Against a loop over pairs, under jit, for two layers, two images and three heads."""
  weights = np.stack([random_attention(2, 3, 9, s) for s in (1, 2)], 1).astype(np.float32)
  measure = jax.jit(analysis.attention_distance, static_argnums=(1, 2))
  found = measure(jnp.asarray(weights), (32, 64), True)
  assert found.shape == (2, 2, 3) and found.dtype == np.float32
  expected = np.zeros(found.shape)
  for q in range(8):
    for k in range(8):
      apart = 16 * np.hypot(q // 4 - k // 4, q % 4 - k % 4)
      expected += weights[..., q + 1, k + 1].astype(np.float64) * apart / 8
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_similarity_is_cosine():
  e = np.random.default_rng(0).normal(size=(9, 5))
  found = analysis.similarity(e)
  np.testing.assert_allclose(np.diag(found), 1.)
  np.testing.assert_allclose(found[2, 7], e[2] @ e[7] / np.linalg.norm(e[2]) / np.linalg.norm(e[7]))


def test_similarity_by_distance_by_hand():
  """In a 1x3 row: two pairs side by side, one further apart, none off the row."""
  similarities = np.array([[1., .5, .2], [.5, 1., .3], [.2, .3, 1.]])
  found = analysis.similarity_by_distance(similarities, 1, 3)
  assert found == pytest.approx({'adjacent': .4, 'same_row_or_column': .2})
  # In a 2x2 square the diagonals are the others.
  square = np.array([[1., .5, .6, -.1], [.5, 1., -.3, .7], [.6, -.3, 1., .8], [-.1, .7, .8, 1.]])
  found = analysis.similarity_by_distance(square, 2, 2)
  assert found == pytest.approx({'adjacent': .65, 'others': -.2})


def test_principal_filters_find_what_the_filters_are_made_of():
  """Filters are a base and two orthonormal patterns with weights of deviation 3 and 1."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(12, 2)))[0].T
  basis *= np.where(basis.sum(1) < 0, -1, 1)[:, None]
  weights = rng.normal(size=(200, 2))
  weights -= weights.mean(0)
  weights = weights @ np.linalg.inv(np.linalg.cholesky(weights.T @ weights / 200)).T * [3, 1]
  kernel = (weights @ basis + rng.normal(size=12)).T.reshape(2, 2, 3, 200)
  found, explained = analysis.principal_filters(kernel, count=4)
  assert found.shape == (4, 2, 2, 3)
  np.testing.assert_allclose(explained, [.9, .1, 0, 0], atol=1e-12)
  assert found.min() == 0 and found.max() == 1
  stretched = (basis - basis.min(1, keepdims=True)) / np.ptp(basis, axis=1)[:, None]
  np.testing.assert_allclose(found[:2].reshape(2, 12), stretched, atol=1e-9)


def test_principal_filters_of_few_observations():
  found, explained = analysis.principal_filters(np.random.default_rng(0).normal(size=(4, 4, 1, 10)))
  assert found.shape == (9, 4, 4, 1)
  np.testing.assert_allclose(explained.sum(), 1.)
