"""Vocabularies: from text to token ids and back.

Text is brought to Unicode's NFKC form, runs of spaces become one, and every word gets a mark '▁'
in front. Words and punctuation are taken apart before pieces are learned, so that 'bushes' and
'bushes.' share a piece; a sign after a space carries the mark itself. Pieces joined, and the marks
turned back into spaces, are the text again.

Four kinds:

  bpe: pairs of pieces merged, the most frequent first (Sennrich et al. 2016; Vaswani et al. 2017).
  wordpiece: pieces found like those of bpe, applied by longest match; the mark says where words
    begin (Wu et al. 2016, whose pieces are chosen by likelihood instead).
  unigram: the segmentation of highest probability (Kudo 2018).
  word: whole words, the most frequent ones; the others are unknown (Sutskever et al. 2014, Bahdanau
    et al. 2015).

A file is the JSON of the library `tokenizers`. Ids 0, 1 and 2 are padding, end of sentence and
unknown.
"""

import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging

from core.config import UserError, choose
from core.weights import appearing

PAD, EOS, UNK = 0, 1, 2
SPECIAL = ('<pad>', '</s>', '<unk>')
KINDS = ('bpe', 'wordpiece', 'unigram', 'word')

_MARK = '▁'
# Letters, marks and digits are words; everything else is a piece's beginning and end.
_WORDS = rf'{_MARK}?[\p{{L}}\p{{M}}\p{{N}}]+|{_MARK}?[^\p{{L}}\p{{M}}\p{{N}}{_MARK}]'
_REMEMBERED = 2**19  # Words, about 100 MB.
_LEAST = 2  # Times that a merge or a word must occur: what occurs once is not worth a piece.


class Vocabulary:
  """Pieces and their ids. Picklable; may be used from several threads.

  Attributes:
    fingerprint: twelve hexadecimal digits that differ when anything in the file differs.
  """

  def __init__(self, text: str):
    """Makes a vocabulary of the JSON in its file.

    Raises:
      ValueError: the library cannot read it, the first ids are not those of `SPECIAL`, or text is
        taken apart in another way than ours.
    """
    try:
      self._tokenizer = _library().Tokenizer.from_str(text)
    except UserError:
      raise
    except Exception as e:  # The library raises no other class.
      raise ValueError(str(e)) from e
    first = tuple(self._tokenizer.id_to_token(i) for i in range(len(SPECIAL)))
    if first != SPECIAL:
      raise ValueError(f'its first tokens are {", ".join(map(str, first))} instead of '
                       f'{", ".join(SPECIAL)}')
    ours = _tokenizer(_library().models.BPE())
    for part in ('normalizer', 'pre_tokenizer'):
      if repr(getattr(self._tokenizer, part)) != repr(getattr(ours, part)):
        raise ValueError(f'its {part} is another than --mode=prepare writes')
    # '</s>' within a text is text, not the end of the sentence.
    self._tokenizer.encode_special_tokens = True
    self._pieces = [self._tokenizer.id_to_token(i)
                    for i in range(self._tokenizer.get_vocab_size())]
    self._text = text
    self._known: dict[str, list[int]] = {}
    self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]

  def __reduce__(self):
    return Vocabulary, (self._text,)

  def __len__(self) -> int:
    return len(self._pieces)

  def __repr__(self) -> str:
    return f'Vocabulary({len(self)} pieces, {self.fingerprint})'

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without the end of sentence. Fast when many texts are given at once.

    No piece crosses a space, so words are encoded once (by all cores) and then looked up: several
    times as fast as encoding whole texts.
    """
    split = [text.split() for text in texts]
    known = self._known
    new = [word for word in set(itertools.chain.from_iterable(split)) if word not in known]
    encoded = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
    known.update((word, e.ids) for word, e in zip(new, encoded))
    if len(known) > _REMEMBERED:
      self._known = {}  # Another thread may still read the old one.
    return [list(itertools.chain.from_iterable(map(known.__getitem__, words))) for words in split]

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """The piece of each id, marks and special ones included.

    Ids beyond the vocabulary, which a model with a rounded-up output may draw, are '<unk>'.
    """
    count = len(self._pieces)
    return [self._pieces[i] if 0 <= i < count else SPECIAL[UNK] for i in map(int, ids)]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids up to the first end of sentence; padding is left out.

    An unknown piece reads ' <unk>', a word of its own.
    """
    kept = []
    for i in map(int, ids):
      if i == EOS:
        break
      if i != PAD:
        kept.append(i)
    unknown = SPECIAL[UNK]
    joined = ''.join(_MARK + p if p == unknown else p for p in self.pieces(kept))
    return ' '.join(joined.replace(_MARK, ' ').split())

  def save(self, path: pathlib.Path) -> None:
    """Writes the file whole or not at all."""
    with appearing(path) as temporary:
      temporary.write_text(self._text, encoding='utf-8')


