"""Encoded pairs on disk, their buckets and their packing."""

import collections
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from core.config import UserError
from translation import corpus
from translation import vocabulary

VOCABULARY = vocabulary.train(['a b c d e f g h'] * 2, 'word', 20)  # Ids 3..10.


def made(lengths):
  """Pairs of given lengths without EOS; the words spell the number of the pair, in octal."""
  def words(number, size):
    return ' '.join(('abcdefgh'[number // 8 ** i % 8] for i in range(size)))
  return [{'source': words(n, s), 'target': words(n + 1, t)} for n, (s, t) in enumerate(lengths)]


def encoded(path, lengths, limit=64):
  corpus.encode(made(lengths), VOCABULARY, VOCABULARY, path, limit)
  return corpus.open_encoded(path)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
  lengths = np.random.default_rng(0).integers(1, 40, (500, 2))
  return encoded(tmp_path_factory.mktemp('many') / 'train', lengths), lengths


def test_ids_and_lengths(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, '_CHUNK', 2)
  got = encoded(tmp_path / 'new' / 'train', [(2, 1), (1, 3), (3, 0)])
  names = dict(zip(VOCABULARY.pieces(range(len(VOCABULARY))), range(len(VOCABULARY))))
  a, b, c = (names[f'▁{letter}'] for letter in 'abc')
  want = [([a, a, 1], [b, 1]), ([b, 1], [c, a, a, 1]), ([c, a, a, 1], [1])]
  assert len(got) == 3
  for i, sides in enumerate(want):
    for array, ids in zip(got[i], sides):
      assert array.dtype == np.int32
      np.testing.assert_array_equal(array, ids)
  assert got.lengths.dtype == np.int32 and got.lengths.tolist() == [[3, 2], [2, 4], [4, 1]]
  for outside in (3, -1):
    with pytest.raises(IndexError):
      got[outside]


def test_matches_the_vocabulary_and_is_mapped(many, tmp_path):
  got, lengths = many
  for i, pair in enumerate(made(lengths)):
    for side, ids in zip(('source', 'target'), got[i]):
      assert ids.tolist() == [*VOCABULARY.encode([pair[side]])[0], vocabulary.EOS]
  np.testing.assert_array_equal(got.lengths, lengths + 1)
  folder = got._path
  # A plain .npy of two bytes an id, as any reader sees it.
  stored = np.load(folder / 'source.ids.npy', allow_pickle=False)
  assert stored.dtype == np.uint16 and len(stored) == (lengths[:, 0] + 1).sum()
  assert all(isinstance(a.base, np.memmap) for a in (*got._ids, *got._offsets, got.lengths))


def test_large_vocabularies_take_four_bytes(tmp_path):
  class Large:
    fingerprint = 'large'

    def __len__(self):
      return 2**16 + 1

    def encode(self, texts):
      return [[2**16] for _ in texts]

  corpus.encode(made([(1, 1)] * 3), Large(), VOCABULARY, tmp_path / 'x', 9)
  got = corpus.open_encoded(tmp_path / 'x')
  assert got[2][0].tolist() == [2**16, 1] and got._ids[0].dtype == np.uint32
  assert got._ids[1].dtype == np.uint16


def test_limit_cuts_what_is_stored_and_not_the_lengths(tmp_path):
  got = encoded(tmp_path / 'x', [(9, 2), (3, 3), (4, 12)], limit=5)
  assert [len(ids) for i in range(3) for ids in got[i]] == [5, 3, 4, 4, 5, 5]
  assert all(ids[-1] == 1 and (ids[:-1] > 2).all() for i in range(3) for ids in got[i])
  assert got.lengths.tolist() == [[10, 3], [4, 4], [5, 13]]
  # Training never takes a cut sentence for a whole one.
  assert corpus.Bucketed(got, (5,)).left_out.tolist() == [0, 2]
  assert corpus.Packed(got, 5, 0).left_out.tolist() == [0, 2]
  for make in (lambda: corpus.Bucketed(got, (5, 10)), lambda: corpus.Packed(got, 10, 0)):
    with pytest.raises(UserError, match='cut to 5'):
      make()
  with pytest.raises(ValueError, match='limit=1'):
    encoded(tmp_path / 'y', [(1, 1)], limit=1)


def test_encoding_again_replaces(tmp_path):
  encoded(tmp_path / 'x', [(1, 1)] * 5)
  assert len(encoded(tmp_path / 'x', [(2, 2)] * 3)) == 3
  assert os.listdir(tmp_path) == ['x']


def test_failure_leaves_nothing_or_the_old(tmp_path):
  class Broken(list):
    def __getitem__(self, index):
      if index == 3:
        raise OSError('the disk is gone')
      return super().__getitem__(index)

  for have in (0, 7):
    if have:
      encoded(tmp_path / 'x', [(1, 1)] * have)
    with pytest.raises(OSError, match='gone'):
      corpus.encode(Broken(made([(1, 1)] * 5)), VOCABULARY, VOCABULARY, tmp_path / 'x', 9)
    assert os.listdir(tmp_path) == (['x'] if have else [])
  assert len(corpus.open_encoded(tmp_path / 'x')) == 7


def test_killed_process_leaves_nothing_that_opens(tmp_path):
  code = '''
import os, pathlib, signal, sys
from tests.translation import test_corpus as t
class Fatal(list):
  def __getitem__(self, index):
    if index == 5: os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(index)
t.corpus._CHUNK = 2
t.corpus.encode(Fatal(t.made([(1, 1)] * 8)), t.VOCABULARY, t.VOCABULARY,
                pathlib.Path(sys.argv[1]), 9)
'''
  root = pathlib.Path(corpus.__file__).resolve().parents[1]
  killed = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'x')], cwd=root, timeout=120)
  assert killed.returncode == -signal.SIGKILL
  left, = os.listdir(tmp_path)
  assert left.endswith('.tmp')
  for folder in ('x', left):
    with pytest.raises(UserError, match='--mode=prepare'):
      corpus.open_encoded(tmp_path / folder)
  assert len(encoded(tmp_path / 'x', [(1, 1)] * 8)) == 8


