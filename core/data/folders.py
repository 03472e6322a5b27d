"""A folder of images as a source of examples."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

from absl import logging

from core.config import UserError
from core.data import images

_SPLIT_FOLDERS = {'train': ('train',), 'validation': ('validation', 'val'), 'test': ('test',)}


class FolderSource:
  """A user's own images, one folder a class.

  Either PATH/{train,val or validation,test}/CLASS/**/IMAGE, or PATH/CLASS/**/IMAGE, which is split
  80/10/10 by a hash of each file's path below PATH: adding images never moves others between
  splits. Hidden files are ignored; files that are not whole images are skipped with one warning.
  The folder is listed once a process.

  Examples: `image` (encoded bytes), `label` (int), `id` (path below PATH).

  Attributes:
    class_names: the sorted names of the class folders (of `train`, where there are split folders).
    features: `('image', 'label', 'id')`.
    skipped: paths of files that were left out of this split.
  """

  features = ('image', 'label', 'id')

  def __init__(self, path: str, split: str):
    """Lists the split.

    Raises:
      UserError: no such folder or split, no image at all, or a class without images.
    """
    root = pathlib.Path(path).expanduser()
    self._root = os.path.abspath(root)
    self._split = {'val': 'validation'}.get(split, split)
    if not root.is_dir():
      raise UserError(f'folder:{path} is not a folder; give one with a subfolder of images for '
                      'each class')
    if self._split not in _SPLIT_FOLDERS:
      raise UserError(f'split {split!r} of folder:{path} does not exist; valid: train, validation, '
                      'test (slices such as train[:98%] need a tfds data set)')
    listing = _list_folder(self._root)
    self.class_names = list(listing.class_names)
    if self._split not in listing.splits:
      raise UserError(f'folder:{path} has no split {split!r}; it has '
                      f'{", ".join(listing.splits)}')
    self._files, self.skipped = listing.splits[self._split]
    if not self._files:
      raise UserError(f'split {split!r} of folder:{path} is empty; it needs more images, or '
                      f'subfolders train, val and test')

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path, label = self._files[index]
    try:
      data = pathlib.Path(self._root, path).read_bytes()
    except OSError as e:
      # The same error as for a broken image, so that a long run survives it the same way.
      raise images.ImageError(f'{path}: {e.strerror}') from e
    return {'image': data, 'label': label, 'id': path}

  def __repr__(self) -> str:
    return f'FolderSource({self._root!r}, {self._split!r})'


@dataclasses.dataclass(frozen=True)
class _Listing:
  """A folder's classes, and for each split its good files (path, label) and the skipped paths."""
  class_names: tuple[str, ...]
  splits: dict[str, tuple[list[tuple[str, int]], list[str]]]


@functools.lru_cache(maxsize=8)
def _list_folder(root: str) -> _Listing:
  """Walks a folder and looks at both ends of every file. Raises `UserError` (see above)."""
  top = pathlib.Path(root)
  layout = _split_folders(top)  # split -> class -> paths below root
  if layout:
    names = sorted(layout.get('train') or set().union(*layout.values()))
    for split, by_class in layout.items():
      if unknown := sorted(set(by_class) - set(names)):
        raise UserError(f'{root}: split {split} has classes that train has not: '
                        f'{", ".join(unknown[:5])}')
    must_have = ['train'] if 'train' in layout else list(layout)
  else:
    by_class = {c.name: _walk(c, top) for c in _folders(top)}
    names = sorted(by_class)
    layout = {split: {c: [p for p in paths if _hash_split(p) == split]
                      for c, paths in by_class.items()} for split in _SPLIT_FOLDERS}
    must_have = list(layout)
  if not any(paths for by_class in layout.values() for paths in by_class.values()):
    raise UserError(f'{root} holds no images; it needs a subfolder of '
                    f'{", ".join(sorted(images.EXTENSIONS))} files for each class')

  splits, seen, index = {}, set(), {name: i for i, name in enumerate(names)}
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # Listing waits for the disk.
    for split, by_class in layout.items():
      files = [(p, index[c]) for c in sorted(by_class) for p in sorted(by_class[c])]
      looks = list(pool.map(lambda file: _looks_good(top / file[0]), files))
      good = [file for file, ok in zip(files, looks) if ok]
      splits[split] = (good, [path for (path, _), ok in zip(files, looks) if not ok])
      seen.update(names[label] for _, label in good if split in must_have)
  if skipped := [path for _, paths in splits.values() for path in paths]:
    logging.warning('%s: skipped %d files that are not whole images: %s%s', root, len(skipped),
                    ', '.join(skipped[:5]), ', ...' if len(skipped) > 5 else '')
  if empty := [name for name in names if name not in seen]:
    where = ' in train' if must_have == ['train'] else ''
    raise UserError(f'{root}: class {", ".join(map(repr, empty[:5]))} has no images{where}; remove '
                    'the folder or fill it')
  return _Listing(tuple(names), splits)


def _split_folders(top: pathlib.Path) -> dict[str, dict[str, list[str]]]:
  """Finds PATH/{train,val,...}/CLASS; empty when PATH holds the classes themselves."""
  layout = {}
  for split, names in _SPLIT_FOLDERS.items():
    # A class may well be called "test": a split folder is one with folders in it.
    found = [top / n for n in names if (top / n).is_dir() and _folders(top / n)]
    if len(found) > 1:
      raise UserError(f'{top} has both {" and ".join(f.name for f in found)}; keep one of them')
    if found:
      layout[split] = {c.name: _walk(c, top) for c in _folders(found[0])}
  return layout


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith('.'))


def _walk(folder: pathlib.Path, root: pathlib.Path) -> list[str]:
  """Paths below `root`, with forward slashes, of the images anywhere in a class folder."""
  found = []
  for directory, names, files in os.walk(folder, followlinks=True):
    names[:] = [n for n in names if not n.startswith('.')]
    found += [pathlib.Path(directory, f).relative_to(root).as_posix() for f in files
              if not f.startswith('.') and os.path.splitext(f)[1].lower() in images.EXTENSIONS]
  return found


def _hash_split(path: str) -> str:
  """80/10/10 by the hash of a path."""
  bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], 'big') % 10
  return 'train' if bucket < 8 else 'validation' if bucket == 8 else 'test'


def _looks_good(path: pathlib.Path) -> bool:
  """Looks at both ends of a file, and at all of it only when they leave doubt."""
  try:
    with path.open('rb') as f:
      head = f.read(16)
      size = f.seek(0, os.SEEK_END)
      f.seek(max(0, size - images.TAIL))
      if images.looks_complete(head, f.read(), size):
        return True
      if images.kind(head) is None:
        return False
      f.seek(0)
      return images.is_complete(f.read())
  except OSError:
    return False
