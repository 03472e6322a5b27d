"""How good translations are: perplexity, BLEU, chrF, exact matches, and these by source length."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from core.config import UserError
from core.evaluate import EvalRun, Mean
from translation import pictures

# Source words of the groups that quality is shown for: 1 to 5, 6 to 10, ...
_GROUP = 5


class Perplexity(Mean):
  """`Mean`, and 'perplexity' a token of the vocabulary: exp of the mean negative log-likelihood."""

  def __call__(self, run, params, step):
    found = super().__call__(run, params, step)
    if not found:  # All sentences are too long.
      return {}
    return {**found, 'perplexity': float(np.exp(min(found['nll'], 700.0)))}


class Translated:
  """Translates a split and scores it; leaves translations, scores by length, and pictures.

  Metrics: 'bleu' and 'chrf' (sacrebleu; the signatures are in the .json and in the log),
  'tokenised_bleu', 'exact_match' (share), 'length_ratio' (of words, to the references'),
  'too_long': sentences beyond `config.data.buckets`, which count as translated by nothing.
  """

  def __init__(self, split: str, every: str):
    self.split, self.every = split, every

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    task = run.plan.task
    pairs, source = task.pairs(self.split), task.dataset(self.split)
    tokens: dict[int, np.ndarray] = {}
    for rows in run.map(task.translate_batch, params, self.split):
      for index, found in zip(rows['index'], rows['tokens']):
        tokens[int(source[int(index)]['pair'])] = found
    sources = [pairs[i]['source'] for i in range(len(pairs))]
    references = [pairs[i]['target'] for i in range(len(pairs))]
    decoded = task.vocabularies['target'].decode
    translations = [decoded(tokens[i]) if i in tokens else '' for i in range(len(pairs))]
    values, signatures = score(translations, references)
    values['too_long'] = float(len(source.left_out))
    groups = by_length(sources, translations, references)
    if run.writes:
      self._write(run, step, translations, values, signatures, groups)
      self._draw(run, params, tokens, groups)
    return values

  def _write(self, run, step, translations, values, signatures, groups):
    folder = run.workdir / 'translations'
    folder.mkdir(exist_ok=True)
    (folder / f'{self.split}.txt').write_text(''.join(f'{t}\n' for t in translations),
                                              encoding='utf-8')
    record = {'step': step, **values, 'signatures': signatures, 'by_source_words': groups}
    (folder / f'{self.split}.json').write_text(json.dumps(record, indent=2) + '\n')
    for name, signature in signatures.items():
      logging.info('%s %s: %.2f  %s', self.split, name, values[name], signature)

  def _draw(self, run, params, tokens, groups):
    task = run.plan.task
    pictures.by_length(run.pictures / f'{self.split}_by_length.png', groups)
    # One process of several cannot run on arrays that are spread over all of them.
    if not task.has_attention or not tokens or jax.process_count() > 1:
      return
    source = task.dataset(self.split)
    for index in np.unique(np.linspace(0, len(source) - 1, 3).astype(int)):
      example = source[int(index)]
      task.draw_alignment(
          params, example['source'][example['source'] != 0],
          tokens[int(example['pair'])], run.pictures / f'{self.split}_alignment_{index}.png')


def score(translations: Sequence[str], references: Sequence[str],
          ) -> tuple[dict[str, float], dict[str, str]]:
  """Scores of a corpus, and what sacrebleu says about how they were computed.

  Args:
    translations: as a reader would see them.
    references: one each.

  Returns:
    'bleu', 'chrf', 'tokenised_bleu' (0 to 100), 'exact_match' (0 to 1), 'length_ratio'; and the
    signatures of the first three. 'tokenised_bleu' is what the paper's authors counted: no
    smoothing, and compounds split at their hyphens, here after mteval's tokenizer; it is higher
    than 'bleu' and must not be compared with it.

  Raises:
    UserError: sacrebleu is not installed.
  """
  bleu, chrf, tokenised = _metrics()
  found = bleu.corpus_score(translations, [references])
  split = lambda texts: [split_compounds(_tokenize_13a(text)) for text in texts]
  values = {
      'bleu': found.score,
      'chrf': chrf.corpus_score(translations, [references]).score,
      'tokenised_bleu': tokenised.corpus_score(split(translations), [split(references)]).score,
      'exact_match': float(np.mean([t.strip() == r.strip()
                                    for t, r in zip(translations, references, strict=True)])),
      'length_ratio': found.sys_len / max(found.ref_len, 1)}
  return values, {'bleu': str(bleu.get_signature()), 'chrf': str(chrf.get_signature()),
                  'tokenised_bleu': f'{tokenised.get_signature()}|13a, compounds split'}


def _metrics():
  try:
    from sacrebleu.metrics import BLEU, CHRF
  except ImportError as e:
    raise UserError("scores need sacrebleu: pip install -e '.[translation]'") from e
  return BLEU(), CHRF(), BLEU(tokenize='none', smooth_method='none', force=True)


def _tokenize_13a(text: str) -> str:
  from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
  return Tokenizer13a()(text)


def split_compounds(text: str) -> str:
  """'rich-text' -> 'rich ##AT##-##AT## text', as the paper's authors scored German."""
  return re.sub(r'(?<=\S)-(?=\S)', ' ##AT##-##AT## ', text)


def by_length(sources: Sequence[str], translations: Sequence[str],
              references: Sequence[str]) -> list[dict[str, Any]]:
  """Quality by the number of source words: BLEU and exact matches of every group of lengths."""
  bleu, _, _ = _metrics()
  groups: dict[int, list[int]] = {}
  for i, text in enumerate(sources):
    groups.setdefault((max(len(text.split()), 1) - 1) // _GROUP, []).append(i)
  found = []
  for number, members in sorted(groups.items()):
    ours, theirs = [translations[i] for i in members], [references[i] for i in members]
    found.append({
        'from': number * _GROUP + 1, 'to': (number + 1) * _GROUP, 'sentences': len(members),
        'bleu': bleu.corpus_score(ours, [theirs]).score,
        'exact_match': float(np.mean([o.strip() == t.strip() for o, t in zip(ours, theirs)]))})
  return found
