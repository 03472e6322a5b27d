"""From interactions to arrays, and the file that keeps them."""

import collections
import io
import json
import random
import zipfile

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging

from core.config import UserError
from recsys import interactions, logs, markov


def settings(**changes):
  columns = dict(user='user_id', item='item_id', time='timestamp')
  return ml_collections.ConfigDict(dict(
      name='markov', data_dir='', split='train', columns=columns, core=0, min_item_count=0,
      min_length=0) | changes)


def built(text, times=None, **filters):
  """The log of 'user item' pairs, such as 'a1 b2'."""
  users, items = zip(*text.split())
  times = None if times is None else np.array(times, np.float64)
  return logs.build(interactions.Table(users, items, times), settings(**filters))


def listed(log):
  """[(user, names of items in order)]."""
  return [(str(name), ''.join(log.items[log.sequence(u) - 1])) for u, name in enumerate(log.users)]


def test_users_and_items_are_numbered_by_appearance_and_count():
  log = built('b3 a1 b1 a2 c2 a5')
  assert log.users.tolist() == ['b', 'a', 'c'] and len(log) == 3
  assert log.items.tolist() == ['1', '2', '3', '5']  # Twice, twice, once, once.
  assert log.events.tolist() == [3, 1, 1, 2, 4, 2] and log.starts.tolist() == [0, 2, 5, 6]
  assert log.counts.tolist() == [0, 2, 2, 1, 1]
  assert [a.dtype.name for a in (log.events, log.starts, log.counts)] == [
      'int32', 'int64', 'int64']
  assert listed(log) == [('b', '31'), ('a', '125'), ('c', '2')]


def test_order_is_that_of_time_and_of_the_file_for_equal_times():
  text = 'a1 b9 a2 a3 b8 a4 a5'
  assert listed(built(text)) == [('a', '12345'), ('b', '98')]
  assert listed(built(text, [5, 7, 5, 1, 6, 5, 1])) == [('a', '35124'), ('b', '89')]
  # Seconds that float32 would make equal.
  assert listed(built('a1 a2 a3', [881250951, 881250950, 881250949])) == [('a', '321')]


def test_one_filter_after_the_other_once_each():
  # The item 9 occurs once; without it b has two events, and without b the item 2 occurs once.
  text = 'a1 b2 a1 a2 b1 b9'
  assert listed(built(text, min_item_count=2)) == [('a', '112'), ('b', '21')]
  assert listed(built(text, min_length=3)) == [('a', '112'), ('b', '219')]
  log = built(text, min_item_count=2, min_length=3)
  assert listed(log) == [('a', '112')]
  assert log.items.tolist() == ['1', '2'] and log.counts.tolist() == [0, 2, 1]
  assert listed(built('a1 b2 a1', min_item_count=2)) == [('a', '11')]  # Nobody has no event.


def test_core_drops_until_none_is_left():
  # 9 goes, then b, then 2, then a has one event left and goes.
  chain = 'a1 a2 b2 b9 c1 d1 c3 d3 c1'
  log = built(chain, core=2, min_item_count=99, min_length=99)  # Which core takes the place of.
  assert listed(log) == [('c', '131'), ('d', '13')]


@pytest.mark.parametrize('seed', range(20))
def test_against_plain_lists(seed):
  rng = random.Random(seed)
  events = [(rng.choice('abcdefghij'), rng.choice('0123456789'), rng.randrange(6))
            for _ in range(rng.randrange(20, 60))]
  core = seed % 4
  least_items, least_length = rng.randrange(6), rng.randrange(5)

  def drop(kept, place, least):
    count = collections.Counter(e[place] for e in kept)
    return [e for e in kept if count[e[place]] >= least]

  want = events
  if core:
    for _ in events:
      want = drop(drop(want, 0, core), 1, core)
  else:
    want = drop(drop(want, 1, least_items), 0, least_length)
  text = ' '.join(user + item for user, item, _ in events)
  filters = dict(core=core, min_item_count=least_items, min_length=least_length)
  if not want:
    with pytest.raises(UserError, match='no event'):
      built(text, [e[2] for e in events], **filters)
    return
  log = built(text, [e[2] for e in events], **filters)
  users = dict.fromkeys(e[0] for e in events)
  assert listed(log) == [(u, ''.join(e[1] for e in sorted(want, key=lambda e: e[2]) if e[0] == u))
                         for u in users if any(e[0] == u for e in want)]
  count = collections.Counter(e[1] for e in want)
  appeared = list(dict.fromkeys(e[1] for e in events))
  assert log.items.tolist() == sorted(count, key=lambda i: (-count[i], appeared.index(i)))
  assert log.counts[1:].tolist() == [count[i] for i in log.items]


@pytest.mark.parametrize('filters, words', [
    (dict(core=3), r'config\.data\.core=3 leaves no event'),
    (dict(min_item_count=4, min_length=1), r'config\.data\.min_item_count=4 leaves no event'),
    (dict(min_item_count=2, min_length=3), r'config\.data\.min_length=3, after min_item_count=2')])