def load(path: pathlib.Path) -> Vocabulary:
  """Reads what `Vocabulary.save` wrote.

  Raises:
    UserError: no such file, not a vocabulary, or one with other first tokens.
  """
  try:
    return Vocabulary(path.read_text(encoding='utf-8'))
  except FileNotFoundError as e:
    raise UserError(f'vocabulary {path}: no such file; --mode=prepare makes it') from e
  except (OSError, ValueError) as e:
    raise UserError(f'vocabulary {path}: not a JSON file of `tokenizers` whose first tokens are '
                    f'{", ".join(SPECIAL)} ({e})') from e


def train(texts: Iterable[str], kind: str, size: int) -> Vocabulary:
  """Learns a vocabulary; the same texts give the same file, whatever their order.

  Args:
    texts: sentences, gone through once; of both languages when they share it.
    kind: one of `KINDS`.
    size: of the vocabulary at most, special pieces included. It is smaller, which is logged, when
      the texts do not have so many pieces.

  Raises:
    UserError: an unknown kind, no text, or more different characters than `size` has room for.
  """
  choose('config.data.vocab.kind', kind, KINDS)
  lib = _library()
  settings: dict[str, Any] = {
      'vocab_size': size, 'special_tokens': list(SPECIAL), 'show_progress': sys.stderr.isatty()}
  if kind == 'unigram':
    model = lib.models.Unigram()
    trainer = lib.trainers.UnigramTrainer(unk_token=SPECIAL[UNK], **settings)
  elif kind == 'word':
    model = lib.models.WordLevel(unk_token=SPECIAL[UNK])
    trainer = lib.trainers.WordLevelTrainer(min_frequency=_LEAST, **settings)
  else:
    model = lib.models.BPE(unk_token=SPECIAL[UNK])
    trainer = lib.trainers.BpeTrainer(min_frequency=_LEAST, **settings)
  tokenizer = _tokenizer(model)
  tokenizer.train_from_iterator(texts, trainer)
  if kind == 'wordpiece':
    # The library's own trainer numbers the first pieces in the order of a hash table.
    tokenizer = _tokenizer(lib.models.WordPiece(
        tokenizer.get_vocab(), unk_token=SPECIAL[UNK], continuing_subword_prefix='',
        max_input_chars_per_word=2**20))
  elif kind == 'unigram':
    tokenizer = _tokenizer(lib.models.Unigram(_settled(tokenizer), unk_id=UNK))
  count = tokenizer.get_vocab_size()
  if count <= len(SPECIAL):
    raise UserError('a vocabulary cannot be learned: there is no text')
  if count > size:
    raise UserError(f'a vocabulary of {size} is too small: the characters of the text alone are '
                    f'{count - len(SPECIAL)}')
  if count < size:
    logging.info('the text has pieces for a vocabulary of %d, not %d', count, size)
  return Vocabulary(tokenizer.to_str())


def _library():
  try:
    import tokenizers
  except ImportError as e:
    raise UserError("vocabularies need the library tokenizers: `pip install -e '.[translation]'`"
                    ) from e
  return tokenizers


def _tokenizer(model):
  """An untrained or rebuilt model behind our way of taking text apart."""
  lib = _library()
  tokenizer = lib.Tokenizer(model)
  normalizers = lib.normalizers
  tokenizer.normalizer = normalizers.Sequence([
      normalizers.NFKC(), normalizers.Replace(lib.Regex(rf'[\s{_MARK}]+'), ' '),
      normalizers.Strip(), normalizers.Replace(' ', _MARK), normalizers.Prepend(_MARK)])
  tokenizer.pre_tokenizer = lib.pre_tokenizers.Split(lib.Regex(_WORDS), 'isolated')
  return tokenizer


def _settled(tokenizer) -> list[tuple[str, float]]:
  """The pieces of a unigram model and their log-probabilities, without what is random in them.

  The library adds up in the order of a hash table, which shows in the last digits, and gives
  characters that would have fallen out the least score and, each, some ten-thousandths more, in
  such an order. Here they all have the least score, and scores are rounded.
  """
  pieces = json.loads(tokenizer.to_str())['model']['vocab']
  special, pieces = pieces[:len(SPECIAL)], pieces[len(SPECIAL):]
  least = min((score for _, score in pieces), default=0.)
  nearly = least + 1e-4 * sum(len(piece) == 1 for piece, _ in pieces)
  settled = [(piece, round(least if len(piece) == 1 and score < nearly else score, 6))
             for piece, score in pieces]
  return [tuple(s) for s in special] + sorted(settled, key=lambda p: (-p[1], p[0]))
