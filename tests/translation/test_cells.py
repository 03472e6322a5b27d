"""Cells and stacks against loops in float64, written from the formulas, gate by gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.config import UserError
from translation import cells

WIDTH, INPUTS = 3, 2
LENGTHS = (4, 2, 0)


def sigma(x):
  return 1 / (1 + np.exp(-x))


def step(kind, weights, x, state, context=None):
  """One step of one example: x `[inputs]`, state a tuple of `[width]`."""
  width = len(state[0])
  gates = np.asarray(weights['bias'], np.float64).size // width
  def part(name, gate):
    return np.asarray(weights[name], np.float64)[..., gate * width:(gate + 1) * width]
  def given(gate):
    total = x @ part('kernel', gate) + part('bias', gate)
    return total if context is None else total + context @ part('context', gate)
  h = state[0]
  before = [given(g) + h @ part('recurrent', g) for g in range(gates)]
  if kind == 'rnn':
    return (np.tanh(before[0]),)
  if kind == 'lstm':
    i, f, g, o = sigma(before[0]), sigma(before[1]), np.tanh(before[2]), sigma(before[3])
    c = f * state[1] + i * g
    return (o * np.tanh(c), c)
  r, z = sigma(before[0]), sigma(before[1])
  n = np.tanh(given(2) + (r * h) @ part('recurrent', 2))
  return (z * h + (1 - z) * n,)


def zeros(kind, width):
  return (np.zeros(width),) * (2 if kind == 'lstm' else 1)


def run(kind, weights, xs, reverse=False, state=None):
  """All steps of one example: hidden states `[length, width]`, and the last state."""
  width = np.shape(weights['recurrent'])[0]
  state = zeros(kind, width) if state is None else state
  hidden = [None] * len(xs)
  for t in reversed(range(len(xs))) if reverse else range(len(xs)):
    state = step(kind, weights, xs[t], state)
    hidden[t] = state[0]
  return np.array(hidden).reshape(len(xs), width), state


def random_like(tree, scale=.5, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * scale), nn.unbox(tree))


def made(module, *args, seed=0, **kw):
  """Random parameters, biases too, of a module's shapes."""
  return random_like(jax.eval_shape(
      lambda: module.init(jax.random.key(0), *args, **kw))['params'], seed=seed)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('kind', ['rnn', 'lstm', 'gru'])
def test_values_and_gradients_of_a_loop(kind, reverse):
  """Gradients against central differences of the float64 loop."""
  rng = np.random.default_rng(1)
  gates = {'rnn': 1, 'lstm': 4, 'gru': 3}[kind]
  draw = lambda *shape: rng.normal(size=shape) * .7
  args = {'x': draw(4, len(LENGTHS), INPUTS), 'kernel': draw(INPUTS, gates * WIDTH),
          'recurrent': draw(WIDTH, gates * WIDTH), 'bias': draw(gates * WIDTH),
          'state': draw(2 if kind == 'lstm' else 1, len(LENGTHS), WIDTH)}
  probe = draw(4, len(LENGTHS), WIDTH)
  mask = np.arange(4)[:, None] < np.array(LENGTHS)

  def oracle(args):
    total = 0.
    for b, n in enumerate(LENGTHS):
      hidden, last = run(kind, args, args['x'][:n, b], reverse, tuple(args['state'][:, b]))
      total += (hidden * probe[:n, b]).sum() + sum(s.sum() for s in last)
    return total

  def loss(args):
    hidden, last = cells.recur(kind, reverse, cells.project(args, args['x']), args['recurrent'],
                               tuple(args['state']), mask)
    return (hidden * probe * mask[..., None]).sum() + sum(s.sum() for s in last)

  value, grads = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.float32, args))
  np.testing.assert_allclose(value, oracle(args), rtol=1e-5)
  for name, grad in grads.items():
    for where in np.ndindex(grad.shape):
      moved = []
      for sign in (1, -1):
        other = dict(args, **{name: args[name].copy()})
        other[name][where] += sign * 1e-5
        moved.append(oracle(other))
      np.testing.assert_allclose(grad[where], (moved[0] - moved[1]) / 2e-5, rtol=1e-4, atol=2e-5,
                                 err_msg=f'{name}{where}')


@pytest.mark.parametrize('kind, bidirectional', [('lstm', True), ('gru', True), ('rnn', False)])
def test_a_stack_on_a_padded_batch(kind, bidirectional):
  stack = cells.Stack(kind, INPUTS, WIDTH, layers=2, bidirectional=bidirectional)
  x = np.random.default_rng(2).normal(size=(3, 5, INPUTS)).astype(np.float32)
  mask = np.arange(5) < np.array(LENGTHS)[:, None]
  params = made(stack, x)
  out, finals = jax.jit(stack.apply)({'params': params}, np.where(mask[..., None], x, 7.),
                                     mask=mask)
  for b, n in enumerate(LENGTHS):
    below = np.float64(x[b, :n])
    for layer in range(2):
      ways = [run(kind, params[f'forward_{layer}'], below)]
      if bidirectional:
        ways.append(run(kind, params[f'backward_{layer}'], below, reverse=True))
      below = np.concatenate([hidden for hidden, _ in ways], axis=-1)
      for (_, want), got in zip(ways, finals[layer], strict=True):
        for w, g in zip(want, got, strict=True):
          np.testing.assert_allclose(g[b], w, atol=1e-6)
    np.testing.assert_allclose(out[b, :n], below, atol=1e-6)
    assert not np.asarray(out[b, n:]).any()


