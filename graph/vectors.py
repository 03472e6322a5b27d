"""Vectors of nodes in files: word2vec's text and binary format, as the authors' code leaves them.

Both begin with a line `vocab dim`. In text a row is `token v1 ... vdim` and a line break; in binary
it is the token, a space, dim little-endian float32 and a line break. Tokens are UTF-8.
"""

import itertools
import mmap
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import tqdm

from core.config import UserError
from core.weights import Weight, Weights, appearing

_ROWS = 4096  # At a time.
_TOKEN = 1000  # The most bytes in the token of a binary row.
# No text has these bytes; of those of float32 numbers, every tenth is one.
_CONTROL = re.compile(rb'[\x00-\x08\x0e-\x1f\x7f]')


def write_text(path: pathlib.Path, tokens: Sequence[str], vectors: np.ndarray) -> None:
  """Writes a text file, whole or not at all. Its digits are enough to be exact in float32.

  Args:
    path: the file.
    tokens: str `[nodes]` without white space.
    vectors: float32 `[nodes, dim]`.

  Raises:
    UserError: a token that is empty or has white space, or a number that is not finite.
  """
  row = '%s' + ' %.9g' * vectors.shape[1] + '\n'
  with appearing(path) as temporary, temporary.open('wb') as file:
    file.write(b'%d %d\n' % vectors.shape)
    for names, values in _chunks(path, tokens, vectors):
      file.write(''.join(row % (name, *numbers)
                         for name, numbers in zip(names, values.tolist())).encode())


def write_binary(path: pathlib.Path, tokens: Sequence[str], vectors: np.ndarray) -> None:
  """Writes a binary file, otherwise as `write_text`."""
  size = 4 * vectors.shape[1]
  with appearing(path) as temporary, temporary.open('wb') as file:
    file.write(b'%d %d\n' % vectors.shape)
    for names, values in _chunks(path, tokens, vectors):
      data = values.astype('<f4').tobytes()
      file.write(b''.join(b'%b %b\n' % (name.encode(), data[i * size:(i + 1) * size])
                          for i, name in enumerate(names)))


def _chunks(path: pathlib.Path, tokens: Sequence[str],
            vectors: np.ndarray) -> Iterator[tuple[list[str], np.ndarray]]:
  if len(tokens) != len(vectors):
    raise ValueError(f'{len(tokens)} tokens for {len(vectors)} vectors')
  with _bar(f'write {path.name}', len(tokens)) as bar:
    for start in range(0, len(tokens), _ROWS):
      names = [str(name) for name in tokens[start:start + _ROWS]]
      values = np.asarray(vectors[start:start + _ROWS], np.float32)
      for name in names:
        if name.split() != [name]:
          raise UserError(f'{path}: the token {name!r} is empty or has white space, which ends '
                          'tokens there')
      if not np.isfinite(values).all():
        name = names[int(np.argmin(np.isfinite(values).all(axis=1)))]
        raise UserError(f'{path}: the vector of {name!r} is not finite; nothing is written')
      yield names, values
      bar.update(len(names))


