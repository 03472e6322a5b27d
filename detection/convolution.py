"""Convolutions whose kernel gradient is fast on a CPU too."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from core import partition

# Channels, in and out, from which matrix products win on a CPU.
_WIDE = 128


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
  """A convolution with zeros on all sides, as torch pads it.

  Args:
    x: `[batch, height, width, inputs]`.
    kernel: `[size, size, inputs, features]` of an odd size, in the dtype of x.
    stride, dilation: of both dimensions.

  Returns:
    `[batch, ceil(height / stride), ceil(width / stride), features]`.
  """
  if partition.platform() == 'cpu' and min(kernel.shape[2:]) >= _WIDE:
    return _with_products(stride, dilation, x, kernel)
  return _convolve(stride, dilation, x, kernel)


def _convolve(stride, dilation, x, kernel):
  pad = dilation * (kernel.shape[0] // 2)
  return lax.conv_general_dilated(
      x, kernel, (stride, stride), [(pad, pad)] * 2, rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_products(stride, dilation, x, kernel):
  """`_convolve`; its kernel gradient is a matrix product for each place in the kernel.

  XLA turns that gradient into a convolution with a kernel as large as the picture, which on a CPU
  runs at half the speed of these products.
  """
  return _convolve(stride, dilation, x, kernel)


def _forward(stride, dilation, x, kernel):
  return _convolve(stride, dilation, x, kernel), (x, kernel)


def _backward(stride, dilation, kept, dy):
  x, kernel = kept
  dx, = jax.linear_transpose(lambda x: _convolve(stride, dilation, x, kernel), x)(dy)
  size, _, inputs, features = kernel.shape
  batch, height, width, _ = dy.shape
  pad = dilation * (size // 2)
  padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  dy = dy.reshape(-1, features)

  def product(i, j):
    """Each output with the input it saw through place (i, j): `[inputs, features]`."""
    top, left = i * dilation, j * dilation
    seen = lax.slice(padded, (0, top, left, 0),
                     (batch, top + stride * (height - 1) + 1, left + stride * (width - 1) + 1,
                      inputs), (1, stride, stride, 1))
    return lax.dot_general(seen.reshape(-1, inputs), dy, (((0,), (0,)), ((), ())),
                           preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))

  products = [product(i, j) for i in range(size) for j in range(size)]
  return dx, jnp.stack(products).reshape(kernel.shape).astype(kernel.dtype)


_with_products.defvjp(_forward, _backward)
