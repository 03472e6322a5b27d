"""Collectives read from HLO text: snippets as TPUs print them, and programs compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.hlo import collectives


def module(body: str, before: str = '') -> str:
  return (f'HloModule m, num_partitions=4\n\n{before}\n'
          f'ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n')


def test_synchronous_forms_with_the_bytes_of_their_results():
  text = module('''
  %p = f32[8]{0} parameter(0)
  %g = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, dimensions={2}, \
      metadata={op_name="all-reduce(x)"}
  %r = (f32[8]{0}, f32[]{:T(128)}, /*index=2*/s8[3]{0}) all-reduce(%p, %q, %r), to_apply=%add
  %s = f32[2,4]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
  %a = (pred[8]{0}, pred[8]{0}) all-to-all(%p, %q), replica_groups={{0,1}}
  %c = f8e4m3fn[16]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %i = s4[6]{0} all-gather(%p), dimensions={0}
  ROOT %all-reduce-like = f32[8]{0} add(%p, %p)''')
  assert collectives(text) == {
      'all-gather': {'count': 2, 'bytes': 16 * 128 * 2 + 3},
      'all-reduce': {'count': 1, 'bytes': 32 + 4 + 3},
      'all-to-all': {'count': 1, 'bytes': 16},
      'collective-permute': {'count': 1, 'bytes': 16},
      'reduce-scatter': {'count': 1, 'bytes': 32},
  }


def test_asynchronous_pairs_count_once_and_without_operands_and_semaphores():
  text = module('''
  %p = f32[8]{0} parameter(0)
  %gs = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  %gd = f32[32]{0} all-gather-done(%gs)
  %rs = f32[8]{0} all-reduce-start(%p), to_apply=%add
  %rd = f32[8]{0} all-reduce-done(%rs)
  %ps = (bf16[48,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[48,2048]{1,0:T(8,128)(2,1)S(1)}, \
      u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,4}}
  %pd = bf16[48,2048]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%ps)
  %ss = ((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%p), dimensions={0}, to_apply=%add
  %sd = f32[2]{0} reduce-scatter-done(%ss)
  %as = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%wrapped
  %au = ((f32[8]{0}), f32[8]{0}, u32[]) async-update(%as), calls=%wrapped
  ROOT %ad = f32[8]{0} async-done(%au), calls=%wrapped''', before='''
%wrapped (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %a2a = f32[8]{0} all-to-all(%q), dimensions={0}
}
''')
  assert collectives(text) == {
      'all-gather': {'count': 1, 'bytes': 128},
      'all-reduce': {'count': 1, 'bytes': 32},
      'all-to-all': {'count': 1, 'bytes': 32},
      'collective-permute': {'count': 1, 'bytes': 48 * 2048 * 2},
      'reduce-scatter': {'count': 1, 'bytes': 8},
  }


# As a v5e prints them, shortened. A backslash continues a line: an HLO instruction is one line.
TPU_FUSIONS = '''
%add.1 (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add.2 = bf16[] add(%x, %y)
}

%fused_computation.45 (param_0.131: bf16[1,1024,256]) -> (bf16[1,1024,256], bf16[1,1024,1024], \
      s32[2], u32[]) {
  %param_0.131 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.19 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.131), channel_id=9, \
      replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={2}
  ROOT %custom-call.8 = (bf16[1,1024,256]{2,1,0}, bf16[1,1024,1024]{2,1,0}, s32[2]{0:S(4)}, \
      u32[]{:S(2)}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.49 (param_0.135: bf16[1,1024,256]) -> (bf16[1024,1024], \
      bf16[1,1024,1024]) {
  %param_0.135 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.21 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.135), \
      channel_id=9, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={2}
  ROOT %tuple.70 = (bf16[1024,1024]{1,0}, bf16[1,1024,1024]{2,1,0}) tuple(%convolution.11, \
      %all-gather.21)
}

%fused_computation.47 (param_0.137: bf16[1,1024,256], param_1.165: bf16[1,1024,1024]) -> \
      bf16[1,1024,1024] {
  %param_0.137 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.165 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.23 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.137), channel_id=9, \
      replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={2}
  ROOT %custom-call.10 = bf16[1,1024,1024]{2,1,0} custom-call(%param_0.137, %param_1.165, \
      %all-gather.23), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.clone.1 (input.2: bf16[1024,1024]) -> bf16[1024,256] {
  %input.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=6, \
      replica_groups={{0,1,2,3}}, to_apply=%add.1
  %constant.226 = u32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.38 = bf16[1024,256]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.5, \
      %constant.226, %multiply.5), dynamic_slice_sizes={1024,256}
}

%body (wide.param.5: (s32[], bf16[64,1024])) -> (s32[], bf16[64,1024]) {
  %constant.1..sunk = s32[]{:T(128)} constant(1)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=0
  %async-collective-start = (bf16[1,1024,256]{2,1,0}, bf16[1,1024,1024]{2,1,0}, s32[2]{0:S(4)}, \
      /*index=3*/u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, \
      {})}, calls=%fused_computation.45
  %fusion.49 = (bf16[1024,1024]{1,0}, bf16[1,1024,1024]{2,1,0}) fusion(%x, %y), kind=kOutput, \
      calls=%async_collective_fusion.49
  %fusion.47 = bf16[1024,256]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.540), \
      kind=kCustom, calls=%all-reduce-scatter.clone.1
  %async-collective-done = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x, %y), \
      kind=kCustom, calls=%fused_computation.47
  %add.76 = s32[]{:T(128)} add(%get-tuple-element.1, %constant.1..sunk)
  ROOT %tuple.67 = (s32[]{:T(128)}, bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}) tuple(%add.76, %fusion.45)
}

%condition (wide.param.3: (s32[], bf16[64,1024])) -> pred[] {
  %constant.114 = s32[]{:T(128)} constant(4)
  %wide.param.3 = (s32[]{:T(128)}, bf16[64,1024]{1,0}) parameter(0)
  %get-tuple-element.381 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=0
  ROOT %lt.11 = pred[]{:T(512)} compare(%get-tuple-element.381, %constant.114), direction=LT
}
'''


def test_tpu_fusions_in_a_loop_without_a_noted_trip_count():
  text = module('''
  %copy.1 = s32[]{:T(128)} constant(0)
  %tuple.65 = (s32[]{:T(128)}, bf16[64,1024]{1,0}) tuple(%copy.1, %p)
  ROOT %while.39 = (s32[]{:T(128)}, bf16[64,1024]{1,0}) while(%tuple.65), condition=%condition, \
      body=%body''',
                before=TPU_FUSIONS)
  assert collectives(text) == {
      'all-gather': {'count': 4, 'bytes': 4 * 1024 * 1024 * 2},
      'reduce-scatter': {'count': 4, 'bytes': 4 * 1024 * 256 * 2},
  }


LOOPS = '''
%inner_body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %r = f32[8]{0} all-reduce(%x), to_apply=%add
  %i = s32[] get-tuple-element(%q), index=0
  %step = s32[] constant(%STEP%)
  %next = s32[] add(%i, %step)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %r)
}

%inner_condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(9)
  ROOT %lt = pred[] compare(%i, %n), direction=%DIRECTION%
}

%outer_body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %constant = s32[] constant(%START%)
  %start = s32[] copy(%constant)
  %init = (s32[], f32[8]{0}) tuple(%start, %x)
  ROOT %w = (s32[], f32[8]{0}) while(%init), condition=%inner_condition, body=%inner_body
}
'''


@pytest.mark.parametrize('start, step, direction, trips', [
    (0, 1, 'LT', 9), (2, 1, 'LT', 7), (0, 2, 'LT', 5), (0, 1, 'LE', 10), (0, 1, 'NE', 1)])
def test_nested_loops_multiply(start, step, direction, trips):
  before = LOOPS.replace('%START%', str(start)).replace('%STEP%', str(step))
  text = module('''
  ROOT %w = (s32[], f32[8]{0}) while(%p), condition=%unknown, body=%outer_body, \
      backend_config={"known_trip_count":{"n":"3"},"x":"}"}''',
                before=before.replace('%DIRECTION%', direction))
  assert collectives(text) == {'all-reduce': {'count': 3 * trips, 'bytes': 3 * trips * 32}}


def test_a_kernels_metadata_over_several_lines_ends_no_computation():
  text = module('''
  %p = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}, metadata={op_name="splash"}
  ROOT %r = f32[8]{0} all-reduce(%k), to_apply=%add''')
  assert collectives(text) == {'all-reduce': {'count': 1, 'bytes': 32}}


def test_of_a_conditional_the_branch_that_moves_most():
  text = module('''
  ROOT %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%small, %large}''', before='''
%small (q: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%q), to_apply=%add
}

%large (q: f32[8]) -> f32[8] {
  ROOT %g = f32[32]{0} all-gather(%q), dimensions={0}
}
''')
  assert collectives(text) == {'all-gather': {'count': 1, 'bytes': 128}}


def test_text_that_is_no_module_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    collectives('not HLO')


def compiled(f, shardings, out, *args):
  return jax.jit(f, in_shardings=shardings, out_shardings=out).lower(*args).compile().as_text()


@pytest.fixture
def mesh():
  return Mesh(np.array(jax.devices()), ('x',))


def test_a_compiled_stack_of_sharded_layers(mesh):
  layers, width, batch, micro = 5, 64, 16, 3
  split = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

  def step(weights, x):
    def loss(weights, x):
      def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, split())  # Gathered in every layer.
        return jnp.tanh(x @ w), None
      return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0])
    def accumulate(total, x):
      return total + jax.grad(loss)(weights, x), None
    return jax.lax.scan(accumulate, jnp.zeros_like(weights), x)[0]

  weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
  x = jax.ShapeDtypeStruct((micro, batch, width), jnp.float32)
  text = compiled(step, (split(None, 'x'), split(None, 'x')), split(None, 'x'), weights, x)
  found = collectives(text)
  # Weights are gathered forward and backward; the CPU compiler reduces a gradient whole and
  # slices it afterwards.
  whole = width * width * 4
  assert found['all-gather'] == {'count': 2 * layers * micro, 'bytes': 2 * layers * micro * whole}
  assert found['all-reduce'] == {'count': layers * micro, 'bytes': layers * micro * whole}
  assert set(found) == {'all-gather', 'all-reduce'}
  assert 'known_trip_count' in text
  assert collectives(text.replace('known_trip_count', 'not_known')) == found


def test_every_kind_written_out_and_compiled(mesh):
  def exchange(i, x):
    x = jax.lax.all_to_all(x, 'x', 0, 0, tiled=True)
    x = jax.lax.ppermute(x, 'x', [(k, (k + 1) % 8) for k in range(8)])
    x = jax.lax.all_gather(jax.lax.psum_scatter(x, 'x', tiled=True), 'x', tiled=True)
    return jnp.sin(x) + jax.lax.psum(jnp.cos(x), 'x')

  f = jax.shard_map(lambda x: jax.lax.fori_loop(0, 7, exchange, x), mesh=mesh,
                    in_specs=PartitionSpec('x'), out_specs=PartitionSpec('x'), check_vma=False)
  local = 16 * 32 * 4
  sharding = NamedSharding(mesh, PartitionSpec('x'))
  text = compiled(f, sharding, sharding, jax.ShapeDtypeStruct((8 * 16, 32), jnp.float32))
  assert collectives(text) == {
      'all-gather': {'count': 7, 'bytes': 7 * local},
      'all-reduce': {'count': 7, 'bytes': 7 * local},
      'all-to-all': {'count': 7, 'bytes': 7 * local},
      'collective-permute': {'count': 7, 'bytes': 7 * local},
      'reduce-scatter': {'count': 7, 'bytes': 7 * local // 8},
  }
