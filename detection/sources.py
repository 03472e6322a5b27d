"""Which data set a config means: the embedded scenes, a folder in COCO's format, or tfds' COCO."""

import pathlib
from typing import Any

import ml_collections

from core.config import UserError
from core.data import sources
from detection import tfds_coco
from detection.coco import CocoSource
from detection.scenes import Scenes


def open_source(config: ml_collections.ConfigDict, split: str,
                workdir: pathlib.Path | None) -> Any:
  """Opens a split of `config.data.name`: 'digit_scenes', 'coco:PATH' or tfds' 'coco/2017' and
  'coco/2017_panoptic'.

  Args:
    config: the run's; `data.panoptic` makes stuff objects too, and with the mask head examples
      have `segments`.
    split: a key of `config.data.splits`.
    workdir: where `prepare` left the sizes of tfds' images.

  Returns:
    a detection source; `CocoSource` says what it gives.

  Raises:
    UserError: there is no such data, or it is wrong.
  """
  data, masks = config.data, config.model.masks != 'none'
  name, split_name = data.name, data.splits[split]
  if not split_name:
    raise UserError(f'config.data.splits.{split} is empty; name a split of {name}')
  if name == 'digit_scenes':
    return Scenes(split_name, data.data_dir or None, masks, stuff=data.panoptic)
  if name.startswith('coco:'):
    return CocoSource(name.removeprefix('coco:'), split_name, masks=masks, strict=data.strict,
                      labels=data.labels, panoptic=data.panoptic)
  if not is_tfds(name):
    raise UserError(f'config.data.name={name!r}; valid: digit_scenes, coco:PATH, coco/2017, '
                    'coco/2017_panoptic')
  if data.panoptic != name.endswith('_panoptic'):
    raise UserError(f'config.data.name={name!r} does not go with config.data.panoptic='
                    f'{data.panoptic}: coco/2017_panoptic has things and stuff, coco/2017 boxes')
  return tfds_coco.TfdsCoco(
      name, split_name, data_dir=data.data_dir or None, masks=masks, labels=data.labels,
      sizes_file=sizes_file(split, workdir))


def is_tfds(name: str) -> bool:
  return name.removeprefix('tfds:').startswith('coco/')


def sizes_file(split: str, workdir: pathlib.Path | None) -> pathlib.Path:
  """Where `scan_sizes` leaves what tfds does not tell without reading every image."""
  return (workdir or pathlib.Path()) / f'sizes_{split}.npz'


def scan_sizes(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Looks once at every image of tfds' COCO; nothing to do for other data, or when it was done."""
  data = config.data
  for split, name in data.splits.items():
    path = sizes_file(split, workdir)
    if name and is_tfds(data.name) and not path.exists():
      tfds_coco.scan(sources.open_source(data.name, name, data_dir=data.data_dir or None), path)