def read(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
  """Reads a file of either format; its content says which it is.

  Returns:
    tokens `[vocab]` and their vectors float32 `[vocab, dim]`.

  Raises:
    UserError: no such file, not one of these formats, cut short, rows that are not as the header
      says, a number that is none or not finite, or one token twice; with the line (in binary the
      row, from 1).
  """
  try:
    with path.open('rb') as file:
      rows, dim = _header(path, file)
      first = file.tell()
      beginning = file.readline(1 << 16)
      text = _is_row(beginning, dim) or not _is_binary(beginning + file.read(1 << 12))
      file.seek(first)
      tokens, vectors = (_read_text if text else _read_binary)(path, file, rows, dim)
  except OSError as e:
    raise UserError(f'{path}: cannot be read ({e.strerror or e})') from e
  what, offset = ('line', 2) if text else ('row', 1)
  if len(set(tokens)) < rows:
    places: dict[str, int] = {}
    for i, token in enumerate(tokens):
      if token in places:
        raise UserError(f'{path}, {what} {i + offset}: {token!r} is also in {what} '
                        f'{places[token] + offset}; a token must occur once')
      places[token] = i
  finite = np.isfinite(vectors).all(axis=1)
  if not finite.all():
    i = int(np.argmin(finite))
    raise UserError(f'{path}, {what} {i + offset}: the vector of {tokens[i]!r} has a number that '
                    'is not finite')
  return tokens, vectors


def _header(path: pathlib.Path, file: BinaryIO) -> tuple[int, int]:
  line = file.readline(100)
  match = re.fullmatch(rb'(\d+) (\d+)\s*\n', line)
  if not match or not int(match[2]):
    raise UserError(f"{path}, line 1: not 'vocab dim', two numbers, as word2vec files begin")
  rows, dim = int(match[1]), int(match[2])
  # In either format a row takes this much; a damaged header must not ask for all memory.
  if rows * 2 * (dim + 1) > (size := path.stat().st_size):
    raise UserError(f'{path}, line 1: {rows} vectors of {dim} numbers are more than a file of '
                    f'{size:,} bytes can hold; it is cut short, or its header is wrong')
  return rows, dim


def _is_row(line: bytes, dim: int) -> bool:
  """Whether this is a row of a text file."""
  try:
    return len([float(number) for number in line.split()[1:]]) == dim
  except ValueError:
    return False


def _is_binary(data: bytes) -> bool:
  """Whether this is no text at all, not even a damaged one."""
  if _CONTROL.search(data):
    return True
  try:
    data.decode()
  except UnicodeDecodeError as e:
    return e.start < len(data) - 3  # The last letter may be cut.
  return False


def _read_text(path: pathlib.Path, file: BinaryIO, rows: int,
               dim: int) -> tuple[list[str], np.ndarray]:
  tokens, vectors = [], np.empty((rows, dim), np.float32)
  with _bar(f'read {path.name}', rows) as bar:
    while len(tokens) < rows:
      done = len(tokens)
      lines = list(itertools.islice(file, min(_ROWS, rows - done)))
      if not lines:
        raise UserError(f'{path}: ends after line {done + 1}, with {done} of {rows} vectors; it is '
                        'cut short')
      if not lines[-1].endswith(b'\n'):
        raise UserError(f'{path}, line {done + len(lines) + 1}: ends within the line; it is cut '
                        'short')
      parts = [line.split(None, 1) for line in lines]
      try:
        # Counted, since a number too many and one too few would shift what is between them.
        if any(len(part) != 2 or len(part[1].split()) != dim for part in parts):
          raise ValueError
        with warnings.catch_warnings():
          warnings.simplefilter('error')  # What is no number, ends what is read, with a warning.
          values = np.fromstring(b' '.join(part[1] for part in parts), np.float32, sep=' ')
        vectors[done:done + len(parts)] = values.reshape(-1, dim)
        tokens += [part[0].decode() for part in parts]
      except (ValueError, DeprecationWarning) as e:
        for number, line in enumerate(lines, done + 2):
          _check_line(f'{path}, line {number}', line, dim)
        raise UserError(f'{path}: lines {done + 2} to {number} cannot be read ({e})') from e
      bar.update(len(parts))
  if file.read().strip():
    raise UserError(f'{path}, line {rows + 2}: goes on after the {rows} vectors that line 1 says')
  return tokens, vectors


def _check_line(where: str, line: bytes, dim: int) -> None:
  try:
    numbers = line.decode().split()[1:]
  except UnicodeDecodeError as e:
    raise UserError(f'{where}: not UTF-8') from e
  if len(numbers) != dim:
    raise UserError(f'{where}: {len(numbers)} numbers after the token, not {dim} as line 1 says')
  for number in numbers:
    try:
      float(number)
    except ValueError as e:
      raise UserError(f'{where}: {number[:40]!r} is no number') from e


def _read_binary(path: pathlib.Path, file: BinaryIO, rows: int,
                 dim: int) -> tuple[list[str], np.ndarray]:
  tokens, vectors = [], np.empty((rows, dim), np.float32)
  position, size = file.tell(), 4 * dim
  with (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        _bar(f'read {path.name}', rows) as bar):
    while len(tokens) < rows:
      done, values = len(tokens), []
      for row in range(done + 1, min(done + _ROWS, rows) + 1):
        space = data.find(b' ', position, position + _TOKEN)
        end = space + 1 + size
        if end > len(data) or space < 0 and len(data) < position + _TOKEN:
          raise UserError(f'{path}, row {row} of {rows}: ends within it; it is cut short')
        token = data[position:max(space, position)].decode(errors='replace')
        if token.split() != [token] or '\N{REPLACEMENT CHARACTER}' in token:
          raise UserError(f'{path}, row {row}: begins with no token; it is damaged, or its vectors '
                          f'do not have the {dim} numbers that line 1 says')
        tokens.append(token)
        values.append(data[space + 1:end])
        position = end + (data[end:end + 1] == b'\n')  # Some programs leave it out.
      vectors[done:len(tokens)] = np.frombuffer(b''.join(values), '<f4').reshape(-1, dim)
      bar.update(len(values))
    if position < len(data):
      raise UserError(f'{path}: goes on after row {rows}, the last that line 1 says; it is '
                      'damaged, or its header is wrong')
  return tokens, vectors


def _bar(what: str, rows: int) -> tqdm.tqdm:
  return tqdm.tqdm(total=rows, desc=what, unit=' nodes', unit_scale=True, delay=5,
                   mininterval=.5 if sys.stderr.isatty() else 30)


def open_weights(path: pathlib.Path, tokens: np.ndarray, rows: int) -> Weights:
  """The vectors of a file as parameters: of word2vec or gensim, to evaluate them or to go on.

  Args:
    path: either format.
    tokens: str `[nodes]`, of the graph.
    rows: of the tables.

  Raises:
    UserError: the file has a token that is no node of the graph.
  """
  names, values = read(path)
  ids = {token: at for at, token in enumerate(tokens.tolist())}
  unknown = [name for name in names if name not in ids and name != '</s>']  # word2vec's own row
  if unknown:
    raise UserError(f'{path}: {len(unknown):,} of its {len(names):,} tokens are no nodes of the '
                    f'graph, such as {unknown[0]!r}; those look like {tokens[0]!r}')
  there = np.array([ids[name] for name in names if name in ids], np.int64)
  vectors = values[[name in ids for name in names]]

  def table(shape, dtype, some):
    found = np.zeros(shape, dtype)
    found[there] = some
    return found
  dim = values.shape[1]
  return {'input': Weight((rows, dim), lambda: table((rows, dim), np.float32, vectors)),
          # A file of word2vec has no output table.
          'output': Weight((rows, dim), lambda: np.zeros((rows, dim), np.float32)),
          'counts': Weight((rows,), lambda: table((rows,), np.int32, 1))}
