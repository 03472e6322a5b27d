"""Pairs of sentences, and everything a user can get wrong with their files."""

import concurrent.futures
import pickle

import ml_collections
import pytest
import tensorflow_datasets as tfds

from core.config import UserError
from translation import pairs

LINES = [(f'source {i} ä', f'타겟 {i}') for i in range(1, 101)]


class TinyTranslation(tfds.core.GeneratorBasedBuilder):
  """Three pairs, in the form that WMT has in tfds."""

  VERSION = tfds.core.Version('1.0.0')
  url_infos = None  # No downloads; see `core.data.datasets.digits`.

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=(
        tfds.features.Translation(languages=('de', 'en'))))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, (en, de) in enumerate([('one', 'eins'), ('five', 'fünf'), ('ten', 'zehn')]):
      yield i, {'en': en, 'de': de}


def opened(name, split='train', data_dir=None, source='en', target='de'):
  return pairs.open_pairs(ml_collections.ConfigDict(
      {'name': name, 'data_dir': data_dir, 'source': source, 'target': target}), split)


def listed(found):
  return [(found[i]['source'], found[i]['target']) for i in range(len(found))]


def write(path, lines, end='\n'):
  path.write_bytes(end.join('\t'.join(line) for line in lines).encode())
  return path


def test_pattern_and_folder(tmp_path):
  write(tmp_path / 'en-ko.train.tsv', LINES)
  write(tmp_path / 'en-ko.val.tsv', LINES[:7])
  write(tmp_path / 'test.tsv', LINES[:3])
  pattern = f'tsv:{tmp_path}/en-ko.{{split}}.tsv'
  assert listed(opened(pattern)) == LINES
  assert listed(opened(pattern, 'val')) == listed(opened(pattern, 'validation')) == LINES[:7]
  assert listed(opened(f'tsv:{tmp_path}', 'test')) == LINES[:3]
  with pytest.raises(UserError, match=r"split 'dev' of .* does not exist; there is train, val$"):
    opened(pattern, 'dev')
  with pytest.raises(UserError, match='there is en-ko.train, en-ko.val, test$'):
    opened(f'tsv:{tmp_path}', 'dev')
  with pytest.raises(UserError, match='no such file in'):
    opened(f'tsv:{tmp_path}/nowhere/{{split}}.tsv')


def test_one_file_is_split_by_line_number(tmp_path):
  name = f'tsv:{write(tmp_path / "all.tsv", LINES)}'
  # Line numbers count from 1.
  assert listed(opened(name, 'validation')) == [LINES[n - 1] for n in (10, 30, 50, 70, 90)]
  assert listed(opened(name, 'test')) == [LINES[n - 1] for n in (20, 40, 60, 80, 100)]
  train = listed(opened(name))
  assert train == [line for n, line in enumerate(LINES, 1) if n % 10]
  with pytest.raises(UserError, match="split 'val2' .*train, validation and test"):
    opened(name, 'val2')


@pytest.mark.parametrize('text, chosen', [
    ('train[:20]', slice(0, 20)), ('train[90%:]', slice(90, 100)), ('train[-3:]', slice(97, 100)),
    ('train[25%:50%]', slice(25, 50)), ('train[:-95]', slice(0, 5)), ('train[:]', slice(0, 100)),
    ('train[:1000]', slice(0, 100))])
def test_slices(tmp_path, text, chosen):
  write(tmp_path / 'train.tsv', LINES)
  assert listed(opened(f'tsv:{tmp_path}', text)) == LINES[chosen]


@pytest.mark.parametrize('text, message', [
    ('train[50:50]', 'is empty; train has 100 pairs'), ('train[x:]', r'train\[:2000\]'),
    ('train+test', 'there is train'), ('', 'write a name')])
def test_bad_slices(tmp_path, text, message):
  write(tmp_path / 'train.tsv', LINES)
  with pytest.raises(UserError, match=message):
    opened(f'tsv:{tmp_path}', text)


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('final', [True, False])
def test_line_ends_byte_order_mark_and_odd_spaces(tmp_path, end, final):
  lines = [('a\u2028b', 'c\x85d'), ('\u00a0x', '“y”'), ('\u3042', 'z ')]
  path = write(tmp_path / 'train.tsv', lines, end)
  path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes() + (end.encode() if final else b''))
  assert listed(opened(f'tsv:{tmp_path}')) == lines


