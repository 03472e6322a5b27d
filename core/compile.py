"""Compiles the train step for a TPU slice that is not here, and says whether it fits.

Nothing runs: parameters and batch are shapes, and the compiler is libtpu's own, so what it says
about memory is what the slice would say.
"""

import json
import pathlib
import time

import jax
import ml_collections

from core import flops, hlo, partition, topologies
from core.config import RunFailed, UserError
from core.plan import Plan, make_plan

_KNOBS = ("config.remat ('dots', then 'full'), config.accum (more microbatches), config.rules "
          "('fsdp' or 'fsdp_tp'), a smaller config.batch_size, or a larger --topology")


def compile_for(config: ml_collections.ConfigDict, topology_name: str,
                workdir: pathlib.Path) -> None:
  """Compiles for a slice; writes compile.json and prints it for people.

  Args:
    config: the run.
    topology_name: such as 'v5e:4x4'.
    workdir: where compile.json goes.

  Raises:
    UserError: unknown topology, or libtpu is missing.
    RunFailed: it does not fit; says by how much and what to change. compile.json says it too.
  """
  from core.train import claim_workdir  # the loop is not needed to compile
  if not topology_name:
    raise UserError('--topology is missing, e.g. --topology=v5e:4x4')
  topology = topologies.parse(topology_name)
  devices = topologies.devices(topology)
  claim_workdir(workdir)
  plan = make_plan(config, devices)
  report = analyse(plan, topology)
  (workdir / 'compile.json').write_text(json.dumps(report, indent=2) + '\n')
  print(describe(report), flush=True)
  if not report['fits']:
    over = report['gib_per_chip']['total'] - report['gib_per_chip']['limit']
    raise RunFailed(f'{config.task} does not fit {topology.name}: {over:.2f} GiB too much on each '
                    f'chip; try {_KNOBS}')


def analyse(plan: Plan, topology: topologies.Topology) -> dict:
  """Compiles the plan's train step; returns the record that compile.json holds."""
  batch = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=plan.batch_sharding[name])
           for name, s in plan.task.batch_spec(plan.config.batch_size).items()}
  batch |= {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=plan.layout.replicated)
            for name, s in plan.task.resident_spec().items()}
  began = time.monotonic()
  traced = plan.train_step.trace(plan.state_shape, batch)
  lowered = traced.lower(lowering_platforms=('tpu',))
  report = {
      'task': plan.config.task,
      'topology': topology.name,
      'chips': topology.chips,
      'mesh': dict(plan.layout.mesh.shape),
      'rules': plan.config.rules,
      'batch_size': plan.config.batch_size,
      'params': plan.parameter_count,
      'flops_per_step': flops.count_jaxpr(traced.jaxpr),
  }
  peak = topology.generation.flops * topology.chips
  report['seconds_per_step_at_peak'] = report['flops_per_step'] / peak
  limit = topology.generation.hbm
  try:
    compiled = lowered.compile()
  except Exception as e:  # pylint: disable=broad-except
    needed = topologies.out_of_memory(e)
    if needed is None:
      raise
    memory = {'total': needed}
    found = None
  else:
    memory = topologies.memory(compiled)
    found = hlo.collectives(compiled.as_text())
  report['fits'] = memory['total'] <= limit and found is not None
  report['gib_per_chip'] = {
      **{name: size / 2 ** 30 for name, size in memory.items()}, 'limit': limit / 2 ** 30}
  report['collectives'] = found
  report['compile_seconds'] = time.monotonic() - began
  return report


def describe(report: dict) -> str:
  """The report as a few lines for people."""
  memory = report['gib_per_chip']
  lines = [
      f'{report["task"]}: {report["params"]:,} parameters, batch {report["batch_size"]}, on '
      f'{report["topology"]} ({report["chips"]} chips), mesh {report["mesh"]}, rules '
      f'{report["rules"]}',
      'GiB per chip: ' + ', '.join(f'{name} {gib:.2f}' for name, gib in memory.items()),
      f'FLOPs per step: {report["flops_per_step"]:.4g} (matrix products and convolutions; at least '
      f'{report["seconds_per_step_at_peak"] * 1e3:.1f} ms at the bf16 peak)']
  for kind, found in (report['collectives'] or {}).items():
    lines.append(f'{kind}: {found["count"]} per step, '
                 f'{partition.human_bytes(found["bytes"])} per chip')
  lines.append(f'{"fits" if report["fits"] else "DOES NOT FIT"}; compiled in '
               f'{report["compile_seconds"]:.0f} s')
  return '\n'.join(lines)
