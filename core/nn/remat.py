"""What a block keeps for its backward pass: the values of `config.remat`."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax import lax

_POLICIES = {
    # Nothing but the block's input.
    'full': None,
    # The results of matrix products with parameters and of convolutions, which jax's policies do
    # not know; the rest is computed again.
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        lambda primitive, *args, **params: primitive is lax.conv_general_dilated_p),
}


def remat(block: Callable, kept: str, prevent_cse: bool = True) -> Callable:
  """A module class, or a function of modules, that computes again what its gradient needs.

  Args:
    block: the class or function.
    kept: 'none' (`block` as it is: everything is kept), 'full' (only its inputs are) or 'dots'
      (also the products with parameters and the convolutions).
    prevent_cse: whether XLA must be kept from merging the two computations; not in a scan.

  Raises:
    ValueError: `kept` is something else.
  """
  if kept == 'none':
    return block
  if kept not in _POLICIES:
    raise ValueError(f'remat={kept!r}: expected one of {["none", *_POLICIES]}')
  return nn.remat(block, policy=_POLICIES[kept], prevent_cse=prevent_cse)
