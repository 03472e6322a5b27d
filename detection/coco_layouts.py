"""Where the files of a data set in COCO's format lie."""

import dataclasses
import os
import pathlib

from core.config import UserError

_SPLIT_FOLDERS = {'train': ('train',), 'validation': ('validation', 'val'), 'test': ('test',)}
_OFFICIAL = {'train': 'train2017', 'validation': 'val2017'}


@dataclasses.dataclass(frozen=True)
class Places:
  """Where a split lies.

  Attributes:
    annotations: the JSON file.
    images: folder of the images.
    panoptic: folder of the panoptic pictures, if there are any.
    train: annotations of the training split where that is another file of the user's, else ''.
    by_hash: the file is of all splits, and images are dealt out by a hash of their names.
  """
  annotations: str
  images: str
  panoptic: str
  train: str = ''
  by_hash: bool = False


def find(path: str, split: str, panoptic: bool = False) -> Places:
  """Finds a split.

  Args:
    path: of a folder in one of the layouts that `detection.coco.CocoSource` lists.
    split: 'train', 'validation' (or 'val') or 'test'.
    panoptic: of COCO's own layout take `panoptic_*.json`, not `instances_*.json`.

  Raises:
    UserError: there is none; says what there is.
  """
  root = pathlib.Path(path).expanduser().absolute()
  split = {'val': 'validation'}.get(split, split)
  if split not in _SPLIT_FOLDERS:
    raise UserError(f'split {split!r} of coco:{path} does not exist; valid: train, validation, '
                    'test (slices such as train[:98%] need a tfds data set)')
  if not root.is_dir():
    raise UserError(f'coco:{path} is not a folder; give one with train/annotations.json and '
                    'train/images/')
  folders = _split_folders(root)
  if folders:
    if split not in folders:
      raise UserError(f'coco:{path} has no split {split!r}; it has {", ".join(folders)}')
    other = 'train' in folders and split != 'train'
    return _own(folders[split], train=f'{folders["train"]}/annotations.json' if other else '')
  if (root / 'annotations.json').is_file():
    return _own(root, by_hash=True)

  kinds = ('panoptic',) if panoptic else ('instances', 'panoptic')
  official = {}
  for name, year in _OFFICIAL.items():
    files = [root / 'annotations' / f'{kind}_{year}.json' for kind in kinds]
    if found := [f for f in files if f.is_file()]:
      official[name] = found[0]
  if split in official:
    year = _OFFICIAL[split]
    pictures = [root / f'panoptic_{year}', root / 'annotations' / f'panoptic_{year}']
    folder = next((p for p in pictures if p.is_dir()), pictures[0])
    return Places(*map(os.fspath, (official[split], root / year, folder)))
  if official:
    raise UserError(f'coco:{path} has no split {split!r}; it has {", ".join(official)}')
  holds = sorted(p.name for p in root.iterdir())[:10]
  raise UserError(
      f'coco:{path} has none of the layouts that are read: {{train,val,test}}/annotations.json '
      'with images/ beside it, annotations.json with images/, or '
      f'annotations/{kinds[0]}_train2017.json with train2017/; it holds '
      f'{", ".join(holds) or "nothing"}')


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
  folders = {}
  for name, called in _SPLIT_FOLDERS.items():
    found = [root / c for c in called if (root / c / 'annotations.json').is_file()]
    if len(found) > 1:
      raise UserError(f'{root} has both {" and ".join(f.name for f in found)}; keep one of them')
    if found:
      folders[name] = found[0]
  return folders


def _own(folder: pathlib.Path, **more) -> Places:
  annotations, images, panoptic = (
      os.fspath(folder / name) for name in ('annotations.json', 'images', 'panoptic'))
  return Places(annotations, images, panoptic, **more)
