import jax
import numpy as np
import pytest

from core import evaluate
from core.config import RunFailed
from core.plan import make_plan


@pytest.fixture(scope='module')
def params_of():
  cache = {}

  def get(plan):
    key = 'params'
    if key not in cache:
      rng = np.random.default_rng(0)
      cache[key] = jax.tree.map(
          lambda s: rng.normal(0, .2, s.shape).astype(np.float32), plan.params_shape)
    return jax.tree.map(lambda p, s: jax.device_put(p, s.sharding), cache[key], plan.params_shape)
  return get


def oracle(plan, params, split):
  """Accuracy and loss by hand: one example at a time, numpy softmax in float64."""
  source = plan.task.dataset(split)
  right, loss = [], []
  apply = jax.jit(lambda p, x: plan.task.model.apply({'params': p}, x)[0])
  for i in range(len(source)):
    e = plan.task.transform(source[i], np.random.default_rng(0), False)
    image = e['image'][None].astype(np.float32) / 127.5 - 1
    logits = np.asarray(apply(params, image)[0], np.float64)
    right.append(logits.argmax() == e['label'])
    loss.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[e['label']])
  return np.mean(right), np.mean(loss)


@pytest.mark.parametrize('batch_size, devices', [(8, 8), (7, 1), (1, 8), (32, 8), (20, 4)])
def test_every_example_counts_once_whatever_the_batch(smoke, tmp_path, params_of, batch_size,
                                                      devices):
  config = smoke()
  config.eval.batch_size = batch_size
  plan = make_plan(config, jax.devices()[:devices])
  params = params_of(plan)
  found = evaluate.Mean('validation')(evaluate.EvalRun(plan, tmp_path), params, 0)
  accuracy, loss = oracle(plan, params, 'validation')
  assert found['accuracy'] == accuracy
  np.testing.assert_allclose(found['loss'], loss, rtol=1e-5)


def test_map_gives_rows_in_order_without_padding(smoke, tmp_path, params_of):
  plan = make_plan(smoke())
  run = evaluate.EvalRun(plan, tmp_path)
  parts = list(run.map(lambda params, batch: {'label': batch['label']}, params_of(plan), 'test'))
  labels = np.concatenate([p['label'] for p in parts])
  source = plan.task.dataset('test')
  np.testing.assert_array_equal(labels, [source[i]['label'] for i in range(len(source))])


class Counts:
  def __init__(self, every, value=1.):
    self.every, self.value, self.calls = every, value, []

  def __call__(self, run, params, step):
    self.calls.append(step)
    return {'x': self.value}


def _evaluators(smoke, tmp_path, monkeypatch, found):
  config = smoke()
  config.steps, config.eval.every = '10 steps', '4 steps'
  plan = make_plan(config)
  monkeypatch.setattr(type(plan.task), 'evaluators', lambda self: found)
  return evaluate.Evaluators(plan, tmp_path)


def test_cadence(smoke, tmp_path, monkeypatch):
  found = {'a': Counts(''), 'b': Counts('end'), 'c': Counts('50%')}
  evaluators = _evaluators(smoke, tmp_path, monkeypatch, found)
  for step in range(1, 11):
    evaluators.run({}, step, evaluators.due(step))
  assert [found[k].calls for k in 'abc'] == [[4, 8, 10], [], [5, 10]]
  assert evaluators.final == ['b']
  assert evaluators.run({}, 3) == {'a/x': 1., 'b/x': 1., 'c/x': 1.}


def test_a_score_that_is_not_a_number_fails_the_run(smoke, tmp_path, monkeypatch):
  evaluators = _evaluators(smoke, tmp_path, monkeypatch, {'a': Counts('', float('nan'))})
  with pytest.raises(RunFailed, match='step 4: a/x is nan'):
    evaluators.run({}, 4)
