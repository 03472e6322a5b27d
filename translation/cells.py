"""Recurrent cells and stacks of them: vanilla RNN, LSTM and GRU.

The products of all inputs with their kernel are one matrix product, outside the loop over time. In
the loop only the recurrent product is left, for all gates at once, and its kernel's gradient is
again one product, after the loop. What runs in a loop is a plain function of arrays (`advance`), so
that a decoder may put a cell into a loop of its own; the modules hold the parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core import partition
from core.config import choose

# Gates of a cell, stacked along the last axis of its kernels in this order.
GATES = {'rnn': ('hidden',), 'lstm': ('input', 'forget', 'candidate', 'output'),
         'gru': ('reset', 'update', 'candidate')}
# How many tensors a cell carries from step to step; the hidden state is the first.
_CARRIED = {'rnn': 1, 'lstm': 2, 'gru': 1}

State = tuple[jax.Array, ...]
Weights = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Inits:
  """What the parameters of a recurrent model begin as; gates are initialised one by one.

  Attributes:
    kernel: all matrices but those below.
    recurrent: kernels from state to state.
    bias: all biases.
    embedding: tables of words.
    query: the matrices of an additive or bilinear attention.
    score: its vector v_a, as a matrix `[width, 1]`.
    forget_bias: what is added to the initial bias of an LSTM's forget gate.
  """
  kernel: Callable
  recurrent: Callable
  bias: Callable
  embedding: Callable
  query: Callable
  score: Callable
  forget_bias: float = 0.0


def _symmetric(bound: float) -> Callable:
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


_INITIALIZERS = nn.initializers
INITS = {
    # Jozefowicz et al. 2015 for the forget gate; the rest keeps variances and norms.
    'modern': Inits(
        _INITIALIZERS.xavier_uniform(), _INITIALIZERS.orthogonal(), _INITIALIZERS.zeros,
        _INITIALIZERS.variance_scaling(1.0, 'fan_in', 'normal', out_axis=0),
        _INITIALIZERS.xavier_uniform(), _INITIALIZERS.xavier_uniform(), forget_bias=1.0),
    # Sutskever et al. 2014, section 3.4.
    'sutskever': Inits(*[_symmetric(.08)] * 6),
    # Luong et al. 2015, section 4.1.
    'luong': Inits(*[_symmetric(.1)] * 6),
    # Bahdanau et al. 2015, appendix B.1: attention starts exactly uniform.
    'bahdanau': Inits(
        _INITIALIZERS.normal(.01), _INITIALIZERS.orthogonal(), _INITIALIZERS.zeros,
        _INITIALIZERS.normal(.01), _INITIALIZERS.normal(.001), _INITIALIZERS.zeros),
}


def begin(kind: str, batch: int, width: int, dtype: Any = jnp.float32) -> State:
  """The state before the first step: zeros `[batch, width]`, at least float32."""
  zeros = jnp.zeros((batch, width), jnp.promote_types(dtype, jnp.float32))
  return (zeros,) * _CARRIED[kind]


def project(weights: Weights, x: jax.Array) -> jax.Array:
  """A cell's input product W x + b: `[..., inputs]` -> `[..., gates * width]`."""
  kernel = weights['kernel']
  return x.astype(kernel.dtype) @ kernel + weights['bias']


def advance(kind: str, weights: Weights, inputs: jax.Array, state: State) -> State:
  """One step of a cell.

  RNN: h' = tanh(a). LSTM: c' = f c + i g, h' = o tanh(c'). GRU (Cho et al. 2014): h' = z h +
  (1 - z) n with n = tanh(W x + U (r h)), the reset gate before the product. Bahdanau et al. 2015
  print the GRU with z and 1 - z exchanged, which is the same cell with W_z and U_z negated.

  Args:
    kind: a key of `GATES`.
    weights: 'recurrent' `[width, gates * width]`.
    inputs: `[batch, gates * width]`, what `project` gave.
    state: of the step before, each `[batch, width]`; the hidden state is `state[0]`.

  Returns:
    the state after the step, in the dtype of `state`.
  """
  return _advance(kind, weights['recurrent'], inputs, state)[0]


def _advance(kind, recurrent, inputs, state):
  """Also gives what was multiplied with the recurrent kernel besides the hidden state, or None."""
  hidden = state[0]
  width = hidden.shape[-1]
  inputs = inputs.astype(hidden.dtype)

  def product(x, kernel):
    return jnp.dot(x.astype(kernel.dtype), kernel, preferred_element_type=hidden.dtype)

  if kind == 'gru':
    gates = jax.nn.sigmoid(inputs[:, :2 * width] + product(hidden, recurrent[:, :2 * width]))
    reset, update = jnp.split(gates, 2, axis=-1)
    kept = (reset * hidden).astype(recurrent.dtype)
    candidate = jnp.tanh(inputs[:, 2 * width:] + product(kept, recurrent[:, 2 * width:]))
    return (update * hidden + (1 - update) * candidate,), kept
  total = inputs + product(hidden, recurrent)
  if kind == 'rnn':
    return (jnp.tanh(total),), None
  activated, memory = _gates(total), state[1]
  memory = activated[1] * memory + activated[0] * activated[2]
  return (activated[3] * jnp.tanh(memory), memory), None


