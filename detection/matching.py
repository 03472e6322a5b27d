"""Which query answers for which object: the exact assignment behind the set loss.

DETR, section 3.1: among all ways to give each object a query of its own, the one of least total
cost. Every decoder layer of every image is a problem of its own. Two exact solvers are here:
'lockstep' lives in the compiled step and runs anywhere, 'scipy' asks the host, which only a CPU can
do without sending anything away.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from core import partition

# Costs are clipped to this. It is far above what any loss weighs (tens), and small enough that
# float64 sums of a hundred of them still tell ordinary costs apart.
_LARGEST = 1e12
_FEW = 16  # Slots up to which the host is not worth asking.


def assign(cost: jax.Array, objects: jax.Array,
           implementation: str | None = None) -> jax.Array:
  """Matches every object to a query of its own so that the sum of the costs is least.

  Exact: the total is the least there is, up to float32 rounding; of equally good matchings any one
  is returned. No gradient flows. Each device of the ambient layout solves its own images.

  Args:
    cost: float `[layers, batch, queries, slots]`, what it costs that a query answers for the object
      in a slot (slots <= queries). NaN counts as 1e12, and what is beyond +-1e12 (infinities too)
      as that, so that nothing raises or hangs when a run diverges.
    objects: int `[batch]`; the first so many slots are real, what is in the others is never used.
    implementation: 'lockstep' or 'scipy' (CPU only); by default 'scipy' for more than 16 slots on a
      CPU, else 'lockstep': with few slots they are equally fast, and a program that asks the host
      is never kept in JAX's compilation cache.

  Returns:
    int32 `[layers, batch, slots]`, the query of each real slot; -1 in the others.

  Raises:
    ValueError: shapes that do not fit, or an implementation that is unknown or not for this
      platform.
  """
  _, batch, queries, slots = cost.shape
  if slots > queries:
    raise ValueError(f'{slots} slots for objects, but only {queries} queries to match them to')
  if objects.shape != (batch,):
    raise ValueError(f'objects has shape {objects.shape}; expected one number for each of the '
                     f'{batch} images of the costs {cost.shape}')
  platform = partition.platform()
  if implementation is None:
    implementation = 'scipy' if platform == 'cpu' and slots > _FEW else 'lockstep'
  if implementation not in ('lockstep', 'scipy'):
    raise ValueError(f"implementation={implementation!r}: expected 'lockstep' or 'scipy'")
  if implementation == 'scipy' and platform != 'cpu':
    raise ValueError(f"'scipy' matching runs on a CPU, not on {platform}: use 'lockstep'")
  solve = functools.partial(_solve, _scipy if implementation == 'scipy' else _lockstep)
  cost = lax.stop_gradient(cost)
  layout = partition.ambient()
  if layout is not None and layout.mesh.size > 1:
    # Neither a callback nor a loop that stops when the slowest problem is done can be split by the
    # partitioner, and neither needs to hear of the other devices.
    specs = [layout.spec(names, shape) for names, shape in (
        ((None, 'batch', None, None), cost.shape), (('batch',), objects.shape),
        ((None, 'batch', None), (cost.shape[0], batch, slots)))]
    solve = jax.shard_map(solve, mesh=layout.mesh, in_specs=tuple(specs[:2]), out_specs=specs[2],
                          check_vma=False)
  return solve(cost, objects)


def _solve(solver, cost: jax.Array, objects: jax.Array) -> jax.Array:
  """Runs a solver of flat problems on the rows of one device."""
  layers, batch, queries, slots = cost.shape
  cost = cost.astype(jnp.float32)
  cost = jnp.clip(jnp.where(jnp.isnan(cost), _LARGEST, cost), -_LARGEST, _LARGEST)
  objects = jnp.broadcast_to(objects.astype(jnp.int32), (layers, batch))
  found = solver(cost.reshape(-1, queries, slots), objects.reshape(-1))
  return found.reshape(layers, batch, slots)


def _scipy(cost: jax.Array, objects: jax.Array) -> jax.Array:
  """The matching of `[problems, queries, slots]` by scipy, on the host: int32 `[problems, slots]`.

  Not `jax.pure_callback`: that one hands its function JAX arrays, and reading a large one can wait
  for a thread of the very pool that waits for the function. With one core and work queued behind
  the step it hangs for good.
  """
  from jax.experimental.buffer_callback import buffer_callback
  out = jax.ShapeDtypeStruct((cost.shape[0], cost.shape[2]), jnp.int32)
  return buffer_callback(_on_host, out)(cost, objects)


def _on_host(context, out, cost, objects) -> None:
  """Fills `out`; the arguments are views of XLA's memory."""
  from scipy import optimize
  del context
  out, cost, objects = (np.asarray(x) for x in (out, cost, objects))
  out[...] = -1
  for problem, count in enumerate(objects):
    # A row an object: the columns that come back are the queries in the order of the slots.
    out[problem, :count] = optimize.linear_sum_assignment(cost[problem, :, :count].T)[1]


