"""Pairs of sentences: tab-separated files, and tfds data sets with two texts.

`tsv:PATH` names UTF-8 files of lines SOURCE<tab>TARGET, without a header. PATH is one of

  a pattern with {split} in it, such as data/en-de.{split}.tsv,
  a folder that holds SPLIT.tsv,
  one file, which is split by line number: of every 20 lines the 10th is validation, the 20th test,
    the others train.

Where there is no `validation`, `val` is taken, and the other way round.

Every other name is a data set of `core.data.sources`: `numbers_en_de` and `numbers_en_ko`, which
are embedded, or one of tfds, such as `wmt14_translate/de-en`.
"""

import functools
import mmap
import os
import pathlib
import re
from typing import Protocol

import ml_collections
import numpy as np

from core.config import UserError
from core.data import sources

Pair = dict[str, str]

_BLOCK = 2**24  # Bytes that are checked at once.
_ALSO_CALLED = {'validation': 'val', 'val': 'validation'}
_SLICE = re.compile(r'([^\[\]]+?)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?')


class Pairs(Protocol):
  """Random access to pairs `{'source': str, 'target': str}`; picklable, safe in threads."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Pair: ...


def open_pairs(data: ml_collections.ConfigDict, split: str) -> Pairs:
  """Opens one split of what `config.data` names.

  Args:
    data: `name` (see the top of this file), `data_dir` (of tfds data sets, may be None), `source`
      and `target` (languages such as 'en'; a tsv file has its source in the first column
      whatever they are).
    split: such as `train`, or a slice of one: `train[:2000]`, `train[90%:]`.

  Raises:
    UserError: the data or the split is not there, or is not made of pairs; says what would be
      right. The whole of a tsv file is checked.
  """
  if data.name.startswith('tsv:'):
    return _open_tsv(data.name.removeprefix('tsv:'), split)
  source = sources.open_source(data.name, split, data_dir=data.data_dir)
  if {data.source, data.target} <= set(source.features) and data.source != data.target:
    return SourcePairs(source, data.source, data.target)
  if not {'source', 'target'} <= set(source.features):
    raise UserError(f'config.data.source={data.source!r} and target={data.target!r}: data set '
                    f'{data.name!r} has {", ".join(source.features)}')
  if match := re.match(r'(?:tfds:)?numbers_([a-z]+)_([a-z]+)', data.name):
    if (data.source, data.target) == match.groups()[::-1]:
      return SourcePairs(source, 'target', 'source')
    if (data.source, data.target) != match.groups():
      raise UserError(f'config.data.source={data.source!r} and target={data.target!r}: data set '
                      f'{data.name!r} has {" and ".join(match.groups())}')
  return SourcePairs(source, 'source', 'target')


class SourcePairs:
  """Two text features of a data set."""

  def __init__(self, source: sources.TfdsSource, source_key: str, target_key: str):
    self._source, self._keys = source, {'source': source_key, 'target': target_key}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Pair:
    example = self._source[index]
    return {side: _text(example[key]) for side, key in self._keys.items()}

  def __repr__(self) -> str:
    return f'SourcePairs({self._source!r}, {self._keys["source"]!r}, {self._keys["target"]!r})'


def _text(value: str | bytes) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else value


# --- Tab-separated files -------------------------------------------------------------------------


class TsvPairs:
  """Lines of a file that was checked. The file is mapped, not read; a line is decoded when asked.

  Costs eight bytes a pair.
  """

  def __init__(self, path: str, starts: np.ndarray, size: int):
    """Maps the file.

    Args:
      path: of the file.
      starts: int64 `[pairs]`, where the lines begin, in bytes.
      size: of the file in bytes when it was checked.

    Raises:
      UserError: the file is gone, or of another size now.
    """
    self._path, self._starts, self._size = path, starts, size
    try:
      with open(path, 'rb') as file:
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
      raise UserError(f'{path} cannot be read: {e}') from e
    if len(self._bytes) != size:
      raise UserError(f'{path} changed while it was in use: {len(self._bytes):,} bytes, it had '
                      f'{size:,}')

  def __reduce__(self):
    return TsvPairs, (self._path, self._starts, self._size)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, index: int) -> Pair:
    start = int(self._starts[index])
    end = self._bytes.find(b'\n', start)
    line = self._bytes[start:self._size if end < 0 else end].removesuffix(b'\r')
    source, target = line.decode('utf-8').split('\t')
    return {'source': source, 'target': target}

  def __repr__(self) -> str:
    return f'TsvPairs({self._path!r}, {len(self)} pairs)'


def _open_tsv(path: str, split: str) -> TsvPairs:
  match = _SLICE.fullmatch(split)
  if not match:
    raise UserError(f'split {split!r} of tsv:{path}: write a name, or a slice of one such as '
                    'train[:2000] or train[90%:]')
  name, low, high = match.groups()
  file, by_line = _find(path, name)
  stat = file.stat()
  starts = _check(os.fspath(file), stat.st_size, stat.st_mtime_ns)
  if by_line:
    number = np.arange(1, len(starts) + 1) % 20
    starts = starts[{'validation': number == 10, 'test': number == 0,
                     'train': (number != 10) & (number != 0)}[name]]
  chosen = starts[_bound(low, len(starts)):_bound(high, len(starts))]
  if not len(chosen):
    raise UserError(f'split {split!r} of tsv:{path} is empty; {name} has {len(starts):,} pairs')
  return TsvPairs(os.fspath(file), chosen, stat.st_size)


def _bound(text: str | None, count: int) -> int | None:
  """One end of a slice; percentages are rounded to the nearest pair, as tfds does."""
  if text is None:
    return None
  return round(int(text[:-1]) * count / 100) if text.endswith('%') else int(text)


def _find(path: str, split: str) -> tuple[pathlib.Path, bool]:
  """The file of a split, and whether it is one file for all splits."""
  top = pathlib.Path(path).expanduser()
  names = (split, *filter(None, [_ALSO_CALLED.get(split)]))
  if '{split}' in path:
    for name in names:
      filled = pathlib.Path(os.fspath(top).replace('{split}', name))
      if filled.is_file():
        return filled, False
    before, _, after = top.name.partition('{split}')
    raise _no_split(path, split, top.parent, before, after.replace('{split}', '*'))
  if top.is_dir():
    for name in names:
      if (top / f'{name}.tsv').is_file():
        return top / f'{name}.tsv', False
    raise _no_split(path, split, top, '', '.tsv')
  if not top.is_file():
    beside = sorted(f.name for f in top.parent.glob('*.tsv')) if top.parent.is_dir() else []
    raise UserError(f'tsv:{path}: no such file or folder; beside it there are '
                    f'{", ".join(beside[:20]) or "no .tsv files"}')
  if split not in ('train', 'validation', 'test'):
    raise UserError(f'split {split!r} of tsv:{path} does not exist; one file is split into train, '
                    'validation and test')
  return top, True


def _no_split(path: str, split: str, folder: pathlib.Path, before: str, after: str) -> UserError:
  names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
  found = [n[len(before):len(n) - len(after)] for n in names
           if n.startswith(before) and n.endswith(after) and len(n) > len(before) + len(after)]
  return UserError(f'split {split!r} of tsv:{path} does not exist; there is '
                   f'{", ".join(found[:20]) or f"no such file in {folder}"}')


@functools.lru_cache(maxsize=8)
def _check(path: str, size: int, changed: int) -> np.ndarray:
  """Reads a whole file, once while it stays as it is.

  Args:
    path: of the file.
    size, changed: bytes and time of the last change, by which a changed file is known.

  Returns:
    Where its lines begin, int64 `[lines]`.

  Raises:
    UserError: names the first line that is not a pair, and how many others there are like it.
  """
  del changed
  if not size:
    raise UserError(f'{path} is empty; it needs lines SOURCE<tab>TARGET')
  found, position, lines = [], 0, 0
  with open(path, 'rb') as file:
    if file.read(3) == b'\xef\xbb\xbf':  # A byte order mark, which Windows programs write.
      position = 3
    file.seek(position)
    while block := file.read(_BLOCK):
      block += file.readline()  # Up to the end of a line.
      starts = _check_block(path, block, lines)
      found.append(starts + position)
      position += len(block)
      lines += len(starts)
  starts = np.concatenate(found) if found else np.zeros(0, np.int64)
  if not len(starts):
    raise UserError(f'{path} is empty; it needs lines SOURCE<tab>TARGET')
  starts.flags.writeable = False
  return starts


def _check_block(path: str, block: bytes, lines_before: int) -> np.ndarray:
  """Checks whole lines; where they begin in the block, int64 `[lines]`."""
  values = np.frombuffer(block, np.uint8)
  ends = np.flatnonzero(values == ord('\n'))
  if not block.endswith(b'\n'):
    ends = np.append(ends, len(block))
  starts = np.append(0, ends[:-1] + 1)

  def fail(line: int, what: str) -> UserError:
    return UserError(f'{path}:{lines_before + line + 1}: {what}')

  try:
    block.decode('utf-8')
  except UnicodeDecodeError as e:
    line = int(np.searchsorted(ends, e.start))
    raise fail(line, f'byte {e.start - starts[line] + 1} of the line, 0x{block[e.start]:02x}, is '
               'not UTF-8; convert the file, e.g. with iconv -t UTF-8') from e
  tabs = np.flatnonzero(values == ord('\t'))
  columns = np.diff(np.searchsorted(tabs, np.append(starts, len(block)))) + 1
  if wrong := np.flatnonzero(columns != 2).tolist():
    raise fail(wrong[0], f'{columns[wrong[0]]} columns where a line is SOURCE<tab>TARGET (and '
               f'{len(wrong) - 1:,} more such lines of {len(starts):,}); '
               "awk -F'\\t' 'NF==2' keeps the lines that are right")
  # A side of spaces alone is as good as none. Only sides that begin with what may be a space, or
  # with the tab or end of line itself, are looked at.
  values = np.append(values, np.uint8(ord('\n')))
  for side, begin, end in (('source', starts, tabs), ('target', tabs + 1, ends)):
    first = values[begin]
    for line in np.flatnonzero((first <= ord(' ')) | np.isin(first, (0xc2, 0xe1, 0xe2, 0xe3))):
      if not block[begin[line]:end[line]].decode('utf-8').strip():
        raise fail(int(line), f'the {side} is empty; remove the line')
  return starts
