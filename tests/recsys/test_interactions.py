"""Files of interactions, and everything a user can get wrong with them."""

import datetime
import time

import ml_collections
import numpy as np
import pytest

from core.config import UserError
from recsys import interactions


def read(path, content=None, time_column='timestamp'):
  if content is not None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  return interactions.read(path, ml_collections.ConfigDict(
      dict(user='user_id', item='item_id', time=time_column)))


def rows(table):
  times = [None] * len(table.users) if table.times is None else table.times.tolist()
  return list(zip(table.users, table.items, times, strict=True))


def test_authors_text_has_no_header_and_no_times(tmp_path):
  table = read(tmp_path / 'beauty.txt', '7 3\n7 11\n2\t3 \r\n 10  5')
  assert rows(table) == [('7', '3', None), ('7', '11', None), ('2', '3', None), ('10', '5', None)]


@pytest.mark.parametrize('name, content', [
    ('a.inter', 'item_id:token\tuser_id:token\trating:float\ttimestamp:float\n'
     '242\t196\t3\t881250949\n302\t"b c\t4\t8.5\n'),
    ('a.tsv', 'item_id\tuser_id\trating\ttimestamp\n242\t196\t3\t881250949\n302\t"b c\t4\t8.5\n'),
    ('a.CSV', 'item_id,user_id,rating,timestamp\n242,196,"1,\n2",881250949\n302,"""b c",4,8.5\n')])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_headers_name_columns_in_any_order(tmp_path, name, content, end):
  content = content.replace('\n', end)
  assert rows(read(tmp_path / name, content)) == [('196', '242', 881250949.), ('"b c', '302', 8.5)]
  assert read(tmp_path / name, time_column='').times is None


def test_names_are_unicode_and_equal_ones_are_one_object(tmp_path):
  content = 'user_id\titem_id\n' + 'é\u2028 x\t영화\x85\n' * 2
  table = read(tmp_path / 'a.tsv', content, time_column='')
  assert rows(table) == [('é\u2028 x', '영화\x85', None)] * 2
  assert table.users[0] is table.users[1] and table.items[0] is table.items[1]


@pytest.fixture
def in_seoul(monkeypatch):
  """Where the program runs must not matter."""
  with monkeypatch.context() as context:
    context.setenv('TZ', 'Asia/Seoul')
    time.tzset()
    yield
  time.tzset()


def seconds(*when):
  return datetime.datetime(*when, tzinfo=datetime.timezone.utc).timestamp()


@pytest.mark.parametrize('texts, want', [
    (['881250949', '881250950'], [881250949, 881250950]),  # float32 cannot tell these apart.
    (['20140501', '1e3'], [20140501, 1000]),
    ([' -5', '.25'], [-5, .25]),
    (['2014-05-01', '1969-12-31'], [1398902400, -86400]),
    (['2014-05-01', '2014-05-01T18:30:00'], [1398902400, seconds(2014, 5, 1, 18, 30)]),
    (['2014-05-01 18:30:00.5', '2014-05-01T18:30:00+02:00', '2014-05-01T18:30Z'],
     [seconds(2014, 5, 1, 18, 30) + .5, seconds(2014, 5, 1, 16, 30), seconds(2014, 5, 1, 18, 30)])])
def test_times_are_seconds_or_iso(tmp_path, in_seoul, texts, want):
  times = read(tmp_path / 'a.csv', 'user_id,item_id,timestamp\n'
               + ''.join(f'1,2,{text}\n' for text in texts)).times
  assert times.dtype == np.float64 and times.tolist() == want


HEAD = 'user_id\titem_id\ttimestamp\n'