def test_a_stack_step_by_step():
  stack = cells.Stack('gru', INPUTS, WIDTH, layers=2)
  x = np.random.default_rng(3).normal(size=(2, 4, INPUTS)).astype(np.float32)
  params = made(stack, x)
  states = [(np.full((2, WIDTH), .1 * (i + 1), np.float32),) for i in range(2)]
  whole, finals = jax.jit(stack.apply)({'params': params}, x, states=states)
  weights = stack.apply({'params': params}, method='weights')
  step = jax.jit(lambda x, states: cells.climb('gru', weights, cells.project(weights[0], x),
                                               states))
  for t in range(4):
    states = step(x[:, t], states)
    np.testing.assert_allclose(states[-1][0], whole[:, t], atol=1e-6)
  np.testing.assert_allclose(states[0][0], finals[0][0][0], atol=1e-6)
  with pytest.raises(ValueError, match='bidirectional'):
    stack.clone(bidirectional=True).init(jax.random.key(0), x, states=states)


def test_dropout_is_on_the_inputs_of_layers_alone():
  """Where it drops everything, what is left is bias and recurrence."""
  stack = cells.Stack('lstm', INPUTS, WIDTH, layers=2, dropout=1 - 1e-7)
  x = np.random.default_rng(4).normal(size=(2, 4, INPUTS)).astype(np.float32)
  params = made(stack, x)
  alone = dict(params['forward_1'], kernel=np.zeros((WIDTH, 4 * WIDTH)))
  run_once = jax.jit(stack.apply, static_argnames='train')
  out, _ = run_once({'params': params}, x, train=True, rngs={'dropout': jax.random.key(0)})
  want, _ = run('lstm', alone, np.zeros((4, WIDTH)))
  np.testing.assert_allclose(out[0], want, atol=1e-6)
  assert np.abs(want[0] - want[3]).max() > .01
  kept, _ = run_once({'params': params}, x)
  assert np.abs(kept[0] - want).max() > .01


def test_half_precision_keeps_float32_states():
  stack = cells.Stack('lstm', INPUTS, WIDTH, layers=1, dtype=jnp.bfloat16)
  x = np.random.default_rng(5).normal(size=(2, 4, INPUTS)).astype(np.float32)
  params = made(stack, x)

  def loss(params):
    out = stack.apply({'params': params}, x)
    return out[0].astype(jnp.float32).sum(), out
  grads, (out, finals) = jax.jit(jax.grad(loss, has_aux=True))(params)
  whole = jax.jit(stack.clone(dtype=jnp.float32).apply)({'params': params}, x)[0]
  assert out.dtype == jnp.bfloat16 and finals[0][0][1].dtype == jnp.float32
  np.testing.assert_allclose(np.float32(out), whole, atol=.03)
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def params_of(initializer, kind='lstm', inputs=48, width=32):
  cell = cells.Cell(kind, inputs, width, initializer=initializer)
  init = jax.jit(lambda: cell.init(jax.random.key(0), method='weights'))
  return nn.unbox(init()['params'])


@pytest.mark.parametrize('initializer, bound', [('sutskever', .08), ('luong', .1)])
def test_uniform_initial_values(initializer, bound):
  for values in params_of(initializer).values():
    assert np.abs(values).max() <= bound
    np.testing.assert_allclose(np.std(values), bound / 3 ** .5, rtol=.15)


@pytest.mark.parametrize('initializer, std, forget', [
    ('modern', (2 / (48 + 32)) ** .5, 1.), ('bahdanau', .01, 0.)])
def test_orthogonal_initial_values(initializer, std, forget):
  """Every gate's block is a matrix of its own."""
  params = params_of(initializer)
  for gate in range(4):
    block = np.asarray(params['recurrent'][:, 32 * gate:32 * (gate + 1)])
    np.testing.assert_allclose(block @ block.T, np.eye(32), atol=1e-5)
  np.testing.assert_allclose(np.std(params['kernel']), std, rtol=.05)
  np.testing.assert_array_equal(params['bias'], np.repeat([0, forget, 0, 0], 32))


def test_unknown_names():
  with pytest.raises(UserError, match="config.model.cell: unknown name 'ltsm'.*'lstm'"):
    params_of('modern', kind='ltsm')
  with pytest.raises(UserError, match='config.model.initializer'):
    params_of('older')
