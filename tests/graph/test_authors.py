"""The files of metapath2vec's authors."""

import pytest
from absl import logging

from core.config import UserError
from graph import authors

FILES = {
    'id_author.txt': '7\taJiawei Han\n3\taJos\u00e9\u0085X\n20\taJiaweiHan\r\n5\taEve\n',
    'id_conf.txt': '2\tvKDD\n1\tvVLDB\n',
    'paper.txt': '4\tOn \t\n9\tUnpublished\n',
    'paper_author.txt': '9\t7\n4\t3\n9\t20\n4\t20\n',
    'paper_conf.txt': '4\t1\n11\t2\n'}
LABELS = 'googlescholar.8area.{}.label.txt'


def write(folder, **changes):
  folder.mkdir(exist_ok=True)
  for name, text in {**FILES, **{f'{k}.txt': v for k, v in changes.items()}}.items():
    (folder / name).write_bytes(text.encode('iso-8859-1'))
  return folder


def edges(table):
  return {e.name: (e.source, e.target, ' '.join(
      f'{table.names[e.source][s]}>{table.names[e.target][t]}'
      for s, t in zip(e.sources, e.targets))) for e in table.edges}


def test_folder(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: said.append(text % values))
  table = authors.read(write(tmp_path))
  # Two of one name are one; the papers are those with an edge, in the order of their numbers.
  assert table.names == {'author': ['JiaweiHan', 'Jos\u00e9\u0085X', 'Eve'],
                         'paper': ['4', '9', '11'], 'venue': ['KDD', 'VLDB']}
  assert edges(table) == {
      'paper-author': ('paper', 'author',
                       '9>JiaweiHan 4>Jos\u00e9\u0085X 9>JiaweiHan 4>JiaweiHan'),
      'paper-venue': ('paper', 'venue', '4>VLDB 11>KDD')}
  assert all(e.weights is None for e in table.edges)
  assert not any(table.labels.values())
  assert len(said) == 1 and '1 of 4 names are there before' in said[0]


def test_letters_stay_unless_all_names_have_them(tmp_path):
  table = authors.read(write(tmp_path, id_author='7\taJ\n3\tanna\n20\tBo\n',
                             id_conf='1\tv\n2\tv x\n'))
  assert table.names['author'] == ['aJ', 'anna', 'Bo'] and table.names['venue'] == ['', 'x']


@pytest.mark.parametrize('place', ['net', '.', 'label'])
@pytest.mark.parametrize('letter', ['', 'a'])
def test_labels(tmp_path, monkeypatch, place, letter):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  folder = write(tmp_path / 'net')
  (tmp_path / 'label').mkdir()
  (tmp_path / place / LABELS.format('author')).write_bytes(
      f'{letter}Jos\u00e9\u0085X 3\n{letter}Eve 1\n{letter}Nobody 2\n'.encode('iso-8859-1'))
  (tmp_path / place / LABELS.format('venue')).write_text('VLDB 6\n')
  table = authors.read(folder)
  assert table.labels == {'author': {1: ['3'], 2: ['1']}, 'venue': {1: ['6']}}
  assert len(said) == 1 and said[0].endswith('1 of 3 names are not in the graph')


def test_a_letter_that_all_labelled_names_begin_with_by_chance(tmp_path):
  folder = write(tmp_path, id_author='7\tann\n3\tBo\n20\tal\n')
  (folder / LABELS.format('author')).write_text('ann 1\nal 2\n')
  assert authors.read(folder).labels['author'] == {0: ['1'], 2: ['2']}


@pytest.mark.parametrize('changes, words', [
    (dict(id_author='7\taX\n3 aY\n'), r"id_author\.txt:2: '3 aY' is not 'id name'"),
    (dict(id_author='7\taX\nx\taY\n'), r'id_author\.txt:2: .* is not'),
    (dict(id_author='7\taX\n3\taY\n7\taZ\n'), r'id_author\.txt:3: the id is there before'),
    (dict(id_conf=''), r'id_conf\.txt is empty'),
    (dict(paper_author='9\t7\n\n9\t3\n'), r"paper_author\.txt:2: '' is not two ids"),
    (dict(paper_author='9\t7\n9\n'), r'paper_author\.txt:2: not two ids with a tab'),
    (dict(paper_author='9\t7\n9\t8\n'), r'paper_author\.txt:2: the second id is not in the file'),
    (dict(paper_author='9\t7\n9\t21\n'), r'paper_author\.txt:2: the second id'),
    (dict(paper_conf='9\t1\n9\t-1\n'), r'paper_conf\.txt:2: an id is not a whole'),
    (dict(paper_conf='9\t1\n9\tx\n'), r'paper_conf\.txt:2: not two ids'),
    ({LABELS.format('venue')[:-4]: 'KDD 1\nVLDB\n'},
     r"venue\.label\.txt:2: 'VLDB' is not 'name label'")])
def test_files_that_are_wrong(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    authors.read(write(tmp_path, **changes))


@pytest.mark.parametrize('name', [name for name in FILES if name != 'paper.txt'])
def test_files_that_are_not_there(tmp_path, name):
  write(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(UserError, match=f'{name}: no such file'):
    authors.read(tmp_path)