@pytest.mark.parametrize('name, content, message', [
    ('a.txt', '', 'a.txt is empty: it has no interactions$'),
    ('a.txt', '1 2\n3\n', r"a\.txt:2: 1 fields, not 'user item'"),
    ('a.txt', '1 2\n\n', r"a\.txt:2: 0 fields"),
    ('a.txt', '1 2 3\n', r"a\.txt:1: 3 fields"),
    ('a.txt', b'1 2\n1 \xfc\n', r'a\.txt:2: byte 3 of the line, 0xfc, is not UTF-8; .* iconv'),
    ('a.tsv', '', 'a.tsv has no header; a .tsv begins with one line of names'),
    ('a.csv', '\n1,2,3\n', 'a.csv has no header'),
    ('a.tsv', '\n1\t2\t3\n', 'a.tsv has no header'),
    ('a.tsv', HEAD, 'a.tsv is empty: it has no interactions below its header'),
    ('a.tsv', HEAD + '1\t2\t3\n1\t2\n', r'a\.tsv:3: 2 fields, not 3 as in its header'),
    ('a.tsv', HEAD + '1\t2\t3\n\n', r'a\.tsv:3: 1 fields'),
    ('a.tsv', HEAD + '\t2\t3\n', r'a\.tsv:2: the user is empty'),
    ('a.tsv', HEAD + '1\t\t3\n', r'a\.tsv:2: the item is empty'),
    ('a.csv', 'user_id,item_id,timestamp\n1,2,"3\n4"\n1,2\n', r'a\.csv:3: timestamp '
     r"'3\\n4' is not a time"),
    ('a.csv', 'user_id,item_id,timestamp\n1,"2\n2",3\n1,2\n', r'a\.csv:4: 2 fields'),
    ('a.csv', 'user_id,item_id,timestamp\n1,2,3\n1,"2,3\n', r'a\.csv:3: not comma-separated'),
    ('a.tsv', 'user_id,item_id,timestamp\n1,2,3\n',
     r"no column is called 'user_id' \(config\.data\.columns\.user\); it has user_id,item_id"),
    ('a.tsv', 'user_id\tmovie\ttimestamp\n', r"called 'item_id' .*columns\.item\); it has user_id, "
     'movie, timestamp'),
    ('a.tsv', 'user_id\titem_id\ttime\n', r"called 'timestamp' .*columns\.time"),
    ('a.csv', 'user_id,item_id,item_id,timestamp\n', "several columns are called 'item_id'"),
    ('a.inter', HEAD, "a.inter: 'user_id' in its header is not NAME:TYPE"),
    ('a.inter', 'user_id:token\titem_id:token\n', r'it has user_id, item_id$'),
])
def test_bad_files_say_what_is_right(tmp_path, name, content, message):
  with pytest.raises(UserError, match=message) as error:
    read(tmp_path / name, content)
  assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('texts, message', [
    (['1', 'x'], r"a\.tsv:3: timestamp 'x' is not a time; write seconds such as 881250949"),
    (['', '1'], r"a\.tsv:2: timestamp '' is not a time"),
    (['nan'], r"a\.tsv:2: timestamp 'nan' is not a time"),
    (['1', '-inf'], r"a\.tsv:3: timestamp '-inf'"),
    (['1', '1e999'], r"a\.tsv:3: timestamp '1e999'"),
    (['1_000'], r"a\.tsv:2: timestamp '1_000'"),
    (['05/01/2014'], 'or, in every line, ISO dates such as 2014-05-01'),
    (['2014-05-31', '2014-05-32'], r"a\.tsv:3: timestamp '2014-05-32' is not an ISO date"),
    (['2014-05-31', '881250949'], r"'881250949' is not an ISO date .* as the first in its column"),
    (['881250949', '2014-05-31'], r"'2014-05-31' is not a time")])
def test_bad_times_name_line_and_value(tmp_path, texts, message):
  with pytest.raises(UserError, match=message):
    read(tmp_path / 'a.tsv', HEAD + ''.join(f'1\t2\t{text}\n' for text in texts))


def test_no_file_a_folder_and_other_endings(tmp_path):
  with pytest.raises(UserError, match=r'nowhere\.tsv: no such file; .*\.txt, \.inter, \.tsv'):
    read(tmp_path / 'nowhere.tsv')
  (tmp_path / 'folder.tsv').mkdir()
  with pytest.raises(UserError, match=r'folder\.tsv: a folder; .* one file'):
    read(tmp_path / 'folder.tsv')
  with pytest.raises(UserError, match=r'a\.json: a file of interactions ends with \.txt, \.inter'):
    read(tmp_path / 'a.json', '{}')


def test_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('1 2\n')
  assert rows(read('~/a.txt')) == [('1', '2', None)]