def test_damaged_folders(tmp_path):
  lengths = [(3, 3)] * 9
  for number, (name, damage) in enumerate([
      ('source.ids.npy', lambda f: f.write_bytes(f.read_bytes()[:-6])),
      ('target.offsets.npy', lambda f: f.write_bytes(b'')),
      ('target.offsets.npy', lambda f: np.save(f, np.arange(10))),
      ('lengths.npy', lambda f: np.save(f, np.zeros((8, 2), np.int32))),
      ('lengths.npy', lambda f: np.save(f, np.array([{}], object), allow_pickle=True)),
      ('about.json', lambda f: f.write_text('{"limit": 3}')),
      ('about.json', lambda f: f.write_text('{"limi')),
      ('about.json', lambda f: f.unlink()),
  ]):
    path = tmp_path / str(number)
    encoded(path, lengths)
    damage(path / name)
    with pytest.raises(UserError, match='--mode=prepare') as error:
      corpus.open_encoded(path)
    assert '\n' not in str(error.value)


def test_buckets(many):
  got, lengths = many
  bucketed = corpus.Bucketed(got, (8, 16, 32))
  longest = (lengths + 1).max(1)
  kept = [i for i in range(500) if longest[i] <= 32]
  assert bucketed.left_out.tolist() == [i for i in range(500) if longest[i] > 32]
  assert len(bucketed) == len(kept) == len(bucketed.buckets)
  assert bucketed.buckets.dtype == bucketed.left_out.dtype == np.int32
  for n, (pair, bucket) in enumerate(zip(kept, bucketed.buckets)):
    assert bucket == sum(longest[pair] > size for size in (8, 16, 32))
    example = bucketed[n]
    assert set(example) == {'source', 'target', 'pair'} and example['pair'] == pair
    assert isinstance(example['pair'], np.int32)
    for side, ids in zip(('source', 'target'), got[pair]):
      assert example[side].dtype == np.int32 and example[side].shape == ((8, 16, 32)[bucket],)
      np.testing.assert_array_equal(example[side][:len(ids)], ids)
      assert not example[side][len(ids):].any()


