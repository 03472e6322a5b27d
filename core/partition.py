"""Who holds what: the mesh, the table from logical names to mesh axes, and the report.

There is one mesh with the axes `data`, `fsdp` and `tensor`. Modules name the dimensions of their
parameters (`nn.with_logical_partitioning`) and activations (`constrain`) by meaning; the table of
the chosen preset says which mesh axis splits a dimension of that meaning. XLA does the rest.
"""

import contextlib
import contextvars
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from core.config import UserError, choose

AXES = ('data', 'fsdp', 'tensor')

# Activations are always split over the batch; what differs is the parameters. A rule earlier in
# the list wins, and a mesh axis splits at most one dimension of a tensor.
_BATCH = ('batch', ('data', 'fsdp'))
_TENSOR = (('heads', 'tensor'), ('mlp', 'tensor'), ('vocab', 'tensor'), ('classes', 'tensor'))
# Fully sharded: the model width first, else any dimension that divides, so that biases and norms
# are split too and a device really holds 1/N of everything that can be divided.
_FSDP = tuple((name, 'fsdp') for name in (
    'embed', 'mlp', 'heads', 'kv', 'vocab', 'classes', 'length', 'patch'))

RULES = {
    'dp': (_BATCH,),
    'fsdp': (_BATCH, *_FSDP),
    'tp': (_BATCH, *_TENSOR),
    'fsdp_tp': (_BATCH, *_TENSOR, *_FSDP),
}

