"""What README.md shows a newcomer exists: its commands parse, its configs and files are there."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(bash|console)\n(.*?)^```', TEXT, re.M | re.S)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines()]
MAIN = sorted({part.strip() for line in COMMANDS for part in line.split('&&')
               if part.strip().startswith('python -m main')})


def test_the_first_two_commands_are_one_line_each():
  assert COMMANDS[0] == ('pip install -e . && python -m main --config=configs/vit.py '
                         '--workdir=runs/digits')
  assert COMMANDS[1] == "pip install -e '.[test]' && python -m pytest"


def test_every_extra_that_is_named_exists():
  setup = (ROOT / 'setup.py').read_text()
  for line in COMMANDS:
    for extra in re.findall(r'\.\[([a-z,]+)\]', line):
      for name in extra.split(','):
        assert f"'{name}': [" in setup, line


@pytest.mark.parametrize('command', MAIN)
def test_a_main_command_has_flags_and_a_config_that_exist(command):
  """Parses the command as main does, without running it (CI runs those in bash blocks)."""
  code = ('import sys, main; from core import config; c, w = main._parse(sys.argv); '
          'config.validate(c)')
  done = subprocess.run([sys.executable, '-c', code, *shlex.split(command)[3:]], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  for path in re.findall(r'--input=(\S+)', command):
    assert (ROOT / path).exists()


def test_modules_and_benchmarks_that_are_named_exist():
  for module in re.findall(r'python -m (benchmarks\.\w+)', TEXT):
    assert (ROOT / (module.replace('.', '/') + '.py')).exists()
  for path in re.findall(r'`((?:configs|tests|core|docs)/[\w/.]+\.\w+)`', TEXT):
    assert (ROOT / path).exists(), path


def test_nothing_is_left_to_fill_in():
  assert '@@' not in TEXT and 'TODO' not in TEXT
