"""Model FLOPs of a traced function, counted on its jaxpr.

What is counted is the convention of model FLOPs utilisation: matrix multiplications and
convolutions, a multiply-add being 2 FLOPs, over all devices together. Elementwise operations,
reductions, sorts, FFTs and matrix factorisations count nothing.

The jaxpr is what was written, before any compiler pass: what rematerialisation repeats is counted
again (to compare with remat off, count the function without it), what XLA later removes as dead
or duplicate is still counted.
"""

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def count_flops(fn: Callable, *args) -> int:
  """FLOPs of one call of `fn`, on all devices together.

  Args:
    fn: any function that JAX can trace; it is traced, not run.
    *args: its arguments, trees of arrays or `jax.ShapeDtypeStruct`.
  """
  return count_jaxpr(jax.make_jaxpr(fn)(*args))


def count_jaxpr(closed_jaxpr: ClosedJaxpr) -> int:
  """FLOPs of one evaluation of a jaxpr, on all devices together.

  A conditional costs its dearest branch. A `while` is multiplied by its trip count if that is
  written in the jaxpr (a counter from a constant to a constant), else its body counts once. A
  Pallas call costs what its author declared, else its kernel once per grid point, which counts
  blocks that the kernel skips, such as those a causal mask hides; a dynamic grid dimension
  counts as 1.
  """
  return _count(closed_jaxpr.jaxpr, {})


def _count(jaxpr: Jaxpr, known: dict) -> int:
  """FLOPs of a jaxpr; `known` maps those of its variables whose integer value is known."""
  known = dict(known)
  total = 0
  for eqn in jaxpr.eqns:
    total += _RULES.get(eqn.primitive.name, _call)(eqn, known)
    if eqn.primitive.name == 'convert_element_type':
      value = _value(eqn.invars[0], known)
      if value is not None:
        known[eqn.outvars[0]] = value
  return total


def _value(atom, known: Mapping) -> int | None:
  """The integer that a variable or literal holds, if it can be read off the jaxpr."""
  if not isinstance(atom, Literal):
    return known.get(atom)
  is_integer = atom.aval.shape == () and np.issubdtype(atom.aval.dtype, np.integer)
  return int(atom.val) if is_integer else None


def _call(eqn: JaxprEqn, known: Mapping) -> int:
  """Any primitive without a rule: nothing itself, plus the jaxprs it carries, once each.

  This covers jit, remat, custom_jvp, custom_vjp and other calls.
  """
  total = 0
  for param in eqn.params.values():
    for inner in param if isinstance(param, (tuple, list)) else (param,):
      if isinstance(inner, ClosedJaxpr):
        inner = inner.jaxpr
      if not isinstance(inner, Jaxpr):
        continue
      values = {}
      # A call hands its operands on one by one; whatever does not is given no values.
      if len(inner.invars) == len(eqn.invars):
        values = {var: _value(atom, known) for var, atom in zip(inner.invars, eqn.invars)}
      total += _count(inner, values)
  return total


def _dot_general(eqn: JaxprEqn, known: Mapping) -> int:
  (contracting, _), _ = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)


