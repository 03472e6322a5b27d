"""Splits, windows, questions and negatives, against the rules as they are written."""

import numpy as np
import pytest
import scipy.stats

from core.config import UserError
from recsys import sequences
from tests.recsys import tiny

# Every event is an item of its own, so that an item says which event it is.
LENGTHS = [1, 2, 3, 4, 9, 10, 11, 23]
ENDS = np.cumsum(LENGTHS)
HISTORIES = [list(range(end - n + 1, end + 1)) for n, end in zip(LENGTHS, ENDS)]
LOG = tiny.log(HISTORIES)


def held(validation, **more):
  return sequences.split(LOG, validation, **more)


def windows(split, lengths=(10,), step=3):
  made = sequences.Windows(split, lengths, step)
  return [made[i]['items'].tolist() for i in range(len(made))]


def authors(items, longest, step):
  """Windows as gen_data_fin.py cuts them."""
  if len(items) <= longest:
    return [items]
  begins = list(range(len(items) - longest, 0, -step))
  begins.append(0)
  return [items[begin:begin + longest] for begin in begins[::-1]]


def questions(split, name, count=5, seed=1):
  return sequences.Questions(split, name, sequences.Negatives(LOG.counts, count, seed))


# --- Who sees what -------------------------------------------------------------------------------


def known(split):
  return [history[:n] for history, n in zip(HISTORIES, split.known)]


def test_item_holds_out_the_last_two_of_everyone():
  split = held('item')
  assert known(split) == [*HISTORIES[:2], *(h[:-2] for h in HISTORIES[2:])]
  assert split.asked.tolist() == split.validation.tolist() == [2, 3, 4, 5, 6, 7]
  for user in split.asked:
    for name, gap in (('test', 1), ('validation', 2)):
      history, answer = split.question(name, user)
      assert (history.tolist(), answer) == (HISTORIES[user][:-gap], HISTORIES[user][-gap])


def test_none_holds_out_the_last_alone():
  split = held('none')
  assert known(split) == [*HISTORIES[:2], *(h[:-1] for h in HISTORIES[2:])]
  assert not len(split.validation) and split.asked.tolist() == [2, 3, 4, 5, 6, 7]


def test_users_holds_out_some_altogether():
  split = held('users', validation_users=2, seed=3)
  assert len(split.validation) == 2 and set(split.validation) < set(split.asked)
  assert split.asked.tolist() == [2, 3, 4, 5, 6, 7]
  for user, (history, seen) in enumerate(zip(HISTORIES, known(split))):
    if user in split.validation:
      assert not seen
    else:
      assert seen == (history if user < 2 else history[:-1])
  assert split.validation.tolist() == held('users', validation_users=2, seed=3).validation.tolist()
  others = {tuple(held('users', validation_users=2, seed=seed).validation) for seed in range(20)}
  assert len(others) > 5


@pytest.mark.parametrize('validation', sequences.VALIDATIONS)
def test_no_window_has_an_answer(validation):
  """Nor what follows one. With one item an event that is the same as no event being seen."""
  split = held(validation, validation_users=3)
  seen = {item for window in windows(split) for item in window}
  for user in split.asked:
    assert HISTORIES[user][-1] not in seen
  for user in split.validation:
    assert not seen & set(HISTORIES[user][-2 if validation == 'item' else 0:])
  # And nothing else is left out.
  assert seen == {item for part in known(split) for item in part}
  np.testing.assert_array_equal(np.flatnonzero(split.train_counts), sorted(seen))
  assert split.train_counts.max() == 1 and len(split.train_counts) == len(LOG.items) + 1


def test_users_of_one_or_two_events_are_trained_on_only_and_counted(caplog):
  with caplog.at_level('INFO'):
    split = held('item')
  assert '2 of 8 users have fewer than 3 events' in caplog.text
  assert HISTORIES[0] in windows(split) and HISTORIES[1] in windows(split)


@pytest.mark.parametrize('validation, more, log, words', [
    ('items', {}, LOG, "did you mean 'item'"),
    ('item', {}, tiny.log([[1, 2], [3]]), 'none of the 2 users has 3 events.*longest.* 2$'),
    ('users', {}, LOG, 'validation_users=0: of 6 users'),
    ('users', dict(validation_users=6), LOG, 'validation_users=6: of 6 users')])
def test_what_cannot_be_held_out(validation, more, log, words):
  with pytest.raises(UserError, match=words):
    sequences.split(log, validation, **more)


