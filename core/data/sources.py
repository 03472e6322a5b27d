"""Where examples come from: tfds data sets, embedded ones, and folders of images.

`open_source` gives random access to dicts of numpy-friendly values. Images stay encoded bytes: they
are decoded (`core.data.images.decode`) by the worker that also crops them. Sources can be pickled
into data workers and read from many threads. TensorFlow is never imported.
"""

import contextlib
import importlib
import io
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from absl import logging

from core.config import UserError
from core.data.folders import FolderSource

# Data sets that this project carries or renders itself: module and builder. They are prepared on
# first use, into the same directory as everything of tfds.
_EMBEDDED = {
    'digits': ('core.data.datasets.digits', 'Digits'),
    'digit_scenes': ('core.data.datasets.scenes', 'DigitScenes'),
    'numbers_en_de': ('core.data.datasets.numbers', 'NumbersEnDe'),
    'numbers_en_ko': ('core.data.datasets.numbers', 'NumbersEnKo'),
}


def open_source(name: str, split: str, *, data_dir: str | None = None,
                features: tuple[str, ...] = ()) -> 'TfdsSource | FolderSource':
  """Opens one split of a data set.

  Args:
    name: `digits`, `digit_scenes` or another embedded one (prepared on first use),
      `tfds:NAME[/CONFIG][:VERSION]` or the same without `tfds:` (prepared by `tfds build` in
      ArrayRecord format; the newest version unless one is given), or `folder:PATH` (see
      `FolderSource`).
    split: such as `train` or `test`; tfds splits may be sliced: `train[:98%]`.
    data_dir: root of tfds data sets; by default $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    features: keys that every example must have.

  Returns:
    A source: `len(source)`, `source[i]` -> dict, `source.class_names` (empty when unknown).

  Raises:
    UserError: the data set, split or feature does not exist or is not in a format we can read;
      the message says what would be right.
  """
  if name.startswith('folder:'):
    source = FolderSource(name.removeprefix('folder:'), split)
  else:
    source = _open_tfds(name.removeprefix('tfds:'), split, data_dir)
  missing = [f for f in features if f not in source.features]
  if missing:
    raise UserError(f'data set {name!r} has no feature {", ".join(map(repr, missing))}; it has '
                    f'{", ".join(source.features)}')
  return source


def class_names(opened: Callable[[], Any], count: int) -> list[str]:
  """Names of the classes when the data can be read; else their numbers.

  Args:
    opened: opens the training examples.
    count: of classes as the config has it; 0 asks the data, which must then be there.
  """
  try:
    names = opened().class_names
  except UserError:
    if not count:
      raise
    names = []
  return names or [str(i) for i in range(count)]


# --- tfds ----------------------------------------------------------------------------------------


_KEEP_BYTES = 128 * 2**20  # On disk, all splits; about what a process then holds at most.


class TfdsSource:
  """One split of a data set that tfds prepared as ArrayRecord.

  Values are as tfds gives them without TensorFlow (numpy arrays, Python numbers, bytes), except
  that top-level images stay encoded bytes. Do not write into them: examples of small data sets are
  kept in memory once read, because parsing them costs more than small images take to augment.

  Attributes:
    class_names: names of the feature `label`, or an empty list.
    features: names of the top-level features.
  """

  def __init__(self, directory: str, split: str):
    """Opens DIRECTORY = DATA_DIR/NAME[/CONFIG]/VERSION.

    Raises:
      UserError: the format is not ArrayRecord, or there is no such split, or it is empty.
    """
    import tensorflow_datasets as tfds  # A second to import: only those who read pay it.
    self._directory, self._split = directory, split
    builder = tfds.builder_from_directory(directory)
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if 'array_record' not in formats:
      raise UserError(
          f'{directory} is prepared as {" and ".join(formats)}, which has no random access; '
          'convert it in place with `python -m tensorflow_datasets.scripts.convert_format '
          f'--dataset_version_dir={directory} --out_file_format=array_record` '
          '(needs `pip install -e .[prepare]`)')
    info_features = builder.info.features
    self.features = tuple(sorted(info_features))
    label = info_features['label'] if 'label' in info_features else None
    self.class_names: list[str] = list(getattr(label, 'names', None) or [])
    self._kept = {} if builder.info.dataset_size <= _KEEP_BYTES else None
    decoders = {key: tfds.decode.SkipDecoding() for key, feature in info_features.items()
                if type(feature) is tfds.features.Image}
    try:
      self._source = builder.as_data_source(
          split, decoders=decoders, file_format='array_record')
    except ValueError as e:
      known = {s: info.num_examples for s, info in builder.info.splits.items()}
      if 'Paths sequence' in str(e):
        reason = 'is empty'
      else:
        reason = 'does not exist'
      raise UserError(
          f'split {split!r} of {directory} {reason}; it has '
          + ', '.join(f'{s} ({n} examples)' for s, n in known.items())
          + ', and slices such as train[:98%] or train[90%:]') from e

  def __reduce__(self):
    # A worker opens its own files; it needs nothing of ours but their place.
    return TfdsSource, (self._directory, self._split)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if self._kept is None:
      return self._source[index]
    example = self._kept.get(index)
    if example is None:  # Two threads may both read it: the same example, so no lock.
      example = self._kept[index] = self._source[index]
    return dict(example)

  def __repr__(self) -> str:
    return f'TfdsSource({self._directory!r}, {self._split!r})'


