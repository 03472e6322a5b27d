"""TPU slices that can be compiled for without owning one, and what a chip of each can hold."""

import dataclasses
import importlib.util
import math
import os
import re

from core.config import UserError

_GIB = 2 ** 30
_MIB = 2 ** 20


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of chip.

  Attributes:
    shapes: slices that can be booked, in chips along each axis of the torus.
    hbm: bytes a program may use on a chip. Read off libtpu 0.0.51, whose compiler names in its
      out-of-memory error the capacity and what the runtime reserves of it.
    flops: peak bfloat16 FLOP/s of a chip (public data sheets).
    accelerator: prefix of the name that clouds and libtpu give a slice.
    cores: what the number behind that prefix counts on a chip.
    options: further arguments for libtpu.
  """
  shapes: tuple[str, ...]
  hbm: int
  flops: float
  accelerator: str
  cores: int = 1
  options: tuple[tuple[str, str], ...] = ()


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16',
          '8x16x16', '16x16x16')

GENERATIONS = {
    'v5e': Generation(_FLAT, 16 * _GIB - 258 * _MIB, 197e12, 'v5litepod'),
    'v6e': Generation(_FLAT, int(31.5 * _GIB) - 264 * _MIB, 918e12, 'v6e'),
    'v5p': Generation(_CUBES, 96 * _GIB - 279 * _MIB, 459e12, 'v5p', 2),
    # The two cores of a v4 chip work as one device, as on a real pod.
    'v4': Generation(_CUBES, 32 * _GIB - 1283 * _MIB, 275e12, 'v4', 2,
                     (('chip_config_name', 'megacore'),)),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice: `name` such as 'v5e:4x4', its generation, and how many chips it has."""
  name: str
  generation: Generation
  chips: int


def parse(name: str) -> Topology:
  """Finds the slice called `name`. Raises `UserError` that lists the valid names."""
  kind, _, shape = name.partition(':')
  generation = GENERATIONS.get(kind)
  if generation is None or shape not in generation.shapes:
    valid = '; '.join(f'{k}:' + f' {k}:'.join(g.shapes) for k, g in GENERATIONS.items()
                      if generation is None or g is generation)
    raise UserError(f'--topology={name!r}: no such TPU slice; valid: {valid}')
  return Topology(name, generation, math.prod(map(int, shape.split('x'))))


def devices(topology: Topology) -> list:
  """Device descriptions of a slice; must be asked before anything else starts a JAX backend.

  Raises:
    UserError: libtpu is not installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError('compiling for a TPU needs its compiler: pip install -e .[tpu]')
  generation = topology.generation
  os.environ.update(
      JAX_PLATFORMS='cpu',             # nothing runs here but the compiler
      TPU_SKIP_MDS_QUERY='1',          # there is no metadata server to ask
      TPU_WORKER_HOSTNAMES='localhost',
      TPU_ACCELERATOR_TYPE=f'{generation.accelerator}-{topology.chips * generation.cores}',
      # Compiling claims no chip, so it need not wait for the lock of another process.
      ALLOW_MULTIPLE_LIBTPU_LOAD='1',
      TPU_MIN_LOG_LEVEL='3', TPU_STDERR_LOG_LEVEL='3')
  import jax  # after the environment is as libtpu wants it
  from jax.experimental import topologies
  jax.config.update('jax_platforms', 'cpu')
  description = topologies.get_topology_desc(
      platform='tpu', topology_name=topology.name, **dict(generation.options))
  return list(description.devices)


def memory(compiled) -> dict[str, int]:
  """Bytes of a compiled program on each chip.

  Donated arguments and the outputs that take their place are the same memory, so
  total = arguments + outputs - aliased + temporaries + code; that total is what the compiler holds
  against the limit (checked by growing a program to the last byte that compiles).
  """
  stats = compiled.memory_analysis()
  found = {'arguments': stats.argument_size_in_bytes, 'outputs': stats.output_size_in_bytes,
           'aliased': stats.alias_size_in_bytes, 'temporaries': stats.temp_size_in_bytes,
           'code': stats.generated_code_size_in_bytes}
  return {**found, 'total': (found['arguments'] + found['outputs'] - found['aliased']
                             + found['temporaries'] + found['code'])}


def out_of_memory(error: Exception) -> int | None:
  """Bytes that a program would need on each chip; None if the error is about something else.

  The TPU compiler gives up at two points. Before it assigns memory it adds up what it will need
  and names that sum ("HLO temporaries", which includes arguments and outputs); afterwards it names
  what was used. Both are rounded to two decimals, so half of the last is added: a program that was
  refused never seems to fit.
  """
  for pattern in (r'Used ([0-9.]+)([KMGT]) of [0-9.]+[KMGT] hbm',
                  r'memory required for [^(]*\(([0-9.]+)([KMGT])\) exceeds available HBM'):
    match = re.search(pattern, str(error))
    if match:
      unit = {'K': 2 ** 10, 'M': _MIB, 'G': _GIB, 'T': 2 ** 40}[match[2]]
      return int((float(match[1]) + 0.005) * unit)
  return None