# The axis that takes the devices which config.mesh does not place.
_GROWS = {'dp': 'data', 'fsdp': 'fsdp', 'tp': 'tensor', 'fsdp_tp': 'fsdp'}


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that place tensors on it."""
  mesh: Mesh
  rules: tuple

  def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The mesh axes that split each dimension of a tensor.

    A dimension that its mesh axis does not divide is left whole: a 3-head layer on a 2-way
    tensor axis is replicated, not an error.

    Args:
      names: logical name of each dimension, None for one that is never split.
      shape: the tensor's global shape.
    """
    if len(names) != len(shape):
      raise ValueError(f'logical names {names} do not fit a tensor of shape {tuple(shape)}')
    placed: list = [None] * len(shape)
    used = set()
    for name, target in self.rules:
      axes = tuple(a for a in ((target,) if isinstance(target, str) else target)
                   if self.mesh.shape[a] > 1)
      if not axes or used & set(axes):
        continue
      ways = math.prod(self.mesh.shape[a] for a in axes)
      for dim, dim_name in enumerate(names):
        if dim_name == name and placed[dim] is None and shape[dim] % ways == 0:
          placed[dim] = axes if len(axes) > 1 else axes[0]
          used |= set(axes)
          break
    while placed and placed[-1] is None:
      placed.pop()
    return PartitionSpec(*placed)

  def sharding(self, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(names, shape))

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch_ways(self) -> int:
    """How many parts the batch is split into."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  @property
  def platform(self) -> str:
    return self.mesh.devices.flat[0].platform


_AMBIENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
  """Makes `layout` what `constrain` and `platform` refer to while a function is traced."""
  token = _AMBIENT.set(layout)
  try:
    yield
  finally:
    _AMBIENT.reset(token)


def ambient() -> Layout | None:
  return _AMBIENT.get()


def platform() -> str:
  """Where the code being traced will run: not where it is traced, when compiling ahead of time."""
  layout = ambient()
  return layout.platform if layout else jax.default_backend()


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
  """Tells XLA how an activation is split; does nothing when no layout is in use."""
  layout = ambient()
  if layout is None or layout.mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, layout.sharding(names, x.shape))


def initialize_distributed() -> None:
  """Joins the other processes of a multi-host job, when there are any.

  A pod, Slurm or MPI announces itself in the environment and jax finds its own way; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Must run before anything
  touches a device.
  """
  env = os.environ
  heartbeat = int(env.get('JAX_HEARTBEAT_TIMEOUT_SECONDS', 100))
  if 'JAX_COORDINATOR_ADDRESS' in env and 'JAX_NUM_PROCESSES' in env:
    try:
      count, index = int(env['JAX_NUM_PROCESSES']), int(env['JAX_PROCESS_ID'])
    except (KeyError, ValueError) as e:
      raise UserError('JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are set, so JAX_PROCESS_ID '
                      f'must be a number too ({e})') from e
    if count > 1:
      if env.get('JAX_PLATFORMS', '') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
      jax.distributed.initialize(num_processes=count, process_id=index,
                                 heartbeat_timeout_seconds=heartbeat)
    return
  hosts = env.get('TPU_WORKER_HOSTNAMES', '').split(',')
  many = (len(hosts) > 1 or int(env.get('MEGASCALE_NUM_SLICES', 1)) > 1
          or int(env.get('SLURM_NTASKS', 1)) > 1 or int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1)
  if many:
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)


def make_layout(config, devices: Sequence[jax.Device] | None = None) -> Layout:
  """Builds the mesh that `config.mesh` and `config.rules` ask for.

  Args:
    config: `mesh` gives the size of each axis, 0 for automatic: the preset's main axis takes all
      devices that are left (`dp` data, `fsdp` and `fsdp_tp` fsdp, `tp` tensor), the others are 1;
      `fsdp_tp` splits tensors two ways when the devices allow it.
    devices: all devices of the mesh; by default those of the running backend.

  Raises:
    UserError: unknown preset, sizes that do not multiply to the number of devices, or a batch
      that does not divide over the mesh or the processes.
  """
  rules = choose('config.rules', config.rules, RULES)
  devices = list(jax.devices() if devices is None else devices)
  sizes = {axis: config.mesh[axis] for axis in AXES}
  if any(size < 0 for size in sizes.values()):
    raise UserError(f'config.mesh={sizes}: sizes are positive, or 0 for automatic')
  grows = _GROWS[config.rules]
  if config.rules == 'fsdp_tp' and not sizes['tensor']:
    sizes['tensor'] = 2 if len(devices) % 2 == 0 else 1
  auto = not sizes[grows]
  fixed = math.prod(size or 1 for axis, size in sizes.items() if axis != grows)
  if auto:
    sizes[grows] = max(len(devices) // fixed, 1)
  sizes = {axis: size or 1 for axis, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise UserError(f'config.mesh={dict(config.mesh)} with rules {config.rules!r} needs '
                    f'{math.prod(sizes.values())} devices, but there are {len(devices)}')
  if devices[0].platform == 'cpu':
    grid = np.asarray(devices).reshape([sizes[a] for a in AXES])
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  else:
    # make_mesh follows the torus of a TPU slice, which a plain reshape does not.
    mesh = jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, devices=devices,
                         axis_types=(AxisType.Auto,) * len(AXES))
  layout = Layout(mesh, rules)
  processes = len({d.process_index for d in devices})
  if config.batch_size % processes:
    raise UserError(f'config.batch_size={config.batch_size} does not divide over {processes} '
                    f'processes; use a multiple of {processes}')
  micro = config.batch_size // config.accum
  if micro % layout.batch_ways:
    raise UserError(
        f'config.batch_size={config.batch_size} in {config.accum} microbatches does not divide '
        f'over the {layout.batch_ways} parts that mesh {sizes} splits a batch into; use a '
        f'multiple of {layout.batch_ways * config.accum}')
  return layout


def param_shardings(boxed, layout: Layout):
  """Shardings of a parameter tree with its logical names still on it.

  Args:
    boxed: the tree that `jax.eval_shape` of a module's init returns; leaves are
      `nn.LogicallyPartitioned` or plain shapes, which are replicated.
  """
  def leaf(x):
    if isinstance(x, nn.LogicallyPartitioned):
      return layout.sharding(x.names, x.value.shape)
    return layout.replicated
  return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def like_params(tree, params, shardings, layout: Layout):
  """Shardings for a tree that holds copies of the parameters, such as an optimizer state.

  A leaf whose path ends in a parameter's path and that has its shape is placed like it; all else
  (counters, factored moments) is replicated.
  """
  place = {path: (p.shape, s) for (path, p), (_, s) in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree_util.tree_leaves_with_path(shardings),
      strict=True)}

  def leaf(path, x):
    for start in range(len(path)):
      shape, sharding = place.get(tuple(path[start:]), (None, None))
      if shape == x.shape:
        return sharding
    return layout.replicated
  return jax.tree_util.tree_map_with_path(leaf, tree)


def report(params, shardings, largest: int = 8) -> str:
  """A table for people: the largest tensors, how each is split, and bytes a device.

  Args:
    params: tree of arrays or `jax.ShapeDtypeStruct`.
    shardings: tree of `NamedSharding`, like `params`.
    largest: rows to show.
  """
  rows, total, per_device = [], 0, 0
  for (path, p), s in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings),
                          strict=True):
    size = math.prod(p.shape) * p.dtype.itemsize
    local = math.prod(s.shard_shape(p.shape)) * p.dtype.itemsize
    total, per_device = total + size, per_device + local
    rows.append((size, local, path_name(path), p.shape, s.spec))
  rows.sort(key=lambda r: (-r[0], r[2]))
  mesh = jax.tree.leaves(shardings)[0].mesh
  whole = sum(size for size, local, *_ in rows if size == local)
  lines = [f'sharding on mesh {dict(mesh.shape)}: parameters {human_bytes(total)}, '
           f'{human_bytes(per_device)} a device, {human_bytes(whole)} held whole by every device']
  for size, local, name, shape, spec in rows[:largest]:
    lines.append(f'  {human_bytes(size):>10} -> {human_bytes(local):>10}  {name} {tuple(shape)} '
                 f'{tuple(spec)}')
  if len(rows) > largest:
    lines.append(f'  ... and {len(rows) - largest} smaller tensors')
  return '\n'.join(lines)


def path_name(path) -> str:
  """'Transformer/encoder_norm/scale' from a jax key path."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def human_bytes(size: float) -> str:
  for unit in ('B', 'KiB', 'MiB'):
    if size < 1024:
      return f'{size:.0f} {unit}' if unit == 'B' else f'{size:.1f} {unit}'
    size /= 1024
  return f'{size:.2f} GiB'
