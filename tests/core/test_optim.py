import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from core import optim
from core.config import UserError

PARAMS = {'block': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)},
          'head': {'kernel': jnp.full((2, 2), 2.), 'bias': jnp.zeros(2)}}


def make(params=PARAMS, steps=100, **changes):
  config = common.base().optim
  for key, value in changes.items():
    if key == 'schedule':
      config.schedule.update(value)
    elif key == 'args':
      config.args.update(value)
    else:
      config[key] = value
  return optim.make_optimizer(config, params, steps=steps, batch_size=10, examples=100)


def one_update(tx, params=PARAMS, grads=None):
  grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
  return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize('name, end, last', [('cosine', 0., 0.), ('linear', 1e-5, 1e-5),
                                             ('constant', 0., 0.4)])
def test_schedule_ends(name, end, last):
  _, rate = make(lr=0.4, schedule=dict(name=name, warmup='10 steps', end_lr=end))
  assert rate(0) == 0.
  np.testing.assert_allclose(rate(5), 0.2, rtol=1e-6)
  np.testing.assert_allclose(rate(10), 0.4, rtol=1e-6)
  np.testing.assert_allclose(rate(100), last, atol=1e-8, rtol=1e-5)


def test_cosine_and_linear_in_the_middle():
  for name in ('cosine', 'linear'):
    _, rate = make(lr=1., schedule=dict(name=name, warmup='20%'))
    np.testing.assert_allclose(rate(60), 0.5, rtol=1e-6)
  _, rate = make(lr=1., schedule=dict(name='cosine', warmup='0'))
  np.testing.assert_allclose(rate(25), 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)


def test_noam_counts_from_one():
  """Vaswani et al. equation 3: d^-.5 min(t^-.5, t w^-1.5), t the number of the step from 1."""
  _, rate = make(steps=300_000, lr=(512 * 4000) ** -.5,
                 schedule=dict(name='noam', warmup='4000 steps'))
  for t, want in ((1, 1.747e-7), (1000, 1.747e-4), (4000, 6.988e-4), (10_000, 4.419e-4),
                  (100_000, 1.398e-4)):
    np.testing.assert_allclose(rate(t - 1), want, rtol=5e-4)
  np.testing.assert_allclose(rate(299_999) * 2 ** -.5, 5.705e-5, rtol=3e-4)  # the big model


def test_rsqrt_begins_at_zero():
  _, rate = make(lr=.5, schedule=dict(name='rsqrt', warmup='40 steps'))
  np.testing.assert_allclose([rate(t) for t in (0, 10, 40, 90)], [0, .125, .5, 1 / 3], rtol=1e-6)


def test_step_schedule():
  _, rate = make(lr=1., schedule=dict(name='step', boundaries=('3 epochs', '60%'), factor=0.1))
  np.testing.assert_allclose([rate(t) for t in (29, 30, 59, 60)], [1, .1, .1, .01], rtol=1e-5)


def test_adamw_equals_optax():
  tx, _ = make(lr=0.1, weight_decay=0.3, clip_norm=0., decay_mask='.',
               schedule=dict(name='constant'))
  chex.assert_trees_all_close(one_update(tx), one_update(optax.adamw(0.1, weight_decay=0.3)))


def test_sgd_with_momentum_equals_optax_over_steps():
  tx, _ = make(name='sgd', lr=0.1, clip_norm=0., schedule=dict(name='constant'))
  ours, peer = tx.init(PARAMS), optax.sgd(0.1, momentum=0.9)
  theirs = peer.init(PARAMS)
  for i in range(3):
    grads = jax.tree.map(lambda p: p * (i + 1), PARAMS)
    mine, ours = tx.update(grads, ours, PARAMS)
    other, theirs = peer.update(grads, theirs, PARAMS)
    chex.assert_trees_all_close(mine, other)


def test_lamb_equals_optax():
  tx, _ = make(name='lamb', args=dict(eps=1e-6), lr=0.1, weight_decay=0.1, clip_norm=0.,
               decay_mask='.', schedule=dict(name='constant'))
  chex.assert_trees_all_close(one_update(tx), one_update(optax.lamb(0.1, weight_decay=0.1)),
                              rtol=1e-5)


@pytest.mark.parametrize('name', sorted(optim.OPTIMIZERS))
def test_every_optimizer_descends(name):
  tx, _ = make(name=name, lr=0.05, schedule=dict(name='constant'))
  params = {'w': {'kernel': jnp.array([[3., -2.], [1., 4.]])}}
  loss = lambda p: jnp.sum(p['w']['kernel'] ** 2)
  state = tx.init(params)
  before = loss(params)
  for _ in range(10):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
  assert loss(params) < before


def test_decay_touches_only_the_mask():
  tx, _ = make(name='sgd', lr=1., weight_decay=0.5, clip_norm=0., decay_mask='block/kernel$',
               schedule=dict(name='constant'))
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates = one_update(tx, grads=zeros)
  np.testing.assert_allclose(updates['block']['kernel'], -0.5)
  for leaf in (updates['block']['bias'], updates['head']['kernel'], updates['head']['bias']):
    np.testing.assert_allclose(leaf, 0.)


