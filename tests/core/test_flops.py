"""FLOPs against counts made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from core.flops import count_flops, count_jaxpr


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


SQUARE = shaped(8, 8)
PRODUCT = 2 * 8**3  # of two squares


def test_a_matmul_counts_two_flops_a_multiply_add_and_elementwise_nothing():
  assert count_flops(lambda a, b: jnp.tanh(a @ b) + 1, shaped(3, 5), shaped(5, 7)) == 2 * 3 * 5 * 7
  closed = jax.make_jaxpr(jnp.dot)(np.ones((3, 5)), np.ones(5))
  assert count_jaxpr(closed) == 2 * 3 * 5


def test_batched_einsum_and_its_vmap():
  def scores(q, k):
    return jnp.einsum('bqhd,bkhd->bhqk', q, k)
  one = 2 * 2 * 3 * 5 * 7 * 4
  assert count_flops(scores, shaped(2, 5, 3, 4), shaped(2, 7, 3, 4)) == one
  batched = count_flops(jax.vmap(scores, (0, None)), shaped(6, 2, 5, 3, 4), shaped(2, 7, 3, 4))
  assert batched == 6 * one


def test_ragged_dot_costs_as_one_dense_product_and_its_gradients_the_same():
  args = shaped(32, 8), shaped(4, 8, 16), shaped(4, dtype=jnp.int32)
  one = 2 * 32 * 8 * 16
  assert count_flops(jax.lax.ragged_dot, *args) == one
  loss = lambda *a: jnp.sum(jax.lax.ragged_dot(*a) ** 2)
  assert count_flops(jax.grad(loss, (0, 1)), *args) == 3 * one


@pytest.mark.parametrize('size, kernel, stride, padding, groups, out', [
    (8, 3, 1, 'SAME', 1, 8),
    (8, 3, 1, 'VALID', 1, 6),
    (8, 3, 2, 'SAME', 2, 4),
    (9, 3, 2, 'VALID', 4, 4),
    (11, 3, 2, 'VALID', 1, 5),
    (16, 4, 4, 'VALID', 1, 4),
    (8, 7, 2, 'SAME', 8, 4),
])
def test_a_convolution_and_each_of_its_gradients_cost_the_same(
    size, kernel, stride, padding, groups, out):
  conv = functools.partial(
      jax.lax.conv_general_dilated, window_strides=(stride, stride), padding=padding,
      feature_group_count=groups, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  x, w = shaped(2, size, size, 8), shaped(kernel, kernel, 8 // groups, 16)
  forward = 2 * (2 * out * out * 16) * (kernel * kernel * 8 // groups)
  assert count_flops(conv, x, w) == forward
  loss = lambda x, w: jnp.sum(conv(x, w) ** 2)
  assert count_flops(jax.grad(loss, 0), x, w) == 2 * forward
  assert count_flops(jax.grad(loss, 1), x, w) == 2 * forward
  assert count_flops(jax.grad(loss, (0, 1)), x, w) == 3 * forward


def test_a_transposed_convolution_does_not_count_inserted_zeros():
  def up(x, w):
    return jax.lax.conv_transpose(x, w, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  count = count_flops(up, shaped(2, 5, 5, 3), shaped(4, 4, 3, 6))
  assert count == 2 * (2 * 5 * 5 * 3) * (4 * 4 * 6)


def layers(x, ws, wrap=lambda f: f):
  return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, ws)[0]


def test_a_scan_its_gradient_and_full_remat():
  x, ws = shaped(4, 8), shaped(5, 8, 8)
  forward = 5 * 2 * 4 * 8 * 8
  assert count_flops(layers, x, ws) == forward
  loss = lambda x, ws: jnp.sum(layers(x, ws) ** 2)
  assert count_flops(jax.grad(loss, (0, 1)), x, ws) == 3 * forward
  remat = lambda x, ws: jnp.sum(layers(x, ws, jax.checkpoint) ** 2)
  assert count_flops(jax.grad(remat, (0, 1)), x, ws) == 4 * forward
  saving = lambda x, ws: jnp.sum(layers(x, ws, functools.partial(
      jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)) ** 2)
  assert count_flops(jax.grad(saving, (0, 1)), x, ws) == 3 * forward


def test_nested_jit_and_custom_derivatives_are_looked_into():
  @jax.custom_vjp
  def thrice(x):
    return x @ x @ x @ x
  thrice.defvjp(lambda x: (thrice(x), x), lambda x, g: (g @ x,))

  @jax.custom_jvp
  def once(x):
    return x @ x
  once.defjvp(lambda p, t: (once(p[0]), t[0]))

  assert count_flops(jax.jit(lambda x: jax.jit(jnp.dot)(x, x) @ x), SQUARE) == 2 * PRODUCT
  assert count_flops(thrice, SQUARE) == 3 * PRODUCT
  assert count_flops(jax.grad(lambda x: thrice(x).sum()), SQUARE) == 4 * PRODUCT
  assert count_flops(once, SQUARE) == PRODUCT


def test_a_conditional_costs_its_dearest_branch():
  def choose(i, x):
    return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)
  assert count_flops(choose, shaped(dtype=jnp.int32), SQUARE) == 2 * PRODUCT


@pytest.mark.parametrize('start, stop, step, trips', [(0, 5, 1, 5), (2, 9, 1, 7), (1, 8, 3, 3),
                                                      (4, 2, 1, 0)])
def test_a_while_runs_as_often_as_its_counter_says(start, stop, step, trips):
  def bound_in_condition(x):
    return jax.lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + step, c[1] @ c[1]),
                              (start, x))
  def bound_carried(x):
    return jax.lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + step, c[1], c[2] @ c[2]),
                              (start, stop, x))
  assert count_flops(bound_in_condition, SQUARE) == trips * PRODUCT
  assert count_flops(bound_carried, SQUARE) == trips * PRODUCT
  through_jit = jax.jit(lambda n, x: jax.lax.fori_loop(start, n, lambda i, x: x @ x, x))
  assert count_flops(lambda x: through_jit(stop, x), SQUARE) == max(stop - start, 0) * PRODUCT


def test_a_while_of_unknown_length_counts_once():
  def until(n, x):
    return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
  def bound_moves(x):
    return jax.lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - 1, c[2] @ c[2]),
                              (0, 9, x))
  assert count_flops(until, shaped(dtype=jnp.int32), SQUARE) == PRODUCT
  assert count_flops(bound_moves, SQUARE) == PRODUCT


def test_shard_map_counts_all_devices_but_no_repeated_work():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'tensor'))
  both, rows = PartitionSpec(('data', 'tensor')), PartitionSpec('data')
  for spec in (both, rows):
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()),
                      out_specs=spec, check_vma=False)
    assert count_flops(f, shaped(16, 8), SQUARE) == 2 * 16 * 8 * 8
  # Contraction split over `tensor`: each device multiplies its part.
  f = jax.shard_map(lambda x, w: jax.lax.psum(x @ w, 'tensor'), mesh=mesh, out_specs=rows,
                    in_specs=(PartitionSpec('data', 'tensor'), PartitionSpec('tensor')))
  assert count_flops(f, shaped(16, 8), SQUARE) == 2 * 16 * 8 * 8


def test_a_pallas_kernel_counts_what_it_declares_or_once_per_grid_point():
  def kernel(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]

  def call(cost):
    return pl.pallas_call(
        kernel, out_shape=shaped(32, 8), grid=(4,), cost_estimate=cost,
        in_specs=[pl.BlockSpec((8, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)))
  args = shaped(32, 8), SQUARE
  assert count_flops(call(None), *args) == 4 * PRODUCT
  declared = pl.CostEstimate(flops=77, transcendentals=0, bytes_accessed=0)
  assert count_flops(call(declared), *args) == 77
  assert count_flops(jax.vmap(call(None), (0, None)), shaped(3, 32, 8), SQUARE) == 12 * PRODUCT
  assert count_flops(jax.vmap(call(declared), (0, None)), shaped(3, 32, 8), SQUARE) == 3 * 77


def test_splash_attention_counts_its_score_and_value_products():
  from jax.experimental.pallas.ops.tpu import splash_attention
  heads, length, width = 2, 512, 64
  mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length, length))] * heads)
  blocks = dict.fromkeys(('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv',
                          'block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq'), 128)
  kernel = splash_attention.make_splash_mha(
      mask, head_shards=1, q_seq_shards=1, block_sizes=splash_attention.BlockSizes(**blocks))
  q = shaped(heads, length, width)
  product = 2 * heads * length * length * width
  assert count_flops(kernel, q, q, q) == 2 * product
  assert count_flops(jax.vmap(kernel), *[shaped(3, *q.shape)] * 3) == 6 * product
  # Backward: scores and dP again in each of the two kernels, then dV and dK, and dQ; besides
  # rowsum(dO * O), which the library writes as an einsum.
  grad = jax.grad(lambda *a: kernel(*a).sum(), (0, 1, 2))
  assert count_flops(grad, q, q, q) == (2 + 4 + 3) * product + 2 * heads * length * width


def test_a_flax_mlp_and_its_training_step():
  class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(nn.gelu(nn.Dense(32)(x)))

  model, x = MLP(), shaped(4, 16)
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  first, second = 2 * 4 * 16 * 32, 2 * 4 * 32 * 3
  assert count_flops(model.apply, params, x) == first + second
  loss = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
  # The first layer's input needs no gradient.
  assert count_flops(jax.value_and_grad(loss), params, x) == 2 * first + 3 * second
