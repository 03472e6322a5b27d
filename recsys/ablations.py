"""The paper's ablations as one command: a run a variant, then a table and a picture of them.

    python -m recsys.ablations --config=configs/bert4rec.py --workdir=runs/ablations
        [--only=default,no_positions] [--seeds=3] [--config.key=value ...]

A variant is a run of `main` in WORKDIR/VARIANT-SEED. What is done already is not done again, and a
run that was killed continues, so the same command goes on where it stopped.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from core import metrics
from core.config import RunFailed, UserError, choose

# Sections 4.4 to 4.8: table 3 (one mask), table 5 and figures 3 and 4. Heads are 32 wide. Every
# config has two layers, two heads and width 64.
VARIANTS: dict[str, dict[str, object]] = {
    'default': {}, 'no_positions': {'positions': False}, 'no_residual': {'residual': False},
    'no_dropout': {'dropout': 0., 'attention_dropout': 0.}, 'one_mask': {'max_masks': 1},
    **{f'layers{n}': {'depth': n} for n in (1, 3, 4)},
    **{f'heads{n}': {'heads': n} for n in (1, 4, 8)},
    **{f'width{n}': {'width': n, 'heads': max(n // 32, 1)} for n in (16, 32, 128, 256)},
    **{f'mask{share}': {'mask_rate': share, 'max_masks': 10_000}
       for share in (.1, .2, .4, .6, .8)}}
_SHOWN = ('unseen/HR@10', 'unseen/NDCG@10', 'pop100/HR@10', 'pop100/NDCG@10')


def run(config: str, workdir: pathlib.Path, names: Sequence[str], seeds: int,
        more: Sequence[str]) -> dict[str, list[dict[str, float]]]:
  """Trains every variant; returns what was measured at the end of each, seed by seed.

  Args:
    config: as main's flag has it.
    workdir: gets a directory a run.
    names: keys of `VARIANTS`.
    seeds: runs a variant, from seed 0.
    more: further flags of main, the same for all.

  Raises:
    RunFailed: a run failed; its own line says why.
  """
  found = {}
  for name in names:
    for seed in range(seeds):
      where = workdir / f'{name}-{seed}'
      flags = [f'--config.model.{key}={value}' for key, value in VARIANTS[name].items()]
      print(f'=== {where}: {" ".join(flags) or "as it is"}', flush=True)
      done = subprocess.run([sys.executable, '-m', 'main', f'--config={config}',
                             f'--workdir={where}', f'--config.seed={seed}', *flags, *more])
      if done.returncode:
        raise RunFailed(f'{where} ended with exit code {done.returncode}')
      ends = [line for line in metrics.read(where / 'metrics.jsonl') if f'test/{_SHOWN[0]}' in line]
      if not ends:
        raise RunFailed(f'{where} has not been measured on the test split: was it stopped?')
      found.setdefault(name, []).append(ends[-1])
  return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
  """Markdown: a row a variant, the mean (and range) over seeds of every measure."""
  lines = ['| variant | ' + ' | '.join(_SHOWN) + ' |', '|---' * (1 + len(_SHOWN)) + '|']
  for name, ends in found.items():
    cells = []
    for shown in _SHOWN:
      values = [end[f'test/{shown}'] for end in ends]
      spread = f' ({min(values):.4f} to {max(values):.4f})' if len(values) > 1 else ''
      cells.append(f'{np.mean(values):.4f}{spread}')
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def picture(found: Mapping[str, Sequence[Mapping[str, float]]], path: pathlib.Path) -> None:
  """Bars of NDCG@10, a variant each, in two protocols; the line is the default's."""
  figure = Figure(figsize=(9, .5 + .32 * len(found)), layout='constrained')
  for axes, shown in zip(figure.subplots(1, 2, sharey=True), ('unseen/NDCG@10', 'pop100/NDCG@10')):
    values = [[end[f'test/{shown}'] for end in ends] for ends in found.values()]
    axes.barh(list(found), [np.mean(v) for v in values], color='C0', alpha=.7)
    for row, each in enumerate(values):
      axes.plot(each, [row] * len(each), 'k.', markersize=4)
    if 'default' in found:
      axes.axvline(np.mean(values[list(found).index('default')]), color='black', linewidth=.8)
    axes.set_title(f'test {shown}', fontsize=10)
    axes.spines[['top', 'right']].set_visible(False)
  axes.invert_yaxis()
  figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m recsys.ablations',
                                   description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--config', required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--only', default=','.join(VARIANTS), help='variants; all by default')
  parser.add_argument('--seeds', default=1, type=int)
  args, more = parser.parse_known_args(argv)
  try:
    names = args.only.split(',')
    for name in names:
      choose('--only', name, VARIANTS)
    if bad := [flag for flag in more if not flag.startswith('--config.')]:
      raise UserError(f'unexpected argument {bad[0]!r}; what is passed on is --config.key=value')
    found = run(args.config, args.workdir, names, args.seeds, more)
  except (UserError, RunFailed) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2 if isinstance(e, UserError) else 1
  text = table(found)
  (args.workdir / 'table.md').write_text(text)
  (args.workdir / 'table.json').write_text(json.dumps(found, indent=2) + '\n')
  picture(found, args.workdir / 'ablations.png')
  print(text)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
