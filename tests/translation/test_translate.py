"""The task: what prepare leaves, shapes of batches, the loss, searches, attention, use.

Sentences are English digits, translated word for word; every word is a piece, and so a sentence of
n words has n + 1 tokens.
"""

import json
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from flax import linen as nn

from configs import seq2seq, transformer as transformer_config
from core import task as task_lib
from core.config import UserError
from core.evaluate import Evaluators
from core.plan import make_plan
from translation import corpus, search, transformer, translate, vocabulary

WORDS = dict(zip('one two three four five six seven eight nine'.split(),
                 'eins zwei drei vier fünf sechs sieben acht neun'.split()))
BUCKETS = (4, 8)


def write_data(folder, seed=0):
  """12 test pairs, 2 of them longer than the longest bucket; 40 training pairs, 3 of them."""
  folder.mkdir()
  rng = np.random.default_rng(seed)
  for split, count, too_long in (('train', 40, 3), ('validation', 4, 0), ('test', 12, 2)):
    sizes = rng.integers(1, BUCKETS[-1], count)
    sizes[rng.choice(count, too_long, replace=False)] = BUCKETS[-1]
    texts = [rng.choice(list(WORDS), size) for size in sizes]
    (folder / f'{split}.tsv').write_text(''.join(
        f'{" ".join(text)}\t{" ".join(WORDS[w] for w in text)}\n' for text in texts))
  return folder


def config_of(data, recurrent=False, **changes):
  config = (seq2seq if recurrent else transformer_config).get_config('smoke')
  config.data.update(dict(name=f'tsv:{data}', buckets=BUCKETS))
  config.data.splits.update(dict(train='train', validation='validation', test='test'))
  config.data.vocab.update(dict(kind='word', size=24))
  config.model.dropout = 0.
  if not recurrent:
    config.model.update(dict(depth=1, scan=False))
  config.remat = 'none'
  config.batch_size = 2
  for name, value in changes.items():
    config.update_from_flattened_dict({name.replace('__', '.'): value})
  return config


def task_of(data, workdir=None, **changes):
  return task_lib.load(config_of(data, **changes), workdir)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp('pairs') / 'data')


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
  path = tmp_path_factory.mktemp('prepared')
  task_of(data, path).prepare()
  return path


def params_of(task, seed=0):
  """Parameters of which none is 0, large enough that answers depend on the source."""
  shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(.4 * rng.normal(size=x.shape), jnp.float32), shapes)


def batch_of(task, split='test', rows=(0, 1, 2), length=BUCKETS[-1]):
  """Pairs by their number in the encoded split, padded."""
  encoded = corpus.open_encoded(task.workdir / 'encoded' / split)
  batch = {side: np.zeros((len(rows), length), np.int32) for side in corpus.SIDES}
  for row, number in enumerate(rows):
    for side, ids in zip(corpus.SIDES, encoded[number]):
      batch[side][row, :len(ids)] = ids
  return {**batch, 'mask': np.ones(len(rows), np.float32)}


def short(task, split='test', count=10):
  """Numbers of the first pairs that fit the longest bucket."""
  lengths = corpus.open_encoded(task.workdir / 'encoded' / split).lengths
  return np.flatnonzero(lengths.max(1) <= BUCKETS[-1])[:count].tolist()


@pytest.fixture(scope='module')
def asked(data, workdir):
  """A task, its parameters, the test pairs that fit, and the model's log-probabilities of targets
  for their sources, by whole passes, in float64."""
  task = task_of(data, workdir)
  params, batch = params_of(task), batch_of(task, rows=short(task))
  forward = jax.jit(lambda target: task.model.apply({'params': params}, batch['source'], target))

  def chances(target):
    room = np.zeros((len(target), 12), np.int32)
    room[:, :target.shape[1]] = target
    logits = np.asarray(forward(room), np.float64)[:, :target.shape[1]]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return task, params, batch, chances


# --- Vocabulary and text --------------------------------------------------------------------------


def files(folder):
  return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
          for path in sorted(folder.rglob('*')) if path.is_file()}


def test_prepare_leaves_a_vocabulary_and_every_split(data, workdir):
  known = vocabulary.load(workdir / 'vocabulary.json')
  words = {f'▁{word}' for pair in WORDS.items() for word in pair}
  assert {*known.pieces(range(len(known)))} == {*vocabulary.SPECIAL, *words}
  assert not (workdir / 'vocabulary.source.json').exists()
  lines = (data / 'test.tsv').read_text().splitlines()
  encoded = corpus.open_encoded(workdir / 'encoded' / 'test')
  assert [tuple(map(known.decode, pair)) for pair in map(encoded.__getitem__, range(12))] == [
      tuple(line.split('\t')) for line in lines]
  assert len(corpus.open_encoded(workdir / 'encoded' / 'train')) == 40
  before = files(workdir)
  task_of(data, workdir).prepare()
  assert files(workdir) == before and len(before) > 10


