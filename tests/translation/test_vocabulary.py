"""Vocabularies: what comes back is what went in, and the same texts make the same file."""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import unicodedata

import pytest

from core.config import UserError
from core.data.datasets import numbers
from translation import vocabulary

# Like Multi30k and user manuals: quotes, commas, apostrophes, hyphens, umlauts, Hangul.
SENTENCES = [
    'Two young, White males are outside near many bushes.',
    'Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.',
    "A man's dog isn't well-trained (it barks), said the \"owner\".",
    'Ein „Schild“ mit Öl-Flecken: 50 % billiger – größer & älter!',
    'Make windows more (or less) vivid, so they’re easier to see…',
    '화면의 창과 단추를 더(또는 덜) 도드라지게 하여, 쉽게 볼 수 있게 합니다.',
    'Press Ctrl+Alt+↑ or type "/etc/dconf/db_1.d" # 2 times <b>.',
    'Non\u00a0breaking  and   runs\tof spaces ', 'a ## b ##c', 'cafe\u0301 ﬁn',
]
TEXTS = SENTENCES * 3 + [say((n, 3 * n)) for n in range(1, 300) for say in numbers.SAY.values()]


def normal(text):
  return ' '.join(unicodedata.normalize('NFKC', text).split())


@pytest.fixture(scope='module')
def trained():
  return {kind: vocabulary.train(iter(TEXTS), kind, 400) for kind in vocabulary.KINDS}


@pytest.mark.parametrize('kind', ['bpe', 'wordpiece', 'unigram'])
def test_round_trip(trained, kind):
  v = trained[kind]
  encoded = v.encode(TEXTS)
  for text, ids in zip(TEXTS, encoded):
    assert v.decode(ids) == normal(text)
    assert min(ids) > vocabulary.UNK and max(ids) < len(v)
  # New words of known letters.
  new = 'Schildbüsche: "manwindows", siebenundvierzigtausend.'
  assert v.decode(v.encode([new])[0]) == new


def test_words_round_trip_but_for_the_unknown(trained):
  v = trained['word']
  text = SENTENCES[2] + ' Kumquat, bushes'
  ids = v.encode([text])[0]
  # 'bushes.' and 'bushes' share their piece.
  assert v.decode(ids) == SENTENCES[2] + ' <unk>, bushes' and ids.count(vocabulary.UNK) == 1


def test_word_vocabulary_holds_the_most_frequent_words():
  texts = ['the cat sat', 'the cat ran', 'the dog sat', 'the bird flew']
  assert vocabulary.train(texts, 'word', 6).pieces(range(6)) == [
      *vocabulary.SPECIAL, '▁the', '▁cat', '▁sat']
  # What occurs once is unknown even where there is room, so that training sees unknown words.
  assert len(vocabulary.train(texts, 'word', 100)) == 6


def test_bpe_merges_the_most_frequent_pair_first():
  # By hand: 'ab' occurs 9 times in '▁ab', so '▁a' or 'ab' (9 each) come first, then the other
  # half; 'cd' 4 times comes next; 'ef' once is no merge.
  v = vocabulary.train(['ab ' * 9, 'xcd ' * 4, 'ef'], 'bpe', 100)
  pieces = set(v.pieces(range(len(v))))
  assert {'▁ab', '▁xcd'} <= pieces and 'ef' not in pieces and '▁ef' not in pieces
  assert v.pieces(v.encode(['ab xcd ef'])[0]) == ['▁ab', '▁xcd', '▁', 'e', 'f']


def test_wordpiece_takes_the_longest_piece_first(trained):
  """Greedy longest match, written out."""
  v = trained['wordpiece']
  pieces = set(v.pieces(range(len(v))))
  for text in SENTENCES[:6]:
    want = []
    for word in re.findall(r'▁?\w+|▁?[^\w▁]', '▁' + normal(text).replace(' ', '▁')):
      while word:
        size = max(n for n in range(1, len(word) + 1) if word[:n] in pieces)
        want.append(word[:size])
        word = word[size:]
    assert v.pieces(v.encode([text])[0]) == want


def test_unigram_finds_the_likeliest_pieces(trained):
  """Viterbi over the scores in the file, written out."""
  v = trained['unigram']
  scores = dict(json.loads(pickle.loads(pickle.dumps(v))._text)['model']['vocab'])
  for word in ('▁siebenundvierzig', '▁thousand', '▁bushes'):
    best = collections.defaultdict(lambda: -1e9, {0: 0.})
    for end in range(1, len(word) + 1):
      best[end] = max(best[start] + scores.get(word[start:end], -1e9) for start in range(end))
    got = sum(scores[p] for p in v.pieces(v.encode([word.replace('▁', '')])[0]))
    assert got == pytest.approx(best[len(word)], abs=1e-6)


