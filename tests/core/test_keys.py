import jax
import jax.numpy as jnp
import numpy as np

from core import keys


def draws(rng, content):
  return [tuple(np.asarray(key)) for key in jax.random.key_data(
      keys.example_keys(rng, jnp.asarray(content)))]


def test_examples_have_keys_of_their_own_wherever_they_are():
  content = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3))
  content[1] = content[0]
  content[1, 3, 4, 2] ^= 1
  content[2] = content[0, :, ::-1]
  first = draws(jax.random.key(0), content)
  assert len(set(first)) == 3
  assert draws(jax.random.key(0), content[::-1]) == first[::-1]
  assert not set(draws(jax.random.key(1), content)) & set(first)
