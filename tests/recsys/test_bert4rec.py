"""The task: rows, questions, batches, its loss, and that it learns."""

import functools

import jax
import numpy as np
import optax
import pytest
import scipy.special
from flax import linen as nn

from core.config import UserError
from core.data import pipeline
from recsys import encoder, sequences
from tests.recsys import tiny

# Eight users, each of six different items of 24, in an order that no other has.
HISTORIES = [np.random.default_rng(user).permutation(24)[:6] + 1 for user in range(8)]
KINDS = ('bert4rec', 'sasrec')  # Of the same parameters here.


@functools.cache
def task_of(kind='bert4rec', **changes):
  return tiny.task_of(HISTORIES, items=24, **{
      'model__kind': kind, 'model__length': 8, 'model__depth': 1, 'model__dropout': 0.,
      'model__attention_dropout': 0., 'model__last_share': .5, 'eval__negatives': 10, **changes})


def batch_of(task, histories=HISTORIES):
  rows = [task.transform({'items': np.asarray(h, np.int32), 'bucket': 0}, None, True)['items']
          for h in histories]
  return {'items': np.stack(rows), 'mask': np.ones(len(rows), np.float32)}


@functools.cache
def start():
  return nn.unbox(jax.jit(task_of().init)(jax.random.key(0)))


@functools.cache
def started(kind):
  """The task, parameters as they start, and the compiled loss with gradients."""
  task = task_of(kind)

  @jax.jit
  def loss(params, batch, rng):
    return jax.value_and_grad(task.loss, has_aux=True)(params, batch, rng, True)
  return task, start(), loss


# --- Rows and questions --------------------------------------------------------------------------


@pytest.mark.parametrize('changes, rows, mask', [
    (dict(), 28, 26), (dict(model__specials=2), 26, 25), (dict(model__rows_multiple=8), 32, 26),
    (dict(model__rows_multiple=14), 28, 26)])
def test_rows_are_padding_items_and_specials(changes, rows, mask):
  task = task_of(**changes)
  assert (task.items, task.rows, task.mask_id) == (24, rows, mask)
  assert task.model.rows == rows


@pytest.mark.parametrize('kind, padding, history, items, slot', [
    ('bert4rec', 'right', [5, 6], [5, 6, 26, 0, 0], 2),
    ('bert4rec', 'left', [5, 6], [0, 0, 5, 6, 26], 4),
    ('bert4rec', 'right', [5, 6, 7, 8], [5, 6, 7, 8, 26], 4),
    ('bert4rec', 'right', [4, 5, 6, 7, 8], [5, 6, 7, 8, 26], 4),
    ('bert4rec', 'left', [3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 26], 4),
    ('bert4rec', 'left', [], [0, 0, 0, 0, 26], 4),
    ('sasrec', 'right', [5, 6], [5, 6, 0, 0, 0], 1),
    ('sasrec', 'left', [5, 6], [0, 0, 0, 5, 6], 4),
    ('sasrec', 'right', [4, 5, 6, 7, 8], [4, 5, 6, 7, 8], 4),
    ('sasrec', 'left', [3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8], 4)])
def test_questions(kind, padding, history, items, slot):
  """What is known last, N items or N - 1 and the mask, and answered where training answers."""
  task = task_of(kind, model__length=5, model__padding=padding)
  got, at = task.question(np.asarray(history, np.int32))
  assert (got.tolist(), int(at)) == (items, slot)
  assert got.dtype == at.dtype == np.int32


@pytest.mark.parametrize('changes', [
    dict(), dict(data__lengths=(3, 5, 8)), dict(model__padding='left'),
    dict(kind='sasrec'), dict(kind='sasrec', data__lengths=(2, 4, 8))])
def test_what_the_pipeline_gets_is_what_the_specs_say(changes):
  task = task_of(**changes, data__validation='item')
  train = task.dataset('train')
  specs = task.specs(4, train=True)
  assert task.batch_spec(4) == specs[-1]
  buckets = {int(example['bucket']) for example in map(train.__getitem__, range(len(train)))}
  for bucket in buckets:
    example = next(e for e in map(train.__getitem__, range(len(train))) if e['bucket'] == bucket)
    made = task.transform(example, None, True)
    pipeline.check_against_spec({'items': made['items'][None], 'mask': np.ones(1, np.float32)},
                                specs[bucket])
    there = made['items'][made['items'] > 0]
    np.testing.assert_array_equal(there, example['items'])
    assert (made['items'][-1] > 0) == (task.config.model.padding == 'left' or
                                       len(there) == len(made['items']))
  spec, = task.specs(4, train=False)
  for split in ('validation', 'test'):
    source = task.dataset(split)
    assert len(source) == 8
    for i in range(8):
      made = task.transform(source[i], None, False)
      made |= {'mask': np.float32(1), 'index': np.int32(0)}
      pipeline.check_against_spec({k: np.asarray(v)[None] for k, v in made.items()}, spec)
      assert sorted(made['seen'][made['seen'] > 0]) == sorted(source[i]['history'])


