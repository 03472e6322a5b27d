"""Walks in the authors' text format: a walk a line, its tokens separated by one space.

    python -m graph.walk_files --config=configs/metapath2vec.py --out=walks.txt
        [--walks=1] [--seed=0] [--config.key=value ...]

writes walks of a config, `--walks` from every node of the path's first type, for other programs to
train on. `config.data.walks=walks.txt` trains on the walks of a file instead of drawing them:
`prepare` reads it once and leaves `walks.npy` in the workdir, as node ids.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np
import tqdm

from core import config as config_lib
from core import task as task_lib
from core.config import UserError
from core.data import text_files
from core.weights import appearing
from graph import network

FILE, ABOUT = 'walks.npy', 'walks.json'

_AT_ONCE = 20_000  # Walks.


def write(path: pathlib.Path, tokens: np.ndarray, blocks: Iterator[np.ndarray],
          total: int) -> None:
  """Writes walks, the file whole or not at all.

  Args:
    path: the file.
    tokens: str `[nodes]`, of each node.
    blocks: int32 `[n, tokens]` each, -1 where there is none. Walks of one node, which nothing can
      be learned from, are left out.
    total: walks in all, for the progress.
  """
  names = tokens.astype(object)
  with appearing(path) as temporary, temporary.open('w', encoding='utf-8') as file:
    with _bar(f'write {path.name}', total) as bar:
      for block in blocks:
        whole = (block >= 0).all(axis=1)
        if whole.all():
          lines = map(' '.join, names[block])
        else:
          lines = (' '.join(names[walk[walk >= 0]]) for walk in block if (walk >= 0).sum() > 1)
        file.writelines(line + '\n' for line in lines)
        bar.update(len(block))


def read(path: pathlib.Path, graph: network.Graph, length: int) -> np.ndarray:
  """Reads walks, cut into pieces of at most `length` tokens as the authors' code cuts long lines.

  Returns:
    int32 `[pieces, length]`, filled up with -1; lines of one token are left out.

  Raises:
    UserError: a token that is no node of the graph, or no walk at all.
  """
  ids = {token: at for at, token in enumerate(graph.tokens.tolist())}
  pieces = []
  for number, line in text_files.lines(path):
    try:
      walk = [ids[token] for token in line.split()]
    except KeyError as e:
      raise UserError(f'{path}:{number}: {e.args[0]!r} is no node of the graph; its tokens look '
                      f'like {graph.tokens[0]!r} and {graph.tokens[-1]!r}') from e
    for start in range(0, len(walk), length):
      piece = np.full(length, -1, np.int32)
      some = walk[start:start + length]
      piece[:len(some)] = some
      if len(some) > 1:
        pieces.append(piece)
  if not pieces:
    raise UserError(f'{path}: there is no walk of two nodes or more in it')
  return np.stack(pieces)


def prepare(config: ml_collections.ConfigDict, graph: network.Graph,
            workdir: pathlib.Path) -> None:
  """Reads `config.data.walks` and leaves it as ids in the workdir, unless it is there."""
  about = _about(config)
  if (workdir / ABOUT).exists():
    _check(workdir, about)
    return
  found = read(pathlib.Path(config.data.walks).expanduser(), graph, config.model.length)
  with appearing(workdir / FILE) as temporary, temporary.open('wb') as file:
    np.save(file, found, allow_pickle=False)
  with appearing(workdir / ABOUT) as temporary:
    temporary.write_text(json.dumps(about) + '\n')


def find(config: ml_collections.ConfigDict, workdir: pathlib.Path | None,
         nodes: int) -> np.ndarray:
  """What `prepare` left, ids below `nodes`: int32 `[walks, length]`, whose pages stay on disk.

  Raises:
    UserError: it is not there, is damaged, or is of another file.
  """
  if workdir is None or not (workdir / ABOUT).exists():
    raise UserError(f'config.data.walks={config.data.walks!r} has not been read yet; '
                    '--mode=prepare with a --workdir does it')
  _check(workdir, _about(config))
  try:
    found = np.load(workdir / FILE, mmap_mode='r', allow_pickle=False)
    if found.dtype != np.int32 or found.ndim != 2 or found.shape[1] != config.model.length:
      raise ValueError(f'{found.dtype}{list(found.shape)}')
    if found.max(initial=-1) >= nodes:
      raise ValueError(f'node {found.max()} of {nodes}')
  except (OSError, ValueError, EOFError) as e:
    raise UserError(f'{workdir / FILE}: damaged ({e}); remove it and {ABOUT}, and --mode=prepare '
                    'makes them anew') from e
  return found


def _about(config: ml_collections.ConfigDict) -> dict[str, str | int]:
  return {'walks': config.data.walks, 'length': config.model.length}


def _check(workdir: pathlib.Path, now: dict[str, str | int]) -> None:
  try:
    before = json.loads((workdir / ABOUT).read_text())
  except ValueError as e:
    raise UserError(f'{workdir / ABOUT}: damaged; remove it, and --mode=prepare makes it '
                    'anew') from e
  if before != now:
    raise UserError(f'{workdir / FILE} was made of {before}, not of {now}; use another --workdir')


def drawn(task, walks_each: int, seed: int) -> Iterator[np.ndarray]:
  """Walks of a task on the host, int32 `[n, tokens]` at a time, in random order of their starts.

  Args:
    task: a `metapath2vec.Task`.
    walks_each: from every start.
    seed: of the walks.
  """
  rng = np.random.default_rng(seed)
  for _ in range(walks_each):
    for trip in task.trips:
      order = rng.permutation(trip.starts)
      for begin in range(0, len(order), _AT_ONCE):
        yield trip.sample_host(rng, order[begin:begin + _AT_ONCE])


def _bar(what: str, total: int) -> tqdm.tqdm:
  return tqdm.tqdm(total=total, desc=what, unit='walk', unit_scale=True, delay=5,
                   mininterval=.5 if sys.stderr.isatty() else 30)


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m graph.walk_files',
                                   description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--config', required=True)
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--walks', default=1, type=int, help='from every node of the first type')
  parser.add_argument('--seed', default=0, type=int)
  args, more = parser.parse_known_args(argv)
  try:
    if args.walks < 1:
      raise UserError(f'--walks={args.walks}; it must be at least 1')
    task = task_lib.load(config_lib.from_flags(args.config, more))
    total = args.walks * sum(len(trip.starts) for trip in task.trips)
    write(args.out, task.graph.tokens, drawn(task, args.walks, args.seed), total)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except OSError as e:
    print(f'error: {args.out}: cannot be written ({e.strerror})', file=sys.stderr)
    return 2
  print(f'{total:,} walks in {args.out}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
