"""Recommendations from files, against scores that are computed a user at a time."""

import functools
import json

import jax
import numpy as np
import pytest

from core.config import UserError
from recsys import pictures, predict
from tests.recsys import tiny

# Users' histories in order of time; the model reads 6 items and a mask.
USERS = {'ann': [3, 1, 4], 'bob': [5, 9, 2, 6, 5, 3, 8, 10, 7, 1], 'cy': [11], 'dee': [2, 4, 6, 8],
         'eve': [7, 7, 7]}


def task_of(**changes):
  return tiny.task_of([np.arange(1, tiny.ITEMS + 1)], **{**dict(
      model__length=tiny.LENGTH, model__width=tiny.WIDTH, model__depth=tiny.DEPTH,
      model__heads=tiny.HEADS, eval__batch_size=2, eval__top=4), **changes})


def write(path, users=USERS, header='user_id,item_id,timestamp\n', mixed=True):
  """Users in turn, and of each the last event first: times say how it was."""
  events = [(user, item, time) for user, items in users.items() for time, item in enumerate(items)]
  if mixed:
    events.sort(key=lambda event: -event[2])
  comma = ',' if path.suffix == '.csv' else '\t'
  path.write_text(header + ''.join(
      comma.join((user, f'item {item}', str(1e9 + time))) + '\n' for user, item, time in events))
  return path


def assert_best(records, task, params, users, top):
  """Holds records against the scores of each user alone, sorted in Python."""
  scores_of = jax.jit(task.scores)
  for record in records:
    history = users[record['user']]
    items, slot = task.question(np.array(history, np.int32))
    scores = np.asarray(scores_of(params, items[None], slot[None]))[0]
    left = [item for item in range(1, tiny.ITEMS + 1) if item not in history]
    want = sorted(left, key=lambda item: -scores[item])[:top]
    assert [found['item'] for found in record['items']] == [f'item {item}' for item in want]
    np.testing.assert_allclose([found['score'] for found in record['items']], scores[want],
                               atol=2e-5)


@pytest.fixture
def undrawn(monkeypatch):
  monkeypatch.setattr(pictures, 'heads', lambda *args: None)


@pytest.mark.parametrize('kind, padding, mib, rows_multiple', [
    ('bert4rec', 'right', 256, 1), ('sasrec', 'left', 0, 8)])
def test_the_best_of_what_is_not_in_the_history(tmp_path, monkeypatch, undrawn, kind, padding,
                                                mib, rows_multiple):
  """In batches of two, with one compilation; special rows have the highest scores."""
  task = task_of(model__kind=kind, model__padding=padding, model__logits_mib=mib,
                 model__rows_multiple=rows_multiple)
  params = tiny.params(task.model)
  params['output_bias'][[0, *range(tiny.ITEMS + 1, task.rows)]] = 99
  shapes, scores = [], task.scores
  monkeypatch.setattr(task, 'scores', lambda params, items, slot: (
      shapes.append(items.shape), scores(params, items, slot))[1])
  records = predict.predict(task, params, write(tmp_path / 'a.csv'), tmp_path)
  assert shapes == [(2 if mib else 1, tiny.LENGTH)]
  assert [(r['user'], r['history']) for r in records] == [
      ('bob', 10), ('dee', 4), ('ann', 3), ('eve', 3), ('cy', 1)]
  assert_best(records, task, params, USERS, 4)
  json.dumps(records)
  assert len(records[0]['items']) == 2  # Nine different ones of eleven are in the history.


def test_more_than_there_is(tmp_path, undrawn):
  task = task_of(eval__top=100, eval__batch_size=0)
  params = tiny.params(task.model)
  users = {**USERS, 'fay': list(range(1, 12))}
  records = predict.predict(task, params, write(tmp_path / 'a.csv', users), tmp_path)
  found = {record['user']: len(record['items']) for record in records}
  assert found == {'ann': 8, 'bob': 2, 'cy': 10, 'dee': 7, 'eve': 10, 'fay': 0}
  assert_best(records, task, params, users, 100)


def test_equal_times_keep_the_order_of_the_file(tmp_path):
  path = tmp_path / 'a.tsv'
  path.write_text('item_id\tuser_id\ttimestamp\nitem 3\ta\t5\nitem 9\tb\t1\nitem 1\ta\t5\n'
                  'item 4\ta\t2\nitem 2\ta\t5\n')
  found = predict._histories(task_of(), path)
  assert {user: items.tolist() for user, items in found.items()} == {'a': [4, 3, 1, 2], 'b': [9]}
  assert list(found) == ['a', 'b'] and found['a'].dtype == np.int32