@pytest.mark.parametrize('kind', vocabulary.KINDS)
def test_special_ids_and_their_names_in_text(trained, kind):
  v = trained[kind]
  assert v.pieces([0, 1, 2]) == ['<pad>', '</s>', '<unk>']
  assert v.encode(['', ' \t']) == [[], []] and v.encode([]) == []
  for ids in v.encode(['a </s> b', '<pad>', '</s>']):
    assert vocabulary.EOS not in ids and vocabulary.PAD not in ids
  some = v.encode(['forty two'])[0]
  assert v.decode([0, *some, 0, 1, 5, 6, 7]) == 'forty two'  # Padding skipped, the rest cut off.
  assert v.decode([]) == v.decode([1, 5]) == ''
  assert v.decode([2]) == '<unk>' and v.pieces([len(v), -1]) == ['<unk>', '<unk>']


def test_spaces_do_not_double(trained):
  v = trained['bpe']
  mark = v.pieces(range(len(v))).index('▁')
  word = v.encode(['two'])[0]
  assert v.decode([mark, *word, mark, mark, *word, mark]) == 'two two'
  assert v.decode(v.encode(['▁two ▁ two▁'])[0]) == 'two two'


@pytest.mark.parametrize('kind', vocabulary.KINDS)
def test_words_looked_up_are_texts_encoded(trained, kind):
  """The table of known words changes nothing, small or large, in threads or not."""
  v = pickle.loads(pickle.dumps(trained[kind]))
  want = [e.ids for e in v._tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
  assert v.encode(TEXTS) == want and v.encode(TEXTS) == want
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert list(pool.map(lambda t: v.encode([t])[0], TEXTS)) == want


def test_forgets_words_when_there_are_too_many(trained, monkeypatch):
  v = pickle.loads(pickle.dumps(trained['bpe']))
  want = v.encode(TEXTS)
  monkeypatch.setattr(vocabulary, '_REMEMBERED', 20)
  assert [v.encode([t])[0] for t in TEXTS] == want and len(v._known) <= 20 + 60


@pytest.mark.parametrize('kind', vocabulary.KINDS)
def test_save_and_load(trained, kind, tmp_path):
  v = trained[kind]
  v.save(tmp_path / 'v.json')
  assert os.listdir(tmp_path) == ['v.json']
  loaded = vocabulary.load(tmp_path / 'v.json')
  assert len(loaded) == len(v) and loaded.fingerprint == v.fingerprint
  assert loaded.encode(TEXTS) == v.encode(TEXTS)
  assert len({t.fingerprint for t in trained.values()}) == 4


def test_training_again_gives_the_same_file(trained):
  """In another process, whose hash tables have another order, and with the texts in another."""
  code = '''
import sys
from tests.translation import test_vocabulary as t
print([t.vocabulary.train(t.TEXTS[::-1], kind, 400).fingerprint for kind in t.vocabulary.KINDS])
'''
  root = pathlib.Path(vocabulary.__file__).resolve().parents[1]
  out = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True,
                       timeout=120)
  assert out.stdout.strip() == str([trained[k].fingerprint for k in vocabulary.KINDS]), out.stderr


def test_fingerprint_is_of_the_file(trained, tmp_path):
  trained['bpe'].save(tmp_path / 'v.json')
  digest = hashlib.sha256((tmp_path / 'v.json').read_bytes()).hexdigest()
  assert trained['bpe'].fingerprint == digest[:12]


def test_size_is_a_limit(trained, caplog):
  caplog.set_level('INFO', logger='absl')
  assert all(len(v) <= 400 for v in trained.values()) and len(trained['bpe']) == 400
  small = vocabulary.train(['one two two'] * 2, 'bpe', 500)
  assert len(small) < 30 and f'vocabulary of {len(small)}, not 500' in caplog.text
  with pytest.raises(UserError, match='vocabulary of 20 is too small: the characters'):
    vocabulary.train(TEXTS, 'bpe', 20)
  with pytest.raises(UserError, match='there is no text'):
    vocabulary.train([], 'word', 20)
  with pytest.raises(UserError, match="did you mean 'wordpiece'"):
    vocabulary.train(TEXTS, 'wordpieces', 20)


def changed(v, **changes):
  return json.dumps(json.loads(v._text) | changes)


def test_load_refuses_what_is_no_vocabulary(trained, tmp_path):
  path = tmp_path / 'v.json'
  with pytest.raises(UserError, match='no such file'):
    vocabulary.load(path)
  whole = trained['word']._text
  for text, message in [
      ('', 'not a JSON file'), ('{}', 'not a JSON file'), (whole[:500], 'not a JSON file'),
      (whole.replace('<pad>', '<bos>'), 'its first tokens are <bos>, </s>, <unk> instead of'),
      (changed(trained['bpe'], normalizer={'type': 'NFC'}), 'its normalizer is another'),
      (changed(trained['bpe'], pre_tokenizer=None), 'its pre_tokenizer is another')]:
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
      vocabulary.load(path)
    assert '\n' not in str(error.value)
  path.write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UserError, match='not a JSON file'):
    vocabulary.load(path)


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[translation\]'"):
    vocabulary.train(TEXTS, 'bpe', 300)
