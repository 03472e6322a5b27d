"""Files of arrays that `prepare` makes once and keeps in the workdir."""

import contextlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from core.config import UserError
from core.weights import appearing


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a `.npz` whole or not at all. Raises `TypeError` for what numpy would pickle."""
  for name, array in arrays.items():
    if array.dtype.hasobject:
      raise TypeError(f'{name}: numpy would pickle {array.dtype}')
  path.parent.mkdir(parents=True, exist_ok=True)
  with appearing(path) as temporary, temporary.open('wb') as file:
    np.savez(file, **arrays)


@contextlib.contextmanager
def opened(path: pathlib.Path, what: str) -> Iterator[Mapping[str, np.ndarray]]:
  """Yields the arrays that `save` wrote; `what` they are, such as 'log', is for errors.

  Raises:
    UserError: no such file, or a damaged one: that cannot be read, or with arrays for which the
      block raises such as a `ValueError`.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      yield arrays
  except FileNotFoundError as e:
    raise UserError(f'{path}: no such file; --mode=prepare makes it') from e
  # What numpy and zipfile raise for what is cut short, changed or something else altogether.
  except (ValueError, LookupError, OSError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile,
          zlib.error) as e:
    raise UserError(f'{path}: damaged, or no {what} that --mode=prepare wrote; remove it and that '
                    'makes it anew') from e


def check_same(path: pathlib.Path, made_of: str, now: Mapping[str, Any]) -> None:
  """Raises a `UserError` unless a file was made with the settings of `config.data` that are now.

  `made_of` is the JSON of those that it was made with. All that it depends on is compared.
  """
  try:
    before = json.loads(made_of)
    different = [f'{key}={before[key]!r} (now {now[key]!r})' for key in now
                 if before[key] != now[key]]
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path} does not say what it was made of; remove it and --mode=prepare makes '
                    'it anew') from e
  if different:
    raise UserError(f'{path} was made with config.data.{", ".join(different)}; use another '
                    '--workdir')
