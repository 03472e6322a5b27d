"""metapath2vec on a CPU, side by side with gensim, torch_geometric and the authors' walks.

  python -m venv peers && peers/bin/pip install torch==2.13.0 gensim==4.4.0 \\
      torch-geometric==2.8.1 scikit-learn
  python -m benchmarks.metapath2vec --peers=peers/bin/python [--data=dat:DIR] [--quality]

The graph is the embedded one, or one of authors, papers and venues. What is compared:

  walks     steps along author-paper-venue-paper-author, 100 tokens from every author: our samplers
            and torch_geometric's; and as the authors' script walks, from every venue
  training  one pass over the same walks: gensim's Word2Vec with the authors' settings; our step
            with shared negatives (the config), with own ones for every pair, and with those of ++;
            torch_geometric as in its example, on pairs of other windows: see its pairs a second
  quality   with --quality: F1 and NMI of the vectors after these passes

Every side is a process of its own, ours one for all cores and one for a single thread. They take
turns, and medians count, without compilation, vocabularies and making lists of strings. What bounds
our step is told by its arithmetic beside that of a large product, its rows, and the share of walks.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks.word2vec_peers import serve
from configs import metapath2vec as configs
from core import task as task_lib
from core.plan import make_plan
from graph import evaluation, walk_files, walks

LENGTH, DIM, WINDOW, NEGATIVES = 100, 128, 7, 5
VARIANTS = {'ours': {}, 'ours, own negatives': {'shared_negatives': 0},
            'ours, ++': {'negatives_from': 'context'}}


def make_config(data: str, variant: str = 'ours', sampler: str = 'device'):
  config = configs.get_config('' if data == 'planted' else 'dblp')
  config.data.update(dict(name=data, sampler=sampler))
  config.model.update(dict(length=LENGTH, dim=DIM, window=WINDOW, negatives=NEGATIVES,
                           **VARIANTS[variant]))
  return config


@functools.cache
def ready(data: str, folder: pathlib.Path, variant: str, sampler: str):
  """A plan whose step is compiled, and the batches of one pass over the walks or their starts."""
  found = np.load(folder / 'walks.npy', allow_pickle=False)
  name, found = ('walks', found) if sampler == 'host' else ('starts', found[:, :1])
  config = make_config(data, variant, sampler)
  shape = config.batch_size, config.data.block
  steps = -(-len(found) // (shape[0] * shape[1]))
  config.steps = f'{steps} steps'  # The learning rate falls over them.
  found = np.pad(found, ((0, steps * shape[0] * shape[1] - len(found)), (0, 0)), constant_values=-1)
  plan = make_plan(config)
  rest = {'mask': np.ones(shape[0], np.float32), **plan.resident()}
  batches = [{name: some, **rest}
             for some in found.reshape(steps, *plan.task.batch_spec(shape[0])[name].shape)]
  plan.train_step(plan.init(jax.random.key(1)), batches[0])
  return plan, batches


def train(data: str, folder: pathlib.Path, variant: str, save: str) -> dict:
  """One pass over the walks; leaves vectors [nodes, dim] where `save` says, unless it is ''."""
  plan, batches = ready(data, folder, variant, 'host')
  state = jax.block_until_ready(plan.init(jax.random.key(0)))
  start = time.perf_counter()
  for batch in batches:
    state, _ = plan.train_step(state, batch)
  jax.block_until_ready(state)
  seconds = time.perf_counter() - start
  if plan.train_step._cache_size() != 1:  # pylint: disable=protected-access
    raise RuntimeError('a later step was compiled anew')
  if save:
    np.save(save, plan.task.vectors(state.params), allow_pickle=False)
  return {'seconds': seconds}


def sample(data: str, folder: pathlib.Path) -> dict:
  """Seconds of a walk from every start; of the walks of a batch alone, of a step with them; and of
  a large product of float32 matrices at best."""
  plan, batches = ready(data, folder, 'ours', 'device')
  task, key, state = plan.task, jax.random.key(0), plan.init(jax.random.key(0))
  trip, = task.trips
  firsts, every = trip.firsts, [walks.device_arrays(one) for one in trip.csrs]
  from_all = jax.jit(lambda *args: walks.sample(*args, firsts, trip.route))
  starts, every = jax.device_put((trip.starts, every))
  batch_walks, product = plan.jit(task.walks), jax.jit(lambda a: a @ a)
  square = jax.random.normal(key, (2048, 2048))

  def step():
    nonlocal state
    state, _ = plan.train_step(state, batches[0])
    return state
  return {'seconds': seconds_of(lambda: from_all(key, starts, every)),
          'steps': len(starts) * (LENGTH - 1), 'step': seconds_of(step),
          'walks': seconds_of(lambda: batch_walks(key, batches[0])),
          'product': seconds_of(lambda: product(square), min)}


def seconds_of(run, of=statistics.median) -> float:
  """Of five runs, after one that is not counted."""
  seconds = []
  for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return of(seconds[1:])


def process(*command: str, **environment: str):
  """Starts one that answers lines of JSON until this one ends; gives what asks it."""
  started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env=os.environ | environment)

  def ask(do: str, **what) -> dict:
    print(json.dumps({'do': do, **what}), file=started.stdin, flush=True)
    line = started.stdout.readline()
    return json.loads(line) if line else sys.exit(f'{command[0]} ended; what it said is above')
  return ask


def leave(task, folder: pathlib.Path, walks_each: int) -> np.ndarray:
  """Leaves what word2vec_peers.Peers reads; gives the walks."""
  found = np.concatenate(list(walk_files.drawn(task, walks_each, 0)))
  np.save(folder / 'walks.npy', found, allow_pickle=False)
  types, trip = ('author', 'paper', 'venue'), task.trips[0]
  first = [task.graph.nodes_of(name).start for name in types]
  edges = [np.stack([np.repeat(np.arange(len(one.ptr) - 1), np.diff(one.ptr)), one.col - to])
           for one, to in zip(trip.csrs, first[1:])]
  np.savez(folder / 'graph.npz', sizes=np.array([task.sizes[name] for name in types]),
           author_paper=edges[0], paper_venue=edges[1], starts=trip.starts - np.int64(first[0]))
  return found


def make_turns(args: argparse.Namespace, task, folder: pathlib.Path) -> dict:
  """What is measured, (name, threads) -> what does so once."""
  cores, optim = sorted(os.sched_getaffinity(0)), task.config.optim
  most, rng, trip = len(cores), np.random.default_rng(0), task.trips[0]
  settings = dict(vector_size=DIM, window=WINDOW, negative=NEGATIVES, alpha=optim.lr,
                  min_alpha=optim.schedule.end_lr)
  peer = args.peers, str(pathlib.Path(__file__).with_name('word2vec_peers.py')), str(folder)
  gensim = process(*peer)
  # Unbound, two threads of torch may share a core; bound, those of gensim would.
  pyg = process(*peer, OMP_NUM_THREADS=str(most), OMP_PROC_BIND='true',
                OMP_PLACES=','.join(f'{{{core}}}' for core in cores))
  turns = {('walks: torch_geometric', most): lambda: pyg('pyg_walks', tokens=LENGTH),
           ("walks: the authors' way", 1): lambda: gensim('authors_walks', steps=400_000),
           ('walks: ours, host', 1): lambda: {
               'seconds': seconds_of(lambda: trip.sample_host(rng, trip.starts)),
               'steps': len(trip.starts) * (LENGTH - 1)}}

  def add(name, threads, ask, do, **what):
    turns[name, threads] = lambda: ask(do, **what)
  for threads in dict.fromkeys((most, 1)):
    ours = process(sys.executable, '-m', 'benchmarks.metapath2vec', f'--data={args.data}',
                   f'--serve={folder}', JAX_PLATFORMS='cpu', PJRT_NPROC=str(threads))
    keep = args.quality and threads == most
    save = lambda name, keep=keep: str(folder / f'{name}.npy') if keep else ''
    add('walks: ours, device', threads, ours, 'sample')
    add('gensim', threads, gensim, 'gensim', workers=threads, save=save('gensim'), **settings)
    for name in VARIANTS if threads == most else ['ours']:
      add(name, threads, ours, 'train', variant=name, save=save(name))
  add('torch_geometric', most, pyg, 'pyg_train', steps=args.steps)
  return turns


def report(answers: dict, tokens: int, pairs: int) -> None:
  """Prints what bounds our steps, and the table."""
  middle = lambda what, get: statistics.median(map(get, answers[what]))
  rate = lambda what, name, done=0: middle(what, lambda a: a.get(name, done) / a['seconds'])
  walking = {what: rate(what, 'steps') for what in answers if what[0].startswith('walks')}
  speed = {what: rate(what, 'tokens', tokens) for what in answers if what not in walking}
  for (name, threads), value in speed.items():
    if name in VARIANTS:
      sampled = 'walks: ours, device', threads
      product = 2 * 2048 ** 3 / middle(sampled, lambda a: a['product'])
      # Scores of a token with every other of its piece and with negatives, which two gradients
      # have, too. A row is read, and read and written again when its gradient is added.
      model = make_config('planted', name).model
      shared, columns = model.shared_negatives, model.piece + 2 * WINDOW
      negatives = shared or 2 * WINDOW * NEGATIVES
      drawn = shared / (model.walks_per_update * model.piece) or negatives
      flop, row = 6 * (columns + negatives) * DIM, 4 * DIM * (1 + columns / model.piece + drawn)
      print(f'{name}, {threads} thread(s): {flop:,} FLOP a token, {flop * value / 1e9:,.1f} of the '
            f'{product / 1e9:,.0f} GFLOP/s of a large product ({flop * value / product:.0%}); '
            f'rows: {2 * row:,.0f} bytes read, {row:,.0f} written'
            f' a token, {3 * row * value / 1e9:.2f} GB/s')
      if name == 'ours':
        print(f'  walks are {middle(sampled, lambda a: a["walks"] / a["step"]):.2%} of a step')
  print('\n| | threads | steps or tokens/s | positive pairs/s | ratio |\n|---|---|---|---|---|')
  peer = next(value for what, value in walking.items() if 'torch' in what[0])
  for what, value in walking.items():
    print(f'| {what[0]} | {what[1]} | {value:,.0f} | | {value / peer:.2f} of torch_geometric |')
  for what, value in speed.items():
    print(f'| training: {what[0]} | {what[1]} | {value:,.0f} | {rate(what, "pairs", pairs):,.0f} | '
          f'{value / speed["gensim", what[1]]:.2f} of gensim |')


def quality(task, found: np.ndarray, folder: pathlib.Path) -> None:
  """Prints F1 and NMI of the vectors that were left, for the type with most labelled nodes."""
  occurs = np.bincount(found[found >= 0], minlength=len(task.graph)) > 0
  some = max(evaluation.labelled(task.graph, occurs), key=lambda one: len(one.ids))
  print(f'\n| {len(some.ids):,} nodes of type {some.type} | Macro-F1 at 20% | NMI |\n|---|---|---|')
  for name in ('gensim', *VARIANTS):
    vectors = np.load(folder / f'{name}.npy', allow_pickle=False)[some.ids]
    f1 = evaluation.classification(vectors, some.labels, [.2], 10, 0)['macro_f1@20%']
    nmi = evaluation.clustering(vectors, some.labels, len(some.classes), 5, 0)['nmi']
    print(f'| {name} | {f1:.3f} | {nmi:.3f} |', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--peers', help='Python of an environment with gensim and torch_geometric')
  parser.add_argument('--data', default='planted', help='planted, or dat:DIR')
  parser.add_argument('--walks', type=int, default=1, help='from every author')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=7, help='of torch_geometric, a round')
  parser.add_argument('--quality', action='store_true', help='measure the vectors, too')
  parser.add_argument('--serve', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve({do.__name__: functools.partial(do, args.data, args.serve) for do in (train, sample)})
    return
  if not args.peers:
    parser.error('--peers=PYTHON is missing; the top of the file says how to make one')
  task, answers = task_lib.load(make_config(args.data)), collections.defaultdict(list)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    found = leave(task, folder, args.walks)
    tokens = int((found >= 0).sum())
    pairs = sum(2 * int((found[:, apart:] >= 0).sum()) for apart in range(1, WINDOW + 1))
    print(f'{args.data}: {len(found):,} walks, {tokens:,} tokens, {pairs:,} pairs', flush=True)
    turns = make_turns(args, task, folder)
    for round_ in range(args.rounds):
      for what in list(turns)[::-1 if round_ % 2 else 1]:
        if round_ and what[0] == 'ours, own negatives':
          continue  # It takes as long as all others.
        answers[what].append(turns[what]())
        shown = ', '.join(f'{name} {value:,.4g}' for name, value in answers[what][-1].items())
        print(f'round {round_}: {what[0]}, {what[1]} thread(s): {shown}', flush=True)
    report({what: answers[what] for what in turns}, tokens, pairs)
    if args.quality:
      quality(task, found, folder)


if __name__ == '__main__':
  main()