def test_nothing_left_says_which_filter(filters, words):
  with pytest.raises(UserError, match=words):
    built('a1 b1 a2 b3 c1', **filters)


def write(tmp_path, text='a1 b2 a2 b1 a3'):
  (tmp_path / 'in.txt').write_text(''.join(f'{e[0]} {e[1]}\n' for e in text.split()))
  return settings(name=f'interactions:{tmp_path}/in.txt')


def same(a, b):
  for name in ('users', 'items', 'events', 'starts', 'counts'):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


def test_prepare_makes_a_log_once_and_find_reads_it(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: said.append(text % values))
  data = write(tmp_path)
  data.min_item_count = 2
  path = tmp_path / 'runs' / 'new' / 'log.npz'
  logs.prepare(data, path.parent)
  assert len(said) == 1 and said[0].endswith(
      ': 2 users, 2 items, 4 events, 2.00 a user; dropped 0 users, 1 items, 1 events')
  assert [p.name for p in path.parent.iterdir()] == ['log.npz']
  found = logs.find(data, path.parent)
  same(found, built('a1 b2 a2 b1'))
  with zipfile.ZipFile(path) as archive:
    made_of = str(np.load(io.BytesIO(archive.read('made_of.npy'))))
  assert json.loads(made_of) == {
      'name': data.name, 'split': 'train', 'core': 0, 'min_item_count': 2, 'min_length': 0,
      'columns': {'user': 'user_id', 'item': 'item_id', 'time': 'timestamp'}}
  (tmp_path / 'in.txt').unlink()
  logs.prepare(data, path.parent)  # Is content with what is there.
  assert len(said) == 1


def test_the_embedded_log_needs_no_file(tmp_path):
  logs.prepare(settings(), tmp_path)
  assert not list(tmp_path.iterdir())
  assert logs.find(settings(), None) is markov.log()


@pytest.mark.parametrize('somewhere', [True, False])
def test_find_reads_what_was_not_prepared_and_leaves_nothing(tmp_path, somewhere):
  data = write(tmp_path)
  before = set(tmp_path.iterdir())
  log = logs.find(data, tmp_path if somewhere else None)
  assert set(tmp_path.iterdir()) == before
  logs.prepare(data, tmp_path)
  np.testing.assert_array_equal(log.events, logs.find(data, tmp_path).events)


@pytest.mark.parametrize('change, words', [
    (dict(name='interactions:other.txt'), r"name='interactions:.*in\.txt' \(now 'interactions:o"),
    (dict(core=1), r'core=0 \(now 1\); use another --workdir'),
    (dict(min_item_count=3, min_length=5), r'min_item_count=0 \(now 3\), min_length=0 \(now 5\)'),
    (dict(split='test'), r"split='train' \(now 'test'\)"),
    (dict(columns=dict(user='user_id', item='item_id', time='')), r'columns=.* \(now .*; use')])
def test_a_log_of_other_settings_is_refused(tmp_path, change, words):
  data = write(tmp_path)
  logs.prepare(data, tmp_path)
  other = settings(**{'name': data.name} | change)
  with pytest.raises(UserError, match=words):
    logs.find(other, tmp_path)
  with pytest.raises(UserError, match=words):
    logs.prepare(other, tmp_path)
  data.data_dir = '/elsewhere'
  logs.find(data, tmp_path)


@pytest.mark.parametrize('change', [
    dict(starts=np.array([0, 3, 4])), dict(starts=np.array([0, 5])),
    dict(starts=np.array([1, 3, 5])), dict(starts=np.array([0, 5, 5])),
    dict(starts=np.array([0., 3, 5])),
    dict(events=np.array([1, 2, 3, 4, 1], np.int32)), dict(events=np.array([0, 2, 3, 2, 1])),
    dict(events=np.ones((5, 1), int)), dict(users=np.array([b'a', b'b'])),
    dict(users=np.array(['a', None], object)), dict(items=None)])
def test_arrays_that_do_not_belong_together(tmp_path, change):
  logs.prepare(write(tmp_path), tmp_path)
  with np.load(tmp_path / 'log.npz') as found:
    arrays = dict(found) | change
  np.savez(tmp_path / 'log.npz', **{k: v for k, v in arrays.items() if v is not None})
  with pytest.raises(UserError, match='damaged'):
    logs.load(tmp_path / 'log.npz')


# --- tfds ----------------------------------------------------------------------------------------

# User, item, time.
RATINGS = [('7', '31', 20), ('4', '31', 30), ('7', '5', 10), ('7', '10', 10), ('4', '5', 29)]
REVIEWS = [('u2', 'B0', '2014-05-02'), ('u1', 'B0', '2014-05-01'), ('u2', 'B1', '2013-12-31'),
           ('u1', 'B1', ''), ('u2', 'B2', '2014-05-02')]


