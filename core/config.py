"""What a config is: its keys, its durations, and the errors a user can cause.

A config is an `ml_collections.ConfigDict` made by `configs/PAPER.py`. Every config has the same
top-level keys, so that the engine can rely on them and a reader knows where to look.
"""

import difflib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags


class UserError(Exception):
  """Bad usage, config or data. The message is one line; the command ends with exit code 2."""


class RunFailed(Exception):
  """A run that began well and failed. The message is one line; exit code 1."""


TOP_LEVEL_KEYS = (
    'task', 'model', 'data', 'batch_size', 'steps', 'optim', 'precision', 'remat', 'accum', 'ema',
    'mesh', 'rules', 'eval', 'checkpoint', 'init_from', 'seed', 'topology', 'log_every', 'profile')

# Keys that change where or how often things happen, never what is computed: a run may continue
# with other values of these.
FREE_KEYS = frozenset({
    'mesh', 'rules', 'topology', 'eval', 'checkpoint', 'profile', 'init_from',
    'data.workers', 'data.threads', 'data.data_dir'})

_DURATION = re.compile(r'^\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(steps?|epochs?|examples?|%)?\s*$', re.I)


def from_flags(config: str, more: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """The config of main's flags, for commands beside main.

  Args:
    config: what stands behind `--config=`.
    more: further flags, `--config.key=value` each.

  Raises:
    UserError: there is no such config, or it takes no such flags.
  """
  if not pathlib.Path(config.split(':', 1)[0]).is_file():
    raise UserError(f'--config={config}: no such file')
  values, argv = flags.FlagValues(), ['main', f'--config={config}', *more]
  holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  try:
    rest = values(argv)
    found = holder.value
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(' '.join(str(e.args[0] if e.args else e).split())) from e
  if len(rest) > 1:
    raise UserError(f'unexpected argument {rest[1]!r}; what is passed on is --config.key=value')
  return found


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what every task needs. Raises `UserError` naming the key that is wrong."""
  missing = [key for key in TOP_LEVEL_KEYS if key not in config]
  extra = [key for key in config if key not in TOP_LEVEL_KEYS]
  if missing or extra:
    raise UserError(f'config: missing keys {missing}, unknown keys {extra}; every config has '
                    f'exactly {list(TOP_LEVEL_KEYS)}')
  for key in ('batch_size', 'accum'):
    if config[key] < 1:
      raise UserError(f'config.{key} is {config[key]}; it must be at least 1')
  if config.batch_size % config.accum:
    raise UserError(f'config.batch_size={config.batch_size} does not split into '
                    f'config.accum={config.accum} equal microbatches')
  if not 1 <= config.checkpoint.average <= config.checkpoint.keep:
    raise UserError(f'config.checkpoint.average={config.checkpoint.average}; it must be between 1 '
                    f'and config.checkpoint.keep={config.checkpoint.keep}')
  checkpoint = config.checkpoint
  choose('config.checkpoint.select', checkpoint.select, ('newest', 'best'))
  if not checkpoint.best and (checkpoint.patience or checkpoint.select == 'best'):
    raise UserError('config.checkpoint.patience and select=best need config.checkpoint.best, the '
                    'metric that says which is best')
  if checkpoint.average > 1 and checkpoint.select == 'best':
    raise UserError(f'config.checkpoint.average={checkpoint.average} is of the newest; with '
                    "config.checkpoint.select='best' it must be 1")
  choose('config.precision', config.precision, ('float32', 'bfloat16'))
  choose('config.remat', config.remat, ('none', 'full', 'dots'))


def choose(what: str, name: str, table: Mapping[str, Any] | Iterable[str]) -> Any:
  """Returns `table[name]` (or `name` itself for a list); an unknown name lists the valid ones."""
  if name in table:
    return table[name] if isinstance(table, Mapping) else name
  names = [str(known) for known in table]
  near = difflib.get_close_matches(str(name), names, 1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  raise UserError(f'{what}: unknown name {name!r}; {hint}valid: {", ".join(names)}')


def duration(text: str | int, *, batch_size: int | None, examples: int | None = None,
             total: int | None = None, what: str = 'duration') -> int:
  """Turns '300', '300 steps', '5 epochs', '1e6 examples' or '10%' into a number of steps.

  Args:
    text: a number followed by an optional unit; a bare number counts steps.
    batch_size: examples a step, None where they vary.
    examples: examples an epoch, needed for epochs.
    total: steps of the whole run, needed for '%'.
    what: the config key, named in errors.

  Returns:
    Steps, rounded up, so that 'N epochs' sees every example at least N times.

  Raises:
    UserError: text that is not a duration, or a unit that has no meaning here.
  """
  match = _DURATION.match(str(text))
  if not match:
    raise UserError(f"{what}={text!r} is not a duration; write e.g. '300 steps', '5 epochs', "
                    "'1e6 examples' or '10%'")
  number, unit = float(match[1]), (match[2] or 'steps').lower().rstrip('s')
  if unit in ('epoch', 'example') and batch_size is None:
    raise UserError(f'{what}={text!r}: batches of this run differ in their number of examples; '
                    'give steps')
  if unit == 'epoch':
    if not examples:
      raise UserError(f'{what}={text!r}: the number of examples is not known; set '
                      'config.data.examples, or give steps')
    return math.ceil(number * examples / batch_size)
  if unit == 'example':
    return math.ceil(number / batch_size)
  if unit == '%':
    if total is None:
      raise UserError(f'{what}={text!r}: a share of the run has no meaning here; give steps')
    return math.ceil(number / 100 * total)
  return math.ceil(number)


def to_json(config: ml_collections.ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def differences(saved: Mapping[str, Any], config: ml_collections.ConfigDict) -> list[str]:
  """Lists 'key: saved -> now' for the values that would change what a run computes."""
  before, now = _flatten(saved), _flatten(json.loads(to_json(config)))
  changed = []
  for key in sorted(before.keys() | now.keys()):
    parts = key.split('.')
    if any('.'.join(parts[:n]) in FREE_KEYS for n in range(1, len(parts) + 1)):
      continue
    if before.get(key) != now.get(key):
      changed.append(f'{key}: {before.get(key)!r} -> {now.get(key)!r}')
  return changed


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(_flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat
