"""Number words, checked by hand and against num2words, and the data sets made of them."""

import hashlib
import random
import re

import pytest

from core.data import sources
from core.data.datasets import numbers


@pytest.mark.parametrize('n, english, german, korean', [
    (1, 'one', 'eins', '일'),
    (10, 'ten', 'zehn', '십'),
    (12, 'twelve', 'zwölf', '십이'),
    (16, 'sixteen', 'sechzehn', '십육'),
    (21, 'twenty one', 'einundzwanzig', '이십일'),
    (42, 'forty two', 'zweiundvierzig', '사십이'),
    (70, 'seventy', 'siebzig', '칠십'),
    (100, 'one hundred', 'einhundert', '백'),
    (101, 'one hundred one', 'einhunderteins', '백일'),
    (111, 'one hundred eleven', 'einhundertelf', '백십일'),
    (1000, 'one thousand', 'eintausend', '천'),
    (7003, 'seven thousand three', 'siebentausenddrei', '칠천삼'),
    (10_000, 'ten thousand', 'zehntausend', '만'),
    (11_000, 'eleven thousand', 'elftausend', '만 천'),
    (101_001, 'one hundred one thousand one', 'einhunderteintausendeins', '십만 천일'),
    (123_456, 'one hundred twenty three thousand four hundred fifty six',
     'einhundertdreiundzwanzigtausendvierhundertsechsundfünfzig', '십이만 삼천사백오십육'),
    (200_030, 'two hundred thousand thirty', 'zweihunderttausenddreißig', '이십만 삼십'),
])
def test_worked_by_hand(n, english, german, korean):
  assert (numbers.english(n), numbers.german(n), numbers.korean(n)) == (english, german, korean)


def test_agrees_with_num2words():
  num2words = pytest.importorskip('num2words').num2words
  sample = [*range(1, 130), *random.Random(0).sample(range(1, 1_000_000), 1500)]
  for n in sample:
    theirs = re.sub(r'[,-]|\band\b', ' ', num2words(n, lang='en')).split()
    assert numbers.english(n).split() == theirs
    # It says 'einhunderteinstausend', which is no German; Duden has '...eintausend'.
    theirs = num2words(n, lang='de').replace('einstausend', 'eintausend')
    assert numbers.german(n) == theirs
    assert numbers.korean(n) == num2words(n, lang='ko')


@pytest.mark.parametrize('say', [numbers.english, numbers.german, numbers.korean])
def test_every_number_has_its_own_words(say):
  sample = [*range(1, 20_000), *range(99_000, 1_000_000, 997)]
  assert len({say(n) for n in sample}) == len(set(sample))
  for n in (0, 1_000_000, -3):
    with pytest.raises(ValueError, match='999,999'):
      say(n)


def test_phrases_are_lists():
  phrase = (42, 7003, 9)
  assert numbers.SAY['en'](phrase) == 'forty two, seven thousand three and nine'
  assert numbers.SAY['de'](phrase) == 'zweiundvierzig, siebentausenddrei und neun'
  assert numbers.SAY['ko'](phrase) == '사십이, 칠천삼 그리고 구'
  assert numbers.SAY['en']((5,)) == 'five' and numbers.SAY['de']((5, 1)) == 'fünf und eins'


@pytest.fixture(scope='module')
def splits():
  return {split: numbers.phrases(split) for split in numbers.SIZES}


def test_splits_are_what_they_say(splits):
  sizes = {'train': 20_000, 'validation': 1000, 'test': 1000, 'test_range': 500, 'test_length': 500}
  assert {split: len(p) for split, p in splits.items()} == sizes
  everything = [phrase for p in splits.values() for phrase in p]
  assert len(set(everything)) == sum(sizes.values())  # No phrase twice, in any split.
  for split, found in splits.items():
    held_out = [any(400 <= n <= 499 or 70_000 <= n <= 79_999 for n in p) for p in found]
    assert all(held_out) if split == 'test_range' else not any(held_out)
    lengths = {len(p) for p in found}
    assert lengths == ({5, 6, 7, 8} if split == 'test_length' else {1, 2, 3, 4})


def test_small_numbers_are_as_frequent_as_large_ones(splits):
  digits = [len(str(n)) for p in splits['train'] for n in p]
  share = [digits.count(d) / len(digits) for d in range(1, 7)]
  assert min(share) > .14 and max(share) < .19


def test_phrases_never_change(splits):
  # Part of version 1.0.0: whoever changes this changes everybody's test set.
  digest = hashlib.sha256(repr(sorted(splits.items())).encode()).hexdigest()
  assert digest[:16] == 'f822d521eb9c7704'


def test_data_sets_hold_the_phrases(splits):
  # In the directory that all tests share: whoever changes the phrases must change the version.
  for name, language in (('numbers_en_de', 'de'), ('numbers_en_ko', 'ko')):
    for split, found in splits.items():
      source = sources.open_source(name, split)
      assert len(source) == len(found)
      for i in (0, len(found) - 1):
        assert source[i] == {'source': numbers.SAY['en'](found[i]).encode(),
                             'target': numbers.SAY[language](found[i]).encode(),
                             'numbers': len(found[i])}
