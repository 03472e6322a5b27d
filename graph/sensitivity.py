"""How much each hyper-parameter matters (figures 3 and 4 of the paper): a run a value of each.

    python -m graph.sensitivity --config=configs/metapath2vec.py --workdir=runs/sensitivity
        [--only=default,dim64] [--seeds=3] [--config.key=value ...]

One value at a time differs from the config, which is the variant 'default' and stands for its own
values in every sweep. How it goes about it is in `core.sweep`.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from core import config as config_lib
from core import sweep
from core.config import UserError

# What is swept: its key in the config, its axis and its values, about the defaults for small graphs
# (the paper has 100 to 2,000 walks and 64 to 896 dimensions). An epoch is a walk from every start.
SWEEPS = {
    'walks': ('steps', 'walks a start', (1, 2, 5, 10, 20)),
    'length': ('model.length', 'walk length', (20, 40, 60, 80, 100, 150, 200)),
    'dim': ('model.dim', 'dimensions', (16, 32, 64, 128, 256)),
    'window': ('model.window', 'window', (1, 3, 5, 7, 9, 11, 15))}
_DOUBLING = ('walks', 'dim')  # Those shown on a logarithmic axis.
_EPOCHS = re.compile(r'\s*([0-9.e+-]+)\s*epochs?\s*', re.I)
# Keys of metrics.jsonl, one a labelled type; their name, line and dot.
_MEASURES = (('classification/(.+)/macro_f1@50%', 'Macro-F1', '-', '.'),
             ('clustering/(.+)/nmi', 'NMI', '--', 'x'))


def variants(default: Mapping[str, float]) -> dict[str, dict[str, object]]:
  """The default and every value of every sweep that is another than the default's."""
  return {'default': {}} | {
      f'{name}{value}': {key: f'{value} epochs' if key == 'steps' else value}
      for name, (key, _, values) in SWEEPS.items() for value in values
      if value != default.get(name)}


def defaults(config: str, more: Sequence[str]) -> dict[str, float]:
  """The config's own value of each of `SWEEPS`; without 'walks' where it does not count epochs.

  Args:
    config: as main's flag has it.
    more: further flags of main.

  Raises:
    UserError: there is no such config, it takes no such flags, or it is of another paper.
  """
  values = config_lib.from_flags(config, more)
  match = _EPOCHS.fullmatch(str(values.steps))
  try:
    found = {'walks': float(match[1])} if match else {}
  except ValueError as e:
    raise UserError(f'config.steps={values.steps!r} is not a duration') from e
  for name in ('length', 'dim', 'window'):
    if name not in values.model:
      raise UserError(f'--config={config}: there is no config.model.{name} to change; a config '
                      'that has one is configs/metapath2vec.py')
    found[name] = values.model[name]
  return found


def picture(found: sweep.Found, workdir: pathlib.Path, default: Mapping[str, float]) -> None:
  """A panel a hyper-parameter: means over seeds as lines, seeds as dots, the default upright."""
  keys = dict.fromkeys(key for ends in found.values() for end in ends for key in end)
  lines = [(key, match[1], *style) for pattern, *style in _MEASURES for key in keys
           if (match := re.fullmatch(pattern, key))]
  types = list(dict.fromkeys(kind for _, kind, *_ in lines))
  panels = {name: points for name in SWEEPS if (points := _points(found, name, default))}
  figure = Figure(figsize=(1.6 + 3.2 * len(panels), 3.4), layout='constrained')
  handles = {}
  grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
  for axes, (name, points) in zip(grid.flat, panels.items()):
    for key, kind, measure, style, dot in lines:
      values = {value: measured for value, ends in points.items()
                if (measured := [end[key] for end in ends if key in end])}
      color = f'C{types.index(kind) % 10}'
      handles[f'{kind} {measure}'], = axes.plot(
          list(values), [np.mean(measured) for measured in values.values()], style, color=color)
      for value, measured in values.items():
        axes.plot([value] * len(measured), measured, dot, color=color, markersize=5)
    if name in default:
      axes.axvline(default[name], color='black', linewidth=.8, zorder=0)
    if name in _DOUBLING:
      axes.set_xscale('log', base=2)
    axes.set_xticks(list(points), [f'{value:g}' for value in points], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(SWEEPS[name][1])
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
  figure.legend(handles.values(), handles, fontsize=8, loc='outside right center')
  figure.savefig(workdir / 'sensitivity.png', dpi=110)


def _points(found: sweep.Found, name: str, default: Mapping[str, float]):
  """Swept value -> ends of its runs, those of the default among them, by value."""
  points = {value: found[run] for value in SWEEPS[name][2] if (run := f'{name}{value}') in found}
  if 'default' in found and name in default:
    points[default[name]] = found['default']
  return dict(sorted(points.items()))


def _sweep(config: str, more: Sequence[str]) -> sweep.Sweep:
  default = defaults(config, more)
  return sweep.Sweep(variants(default), measures='|'.join(pattern for pattern, *_ in _MEASURES),
                     picture=functools.partial(picture, default=default))


def main(argv: Sequence[str]) -> int:
  return sweep.main(argv, 'python -m graph.sensitivity', __doc__, _sweep)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
