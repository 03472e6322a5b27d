"""From `config.optim` to an optax transformation: optimizers and schedules by name.

The chain, in order: clip by global norm, the optimizer's own scaling, decoupled weight decay on
the parameters that `decay_mask` selects, learning-rate multipliers, schedule. Frozen parameters
are outside the chain: they do not count in the norm and have no optimizer state.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from core import partition
from core.config import UserError, choose, duration


def _bert_adam(b1: float = .9, b2: float = .999, eps: float = 1e-6) -> optax.GradientTransformation:
  """Adam without the correction of its moments' start at zero, as BERT's released code has it: its
  first steps are longer, where gradients stay alike up to 6.5 times, after 1,000 by a quarter."""
  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

  def update(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment(updates, state.nu, b2, 2)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
    return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)
  return optax.GradientTransformation(init, update)


# Each turns a gradient into a direction; the learning rate comes after. Decay is decoupled for
# all of them (Loshchilov and Hutter, 2019), so 'adam' and 'adamw' differ in name only.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    'sgd': lambda momentum=0.9, nesterov=False, accumulator_dtype=None: optax.trace(
        momentum, nesterov, accumulator_dtype) if momentum else optax.identity(),
    'adam': optax.scale_by_adam,
    'adamw': optax.scale_by_adam,
    'bert_adam': _bert_adam,
    'adadelta': optax.scale_by_adadelta,
    'adafactor': optax.scale_by_factored_rms,
    'adagrad': optax.scale_by_rss,
    'lamb': optax.scale_by_adam,  # the trust ratio follows the decay, see make_optimizer
    'lion': optax.scale_by_lion,
    'rmsprop': optax.scale_by_rms,
}


def _cosine(t, warmup, total, end):
  return end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * _progress(t, warmup, total)))


def _linear(t, warmup, total, end):
  return end + (1 - end) * (1 - _progress(t, warmup, total))


def _rsqrt(t, warmup, total, end):
  del total, end
  timescale = max(warmup, 1)
  return jnp.sqrt(timescale / jnp.maximum(t, timescale))


def _constant(t, warmup, total, end):
  del warmup, total, end
  return jnp.ones_like(t)


def _progress(t, warmup, total):
  return jnp.clip((t - warmup) / max(total - warmup, 1), 0, 1)


SCHEDULES = {'cosine': _cosine, 'linear': _linear, 'rsqrt': _rsqrt, 'noam': _rsqrt,
             'constant': _constant,
             'step': None}  # It takes its own arguments, see make_schedule.


def make_schedule(schedule: ml_collections.ConfigDict, base_lr: float,
                  steps_of: Callable[[str, str], int], total: int) -> optax.Schedule:
  """Learning rate as a function of the step (the first update is step 0).

  Args:
    schedule: `name`; `warmup`, a duration of linear growth from 0; `end_lr`, the rate reached at
      the end by cosine and linear; for 'step', `boundaries` (durations) and `factor`.
    base_lr: the rate at the end of the warm-up.
    steps_of: turns a duration and the key it came from into steps.
    total: steps of the run.

  Returns:
    step -> rate, float32; at step 0 it is 0 when there is a warm-up, but for 'noam'.
  """
  name = schedule.name
  choose('config.optim.schedule.name', name, SCHEDULES)
  warmup = steps_of(schedule.warmup, 'config.optim.schedule.warmup')
  if warmup > total:
    raise UserError(f'config.optim.schedule.warmup is {warmup} steps, longer than the run of '
                    f'{total} steps')
  end = schedule.end_lr / base_lr if base_lr else 0.
  if name == 'step':
    boundaries = jnp.asarray([steps_of(b, 'config.optim.schedule.boundaries')
                              for b in schedule.boundaries], jnp.float32)
    shape = lambda t: schedule.factor ** jnp.sum(t >= boundaries)
  else:
    shape = lambda t: SCHEDULES[name](t, warmup, total, end)

  def rate(step):
    # "Attention Is All You Need", equation 3, counts steps from 1, so that none is without effect.
    t = jnp.asarray(step, jnp.float32) + (name == 'noam')
    ramp = jnp.minimum(1., t / warmup) if warmup else 1.
    return jnp.asarray(base_lr * ramp * shape(t), jnp.float32)
  return rate


def match(pattern: str, params) -> Any:
  """A tree of bools: which parameters' 'a/b/c' names the regular expression finds."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: bool(re.search(pattern, partition.path_name(path))), params)


