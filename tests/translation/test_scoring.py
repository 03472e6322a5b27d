"""Scores: beside sacrebleu called directly, and on cases counted by hand."""

import math
import sys

import pytest
import sacrebleu

from core.config import UserError
from translation import scoring

OURS = ['Der Hund läuft über die Straße.', 'Ein Kind spielt im Garten mit dem Ball.', 'Zwei Katzen']
THEIRS = ['Der Hund rennt über die Straße.', 'Ein Kind spielt im Garten mit einem Ball.',
          'Zwei Katzen schlafen']


def bleu_by_hand(matches, totals, ours, theirs):
  """n-gram matches and totals of n = 1 to 4, and words, to BLEU without smoothing."""
  precision = math.exp(sum(math.log(m / t) for m, t in zip(matches, totals)) / 4)
  return 100 * precision * min(1., math.exp(1 - theirs / ours))


def test_bleu_is_what_papers_define():
  """Six words against six, one of them wrong: 5/6, 3/5, 2/4 and 1/3 of the n-grams are right."""
  values, _ = scoring.score(['the cat sat on the mat'], ['the cat sat on a mat'])
  assert values['bleu'] == pytest.approx(bleu_by_hand([5, 3, 2, 1], [6, 5, 4, 3], 6, 6))
  assert values['bleu'] == pytest.approx(53.7285, abs=1e-3)
  # Half as long as the reference: every n-gram is right, and the brevity penalty is exp(1 - 2).
  values, _ = scoring.score(['a b c d e'], ['a b c d e f g h i j'])
  assert values['bleu'] == pytest.approx(100 * math.exp(-1)) and values['length_ratio'] == .5


def test_scores_are_sacrebleu_s_and_of_the_corpus():
  values, signatures = scoring.score(OURS, THEIRS)
  bleu = sacrebleu.corpus_bleu(OURS, [THEIRS])
  assert values['bleu'] == pytest.approx(bleu.score) and 40 < bleu.score < 70
  assert values['chrf'] == pytest.approx(sacrebleu.corpus_chrf(OURS, [THEIRS]).score)
  assert values['length_ratio'] == pytest.approx(18 / 19)  # The full stops are words.
  # What makes a number comparable with other people's.
  for part in ('nrefs:1', 'case:mixed', 'tok:13a', 'smooth:exp',
               f'version:{sacrebleu.__version__}'):
    assert part in signatures['bleu'], signatures
  assert 'nc:6' in signatures['chrf'] and 'nw:0' in signatures['chrf']
  # And this one cannot be taken for the others.
  for part in ('tok:none', 'smooth:none', 'compounds split'):
    assert part in signatures['tokenised_bleu'], signatures


def test_everything_right_is_100():
  values, _ = scoring.score(THEIRS, THEIRS)
  assert values == pytest.approx({'bleu': 100, 'chrf': 100, 'tokenised_bleu': 100, 'exact_match': 1,
                                  'length_ratio': 1})


def test_case_counts():
  lower, _ = scoring.score([text.lower() for text in THEIRS], THEIRS)
  assert lower['bleu'] < 60 and lower['exact_match'] == 0


def test_exact_match_ignores_only_the_spaces_around():
  values, _ = scoring.score(['zwei ', 'drei', 'vier,fünf', ''], ['zwei', 'Drei', 'vier, fünf', 'x'])
  assert values['exact_match'] == 1 / 4


@pytest.mark.parametrize('text, want', [
    ('rich-text format', 'rich ##AT##-##AT## text format'),
    ('state-of-the-art', 'state ##AT##-##AT## of ##AT##-##AT## the ##AT##-##AT## art'),
    ('E-Mails , Ski- und Rad-Touren', 'E ##AT##-##AT## Mails , Ski- und Rad ##AT##-##AT## Touren'),
    ('a - b', 'a - b'), ('minus -5', 'minus -5'), ('', '')])
def test_compounds_are_split_as_the_authors_did(text, want):
  assert scoring.split_compounds(text) == want


def test_split_compounds_score_higher():
  """Four words of five are right, or six of seven when the compound is three."""
  values, _ = scoring.score(['the rich-text format was old'], ['the rich-text format is old'])
  assert values['tokenised_bleu'] == pytest.approx(
      bleu_by_hand([6, 4, 3, 2], [7, 6, 5, 4], 7, 7)) == pytest.approx(64.3463, abs=1e-3)
  assert values['bleu'] < 50
  # It is the tokens that are counted: a full stop without a space is one.
  one, _ = scoring.score(['a b c d.'], ['a b c d .'])
  assert one['tokenised_bleu'] == pytest.approx(100)
  # Nothing is smoothed: one word of four in order is no 4-gram.
  assert scoring.score(['a b x c'], ['a b c d'])[0]['tokenised_bleu'] == 0


def test_empty_translations_are_worth_nothing():
  values, _ = scoring.score(['', ''], ['ein Haus', 'zwei'])
  assert values == dict.fromkeys(values, 0) and len(values) == 5
  half, _ = scoring.score([THEIRS[0], ''], THEIRS[:2])
  # The seven tokens that are there are right, and so the penalty for the nine missing is all.
  assert half['bleu'] == pytest.approx(100 * math.exp(1 - 16 / 7)) and half['exact_match'] == .5


def test_groups_by_source_words():
  sources = ['a', 'a b c d e', 'a b c d e f', 'a b  c d e f g h i j', ' '.join('abcdefghijklmnop'),
             '']
  theirs = ['w x y z', 'a b c d', 'i j k l', 'm n o p', 'q r s t', 'u v w x']
  ours = ['w x y z', 'a b c e', 'i j k l', 'm n o p q', '', 'u v w x']
  groups = scoring.by_length(sources, ours, theirs)
  assert [(g['from'], g['to'], g['sentences']) for g in groups] == [
      (1, 5, 3), (6, 10, 2), (16, 20, 1)]
  assert [g['exact_match'] for g in groups] == pytest.approx([2 / 3, 1 / 2, 0])
  # 11 of 12 words, 8 of 9 pairs, 5 of 6 triples and 2 of 3 fours; then one word too many.
  assert [g['bleu'] for g in groups] == pytest.approx(
      [bleu_by_hand([11, 8, 5, 2], [12, 9, 6, 3], 12, 12),
       bleu_by_hand([8, 6, 4, 2], [9, 7, 5, 3], 9, 8), 0])


def test_scores_need_sacrebleu(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
  for call in (lambda: scoring.score(['a'], ['a']), lambda: scoring.by_length(['a'], ['a'], ['a'])):
    with pytest.raises(UserError, match=r'sacrebleu.*\[translation\]'):
      call()
