"""What a config means on a set of devices: every mode of the command line starts from a `Plan`.

Building one touches no data (beyond counting it) and allocates nothing on a device: parameters
are shapes, so the same plan trains on this machine or is compiled for one that is not here.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
import optax
from flax import linen as nn

from core import optim, partition, step, task as task_lib
from core.config import UserError, duration, validate


@dataclasses.dataclass(frozen=True)
class Plan:
  """Attributes:
    config: the validated config.
    task: the paper.
    layout: mesh and rules.
    optimizer, schedule: from `config.optim`.
    steps: length of the run.
    examples: examples an epoch, None when unknown.
    specs: every shape that training batches come in, see `Task.specs`.
    state_shape: `TrainState` of `jax.ShapeDtypeStruct` with shardings.
    state_sharding: the same tree of `NamedSharding`.
    batch_sharding: name -> `NamedSharding` of the global batch, without what is resident.
    init: compiled on first use; key -> `TrainState` made where it lives.
    train_step: jitted, donates its state.
  """
  config: ml_collections.ConfigDict
  task: task_lib.Task
  layout: partition.Layout
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  steps: int
  examples: int | None
  specs: list[dict[str, jax.ShapeDtypeStruct]]
  state_shape: step.TrainState
  state_sharding: step.TrainState
  batch_sharding: dict[str, jax.sharding.NamedSharding]
  init: Callable
  train_step: Callable

  def steps_of(self, text: str, what: str) -> int:
    return duration(text, batch_size=_rows(self.specs), examples=self.examples, total=self.steps,
                    what=what)

  @property
  def params_shape(self):
    return self.state_shape.params

  @property
  def parameter_count(self) -> int:
    """Parameters as papers count them: without the task's constants."""
    return task_lib.parameter_count(self.task, self.params_shape)

  def prepare(self) -> None:
    """Lets the first process build what the task needs once, while the others wait for it."""
    if jax.process_index() == 0:
      self.task.prepare()
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils  # only where there are several hosts
      multihost_utils.sync_global_devices('prepare')

  def resident(self) -> dict[str, jax.Array]:
    """The task's resident arrays on the devices, held against what it said of them."""
    arrays, spec = self.task.resident(), self.task.resident_spec()
    wrong = [name for name in sorted(arrays.keys() | spec.keys())
             if name not in arrays or name not in spec
             or (arrays[name].shape, arrays[name].dtype) != (spec[name].shape, spec[name].dtype)]
    if wrong:
      raise UserError(f'{self.config.task}: resident array {wrong[0]!r} is not what resident_spec '
                      'says of it')
    return {name: jax.make_array_from_callback(
        array.shape, self.layout.replicated, lambda index, array=array: array[index])
            for name, array in arrays.items()}

  def jit(self, fn: Callable, **kwargs) -> Callable:
    """`jax.jit` that traces under this plan's layout."""
    @functools.wraps(fn)
    def traced(*args):
      with partition.use(self.layout):
        return fn(*args)
    return jax.jit(traced, **kwargs)

  def replicate(self, x):
    """An array whole on every device, so that every host can read it. All hosts must call."""
    return jax.jit(lambda x: x, out_shardings=self.layout.replicated)(x)

  def fetch(self, x) -> np.ndarray:
    """A global array as numpy on every host."""
    return np.asarray(x if x.is_fully_addressable else self.replicate(x))

  def batch_shardings(self, spec) -> dict[str, jax.sharding.NamedSharding]:
    """Every array of a batch is split over its first dimension."""
    return {k: self.layout.sharding(('batch',) + (None,) * (len(s.shape) - 1), s.shape)
            for k, s in spec.items()}


def make_plan(config: ml_collections.ConfigDict,
              devices: Sequence[jax.Device] | None = None,
              workdir: pathlib.Path | None = None) -> Plan:
  """Builds the plan.

  Args:
    config: a config.
    devices: devices of the mesh, those of the running backend by default; pass a topology's to
      compile for it.
    workdir: of the run, for the task.

  Raises:
    UserError: anything in the config that cannot work, before any long work.
  """
  validate(config)
  task = task_lib.load(config, workdir)
  layout = partition.make_layout(config, devices)
  specs = task.specs(config.batch_size, train=True)
  rows = _rows(specs)
  examples = config.data.examples or None
  needs_examples = 'epoch' in str(config.to_dict())
  if examples is None and needs_examples and rows:
    examples = task.examples()
  steps = duration(config.steps, batch_size=rows, examples=examples, what='config.steps')

  def init_params(rng):
    with partition.use(layout):
      return task.init(rng)

  boxed = jax.eval_shape(init_params, jax.random.key(0))
  params = nn.unbox(boxed)
  optimizer, schedule = optim.make_optimizer(
      config.optim, params, steps=steps, batch_size=rows, examples=examples, frozen=task.frozen)
  params_sharding = partition.param_shardings(boxed, layout)

  def init(rng):
    return step.init_state(nn.unbox(init_params(rng)), optimizer, config.ema)

  shape = jax.eval_shape(init, jax.random.key(0))
  like = lambda tree: partition.like_params(tree, params, params_sharding, layout)
  sharding = step.TrainState(layout.replicated, params_sharding, like(shape.opt_state),
                             params_sharding if config.ema else None)
  shape = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                       shape, sharding)
  plan = Plan(config, task, layout, optimizer, schedule, steps, examples, specs, shape, sharding,
              batch_sharding={}, init=jax.jit(init, out_shardings=sharding), train_step=None)
  batch_sharding = plan.batch_shardings(task.batch_spec(config.batch_size))
  train_step = plan.jit(
      step.make_train_step(task, optimizer, schedule, config.seed, config.ema),
      donate_argnums=0, in_shardings=(sharding, {
          **batch_sharding, **{name: layout.replicated for name in task.resident_spec()}}),
      out_shardings=(sharding, layout.replicated))
  return dataclasses.replace(plan, batch_sharding=batch_sharding, train_step=train_step)


def _rows(specs: list[dict[str, jax.ShapeDtypeStruct]]) -> int | None:
  """Examples a step; None when it depends on the shape of the batch."""
  rows = {spec['mask'].shape[0] for spec in specs}
  return rows.pop() if len(rows) == 1 else None
