"""Random walks along a meta-path: for all walkers at once, on a device or on the host.

From a node the next one is drawn among its neighbours over the step's relation, uniformly or by the
weights of the edges (equation 3). A walker without such a neighbour stops: the rest of its walk
is -1, never a node made up.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import tqdm

from core.config import UserError
from graph import network
from graph.metapath import Link, MetaPath, Step

_LIMIT = 2 ** 31  # Of what a device counts in 32 bits.


@dataclasses.dataclass(frozen=True, eq=False)
class Csr:
  """The neighbours of each node over one step.

  Attributes:
    first: id of the node of row 0.
    ptr: int64 `[rows + 1]`.
    col: int32 `[edges]`, ids.
    cum: uint32 `[edges]`, where edges are weighted: the chance of a row's edges up to and with this
      one, in units of 2^-32; the last one of a row is taken whatever it says.
  """
  first: int
  ptr: np.ndarray
  col: np.ndarray
  cum: np.ndarray | None


def csr(graph: network.Graph, step: Step) -> Csr:
  """The neighbours over a step, in both directions where it is undirected."""
  if step.relation < 0:
    parts = [part for relation in graph.relations for part in (relation, relation.reversed())]
    return _joined(graph, parts, 0, len(graph))
  relation = graph.relations[step.relation]
  parts = {'>': [relation], '<': [relation.reversed()],
           '-': [relation, relation.reversed()]}[step.direction]
  rows = graph.nodes_of(parts[0].source)
  if len(parts) > 1:
    return _joined(graph, parts, rows.start, rows.stop - rows.start)
  part = parts[0]
  cum = None if part.weight is None else _cumulative(part.ptr, part.weight)
  return Csr(rows.start, part.ptr, part.col, cum)


def _joined(graph: network.Graph, parts: Sequence[network.Relation], first: int, rows: int) -> Csr:
  """One CSR of the edges of several relations, of `rows` nodes from id `first`."""
  sources = np.concatenate([
      np.repeat(np.arange(len(part.ptr) - 1) + graph.nodes_of(part.source).start - first,
                np.diff(part.ptr)) for part in parts])
  order = np.argsort(sources, kind='stable')
  col = np.concatenate([part.col for part in parts])[order]
  ptr = np.append(0, np.cumsum(np.bincount(sources, minlength=rows)))
  if all(part.weight is None for part in parts):
    return Csr(first, ptr, col, None)
  weight = np.concatenate([np.ones(len(part.col), np.float32) if part.weight is None
                           else part.weight for part in parts])[order]
  return Csr(first, ptr, col, _cumulative(ptr, weight))


def _cumulative(ptr: np.ndarray, weight: np.ndarray) -> np.ndarray:
  total = np.append(0, np.cumsum(weight, dtype=np.float64))
  rows = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
  before = total[ptr[rows]]
  share = (total[1:] - before) / np.maximum(total[ptr[rows + 1]] - before, 1e-300)
  return np.minimum(np.round(share * 2. ** 32), 2 ** 32 - 1).astype(np.uint32)


@dataclasses.dataclass(frozen=True)
class Route:
  """How walks of a number of tokens go along a path.

  Attributes:
    path: the meta-path.
    positions: which nodes of a walk are its tokens; the last one ends it.
    deepest: for every step of the path, the halvings that finding an edge by its weight takes; 0
      where edges are not weighted.
  """
  path: MetaPath
  positions: tuple[int, ...]
  deepest: tuple[int, ...]


def route(path: MetaPath, length: int, keep: Sequence[str], links: Sequence[Link]) -> Route:
  """Raises `UserError` where the path has not so many tokens."""
  deepest = []
  for step in path.steps:
    edges, weighted = _edges(step, links)
    deepest.append(edges.bit_length() if weighted else 0)
  return Route(path, tuple(path.positions(length, keep)), tuple(deepest))


def _edges(step: Step, links: Sequence[Link]) -> tuple[int, bool]:
  """How many edges a step may take, and whether some weigh more than others."""
  some = links if step.relation < 0 else [links[step.relation]]
  count = sum(link.edges for link in some) * (2 if step.direction == '-' else 1)
  return count, any(link.weighted for link in some)


def _hop(xp, current, bits, arrays: Mapping[str, Any], first: int, deepest: int):
  """One step of walkers at `current` int32 `[n]`, -1 for those that stopped.

  Args:
    xp: numpy or jax.numpy.
    current: see above.
    bits: uint32 `[n]`, random.
    arrays: `ptr`, `col` and, where weighted, `cum` of a `Csr`.
    first: id of the node of row 0.
    deepest: as in `Route`.
  """
  there = current >= 0
  row = xp.where(there, current - first, 0)
  begin = arrays['ptr'][row]
  degree = arrays['ptr'][row + 1] - begin
  alive = there & (degree > 0)
  begin, degree = xp.where(alive, begin, 0), xp.where(alive, degree, 1)
  if deepest:
    # The first edge of the row whose cumulative chance is above the random number.
    low, high = begin, begin + degree - 1
    for _ in range(deepest):
      middle = low + (high - low) // 2
      above = arrays['cum'][middle] > bits
      low, high = (xp.where(above, low, xp.minimum(middle + 1, high)),
                   xp.where(above, middle, high))
    edge = low
  else:
    # Of 2^32 equally likely numbers; the unevenness is degree / 2^32.
    edge = begin + (bits % degree.astype(np.uint32)).astype(begin.dtype)
  return xp.where(alive, arrays['col'][edge], -1).astype(np.int32)


def sample(key: jax.Array, starts: jax.Array, arrays: Sequence[Mapping[str, jax.Array]],
           firsts: Sequence[int], route: Route) -> jax.Array:
  """Walks from `starts`, drawn on the device.

  Args:
    key: random key.
    starts: int32 `[walks]`, -1 for none.
    arrays: of every step of the path, `ptr` (int32), `col` and, where weighted, `cum`.
    firsts: of every step of the path, the id of the node of row 0.
    route: see `Route`.

  Returns:
    int32 `[walks, tokens]`; after a dead end -1.
  """
  period, hops = len(route.path.steps), route.positions[-1]
  rounds = max(-(-hops // period), 1)
  bits = jax.random.bits(key, (rounds, period, len(starts)), np.uint32)

  def once(current, bits):
    nodes = []
    for step in range(period):
      current = _hop(jnp, current, bits[step], arrays[step], firsts[step], route.deepest[step])
      nodes.append(current)
    return current, jnp.stack(nodes)
  _, nodes = jax.lax.scan(once, starts, bits)
  nodes = jnp.concatenate([starts[None], nodes.reshape(-1, len(starts))])
  return nodes[np.asarray(route.positions)].T


def sample_host(rng: np.random.Generator, starts: np.ndarray, csrs: Sequence[Csr],
                route: Route) -> np.ndarray:
  """The same distribution on the host, for graphs that no device holds.

  Args:
    rng: random generator.
    starts: int32 `[walks]`, -1 for none.
    csrs: of every step of the path.
    route: see `Route`.

  Returns:
    int32 `[walks, tokens]`.
  """
  tokens = {position: at for at, position in enumerate(route.positions)}
  walks = np.empty((len(starts), len(tokens)), np.int32)
  current = np.asarray(starts, np.int32)
  for position in range(route.positions[-1] + 1):
    if position:
      step = (position - 1) % len(csrs)
      bits = rng.integers(0, 2 ** 32, len(starts), np.uint32)
      current = _hop(np, current, bits, vars(csrs[step]), csrs[step].first, route.deepest[step])
    if position in tokens:
      walks[:, tokens[position]] = current
  return walks


def device_arrays(one: Csr) -> dict[str, np.ndarray]:
  """What `sample` reads of a step.

  Raises:
    UserError: more edges than a device counts.
  """
  if len(one.col) >= _LIMIT:
    raise UserError(f'a step of the meta-path has {len(one.col):,} edges, and a device counts to '
                    f"2^31; use --config.data.sampler='host'")
  return {'ptr': one.ptr.astype(np.int32), 'col': one.col,
          **({} if one.cum is None else {'cum': one.cum})}


def device_spec(step: Step, links: Sequence[Link],
                sizes: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of `device_arrays` for a graph of which only sizes are known.

  Args:
    step: of a path.
    links: the graph's relations.
    sizes: nodes of each type.
  """
  if step.relation < 0:
    rows = sum(sizes.values())
  else:
    link = links[step.relation]
    rows = sizes[link.target if step.direction == '<' else link.source]
  edges, weighted = _edges(step, links)
  spec = {'ptr': jax.ShapeDtypeStruct((rows + 1,), np.int32),
          'col': jax.ShapeDtypeStruct((edges,), np.int32)}
  if weighted:
    spec['cum'] = jax.ShapeDtypeStruct((edges,), np.uint32)
  return spec


