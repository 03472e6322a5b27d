"""A labelled graph without edges, and a task that has vectors for it."""

import pathlib
import types

import ml_collections
import numpy as np

from graph import network

AUTHORS, VENUES, TERMS = 60, 8, 5


def graph(labels=None, names=None, label_names='abcdef') -> network.Graph:
  """60 authors with label id % 3, 8 venues with id % 2, 5 terms without.

  Args:
    labels: node -> labels, places in `label_names`.
    names: of the nodes, if not 'author 0' and so on.
  """
  sizes = {'author': AUTHORS, 'venue': VENUES, 'term': TERMS}
  offsets = np.append(0, np.cumsum(list(sizes.values())))
  if labels is None:
    labels = {id: [id % 3] for id in range(AUTHORS)} | {
        AUTHORS + id: [id % 2] for id in range(VENUES)}
  rows = [labels.get(id, []) for id in range(offsets[-1])]
  names = names or [f'{type} {i}' for type, size in sizes.items() for i in range(size)]
  return network.Graph(
      tuple(sizes), offsets, np.array(names, np.dtypes.StringDType()), (), tuple(label_names),
      np.append(0, np.cumsum(list(map(len, rows)))).astype(np.int64),
      np.array([label for row in rows for label in row], np.int32))


def task(of=None, vectors=None, silent=(), **settings):
  """A task of this graph; silent nodes do not occur, and their vectors are no numbers."""
  of = of or graph()
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(len(of), 6)) if vectors is None else vectors
  vectors = np.array(vectors, np.float32)
  counts = rng.integers(1, 50, len(of))
  counts[list(silent)] = 0
  vectors[list(silent)] = np.nan
  config = ml_collections.ConfigDict({'seed': 3, 'eval': {**dict(
      shares=(.2, .5), repeats=3, clusterings=4, top=5, queries=(), max_nodes=0), **settings}})
  return types.SimpleNamespace(graph=of, config=config, vectors=lambda params: vectors,
                               occurs=lambda params: counts > 0, counts=lambda params: counts)


def run(path: pathlib.Path, writes: bool = True):
  """What evaluators use of a `core.evaluate.EvalRun`."""
  (path / 'pictures').mkdir(exist_ok=True)
  return types.SimpleNamespace(workdir=path, pictures=path / 'pictures', writes=writes)
