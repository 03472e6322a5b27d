"""Everything but training and compiling: prepare, evaluate, predict, inspect, export."""

import json
import math
import pathlib

import jax
import ml_collections
import numpy as np

from core import metrics, partition, pretrained
from core.config import UserError
from core.data import pipeline
from core.evaluate import Evaluators
from core.plan import Plan, make_plan
from core.train import claim_workdir


def prepare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Builds what the task needs once, and reads one example to see that its data is there."""
  claim_workdir(workdir)
  plan = make_plan(config, workdir=workdir)
  plan.prepare()
  source = plan.task.dataset(plan.task.train_split)
  print(f'{config.data.name}: {len(source):,} training examples are ready')


def _params(plan: Plan, workdir: pathlib.Path):
  """(parameters, step): of `config.init_from` when set, else of the workdir's newest checkpoint."""
  if plan.config.init_from:
    return pretrained.read_params(plan, plan.config.init_from), 0
  return pretrained.restore_params(plan, workdir)


def evaluate(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Runs every evaluator on the newest checkpoint; appends its line to metrics.jsonl."""
  claim_workdir(workdir)
  plan = make_plan(config, workdir=workdir)
  params, step = _params(plan, workdir)
  plan.prepare()
  say = print if jax.process_index() == 0 else lambda text: None
  say(f'evaluating step {step}' if step else f'evaluating {config.init_from}')
  values = Evaluators(plan, workdir).run(params, step, say=say)
  writer = metrics.Writer(workdir, after_step=None)
  writer.write(step, values)
  writer.close()


def predict(config: ml_collections.ConfigDict, workdir: pathlib.Path,
            inputs: pathlib.Path) -> None:
  """Answers for `inputs`: DIR/predictions/predictions.json and the task's pictures beside it."""
  if not inputs.exists():
    raise UserError(f'--input={inputs}: no such file or folder')
  claim_workdir(workdir)
  plan = make_plan(config, workdir=workdir)
  params, _ = _params(plan, workdir)
  plan.prepare()
  out = workdir / 'predictions'
  out.mkdir(exist_ok=True)
  records = plan.task.predict(params, inputs, out)
  path = out / 'predictions.json'
  path.write_text(json.dumps(records, indent=2, ensure_ascii=False) + '\n')
  print(f'{len(records)} prediction(s) in {path}')


def export(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes the parameters in the ecosystem's own format: DIR/export.*."""
  claim_workdir(workdir)
  plan = make_plan(config, workdir=workdir)
  params, _ = _params(plan, workdir)
  plan.prepare()
  params = jax.tree.map(plan.fetch, params)
  if jax.process_index() == 0:
    path = plan.task.export(params, workdir / 'export')
    print(f'wrote {path}')


def inspect(config: ml_collections.ConfigDict, workdir: pathlib.Path | None) -> None:
  """Prints what a config is made of: parameters, batch, shardings, one element of the data."""
  plan = make_plan(config, workdir=workdir)
  leaves = jax.tree_util.tree_leaves_with_path(plan.params_shape)
  width = max(len(partition.path_name(path)) for path, _ in leaves)
  for path, p in leaves:
    print(f'{partition.path_name(path):<{width}}  {str(tuple(p.shape)):<22} {p.size:>14,}')
  print(f'{"parameters":<{width}}  {"":<22} {plan.parameter_count:>14,}')
  if constants := sum(p.size for _, p in leaves) - plan.parameter_count:
    print(f'{"constants, not counted":<{width}}  {"":<22} {constants:>14,}')
  print()

  state_bytes = sum(math.prod(s.shape) * s.dtype.itemsize
                    for s in jax.tree.leaves(plan.state_shape))
  print(partition.report(plan.params_shape, plan.state_sharding.params))
  print(f'with optimizer state {partition.human_bytes(state_bytes)} over all devices\n')

  print(f'batches, {plan.steps} steps'
        + (f', {plan.examples:,} examples an epoch' if plan.examples else ''))
  for bucket, specs in enumerate(plan.specs):
    print(f'batch of {specs["mask"].shape[0]}' + (f', bucket {bucket}' if plan.specs[1:] else ''))
    for name, spec in specs.items():
      print(f'  {name}: {tuple(spec.shape)} {np.dtype(spec.dtype).name} split '
            f'{tuple(plan.batch_sharding[name].spec)}')
  for name, spec in plan.task.resident_spec().items():
    print(f'resident {name}: {tuple(spec.shape)} {np.dtype(spec.dtype).name}')
  print('\none element of the training data')
  source = plan.task.dataset(plan.task.train_split)
  element = plan.task.transform(source[0], np.random.default_rng(config.seed), True)
  batch = {k: np.asarray(v)[None] for k, v in element.items()}
  bucket = source.buckets[0] if plan.specs[1:] else 0
  pipeline.check_against_spec({**batch, 'mask': np.ones(1, np.float32)}, plan.specs[bucket])
  for name, value in element.items():
    value = np.asarray(value)
    text = f'{value}' if value.size <= 8 else f'from {value.min()} to {value.max()}'
    print(f'  {name}: {value.shape} {value.dtype} {text}')
