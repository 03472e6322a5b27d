"""Three exact solvers of DETR's assignment, side by side.

  python -m benchmarks.matching [--problems=96] [--queries=100] [--rounds=5]

The costs are the paper's (class probability, L1 and generalised IoU with weights 1, 5 and 2)
between random boxes. `typical` has 7 objects an image on average and at most 63, as COCO has, in 63
slots; `full` has as many objects as queries. In each, `alike` is what a network predicts before it
is trained (all queries nearly the same box, every object wants the same query) and `apart` queries
that differ. Solvers: scipy on the host (only on a CPU), our lockstep loop, and `optax.assignment`
under vmap, whose padded slots cost the same for every query. All solve the same problems, rounds
alternate between them, medians are compared, and the totals must agree.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detection import matching

TYPICAL_SLOTS = 63


def boxes_of(rng: np.random.Generator, *shape: int) -> np.ndarray:
  """Random boxes inside the image: float64 `[*shape, 4]`, cxcywh."""
  size = rng.uniform(.05, .5, (*shape, 2))
  return np.concatenate([rng.uniform(size / 2, 1 - size / 2), size], -1)


def generalised_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Generalised IoU of broadcastable boxes cxcywh."""
  corners = lambda x: (x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2)
  (a0, a1), (b0, b1) = corners(a), corners(b)
  area = lambda low, high: np.clip(high - low, 0, None).prod(-1)
  inner = area(np.maximum(a0, b0), np.minimum(a1, b1))
  union = area(a0, a1) + area(b0, b1) - inner
  hull = area(np.minimum(a0, b0), np.maximum(a1, b1))
  return inner / union - (hull - union) / hull


def costs(rng: np.random.Generator, problems: int, queries: int, slots: int,
          alike: bool) -> np.ndarray:
  """Matching costs of the paper, equations 1 and 2: float32 `[1, problems, queries, slots]`."""
  predicted = boxes_of(rng, problems, queries)
  logits = rng.normal(size=(problems, queries, 92))
  if alike:
    predicted = predicted[:, :1] + rng.normal(0, .01, predicted.shape)
    logits = logits[:, :1] + rng.normal(0, .1, logits.shape)
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  labels = rng.integers(0, 91, (problems, 1, slots))
  pairs = predicted[:, :, None], boxes_of(rng, problems, slots)[:, None]
  return (-np.take_along_axis(probability, labels, 2) + 5 * np.abs(pairs[0] - pairs[1]).sum(-1)
          - 2 * generalised_iou(*pairs)).astype(np.float32)[None]


def with_optax(cost: jax.Array, objects: jax.Array) -> jax.Array:
  """The same as `matching.assign`, by optax."""
  _, problems, _, slots = cost.shape
  real = jnp.arange(slots) < objects[:, None]
  cost = jnp.where(real[:, None], cost[0], 0.0)
  query, slot = jax.vmap(optax.assignment.hungarian_algorithm)(cost)
  found = jnp.zeros((problems, slots), jnp.int32).at[jnp.arange(problems)[:, None], slot].set(query)
  return jnp.where(real, found, -1)[None]


def totals(cost: np.ndarray, objects: np.ndarray, found: np.ndarray) -> np.ndarray:
  """What the matchings cost, in float64: `[problems]`."""
  real = np.arange(cost.shape[-1]) < objects[:, None]
  hit = np.take_along_axis(cost[0].astype(float), np.maximum(found[0], 0)[:, None], 1)[:, 0]
  return (hit * real).sum(-1)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--problems', type=int, default=96, help='6 decoder layers of 16 images')
  parser.add_argument('--queries', type=int, default=100)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  solvers = {'lockstep': lambda *x: matching.assign(*x, implementation='lockstep'),
             'optax': with_optax}
  if jax.default_backend() == 'cpu':
    solvers = {'scipy': lambda *x: matching.assign(*x, implementation='scipy'), **solvers}
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}: '
        f'{args.problems} problems of {args.queries} queries, median of {args.rounds} rounds in '
        f'ms, and as a multiple of lockstep')
  print(f'{"costs":16}' + ''.join(f'{name:>18}' for name in solvers), flush=True)
  rng = np.random.default_rng(0)
  few = np.minimum(rng.geometric(1 / 7, args.problems), min(TYPICAL_SLOTS, args.queries))
  full = np.full(args.problems, args.queries)
  for amount, objects, slots in (
      ('typical', few, min(TYPICAL_SLOTS, args.queries)), ('full', full, args.queries)):
    for kind in ('alike', 'apart'):
      cost = costs(rng, args.problems, args.queries, slots, kind == 'alike')
      inputs = jax.device_put((cost, objects.astype(np.int32)))
      compiled = {name: jax.jit(solve).lower(*inputs).compile() for name, solve in solvers.items()}
      sums = {name: totals(cost, objects, np.asarray(solve(*inputs)))
              for name, solve in compiled.items()}
      for name, total in sums.items():
        np.testing.assert_allclose(total, sums['lockstep'], rtol=1e-5, err_msg=name)
      seconds = {name: [] for name in compiled}
      for _ in range(args.rounds):
        for name, solve in compiled.items():
          began = time.perf_counter()
          jax.block_until_ready(solve(*inputs))
          seconds[name].append(time.perf_counter() - began)
      medians = {name: statistics.median(x) for name, x in seconds.items()}
      print(f'{amount + " " + kind:16}' + ''.join(
          f'{1e3 * x:9.2f} ({x / medians["lockstep"]:5.2f}x)' for x in medians.values()),
          flush=True)


if __name__ == '__main__':
  main()