def test_another_text_under_the_same_workdir_is_refused(data, workdir, tmp_path):
  other = write_data(tmp_path / 'data', seed=1)
  before = files(workdir)
  with pytest.raises(UserError, match='made of other text.*another --workdir'):
    task_of(other, workdir).prepare()
  assert files(workdir) == before


def test_another_vocabulary_under_the_same_workdir_is_refused(data, workdir, tmp_path):
  vocabulary.train(['one two', 'one two'], 'word', 9).save(tmp_path / 'mine.json')
  with pytest.raises(UserError, match='another vocabulary than .*mine.json'):
    task_of(data, workdir, data__vocab__path=str(tmp_path / 'mine.json')).prepare()
  # Nor may the file be exchanged once text was encoded with it.
  shutil.copytree(workdir, tmp_path / 'run')
  shutil.copy(tmp_path / 'mine.json', tmp_path / 'run' / 'vocabulary.json')
  with pytest.raises(UserError, match='another vocabulary'):
    task_of(data, tmp_path / 'run').prepare()


def test_the_vocabulary_comes_with_the_weights_or_by_name(data, workdir, tmp_path):
  other = write_data(tmp_path / 'data', seed=1)
  want = (workdir / 'vocabulary.json').read_bytes()
  for name, change in (('weights', dict(init_from=str(workdir))),
                       ('named', dict(data__vocab__path=str(workdir / 'vocabulary.json')))):
    run = tmp_path / name
    run.mkdir()
    task_of(other, run, data__vocab__kind='bpe', data__vocab__size=30, **change).prepare()
    assert (run / 'vocabulary.json').read_bytes() == want
  # What we export brings it; weights of other people bring none, and no other will do.
  foreign, run = tmp_path / 'foreign', tmp_path / 'run'
  foreign.mkdir(), run.mkdir()
  with pytest.raises(UserError, match='without its vocabulary.*config.data.vocab.path'):
    task_of(data, run, init_from=str(foreign)).prepare()
  assert not list(run.iterdir())
  task_of(data, workdir).texts.save_vocabularies(foreign)
  task_of(data, run, init_from=str(foreign / 'model.safetensors')).prepare()
  assert (run / 'vocabulary.json').read_bytes() == want


def test_a_vocabulary_larger_than_the_model_is_refused(data, workdir, tmp_path):
  for task in (task_of(data, workdir, data__vocab__size=20),
               task_of(data, tmp_path, data__vocab__size=20, init_from=str(workdir))):
    with pytest.raises(UserError, match=r'has 21 entries.*data.vocab.size=20'):
      task.prepare()
  assert not list(tmp_path.iterdir())


def test_each_side_may_have_a_vocabulary_of_its_own(data, tmp_path):
  task = task_of(data, tmp_path, data__vocab__source_size=16, data__vocab__size=13)
  task.prepare()
  both = task.vocabularies
  for side, words in (('source', WORDS), ('target', WORDS.values())):
    known = both[side]
    assert {*known.pieces(range(3, len(known)))} == {f'▁{word}' for word in words}
  batch = batch_of(task, rows=short(task, count=1))
  assert both['source'].decode(batch['source'][0]).split()[0] in WORDS
  assert both['target'].decode(batch['target'][0]).split()[0] in WORDS.values()
  params = jax.eval_shape(task.init, jax.random.key(0))
  assert nn.unbox(params)['source_embedding'].shape == (16, 16)
  assert nn.unbox(params)['embedding'].shape == (13, 16)
  recurrent = task_of(data, tmp_path, recurrent=True, data__vocab__source_size=16,
                      data__vocab__size=13)
  params = nn.unbox(jax.eval_shape(recurrent.init, jax.random.key(0)))
  assert params['source_embedding'].shape == (16, 64) and params['output'].shape == (64, 13)


def test_what_is_missing_is_said(data, tmp_path):
  with pytest.raises(UserError, match='--workdir'):
    task_of(data).vocabularies  # pylint: disable=expression-not-assigned
  with pytest.raises(UserError, match='--mode=prepare.*config.data.vocab.path'):
    task_of(data, tmp_path).vocabularies  # pylint: disable=expression-not-assigned
  with pytest.raises(UserError, match='/nowhere'):
    task_of('/nowhere', tmp_path).prepare()


def test_text_that_is_not_there_does_not_stop_who_translates(workdir, caplog):
  with caplog.at_level('INFO', logger='absl'):
    task_of('/nowhere', workdir).prepare()
  assert caplog.text.count('no text is encoded') == 1


def test_a_split_that_is_not_there_is_said_before_training(data, workdir, tmp_path):
  shutil.copy(workdir / 'vocabulary.json', tmp_path)
  with pytest.raises(UserError, match="split 'tset'"):
    task_of(data, tmp_path, data__splits__test='tset').prepare()