class _Search(NamedTuple):
  """Where each problem stands in inserting its objects, one after the other.

  Attributes:
    slot: int32 `[problems]`, the object that is being inserted; `slots` when all are in.
    column: int32 `[problems]`, the query reached last, by searching or by walking back; -1 when
      the search for `slot` has not begun.
    distance: float32 `[problems]`, length of the shortest path from `slot` to `column`.
    walking: bool `[problems]`, a free query was reached; the path to it is being walked back.
    owner: int32 `[problems, queries]`, the slot that has a query, -1 for a free one.
    price: float32 `[problems, queries]`, dual variables: at most 0, and 0 while a query is free.
    shortest: float32 `[problems, queries]`, lengths of the shortest paths found so far.
    before: int32 `[problems, queries]`, the slot from which that path comes.
    settled: bool `[problems, queries]`, queries whose shortest path is final.
  """
  slot: jax.Array
  column: jax.Array
  distance: jax.Array
  walking: jax.Array
  owner: jax.Array
  price: jax.Array
  shortest: jax.Array
  before: jax.Array
  settled: jax.Array


def _lockstep(cost: jax.Array, objects: jax.Array) -> jax.Array:
  """The matching of `[problems, queries, slots]` in the graph: int32 `[problems, slots]`.

  Shortest augmenting paths with dual prices (Jonker & Volgenant 1987; Crouse 2016 for rectangular
  costs). Textbooks nest three loops: objects, Dijkstra's steps, and the way back along the path.
  Under vmap each of the three would wait for its slowest member. Here a problem's place in all
  three is data (`_Search`), a round of the one flat loop moves every problem by one step of
  whatever it is at, and the number of rounds is the largest total of any problem, not a sum of
  maxima.
  """
  problems, queries, slots = cost.shape
  cost = cost.swapaxes(1, 2)  # A round reads the costs of one object: a row.
  # Constants of a row change no matching; without them prices stay near 0, where float32 is fine.
  cost = cost - cost.min(axis=2, keepdims=True)
  slot_ids, query_ids = jnp.arange(slots), jnp.arange(queries)
  real = slot_ids < objects[:, None]

  # Whoever is the first to have a query as its cheapest gets it: with all prices 0 that is optimal
  # for those objects alone, which is all that inserting the others asks for.
  wanted = jnp.argmin(cost, axis=2)
  claims = (wanted[..., None] == query_ids) & real[..., None]
  first = jnp.min(jnp.where(claims, slot_ids[:, None], slots), axis=1)
  owner = jnp.where(first < slots, first, -1)
  waiting = real & ~jnp.any(owner[:, None] == slot_ids[:, None], axis=2)

  def following(slot):
    """The next waiting slot after `slot`; `slots` when there is none."""
    return jnp.min(jnp.where(waiting & (slot_ids > slot[:, None]), slot_ids, slots), axis=1)

  def round_(s: _Search) -> _Search:
    # Searching: the object that sits at the last settled query (at first, the new one) offers
    # paths to all others. Where it sits it pays its own dual: that edge has length 0.
    at = query_ids == s.column[:, None]
    row = jnp.where(s.column < 0, s.slot, _pick(s.owner, at))
    # A problem that is done reads any row.
    paths = jnp.take_along_axis(cost, row[:, None, None], axis=1, mode='clip')[:, 0] - s.price
    paths = paths - (_pick(paths, at) - s.distance)[:, None]
    searching = ~s.walking & (s.slot < slots)
    closer = searching[:, None] & ~s.settled & (paths < s.shortest)
    shortest = jnp.where(closer, paths, s.shortest)
    before = jnp.where(closer, row[:, None], s.before)
    unsettled = jnp.where(s.settled, jnp.inf, shortest)
    least = unsettled.min(axis=1)
    # Of equally near queries a free one ends the search.
    nearest = jnp.argmax(jnp.where(unsettled == least[:, None], 1 + (s.owner < 0), 0), axis=1)
    column = jnp.where(searching, nearest, s.column)
    distance = jnp.where(searching, least, s.distance)
    at = query_ids == column[:, None]
    reached = searching & jnp.any(at & (s.owner < 0), axis=1)
    price = jnp.where(reached[:, None] & s.settled,
                      s.price + shortest - distance[:, None], s.price)
    settled = s.settled | (searching[:, None] & at)

    # Walking back: the query goes to the object its path came from, which leaves the one it had.
    walking = s.walking | reached
    row = _pick(before, at)
    left = (s.owner == row[:, None]) & ~at
    owner = jnp.where(walking[:, None] & at, row[:, None], s.owner)
    column = jnp.where(walking, jnp.argmax(left, axis=1), column)
    inserted = walking & (row == s.slot)
    new = inserted[:, None]
    return _Search(
        slot=jnp.where(inserted, following(s.slot), s.slot),
        column=jnp.where(inserted, -1, column), distance=jnp.where(inserted, 0.0, distance),
        walking=walking & ~inserted, owner=owner, price=price,
        shortest=jnp.where(new, jnp.inf, shortest), before=before, settled=settled & ~new)

  none, table = jnp.full(problems, -1), (problems, queries)
  start = _Search(
      slot=following(none), column=none, distance=jnp.zeros(problems),
      walking=jnp.zeros(problems, bool), owner=owner, price=jnp.zeros(table),
      shortest=jnp.full(table, jnp.inf), before=jnp.zeros(table, jnp.int32),
      settled=jnp.zeros(table, bool))
  end = lax.while_loop(lambda s: jnp.any(s.slot < slots), round_, start)
  found = jnp.argmax(end.owner[:, None] == slot_ids[:, None], axis=2)
  return jnp.where(real, found, -1).astype(jnp.int32)


def _pick(x: jax.Array, at: jax.Array) -> jax.Array:
  """The entry of each row of `x` where `at` is true; 0 where it is nowhere true."""
  return jnp.where(at, x, 0).sum(axis=1)
