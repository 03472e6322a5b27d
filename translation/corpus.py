"""Encoded pairs on disk, and how they become examples of fixed lengths.

A folder holds, for `source` and for `target`, all ids one after the other and where each sentence
begins, as `.npy` files that are mapped into memory and not read. From them examples are made in
one of two ways: a pair an example, padded to the shortest of a few lengths that fits (`Bucketed`),
or as many pairs as fit into rows of one length (`Packed`).
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from core.config import UserError
from translation.pairs import Pairs
from translation.vocabulary import EOS, Vocabulary

SIDES = ('source', 'target')

_CHUNK = 2**14  # Pairs that are encoded at once.
_LENGTHS = 'lengths.npy'
_ABOUT = 'about.json'


def encode(pairs: Pairs, source_vocab: Vocabulary, target_vocab: Vocabulary, path: pathlib.Path,
           limit: int) -> None:
  """Encodes all pairs into a folder, which appears when it is whole and replaces an older one.

  Ids take two bytes, or four where a vocabulary has more than 65,536 pieces.

  Args:
    pairs: at least one.
    source_vocab, target_vocab: of the two sides; may be the same.
    path: the folder.
    limit: tokens, EOS included, that are kept of a sentence; what is longer is cut, and ends with
      EOS none the less. The lengths on disk are those before the cut, so that training can leave
      such pairs out.
  """
  if limit < 2:
    raise ValueError(f'limit={limit} leaves no room for a token and EOS')
  vocabularies = (source_vocab, target_vocab)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _appearing(path) as folder, contextlib.ExitStack() as files:
    dtypes = [np.uint16 if len(v) <= 2**16 else np.uint32 for v in vocabularies]
    ids = [files.enter_context(_GrowingArray(folder / f'{side}.ids.npy', dtype))
           for side, dtype in zip(SIDES, dtypes)]
    offsets = [np.zeros(len(pairs) + 1, np.int64) for _ in SIDES]
    lengths = np.zeros((len(pairs), 2), np.int32)
    bar = files.enter_context(tqdm.tqdm(
        total=len(pairs), desc=f'encode {path.name}', unit='pair', unit_scale=True, delay=5,
        mininterval=.5 if sys.stderr.isatty() else 30))
    for start in range(0, len(pairs), _CHUNK):
      chunk = [pairs[i] for i in range(start, min(start + _CHUNK, len(pairs)))]
      rows = slice(start, start + len(chunk))
      for s, (side, vocabulary) in enumerate(zip(SIDES, vocabularies)):
        sentences = vocabulary.encode([pair[side] for pair in chunk])
        lengths[rows, s] = [len(sentence) + 1 for sentence in sentences]
        kept = [[*sentence[:limit - 1], EOS] for sentence in sentences]
        sizes = np.fromiter(map(len, kept), np.int64, len(kept))
        ids[s].append(np.fromiter(itertools.chain.from_iterable(kept), dtypes[s], sizes.sum()))
        offsets[s][start + 1:start + len(chunk) + 1] = offsets[s][start] + np.cumsum(sizes)
      bar.update(len(chunk))
    for side, values in zip(SIDES, offsets):
      np.save(folder / f'{side}.offsets.npy', values, allow_pickle=False)
    np.save(folder / _LENGTHS, lengths, allow_pickle=False)
    (folder / _ABOUT).write_text(json.dumps(about(pairs, source_vocab, target_vocab, limit)))


def about(pairs: Pairs, source_vocab: Vocabulary, target_vocab: Vocabulary,
          limit: int) -> dict[str, Any]:
  """What tells one encoding from another: see `Encoded.about`."""
  sample = hashlib.sha256()
  for i in np.unique(np.linspace(0, len(pairs) - 1, 1000).astype(int)):
    sample.update('\t'.join(pairs[int(i)].values()).encode())
  return {'pairs': len(pairs), 'sample': sample.hexdigest()[:16], 'limit': limit,
          'source': source_vocab.fingerprint, 'target': target_vocab.fingerprint}


class Encoded:
  """The pairs of one folder.

  Attributes:
    lengths: int32 `[pairs, 2]`, tokens of source and target with EOS, before any cut.
    about: what was encoded: `pairs`, a hash of a `sample` of their text, `limit`, and the
      fingerprints of the vocabularies as `source` and `target`.
  """

  def __init__(self, path: pathlib.Path):
    """Maps the files. Raises `ValueError` or `OSError` when they are not what `encode` writes."""
    self._path = path
    self.about = json.loads((path / _ABOUT).read_text())
    self.lengths = _mapped(path / _LENGTHS)
    self._ids = [_mapped(path / f'{side}.ids.npy') for side in SIDES]
    self._offsets = [_mapped(path / f'{side}.offsets.npy') for side in SIDES]
    count = self.about['pairs']
    if self.lengths.shape != (count, 2) or any(
        len(offsets) != count + 1 or offsets[-1] != len(ids)
        for offsets, ids in zip(self._offsets, self._ids)):
      raise ValueError('its files do not belong together')

  def __reduce__(self):
    return open_encoded, (self._path,)

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target ids, int32, each with EOS at its end."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    source, target = (ids[offsets[index]:offsets[index + 1]].astype(np.int32)
                      for ids, offsets in zip(self._ids, self._offsets))
    return source, target

  def __repr__(self) -> str:
    return f'Encoded({os.fspath(self._path)!r}, {len(self)} pairs)'


def open_encoded(path: pathlib.Path) -> Encoded:
  """Opens what `encode` wrote.

  Raises:
    UserError: the folder is not there, or not whole.
  """
  try:
    return Encoded(path)
  except FileNotFoundError as e:
    raise UserError(f'encoded pairs {path}: {e.filename} is not there; --mode=prepare makes it'
                    ) from e
  except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
    raise UserError(f'encoded pairs {path} are damaged ({e}); remove the folder, and '
                    '--mode=prepare makes it anew') from e


class Bucketed:
  """One pair an example, padded to the smallest of a few lengths that holds both its sides.

  Attributes:
    buckets: int32 `[len]`, the index of that length for each example.
    left_out: int32, numbers of the pairs that are too long for all of them, ascending.
  """

  def __init__(self, encoded: Encoded, lengths: tuple[int, ...]):
    """Sorts the pairs into buckets.

    Args:
      encoded: the pairs.
      lengths: in tokens, EOS included, ascending.

    Raises:
      UserError: lengths that do not ascend, or are longer than the encoded pairs were cut to.
    """
    if not lengths or min(lengths) < 1 or any(a >= b for a, b in itertools.pairwise(lengths)):
      raise UserError(f'bucket lengths {tuple(lengths)} must be at least one, and ascend from 1 on')
    _check_length(encoded, lengths[-1])
    self._encoded, self._lengths = encoded, tuple(lengths)
    buckets = np.searchsorted(np.asarray(lengths), encoded.lengths.max(1))
    fits = buckets < len(lengths)
    self._kept = np.flatnonzero(fits).astype(np.int32)
    self.buckets = buckets[fits].astype(np.int32)
    self.left_out = np.flatnonzero(~fits).astype(np.int32)

  def __reduce__(self):
    return Bucketed, (self._encoded, self._lengths)

  def __len__(self) -> int:
    return len(self._kept)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """`source` and `target` int32 `[length of the bucket]`, `pair` int32: its number in `encoded`.
    """
    pair = self._kept[index]
    length = self._lengths[self.buckets[index]]
    example = {'pair': pair}
    for side, ids in zip(SIDES, self._encoded[pair]):
      example[side] = np.zeros(length, np.int32)
      example[side][:len(ids)] = ids
    return example

  def __repr__(self) -> str:
    return f'Bucketed({self._encoded!r}, {self._lengths})'


class Packed:
  """Rows of one length that hold several pairs, each a segment.

  Pairs are taken in random order, and each is put into the first open row where both its sides
  still fit.

  Attributes:
    left_out: int32, numbers of the pairs that are longer than a row, ascending.
    fill: share of the positions that hold tokens, of sources and of targets.
  """

  def __init__(self, encoded: Encoded, length: int, seed: int):
    """Packs all pairs; a few seconds for millions.

    Args:
      encoded: the pairs.
      length: of a row in tokens, for each side.
      seed: of the order, and so of what shares a row.

    Raises:
      UserError: the length is longer than the encoded pairs were cut to.
    """
    _check_length(encoded, length)
    self._encoded, self._length, self._seed = encoded, length, seed
    lengths = np.asarray(encoded.lengths)
    fits = lengths.max(1, initial=0) <= length
    self.left_out = np.flatnonzero(~fits).astype(np.int32)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(fits).astype(np.int32))
    row = first_fit(lengths[order], length)
    by_row = np.argsort(row, kind='stable')
    self._members = order[by_row]
    self._starts = np.searchsorted(row[by_row], np.arange(row.max(initial=-1) + 2))
    room = max(len(self) * length, 1)
    self.fill = tuple(float(n) / room for n in lengths[order].sum(0, dtype=np.int64))

  def __reduce__(self):
    return Packed, (self._encoded, self._length, self._seed)

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """`source`, `target`, `source_segments`, `target_segments`, int32 `[length]`.

    Segments count from 1; 0 is padding.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    pairs = self._members[self._starts[index]:self._starts[index + 1]]
    columns = zip(*(self._encoded[pair] for pair in pairs))
    example = {}
    for side, sentences in zip(SIDES, columns):
      sizes = [len(sentence) for sentence in sentences]
      example[side] = np.zeros(self._length, np.int32)
      example[side][:sum(sizes)] = np.concatenate(sentences)
      example[f'{side}_segments'] = np.zeros(self._length, np.int32)
      example[f'{side}_segments'][:sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return example

  def __repr__(self) -> str:
    return f'Packed({self._encoded!r}, {self._length}, {self._seed})'


def first_fit(lengths: np.ndarray, length: int, open_rows: int = 32,
              stream: int = 8192) -> np.ndarray:
  """Puts each pair into the first of a few open rows where both its sides still fit.

  Where none has room, the fullest row is closed and a new one opened in its place. The pairs are
  dealt into streams that are packed side by side, each with open rows of its own: that is what
  makes it fast.

  Args:
    lengths: int32 `[pairs, 2]`, none above `length`.
    length: room of a row, for each side.
    open_rows: of a stream.
    stream: pairs of a stream.

  Returns:
    int64 `[pairs]`: the row of each, numbered from 0 without gaps.
  """
  count = len(lengths)
  streams = max(1, count // stream)
  steps = -(-count // streams)
  sizes = np.zeros((steps * streams, 2), np.int32)
  sizes[:count] = lengths
  sizes = sizes.reshape(steps, streams, 2)
  used = np.zeros((streams, open_rows, 2), np.int32)
  names = np.arange(streams * open_rows).reshape(streams, open_rows)  # Of the open rows.
  opened, every = names.size, np.arange(streams)
  rows = np.empty((steps, streams), np.int64)
  for step in range(steps):
    fits = (used + sizes[step, :, None] <= length).all(-1)
    chosen = fits.argmax(-1)
    full = np.flatnonzero(~fits.any(-1))
    if full.size:
      chosen[full] = used[full].sum(-1).argmax(-1)
      used[full, chosen[full]] = 0
      names[full, chosen[full]] = opened + np.arange(full.size)
      opened += full.size
    used[every, chosen] += sizes[step]
    rows[step] = names[every, chosen]
  return np.unique(rows.reshape(-1)[:count], return_inverse=True)[1]


def _check_length(encoded: Encoded, length: int) -> None:
  limit, longest = encoded.about['limit'], encoded.lengths.max(1)
  if ((longest > limit) & (longest <= length)).any():
    raise UserError(f'sentences of up to {length} tokens are wanted, but {encoded!r} has them cut '
                    f'to {limit}; encode them anew with a higher limit')


class _GrowingArray:
  """A one-dimensional `.npy` file that is written piece by piece."""

  def __init__(self, path: pathlib.Path, dtype: type):
    self._file, self._dtype, self._count = path.open('wb'), np.dtype(dtype), 0
    self._header()

  def _header(self) -> None:
    # numpy leaves room in the header for a longer shape, so a later one fits over the first.
    np.lib.format.write_array_header_1_0(self._file, {
        'descr': np.lib.format.dtype_to_descr(self._dtype), 'fortran_order': False,
        'shape': (self._count,)})

  def append(self, values: np.ndarray) -> None:
    values.tofile(self._file)
    self._count += len(values)

  def __enter__(self) -> '_GrowingArray':
    return self

  def __exit__(self, *exception) -> None:
    with self._file:
      self._file.seek(0)
      self._header()


def _mapped(path: pathlib.Path) -> np.ndarray:
  # A plain view: slices of numpy's own class for maps cost ten times as much.
  return np.load(path, mmap_mode='r', allow_pickle=False).view(np.ndarray)


@contextlib.contextmanager
def _appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a new folder beside `path`, which takes its place when the block ends well."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)  # Of a killed process that had this number.
  temporary.mkdir()
  try:
    yield temporary
    if path.exists():
      shutil.rmtree(path)
    temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
