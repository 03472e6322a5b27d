"""The command line: `python -m main --config=configs/PAPER.py[:ARGS] --workdir=DIR [--mode=M]`.

Only flags and dispatch live here. JAX is imported after the flags are known, so that help is
quick and a mode can choose its platform.
"""

import os
import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

from core.config import RunFailed, UserError, choose

MODES = ('train', 'prepare', 'evaluate', 'predict', 'compile', 'inspect', 'export')

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The run: configs/PAPER.py, or configs/PAPER.py:ARGS for a published setting. '
    'Single values change with --config.key=value.')
flags.DEFINE_string('workdir', None, 'Directory of the run; training continues what it holds.')
flags.DEFINE_string('mode', 'train', f'One of: {", ".join(MODES)}.')
flags.DEFINE_string('input', None, 'mode predict: a file, or a folder of them.')
flags.DEFINE_string('topology', None, 'mode compile: a TPU slice such as v5e:4x4; by default '
                    'config.topology.')
flags.DEFINE_bool('force', False, 'mode train: continue a run although its config was another.')


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code: 0 done, 1 the run failed, 2 bad usage."""
  try:
    config, workdir = _parse(argv)
    _dispatch(config, workdir)
    return 0
  except UserError as e:
    code, reason = 2, e
  except RunFailed as e:
    code, reason = 1, e
  except KeyboardInterrupt:
    code, reason = 1, 'interrupted'
  except Exception as e:  # pylint: disable=broad-except
    # An error nobody foresaw: the whole trace for whoever mends it, then the one line.
    logging.exception('unexpected error')
    code, reason = 1, f'{type(e).__name__}: {e}'
  print(f'error: {" ".join(str(reason).split())}', file=sys.stderr, flush=True)
  return code


def _parse(argv: list[str]):
  """Reads the flags. Raises `UserError` where absl would print a page of help."""
  path = next((a.split('=', 1)[1] for a in argv if a.startswith('--config=')), '')
  if path and not pathlib.Path(path.split(':', 1)[0]).is_file():
    there = ', '.join(sorted(str(p) for p in pathlib.Path('configs').glob('*.py')
                             if p.name not in ('__init__.py', 'common.py')))
    raise UserError(f'--config={path}: no such file; there are '
                    f'{there or "none here: run from a checkout"}')
  try:
    if {'--help', '-h', '--helpfull'} & set(argv):
      print(__doc__ + '\n' + FLAGS.module_help(__name__))
      sys.exit(0)
    rest = FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    text = str(e.args[0]) if e.args else str(e)
    raise UserError(' '.join(line for line in text.splitlines() if line.strip())) from e
  if len(rest) > 1:
    raise UserError(f'unexpected argument {rest[1]!r}; every option is written --name=value')
  if _CONFIG.value is None:
    raise UserError('--config is missing, e.g. --config=configs/vit.py')
  choose('--mode', FLAGS.mode, MODES)
  if not FLAGS.workdir and FLAGS.mode != 'inspect':
    raise UserError('--workdir is missing: the directory that the results go to')
  if FLAGS.mode == 'predict' and not FLAGS.input:
    raise UserError('--input is missing: the file or folder to predict')
  return _CONFIG.value, pathlib.Path(FLAGS.workdir) if FLAGS.workdir else None


def _dispatch(config, workdir: pathlib.Path | None) -> None:
  if FLAGS.mode == 'compile':
    from core import compile as compile_lib
    compile_lib.compile_for(config, FLAGS.topology or config.topology, workdir)
    return
  import jax
  from core import partition
  _configure_jax(jax)
  partition.initialize_distributed()
  if FLAGS.mode == 'train':
    from core import train
    train.train(config, workdir, FLAGS.force)
    return
  from core import modes
  if FLAGS.mode == 'predict':
    modes.predict(config, workdir, pathlib.Path(FLAGS.input))
  elif FLAGS.mode == 'inspect':
    modes.inspect(config, workdir)
  else:
    getattr(modes, FLAGS.mode)(config, workdir)


def _configure_jax(jax) -> None:
  """Keeps compiled programs between runs, unless the user has said where or that none be kept."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache / 'throughline' / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