class _Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version('0.1.0')
  url_infos = None  # No downloads; see `core.data.datasets.digits`.

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True,
                                 features=tfds.features.FeaturesDict(self.FEATURES))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(self.EXAMPLES)


with tfds.core.registered.skip_registration():  # tfds has data sets of these names.
  class Movielens(_Tiny):
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='100k-ratings')]
    FEATURES = {'user_id': np.str_, 'movie_id': np.str_, 'timestamp': np.int64,
                'movie_genres': tfds.features.Sequence(np.int64)}
    EXAMPLES = [{'user_id': u, 'movie_id': i, 'timestamp': t, 'movie_genres': [1, 2]}
                for u, i, t in RATINGS]

  class AmazonUsReviews(_Tiny):
    name = 'amazon_us_reviews'
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='Beauty_v1_00')]
    FEATURES = {'data': {'customer_id': np.str_, 'product_id': np.str_, 'review_date': np.str_,
                         'star_rating': np.int32}}
    EXAMPLES = [{'data': {'customer_id': u, 'product_id': i, 'review_date': t, 'star_rating': 5}}
                for u, i, t in REVIEWS]

  class Plays(_Tiny):
    FEATURES = {'who': np.int64, 'track': {'number': np.int64, 'tags': tfds.features.Sequence(
        np.int64)}, 'at': np.float64, 'when': np.str_}
    EXAMPLES = [{'who': u, 'track': {'number': 10 * i, 'tags': [1]}, 'at': t, 'when': 'noon'}
                for u, i, t in [(3, 1, 1.5), (3, 2, .5), (2, 2, 0.)]]


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  root = str(tmp_path_factory.mktemp('tfds'))
  for builder, config in ((Movielens, '100k-ratings'), (AmazonUsReviews, 'Beauty_v1_00'),
                          (Plays, None)):
    builder(data_dir=root, config=config, file_format='array_record').download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  return root


def prepared(tmp_path, **data):
  logs.prepare(settings(**data), tmp_path)
  return [(str(user), [str(i) for i in found.items[found.sequence(u) - 1]])
          for found in [logs.find(settings(**data), tmp_path)]
          for u, user in enumerate(found.users)]


@pytest.mark.parametrize('name', ['movielens/100k-ratings', 'tfds:movielens/100k-ratings:0.1.0'])
def test_movielens_of_tfds(tmp_path, data_dir, name):
  assert prepared(tmp_path, name=name, data_dir=data_dir) == [
      ('7', ['5', '10', '31']), ('4', ['5', '31'])]


def test_amazon_reviews_of_tfds_without_those_that_have_no_date(tmp_path, data_dir, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: said.append(text % values))
  assert prepared(tmp_path, name='amazon_us_reviews/Beauty_v1_00', data_dir=data_dir) == [
      ('u2', ['B1', 'B0', 'B2']), ('u1', ['B0'])]
  assert said[-1].endswith('dropped 0 users, 0 items, 0 events, and before that 1 without a time')


def test_other_data_sets_of_tfds(tmp_path, data_dir):
  columns = dict(user='who', item='track/number', time='at')
  assert prepared(tmp_path, name='plays', data_dir=data_dir, columns=columns) == [
      ('3', ['20', '10']), ('2', ['20'])]
  (tmp_path / 'untimed').mkdir()
  columns['time'] = ''
  assert prepared(tmp_path / 'untimed', name='plays', data_dir=data_dir, columns=columns)[0] == (
      '3', ['10', '20'])
  assert prepared(tmp_path / 'untimed', name='plays', data_dir=data_dir, columns=columns)


@pytest.mark.parametrize('changes, words', [
    (dict(user='user_id'), "no feature 'user_id'; it has at, track, when, who"),
    (dict(item='track/title'), r"no feature 'track/title' .* track/number, track/tags"),
    (dict(item='who/track'), "no feature 'who/track'"),
    (dict(item='track/tags'), "feature 'track/tags' .* is more than one value"),
    (dict(item='track'), "feature 'track' .* is more than one value; it has .* track/number"),
    (dict(time='when'), "example 0 of .*: when 'noon' is not a time")])
def test_columns_that_tfds_does_not_have(tmp_path, data_dir, changes, words):
  columns = dict(user='who', item='track/number', time='at') | changes
  with pytest.raises(UserError, match=words):
    prepared(tmp_path, name='plays', data_dir=data_dir, columns=columns)
  assert not list(tmp_path.iterdir())


def test_unknown_data_sets(tmp_path, data_dir):
  with pytest.raises(UserError, match="'interactions:' names no file: write interactions:PATH"):
    prepared(tmp_path, name='interactions:')
  with pytest.raises(UserError, match='no data set .lastfm.'):
    prepared(tmp_path, name='lastfm', data_dir=data_dir)
