"""Host memory while public weights are loaded, against reading the file whole.

  python -m benchmarks.loading              # a fabricated ViT-B/16 .npz of 330 MiB

Each case runs in a process of its own with eight fake CPU devices, and prints how far the peak of
its resident memory rose above what it was before, in MiB and in sizes of the file. On a CPU the
devices' memory is the host's, so one copy (1.00 files) is what the parameters themselves take.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

_CASES = {
    'read_params': 'parameters of a model, sharded over 8 devices (fsdp)',
    'load_into': 'a training state that is there already, its parameters replaced (fsdp)',
    'whole': 'np.load of every array, for comparison'}


def _memory(key: str) -> float:
  """MiB of this process: 'VmRSS' now, 'VmHWM' at most so far."""
  line = next(x for x in pathlib.Path('/proc/self/status').read_text().splitlines()
              if x.startswith(key))
  return int(line.split()[1]) / 2**10


def _plan():
  import jax  # The environment of the child process must be set before.
  from configs import vit
  from core.plan import make_plan
  config = vit.get_config('b16,imagenet2012')
  config.batch_size = 8
  config.rules = 'fsdp'
  return jax, make_plan(config)


def fabricate(path: pathlib.Path) -> None:
  """Writes random B/16 weights in Google's layout."""
  jax, plan = _plan()
  from vit_family import checkpoints
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), plan.params_shape)
  checkpoints.write_npz(params, path)


def measure(case: str, path: pathlib.Path) -> None:
  jax, plan = _plan()
  from core import pretrained
  jax.block_until_ready(jax.device_put(np.zeros(8)))
  state = plan.init(jax.random.key(0)) if case == 'load_into' else None
  jax.block_until_ready(state)
  # From here on the peak is that of loading alone.
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  before = _memory('VmRSS')
  if case == 'whole':
    with np.load(path, allow_pickle=False) as archive:
      kept = {name: archive[name] for name in archive.files}
  elif case == 'read_params':
    kept = pretrained.read_params(plan, str(path))
  else:
    kept = pretrained.load_into(plan, state, str(path))
  jax.block_until_ready(kept)
  grown, size = _memory('VmHWM') - before, path.stat().st_size / 2**20
  print(f'{case:12} {_CASES[case]}: peak {grown:.0f} MiB above before, {grown / size:.2f} files',
        flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--case', choices=('fabricate', *_CASES), help=argparse.SUPPRESS)
  parser.add_argument('--file', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    fabricate(args.file) if args.case == 'fabricate' else measure(args.case, args.file)
    return
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu',
         'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'B_16.npz'
    for case in ('fabricate', *_CASES):
      subprocess.run([sys.executable, '-m', 'benchmarks.loading', f'--case={case}',
                      f'--file={path}'], env=env, check=True)


if __name__ == '__main__':
  main()