# --- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize('longest, step', [(10, 3), (10, 10), (10, 1), (4, 2), (22, 5), (1, 1)])
def test_windows_are_cut_as_the_authors_do(longest, step):
  split = held('none')
  want = [window for part in known(split) for window in authors(part, longest, step)]
  assert windows(split, (longest,), step) == want
  assert longest > 20 or any(len(authors(part, longest, step)) > 2 for part in known(split))


def test_every_window_is_of_the_shortest_batch_that_it_fits():
  made = sequences.Windows(held('none'), (2, 8, 10), 3)
  for i, bucket in enumerate(made.buckets):
    size = len(made[i]['items'])
    assert made[i]['bucket'] == bucket == (0 if size <= 2 else 1 if size <= 8 else 2)
  assert set(made.buckets) == {0, 1, 2}
  assert repr(made) == f'Windows({len(made)} of 8 users)'


# --- Questions and negatives ---------------------------------------------------------------------


def test_questions_have_history_answer_and_what_the_user_never_touched():
  split = held('item')
  for name, gap in (('test', 1), ('validation', 2)):
    asked = questions(split, name)
    assert len(asked) == 6 and asked.longest == 23 - gap
    for i, user in enumerate(split.asked):
      question = asked[i]
      assert question['history'].tolist() == HISTORIES[user][:-gap]
      assert question['answer'] == HISTORIES[user][-gap]
      candidates = question['candidates']
      assert candidates.shape == (5,) and candidates.dtype == np.int32
      assert len(set(candidates)) == 5 and candidates.min() >= 1
      # For validation the test's answer has been touched too, if later.
      assert not set(candidates) & set(HISTORIES[user])
  assert questions(held('none'), 'validation').longest < 2


# Items 1 to 20, of which the first is a hundred times as popular as the last.
COUNTS = np.append(0, 500 / np.arange(1, 21) ** 1.5).astype(np.int64)


def test_negatives_are_drawn_in_proportion_to_popularity():
  touched = np.int32([2, 5, 5, 11])
  first = [sequences.Negatives(COUNTS, 4, seed).draw(7, touched)[0] for seed in range(3000)]
  chance = COUNTS.astype(float)
  chance[touched] = 0
  chance /= chance.sum()
  found = np.bincount(first, minlength=21)
  assert not found[chance == 0].any()
  # Rare ones together, so that as many are expected of every kind as the test wants.
  pool = lambda x: np.append(x[[1, 3, 4, 6, 7, 8, 9, 10]], x[12:].sum())
  assert scipy.stats.chisquare(pool(found), 3000 * pool(chance)).pvalue > 1e-3
  # Then without replacement: the second is of the others, in proportion.
  second = [sequences.Negatives(COUNTS, 2, seed).draw(7, touched).tolist() for seed in range(1500)]
  after = np.bincount([b for a, b in second if a == 1], minlength=21)
  rest = np.where(np.arange(21) == 1, 0, chance)
  assert not after[1]
  assert scipy.stats.chisquare(pool(after)[1:], after.sum() * pool(rest / rest.sum())[1:]
                               ).pvalue > 1e-3


def test_items_that_occur_once_are_drawn_too():
  once = sequences.Negatives(np.int64([0, 1, 1, 1]), 1, 0)
  assert {int(once.draw(user, np.int32([]))[0]) for user in range(60)} == {1, 2, 3}


def test_negatives_are_the_users_own_whatever_else_is_drawn():
  touched = np.int32([1, 2])
  one, two = (sequences.Negatives(COUNTS, 6, 5) for _ in range(2))
  forward = [one.draw(user, touched).tolist() for user in range(8)]
  backward = [two.draw(user, touched).tolist() for user in range(7, -1, -1)]
  assert forward == backward[::-1] and len(set(map(tuple, forward))) == 8
  assert sequences.Negatives(COUNTS, 6, 6).draw(0, touched).tolist() != forward[0]


def test_as_many_negatives_as_are_left_and_no_more():
  touched = np.arange(1, 16, dtype=np.int32)
  assert sorted(sequences.Negatives(COUNTS, 5, 0).draw(0, touched)) == [16, 17, 18, 19, 20]
  with pytest.raises(UserError, match='config.eval.negatives=6, but user 3 left only 5'):
    sequences.Negatives(COUNTS, 6, 0).draw(3, touched)
