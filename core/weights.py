"""Weights that are still on disk: names and shapes first, values when they are asked for.

Foreign files come as numpy archives (`.npz`), `.safetensors` or torch's `.pth`, from a local path
or a URL.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

import jax
import ml_dtypes
import numpy as np
import tqdm
from etils import epath

from core.config import UserError


@dataclasses.dataclass(frozen=True)
class Weight:
  """A parameter that has not been read yet: its shape, and the way to its value."""
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  def map(self, shape: Iterable[int], fn: Callable[[np.ndarray], np.ndarray]) -> 'Weight':
    """The weight of `shape` that `fn` makes of this one's value, when it is read."""
    return Weight(tuple(shape), lambda: fn(self.read()))


Weights = Mapping[str, Weight]


@dataclasses.dataclass(frozen=True)
class Notes:
  """What a task's `adapt` did, for the report.

  Attributes:
    looks_like: what model the source seems to hold, such as 'B/16 at 224 px'.
    unused: names in the source that the model has no use for.
    fresh: names of the model that keep their fresh values.
    resized: names whose values were brought to another shape.
  """
  looks_like: str = ''
  unused: tuple[str, ...] = ()
  fresh: tuple[str, ...] = ()
  resized: tuple[str, ...] = ()


def match_layers(weights: Weights, names: Iterable[str], prefix: str) -> dict[str, Weight]:
  """Brings stacked layers `{prefix}/...` or single ones `{prefix}_{i}/...` to what a model has.

  Args:
    weights: either kind.
    names: the model's parameter names, which show the kind it wants.
    prefix: full name of the layers, such as 'Transformer/encoderblock'.

  Returns:
    `weights` of the wanted kind, unread. A stack is filled layer by layer into one float32
    buffer. What does not occur in every layer stays as it was, for the comparison to name.
  """
  single = re.compile(rf'{re.escape(prefix)}_(\d+)/(.*)')
  stacked = f'{prefix}/'
  if any(name.startswith(stacked) for name in names):
    groups: dict[str, dict[int, Weight]] = {}
    for name, weight in weights.items():
      if match := single.fullmatch(name):
        groups.setdefault(match[2], {})[int(match[1])] = weight
    depth = max((len(group) for group in groups.values()), default=0)
    whole = {rest: [group[i] for i in range(depth)] for rest, group in groups.items()
             if sorted(group) == list(range(depth)) and len({w.shape for w in group.values()}) == 1}
    kept = {name: weight for name, weight in weights.items()
            if not ((match := single.fullmatch(name)) and match[2] in whole)}
    return kept | {stacked + rest: _stack(layers) for rest, layers in whole.items()}
  result = {}
  last: dict[str, np.ndarray] = {}
  for name, weight in weights.items():
    if not name.startswith(stacked):
      result[name] = weight
      continue
    for i in range(weight.shape[0]):
      result[f'{prefix}_{i}/{name.removeprefix(stacked)}'] = Weight(
          weight.shape[1:], lambda name=name, weight=weight, i=i: _layer(last, name, weight)[i])
  return result


def _stack(layers: list[Weight]) -> Weight:
  shape = (len(layers), *layers[0].shape)

  def read():
    buffer = np.empty(shape, np.float32)
    for i, layer in enumerate(layers):
      buffer[i] = layer.read()
    return buffer
  return Weight(shape, read)


def _layer(last: dict[str, np.ndarray], name: str, weight: Weight) -> np.ndarray:
  """The stack `name`, which stays in `last` until another one is asked for."""
  if name not in last:
    last.clear()
    last[name] = weight.read()
  return last[name]


def open_npz(path: pathlib.Path) -> dict[str, Weight]:
  """The arrays of a `.npz`; only their headers are read, and nothing is ever unpickled.

  Raises:
    UserError: cut short, no archive, or an entry that is not a plain array. A damaged entry raises
      it when it is read.
  """
  broken = (ValueError, OSError, EOFError, RuntimeError, NotImplementedError, zlib.error,
            zipfile.BadZipFile)

  def header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
      raise ValueError(f'array format {version}')
    shape, _, dtype = readers[version](file)
    return shape, dtype

  def read(entry: str) -> np.ndarray:
    try:
      with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
        value = np.lib.format.read_array(file, allow_pickle=False)
    except broken as e:
      raise UserError(f'{path}: {entry.removesuffix(".npy")} cannot be read ({e}); the file is '
                      'damaged, fetch it again') from e
    # numpy has no name for bfloat16 and writes it as two nameless bytes.
    return value.view(ml_dtypes.bfloat16) if value.dtype.kind == 'V' else value

  found = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.namelist():
        with archive.open(entry) as file:
          shape, dtype = header(file)
        if dtype.kind not in 'fiu' and dtype != np.dtype('V2'):
          raise ValueError(f'{entry.removesuffix(".npy")} is of dtype {dtype}, and nothing is '
                           'unpickled')
        found[entry.removesuffix('.npy')] = Weight(shape, lambda entry=entry: read(entry))
  except broken as e:
    raise UserError(f'{path}: not a .npz of arrays ({e}), or cut short') from e
  return found


