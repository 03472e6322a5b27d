"""BERT4Rec training speed, side by side with RecBole's (torch), on MovieLens-100K.

  python -m venv recbole && recbole/bin/pip install torch==2.13.0 'numpy<2' 'scipy<1.13' \\
      'pandas<2.2' colorlog==4.7.2 colorama==0.4.4 pyyaml tqdm scikit-learn tabulate tensorboard \\
      thop texttable psutil plotly && recbole/bin/pip install --no-deps recbole==1.2.1
  python -m benchmarks.bert4rec --recbole=recbole/bin/python

Both have the same sizes (width 64, 2 layers, 2 heads, length 50, dropout .2, mask .2) and batches
of 256 sequences, and read the log that RecBole carries. Steps alternate in rounds, and medians are
compared; RecBole's steps include its data loader, ours read the next batch meanwhile, and go
through a batch eight sequences at a time, which a CPU's cache likes.

With --target=X both sides also train, at the same time and on a core each, until their NDCG@10 on
the validation items (full ranking, seen items not filtered) is at least X, ours in the batches of
64 of its config; seconds count from the start of a process. --rounds=0 does that alone.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

BATCH, LENGTH = 256, 50


class Peer:
  """The process that runs RecBole."""

  def __init__(self, python: str, threads: int, core: int | None = None):
    script = pathlib.Path(__file__).with_name('recbole_peer.py')
    self._process = subprocess.Popen(
        [*_on(core), python, str(script), str(time.time()), str(BATCH), str(LENGTH), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=tempfile.mkdtemp(), env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
    self.about = self.answer()

  def ask(self, **what) -> dict:
    print(json.dumps(what), file=self._process.stdin, flush=True)
    return self.answer()

  def answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      sys.exit('RecBole ended; run benchmarks/recbole_peer.py by hand to see why')
    return json.loads(line)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def _on(core: int | None) -> list[str]:
  """What to write before a command so that it stays on a core."""
  if core is None:
    return []
  code = f'import os, sys; os.sched_setaffinity(0, {{{core}}}); os.execv(sys.argv[1], sys.argv[1:])'
  return [sys.executable, '-c', code]


def where_data_is(python: str) -> str:
  """The interactions inside RecBole's package; nothing is imported or copied."""
  code = ("import importlib.util as u, pathlib as p; "
          "print(p.Path(u.find_spec('recbole').origin).parent)")
  found = subprocess.run([python, '-c', code], capture_output=True, text=True, check=True)
  return str(pathlib.Path(found.stdout.strip()) / 'dataset_example/ml-100k/ml-100k.inter')


class Ours:
  """Our compiled step and input, in this process."""

  def __init__(self, data: str):
    import jax
    from configs import bert4rec
    from core import train
    from core.checkpoint import Checkpoints
    from core.plan import make_plan
    config = bert4rec.get_config('ml100k')
    config.data.name = f'interactions:{data}'
    config.batch_size, config.accum = BATCH, BATCH // 8
    workdir = pathlib.Path(tempfile.mkdtemp())
    self._jax, self._plan = jax, make_plan(config, workdir=workdir)
    self.parameters = self._plan.parameter_count
    # The loop's own stream: batches are read and placed by its threads.
    loop = train._Loop(self._plan, workdir, Checkpoints(workdir / 'checkpoints', config.checkpoint))
    self._stream = loop._stream(0)  # pylint: disable=protected-access
    self._state = self._plan.init(jax.random.key(0))

  def close(self) -> None:
    self._stream.close()

  def steps(self, count: int) -> list[float]:
    taken = []
    for _ in range(count):
      start = time.perf_counter()
      self._state, _ = self._plan.train_step(self._state, next(self._stream))
      self._jax.block_until_ready(self._state)
      taken.append(time.perf_counter() - start)
    return taken


def train_peer(python: str, target: float, limit: float, core: int) -> None:
  """Trains RecBole until validation reaches `target`; prints the way there."""
  peer = Peer(python, 1, core)
  found = peer.ask(do='train', target=target, limit=limit)
  while 'done' not in found:
    print(f'RecBole: epoch {found["epoch"]}  NDCG@10 {found["ndcg"]:.4f}  {found["seconds"]:.0f} s',
          flush=True)
    found = peer.answer()
  peer.close()


def train_ours(data: str, target: float, limit: float, core: int) -> None:
  """The same for ours, whose metrics are read as they are written."""
  workdir = tempfile.mkdtemp()
  path, began, seen = pathlib.Path(workdir) / 'metrics.jsonl', time.time(), 0
  process = subprocess.Popen(
      [*_on(core), sys.executable, '-m', 'main', '--config=configs/bert4rec.py:ml100k',
       f'--config.data.name=interactions:{data}', f'--workdir={workdir}',
       '--config.eval.every=1 epochs'],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    while process.poll() is None and time.time() - began < limit:
      time.sleep(.2)
      lines = path.read_text().splitlines() if path.exists() else []
      for line in lines[seen:]:
        found = json.loads(line)
        if (value := found.get('validation/full/NDCG@10')) is not None:
          print(f'ours: step {found["step"]}  NDCG@10 {value:.4f}  {time.time() - began:.0f} s',
                flush=True)
          if value >= target:
            return
      seen = len(lines)
    print('ours did not reach it')
  finally:
    process.kill()
    process.wait()


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--recbole', required=True, help='Python of an environment with RecBole')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=4, help='a round')
  parser.add_argument('--threads', type=int, nargs='+', default=[1, 2], help='of torch')
  parser.add_argument('--target', type=float, default=0., help='validation NDCG@10')
  parser.add_argument('--limit', type=float, default=3600., help='seconds to the target')
  args = parser.parse_args()
  args.recbole = os.path.abspath(args.recbole)  # The peer runs in a folder of its own.
  data = where_data_is(args.recbole)
  if args.rounds:
    compare_steps(args, data)
  if args.target:
    cores = sorted(os.sched_getaffinity(0))
    peer = threading.Thread(target=train_peer, args=(args.recbole, args.target, args.limit,
                                                     cores[0]))
    peer.start()
    train_ours(data, args.target, args.limit, cores[-1])
    peer.join()


def compare_steps(args: argparse.Namespace, data: str) -> None:
  """Times steps of both sides in turns; prints sequences a second."""
  ours = Ours(data)
  peers = {threads: Peer(args.recbole, threads) for threads in args.threads}
  about = next(iter(peers.values())).about
  print(f'parameters: ours {ours.parameters:,}, RecBole {about["parameters"]:,} '
        f'(torch {about["torch"]})', flush=True)
  sides = {'ours': ours.steps}
  for threads, peer in peers.items():
    sides[f'RecBole, {threads} thread(s)'] = (
        lambda count, peer=peer: peer.ask(do='steps', count=count)['seconds'])
  seconds = {side: [] for side in sides}
  for round_ in range(-1, args.rounds):
    for side in (list(sides) if round_ % 2 else list(sides)[::-1]):
      taken = sides[side](args.steps)
      if round_ >= 0:  # The earlier round warms up.
        seconds[side] += taken
  median = {side: statistics.median(taken) for side, taken in seconds.items()}
  for side, taken in seconds.items():
    print(f'{side}: {BATCH / median[side]:.0f} sequences/s (best {BATCH / min(taken):.0f})')
  best = min(value for side, value in median.items() if side != 'ours')
  print(f'ratio of medians {best / median["ours"]:.2f}', flush=True)
  for side in (ours, *peers.values()):
    side.close()


if __name__ == '__main__':
  main()
