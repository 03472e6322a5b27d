"""Names of TPU slices, and what the TPU's own compiler says about them."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from core import topologies
from core.config import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MIB = 2**20
# More than a trivial program takes besides its arguments: 86 KiB to 2.1 MiB, by libtpu's version.
OVERHEAD = 4 * MIB
SMALLEST = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}


@pytest.mark.parametrize('name, chips', [
    ('v5e:1x1', 1), ('v5e:4x4', 16), ('v5e:16x16', 256), ('v6e:8x16', 128), ('v5p:2x2x1', 4),
    ('v5p:4x4x4', 64), ('v4:2x2x4', 16)])
def test_a_slice_has_as_many_chips_as_its_name_says(name, chips):
  found = topologies.parse(name)
  assert (found.name, found.chips) == (name, chips)
  assert found.generation is topologies.GENERATIONS[name.partition(':')[0]]


@pytest.mark.parametrize('name, lists', [
    ('v5e:3x5', 'v5e:4x4'), ('v5e:4x4x4', 'v5e:4x4'), ('v5e', 'v5e:4x4'), ('v5e:', 'v5e:4x4'),
    ('v5e:0x0', 'v5e:4x4'), ('v5p:4x4', 'v5p:4x4x4'), ('v9:4x4', 'v6e:4x4'), ('', 'v4:2x2x1'),
    ('V5E:4x4', 'v5e:4x4'), (' v5e:4x4', 'v5e:4x4'), ('v5e:4x4_twisted', 'v5e:4x4')])
def test_a_wrong_name_is_answered_with_the_valid_ones_in_one_line(name, lists):
  with pytest.raises(UserError) as caught:
    topologies.parse(name)
  message = str(caught.value)
  assert repr(name) in message and lists in message and '\n' not in message
  # Who named a generation is not told about the others.
  assert ('v6e:' in message) == (name.partition(':')[0] not in topologies.GENERATIONS)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  before = dict(os.environ)
  with pytest.raises(UserError, match=r'pip install -e \.\[tpu\]'):
    topologies.devices(topologies.parse('v5e:2x2'))
  assert dict(os.environ) == before


def test_memory_counts_what_a_donated_argument_and_its_output_share_once():
  stats = types.SimpleNamespace(
      argument_size_in_bytes=100, output_size_in_bytes=60, alias_size_in_bytes=50,
      temp_size_in_bytes=7, generated_code_size_in_bytes=3)
  compiled = types.SimpleNamespace(memory_analysis=lambda: stats)
  assert topologies.memory(compiled) == {
      'arguments': 100, 'outputs': 60, 'aliased': 50, 'temporaries': 7, 'code': 3, 'total': 120}


# What libtpu 0.0.51 says: first before, then after it has assigned memory.
TOO_MUCH = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
    'required for HLO temporaries (20.00G) exceeds available HBM (15.75G). HLO module: jit_step.\n'
    'See https://openxla.org/xla/errors/error_1000 for more details.')
JUST_TOO_MUCH = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of '
    'memory in memory space hbm. Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 56.5K.\n\n'
    'Total hbm usage >= 16.00G:\n    reserved        258.00M \n    program           86.5K \n'
    '    arguments        15.74G \n\nOutput size 4.00M; shares 0B with arguments.')


def test_the_compilers_two_ways_to_say_that_memory_ran_out():
  assert topologies.out_of_memory(RuntimeError(TOO_MUCH)) == int(20.005 * 2**30)
  needed = topologies.out_of_memory(RuntimeError(JUST_TOO_MUCH))
  # Rounded, the text reads as if it had fitted.
  assert topologies.GENERATIONS['v5e'].hbm < needed < 15.76 * 2**30
  assert topologies.out_of_memory(RuntimeError(TOO_MUCH.replace('20.00G', '1.50T'))) > 1.5 * 2**40


@pytest.mark.parametrize('text', [
    'INVALID_ARGUMENT: something else',
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem. '
    'Exceeded vmem capacity by 4.00M.'])
def test_other_errors_are_not_about_hbm(text):
  assert topologies.out_of_memory(RuntimeError(text)) is None


@pytest.fixture
def libtpu():
  """Skips without the TPU's compiler; puts the environment back that `devices` changes."""
  pytest.importorskip('libtpu')
  before = dict(os.environ)
  yield
  os.environ.clear()
  os.environ.update(before)