def _ragged_dot_general(eqn: JaxprEqn, known: Mapping) -> int:
  """Each ragged row meets the matrix of one group only: as one dense multiplication."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (contracting, _), _ = numbers.dot_dimension_numbers
  lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  flops = 2 * math.prod(out) * math.prod(lhs[d] for d in contracting)
  # Where the contraction is what is ragged, the groups are an extra dimension of the result.
  ragged_contraction = set(numbers.lhs_ragged_dimensions) & set(contracting)
  return flops // eqn.invars[2].aval.shape[-1] if ragged_contraction else flops


def _conv(eqn: JaxprEqn, known: Mapping) -> int:
  """FLOPs of a convolution: forward, transposed, or either gradient of one.

  Along a spatial dimension an output position, an input element and a kernel tap determine each
  other pairwise, so no more products are useful than the two smallest of the three sizes give.
  In a plain convolution that is output times kernel, the usual count, padding included. Where
  the input is dilated (a transposed convolution, the input gradient of a strided one) it is input
  times kernel, without the inserted zeros. It is symmetric, so both gradients cost what the
  forward convolution does. A kernel larger than its input is not charged for the padding.
  """
  numbers = eqn.params['dimension_numbers']
  lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
  out = eqn.outvars[0].aval.shape
  # The kernel's input dimension is already that of one group.
  products = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
  for dims in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True):
    smallest = sorted(shape[dim] for shape, dim in zip((lhs, rhs, out), dims))
    products *= smallest[0] * smallest[1]
  return 2 * products


def _cond(eqn: JaxprEqn, known: Mapping) -> int:
  values = [_value(atom, known) for atom in eqn.invars[1:]]
  return max(_count(branch.jaxpr, dict(zip(branch.jaxpr.invars, values)))
             for branch in eqn.params['branches'])


def _scan(eqn: JaxprEqn, known: Mapping) -> int:
  # The carry changes, so only the constants keep their value.
  inner, consts = eqn.params['jaxpr'].jaxpr, eqn.params['num_consts']
  values = {var: _value(atom, known) for var, atom in zip(inner.invars[:consts], eqn.invars)}
  return eqn.params['length'] * _count(inner, values)


def _while(eqn: JaxprEqn, known: Mapping) -> int:
  cond, body = eqn.params['cond_jaxpr'].jaxpr, eqn.params['body_jaxpr'].jaxpr
  consts = eqn.invars[eqn.params['cond_nconsts']:][:eqn.params['body_nconsts']]
  values = {var: _value(atom, known) for var, atom in zip(body.invars, consts)}
  return _trip_count(eqn, known) * (_count(body, values) + _count(cond, {}))


def _trip_count(eqn: JaxprEqn, known: Mapping) -> int:
  """How often a `while` runs, if it is `counter < bound` with a constant step; otherwise 1."""
  cond, body = eqn.params['cond_jaxpr'].jaxpr, eqn.params['body_jaxpr'].jaxpr
  cond_consts, body_consts = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  init = eqn.invars[cond_consts + body_consts:]
  carried, carried_in = cond.invars[cond_consts:], body.invars[body_consts:]
  if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != 'lt':
    return 1
  counter, bound = cond.eqns[0].invars
  if isinstance(counter, Literal) or counter not in carried:
    return 1
  index = carried.index(counter)
  if isinstance(bound, Literal):
    stop = _value(bound, known)
  elif bound in carried:
    # fori_loop carries its bound; it must come out of the body as it went in.
    at = carried.index(bound)
    stop = _value(init[at], known) if body.outvars[at] is carried_in[at] else None
  else:
    stop = _value(eqn.invars[cond.invars.index(bound)], known)
  start = _value(init[index], known)
  step = None
  for inner in body.eqns:
    if inner.primitive.name == 'add' and inner.outvars[0] is body.outvars[index]:
      if inner.invars[0] is carried_in[index]:
        step = _value(inner.invars[1], {})
  if start is None or stop is None or step is None or step <= 0:
    return 1
  return max(-(-(stop - start) // step), 0)


def _shard_map(eqn: JaxprEqn, known: Mapping) -> int:
  """The body is one device's work; devices that hold the same operands repeat the same work.

  So it counts once per way that the specs split operands or results, not once per device.
  """
  mesh, manual = eqn.params['mesh'], eqn.params['newly_manual_axes']
  split = set()
  for spec in (*eqn.params['in_specs'], *eqn.params['out_specs']):
    for axes in spec:
      if axes is not None:
        split |= {axes} if isinstance(axes, str) else set(axes)
  ways = math.prod(mesh.shape[axis] for axis in split & set(manual))
  return ways * _count(eqn.params['jaxpr'], {})


def _pallas_call(eqn: JaxprEqn, known: Mapping) -> int:
  declared = eqn.params['cost_estimate']
  if declared is not None:
    return int(declared.flops)
  grid = eqn.params['grid_mapping'].grid
  points = math.prod(size for size in grid if isinstance(size, (int, np.integer)))
  return points * _count(eqn.params['jaxpr'], {})


_RULES = {
    'dot_general': _dot_general,
    'ragged_dot_general': _ragged_dot_general,
    'conv_general_dilated': _conv,
    'cond': _cond,
    'scan': _scan,
    'while': _while,
    'shard_map': _shard_map,
    'pallas_call': _pallas_call,
}
