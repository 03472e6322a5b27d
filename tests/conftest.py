"""Eight fake CPU devices, a compilation cache, and one directory of prepared data for all tests."""

import getpass
import os
import pathlib
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile far more than they compute: unoptimised code takes half the time in all.
_FLAGS = (os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8 '
          '--xla_backend_optimization_level=0').strip()
# XLA's older way of writing the code of fusions takes a third less again.
os.environ['XLA_FLAGS'] = f'{_FLAGS} --xla_cpu_use_fusion_emitters=false'
# Shared by all test processes and by those they start. Data sets are written once, atomically.
_SHARED = pathlib.Path(tempfile.gettempdir()) / f'throughline-tests-{getpass.getuser()}'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_SHARED / 'xla'))
os.environ.setdefault('TFDS_DATA_DIR', str(_SHARED / 'data'))

import importlib

import jax
import pytest

jax.devices()
# The CPU has read its flags; a TPU's compiler ends the process over one that it does not know.
os.environ['XLA_FLAGS'] = _FLAGS

jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py')
                 if p.stem not in ('__init__', 'common'))


@pytest.fixture
def smoke():
  """Makes the smoke config of a paper: `smoke('vit')`."""
  return lambda name='vit': importlib.import_module(f'configs.{name}').get_config('smoke')


def pytest_generate_tests(metafunc):
  if 'paper' in metafunc.fixturenames:
    metafunc.parametrize('paper', CONFIGS)
