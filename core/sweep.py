"""Variants of a config as one command: a run of main each and seed, then a table and a picture.

A run is in WORKDIR/VARIANT-SEED. What is done already is not done again, and a run that was killed
continues, so the same command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from core import metrics
from core.config import RunFailed, UserError, choose

# What was measured at the end of every run: variant -> seed by seed, as metrics.jsonl has it.
Found = Mapping[str, Sequence[Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What is compared, and how it is shown.

  Attributes:
    variants: name -> the values that it changes, such as {'model.depth': 1}; {} changes nothing.
    measures: regular expression of the whole keys of metrics.jsonl that are the result.
    picture: called with all ends and WORKDIR, leaves a picture there.
  """
  variants: Mapping[str, Mapping[str, object]]
  measures: str
  picture: Callable[[Found, pathlib.Path], None]

  def run(self, config: str, workdir: pathlib.Path, names: Sequence[str], seeds: int,
          more: Sequence[str]) -> Found:
    """Trains variants; returns what was measured at the end of each, seed by seed.

    Args:
      config: as main's flag has it.
      workdir: gets a directory a run.
      names: keys of `variants`.
      seeds: runs a variant, from seed 0.
      more: further flags of main, the same for all; what the variant changes comes after them.

    Raises:
      RunFailed: a run failed; its own line says why.
    """
    found = {}
    for name in names:
      flags = [f'--config.{key}={value}' for key, value in self.variants[name].items()]
      for seed in range(seeds):
        where = workdir / f'{name}-{seed}'
        print(f'=== {where}: {" ".join(flags) or "as it is"}', flush=True)
        done = subprocess.run([
            sys.executable, '-m', 'main', f'--config={config}', f'--workdir={where}', *more, *flags,
            f'--config.seed={seed}'])
        if done.returncode:
          raise RunFailed(f'{where} ended with exit code {done.returncode}')
        ends = [line for line in metrics.read(where / 'metrics.jsonl') if self.shown([line])]
        if not ends:
          raise RunFailed(f'{where} has not been measured (no {self.measures} in its '
                          'metrics.jsonl): was it stopped?')
        found.setdefault(name, []).append(ends[-1])
    return found

  def shown(self, ends: Sequence[Mapping[str, float]]) -> list[str]:
    """The keys of `measures` that are in any of some ends, in their order."""
    return [key for key in dict.fromkeys(key for end in ends for key in end)
            if re.fullmatch(self.measures, key)]

  def table(self, found: Found) -> str:
    """Markdown: a row a variant, the mean (and range) over seeds of every measure."""
    shown = self.shown([end for ends in found.values() for end in ends])
    lines = ['| variant | ' + ' | '.join(shown) + ' |', '|---' * (1 + len(shown)) + '|']
    for name, ends in found.items():
      cells = []
      for key in shown:
        values = [end[key] for end in ends if key in end]
        spread = f' ({min(values):.4f} to {max(values):.4f})' if len(values) > 1 else ''
        cells.append(f'{np.mean(values):.4f}{spread}' if values else '-')
      lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def main(argv: Sequence[str], prog: str, about: str,
         sweep_of: Callable[[str, Sequence[str]], Sweep]) -> int:
  """The command; leaves table.md, table.json and the picture in the workdir.

  Args:
    argv: --config, --workdir, --only, --seeds and further flags of main.
    prog: the command's name, for its help.
    about: its first line is the help's.
    sweep_of: given --config and the further flags, what is compared. Raises `UserError`.

  Returns:
    The exit code: 0 done, 1 a run failed, 2 bad usage.
  """
  parser = argparse.ArgumentParser(prog=prog, description=about.split('\n', maxsplit=1)[0])
  parser.add_argument('--config', required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--only', help='variants; all by default')
  parser.add_argument('--seeds', default=1, type=int)
  args, more = parser.parse_known_args(argv)
  try:
    if bad := [flag for flag in more if not flag.startswith('--config.')]:
      raise UserError(f'unexpected argument {bad[0]!r}; what is passed on is --config.key=value')
    if args.seeds < 1:
      raise UserError(f'--seeds={args.seeds}; it must be at least 1')
    sweep = sweep_of(args.config, more)
    names = list(sweep.variants) if args.only is None else list(dict.fromkeys(args.only.split(',')))
    for name in names:
      choose('--only', name, sweep.variants)
    found = sweep.run(args.config, args.workdir, names, args.seeds, more)
  except (UserError, RunFailed) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2 if isinstance(e, UserError) else 1
  text = sweep.table(found)
  (args.workdir / 'table.md').write_text(text)
  (args.workdir / 'table.json').write_text(json.dumps(found, indent=2) + '\n')
  sweep.picture(found, args.workdir)
  print(text)
  return 0
