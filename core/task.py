"""The contract that a paper fills.

A paper is a module with a class `Task`, chosen by its import path: `config.task =
'vit_family.classification'`. The engine (`core`) knows only what is written here.
"""

import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

import flax
import jax
import ml_collections
import numpy as np
import optax
from flax import linen as nn

from core import partition
from core import weights as weights_lib
from core.config import UserError
from core.data.pipeline import Source


@flax.struct.dataclass
class Aux:
  """What a loss returns beside its value.

  Attributes:
    weight: float32 scalar, the number of items that the loss is a mean over. Gradients of
      microbatches and hosts are combined in its proportion, so accumulation and padding are
      exact.
    metrics: name -> (sum, weight), float32 scalars; what is logged is sum over weight of a whole
      window or split.
  """
  weight: jax.Array
  metrics: Mapping[str, tuple[jax.Array, jax.Array]]


class Evaluator(Protocol):
  """One measurement (or one set of pictures) of a model.

  Attributes:
    every: duration between runs, '' for the config's `eval.every`, 'end' for once at the end.
  """
  every: str

  def __call__(self, run: Any, params: Any, step: int) -> dict[str, float]:
    """Measures; `run` is a `core.evaluate.EvalRun`. Every process calls it, in the same order."""
    ...


class Task:
  """Base of every paper's task. The constructor opens no device and no file.

  Attributes:
    config: the whole config.
    model: the linen module.
    workdir: of the run, where what `prepare` left is found; None when there is none.
    frozen: regular expression of parameters that no training changes, whatever `optim.freeze` says.
    constants: of those that only stand for what papers do not count as parameters, such as the
      statistics of a frozen batch norm.
  """
  model: nn.Module
  workdir: pathlib.Path | None = None
  frozen: str = ''
  constants: str = ''

  def __init__(self, config: ml_collections.ConfigDict):
    self.config = config

  def __reduce__(self):
    # A data worker gets the config and builds the task anew: models do not travel.
    return _make, (type(self), self.config, self.workdir)

  # What a paper must say.

  def init(self, rng: jax.Array):
    """Fresh parameters with their logical names still on them: what `model.init` returns under
    'params'. It is traced, so its inputs may be zeros."""
    raise NotImplementedError

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, global shape and dtype of every array the step consumes, `mask` included."""
    raise NotImplementedError

  def dataset(self, split: str) -> Source:
    """The examples of a split; with several `specs`, `source.buckets` says which each is of."""
    raise NotImplementedError

  def transform(self, example: dict[str, Any], rng: np.random.Generator,
                train: bool) -> dict[str, np.ndarray]:
    """One example of `dataset` to fixed-shape arrays; runs in data workers."""
    raise NotImplementedError

  def loss(self, params, batch: Mapping[str, jax.Array], rng: jax.Array,
           train: bool) -> tuple[jax.Array, Aux]:
    """The mean loss over `Aux.weight` items, float32. Runs inside the compiled step."""
    raise NotImplementedError

  def evaluators(self) -> dict[str, Evaluator]:
    raise NotImplementedError

  # What a paper may say.

  train_split = 'train'

  def specs(self, batch_size: int, train: bool) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Every shape that batches come in, a compilation each: one, or a few where sizes vary.

    How many rows a batch of each has is the task's: of short sentences it may hold more. Rows are
    multiples of `batch_size`; `batch_spec(batch_size)` is the one that takes most memory.
    """
    del train
    return [self.batch_spec(batch_size)]

  def examples(self) -> int | None:
    """Examples an epoch: from the config when it says so, else counted in the data."""
    return self.config.data.examples or len(self.dataset(self.train_split))

  def resident_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays that the step reads besides its batch and that stay on the devices for a whole run,
    such as a graph: whole on every device. `update` and `loss` find them in the batch."""
    return {}

  def resident(self) -> dict[str, np.ndarray]:
    """The arrays of `resident_spec`; every process gives the same. Called after `prepare`."""
    return {}

  def prepare(self) -> None:
    """Builds what is needed once (a vocabulary, a palette) and leaves a file in `workdir`.

    The first process calls it in every mode that reads data, so what is there already is kept.
    """

  def update(self, state, batch, rng: jax.Array, optimizer: optax.GradientTransformation):
    """One optimization step; only sparse-row methods replace it."""
    from core import step  # the default lives with the step; a paper need not know it
    return step.gradient_update(self.loss, optimizer, self.config.accum, state, batch, rng)

  def open_weights(self, path: pathlib.Path) -> weights_lib.Weights:
    """Foreign weights under this project's parameter names; reads names and shapes, no values."""
    raise UserError(f'{self.config.task} reads no foreign weights; config.init_from='
                    f'{str(path)!r} must be a workdir of this project')

  def adapt(self, weights: weights_lib.Weights, params_shape,
            transfer: bool) -> tuple[weights_lib.Weights, weights_lib.Notes]:
    """Makes weights fit the model, without reading them.

    Args:
      weights: from `open_weights`, or the parameters of a workdir.
      params_shape: the model's parameters, as shapes.
      transfer: whether a new training run starts from them, so that a head may stay fresh and
        sizes may change; otherwise the model is wanted as it was saved.

    Returns:
      The weights to read, and notes on the rest. Together with `Notes.fresh` they must be exactly
      the model's names and shapes: what still differs is refused.
    """
    del params_shape, transfer
    return weights, weights_lib.Notes()

  def predict(self, params, inputs: pathlib.Path, out: pathlib.Path) -> list[dict[str, Any]]:
    """Answers for the files at `inputs`: JSON-ready records, and pictures left in `out`."""
    raise UserError(f'{self.config.task} has no predict mode')

  def export(self, params, path: pathlib.Path) -> pathlib.Path:
    """Writes the parameters in the ecosystem's own format; returns the file written."""
    raise UserError(f'{self.config.task} has no export format')


def parameter_count(task: Task, params) -> int:
  """Parameters as papers count them: without the task's constants."""
  return sum(p.size for path, p in jax.tree_util.tree_leaves_with_path(params)
             if not (task.constants and re.search(task.constants, partition.path_name(path))))


def load(config: ml_collections.ConfigDict, workdir: pathlib.Path | None = None) -> Task:
  """Imports the module that `config.task` names and makes its task."""
  try:
    module = importlib.import_module(config.task)
  except ModuleNotFoundError as e:
    if e.name and config.task.startswith(e.name):
      raise UserError(f'config.task={config.task!r}: no such module; valid: '
                      f'{", ".join(_known())}') from e
    raise
  if not hasattr(module, 'Task'):
    raise UserError(f'config.task={config.task!r} has no class Task; valid: {", ".join(_known())}')
  return _make(module.Task, config, workdir)


def _make(cls: type[Task], config: ml_collections.ConfigDict, workdir: pathlib.Path | None) -> Task:
  task = cls(config)
  task.workdir = workdir
  return task


def _known() -> list[str]:
  """Modules of this checkout that define a Task."""
  root = pathlib.Path(__file__).resolve().parent.parent
  return sorted(f'{p.parent.name}.{p.stem}' for p in root.glob('*/*.py')
                if p.parent.name not in ('core', 'tests') and 'class Task(' in p.read_text())