@pytest.mark.parametrize('name, header', [
    ('a.csv', 'user_id,item_id,"time, of day"\n'),
    ('a.inter', 'user_id:token\titem_id:token\tat:f\n'),
    ('a.tsv', '\ufeffuser_id\titem_id\tmytimestamp\n')])
def test_without_a_time_the_order_of_the_file_counts(tmp_path, caplog, name, header):
  path = write(tmp_path / name, {'a': [3, 1, 4], 'b': [9, 2]}, header, mixed=True)
  with caplog.at_level('WARNING'):
    found = predict._histories(task_of(), path)
  assert {user: items.tolist() for user, items in found.items()} == {'a': [4, 1, 3], 'b': [2, 9]}
  assert "no column 'timestamp' (config.data.columns.time): its order" in caplog.text


@pytest.mark.parametrize('header', ['user_id,item_id,timestamp\n', 'user_id,item_id,"timestamp"\n'])
def test_with_a_time_its_errors_are_errors(tmp_path, caplog, header):
  path = write(tmp_path / 'a.csv', {'a': [3, 1]}, header)
  path.write_text(path.read_text() + 'a,item 4,yesterday\n')
  with pytest.raises(UserError, match="a.csv:4: timestamp 'yesterday' is not"):
    predict._histories(task_of(), path)
  assert not caplog.text


def test_the_authors_files_need_no_time(tmp_path, caplog):
  task = task_of()
  object.__setattr__(task.log, 'items', np.array([str(i) for i in range(101, 112)]))
  (tmp_path / 'a.txt').write_text('7 103\n7 101\n9 111\n7 102\n')
  found = predict._histories(task, tmp_path / 'a.txt')
  assert {user: items.tolist() for user, items in found.items()} == {'7': [3, 1, 2], '9': [11]}
  assert not caplog.text


def test_unknown_items_are_named(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('user_id,item_id\n' + ''.join(
      f'a,{item}\n' for item in ('item 1', 'x', 'y', 'x', 'z', 'item 12', 'x')))
  with pytest.raises(UserError, match=r"a.csv: 4 of its items are not among the 11 that the model "
                     r"knows: 'x', 'y', 'z' ...; leave"):
    predict.predict(task_of(), {}, path, tmp_path)
  with pytest.raises(UserError, match='none.csv'):
    predict.predict(task_of(), {}, tmp_path / 'none.csv', tmp_path)
  with pytest.raises(UserError, match='ends with'):
    predict.predict(task_of(), {}, tmp_path, tmp_path)


@pytest.mark.parametrize('kind, padding', [('bert4rec', 'left'), ('sasrec', 'right')])
def test_the_first_eight_are_drawn(tmp_path, monkeypatch, kind, padding):
  task = task_of(model__kind=kind, model__padding=padding)
  params = tiny.params(task.model)
  users = {**{f'u{i}': [i, i + 1] for i in range(1, 6)}, **USERS}
  calls, heads = [], pictures.heads
  monkeypatch.setattr(pictures, 'heads', lambda *args: calls.append(args) or (
      heads(*args) if not calls[1:] else args[2].touch()))
  out = tmp_path / 'out'
  out.mkdir()
  records = predict.predict(task, params, write(tmp_path / 'a.csv', users, mixed=False), out)
  assert [record.get('picture') for record in records] == [
      *(f'attention_{i}.png' for i in range(1, 9)), None, None]
  assert sorted(path.name for path in out.iterdir()) == [
      record['picture'] for record in records[:8]]
  look = jax.jit(functools.partial(pictures.attention_of, task))
  for record, (weights, labels, path, title) in zip(records[:8], calls, strict=True):
    history = users[record['user']]
    kept = [f'item {i}' for i in history]
    assert labels == ([*kept[-6:], '[mask]'] if kind == 'bert4rec' else kept[-7:])
    items, _ = task.question(np.array(history, np.int32))
    at = np.flatnonzero(items)
    alone = np.asarray(look(params, items[None]))[:, 0]
    np.testing.assert_allclose(weights, alone[:, :, at][..., at], atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert path == out / record['picture'] and record['user'] in title
  assert (out / 'attention_1.png').read_bytes().startswith(b'\x89PNG')
