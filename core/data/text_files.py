"""Text files, line by line."""

import gzip
import pathlib
import sys
import zlib
from collections.abc import Iterator

import tqdm

from core.config import UserError


def lines(path: pathlib.Path, encoding: str = 'UTF-8') -> Iterator[tuple[int, str]]:
  """The lines of a text file (`.gz`: compressed), without their ends, and their numbers from 1.

  Lines end with '\\n' or '\\r\\n' alone: names may hold Unicode's other ends of lines.

  Args:
    path: the file.
    encoding: 'UTF-8', or one in which every byte is a character.

  Raises:
    UserError: the file is not there, cannot be read, is no gzip file or is cut short; a line is not
      UTF-8 or has a byte of value 0, and the message has its number.
  """
  try:
    with path.open('rb') as raw, tqdm.tqdm(
        total=path.stat().st_size, desc=f'read {path.name}', unit='B', unit_scale=True, delay=5,
        mininterval=.5 if sys.stderr.isatty() else 30) as bar:
      file = gzip.open(raw) if path.suffix == '.gz' else raw
      for number, line in enumerate(file, 1):
        if not number % 2**16:
          bar.update(raw.tell() - bar.n)  # Of a compressed file, bytes as they are on disk.
        try:
          text = line.decode(encoding)
        except UnicodeDecodeError as e:
          raise UserError(f'{path}:{number}: byte {e.start + 1} of the line, '
                          f'0x{line[e.start]:02x}, is not UTF-8; convert the file, e.g. with iconv '
                          '-t UTF-8') from e
        if '\0' in text:  # numpy's strings would lose it.
          raise UserError(f'{path}:{number}: a byte of value 0; is this a text file in {encoding}?')
        if number == 1:
          text = text.removeprefix('\ufeff')  # Which Windows programs write.
        yield number, text.rstrip('\r\n')
      bar.update(raw.tell() - bar.n)
  except FileNotFoundError as e:
    raise UserError(f'{path}: no such file') from e
  except (gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise UserError(f'{path}: not a gzip file, or one that is cut short or damaged') from e
  except OSError as e:
    raise UserError(f'{path}: cannot be read ({e.strerror})') from e