@pytest.mark.parametrize('lengths', [(), (8, 8), (16, 8), (0, 8)])
def test_bad_buckets(many, lengths):
  with pytest.raises(UserError, match='must be at least one, and ascend'):
    corpus.Bucketed(many[0], lengths)


def unpacked(row):
  """The pairs of a row, by its segments."""
  count = row['source_segments'].max()
  assert count == row['target_segments'].max() > 0
  for side in ('source', 'target'):
    segments = row[f'{side}_segments']
    real = segments > 0
    assert (np.diff(segments[real]) >= 0).all() and real[:real.sum()].all()  # Padding is last.
    np.testing.assert_array_equal(row[side] > 0, real)
  return [tuple(tuple(row[side][row[f'{side}_segments'] == s].tolist())
                for side in ('source', 'target')) for s in range(1, count + 1)]


@pytest.mark.parametrize('stream', [8192, 60])
def test_packing_holds_every_pair_exactly_once(many, stream, monkeypatch):
  got, lengths = many
  monkeypatch.setattr(corpus.first_fit, '__defaults__', (32, stream))
  packed = corpus.Packed(got, 36, seed=1)
  rows = [packed[i] for i in range(len(packed))]
  for row in rows:
    assert set(row) == {'source', 'target', 'source_segments', 'target_segments'}
    assert all(a.dtype == np.int32 and a.shape == (36,) for a in row.values())
  longest = (lengths + 1).max(1)
  assert packed.left_out.tolist() == np.flatnonzero(longest > 36).tolist()
  found = collections.Counter(pair for row in rows for pair in unpacked(row))
  want = collections.Counter(tuple(tuple(ids.tolist()) for ids in got[i])
                             for i in range(500) if longest[i] <= 36)
  assert found == want
  fill = [np.mean([row[side] > 0 for row in rows]) for side in ('source', 'target')]
  np.testing.assert_allclose(packed.fill, fill, rtol=1e-12)
  with pytest.raises(IndexError):
    packed[len(packed)]


def test_packing_by_hand(tmp_path):
  """Section 7 of the fact sheet in packed form: three pairs in one row, then what does not fit."""
  got = encoded(tmp_path / 'x', [(1, 2), (2, 1), (1, 2)])
  names = [tuple(got[i][1].tolist()) for i in range(3)]
  assert [len(n) for n in names] == [3, 2, 3]
  for seed in range(20):  # Some seed has them in this order.
    row = corpus.Packed(got, 10, seed)[0]
    if unpacked(row) == [tuple(tuple(ids.tolist()) for ids in got[i]) for i in range(3)]:
      break
  assert row['target'].tolist() == [*names[0], *names[1], *names[2], 0, 0]
  assert row['target_segments'].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 0, 0]
  assert row['source_segments'].tolist() == [1, 1, 2, 2, 2, 3, 3, 0, 0, 0]
  # With seven places the targets (8 tokens) no longer fit, though the sources (7) do.
  assert len(corpus.Packed(got, 7, 0)) == 2


def test_first_fit_by_hand():
  sizes = [(6, 1), (5, 5), (4, 1), (1, 9), (5, 5), (1, 6)]
  # Row 0 takes 6, then 4 (full in sources); row 1 takes 5; 1 of 9 needs row 2; 5 goes to row 1;
  # the last fits no more in rows 0 (source full), 1 (target) and 2 (target).
  assert corpus.first_fit(np.array(sizes), 10).tolist() == [0, 1, 0, 2, 1, 3]
  # With one open row at a time, each that does not fit closes the row.
  assert corpus.first_fit(np.array(sizes), 10, open_rows=1).tolist() == [0, 1, 1, 2, 3, 4]
  assert corpus.first_fit(np.zeros((0, 2), np.int32), 10).tolist() == []


