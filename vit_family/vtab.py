"""VTAB-1k: nineteen tasks of 1,000 training examples each (arXiv 1910.04867; ViT section 4.1).

`TASKS` says where each task's examples come from, what their labels are, and which augmentations
would destroy them. Splits are those of the benchmark's public code: hyper-parameters are chosen
with 800 examples for training and 200 for validation, final runs train on the 1,000.

  python -m vit_family.vtab [--out=DIR] WORKDIR [WORKDIR...]

prints the test accuracy of every finished run (a workdir whose config has a task's name in
`data.vtab`), the means of the three groups and of all nineteen, and leaves vtab.json and vtab.png.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from core.config import UserError, choose

GROUPS = ('natural', 'specialized', 'structured')


@dataclasses.dataclass(frozen=True)
class VtabTask:
  """Attributes:
    title: as tables of results have it.
    group: one of `GROUPS`.
    data: tfds name, with its config where it has several.
    classes: number of them.
    validation: tfds slice of the 200 examples to choose on; `train` is the 800 to train with.
    test: tfds slice.
    key: feature that the label comes from.
    bins: labels are so many equal ranges of the feature's `values`; 0 where they are its values.
    values: see `bins`.
    flip, crop: whether the label survives mirroring, and a random crop.
    scale: what decoded pixels must be multiplied by to reach from 0 to 255.
  """
  title: str
  group: str
  data: str
  classes: int
  validation: str
  test: str = 'test'
  key: str = 'label'
  bins: int = 0
  values: int = 0
  flip: bool = True
  crop: bool = True
  scale: int = 1
  train: str = 'train[:800]'

  @property
  def trainval(self) -> str:
    """tfds slice of all 1,000 examples."""
    return f'{self.train}+{self.validation}'


# Sets without a validation split of their own take it from behind the first 90% (Pets and dSprites:
# 80%, EuroSAT and Resisc45: 60%) of train, smallNORB from the front of test.
_OWN = 'validation[:200]'

TASKS: dict[str, VtabTask] = {
    'caltech101': VtabTask('Caltech101', 'natural', 'caltech101', 102, 'train[2754:2954]'),
    'cifar100': VtabTask('CIFAR-100', 'natural', 'cifar100', 100, 'train[45000:45200]'),
    'dtd': VtabTask('DTD', 'natural', 'dtd', 47, _OWN),
    'flowers102': VtabTask('Flowers102', 'natural', 'oxford_flowers102', 102, _OWN),
    'pets': VtabTask('Pets', 'natural', 'oxford_iiit_pet', 37, 'train[2944:3144]'),
    'sun397': VtabTask('Sun397', 'natural', 'sun397/tfds', 397, _OWN),
    'svhn': VtabTask('SVHN', 'natural', 'svhn_cropped', 10, 'train[65931:66131]'),
    'camelyon': VtabTask('Camelyon', 'specialized', 'patch_camelyon', 2, _OWN),
    'eurosat': VtabTask('EuroSAT', 'specialized', 'eurosat/rgb', 10, 'train[16200:16400]',
                        'train[21600:]'),
    'resisc45': VtabTask('Resisc45', 'specialized', 'resisc45', 45, 'train[18900:19100]',
                         'train[25200:]'),
    'retinopathy': VtabTask('Retinopathy', 'specialized',
                            'diabetic_retinopathy_detection/btgraham-300', 5, _OWN),
    'clevr_count': VtabTask('Clevr-Count', 'structured', 'clevr', 8, 'train[63000:63200]',
                            'validation', key='objects', crop=False),
    'clevr_distance': VtabTask('Clevr-Dist', 'structured', 'clevr', 6, 'train[63000:63200]',
                               'validation', key='objects', crop=False),
    'dmlab': VtabTask('DMLab', 'structured', 'dmlab', 6, _OWN, crop=False),
    'dsprites_location': VtabTask(
        'dSpr-Loc', 'structured', 'dsprites', 16, 'train[589824:590024]', 'train[663552:]',
        key='label_x_position', bins=16, values=32, flip=False, crop=False, scale=255),
    'dsprites_orientation': VtabTask(
        'dSpr-Ori', 'structured', 'dsprites', 16, 'train[589824:590024]', 'train[663552:]',
        key='label_orientation', bins=16, values=40, flip=False, scale=255),
    'kitti_distance': VtabTask('KITTI-Dist', 'structured', 'kitti', 4, _OWN, key='objects',
                               crop=False),
    'smallnorb_azimuth': VtabTask('sNORB-Azim', 'structured', 'smallnorb', 18, 'test[:200]',
                                  'test[50%:]', key='label_azimuth', flip=False),
    'smallnorb_elevation': VtabTask('sNORB-Elev', 'structured', 'smallnorb', 9, 'test[:200]',
                                    'test[50%:]', key='label_elevation'),
}

# --- Labels --------------------------------------------------------------------------------------

# Lower ends of the classes' ranges; a distance on an end belongs to the class below it.
_CLEVR_ENDS = (0., 8., 8.5, 9., 9.5, 10.)      # Camera's units, to the closest object.
_KITTI_ENDS = (-100., 8., 20., 999.)           # Metres; the last class is "no vehicle at all".
_KITTI_VEHICLES = 3                            # Types 0, 1, 2: car, van, truck.


def label(task: str, example: Mapping[str, Any]) -> int:
  """The class of an example of a task's data set.

  Args:
    task: name in `TASKS`.
    example: as tfds gives it, features as numpy arrays or numbers; only the task's `key` is read.

  Returns:
    0 to classes - 1.

  Raises:
    UserError: unknown task, or an example whose class is out of range: another data set.
  """
  spec = choose('VTAB task', task, TASKS)
  value = example[spec.key]
  if task == 'clevr_count':
    found = len(value['size']) - 3  # Scenes have 3 to 10 objects.
  elif task == 'clevr_distance':
    found = _range_of(_CLEVR_ENDS, np.min(np.asarray(value['pixel_coords'])[:, 2]))
  elif task == 'kitti_distance':
    depth = np.asarray(value['location']).reshape(-1, 3)[:, 2]
    vehicles = depth[np.asarray(value['type']) < _KITTI_VEHICLES]
    found = _range_of(_KITTI_ENDS, vehicles.min(initial=1000.))
  elif spec.bins:
    found = int(value) * spec.bins // spec.values
  else:
    found = int(value)
  if not 0 <= found < spec.classes:
    raise UserError(f'VTAB task {task}: an example has class {found}, but there are '
                    f'{spec.classes}; is the data {spec.data}?')
  return found


def _range_of(ends: tuple[float, ...], distance: float) -> int:
  """The last range that begins below `distance`; -1 for none."""
  return int(np.searchsorted(ends, distance)) - 1


# --- Results -------------------------------------------------------------------------------------


def means(accuracies: Mapping[str, float]) -> dict[str, float | None]:
  """Means of the groups and, as 'mean', of all tasks; None where a task is missing.

  A mean over fewer tasks would compare with no published number.

  Args:
    accuracies: task name -> accuracy, in any unit.
  """
  found: dict[str, float | None] = {}
  for group in (*GROUPS, 'mean'):
    names = [name for name, task in TASKS.items() if group in (task.group, 'mean')]
    complete = all(name in accuracies for name in names)
    found[group] = float(np.mean([accuracies[name] for name in names])) if complete else None
  return found


def read_workdir(workdir: pathlib.Path) -> tuple[str, float]:
  """The task of a run and its last test accuracy, a share.

  Raises:
    UserError: no run, a run of no VTAB task, or one that has not been tested.
  """
  from core import metrics  # It imports JAX, which configs, that read TASKS, must not.
  config_path, metrics_path = workdir / 'config.json', workdir / 'metrics.jsonl'
  config = _read(config_path, lambda path: json.loads(path.read_text()))
  data = config.get('data') if isinstance(config, dict) else None
  name = data.get('vtab') if isinstance(data, dict) else None
  if not name:
    raise UserError(f'{config_path} names no VTAB task in data.vtab; valid: {", ".join(TASKS)}')
  choose(f'{config_path}: data.vtab', name, TASKS)
  values = [line.get('test/accuracy') for line in _read(metrics_path, metrics.read)
            if isinstance(line, dict)]
  tested = [value for value in values if isinstance(value, float | int)]
  if not tested:
    raise UserError(f'{metrics_path} has no test/accuracy: the run has not ended; continue it, or '
                    'run --mode=evaluate')
  return name, float(tested[-1])


def _read(path: pathlib.Path, how: Callable[[pathlib.Path], Any]) -> Any:
  try:
    return how(path)
  except OSError as e:
    raise UserError(f'{path}: {e.strerror}; give workdirs of training runs') from e
  except ValueError as e:  # Not JSON, or not even text.
    raise UserError(f'{path} is not JSON: {e}') from e


def collect(workdirs: list[pathlib.Path]) -> dict[str, float]:
  """Task name -> test accuracy of the runs, in the order of `TASKS`.

  Raises:
    UserError: see `read_workdir`; or two runs of the same task.
  """
  found, where = {}, {}
  for workdir in workdirs:
    name, accuracy = read_workdir(workdir)
    if name in found:
      raise UserError(f'{where[name]} and {workdir} are both runs of {name}; give one of them')
    found[name], where[name] = accuracy, workdir
  return {name: found[name] for name in TASKS if name in found}


def table(accuracies: Mapping[str, float]) -> str:
  """Lines of text, in percent; '-' stands for what is missing."""
  percent = lambda value: '    -' if value is None else f'{100 * value:5.1f}'
  lines, averages = [], means(accuracies)
  for group in GROUPS:
    lines += [f'{percent(accuracies.get(name))}  {task.title}' for name, task in TASKS.items()
              if task.group == group]
    lines += [f'{percent(averages[group])}  mean of {group}', '']
  lines.append(f'{percent(averages["mean"])}  mean of all {len(TASKS)}')
  missing = [name for name in TASKS if name not in accuracies]
  if missing:
    lines.append(f'missing: {", ".join(missing)}')
  return '\n'.join(lines)


def draw(accuracies: Mapping[str, float], path: pathlib.Path) -> None:
  """A bar a task, coloured by group, with the group's mean as a line."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(10, 4), layout='constrained')
  axes = figure.subplots()
  names, averages = list(TASKS), means(accuracies)
  for number, group in enumerate(GROUPS):
    places = [i for i, name in enumerate(names) if TASKS[name].group == group]
    color, mean = f'C{number}', averages[group]
    title = group if mean is None else f'{group}: {100 * mean:.1f}'
    axes.bar(places, [100 * accuracies.get(names[i], 0.) for i in places], color=color, alpha=.7,
             label=title)
    if mean is not None:
      axes.hlines(100 * mean, places[0] - .45, places[-1] + .45, color=color)
  for i, name in enumerate(names):
    has = name in accuracies
    axes.text(i, 100 * accuracies[name] + 1 if has else 1,
              f'{100 * accuracies[name]:.1f}' if has else 'missing', ha='center', fontsize=7,
              rotation=0 if has else 90,
              bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': .8, 'pad': .5})
  axes.set_xticks(range(len(names)), [TASKS[name].title for name in names], rotation=45, ha='right')
  axes.set_xlim(-.7, len(names) - .3)
  axes.set_ylim(0, 108)
  axes.set_ylabel('test accuracy, %')
  total = averages['mean']
  axes.set_title(f'VTAB-1k: {len(accuracies)} of {len(names)} tasks' if total is None
                 else f'VTAB-1k: mean {100 * total:.1f}', pad=24)
  axes.legend(fontsize=8, ncols=3, loc='lower center', bbox_to_anchor=(.5, 1.), frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)


def report(workdirs: list[pathlib.Path], out: pathlib.Path) -> str:
  """Collects the runs, writes vtab.json (accuracies as shares) and vtab.png to `out`; the table.

  Raises:
    UserError: see `collect`; or `out` cannot be written.
  """
  accuracies = collect(workdirs)
  try:
    out.mkdir(parents=True, exist_ok=True)
    (out / 'vtab.json').write_text(json.dumps(
        {'tasks': {name: accuracies.get(name) for name in TASKS}, 'means': means(accuracies),
         'missing': [name for name in TASKS if name not in accuracies]}, indent=2) + '\n')
    draw(accuracies, out / 'vtab.png')
  except OSError as e:
    raise UserError(f'--out={out} cannot be written: {e.strerror}') from e
  return table(accuracies)


def main(argv: list[str]) -> int:
  """The command line; returns its exit code: 0 done, 2 bad usage or data."""
  parser = argparse.ArgumentParser(prog='python -m vit_family.vtab',
                                   description='Results of VTAB-1k runs.')
  parser.add_argument('workdirs', metavar='WORKDIR', nargs='+', type=pathlib.Path,
                      help='a finished run of one task')
  parser.add_argument('--out', type=pathlib.Path,
                      help='where vtab.json and vtab.png go; by default beside the first WORKDIR')
  flags = parser.parse_args(argv)
  try:
    out = flags.out or flags.workdirs[0].resolve().parent
    print(report(flags.workdirs, out))
    print(f'wrote {out / "vtab.json"} and {out / "vtab.png"}')
    return 0
  except UserError as e:
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