def test_data_come_from_the_log_that_the_config_names(tmp_path):
  path = tmp_path / 'events.txt'
  path.write_text('\n'.join(
      f'{user} {item}' for user, history in enumerate(HISTORIES) for item in history))
  different = len(set(np.concatenate(HISTORIES)))
  of = lambda **changes: tiny.task_of(data__name=f'interactions:{path}', **changes)
  task = of()
  assert task.items == different and len(task.dataset('test')) == 8
  with pytest.raises(UserError, match="did you mean 'test'"):
    task.dataset('tests')
  # Compiling needs no data; training finds that it is another.
  wrong = of(model__catalogue=24_000)
  assert wrong.rows == 24_004
  with pytest.raises(UserError, match=f'catalogue=24,000, but .* has {different} items'):
    wrong.dataset('train')
  # What was prepared is kept.
  task = of()
  task.workdir = tmp_path
  task.prepare()
  path.unlink()
  task = of()
  task.workdir = tmp_path
  assert task.items == different and (tmp_path / 'log.npz').exists()


def test_evaluators_are_of_what_is_held_out():
  names = {validation: set(task_of(data__validation=validation).evaluators())
           for validation in sequences.VALIDATIONS}
  always = {'test', 'popularity', 'attention', 'best_possible'}
  assert names == {'none': always, 'item': always | {'validation'},
                   'users': always | {'validation'}}
  assert 'best_possible' not in task_of(data__name='interactions:x.txt').evaluators()


@pytest.mark.parametrize('changes, words', [
    (dict(model__kind='bert'), "did you mean 'bert4rec'"),
    (dict(model__padding='both'), 'valid: right, left'),
    (dict(model__masking='random'), 'valid: fixed, bernoulli'),
    (dict(model__loss='bce'), 'valid: softmax, sampled, gbce'),
    (dict(model__proposal='zipf'), 'valid: uniform, log_uniform'),
    (dict(data__validation='last'), 'valid: item, users, none'),
    (dict(model__specials=3), 'specials=3: .* 2 or 4'),
    (dict(model__depth=0), 'model.depth=0; it must be at least 1'),
    (dict(model__heads=0), 'model.heads=0; it must be at least 1'),
    (dict(model__negatives=0), 'model.negatives=0; it must be at least 1'),
    (dict(model__rows_multiple=0), 'model.rows_multiple=0; it must be at least 1'),
    (dict(model__heads=3), 'width=16 does not divide into config.model.heads=3'),
    (dict(model__mask_rate=0.), 'mask_rate=0.0 .* are shares'),
    (dict(model__mask_rate=1.5), 'mask_rate=1.5 .* are shares'),
    (dict(model__last_share=1.5), 'last_share=1.5 are shares'),
    (dict(data__sliding=0.), 'sliding=0.0: the step'),
    (dict(data__sliding=1.5), 'sliding=1.5: the step'),
    (dict(data__lengths=(8, 4)), r'lengths=\(8, 4\): ascending'),
    (dict(data__lengths=(4, 4, 8)), 'ascending'),
    (dict(data__lengths=(4, 6)), 'the last is config.model.length=8'),
    (dict(data__lengths=(1, 8)), 'from 2'),
    (dict(data__lengths=(4, 8), model__padding='left'), "needs config.model.padding='right'")])
def test_bad_configs(changes, words):
  with pytest.raises(UserError, match=words) as error:
    tiny.task_of(**{'model__length': 8, **changes})
  assert '\n' not in str(error.value)


# --- The loss ------------------------------------------------------------------------------------