def _gates(total):
  """Activated gates of an LSTM from their sums `[batch, 4 * width]`."""
  gates = jnp.split(total, 4, axis=-1)
  return [jnp.tanh(gate) if i == 2 else jax.nn.sigmoid(gate) for i, gate in enumerate(gates)]


def _loop(kind, reverse, inputs, recurrent, state, mask):
  """The states after each step: hidden `[length, batch, width]`, the last state, and operands."""
  def step(state, now):
    inputs, seen = now
    after, kept = _advance(kind, recurrent, inputs, state)
    if seen is not None:
      after = tuple(jnp.where(seen[:, None], new, old) for new, old in zip(after, state))
    return after, (after[0].astype(inputs.dtype), kept)
  state, (hidden, kept) = jax.lax.scan(step, state, (inputs, mask), reverse=reverse)
  return (hidden, state), kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recur(kind: str, reverse: bool, inputs: jax.Array, recurrent: jax.Array, state: State,
          mask: jax.Array | None) -> tuple[jax.Array, State]:
  """Runs a cell over a sequence; differentiable once, in reverse mode.

  Args:
    kind: a key of `GATES`.
    reverse: whether to run from the last position to the first.
    inputs: `[length, batch, gates * width]`, what `project` gave.
    recurrent: `[width, gates * width]`.
    state: that before the first step, each `[batch, width]`.
    mask: bool `[length, batch]`; where False the state stays as it is. None for all True.

  Returns:
    hidden states `[length, batch, width]` in the dtype of `inputs`, and the state after the loop.
  """
  return _loop(kind, reverse, inputs, recurrent, state, mask)[0]


def _recur_forward(kind, reverse, inputs, recurrent, state, mask):
  run = lambda inputs, state: _loop(kind, reverse, inputs, recurrent, state, mask)
  out, pull, kept = jax.vjp(run, inputs, state, has_aux=True)
  return out, (pull, out[0], state[0], kept)


def _recur_backward(kind, reverse, residuals, cotangents):
  """The loop carries gradients of states back; that of the kernel is one product after it."""
  pull, hidden, first, kept = residuals
  d_inputs, d_state = pull(cotangents)
  first = first.astype(hidden.dtype)[None]
  before = [hidden[1:], first] if reverse else [first, hidden[:-1]]
  before = jnp.concatenate(before)
  product = lambda x, d: jnp.einsum('tbi,tbo->io', x, d, preferred_element_type=jnp.promote_types(
      d.dtype, jnp.float32)).astype(hidden.dtype)
  if kind == 'gru':
    width = hidden.shape[-1]
    d_recurrent = jnp.concatenate([product(before, d_inputs[..., :2 * width]),
                                   product(kept, d_inputs[..., 2 * width:])], axis=-1)
  else:
    d_recurrent = product(before, d_inputs)
  return d_inputs, d_recurrent, d_state, None


recur.defvjp(_recur_forward, _recur_backward)