@pytest.mark.parametrize('count', [50, 3000])
def test_first_fit_against_a_plain_loop(count):
  sizes = np.random.default_rng(count).integers(1, 30, (count, 2))
  rows, opened = [], {n: [0, 0] for n in range(8)}
  for source, target in sizes:
    for n, (s, t) in opened.items():
      if s + source <= 64 and t + target <= 64:
        break
    else:
      # The row that is closed gives its place in the line to the new one.
      n = max(opened, key=lambda k: (sum(opened[k]), -list(opened).index(k)))
      fresh = len(set(rows)) + 1000
      opened = {(fresh if k == n else k): ([0, 0] if k == n else v) for k, v in opened.items()}
      n = fresh
    opened[n][0] += source
    opened[n][1] += target
    rows.append(n)
  got = corpus.first_fit(sizes, 64, open_rows=8)
  def groups(names):
    found = collections.defaultdict(list)
    for i, name in enumerate(names):
      found[name].append(i)
    return sorted(found.values())
  assert groups(got.tolist()) == groups(rows)


def test_packing_wastes_little():
  """Sentences as long as those of WMT, in rows of 256: what one open row would waste is saved."""
  rng = np.random.default_rng(0)
  source = np.exp(rng.normal(3.2, .6, 20_000))
  target = source * np.exp(rng.normal(.05, .2, 20_000))
  pair = np.stack([source, target], 1).clip(2, 256).astype(int)
  rows = corpus.first_fit(pair, 256)
  used = np.stack([np.bincount(rows, pair[:, side]) for side in (0, 1)])
  assert used.max() <= 256 and (np.bincount(rows) > 0).all()
  assert used[1].mean() / 256 > .95
  one = corpus.first_fit(pair, 256, open_rows=1).max() + 1
  assert rows.max() + 1 < .95 * one


def test_seed_decides_the_packing(many):
  def rows(seed):
    packed = corpus.Packed(many[0], 48, seed)
    return [packed[i]['source'].tolist() for i in range(len(packed))]
  assert rows(3) == rows(3) != rows(4)


def test_pickles_by_path(many):
  got, _ = many
  for source in (got, corpus.Bucketed(got, (16, 64)), corpus.Packed(got, 64, 7)):
    stored = pickle.dumps(source)
    assert len(stored) < 1000  # Neither ids nor offsets travel.
    again = pickle.loads(stored)
    assert len(again) == len(source) and repr(again) == repr(source)
    for i in (0, len(source) - 1):
      if source is got:
        for x, y in zip(again[i], source[i]):
          np.testing.assert_array_equal(x, y)
      else:
        for name, value in source[i].items():
          np.testing.assert_array_equal(again[i][name], value)


def test_about_tells_encodings_apart(tmp_path):
  other = vocabulary.train(['a b c d'] * 2, 'word', 20)
  lengths = [(2, 3)] * 4
  got = encoded(tmp_path / 'x', lengths).about
  assert got == corpus.about(made(lengths), VOCABULARY, VOCABULARY, 64)
  assert got == json.loads((tmp_path / 'x' / 'about.json').read_text())
  for change in (corpus.about(made([(2, 3)] * 3 + [(3, 3)]), VOCABULARY, VOCABULARY, 64),
                 corpus.about(made(lengths + [(1, 1)]), VOCABULARY, VOCABULARY, 64),
                 corpus.about(made(lengths), other, VOCABULARY, 64),
                 corpus.about(made(lengths), VOCABULARY, other, 64),
                 corpus.about(made(lengths), VOCABULARY, VOCABULARY, 63)):
    assert change != got
