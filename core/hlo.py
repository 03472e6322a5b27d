"""Which collectives a compiled program runs, read from its HLO text.

XLA inserts the communication of a partitioned program, so the compiled text is the one place that
tells what it is. The text of CPU and TPU programs is understood, synchronous and asynchronous.
"""

import dataclasses
import functools
import re

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
         'collective-permute')

_COMPUTATION = re.compile(r'^(ENTRY )?%?(\S+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?(\S+) = ')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,<=]*)\]')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


def collectives(hlo_text: str) -> dict[str, dict[str, int]]:
  """Collectives that one device takes part in when the program runs once.

  An asynchronous collective counts once, where it completes. In a loop each trip counts; a loop
  whose trip count cannot be found counts once. Of a conditional, the branch that moves most
  counts. A TPU's fused all-reduce and slice is a reduce-scatter.

  Args:
    hlo_text: `compiled.as_text()` of a partitioned program.

  Returns:
    For every kind in `KINDS` that occurs: `count`, executions, and `bytes`, the size of the
    collective's result on one device, summed over executions. That is not the traffic on the
    wire: of an all-gather over n devices (n-1)/n of it arrives from others, a reduce-scatter
    sends n-1 times its result, an all-reduce about twice its result.

  Raises:
    ValueError: the text has no entry computation.
  """
  program = _Program(hlo_text)
  if program.entry is None:
    raise ValueError('the text is not an HLO module: it has no ENTRY computation')
  return {kind: {'count': count, 'bytes': size}
          for kind, (count, size) in sorted(program.totals(program.entry).items())}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line of HLO: `name = result opcode(operands), attributes`."""
  name: str
  result: str
  opcode: str
  operands: str
  attributes: str
  trips: int | None
  is_root: bool

  @property
  def inputs(self) -> list[str]:
    return re.findall(r'%([^\s,()]+)', self.operands)

  def attribute(self, name: str) -> list[str]:
    """Computations that an attribute names: `calls=%a` or `branch_computations={%a, %b}`."""
    found = re.search(rf'\b{name}=(\{{[^}}]*\}}|%?[^\s,]+)', self.attributes)
    return [x.strip().lstrip('%') for x in found[1].strip('{}').split(',')] if found else []


class _Program:
  """The computations of an HLO module."""

  def __init__(self, text: str):
    self.entry = None
    self.computations: dict[str, dict[str, _Instruction]] = {}
    current = None
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header:
        current = self.computations.setdefault(header[2], {})
        if header[1]:
          self.entry = header[2]
      elif re.match(r'\}(\s|$)', line):
        # Not any brace: the metadata of a Pallas kernel goes over several lines and begins one so.
        current = None
      elif current is not None and _INSTRUCTION.match(line):
        instruction = _parse(line)
        current[instruction.name] = instruction
    # Bound to the instance, so that the cache goes when it does.
    self.totals = functools.cache(self._totals)

  def _totals(self, computation: str) -> dict[str, tuple[int, int]]:
    """Kind to (count, bytes) of one run of a computation and all that it calls."""
    totals: dict[str, tuple[int, int]] = {}

    def add(other, times=1):
      for kind, (count, size) in other.items():
        have = totals.get(kind, (0, 0))
        totals[kind] = (have[0] + times * count, have[1] + times * size)

    body = self.computations.get(computation, {})
    for x in body.values():
      kind = x.opcode.removesuffix('-done')
      if kind in KINDS:
        # The type of `-start` holds operands and semaphores too; that of `-done` only the result.
        if not self._repeats(computation):
          add({kind: (1, _bytes(x.result))})
      elif x.opcode == 'while':
        inner = self.totals(x.attribute('body')[0])
        if inner:
          add(inner, self._trip_count(body, x))
      elif x.opcode == 'conditional':
        branches = (x.attribute('branch_computations')
                    or x.attribute('true_computation') + x.attribute('false_computation'))
        add(max(map(self.totals, branches), key=lambda t: sum(size for _, size in t.values())))
      elif x.opcode.removesuffix('-start') in ('fusion', 'call', 'async'):
        for called in x.attribute('calls') or x.attribute('to_apply'):
          inner = self.totals(called)
          if called.startswith('all-reduce-scatter') and 'all-reduce' in inner:
            # The TPU compiler's reduce-scatter; what a device keeps is the fusion's result.
            add({'reduce-scatter': (inner['all-reduce'][0], _bytes(x.result))})
          else:
            add(inner)
    return totals

  def _repeats(self, computation: str) -> bool:
    """Whether collectives in a TPU fusion only continue one that is counted elsewhere.

    The TPU compiler runs a collective behind other work by a chain of fusions: one that ends in
    AsyncCollectiveStart, any number named async_collective_fusion, one with AsyncCollectiveDone.
    Each holds a copy of the collective; the one that starts is counted.
    """
    return (computation.startswith('async_collective_fusion')
            or any('"AsyncCollectiveDone"' in x.attributes
                   for x in self.computations[computation].values()))

  def _trip_count(self, outer: dict[str, _Instruction], loop: _Instruction) -> int:
    """Trips of a `while`: as the compiler noted them, else from its condition, else 1.

    A counted loop's condition is `counter < constant`. The counter starts at 0 and steps by 1
    unless the program shows another constant.
    """
    if loop.trips is not None:
      return loop.trips
    condition = self.computations.get((loop.attribute('condition') or [''])[0], {})
    root = next((x for x in condition.values() if x.is_root), None)
    if root is None:
      return 1
    compare = root
    if root.opcode == 'fusion':
      fused = self.computations.get(root.attribute('calls')[0], {})
      compare = next((x for x in fused.values() if x.is_root), root)
    direction = re.search(r'direction=(\w+)', compare.attributes)
    if compare.opcode != 'compare' or direction is None or direction[1] not in ('LT', 'LE'):
      return 1
    bounds = [value for value in (_constant(condition, name) for name in root.inputs)
              if value is not None]
    if len(bounds) != 1:
      return 1
    stop = bounds[0] + (direction[1] == 'LE')
    start, step = 0, 1
    index = next((int(found[1]) for found in (
        re.search(r'index=(\d+)', condition[name].attributes) for name in root.inputs
        if name in condition and condition[name].opcode == 'get-tuple-element') if found), None)
    if index is not None:
      initial = outer.get((loop.inputs or [''])[0])
      if initial is not None and initial.opcode == 'tuple':
        start = _constant(outer, initial.inputs[index]) or 0
      body = self.computations.get(loop.attribute('body')[0], {})
      last = next((x for x in body.values() if x.is_root and x.opcode == 'tuple'), None)
      update = body.get(last.inputs[index]) if last else None
      if update is not None and update.opcode == 'add':
        steps = [_constant(body, name) for name in update.inputs]
        step = next((value for value in steps if value), 1)
    return max(-(-(stop - start) // step), 0) if step > 0 else 1


def _parse(line: str) -> _Instruction:
  trips = _TRIPS.search(line)
  head = _INSTRUCTION.match(line)
  rest = line[head.end():]
  end = _closing(rest) if rest.startswith('(') else rest.index(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  rest = rest[len(opcode):]
  end = _closing(rest)
  return _Instruction(head[2], result, opcode, rest[1:end - 1], rest[end:],
                      int(trips[1]) if trips else None, bool(head[1]))


def _closing(text: str) -> int:
  """Index behind the bracket that closes the one `text` starts with."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char == '(') - (char == ')')
    if not depth:
      return i + 1
  return len(text)


def _constant(body: dict[str, _Instruction], name: str) -> int | None:
  """The integer an instruction holds, seen through copies."""
  x = body.get(name)
  while x is not None and x.opcode in ('copy', 'bitcast', 'convert') and x.inputs:
    x = body.get(x.inputs[0])
  if x is None or x.opcode != 'constant' or not re.fullmatch(r'-?\d+', x.operands):
    return None
  return int(x.operands)


def _bytes(result: str) -> int:
  """Bytes of all arrays in a result type such as `(bf16[8,128]{1,0:T(8,128)(2,1)}, u32[])`."""
  bits = 0
  for dtype, dims in _ARRAY.findall(result):
    size = 1
    for dim in dims.split(','):
      size *= int(dim.lstrip('<=') or 1)
    bits += size * _bits(dtype)
  return -(-bits // 8)


def _bits(dtype: str) -> int:
  """Bits of an element: `bf16`, `f8e4m3fn`, `s4`, `c64` say it themselves; `pred` is a byte."""
  digits = re.match(r'[a-z]+(\d+)', dtype)
  if dtype == 'pred':
    return 8
  return int(digits[1]) if digits else 0  # token, opaque
