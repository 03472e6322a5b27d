import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from core import partition
from core.config import UserError
from core.plan import make_plan


def layout(rules, **mesh):
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, **mesh}
  devices = np.asarray(jax.devices()[:math.prod(sizes.values())]).reshape(list(sizes.values()))
  return partition.Layout(jax.sharding.Mesh(devices, partition.AXES), partition.RULES[rules])


def test_the_table():
  kernel = (('embed', 'heads', 'kv'), (64, 4, 16))
  assert layout('dp', data=8).spec(*kernel) == P()
  assert layout('fsdp', fsdp=8).spec(*kernel) == P('fsdp')
  assert layout('tp', tensor=2).spec(*kernel) == P(None, 'tensor')
  assert layout('fsdp_tp', fsdp=4, tensor=2).spec(*kernel) == P('fsdp', 'tensor')
  assert layout('fsdp', data=2, fsdp=4).spec(('batch', None), (16, 3)) == P(('data', 'fsdp'))


def test_a_dimension_that_does_not_divide_stays_whole():
  # 3 heads on 2 tensor ways: left whole. A bias of 6 on 8 fsdp ways: left whole.
  assert layout('tp', tensor=2).spec(('embed', 'heads', 'kv'), (192, 3, 64)) == P()
  assert layout('fsdp', fsdp=8).spec(('mlp',), (6,)) == P()
  # The width does not divide, so the next dimension in the list is split instead.
  assert layout('fsdp', fsdp=8).spec(('embed', 'mlp'), (10, 64)) == P(None, 'fsdp')


@pytest.mark.parametrize('rules, mesh, sizes', [
    ('dp', {}, (8, 1, 1)), ('fsdp', {}, (1, 8, 1)), ('tp', {}, (1, 1, 8)),
    ('fsdp_tp', {}, (1, 4, 2)), ('fsdp', {'data': 2}, (2, 4, 1)), ('tp', {'data': 4}, (4, 1, 2)),
    ('fsdp_tp', {'tensor': 4}, (1, 2, 4))])
def test_automatic_sizes(smoke, rules, mesh, sizes):
  config = smoke()
  config.rules = rules
  config.mesh.update(mesh)
  assert partition.make_layout(config).mesh.devices.shape == sizes


@pytest.mark.parametrize('change, match', [
    (dict(rules='fdsp'), "did you mean 'fsdp'"), (dict(mesh=dict(data=3)), 'there are 8'),
    (dict(mesh=dict(data=-1)), 'positive'), (dict(batch_size=12), 'multiple of 8'),
    (dict(batch_size=8, accum=2), 'multiple of 16')])
def test_bad_layouts(smoke, change, match):
  config = smoke()
  config.update(change)
  with pytest.raises(UserError, match=match):
    partition.make_layout(config)


def _run(config, devices, steps=5):
  plan = make_plan(config, devices)
  rng = np.random.default_rng(0)
  spec = plan.task.batch_spec(config.batch_size)
  batch = {'image': rng.integers(0, 255, spec['image'].shape).astype(np.uint8),
           'label': rng.integers(0, 10, spec['label'].shape).astype(np.int32),
           'mask': np.ones(spec['mask'].shape, np.float32)}
  batch = {k: jax.device_put(v, plan.batch_sharding[k]) for k, v in batch.items()}
  state = plan.init(jax.random.key(0))
  losses = []
  for _ in range(steps):
    state, found = plan.train_step(state, batch)
    losses.append(float(found['loss'][0] / found['loss'][1]))
  return plan, state, losses


@pytest.mark.parametrize('rules, mesh', [
    pytest.param('dp', {}, marks=pytest.mark.slow), ('fsdp', {}),
    ('tp', {'tensor': 2, 'data': 4}), ('fsdp_tp', {}),
    pytest.param('fsdp', {'data': 2}, marks=pytest.mark.slow)])
def test_every_preset_gives_the_loss_curve_of_one_device(smoke, rules, mesh):
  def config():
    config = smoke()
    config.model.dropout_rate = 0.1
    return config
  _, _, expected = _run(config(), jax.devices()[:1])
  sharded = config()
  sharded.rules = rules
  sharded.mesh.update(mesh)
  _, _, losses = _run(sharded, jax.devices())
  np.testing.assert_allclose(losses, expected, rtol=2e-5)
  assert losses[-1] < losses[0]


def test_fsdp_stores_an_eighth_on_each_device(smoke):
  config = smoke()
  config.rules = 'fsdp'
  config.ema = 0.9
  config.model.num_classes = 16  # so that every tensor has a dimension that 8 divides
  plan, state, _ = _run(config, jax.devices(), steps=1)
  for name in ('params', 'opt_state', 'ema'):
    leaves = [x for x in jax.tree.leaves(getattr(state, name)) if x.ndim]
    total = sum(x.nbytes for x in leaves)
    for device in jax.devices():
      held = sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == device)
      assert held == total / 8, (name, device)
  # The report counts the same bytes.
  text = partition.report(plan.params_shape, plan.state_sharding.params)
  total = sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert f'parameters {partition.human_bytes(total)}' in text
  assert f'{partition.human_bytes(total / 8)} a device, 0 B held whole' in text


def test_optimizer_state_follows_the_parameters(smoke):
  config = smoke()
  config.rules = 'fsdp_tp'
  plan = make_plan(config)
  adam = next(s for s in jax.tree.leaves(
      plan.state_sharding.opt_state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(s, 'mu'))
  chex.assert_trees_all_equal(adam.mu, plan.state_sharding.params)
  assert adam.count.is_fully_replicated


def test_activations_are_constrained_only_under_a_layout():
  x = jnp.ones((8, 4))
  assert partition.constrain(x, ('batch', 'embed')) is x
  with partition.use(layout('dp', data=8)):
    y = jax.jit(lambda x: partition.constrain(x, ('batch', 'embed')))(x)
  assert y.sharding.spec == P('data')