def test_a_slice_has_a_folder_of_its_own(data, workdir, tmp_path):
  shutil.copy(workdir / 'vocabulary.json', tmp_path)
  task = task_of(data, tmp_path, data__splits__train='train[:30%]',
                 data__splits__validation='train[30%:]', data__splits__test='test[:2]')
  task.prepare()
  assert [len(task.dataset(split)) + len(task.dataset(split).left_out)
          for split in ('train', 'validation', 'test')] == [12, 28, 2]
  assert len(list((tmp_path / 'encoded').iterdir())) == 3


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize('buckets', [(4, 8), (16, 32, 64, 128), (16, 24, 32, 64), (10, 20, 50)])
def test_batches_have_as_many_tokens_in_every_bucket(data, buckets):
  specs = task_of(data, data__buckets=buckets).specs(6, train=True)
  for length, spec in zip(buckets, specs, strict=True):
    rows = spec['mask'].shape[0]
    assert spec['source'].shape == spec['target'].shape == (rows, length)
    # Multiples of the batch size, which divide over the devices as it does, and no fewer than fit.
    assert rows % 6 == 0 and rows * length <= 6 * buckets[-1] < (rows + 6) * length
  assert specs[-1] == task_of(data, data__buckets=buckets).batch_spec(6)


def test_packed_rows_have_one_shape_in_training_alone(data):
  task = task_of(data, data__packed=True)
  assert task.specs(6, train=True) == [task.batch_spec(6)]
  assert {name: spec.shape for name, spec in task.batch_spec(6).items()} == {
      'source': (6, 8), 'target': (6, 8), 'source_segments': (6, 8), 'target_segments': (6, 8),
      'mask': (6,)}
  assert [sorted(spec) for spec in task.specs(6, train=False)] == [['mask', 'source', 'target']] * 2


def test_long_sentences_are_left_out_of_training_and_counted(data, workdir, caplog):
  for packed in (False, True):
    with caplog.at_level('WARNING'):
      found = task_of(data, workdir, data__packed=packed).dataset('train')
    assert 'train: 3 of 40 pairs have a sentence of more than 8 tokens' in caplog.text
    caplog.clear()
    longest = [i for i, line in enumerate((data / 'train.tsv').read_text().splitlines())
               if len(line.split('\t')[0].split()) + 1 > 8]
    assert found.left_out.tolist() == longest and len(longest) == 3
    # No pair but these is lost: each has one end, either side.
    ends = sum((found[i]['target'] == vocabulary.EOS).sum() for i in range(len(found)))
    assert ends == 37


def test_examples_have_what_the_specs_say(data, workdir):
  for packed in (False, True):
    task = task_of(data, workdir, data__packed=packed)
    for split in ('train', 'test'):
      source, specs = task.dataset(split), task.specs(2, train=split == 'train')
      example = task.transform(source[0], None, split == 'train')
      spec = specs[source.buckets[0] if len(specs) > 1 else 0]
      assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
          k: (s.shape[1:], s.dtype) for k, s in spec.items() if k != 'mask'}


def test_epochs_are_not_known(data):
  with pytest.raises(UserError, match='steps'):
    task_of(data).examples()


# --- Loss -----------------------------------------------------------------------------------------


class Fixed:
  """A model that says the same whatever it is asked."""

  def __init__(self, logits):
    self._logits = jnp.asarray(logits, jnp.float32)

  def apply(self, params, source, target, **kwargs):
    return jnp.broadcast_to(self._logits, (*target.shape, len(self._logits)))


@pytest.mark.parametrize('share, want', [(0., .45191), (.1, .70191)])
def test_label_smoothing_is_the_authors(data, share, want):
  """Logits 2, 1, 0, -1, -2 and the first is right. With the share spread over all classes (Szegedy
  et al.) it would be 0.65191."""
  task = task_of(data, model__label_smoothing=share)
  task.model = Fixed([1., 2., 0., -1., -2.])
  batch = {'source': jnp.ones((2, 3), jnp.int32), 'mask': jnp.ones(2),
           'target': jnp.asarray([[1, 1, 1], [1, 0, 0]])}
  loss, aux = task.loss({}, batch, jax.random.key(0), True)
  assert float(loss) == pytest.approx(want, abs=1e-5)
  total, weight = aux.metrics['nll']
  assert float(total / weight) == pytest.approx(.45191, abs=1e-5) and weight == aux.weight == 4


