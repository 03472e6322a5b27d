"""Every config makes a task, with the numbers of the paper and of its authors' code."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from configs import bert4rec
from core import config as config_lib, optim, task as task_lib
from core.config import UserError

ARGS = [f'{model},{data},{recipe}' for model in bert4rec.MODELS for data in bert4rec.DATASETS
        for recipe in bert4rec.RECIPES]


@pytest.mark.parametrize('arg', ['', 'smoke', 'large', 'ml1m', *ARGS])
def test_every_config_makes_a_task(arg):
  config = bert4rec.get_config(arg)
  config_lib.validate(config)
  config.model.catalogue = config.model.catalogue or 1000
  task = task_lib.load(config)
  spec = task.batch_spec(4)
  causal = config.model.kind == 'sasrec'
  assert causal == ('sasrec' in arg)
  assert spec['items'].shape == (4, config.model.length + causal)
  assert spec == task.specs(4, train=True)[-1]
  assert task.model.rows == task.rows > config.model.catalogue
  for name in ('dropout', 'attention_dropout', 'positions', 'residual', 'segments', 'transform'):
    assert getattr(task.model, name) == config.model[name]


# Sections 3 and 5 of the sheet: catalogue, N, rho, M, step between windows, dropout of hidden units
# and of attention, and steps.
PAPER = {'beauty': (54_542, 50, .6, 30, 5, .5, .2, 400_000),
         'steam': (13_044, 50, .4, 20, 25, .1, .1, 800_000),
         'ml1m': (3_416, 200, .2, 40, 100, .2, .2, 400_000),
         'ml20m': (26_744, 200, .2, 20, 100, .1, .1, 400_000)}


@pytest.mark.parametrize('data', PAPER)
def test_hyper_parameters_are_the_papers(data):
  config = bert4rec.get_config(data)
  model = config.model
  step = int(config.data.sliding * model.length)
  assert PAPER[data] == (model.catalogue, model.length, model.mask_rate, model.max_masks, step,
                         model.dropout, model.attention_dropout, int(config.steps.split()[0]))
  assert (model.kind, model.width, model.depth, model.heads, model.mlp_dim) == (
      'bert4rec', 64, 2, 2, 0)
  assert task_lib.load(config).model.mlp_dim == 256
  assert (model.specials, model.padding, model.masking, model.loss) == (
      4, 'right', 'fixed', 'softmax')
  assert model.segments and model.transform and model.positions and model.residual
  # One more sample a window, beside ten.
  assert model.last_share == pytest.approx(1 / 11)
  assert (config.batch_size, config.data.validation, config.data.min_length) == (256, 'none', 5)
  assert config.data.min_item_count == (5 if data == 'ml1m' else 0) and config.data.core == 0
  assert (config.eval.negatives, config.eval.negatives_seed) == (100, 12345)
  # Lengths of batches are compiled ones: the last is N.
  assert not config.data.lengths or config.data.lengths[-1] == model.length


def test_the_optimizer_is_the_authors():
  config = bert4rec.get_config('ml1m')
  o = config.optim
  assert (o.name, o.lr, o.weight_decay, o.clip_norm) == ('bert_adam', 1e-4, .01, 5.)
  assert o.args.to_dict() == dict(b1=.9, b2=.999, eps=1e-6)
  assert (o.schedule.name, o.schedule.warmup, o.schedule.end_lr) == ('linear', '100 steps', 0.)
  task = task_lib.load(config)
  params = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  # Decayed is all but norms and biases.
  decayed = {'/'.join(k.key for k in path): x
             for path, x in jax.tree_util.tree_leaves_with_path(optim.match(o.decay_mask, params))}
  assert {name for name, yes in decayed.items() if not yes} == {
      name for name in decayed if 'norm' in name or 'LayerNorm' in name or 'bias' in name}
  assert decayed['item_embedding'] and decayed['position_embedding']
  _, rate = optim.make_optimizer(o, params, steps=400_000, batch_size=256, examples=None)
  np.testing.assert_allclose([rate(0), rate(50), rate(100), rate(200_050), rate(400_000)],
                             [0, 5e-5, 1e-4, 5e-5, 0], rtol=1e-5, atol=1e-12)


def test_models_differ_in_their_losses():
  found = {name: bert4rec.get_config(f'{name},ml1m').model for name in bert4rec.MODELS}
  assert {name: (m.kind, m.loss) for name, m in found.items()} == {
      'bert4rec': ('bert4rec', 'softmax'), 'sasrec': ('sasrec', 'gbce'),
      'sasrec_ce': ('sasrec', 'softmax'), 'gsasrec': ('sasrec', 'gbce')}
  # gSASRec: 256 negatives and t = .75; with one of each position's own and t = 0 it is SASRec.
  assert (found['gsasrec'].negatives, found['gsasrec'].calibration) == (256, .75)
  sasrec = found['sasrec']
  assert (sasrec.negatives, sasrec.calibration, sasrec.shared_negatives) == (1, 0., False)
  for name in ('sasrec', 'sasrec_ce', 'gsasrec'):
    assert not found[name].transform and not found[name].segments


def test_converged_stops_when_nothing_is_better():
  for arg, validation in (('ml1m,converged', 'users'), ('sasrec,beauty', 'users'),
                          ('ml100k', 'item'), ('gsasrec,own', 'item')):
    config = bert4rec.get_config(arg)
    checkpoint = config.checkpoint
    assert (checkpoint.best, checkpoint.select, checkpoint.patience) == (
        'validation/unseen/NDCG@10', 'best', 20)
    assert config.data.validation == validation
    assert (config.optim.name, config.optim.lr, config.optim.schedule.name) == (
        'adam', 1e-3, 'constant')
    name, protocol, measure = checkpoint.best.split('/')
    config.model.catalogue = 1000
    assert name in task_lib.load(config).evaluators()
  assert bert4rec.get_config('ml100k,paper').checkpoint.best == ''
  assert bert4rec.get_config('sasrec,ml1m,paper').optim.name == 'bert_adam'


@pytest.mark.parametrize('arg, words', [
    ('ml10m', "data set: unknown name 'ml10m'; did you mean 'ml"),
    ('sasrec', r'write \[MODEL,\]DATA'), ('sasrec,ml1m,paper,more', r'write \[MODEL,\]DATA'),
    ('bert,ml1m', "model or data set: unknown name 'bert'; .*valid: bert4rec, sasrec.* beauty"),
    ('sasrec,ml2m', "data set: unknown name 'ml2m'; .*valid: beauty, steam"),
    ('ml1m,papers', "recipe: unknown name 'papers'; did you mean 'paper'")])
def test_wrong_arguments_say_what_is_right(arg, words):
  with pytest.raises(UserError, match=words) as error:
    bert4rec.get_config(arg)
  assert '\n' not in str(error.value)
