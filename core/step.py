"""The compiled step: accumulate gradients, update, average. No paper is named here."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """Everything that a run carries from step to step.

  Attributes:
    step: int32 scalar, updates done. It is also the whole state of the data and of the random
      numbers: both are functions of (seed, step).
    params: float32 parameters.
    opt_state: state of the optax optimizer.
    ema: moving average of `params`, or None.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any


def init_state(params, optimizer: optax.GradientTransformation, ema: float) -> TrainState:
  # The average starts as a copy: with one buffer in two places the step could not donate it.
  average = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def microbatches(batch, accum: int):
  """[batch, ...] -> [accum, batch/accum, ...]; row i goes to microbatch i mod accum.

  The stride keeps every device's rows on that device: a contiguous split would move them all.
  """
  def split(x):
    return x.reshape(x.shape[0] // accum, accum, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(split, batch)


def gradient_update(loss_fn: Callable, optimizer: optax.GradientTransformation, accum: int,
                    state: TrainState, batch: Mapping[str, jax.Array],
                    rng: jax.Array) -> tuple[TrainState, dict]:
  """One optimizer update from the gradient of the mean loss over the whole batch.

  Args:
    loss_fn: a `Task.loss`.
    optimizer: its state is in `state`.
    accum: microbatches; each loss is a mean over its own `Aux.weight`, so that the sum of
      weight * gradient over the sum of weights is the gradient of the whole batch, however
      unevenly the weights fall.
    state: the state before.
    batch: arrays `[batch, ...]`.
    rng: key of this step.

  Returns:
    The state after (step and ema untouched), and metrics name -> (sum, weight).
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def weighted(micro, key):
    (loss, aux), grads = grad_fn(state.params, micro, key, True)
    weight = aux.weight.astype(jnp.float32)
    metrics = dict(aux.metrics, loss=(loss * weight, weight))
    return grads, weight, metrics

  if accum == 1:
    grads, _, metrics = weighted(batch, rng)
  else:
    def body(carry, x):
      micro, index = x
      grads, weight, metrics = weighted(micro, jax.random.fold_in(rng, index))
      scaled = jax.tree.map(lambda g: g * weight, grads)
      return jax.tree.map(jnp.add, carry, (scaled, weight, metrics)), None

    micro = microbatches(batch, accum)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                         jax.eval_shape(weighted, first, rng))
    (grads, weight, metrics), _ = jax.lax.scan(body, zeros, (micro, jnp.arange(accum)))
    # An empty batch has no gradient, not an infinite one.
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-9), grads)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  one = jnp.ones((), jnp.float32)
  metrics['grad_norm'] = (optax.global_norm(grads), one)
  return state.replace(params=params, opt_state=opt_state), metrics


def make_train_step(task, optimizer: optax.GradientTransformation, schedule: optax.Schedule,
                    seed: int, ema: float) -> Callable:
  """Returns `step(state, batch) -> (state, metrics)`, a pure function ready for `jax.jit`."""

  def train_step(state: TrainState, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    new, metrics = task.update(state, batch, rng, optimizer)
    if ema:
      new = new.replace(ema=jax.tree.map(
          lambda a, p: a * ema + p * (1 - ema), state.ema, new.params))
    metrics['learning_rate'] = (schedule(state.step), jnp.ones((), jnp.float32))
    return new.replace(step=state.step + 1), metrics
  return train_step
