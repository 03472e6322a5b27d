"""Files of vectors: bytes by hand, exact numbers both ways, and what is wrong with damaged ones."""

import struct

import numpy as np
import pytest

from core.config import UserError
from graph import vectors

WRITERS = pytest.mark.parametrize('write', [vectors.write_text, vectors.write_binary])


def some(rows, dim, seed=0):
  """Of all magnitudes that float32 has, zeros and subnormal numbers too."""
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(rows, dim)) * 10. ** rng.integers(-42, 38, (rows, dim))
  values[rng.random((rows, dim)) < .1] = 0
  return values.astype(np.float32)


def names(rows):
  return [f'vÄ_字🙂%s{i}' for i in range(rows)]


@WRITERS
@pytest.mark.parametrize('rows, dim', [(1, 1), (7, 3), (9, 128), (10, 5)])
def test_what_is_written_is_read_to_the_bit(tmp_path, monkeypatch, write, rows, dim):
  """In blocks of three rows; tokens may be numpy's."""
  monkeypatch.setattr(vectors, '_ROWS', 3)
  want = some(rows, dim)
  write(tmp_path / 'a', np.array(names(rows), np.dtypes.StringDType()), want)
  tokens, got = vectors.read(tmp_path / 'a')
  assert tokens == names(rows) and got.dtype == np.float32
  np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_bytes_by_hand(tmp_path):
  values = np.float32([[1, -.5, .1], [2, 0, 3e-9]])
  vectors.write_text(tmp_path / 'a', ['vACL', 'aX'], values)
  assert (tmp_path / 'a').read_bytes() == (
      b'2 3\nvACL 1 -0.5 0.100000001\naX 2 0 3e-09\n'.replace(b'3e-09', b'%.9g' % values[1, 2]))
  vectors.write_binary(tmp_path / 'a', ['vACL', 'aX'], values)
  assert (tmp_path / 'a').read_bytes() == b'2 3\nvACL ' + struct.pack(
      '<3f', 1, -.5, .1) + b'\naX ' + struct.pack('<3f', 2, 0, 3e-9) + b'\n'


def test_what_other_programs_leave(tmp_path):
  """A space at the end of lines (word2vec.c), Windows' lines, no line break after a vector."""
  path = tmp_path / 'a'
  for text in b'2 2\n</s> 1.5 2.0 \nvX -3 4e-1 \n', b'2 2\r\n</s> 1.5 2.0\r\nvX -3 4e-1\r\n':
    path.write_bytes(text)
    tokens, got = vectors.read(path)
    assert tokens == ['</s>', 'vX']
    np.testing.assert_array_equal(got, np.float32([[1.5, 2], [-3, .4]]))
  path.write_bytes(b'2 2\nx ' + struct.pack('<2f', 1.5, 2) + b'yy ' + struct.pack('<2f', -3, .4))
  tokens, got = vectors.read(path)
  assert tokens == ['x', 'yy']
  np.testing.assert_array_equal(got, np.float32([[1.5, 2], [-3, .4]]))


@WRITERS
@pytest.mark.parametrize('token', ['two words', 'a\tb', 'a\n', '', '\xa0'])
def test_tokens_with_white_space_are_refused(tmp_path, write, token):
  with pytest.raises(UserError, match='white space'):
    write(tmp_path / 'a', ['fine', token], some(2, 3))
  assert not list(tmp_path.iterdir())