def test_learning_rate_multipliers_take_the_first_match():
  tx, _ = make(name='sgd', lr=1., clip_norm=0., schedule=dict(name='constant'),
               lr_multipliers=(('^head/', 10.), ('kernel', 0.1)))
  updates = one_update(tx)
  np.testing.assert_allclose(updates['head']['kernel'], -10.)
  np.testing.assert_allclose(updates['head']['bias'], -10.)
  np.testing.assert_allclose(updates['block']['kernel'], -0.1, rtol=1e-6)
  np.testing.assert_allclose(updates['block']['bias'], -1.)


def test_frozen_parameters_have_no_update_no_state_and_no_share_in_the_norm():
  tx, _ = make(lr=1., weight_decay=0.1, clip_norm=1., freeze='^block/',
               schedule=dict(name='constant'))
  updates = one_update(tx)
  chex.assert_trees_all_equal(updates['block'], jax.tree.map(jnp.zeros_like, PARAMS['block']))
  state_size = sum(x.size for x in jax.tree.leaves(tx.init(PARAMS)) if x.ndim)
  assert state_size == 2 * sum(x.size for x in jax.tree.leaves(PARAMS['head']))
  # Clipping sees the trained gradients only: with a huge frozen one, the rest is not squeezed.
  sgd, _ = make(name='sgd', lr=1., clip_norm=1., freeze='^block/', schedule=dict(name='constant'))
  grads = {'block': jax.tree.map(lambda p: 1e6 * p, PARAMS['block']),
           'head': jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS['head'])}
  np.testing.assert_allclose(one_update(sgd, grads=grads)['head']['kernel'], -0.1, rtol=1e-6)


def test_clip_by_global_norm():
  tx, _ = make(name='sgd', lr=1., clip_norm=2., schedule=dict(name='constant'))
  updates = one_update(tx, grads=jax.tree.map(lambda p: 100 * jnp.ones_like(p), PARAMS))
  np.testing.assert_allclose(optax.global_norm(updates), 2., rtol=1e-5)


@pytest.mark.parametrize('changes, match', [
    (dict(name='adma'), 'valid: sgd, adam'),
    (dict(schedule=dict(name='cosin')), "did you mean 'cosine'"),
    (dict(args=dict(beta=1)), 'config.optim.args'),
    (dict(freeze='nothing_like_it'), 'matches no parameter'),
    (dict(freeze='.'), 'freezes every parameter'),
    (dict(freeze='('), 'not a regular expression'),
    (dict(weight_decay=.1, decay_mask='kernle'), 'matches no parameter'),
    (dict(lr_multipliers=(('haed', 2.),)), 'matches no parameter'),
    (dict(schedule=dict(warmup='200 steps')), 'longer than the run')])
def test_bad_configs_are_one_line(changes, match):
  with pytest.raises(UserError, match=match):
    make(**changes)


def test_bert_adam_is_adam_with_uncorrected_moments():
  """BERT's AdamWeightDecayOptimizer in float64; decay is decoupled, and not of the moments."""
  tx, _ = make(name='bert_adam', args=dict(b1=.8, b2=.99, eps=1e-3), lr=.1, clip_norm=0.,
               weight_decay=.5, decay_mask='kernel$', schedule=dict(name='constant'))
  rng = np.random.default_rng(0)
  params, state = PARAMS, tx.init(PARAMS)
  want = jax.tree.map(np.float64, PARAMS)
  m, v = (jax.tree.map(np.zeros_like, want) for _ in range(2))
  for _ in range(4):
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape), want)
    m = jax.tree.map(lambda m, g: .8 * m + .2 * g, m, grads)
    v = jax.tree.map(lambda v, g: .99 * v + .01 * g * g, v, grads)
    want = jax.tree_util.tree_map_with_path(
        lambda path, p, m, v: p - .1 * (m / (np.sqrt(v) + 1e-3)
                                        + (.5 * p if path[-1].key == 'kernel' else 0)),
        want, m, v)
    updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, params)
    params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, want, rtol=1e-5)


def test_bert_adam_begins_with_longer_steps_and_ends_as_adam():
  """Of a gradient that stays the same Adam's steps are 1; these are (1 - b1^t) / sqrt(1 - b2^t):
  3.2 at the first and again at 100, 1.26 at 1000."""
  scale = optim.OPTIMIZERS['bert_adam']()
  grad = {'w': jnp.float32(3.)}

  def body(state, _):
    update, state = scale.update(grad, state)
    return state, update['w']
  state, steps = jax.lax.scan(body, scale.init(grad), None, 4000)
  np.testing.assert_allclose(steps[np.array([0, 9, 99, 999])], [3.16, 6.53, 3.24, 1.26], atol=.01)
  assert float(steps.max()) < 6.6 and abs(float(steps[-1]) - 1) < .01
  assert state.count == 4000