GOOD = b'a\tb\n'


@pytest.mark.parametrize('content, message', [
    (GOOD * 2 + b'x\ty\tz\n' + GOOD + b'q\n', r':3: 3 columns .* 1 more such'),
    (GOOD + b'\n' + GOOD, ':2: 1 columns'),
    (GOOD + b'no tab', ':2: 1 columns'),
    (GOOD + b'\tb\n', ':2: the source is empty'),
    (GOOD + b'a\t\n', ':2: the target is empty'),
    (GOOD + b'a\t', ':2: the target is empty'),
    (GOOD + b'a\t \r\n' + GOOD, ':2: the target is empty'),
    (GOOD + '\u3000\tb\n'.encode(), ':2: the source is empty'),
    (GOOD + 'gr\u00fcn\tb\n'.encode('latin-1'), ':2: byte 3 of the line, 0xfc, is not UTF-8'),
    (b'', 'is empty'),
    (b'\xef\xbb\xbf', 'is empty'),
])
@pytest.mark.parametrize('block', [2**24, 5])
def test_bad_files_name_the_line(tmp_path, monkeypatch, content, message, block):
  monkeypatch.setattr(pairs, '_BLOCK', block)
  (tmp_path / 'train.tsv').write_bytes(content)
  if block == 5:  # The count is of what was read at once.
    message = message.replace(' .* 1 more such', '')
  with pytest.raises(UserError, match=message):
    opened(f'tsv:{tmp_path}')
  # One line, for the terminal.
  with pytest.raises(UserError) as error:
    opened(f'tsv:{tmp_path}')
  assert '\n' not in str(error.value) and 'train.tsv' in str(error.value)


def test_small_blocks_read_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(pairs, '_BLOCK', 7)
  write(tmp_path / 'train.tsv', LINES)
  assert listed(opened(f'tsv:{tmp_path}')) == LINES


def test_missing_file_says_what_there_is(tmp_path):
  write(tmp_path / 'other.tsv', LINES)
  with pytest.raises(UserError, match=r'no such file or folder; beside it there are other\.tsv'):
    opened(f'tsv:{tmp_path}/all.tsv')


def test_pickles_reads_from_threads_and_notices_changes(tmp_path):
  write(tmp_path / 'train.tsv', LINES)
  found = opened(f'tsv:{tmp_path}', 'train[10:]')
  stored = pickle.dumps(found)
  assert listed(pickle.loads(stored)) == LINES[10:]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    order = list(range(90)) * 20
    assert list(pool.map(lambda i: found[i]['target'], order)) == [LINES[10 + i][1] for i in order]
  write(tmp_path / 'train.tsv', LINES[:50])
  with pytest.raises(UserError, match='changed'):
    pickle.loads(stored)
  assert listed(opened(f'tsv:{tmp_path}')) == LINES[:50]  # Opened anew, it is read anew.


def test_embedded_numbers_in_both_directions():
  forth = opened('numbers_en_ko', 'test', source='en', target='ko')
  back = opened('numbers_en_ko', 'test', source='ko', target='en')
  assert len(forth) == 1000
  assert forth[5]['source'].isascii() and not forth[5]['target'].isascii()
  assert back[5] == {'source': forth[5]['target'], 'target': forth[5]['source']}
  assert pickle.loads(pickle.dumps(forth))[5] == forth[5]
  with pytest.raises(UserError, match="target='de'.*has en and ko"):
    opened('numbers_en_ko', 'test', source='en', target='de')


def test_translation_data_sets_of_tfds(tmp_path):
  TinyTranslation(data_dir=str(tmp_path), file_format='array_record').download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  for name in ('tiny_translation', 'tfds:tiny_translation'):
    assert listed(opened(name, 'train', str(tmp_path))) == [
        ('one', 'eins'), ('five', 'fünf'), ('ten', 'zehn')]
  assert listed(opened(name, 'train[:1]', str(tmp_path), 'de', 'en')) == [('eins', 'one')]
  with pytest.raises(UserError, match="target='fr': data set 'tiny_translation' has de, en"):
    opened('tiny_translation', 'train', str(tmp_path), 'en', 'fr')
