"""Files of arrays in the workdir: written whole, refused when damaged or of other settings."""

import pathlib

import numpy as np
import pytest

from core.config import UserError
from core.data import kept

ARRAYS = {'names': np.array(['a', '\u00e9 b']), 'starts': np.arange(3)}


def check(path):
  with kept.opened(path, 'log') as arrays:
    for name, array in ARRAYS.items():
      np.testing.assert_array_equal(arrays[name], array, strict=True)


def test_files_are_as_they_were_or_refused(tmp_path):
  path = tmp_path / 'runs' / 'new' / 'log.npz'
  kept.save(path, ARRAYS)
  assert list(path.parent.iterdir()) == [path]
  check(path)
  good, refused = path.read_bytes(), 0
  for at in range(0, len(good), 3):
    for end in (b'', bytes([good[at] ^ 1 << at % 8]) + good[at + 1:]):
      path.write_bytes(good[:at] + end)
      try:
        check(path)
      except UserError as e:
        assert str(e) == (f'{path}: damaged, or no log that --mode=prepare wrote; remove it and '
                          'that makes it anew')
        refused += 1
  assert refused > len(good) / 2
  path.unlink()
  with pytest.raises(UserError, match='no such file; --mode=prepare makes it'):
    check(path)


@pytest.mark.parametrize('error', [ValueError, KeyError, IndexError, TypeError])
def test_what_the_block_finds_wrong_is_damage(tmp_path, error):
  kept.save(tmp_path / 'log.npz', ARRAYS)
  with pytest.raises(UserError, match='damaged'), kept.opened(tmp_path / 'log.npz', 'log'):
    raise error


@pytest.mark.parametrize('dtype', [object, np.dtypes.StringDType()])
def test_nothing_is_pickled(tmp_path, dtype):
  with pytest.raises(TypeError, match='names: numpy would pickle'):
    kept.save(tmp_path / 'log.npz', {'names': ARRAYS['names'].astype(dtype)})


@pytest.mark.parametrize('made_of, words', [
    ('{"name": "a", "core": 1}', r"^log\.npz was made with config\.data\.name='a' \(now 'b'\), "
                                 r'core=1 \(now 2\); use another --workdir$'),
    *((text, r'^log\.npz does not say') for text in ('', '[]', 'null', '{"name": "b"}'))])
def test_other_settings(made_of, words):
  path, now = pathlib.Path('log.npz'), {'name': 'b', 'core': 2}
  kept.check_same(path, '{"core": 2, "name": "b"}', now)
  with pytest.raises(UserError, match=words):
    kept.check_same(path, made_of, now)
