"""Random keys on the device, one an example."""

import functools

import jax
import jax.numpy as jnp


def example_keys(rng: jax.Array, content: jax.Array) -> jax.Array:
  """A key an example, `[batch]`, from `rng` and the example itself.

  So what is drawn does not depend on where in which batch an example is: evaluation with a fixed
  `rng` gives the same number for every batch size.

  Args:
    rng: key.
    content: integer `[batch, ...]`, such as pixels or tokens.
  """
  flat = content.reshape(len(content), -1).astype(jnp.uint32)
  # Odd factors in no order that data has; the sum wraps around.
  factors = (jnp.arange(flat.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761)) | jnp.uint32(1)
  return jax.vmap(functools.partial(jax.random.fold_in, rng))((flat * factors).sum(-1))
