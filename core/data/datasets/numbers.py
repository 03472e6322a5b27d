"""Numbers in words, in English, German and Korean: the smallest honest translation task.

A phrase is one number or a few, from 1 to 999,999: 'forty two, seven thousand three and nine' is
'zweiundvierzig, siebentausenddrei und neun' and '사십이, 칠천삼 그리고 구'. Nothing can be copied:
German says units before tens and writes a number as one word, so words are reordered and taken
apart, and Korean counts in ten thousands (만), so numbers are bracketed anew. Everything is
generated; nothing is downloaded.

Splits, which are part of the version below:

  train 20,000, validation 1,000, test 1,000: different phrases of one to four numbers. The SHA-256
    of a phrase says which of the three it belongs to.
  test_range 500: as above, but at least one number of each phrase lies in 400..499 or in
    70,000..79,999. No other split has such a number, though their words occur in larger ones
    ('four hundred twelve thousand', 'one hundred seventy one thousand').
  test_length 500: five to eight numbers a phrase.

The digits of a number are drawn before the number, so that small ones are as frequent as large
ones.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

HELD_OUT = (range(400, 500), range(70_000, 80_000))
SIZES = {'train': 20_000, 'validation': 1_000, 'test': 1_000, 'test_range': 500,
         'test_length': 500}

Phrase = tuple[int, ...]

_ENGLISH = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen '
            'fifteen sixteen seventeen eighteen nineteen').split()
_ENGLISH_TENS = 'zero ten twenty thirty forty fifty sixty seventy eighty ninety'.split()
_GERMAN = ('null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn '
           'fünfzehn sechzehn siebzehn achtzehn neunzehn').split()
_GERMAN_TENS = 'null zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig'.split()
_KOREAN = '영일이삼사오육칠팔구'


def english(n: int) -> str:
  """Says a number without hyphens or 'and': 7,342 is 'seven thousand three hundred forty two'.

  Args:
    n: 1 .. 999,999.

  Raises:
    ValueError: any other number.
  """
  _check(n)
  words = []
  if n >= 1000:
    words += [english(n // 1000), 'thousand']
    n %= 1000
  if n >= 100:
    words += [_ENGLISH[n // 100], 'hundred']
    n %= 100
  if n >= 20:
    words.append(_ENGLISH_TENS[n // 10])
    n %= 10
  if n:
    words.append(_ENGLISH[n])
  return ' '.join(words)


def german(n: int) -> str:
  """Says a number as one word: 7,342 is 'siebentausenddreihundertzweiundvierzig'.

  Args:
    n: 1 .. 999,999.

  Raises:
    ValueError: any other number.
  """
  _check(n)
  # One is 'ein' inside a number and 'eins' at its end.
  return _german_stem(n) + ('s' if n % 100 == 1 else '')


def _german_stem(n: int) -> str:
  text = ''
  if n >= 1000:
    text += _german_stem(n // 1000) + 'tausend'
    n %= 1000
  if n >= 100:
    text += _GERMAN[n // 100] + 'hundert'
    n %= 100
  if n >= 20:
    units = _GERMAN[n % 10] + 'und' if n % 10 else ''
    return text + units + _GERMAN_TENS[n // 10]
  return text + (_GERMAN[n] if n else '')


def korean(n: int) -> str:
  """Says a number in Sino-Korean, a space after the ten thousands: 123,456 is '십이만 삼천사백오십육'.

  A one is not said before 십, 백, 천 and 만 where these begin (만 천 is 11,000).

  Args:
    n: 1 .. 999,999.

  Raises:
    ValueError: any other number.
  """
  _check(n)
  high, low = divmod(n, 10_000)
  groups = []
  if high:
    groups.append(('' if high == 1 else _korean_group(high)) + '만')
  if low:
    groups.append(_korean_group(low))
  return ' '.join(groups)


def _korean_group(n: int) -> str:
  """Up to four digits: a digit and its place each, zeros left out, a one only as the last."""
  text = ''
  for value, place in ((1000, '천'), (100, '백'), (10, '십'), (1, '')):
    digit = n // value % 10
    if digit:
      text += ('' if digit == 1 and place else _KOREAN[digit]) + place
  return text


def _check(n: int) -> None:
  if not 1 <= n <= 999_999:
    raise ValueError(f'{n} is not in 1 .. 999,999')


def _listed(numbers: Phrase, say: Callable[[int], str], last: str) -> str:
  """'a', 'a and b', 'a, b and c'."""
  *first, end = map(say, numbers)
  return f'{", ".join(first)} {last} {end}' if first else end


# Language -> how it says a phrase.
SAY: dict[str, Callable[[Phrase], str]] = {
    'en': lambda numbers: _listed(numbers, english, 'and'),
    'de': lambda numbers: _listed(numbers, german, 'und'),
    'ko': lambda numbers: _listed(numbers, korean, '그리고'),
}


def held_out(n: int) -> bool:
  """Whether only `test_range` may have the number."""
  return any(n in numbers for numbers in HELD_OUT)


def phrases(split: str) -> list[Phrase]:
  """The phrases of a split as numbers, no phrase twice.

  Raises:
    KeyError: there is no such split.
  """
  size = SIZES[split]
  if split == 'test_range':
    drawn = _draw_phrases('range', 1, 4, with_held_out=True)
  elif split == 'test_length':
    drawn = _draw_phrases('length', 5, 8)
  else:
    drawn = (p for p in _draw_phrases('numbers', 1, 4) if _hash_split(p) == split)
  found: dict[Phrase, None] = {}  # A set that remembers the order.
  while len(found) < size:
    found[next(drawn)] = None
  return list(found)


def _hash_split(numbers: Phrase) -> str:
  bucket = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], 'big') % 22
  return {0: 'validation', 1: 'test'}.get(bucket, 'train')


def _draw_phrases(seed: str, fewest: int, most: int, with_held_out: bool = False,
                  ) -> Iterator[Phrase]:
  """Endless phrases; the same for a seed in every version of Python, which `random()` promises."""
  rng = random.Random(seed)

  def draw(low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))

  def number() -> int:
    while True:
      digits = draw(1, 6)
      n = draw(10 ** (digits - 1), 10 ** digits - 1)
      if not held_out(n):
        return n

  while True:
    numbers = [number() for _ in range(draw(fewest, most))]
    if with_held_out:
      chosen = HELD_OUT[draw(0, len(HELD_OUT) - 1)]
      numbers[draw(0, len(numbers) - 1)] = draw(chosen[0], chosen[-1])
    yield tuple(numbers)


class _Numbers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the two builders share: `source`, `target`, `numbers` (how many a phrase has)."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Phrases drawn by random.Random, split by SHA-256.'}
  url_infos = None  # No downloads; see `core.data.datasets.digits`.
  LANGUAGES: tuple[str, str]  # Of source and target.

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=f'Numbers in words, {" to ".join(self.LANGUAGES)}, generated.',
        features=tfds.features.FeaturesDict({
            'source': tfds.features.Text(),
            'target': tfds.features.Text(),
            'numbers': tfds.features.Scalar(np.int64),
        }),
        supervised_keys=('source', 'target'),
        disable_shuffling=True,  # The phrases are in random order.
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing is downloaded.
    return {split: self._generate_examples(split) for split in SIZES}

  def _generate_examples(self, split: str):
    source, target = (SAY[language] for language in self.LANGUAGES)
    for position, numbers in enumerate(phrases(split)):
      yield position, {'source': source(numbers), 'target': target(numbers),
                       'numbers': len(numbers)}


class NumbersEnDe(_Numbers):
  """tfds builder of English and German number words."""
  LANGUAGES = ('en', 'de')


class NumbersEnKo(_Numbers):
  """tfds builder of English and Korean number words."""
  LANGUAGES = ('en', 'ko')