@pytest.mark.tpu
@pytest.mark.parametrize('name', [
    'v5e:1x1', 'v5e:4x4', 'v6e:16x16', 'v5p:4x4x4', 'v5p:2x2x1', 'v4:2x2x1', 'v4:4x4x8'])
def test_every_chip_is_one_device(libtpu, name):
  topology = topologies.parse(name)
  found = topologies.devices(topology)
  assert len(found) == topology.chips
  assert len({tuple(device.coords) for device in found}) == topology.chips
  assert {device.platform for device in found} == {'tpu'}


def compile_with_arguments_of(size, device):
  """Compiles a program whose arguments take `size` bytes on the device and little else does."""
  # Eight rows of 1024 floats are one 32 KiB tile row: sizes are exact, no padding.
  rows = size // 4096 // 8 * 8
  big, small = (jax.ShapeDtypeStruct((n, 1024), jnp.float32) for n in (rows, 8))
  here = SingleDeviceSharding(device)
  return jax.jit(lambda x, y: x[:8] + y, in_shardings=here, out_shardings=here).lower(
      big, small).compile()


@pytest.mark.tpu
@pytest.mark.parametrize('generation', sorted(topologies.GENERATIONS))
def test_the_limit_is_the_compilers_own(libtpu, generation):
  device = topologies.devices(topologies.parse(SMALLEST[generation]))[0]
  limit = topologies.GENERATIONS[generation].hbm
  memory = topologies.memory(compile_with_arguments_of(limit - OVERHEAD, device))
  assert limit - OVERHEAD <= memory['total'] <= limit
  for too_much in (MIB, 4 * 2**30):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
      compile_with_arguments_of(limit + too_much, device)
    needed = topologies.out_of_memory(caught.value)
    assert limit < needed and abs(needed - limit - too_much) < 0.011 * 2**30


@pytest.mark.tpu
def test_a_donated_argument_is_not_counted_twice(libtpu):
  device = topologies.devices(topologies.parse('v5e:2x2'))[0]
  here = SingleDeviceSharding(device)
  # More than half of the memory: fits only because the output takes the argument's place.
  x = jax.ShapeDtypeStruct((10 * 2**18, 1024), jnp.float32)
  memory = topologies.memory(jax.jit(
      lambda x: x + 1, in_shardings=here, out_shardings=here, donate_argnums=0).lower(x).compile())
  assert memory['arguments'] == memory['outputs'] == memory['aliased'] == 10 * 2**30
  assert memory['total'] - 10 * 2**30 == memory['temporaries'] + memory['code'] < OVERHEAD


@pytest.mark.tpu
def test_another_process_that_holds_libtpu_is_no_obstacle(libtpu):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
                 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}
  environment.pop('ALLOW_MULTIPLE_LIBTPU_LOAD', None)
  run = lambda code: subprocess.Popen(
      [sys.executable, '-c', code], cwd=ROOT, env=environment, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  # Takes the lock as any program would; if that fails, somebody else already holds it.
  holder = run('from jax.experimental import topologies\n'
               'try: topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")\n'
               'except Exception: pass\n'
               'print("held", flush=True); input()')
  try:
    assert holder.stdout.readline() == 'held\n'
    second = run('from core import topologies\n'
                 'print(len(topologies.devices(topologies.parse("v5e:4x4"))))')
    out, err = second.communicate(timeout=120)
    assert out == '16\n', err
  finally:
    holder.communicate('\n', timeout=60)
