"""Lines of text files."""

import gzip

import pytest

from core.config import UserError
from core.data import text_files


@pytest.mark.parametrize('name, pack', [('a.txt', bytes), ('a.gz', gzip.compress)])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_lines(tmp_path, name, pack, end, mark):
  lines = ['\u00e9\u2028 \x85\t', '', ' \ufeffx\ry', 'last']  # Unicode's other ends of lines stay.
  for last in ('', end):
    (tmp_path / name).write_bytes(pack((mark + end.join(lines) + last).encode()))
    assert list(text_files.lines(tmp_path / name)) == list(enumerate(lines, 1))


PACKED = gzip.compress(b'relation\tsource\ttarget\n' * 3, mtime=0)


@pytest.mark.parametrize('name, content, words', [
    ('a', b'a\nb\t\xe9\n', r'a:2: byte 3 of the line, 0xe9, is not UTF-8; convert .* -t UTF-8$'),
    ('a', '1 2\n'.encode('utf-16-le'), r'a:1: a byte of value 0; is this a text file in UTF-8\?$'),
    ('none', b'', 'none: no such file'), ('.', None, r': cannot be read \(Is a directory'),
    *(('a.gz', damaged, r'a\.gz: not a gzip file, or one that is cut')
      for damaged in (b'relation\n', PACKED[:-9], PACKED[:15] + b'!' * 60))])
def test_what_is_no_text(tmp_path, name, content, words):
  if content:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=words):
    list(text_files.lines(tmp_path / name))
