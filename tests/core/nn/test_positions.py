import jax.numpy as jnp
import numpy as np
import pytest

from core.nn import positions


def test_the_paper_s_formula():
  """Golden values of width 4; every vector has norm sqrt(width / 2)."""
  found = positions.sinusoids(jnp.arange(3), 4)
  np.testing.assert_allclose(found, [[0, 1, 0, 1], [.8415, .5403, .0100, 1.0000],
                                     [.9093, -.4161, .0200, .9998]], atol=5e-5)
  wide = positions.sinusoids(jnp.arange(256), 512)
  np.testing.assert_allclose(np.linalg.norm(wide, axis=-1), 16, rtol=1e-5)


def test_layouts_in_float64():
  at, half = np.arange(256)[:, None], 256
  i = np.arange(half)
  printed = at * 10000. ** (-2 * i / 512)
  code = at * 10000. ** (-i / (half - 1))
  got = {name: np.asarray(positions.sinusoids(jnp.arange(256), 512, name), np.float64)
         for name in positions.SINUSOIDS}
  np.testing.assert_allclose(got['paper'][:, ::2], np.sin(printed), atol=3e-5)
  np.testing.assert_allclose(got['paper'][:, 1::2], np.cos(printed), atol=3e-5)
  for name, angles in (('tensor2tensor', code), ('marian', printed)):
    np.testing.assert_allclose(got[name], np.concatenate([np.sin(angles), np.cos(angles)], -1),
                               atol=3e-5)
  # The two do not only order their channels differently.
  assert abs(np.sort(got['marian']) - np.sort(got['tensor2tensor'])).max() > .01


def test_positions_of_any_shape():
  at = jnp.asarray([[0, 1, 0], [2, 0, 1]])
  found = positions.sinusoids(at, 8)
  np.testing.assert_array_equal(found, positions.sinusoids(jnp.arange(3), 8)[at])


def test_odd_widths_and_unknown_layouts():
  with pytest.raises(ValueError, match='pairs'):
    positions.sinusoids(jnp.arange(3), 5)
  with pytest.raises(ValueError, match='layout'):
    positions.sinusoids(jnp.arange(3), 4, 'interleaved')