def visits(csrs: Sequence[Csr], starts: np.ndarray, route: Route, nodes: int) -> np.ndarray:
  """How often a walk from every start comes to each node, on average: float64 `[nodes]`.

  It is the sum over tokens of the distribution that the starts reach there, step by step: exact, so
  the noise of negative sampling needs no walks to be counted first.
  """
  matrices = []
  for one in csrs:
    degree = np.diff(one.ptr)
    if one.cum is None:
      chance = np.repeat(1 / np.maximum(degree, 1), degree)
    else:
      up_to = one.cum / 2. ** 32
      up_to[one.ptr[1:][degree > 0] - 1] = 1
      chance = np.diff(up_to, prepend=0.)
      chance[one.ptr[:-1][degree > 0]] = up_to[one.ptr[:-1][degree > 0]]
    matrices.append(scipy.sparse.csr_matrix((chance, one.col, one.ptr),
                                            shape=(len(degree), nodes)).T)
  here = np.bincount(starts, minlength=nodes).astype(np.float64)
  tokens, total = set(route.positions), np.zeros(nodes)
  for position in tqdm.trange(route.positions[-1] + 1, desc='expected visits', unit='step', delay=5,
                              mininterval=.5 if sys.stderr.isatty() else 30):
    if position:
      one = csrs[(position - 1) % len(csrs)]
      here = matrices[(position - 1) % len(csrs)] @ here[one.first:one.first + len(one.ptr) - 1]
    if position in tokens:
      total += here
  return total