def _each_gate(init: Callable, gates: int) -> Callable:
  """Initialises the blocks `[..., width]` of a stacked kernel one by one."""
  def stacked(key, shape, dtype=jnp.float32):
    block = (*shape[:-1], shape[-1] // gates)
    return jnp.concatenate([init(k, block, dtype) for k in jax.random.split(key, gates)], axis=-1)
  return stacked


class Cell(nn.Module):
  """The parameters of one cell; the loops are functions above.

  Attributes:
    kind: a key of `GATES`.
    inputs: width of the input that is known before the loop.
    width: of the state.
    context: width of a second input, one that is only known in the loop; 0 for none.
    initializer: a key of `INITS`.
    dtype: of kernels and of what flows between layers; states are float32.
  """
  kind: str
  inputs: int
  width: int
  context: int = 0
  initializer: str = 'modern'
  dtype: Any = jnp.float32

  def setup(self):
    inits = choose('config.model.initializer', self.initializer, INITS)
    gates = len(choose('config.model.cell', self.kind, GATES))

    def matrix(name, inputs, init, names):
      # The tensor axis leaves the recurrent kernel whole: it would cost a gather at every step.
      return self.param(name, nn.with_logical_partitioning(_each_gate(init, gates), names),
                        (inputs, gates * self.width), jnp.float32)

    def bias_init(key, shape, dtype=jnp.float32):
      bias = inits.bias(key, shape, dtype)
      if self.kind == 'lstm':
        bias = bias.at[self.width:2 * self.width].add(inits.forget_bias)
      return bias

    self.kernel = matrix('kernel', self.inputs, inits.kernel, ('embed', None))
    if self.context:
      self.context_kernel = matrix('context', self.context, inits.kernel, ('embed', None))
    self.recurrent = matrix('recurrent', self.width, inits.recurrent, ('embed', None))
    self.bias = self.param('bias', nn.with_logical_partitioning(bias_init, (None,)),
                           (gates * self.width,), jnp.float32)

  def weights(self) -> dict[str, jax.Array]:
    """'kernel', 'recurrent', 'bias' and, where there is one, 'context', all in `dtype`."""
    weights = {'kernel': self.kernel, 'recurrent': self.recurrent, 'bias': self.bias}
    if self.context:
      weights['context'] = self.context_kernel
    return jax.tree.map(lambda x: x.astype(self.dtype), weights)


class Stack(nn.Module):
  """Layers of cells, each reading the states of the one below; see `Cell` for attributes.

  In a bidirectional stack every layer runs both ways and the next reads both states side by side,
  forward first. Dropout is that of Zaremba et al. 2014: on the input of every layer, never on what
  a layer hands to its own next step.
  """
  kind: str
  inputs: int
  width: int
  layers: int = 1
  bidirectional: bool = False
  context: int = 0
  dropout: float = 0.0
  initializer: str = 'modern'
  dtype: Any = jnp.float32

  def setup(self):
    below = self.width * (2 if self.bidirectional else 1)
    make = lambda: [
        Cell(self.kind, below if i else self.inputs, self.width, 0 if i else self.context,
             self.initializer, self.dtype) for i in range(self.layers)]
    self.forward = make()
    self.backward = make() if self.bidirectional else None
    self.drop = nn.Dropout(self.dropout)

  def weights(self) -> list[dict[str, jax.Array]]:
    """Those of each forward layer, for a loop outside."""
    return [cell.weights() for cell in self.forward]

  def __call__(
      self, x: jax.Array, *, mask: jax.Array | None = None, states: Sequence[State] | None = None,
      train: bool = False) -> tuple[jax.Array, list[tuple[State, ...]]]:
    """Runs the stack over whole sequences.

    Args:
      x: `[batch, length, inputs]`, padded on the right.
      mask: bool `[batch, length]`, False at padding: there the state stays and the output is
        zero, so that a backward direction begins at each sentence's last word. None for no padding.
      states: where each layer begins (only without a backward direction); None for zeros.
      train: draws dropout from the rng 'dropout'.

    Returns:
      the states of the top layer `[batch, length, directions * width]` in `dtype`, and for every
      layer the state that each direction ends with, `[batch, width]` float32.
    """
    if states is not None and self.bidirectional:
      raise ValueError('a bidirectional stack begins from zeros: it takes no states')
    # Time first: a step then reads and writes one piece of memory.
    x = x.astype(self.dtype).swapaxes(0, 1)
    mask = None if mask is None else mask.swapaxes(0, 1)
    directions = [self.forward] + ([self.backward] if self.bidirectional else [])
    finals = []
    for layer in range(self.layers):
      x = self.drop(x, deterministic=not train)
      outs, ends = [], []
      for reverse, cells in enumerate(directions):
        weights = cells[layer].weights()
        start = begin(self.kind, x.shape[1], self.width, self.dtype)
        inputs = partition.constrain(project(weights, x), (None, 'batch', None))
        out, end = recur(self.kind, bool(reverse), inputs, weights['recurrent'],
                         start if states is None else states[layer], mask)
        outs.append(out if mask is None else jnp.where(mask[..., None], out, 0))
        ends.append(end)
      x = jnp.concatenate(outs, axis=-1) if self.bidirectional else outs[0]
      finals.append(tuple(ends))
    return x.swapaxes(0, 1), finals


def climb(kind: str, layers: Sequence[Weights], inputs: jax.Array, states: Sequence[State],
          drop: Callable[[jax.Array, int], jax.Array] = lambda x, layer: x) -> list[State]:
  """One step of a forward stack, for loops outside.

  Args:
    kind: a key of `GATES`.
    layers: what `Stack.weights` gave.
    inputs: `[batch, gates * width]`, the first layer's input product.
    states: of the layers at the step before.
    drop: dropout of what a layer reads, given the layer's number, from 1.

  Returns:
    the layers' states after the step.
  """
  after = []
  for number, (weights, state) in enumerate(zip(layers, states, strict=True)):
    if number:
      inputs = project(weights, drop(after[-1][0].astype(inputs.dtype), number))
    after.append(advance(kind, weights, inputs, state))
  return after