def open_safetensors(path: pathlib.Path) -> dict[str, Weight]:
  """The tensors of a `.safetensors` file; only its header is read. Raises like `open_npz`."""
  import safetensors  # only some checkpoints come this way

  def read(name: str) -> np.ndarray:
    # Opened anew each time: the pages of an open file count as this process's memory.
    with safetensors.safe_open(path, framework='numpy') as file:
      return file.get_tensor(name)

  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return {name: Weight(tuple(file.get_slice(name).get_shape()), lambda name=name: read(name))
              for name in file.keys()}
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f'{path}: not a .safetensors file ({e}), or cut short') from e


def open_torch(path: pathlib.Path, inside: Iterable[str] = ()) -> dict[str, Weight]:
  """The tensors of a state dict that `torch.save` wrote (`.pth`); nothing but tensors is unpickled.

  Values stay in the file until they are read, but for files in the format from before torch 1.6,
  which cannot be mapped into memory.

  Args:
    path: the file.
    inside: keys under which the state dict may lie, the first that is there; else it is the whole.

  Raises:
    UserError: torch is missing, the file is damaged, or it holds other things than tensors, which
      torch refuses to unpickle.
  """
  try:
    import torch  # an extra: only some checkpoints come this way
  except ImportError as e:
    raise UserError(f"{path}: reading it needs torch: `pip install -e '.[torch]'`") from e

  try:
    found = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
  except Exception as e:  # pylint: disable=broad-except
    # Whatever a damaged file makes the reader say, there is one way on.
    lines = str(e).splitlines() or [type(e).__name__]
    reason = next((line.strip() for line in lines if 'GLOBAL' in line), lines[0])
    # The sentences that follow say how to unpickle it all the same.
    reason = reason.split('. ')[0][:200]
    raise UserError(f'{path}: not a file of tensors alone ({reason}), and nothing else is '
                    'unpickled; it is damaged, or its state dict must be saved by itself') from e
  if isinstance(found, Mapping):
    found = next((found[key] for key in inside if isinstance(found.get(key), Mapping)), found)
  wrong = ([name for name, value in found.items() if not isinstance(value, torch.Tensor)]
           if isinstance(found, Mapping) else [type(found).__name__])
  if wrong:
    raise UserError(f'{path}: not a state dict; {wrong[0]} is no tensor')

  def read(tensor) -> np.ndarray:
    tensor = tensor.detach()
    # numpy has no bfloat16.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
  return {name: Weight(tuple(value.shape), lambda value=value: read(value))
          for name, value in found.items()}


def local_copy(path: str) -> pathlib.Path:
  """`path` itself, or for a URL the file in the cache of weights, fetched when it is not there.

  The cache is `throughline/weights` under XDG_CACHE_HOME, or under ~/.cache without it. A file
  appears there under its name only when it is whole.

  Raises:
    UserError: no such file, or a URL that cannot be reached.
  """
  url = urllib.parse.urlsplit(path)
  if url.scheme not in ('gs', 'http', 'https'):
    if not pathlib.Path(path).exists():
      raise UserError(f'config.init_from={path!r}: no such file or workdir')
    return pathlib.Path(path)
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  name = urllib.parse.quote(url.netloc + url.path, safe='/').replace('..', '%2E%2E')
  if url.query:
    # Before the ending, which says how to read the file.
    name = str(pathlib.PurePath(name).with_stem(
        f'{pathlib.PurePath(name).stem}-{zlib.crc32(url.query.encode()):08x}'))
  target = cache / 'throughline' / 'weights' / name
  if not target.exists():
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      _fetch(path, target)
    except ImportError as e:
      raise UserError(f"config.init_from={path!r}: {e}; `pip install -e '.[gcs]'` reads gs://, and "
                      'a public bucket is also at '
                      f'https://storage.googleapis.com/{url.netloc}{url.path}') from e
    except (OSError, ValueError) as e:
      raise UserError(f'config.init_from={path!r}: cannot be fetched ({e}); fetch it by other '
                      'means and name the local file') from e
  return target


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a place beside `path`; what is written there becomes `path` when the block ends well."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def _fetch(url: str, target: pathlib.Path) -> None:
  with appearing(target) as temporary:
    if url.startswith('gs://'):
      source, size = epath.Path(url).open('rb'), epath.Path(url).stat().length
    else:
      source = urllib.request.urlopen(url, timeout=60)
      size = int(source.headers.get('Content-Length') or 0)
    with source, temporary.open('wb') as out, tqdm.tqdm(
        total=size or None, desc=target.name, unit='B', unit_scale=True,
        disable=jax.process_index() != 0) as bar:
      while block := source.read(1 << 20):
        out.write(block)
        bar.update(len(block))
      received = out.tell()
    if size and received != size:
      raise OSError(f'{received:,} of {size:,} bytes came')