def test_loss_is_the_mean_of_real_tokens(asked):
  """Beside float64: label smoothing, padding, masked rows, metrics."""
  task, params, batch, chances = asked
  batch = {**batch, 'mask': np.float32([1, 1, 0, 1, 1, 1, 0, 1, 1, 1])}
  compiled = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(0), False))
  loss, aux = compiled(batch)
  chances = chances(batch['target'])
  classes = chances.shape[-1]
  real = (batch['target'] != 0) & (batch['mask'] != 0)[:, None]
  right = np.eye(classes)[batch['target']]
  goal = .9 * right + .1 / (classes - 1) * (1 - right)
  np.testing.assert_allclose(loss, -(goal * chances).sum(-1)[real].mean(), rtol=1e-5)
  assert float(aux.weight) == real.sum() < (batch['target'] != 0).sum()
  total, weight = aux.metrics['nll']
  np.testing.assert_allclose(total / weight, -(right * chances).sum(-1)[real].mean(), rtol=1e-5)
  hits = (chances.argmax(-1) == batch['target'])[real].sum()
  assert [float(x) for x in aux.metrics['accuracy']] == [hits, real.sum()]
  # Nothing but padding is no division by zero.
  loss, aux = compiled({**batch, 'mask': np.zeros(10, np.float32)})
  assert float(loss) == float(aux.weight) == 0


def test_a_packed_row_is_worth_its_pairs(data, workdir):
  """The loss of a row of several pairs is the mean of theirs in rows of their own, by tokens."""
  packed, alone = task_of(data, workdir, data__packed=True), task_of(data, workdir)
  params, rows = params_of(alone), packed.dataset('train')
  # A row that holds pairs of different lengths.
  sizes = lambda i: [int(n) for n in np.bincount(rows[i]['target_segments'])[1:]]
  at = next(i for i in range(len(rows)) if len(set(sizes(i))) > 1)
  row = {**{name: value[None] for name, value in rows[at].items()}, 'mask': np.ones(1, np.float32)}
  parts = {side: np.zeros((len(sizes(at)), 8), np.int32) for side in corpus.SIDES}
  for side, part in parts.items():
    for number, into in enumerate(part, 1):
      ids = row[side][row[f'{side}_segments'] == number]
      into[:len(ids)] = ids
  compiled = lambda task: jax.jit(lambda batch: task.loss(params, batch, jax.random.key(0), True))
  loss, aux = compiled(packed)(row)
  one_by_one = compiled(alone)
  losses, weights = zip(*((float(loss), float(more.weight)) for loss, more in (
      one_by_one({**parts, 'mask': mask}) for mask in np.eye(len(sizes(at)), dtype=np.float32))))
  assert list(weights) == sizes(at) and float(aux.weight) == sum(weights)
  assert max(losses) - min(losses) > .01
  np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=1e-5)


def test_training_drops_and_evaluation_does_not(data, workdir):
  task = task_of(data, workdir, model__dropout=.5)
  params, batch = params_of(task), batch_of(task, rows=short(task, count=3))
  losses = jax.jit(lambda keys: [jax.vmap(lambda key: task.loss(params, batch, key, train)[0])(keys)
                                 for train in (True, False)])
  trained, evaluated = losses(jax.random.split(jax.random.key(0), 3))
  assert len(set(trained.tolist())) == 3 and len(set(evaluated.tolist())) == 1


# --- Translation ----------------------------------------------------------------------------------


def translator(data, workdir, params, **settings):
  """`Task.translate` of sources, numbers of the sentences and a seed."""
  task = task_of(data, workdir, **{f'eval__search__{k}': v for k, v in settings.items()})
  compiled = jax.jit(task.translate)
  return lambda source, items, seed=0: jax.device_get(
      compiled(params, source, jax.random.key(seed), np.asarray(items)))


def test_one_beam_and_no_temperature_are_greedy(data, workdir, asked):
  """The most likely token, one at a time, by a whole pass for each."""
  _, params, batch, chances = asked
  limits = (batch['source'] != 0).sum(1) + 4
  want, done = np.zeros((10, 12), np.int32), np.zeros(10, bool)
  for at in range(12):
    best = chances(want)[:, at].argmax(-1)
    want[:, at] = np.where(done | (at >= limits), 0, best)
    done |= want[:, at] == vocabulary.EOS
  assert len({tuple(row) for row in want}) > 5  # They depend on the source.
  for settings in (dict(method='beam', beams=1, alpha=0.), dict(method='sample', temperature=0.)):
    found = translator(data, workdir, params, **settings)(batch['source'], range(10))
    np.testing.assert_array_equal(found.tokens[:, 0], want)


@pytest.fixture(scope='module')
def searched(data, workdir, asked):
  """What a beam search finds for the sources of `asked`."""
  _, params, batch, _ = asked
  return translator(data, workdir, params, beams=4, alpha=.7)(batch['source'], range(10))


def test_beams_score_what_the_model_gives_them(asked, searched):
  _, _, batch, chances = asked
  found = searched
  assert found.tokens.shape == (10, 4, 8 + 4)
  for beam in range(4):
    tokens, lengths = found.tokens[:, beam], found.lengths[:, beam]
    each = np.take_along_axis(chances(tokens), tokens[..., None], -1)[..., 0]
    total = np.where(np.arange(12) < lengths[:, None], each, 0).sum(1)
    np.testing.assert_allclose(found.log_probs[:, beam], total, rtol=1e-4)
    np.testing.assert_allclose(found.scores[:, beam], total / ((5 + lengths) / 6) ** .7, rtol=1e-4)
  assert (np.diff(found.scores, axis=1) <= 0).all()
  # No hypothesis is longer than its own source and `extra`, whatever the bucket.
  assert (found.lengths <= (batch['source'] != 0).sum(1, keepdims=True) + 4).all()