@WRITERS
def test_numbers_that_are_none_are_not_written(tmp_path, write):
  with pytest.raises(UserError, match="the vector of 'b' is not finite"):
    write(tmp_path / 'a', ['a', 'b'], np.float32([[1, 2], [3, np.nan]]))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text, match', [
    (b'', 'line 1: not .vocab dim.'),
    (b'a b\nx 1 2\n', 'line 1: not .vocab dim.'),
    (b'1 0\nx\n', 'line 1: not .vocab dim.'),
    (b'1 2', 'line 1: not .vocab dim.'),
    (b'999999999 999999\nx 1 2\n', 'line 1: 999999999 vectors of 999999 numbers are more than'),
    (b'2 2\nx 1.25 2.25\n', 'ends after line 2, with 1 of 2 vectors; it is cut short'),
    (b'2 2\nx 1 2\ny 3 4', 'line 3: ends within the line'),
    (b'2 2\nx 1 2\ny 3 4\nz 5 6\n', 'line 4: goes on after the 2 vectors'),
    (b'2 2\nx 1 2\ny 3\n', 'line 3: 1 numbers after the token, not 2'),
    (b'2 2\nx 1 2 3\ny 3\n', 'line 2: 3 numbers after the token, not 2'),
    (b'2 3\nx 1 2\ny 3 4\n', 'line 2: 2 numbers after the token, not 3'),
    (b'2 2\nx 1 2\n\ny 3 4\n', 'line 3: 0 numbers'),
    (b'2 2\nx 1 2\ny 3 4f\n', "line 3: '4f' is no number"),
    (b'2 2\nx 1 2\ny 3 0x4\n', "line 3: '0x4' is no number"),
    (b'2 2\nx 1 2\ny nan 4\n', "line 3: the vector of 'y' has a number that is not finite"),
    (b'2 2\nx 1 2\ny 3 1e99\n', "line 3: the vector of 'y' has a number that is not finite"),
    (b'2 2\nx 1 2\n\xff 3 4\n', 'line 3: not UTF-8'),
    (b'2 2\nx 1 2\nx 3 4\n', "line 3: 'x' is also in line 2")])
def test_damaged_text(tmp_path, text, match):
  (tmp_path / 'a').write_bytes(text)
  with pytest.raises(UserError, match=match) as e:
    vectors.read(tmp_path / 'a')
  assert str(tmp_path / 'a') in str(e.value) and '\n' not in str(e.value)


def test_the_line_is_right_in_later_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(vectors, '_ROWS', 3)
  vectors.write_text(tmp_path / 'a', names(8), some(8, 2))
  lines = (tmp_path / 'a').read_bytes().split(b'\n')
  lines[6] = b'x 1 -'
  (tmp_path / 'a').write_bytes(b'\n'.join(lines))
  with pytest.raises(UserError, match="line 7: '-' is no number"):
    vectors.read(tmp_path / 'a')


def test_damaged_binary(tmp_path):
  path = tmp_path / 'a'
  values = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
  vectors.write_binary(path, [f'token{i}' for i in range(9)], values)
  whole = path.read_bytes()
  size = len('token0 ') + 64 + 1

  def refused(data, match):
    path.write_bytes(data)
    with pytest.raises(UserError, match=match) as e:
      vectors.read(path)
    assert '\n' not in str(e.value)
  for cut in range(2, size + 2):  # The last line break may be missing, nothing else.
    refused(whole[:-cut], 'cut short' if cut < size else 'row 9 of 9: ends within it')
  refused(whole + b'token9 ', 'goes on after row 9')
  refused(whole.replace(b'9 16\n', b'8 16\n'), 'goes on after row 8')
  for dim in b'15', b'17':
    refused(whole.replace(b'9 16\n', b'9 ' + dim + b'\n'), 'row |cut short')
  refused(whole.replace(b'token4', b'token3'), "row 5: 'token3' is also in row 4")
  refused(whole.replace(b'token4', b'to\xffen4'), 'row 5: begins with no token')
  start = len('9 16\n') + 2 * size + len('token2 ')
  refused(whole[:start] + b'\0\0\xc0\x7f' + whole[start + 4:], "row 3: the vector of 'token2'")
  refused(whole[:20] + whole[40:], 'row |cut short|goes on')


def test_no_file(tmp_path):
  for path in tmp_path / 'none', tmp_path:
    with pytest.raises(UserError, match='cannot be read'):
      vectors.read(path)
