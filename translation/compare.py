"""Several runs side by side: scores of a split, and how they fall with the length of the source.

    python -m translation.compare --split=test runs/rnn runs/lstm runs/luong

Runs of one config that differ in nothing but the seed are one row: their mean and range. What is
read is what every run leaves in `translations/`.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from core.config import UserError

_SCORES = ('bleu', 'chrf', 'exact_match')
# A group of fewer sentences says little about a length.
_FEWEST = 10


def groups(workdirs: Sequence[pathlib.Path], split: str) -> dict[str, list[dict[str, Any]]]:
  """Records of a split, by the name of the first run of each config.

  Raises:
    UserError: a run that has not translated the split.
  """
  found: list[tuple[str, Mapping[str, Any], list[dict[str, Any]]]] = []
  for workdir in workdirs:
    path = workdir / 'translations' / f'{split}.json'
    try:
      record = json.loads(path.read_text())
      config = json.loads((workdir / 'config.json').read_text())
    except (OSError, ValueError) as e:
      there = sorted(p.stem for p in (workdir / 'translations').glob('*.json'))
      raise UserError(f'{path} cannot be read ({e}); {workdir} has translated '
                      f'{", ".join(there) or "nothing"}') from e
    config.pop('seed')
    for _, other, records in found:
      if other == config:
        records.append(record)
        break
    else:
      found.append((workdir.name, config, [record]))
  return {name: records for name, _, records in found}


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """Markdown: a row a config, mean (and range over seeds) of every score."""
  lines = ['| run | seeds | ' + ' | '.join(_SCORES) + ' |', '|---' * (2 + len(_SCORES)) + '|']
  for name, records in found.items():
    cells = []
    for score in _SCORES:
      values = [r[score] * (100 if score == 'exact_match' else 1) for r in records]
      spread = f' ({min(values):.1f} to {max(values):.1f})' if len(values) > 1 else ''
      cells.append(f'{np.mean(values):.1f}{spread}')
    lines.append(f'| {name} | {len(records)} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
  """A line a config: BLEU, and exact matches, against the words of the source."""
  figure = Figure(figsize=(10, 3.6), layout='constrained')
  for axes, score, title in zip(figure.subplots(1, 2), ('bleu', 'exact_match'),
                                ('BLEU', 'exact matches, %')):
    for name, records in found.items():
      points: dict[float, list[float]] = {}
      for record in records:
        for group in record['by_source_words']:
          if group['sentences'] >= _FEWEST:
            value = group[score] * (100 if score == 'exact_match' else 1)
            points.setdefault((group['from'] + group['to']) / 2, []).append(value)
      x = sorted(points)
      line, = axes.plot(x, [np.mean(points[at]) for at in x], 'o-', markersize=4, label=name)
      axes.fill_between(x, [min(points[at]) for at in x], [max(points[at]) for at in x],
                        color=line.get_color(), alpha=.15)
    axes.set(title=title, xlabel='source words', ylim=(0, 103))
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
  """The command line; returns its exit code: 0 done, 2 bad usage or data."""
  parser = argparse.ArgumentParser(prog='python -m translation.compare',
                                   description='Translations of several runs.')
  parser.add_argument('workdirs', metavar='WORKDIR', nargs='+', type=pathlib.Path,
                      help='a finished run')
  parser.add_argument('--split', default='test', help='whose translations, such as test')
  parser.add_argument('--out', type=pathlib.Path,
                      help='the picture; by default SPLIT_compared.png beside the first WORKDIR')
  flags = parser.parse_args(argv)
  try:
    found = groups(flags.workdirs, flags.split)
    out = flags.out or flags.workdirs[0].resolve().parent / f'{flags.split}_compared.png'
    print(table(found))
    draw(found, out)
    print(f'wrote {out}')
    return 0
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