def test_a_draw_does_not_depend_on_its_neighbours(data, workdir, asked):
  _, params, batch, _ = asked
  source = batch['source'][:3]
  translate_ = translator(data, workdir, params, method='sample', temperature=2.)
  drawn = lambda *args: translate_(*args).tokens[:, 0]
  first = drawn(source, [4, 7, 9])
  np.testing.assert_array_equal(drawn(source[[2, 1, 0]], [0, 7, 4])[1], first[1])
  np.testing.assert_array_equal(drawn(source[[1, 1, 1]], [7, 3, 7])[[0, 2]], first[[1, 1]])
  # What is drawn differs with the number of the sentence, and with the seed.
  assert len({tuple(row) for row in drawn(source[[1, 1, 1]], [7, 3, 5])}) == 3
  assert (drawn(source, [4, 7, 9], 1) != first).any()


@pytest.mark.parametrize('recurrent', [False, True])
@pytest.mark.parametrize('method, name, settings', [
    ('beam', 'beam_search', dict(beams=3, alpha=.9, coverage=.2)),
    ('sample', 'sample', dict(temperature=.5, top_k=3, top_p=.8))])
def test_settings_reach_the_search(data, workdir, asked, monkeypatch, method, name, settings,
                                   recurrent):
  batch, seen = asked[2], {}

  def record(step, state, **given):
    seen.update(given)
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert rows == {10 * settings.get('beams', 1)}
    logits, _, attention = step(jnp.zeros(rows.pop(), jnp.int32), state)
    return logits, attention
  monkeypatch.setattr(search, name, record)
  task = task_of(data, workdir, recurrent=recurrent, eval__search__method=method,
                 **{f'eval__search__{k}': v for k, v in settings.items()})
  logits, attention = jax.eval_shape(task.translate, params_of(task), batch['source'],
                                     jax.random.key(0), np.arange(10))
  assert {k: seen[k] for k in settings} == settings and seen['room'] == 8 + 4
  assert logits.shape[1] == 24 and attention.shape == (logits.shape[0], 8)


# --- Attention ------------------------------------------------------------------------------------