class OnlyClasses:
  """The examples of some classes of a source, their labels renumbered in the order given.

  Attributes:
    class_names: the source's names of these classes.
    features: the source's.
  """

  def __init__(self, source: 'TfdsSource | FolderSource', classes: tuple[int, ...]):
    """Reads every label once.

    Raises:
      UserError: a class that the source does not have, or names twice, or no example is left.
    """
    self._source, self._classes = source, classes
    count = len(source.class_names)
    if len(set(classes)) < len(classes) or (count and not set(classes) <= set(range(count))):
      raise UserError(f'classes {classes}: they must differ, and be numbers from 0 to {count - 1}')
    number = {old: new for new, old in enumerate(classes)}
    labels = [int(source[i]['label']) for i in range(len(source))]
    self._kept = [(i, number[label]) for i, label in enumerate(labels) if label in number]
    if not self._kept:
      raise UserError(f'{source!r} has no example of the classes {classes}')
    self.features = source.features
    self.class_names = [source.class_names[i] for i in classes] if count else []

  def __len__(self) -> int:
    return len(self._kept)

  def __getitem__(self, index: int) -> dict[str, Any]:
    at, label = self._kept[index]
    return {**self._source[at], 'label': label}

  def __repr__(self) -> str:
    return f'OnlyClasses({self._source!r}, {self._classes})'


_VERSION = re.compile(r'\d+\.\d+\.\d+')


def _versions(directory: pathlib.Path) -> list[str]:
  """Prepared versions in a directory, newest first (`incomplete.*` of a killed build is none)."""
  found = [d.name for d in directory.iterdir()
           if _VERSION.fullmatch(d.name) and (d / 'dataset_info.json').exists()]
  return sorted(found, key=lambda v: tuple(map(int, v.split('.'))), reverse=True)


def _open_tfds(name: str, split: str, data_dir: str | None) -> TfdsSource:
  """Finds the directory of a data set (preparing an embedded one) and opens it."""
  from etils import epath  # What tfds itself uses; it also reads gs:// directories.
  match = re.fullmatch(r'([\w\-]+)(?:/([\w.\-]+))?(?::(\d+\.\d+\.\d+))?', name)
  if not match:
    raise UserError(f'data set {name!r} is not of the form NAME, NAME/CONFIG or '
                    'NAME/CONFIG:1.0.0 (or folder:PATH)')
  base, config, version = match.groups()
  root = epath.Path(
      data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
  if base in _EMBEDDED and not config:
    return TfdsSource(prepare_embedded(base, root), split)

  full = f'{base}/{config}' if config else base
  build = (f'`tfds build {full} --file_format=array_record --data_dir={root}` '
           '(needs `pip install -e .[prepare]`)')
  if not root.is_dir():
    raise UserError(f'data directory {root} does not exist (data_dir); prepare {full} with {build}')
  if not (root / base).is_dir():
    have = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith('.')
                  and d.name != 'downloads')
    raise UserError(
        f'no data set {base!r} in {root} (which has {", ".join(have[:20]) or "none"}; embedded: '
        f'{", ".join(_EMBEDDED)}); prepare it with {build}')
  directory = root / base
  if config is None and not _versions(directory):
    configs = sorted(d.name for d in directory.iterdir() if d.is_dir() and _versions(d))
    if len(configs) > 1:
      raise UserError(f'{directory} holds several configs; name one of '
                      + ', '.join(f'{base}/{c}' for c in configs))
    config = configs[0] if configs else None
  if config is not None:
    directory = directory / config
  found = _versions(directory) if directory.is_dir() else []
  if not found:
    raise UserError(f'nothing prepared in {directory}; prepare it with {build}')
  if version is not None and version not in found:
    raise UserError(f'{directory} has no version {version}; it has {", ".join(found)}')
  return TfdsSource(os.fspath(directory / (version or found[0])), split)


def prepare_embedded(name: str, root: os.PathLike | str) -> str:
  """Prepares an embedded data set if it is not there yet.

  tfds writes into a temporary directory beside the target and renames it at the end: a killed
  process leaves no half data set, and of two that prepare at once one is first and the other uses
  its files.

  Args:
    name: one of the embedded data sets.
    root: directory of tfds data sets.

  Returns:
    The directory of the prepared version.

  Raises:
    UserError: the directory cannot be written.
  """
  import tensorflow_datasets as tfds
  module, cls = _EMBEDDED[name]
  builder_cls = getattr(importlib.import_module(module), cls)
  target = pathlib.Path(root) / name / str(builder_cls.VERSION)
  if (target / 'dataset_info.json').exists():
    return os.fspath(target)
  tfds.disable_progress_bar()
  try:
    builder = builder_cls(data_dir=os.fspath(root), file_format='array_record')
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints; we log one line below.
      builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except OSError as e:
    # Renaming onto the finished directory of a faster process fails; its data is as good as ours.
    if not (target / 'dataset_info.json').exists():
      raise UserError(f'data set {name!r} cannot be written to {root}: {e}; give a directory that '
                      'you may write to as data_dir or $TFDS_DATA_DIR') from e
  logging.info('prepared data set %s in %s', name, target)
  return os.fspath(target)