def test_start_is_the_authors():
  """Truncated normal of .02 cut at two deviations, biases 0, norms 1."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(start()):
    name, leaf = path[-1].key, np.asarray(leaf)
    if name in ('bias', 'output_bias', 'scale'):
      assert (leaf == (name == 'scale')).all(), path
    else:
      assert name == 'kernel' or name.endswith('embedding')
      # A normal cut at two deviations has .8796 of its deviation left.
      assert np.abs(leaf).max() <= .04
      assert abs(leaf.std() / .0176 - 1) < 5 / np.sqrt(2 * leaf.size), path


@pytest.mark.parametrize('kind', KINDS)
def test_loss_at_the_start_is_that_of_a_guess_among_all_rows(kind):
  task, params, loss = started(kind)
  (value, aux), _ = loss(params, batch_of(task), jax.random.key(0))
  np.testing.assert_allclose(value, np.log(task.rows), atol=.1)
  # Of six items a fifth is one; a next one is known of five.
  assert aux.weight == (8 if kind == 'bert4rec' else 8 * 5)


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_is_the_mean_over_answers_of_rows_that_count(kind):
  task, _, loss = started(kind)
  params = tiny.draw(start())
  batch, rng = batch_of(task), jax.random.key(3)
  batch['items'][2] = 0
  batch['items'][4, 2:] = 0
  batch['mask'] = np.float32([1, 1, 1, 0, 1, 1, 0, 1])
  (value, aux), grads = loss(params, batch, rng)

  @jax.jit
  def answers(params):
    puzzle = task.puzzle(jax.random.split(rng, 3)[0], batch['items'])
    states = task.model.apply({'params': params}, puzzle.items, puzzle.slots)
    return puzzle, encoder.logits(params, states)
  puzzle, scores = jax.device_get(answers(params))
  scores = np.float64(scores)
  each = scipy.special.logsumexp(scores, axis=-1) - np.take_along_axis(
      scores, np.asarray(puzzle.labels)[..., None], -1)[..., 0]
  weights = np.asarray(puzzle.weights) * batch['mask'][:, None]
  assert aux.weight == weights.sum() > 0 and not weights[2].any()
  np.testing.assert_allclose(value, (each * weights).sum() / weights.sum(), rtol=1e-5)
  # What the other rows hold changes nothing.
  batch['items'][[3, 6]] = [[9] * batch['items'].shape[1], [0] * batch['items'].shape[1]]
  (again, _), same = loss(params, batch, rng)
  np.testing.assert_allclose(again, value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), same, grads)
  # Nothing to learn from is no gradient, and no division by zero.
  (nothing, aux), none = loss(params, batch | {'mask': np.zeros(8, np.float32)}, rng)
  assert nothing == aux.weight == 0 and not any(x.any() for x in jax.tree.leaves(none))


@pytest.mark.parametrize('kind', KINDS)
def test_every_position_that_is_asked_is_trained(kind):
  """Also that of the longest history: its slot is the last of all."""
  task, params, loss = started(kind)
  # Windows as training has them: eight events that are read, and for sasrec one more.
  train = sequences.Windows(sequences.split(tiny.log([np.arange(1, 21)] * 8), 'none'),
                            task._lengths, 4)
  batch = batch_of(task, [train[i]['items'] for i in range(8)])
  assert (batch['items'] > 0).all()
  slot = task.question(np.arange(1, 21, dtype=np.int32))[1]
  assert slot == 7
  reached = np.zeros(8, bool)
  for seed in range(4):
    grads = loss(params, batch, jax.random.key(seed))[1]
    reached |= np.abs(grads['position_embedding']).max(1) > 1e-6
  assert reached.all(), reached


def test_microbatches_weigh_as_one_batch():
  """Where nothing is drawn: means of unlike numbers of answers, in proportion to `Aux.weight`."""
  task, params, loss = started('sasrec')
  batch = batch_of(task, [h[:n] for h, n in zip(HISTORIES, (6, 2, 6, 3, 4, 1, 6, 2))])
  masks = np.float32([[1, 0, 0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1, 0, 0]])
  parts = [loss(params, batch | {'mask': mask}, jax.random.key(0)) for mask in masks]
  (value, aux), grads = loss(params, batch | {'mask': masks.sum(0)}, jax.random.key(0))
  weights = [float(part.weight) for (_, part), _ in parts]
  assert weights == [5 + 3 + 5, 1 + 2 + 0] and aux.weight == sum(weights)
  mean = lambda *x: sum(w * np.float64(y) for w, y in zip(weights, x)) / sum(weights)
  np.testing.assert_allclose(value, mean(*(v for (v, _), _ in parts)), rtol=1e-5)
  jax.tree.map(lambda want, *x: np.testing.assert_allclose(mean(*x), want, rtol=1e-4, atol=1e-6),
               grads, *(g for _, g in parts))


def test_losses_of_drawn_negatives_start_at_a_guess():
  """Scores are about 0: ln 2 each for the label and one negative; all that are not the label."""
  ways = [(dict(model__loss='gbce', model__negatives=1, model__shared_negatives=False,
                model__calibration=0.), np.log(2)),
          (dict(model__loss='sampled', model__negatives=2000, model__proposal='uniform'),
           np.log(2000 * 23 / 24 + 1))]
  tasks = [task_of('sasrec', **changes) for changes, _ in ways]
  batch = batch_of(tasks[0])
  for (got, aux), (_, value) in zip(jax.jit(lambda params, rng: [
      task.loss(params, batch, rng, True) for task in tasks])(start(), jax.random.key(0)), ways):
    np.testing.assert_allclose(got, value, atol=.05)
    assert aux.weight == 40


@functools.cache
def adam():
  tx = optax.adam(1e-2)

  @jax.jit
  def update(params, state, grads):
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state
  return tx.init, update


@pytest.mark.parametrize('kind', KINDS)
def test_eight_sequences_are_learned_by_heart(kind):
  task, params, loss = started(kind)
  batch, (init, update) = batch_of(task), adam()
  source = task.dataset('test')
  rows = [task.transform(source[i], None, False) for i in range(8)]
  asked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  ranks = jax.jit(task.ranks)
  before = jax.device_get(ranks(params, asked))
  state = init(params)
  for rng in jax.random.split(jax.random.key(1), 200):
    params, state = update(params, state, loss(params, batch, rng)[1])
  after = jax.device_get(ranks(params, asked))
  assert set(after) == {'full', 'unseen', 'pop10'}
  assert before['full'].mean() > 3
  for name, values in after.items():
    assert not values.any(), f'{name}: not everywhere HR@1'