def by_hand(queries, memory, kernel, mask):
  """Attention `[batch, heads, target, source]` in float64."""
  q, k = (np.einsum('bnd,dhe->bhne', np.float64(x), np.float64(kernel[name]['kernel']))
          for name, x in (('query', queries), ('key', memory)))
  scores = np.where(mask[:, None, None], q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def test_attention_is_the_chosen_layer_s(data, workdir):
  chosen = [(-1, ()), (0, (1,)), (1, (1, 0))]
  tasks = [task_of(data, workdir, model__depth=2, model__scan=True, eval__search__layer=layer,
                   eval__search__heads=heads) for layer, heads in chosen]
  params, batch = params_of(tasks[0]), batch_of(tasks[0], rows=short(tasks[0], count=3))
  model, flat = transformer.unrolled(tasks[0].model, params)

  @jax.jit  # Together: that compiles the model once.
  def ask(source, target):
    _, kept = model.apply(
        {'params': flat}, source, target, mutable=['intermediates'],
        capture_intermediates=lambda module, name: isinstance(module, nn.LayerNorm))
    return kept['intermediates'], [task.attention(params, source, target) for task in tasks]
  kept, found = ask(batch['source'], batch['target'])
  for (layer, heads), task, got in zip(chosen, tasks, found):
    name, shown = f'layers_{layer % 2}', list(heads) or [0, 1]
    want = by_hand(kept['decoder'][name]['LayerNorm_0']['__call__'][0],
                   kept['encoder']['layers_1']['LayerNorm_1']['__call__'][0],
                   flat['decoder'][name]['MultiHeadDotProductAttention_1'], batch['source'] != 0)
    assert task.shown_heads == shown and got.shape == (3, 1 + len(shown), 8, 8)
    np.testing.assert_allclose(got[:, 0], want.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[:, 1:], want[:, shown], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_attention_of_a_recurrent_model(data, workdir):
  """Dot products of states with annotations; the states are those that see the tokens before."""
  task = task_of(data, workdir, recurrent=True, model__attention='dot', model__bidirectional=False)
  params, batch = params_of(task), batch_of(task, rows=short(task, count=3))
  got = np.asarray(jax.jit(task.attention)(params, batch['source'], batch['target']))
  call = lambda method, *args: task.model.apply({'params': params}, *args, method=method)
  memory = call('encode', batch['source'])
  state, step = call('begin', memory, 1, 8), jax.jit(lambda t, s: call('step', t, s, memory))
  tokens = np.zeros(3, np.int32)
  mask = (batch['source'] != 0)[:, None]
  for at in range(8):
    _, state, _ = step(tokens, state)
    scores = np.einsum('bd,bsd->bs', np.float64(state['layers'][-1][0]),
                       np.float64(memory['annotations']))[:, None]
    weights = np.where(mask, np.exp(scores), 0)
    np.testing.assert_allclose(got[:, :, at], weights / weights.sum(-1, keepdims=True), rtol=1e-4)
    tokens = batch['target'][:, at]
  assert got.shape == (3, 1, 8, 8) and task.has_attention and task.shown_heads == []
  assert np.abs(got[:, 0, 0] - got[:, 0, 1]).max() > 1e-3
  without = task_of(data, workdir, recurrent=True, model__attention='none',
                    model__input_feeding=False)
  assert not without.has_attention


# --- Use ------------------------------------------------------------------------------------------


def word_for_word(task):
  """A translator that is always right, in place of a search; scores say which item it was."""
  known = task.vocabularies['source']
  table = np.arange(len(known))
  for english, german in WORDS.items():
    (source,), (target,) = known.encode([english, german])
    table[source] = target

  def translate(params, source, rng, items):
    del params, rng
    room = ((0, 0), (0, task.config.eval.search.extra))
    tokens = jnp.pad(jnp.asarray(table, jnp.int32)[source], room)[:, None]
    score = -jnp.asarray(items, jnp.float32)[:, None]
    return search.Found(tokens, score, score, (tokens != 0).sum(-1))
  return translate


def test_predict_translates_a_line_for_a_line(data, workdir, tmp_path, monkeypatch):
  task = task_of(data, workdir, eval__search__pictures=3, eval__batch_size=2)
  monkeypatch.setattr(task, 'translate', word_for_word(task))
  lines = ['nine eight seven six', 'one', '', 'two two', 'one two three four five six', '   ',
           'five', 'three  one', 'six six six six six six seven']
  path = tmp_path / 'lines.txt'
  path.write_text('\n'.join(lines), encoding='utf-8')  # The last line need not end.
  records = task.predict(params_of(task), path, tmp_path)
  want = [' '.join(WORDS[word] for word in line.split()) for line in lines]
  assert (tmp_path / 'translations.txt').read_text(encoding='utf-8').split('\n') == [*want, '']
  assert [r['translation'] for r in records] == want and [r['source'] for r in records] == lines
  assert [r['line'] for r in records] == list(range(1, 10))
  # Each sentence is an item of its own, whatever the batch it was in.
  assert [r['score'] for r in records] == [-float(i) if lines[i].strip() else 0. for i in range(9)]
  json.dumps(records, allow_nan=False)
  assert {r['line']: r['picture'] for r in records if 'picture' in r} == {
      n: f'line_{n}.png' for n in (1, 2, 4)}
  assert {p.name for p in tmp_path.glob('*.png')} == {f'line_{n}.png' for n in (1, 2, 4)}
  sizes = {n: cv2.imread(str(tmp_path / f'line_{n}.png')).shape[:2] for n in (1, 2, 4)}
  # Three maps side by side, of 5 by 5, 2 by 2 and 3 by 3 pieces.
  assert all(100 < height < 400 and 300 < width < 1000 for height, width in sizes.values())
  assert sizes[1][0] > sizes[4][0] > sizes[2][0] and sizes[1][1] > sizes[4][1] > sizes[2][1]


def test_predict_searches_with_the_model(data, workdir, tmp_path, asked, searched):
  _, params, batch, _ = asked
  task = task_of(data, workdir, data__buckets=(8,), eval__batch_size=10, eval__search__beams=4,
                 eval__search__alpha=.7, eval__search__pictures=0)
  known = task.vocabularies['source']
  (tmp_path / 'lines.txt').write_text(''.join(f'{known.decode(ids)}\n' for ids in batch['source']))
  records = task.predict(params, tmp_path / 'lines.txt', tmp_path)
  assert [r['translation'] for r in records] == [known.decode(t) for t in searched.tokens[:, 0]]
  np.testing.assert_allclose([r['score'] for r in records], searched.scores[:, 0], rtol=1e-5)
  assert not list(tmp_path.glob('*.png')) and not any('picture' in r for r in records)


@pytest.mark.parametrize('content, words', [
    (b'one\ntwo\none one one one one one one one\n', r'line 3: 9 tokens.*at most 8.*buckets'),
    (b'one\n\ntw\xff o\n', r'line 3: not UTF-8.*byte 2'), (b'', 'no sentence'),
    (b' \n\n', 'no sentence'), (None, 'folder.*a sentence a line')])
def test_bad_inputs(data, workdir, tmp_path, content, words):
  path = tmp_path / 'input'
  path.mkdir() if content is None else path.write_bytes(content)
  with pytest.raises(UserError, match=words) as e:
    task_of(data, workdir).predict(None, path, tmp_path)
  assert str(path) in str(e.value) and not (tmp_path / 'translations.txt').exists()


def test_a_byte_order_mark_is_not_a_word(data, workdir, tmp_path, monkeypatch):
  """Windows programs write one; files of pairs may have it too."""
  task = task_of(data, workdir, eval__search__pictures=0)
  monkeypatch.setattr(task, 'translate', word_for_word(task))
  (tmp_path / 'lines.txt').write_bytes(b'\xef\xbb\xbfone two\r\nthree\r\n')
  records = task.predict(None, tmp_path / 'lines.txt', tmp_path)
  assert [r['translation'] for r in records] == ['eins zwei', 'drei']


def test_windows_lines_end_at_both_signs(data, workdir, tmp_path, monkeypatch):
  task = task_of(data, workdir, eval__search__pictures=0)
  monkeypatch.setattr(task, 'translate', word_for_word(task))
  (tmp_path / 'lines.txt').write_bytes(b'one two\r\n\r\nthree\r\n')
  records = task.predict(None, tmp_path / 'lines.txt', tmp_path)
  assert [r['source'] for r in records] == ['one two', '', 'three']
  assert [r['translation'] for r in records] == ['eins zwei', '', 'drei']


def test_maps_have_titles_where_there_are_several(data, workdir, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(translate.pictures, 'alignment', lambda *args: drawn.append(args))
  for changes, want in ((dict(eval__search__heads=(1,)), ['mean of heads', 'head 1']),
                        (dict(recurrent=True), [''])):
    task = task_of(data, workdir, **changes)
    ids, maps = np.asarray([3, vocabulary.EOS]), np.ones((1, len(want), task.room, 8)) / 8
    task._attend = lambda *args: maps
    task.draw_alignment(None, ids, ids, tmp_path / 'x.png')
    path, source, target, weights, titles = drawn.pop()
    assert titles == want and weights.shape == (len(want), 2, 2) and path == tmp_path / 'x.png'
    assert source == target and source[1] == '</s>'


def test_what_ends_without_an_end_is_drawn_to_its_last_token(data, workdir, tmp_path, monkeypatch):
  """A translation that was cut at its limit has padding after it, and none of it is shown."""
  drawn = {}
  monkeypatch.setattr(translate.pictures, 'alignment', lambda path, source, target, *_: (
      drawn.update({path.name: (list(source), list(target))})))
  task = task_of(data, workdir)
  known, task._attend = task.vocabularies['source'], lambda *args: np.ones((1, 1, 12, 8)) / 8
  ids = known.encode(['one two', 'eins'])
  for name, target in (('ended', [*ids[1], vocabulary.EOS, 5, 5]), ('cut', [*ids[1] * 3, 0, 0])):
    task.draw_alignment(None, np.asarray([*ids[0], vocabulary.EOS]), np.asarray(target),
                        tmp_path / name)
  assert drawn['ended'] == (['▁one', '▁two', '</s>'], ['▁eins', '</s>'])
  assert drawn['cut'][1] == ['▁eins'] * 3


# --- Evaluation -----------------------------------------------------------------------------------


def evaluated(data, workdir, names, **changes):
  """Values of evaluators, with a translator that is always right; what they write is in workdir."""
  plan = make_plan(config_of(data, **changes), jax.devices()[:1], workdir)
  plan.task.translate = word_for_word(plan.task)
  return Evaluators(plan, workdir).run(params_of(plan.task), 7, names), plan.task


def test_sentences_over_the_limit_count_as_empty_translations(data, workdir, tmp_path):
  run = shutil.copytree(workdir, tmp_path / 'run')
  values, task = evaluated(data, run, ['test_translated'])
  values = {name.split('/')[1]: value for name, value in values.items()}
  lines = [line.split('\t') for line in (data / 'test.tsv').read_text().splitlines()]
  want = [target if len(source.split()) < 8 else '' for source, target in lines]
  references = [target for _, target in lines]
  assert want.count('') == 2
  # In the order of the file, though shorter ones were translated first.
  assert (run / 'translations' / 'test.txt').read_text().split('\n') == [*want, '']
  assert values['too_long'] == 2 and values['exact_match'] == pytest.approx(10 / 12)
  assert values['bleu'] == pytest.approx(sacrebleu.corpus_bleu(want, [references]).score)
  assert 50 < values['bleu'] < 95
  words = lambda texts: sum(len(text.split()) for text in texts)
  assert values['length_ratio'] == pytest.approx(words(want) / words(references))
  record = json.loads((run / 'translations' / 'test.json').read_text())
  assert record['step'] == 7 and record['bleu'] == pytest.approx(values['bleu'])
  assert 'tok:13a' in record['signatures']['bleu']
  assert [(g['from'], g['to']) for g in record['by_source_words']] == [(1, 5), (6, 10)]
  assert sum(g['sentences'] for g in record['by_source_words']) == 12
  assert record['by_source_words'][0]['exact_match'] == 1
  shown = sorted(path.name for path in (run / 'pictures').iterdir())
  assert shown == ['test_alignment_0.png', 'test_alignment_4.png', 'test_alignment_9.png',
                   'test_by_length.png']
  assert all(cv2.imread(str(run / 'pictures' / name)).size > 10_000 for name in shown)


def test_perplexity_is_a_token_s(data, workdir, asked):
  """Of the whole split, each sentence once, whatever its bucket."""
  _, params, batch, chances = asked
  plan = make_plan(config_of(data), jax.devices()[:1], workdir)
  values = Evaluators(plan, workdir).run(params, 0, ['test'])
  each = np.take_along_axis(chances(batch['target']), batch['target'][..., None], -1)[..., 0]
  nll = -each[batch['target'] != 0].mean()
  assert values['test/nll'] == pytest.approx(nll, rel=1e-5)
  assert values['test/perplexity'] == pytest.approx(np.exp(nll), rel=1e-4)
  assert values['test/loss'] > values['test/nll']


@pytest.mark.parametrize('name', ['test_translated', 'test'])
def test_a_split_of_long_sentences_alone(data, workdir, tmp_path, name):
  """Nothing is translated, and that is a score too; nothing has a perplexity."""
  run = tmp_path / 'run'
  run.mkdir()
  shutil.copy(workdir / 'vocabulary.json', run)
  other = shutil.copytree(data, tmp_path / 'data')
  (other / 'test.tsv').write_text(f'{"one " * 9}\t{"eins " * 9}\n' * 2)
  values, _ = evaluated(other, run, [name])
  if name == 'test':
    assert not values
  else:
    assert values['test_translated/too_long'] == 2 and values['test_translated/bleu'] == 0


def test_evaluators_follow_the_splits(data):
  found = task_of(data, data__splits__extra=('test_range',)).evaluators()
  assert {name: e.every for name, e in found.items()} == {
      'validation': '', 'test': 'end', 'test_translated': 'end', 'test_range': 'end',
      'test_range_translated': 'end'}
  assert list(task_of(data, data__splits__test='', data__splits__validation='').evaluators()) == []
  often = task_of(data, eval__translate='100 steps').evaluators()
  assert often['test_translated'].every == '100 steps'


# --- Wrong settings -------------------------------------------------------------------------------


@pytest.mark.parametrize('change, words', [
    (dict(model__kind='rnn'), 'transformer, recurrent'),
    (dict(data__vocab__kind='char'), 'bpe, wordpiece, unigram, word'),
    (dict(eval__search__method='greedy'), 'beam, sample'),
    (dict(data__buckets=(8, 4)), 'buckets'), (dict(data__buckets=(4, 4)), 'buckets'),
    (dict(data__buckets=()), 'buckets'),
    (dict(model__label_smoothing=1.), 'below 1'), (dict(model__label_smoothing=-.1), 'at least'),
    (dict(eval__search__beams=0), 'beams=0'), (dict(eval__search__extra=0), 'extra=0'),
    (dict(eval__search__alpha=-1.), 'alpha=-1'), (dict(eval__search__coverage=-1.), 'coverage=-1'),
    (dict(model__norm='rms'), 'post, pre'), (dict(model__positions='rotary'), 'paper, '),
    (dict(model__activation='gelu'), 'relu'), (dict(model__heads=3), '3 heads'),
    (dict(model__width=15, model__heads=3), 'even'),
    (dict(recurrent=True, model__cell='qrnn'), 'rnn, lstm, gru|lstm'),
    (dict(recurrent=True, model__attention='location'), 'none, '),
    (dict(recurrent=True, model__initializer='zeros'), 'sutskever'),
    (dict(recurrent=True, data__packed=True), 'one sentence a row')])
def test_bad_configs(data, change, words):
  with pytest.raises(UserError, match=words):
    task_of(data, **change)


@pytest.mark.parametrize('change, words', [
    (dict(eval__search__layer=1), 'layer'), (dict(eval__search__layer=-2), 'layer'),
    (dict(eval__search__heads=(0, 2)), 'heads'), (dict(eval__search__heads=(-1,)), 'heads'),
    (dict(data__buckets=(0, 8)), 'buckets'), (dict(data__buckets=(-4, 8)), 'buckets')])
def test_bad_configs_that_would_show_late(data, change, words):
  """As an IndexError after training, as another head under this one's title, or as no batch."""
  with pytest.raises(UserError, match=words):
    task_of(data, **change).specs(2, train=True)


def test_input_feeding_needs_its_attention(data):
  task = task_of(data, recurrent=True, model__attention='bahdanau')
  with pytest.raises(UserError, match='input_feeding'):
    jax.eval_shape(task.init, jax.random.key(0))


def test_odd_sizes_that_are_right(data):
  task_of(data, model__width=15, model__heads=3, model__positions='learned')
  task_of(data, model__heads=3, model__head_dim=5, model__value_dim=4)