def _check_regex(key: str, pattern: str, params) -> None:
  try:
    re.compile(pattern)
  except re.error as e:
    raise UserError(f'{key}={pattern!r} is not a regular expression: {e}') from e
  if not any(jax.tree.leaves(match(pattern, params))):
    names = [partition.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    raise UserError(f'{key}={pattern!r} matches no parameter; names look like {names[0]!r}, '
                    f'{names[-1]!r}')


def make_optimizer(optim: ml_collections.ConfigDict, params, *, steps: int, batch_size: int | None,
                   examples: int | None,
                   frozen: str = '') -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Builds the optimizer of a config.

  Args:
    optim: `name` and `args` of the optimizer; `lr`; `schedule`; `clip_norm` (0: off);
      `weight_decay` and `decay_mask`, a regular expression over parameter names;
      `lr_multipliers`, a sequence of (regular expression, factor), the first match counts;
      `freeze`, a regular expression of parameters that keep their values ('' for none).
    params: parameter tree (shapes are enough).
    steps: steps of the run.
    batch_size: examples a step, None where they vary.
    examples: examples an epoch, when known.
    frozen: like `optim.freeze`, what the task keeps as it is.

  Returns:
    The transformation and its schedule (for logging).

  Raises:
    UserError: unknown names or arguments, or patterns that match nothing.
  """
  steps_of = lambda text, what: duration(text, batch_size=batch_size, examples=examples,
                                         total=steps, what=what)
  factory = choose('config.optim.name', optim.name, OPTIMIZERS)
  try:
    scale = factory(**optim.args)
  except TypeError as e:
    raise UserError(f'config.optim.args={dict(optim.args)} for {optim.name!r}: {e}') from e
  schedule = make_schedule(optim.schedule, optim.lr, steps_of, steps)

  parts = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
  parts.append(scale)
  if optim.weight_decay:
    _check_regex('config.optim.decay_mask', optim.decay_mask, params)
    # A callable, because under freezing optax hands each part only its own parameters.
    parts.append(optax.add_decayed_weights(
        optim.weight_decay, mask=lambda tree: match(optim.decay_mask, tree)))
  if optim.name == 'lamb':
    parts.append(optax.scale_by_trust_ratio())
  if optim.lr_multipliers:
    for pattern, _ in optim.lr_multipliers:
      _check_regex('config.optim.lr_multipliers', pattern, params)
    parts.append(_by_name(optim.lr_multipliers))
  parts.append(optax.scale_by_learning_rate(schedule))
  tx = optax.chain(*parts)
  if optim.freeze:
    _check_regex('config.optim.freeze', optim.freeze, params)
  if optim.freeze or frozen:
    kept = match('|'.join(f'(?:{p})' for p in (optim.freeze, frozen) if p), params)
    if all(jax.tree.leaves(kept)):
      raise UserError(f'config.optim.freeze={optim.freeze!r} freezes every parameter')
    labels = jax.tree.map(lambda f: 'frozen' if f else 'trained', kept)
    tx = optax.partition({'trained': tx, 'frozen': optax.set_to_zero()}, labels)
  return tx, schedule


def _by_name(multipliers: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  """Scales each update by the factor of the first pattern that its name matches."""
  def factor(path):
    name = partition.path_name(path)
    return next((f for pattern, f in multipliers if re.search(pattern, name)), 1.)

  def update(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path), updates)
  return optax.stateless(update)
