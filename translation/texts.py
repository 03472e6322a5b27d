"""The text of a run: its vocabularies, and its splits as token ids. What `prepare` leaves."""

import functools
import pathlib

import ml_collections
from absl import logging

from core.config import UserError
from translation import corpus, pairs, vocabulary

# No sentence is kept in more tokens than this; the lengths that a model takes are shorter.
_LIMIT = 4096


class Texts:
  """Vocabularies and splits in a workdir.

  `vocabulary.json` is that of the target, and of the source too unless the source has its own,
  `vocabulary.source.json`. `encoded/SPLIT` are folders of `corpus`.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path | None):
    self._config, self._workdir = config, workdir

  @property
  def _sides(self) -> tuple[str, ...]:
    """The sides that have a vocabulary of their own: the target's may serve both."""
    return ('target', 'source') if self._config.data.vocab.source_size else ('target',)

  def _vocabulary_file(self, side: str) -> pathlib.Path:
    if self._workdir is None:
      raise UserError('text needs the vocabulary of a run: give its --workdir')
    return self._workdir / ('vocabulary.json' if side == 'target' else 'vocabulary.source.json')

  @functools.cached_property
  def vocabularies(self) -> dict[str, vocabulary.Vocabulary]:
    """'source' and 'target', the same object when it is shared."""
    found = {}
    for side in self._sides:
      path = self._vocabulary_file(side)
      if not path.exists():
        raise UserError(f'{path} is not there; make it with --mode=prepare, or name a vocabulary '
                        'in config.data.vocab.path')
      found[side] = self._load_vocabulary(path, side)
    return {'source': found['target'], **found}

  def _load_vocabulary(self, path: pathlib.Path, side: str) -> vocabulary.Vocabulary:
    settings = self._config.data.vocab
    key = 'size' if side == 'target' else 'source_size'
    found = vocabulary.load(path)
    if len(found) > settings[key]:
      raise UserError(f'{path} has {len(found):,} entries, the model has config.data.vocab.{key}='
                      f'{settings[key]:,}: it is the vocabulary of another model')
    return found

  def prepare(self):
    """Leaves the vocabulary, and the text of every split as token ids.

    The vocabulary is the one named, that of the workdir `init_from`, or learned from the training
    pairs. Where the training pairs cannot be opened nothing is encoded: translating needs none.
    """
    for side in self._sides:
      self._prepare_vocabulary(side)
    splits = self._config.data.splits
    try:
      self.pairs(splits.train)
    except UserError as e:
      logging.warning('no text is encoded: %s', e)
      return
    for split in dict.fromkeys((splits.train, splits.validation, splits.test, *splits.extra)):
      if split:
        self._encode(split, self.pairs(split))

  def _prepare_vocabulary(self, side: str) -> None:
    config, path = self._config, self._vocabulary_file(side)
    named = config.data.vocab.path if side == 'target' else config.data.vocab.source_path
    if not named and config.init_from:
      start = pathlib.Path(config.init_from)
      named = (start if start.is_dir() else start.parent) / path.name
      if not named.exists():
        raise UserError(f'config.init_from={config.init_from!r} comes without its vocabulary '
                        f'{path.name}; name it in config.data.vocab.path')
    given = self._load_vocabulary(pathlib.Path(named), side) if named else None
    if path.exists():
      if given and given.fingerprint != self._load_vocabulary(path, side).fingerprint:
        raise UserError(f'{path} is another vocabulary than {named}; use another --workdir')
      return
    if given is None:
      size = config.data.vocab['size' if side == 'target' else 'source_size']
      used = ('source', 'target') if len(self._sides) == 1 else (side,)
      found = pairs.open_pairs(config.data, config.data.splits.train)
      logging.info('learning a vocabulary (%s, %d entries) from %d pairs', config.data.vocab.kind,
                   size, len(found))
      texts = (pair[name] for pair in map(found.__getitem__, range(len(found))) for name in used)
      given = vocabulary.train(texts, config.data.vocab.kind, size)
    given.save(path)

  def save_vocabularies(self, folder: pathlib.Path) -> None:
    """Writes them under the names that `init_from` looks for."""
    for side in self._sides:
      self.vocabularies[side].save(folder / self._vocabulary_file(side).name)

  def _encoded_path(self, split: str) -> pathlib.Path:
    return self._vocabulary_file('target').parent / 'encoded' / split.translate(
        str.maketrans('[:%]', '____'))

  def _encode(self, split: str, found: pairs.Pairs) -> None:
    """Encodes a split unless that was done; refuses another text under the same name."""
    path, both = self._encoded_path(split), self.vocabularies
    if not path.exists():
      corpus.encode(found, both['source'], both['target'], path, _LIMIT)
      return
    about = corpus.open_encoded(path).about
    if about != corpus.about(found, both['source'], both['target'], _LIMIT):
      raise UserError(f'{path} was made of other text, or with another vocabulary, than {found!r}; '
                      'use another --workdir')

  @functools.cache
  def pairs(self, split: str) -> pairs.Pairs:
    """The text of a split, as it was written."""
    return pairs.open_pairs(self._config.data, split)

  @functools.cache
  def encoded(self, split: str) -> corpus.Encoded:
    """The ids of a split, which are made when they are not there yet."""
    path = self._encoded_path(split)
    if not path.exists():
      self._encode(split, self.pairs(split))
    return corpus.open_encoded(path)
