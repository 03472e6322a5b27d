"""What walks are drawn along: one meta-path, or several of them by turns."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from graph import metapath, network, walks


class Trip:
  """A meta-path on a graph that is read when it is first needed.

  Attributes:
    route: how walks go along it.
    firsts: of every step, the id of the first node that it may leave.
  """

  def __init__(self, route: walks.Route, links: Sequence[metapath.Link], sizes: Mapping[str, int],
               graph: Callable[[], network.Graph], csr: Callable[[metapath.Step], walks.Csr]):
    self.route, self._graph, self._csr = route, graph, csr
    types = list(sizes)
    begins = dict(zip(types, np.cumsum([0, *sizes.values()]).tolist()))

    def first(step):
      if step.relation < 0:
        return 0
      link = links[step.relation]
      return begins[link.target if step.direction == '<' else link.source]
    self.firsts = [first(step) for step in route.path.steps]

  @property
  def steps(self) -> tuple[metapath.Step, ...]:
    return self.route.path.steps

  @property
  def csrs(self) -> list[walks.Csr]:
    """Of every step."""
    return [self._csr(step) for step in self.steps]

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """int32 ids of the nodes that walks start at: of the first type, those that have an edge."""
    path = self.route.path
    begin = 0 if not path.types else self._graph().nodes_of(path.types[0]).start
    degree = np.diff(self.csrs[0].ptr)
    if alone := np.count_nonzero(degree == 0):
      logging.info('%d of %d nodes have no edge of the first step of %s: no walk starts there, and '
                   'they get an embedding only where one comes by', alone, len(degree), path.text)
    return (np.flatnonzero(degree) + begin).astype(np.int32)

  def visits(self) -> np.ndarray:
    """See `walks.visits`."""
    return walks.visits(self.csrs, self.starts, self.route, len(self._graph()))

  def sample_host(self, rng: np.random.Generator, starts: np.ndarray) -> np.ndarray:
    """See `walks.sample_host`."""
    return walks.sample_host(rng, starts, self.csrs, self.route)


def make(text: str, length: int, keep: Sequence[str], links: Sequence[metapath.Link],
         sizes: Mapping[str, int], graph: Callable[[], network.Graph]) -> list[Trip]:
  """The trips of `config.model.metapath`: paths with a comma between them.

  Args:
    text: see `metapath`.
    length: tokens a walk.
    keep: types that become tokens, all when empty.
    links: relations of the graph.
    sizes: nodes of each of its types, in the order of their ids.
    graph: gives the graph.

  Raises:
    UserError: something that is no path on such a graph, or has too few nodes.
  """
  csr = functools.cache(lambda step: walks.csr(graph(), step))  # Paths may share steps.
  paths = [metapath.parse(one, tuple(sizes), links) for one in text.split(',')]
  return [Trip(walks.route(path, length, keep, links), links, sizes, graph, csr)
          for path in paths]


def _steps(trips: Sequence[Trip]) -> list[metapath.Step]:
  return list(dict.fromkeys(step for trip in trips for step in trip.steps))


def device_spec(trips: Sequence[Trip], links: Sequence[metapath.Link],
                sizes: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of `device_arrays`."""
  return {f'{name}_{at}': spec for at, step in enumerate(_steps(trips))
          for name, spec in walks.device_spec(step, links, sizes).items()}


def device_arrays(trips: Sequence[Trip]) -> dict[str, np.ndarray]:
  """What `sample` reads of the graph: 'ptr_0', 'col_0' and so on for every step that differs."""
  csrs = {step: csr for trip in trips for step, csr in zip(trip.steps, trip.csrs)}
  return {f'{name}_{at}': array for at, step in enumerate(_steps(trips))
          for name, array in walks.device_arrays(csrs[step]).items()}


def sample(key: jax.Array, trips: Sequence[Trip], batch: Mapping[str, jax.Array]) -> jax.Array:
  """Draws the walks of a batch on the device.

  Args:
    key: random key.
    trips: of the task.
    batch: `starts` int32 `[batch, block]`; with several trips `trip` int32 `[batch]`, which one
      each block is of; and `device_arrays`.

  Returns:
    int32 `[batch * block, tokens]`.
  """
  steps = _steps(trips)

  def along(trip, key, starts):
    arrays = [{name: batch[f'{name}_{steps.index(step)}'] for name in ('ptr', 'col', 'cum')
               if f'{name}_{steps.index(step)}' in batch} for step in trip.steps]
    return walks.sample(key, starts.reshape(-1), arrays, trip.firsts, trip.route)
  if len(trips) == 1:
    return along(trips[0], key, batch['starts'])
  found = -1
  for at, trip in enumerate(trips):
    mine = (batch['trip'] == at)[:, None]
    some = along(trip, jax.random.fold_in(key, at), jnp.where(mine, batch['starts'], -1))
    found = jnp.maximum(found, some)  # Of the others there is -1.
  return found


class Blocks:
  """Examples for training: `block` walks each, by the nodes that they start at, or as read.

  The nodes of a block are far apart in the order of the graph, so that a batch of a few blocks is
  of all of it. Where they do not come out even, -1 fills up.
  """

  def __init__(self, items: Sequence[np.ndarray], block: int, name: str):
    """Takes int32 `[n, ...]` of every trip, and what they are called in an example."""
    self._items, self._block, self._name = items, block, name
    self._ends = np.cumsum([-(-len(some) // block) for some in items])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    trip = int(np.searchsorted(self._ends, index, 'right'))
    begin = int(self._ends[trip - 1]) if trip else 0
    some = np.asarray(self._items[trip][index - begin::int(self._ends[trip]) - begin])
    filled = np.full((self._block, *some.shape[1:]), -1, np.int32)
    filled[:len(some)] = some
    found = {self._name: filled}
    return found if len(self._items) == 1 else {**found, 'trip': np.asarray(trip, np.int32)}
