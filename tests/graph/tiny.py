"""A small random network whose walks can be followed by dense matrices, and tasks on it."""

import dataclasses

import numpy as np

from configs import metapath2vec as configs
from core import task as task_lib
from graph import metapath, network, tables, walks

SIZES = {'user': 8, 'item': 11, 'tag': 5}


def graph(weighted: bool = False, seed: int = 0) -> network.Graph:
  """Users like items and follow users, items have tags; some nodes have no edge of a relation.

  An edge may be there twice. Weights are of heavy tails.
  """
  rng = np.random.default_rng(seed)

  def edges(name, source, target, count, spare):
    # The last `spare` nodes of either type are left without an edge.
    sources = rng.integers(0, SIZES[source] - spare, count)
    targets = rng.integers(0, SIZES[target] - spare, count)
    weights = rng.lognormal(0, 1.5, count) if weighted else None
    return tables.Edges(name, source, target, sources, targets, weights)
  return network.build(tables.Table(
      {type: [f'{type} {i}' for i in range(size)] for type, size in SIZES.items()},
      [edges('likes', 'user', 'item', 30, 0), edges('has', 'item', 'tag', 20, 1),
       edges('follows', 'user', 'user', 16, 1)]))


def matrix(of: network.Graph, step: metapath.Step) -> np.ndarray:
  """float64 `[nodes, nodes]`: the chances of a step by equation 3, edge by edge."""
  found = np.zeros((len(of), len(of)))
  for place, relation in enumerate(of.relations):
    if step.relation not in (place, -1):
      continue
    for row, source in enumerate(relation.source_ids):
      for edge in range(relation.ptr[row], relation.ptr[row + 1]):
        weight = 1. if relation.weight is None else float(relation.weight[edge])
        if step.direction in '>-':
          found[source, relation.col[edge]] += weight
        if step.direction in '<-':
          found[relation.col[edge], source] += weight
  total = found.sum(axis=1, keepdims=True)
  return np.divide(found, total, out=np.zeros_like(found), where=total > 0)


@dataclasses.dataclass
class Trip:
  """A path on a graph with all that walks along it need."""
  graph: network.Graph
  text: str
  length: int
  keep: tuple[str, ...] = ()

  def __post_init__(self):
    self.links = metapath.links_of(self.graph.relations)
    self.path = metapath.parse(self.text, self.graph.types, self.links)
    self.route = walks.route(self.path, self.length, self.keep, self.links)
    self.csrs = [walks.csr(self.graph, step) for step in self.path.steps]
    self.firsts = [one.first for one in self.csrs]
    self.arrays = [walks.device_arrays(one) for one in self.csrs]
    self.matrices = [matrix(self.graph, step) for step in self.path.steps]
    self.starts = np.arange(len(self.graph), dtype=np.int32)
    if self.path.types:
      self.starts = self.starts[self.graph.nodes_of(self.path.types[0])]


def config_of(arg: str = 'smoke', **changes):
  """A config with changes ('model__dim=8')."""
  config = configs.get_config(arg)
  for name, value in changes.items():
    config.update_from_flattened_dict({name.replace('__', '.'): value})
  return config


def task_of(of: network.Graph | None = None, **changes):
  """The task of the smoke config with changes, on this graph."""
  task = task_lib.load(config_of(**changes))
  if of is not None:
    task.graph = of
  return task


def first_batch(task, size, seed=0):
  """Examples in random order, transformed and stacked."""
  source = task.dataset('train')
  order = np.random.default_rng(seed).permutation(len(source))[:size]
  rows = [task.transform(source[i], np.random.default_rng(int(i)), True) for i in order]
  return {**{name: np.stack([row[name] for row in rows]) for name in rows[0]},
          'mask': np.ones(size, np.float32)}
