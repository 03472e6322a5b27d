"""Numbers on their way out: the window of training metrics, the files, the progress line."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from core.config import RunFailed, UserError


class Window:
  """Sums training metrics between two log lines without making the host wait for each step.

  What it has summed is part of a checkpoint, so the line after a resume equals the line that an
  unbroken run would have written, to the last bit.
  """

  def __init__(self, saved: Mapping[str, list[float]] | None = None):
    self._sums = {k: list(v) for k, v in (saved or {}).items()}
    self._pending: list[tuple[int, Any]] = []

  def add(self, step: int, metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
    """Keeps one step's (sum, weight) pairs; they may still be under computation."""
    self._pending.append((step, metrics))

  def sums(self) -> dict[str, list[float]]:
    """Waits for the pending steps and returns name -> [sum, weight].

    It is a copy: a checkpoint writes it in the background, while later steps are added here.

    Raises:
      RunFailed: a loss or gradient norm is not finite; names the step.
    """
    for step, metrics in jax.device_get(self._pending):
      for name, (total, weight) in metrics.items():
        if name in ('loss', 'grad_norm') and not math.isfinite(total):
          raise RunFailed(f'step {step}: {name} is {float(total)}')
        entry = self._sums.setdefault(name, [0., 0.])
        entry[0] += float(total)
        entry[1] += float(weight)
    self._pending.clear()
    return {name: list(entry) for name, entry in self._sums.items()}

  def flush(self) -> dict[str, float]:
    """Means of the window; the next one starts empty."""
    means = mean(self.sums())
    self._sums = {}
    return means


def mean(sums: Mapping[str, list[float]]) -> dict[str, float]:
  """(sum, weight) pairs to means; a metric that nothing weighed is left out."""
  return {name: total / weight for name, (total, weight) in sums.items() if weight}


class Writer:
  """metrics.jsonl and TensorBoard event files, written by the first process alone.

  Keys that begin with 'time/' are measurements of this machine; all others are the same in every
  run of the same config and seed.
  """

  def __init__(self, workdir: pathlib.Path, after_step: int | None):
    """Opens the files of `workdir`.

    Args:
      workdir: exists.
      after_step: lines of later steps are dropped, as a run resumed there writes them again;
        None keeps everything.
    """
    self._path = workdir / 'metrics.jsonl'
    self._active = jax.process_index() == 0
    if not self._active:
      return
    if after_step is not None and self._path.exists():
      kept = [line for line in read(self._path) if line['step'] <= after_step]
      temporary = self._path.with_suffix('.tmp')
      temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
      temporary.replace(self._path)
    self._file = self._path.open('a')
    self._board = tensorboardX.SummaryWriter(
        str(workdir), purge_step=None if after_step is None else after_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if not self._active or not values:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._active:
      self._file.close()
      self._board.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
  lines = []
  for number, text in enumerate(path.read_text().splitlines(), 1):
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError as e:
      if number == len(path.read_text().splitlines()):
        break
      raise UserError(f'{path}:{number}: not a JSON line ({e.msg})') from e
  return lines


def best_classes(chances: np.ndarray, names: Sequence[str], count: int = 5) -> list[dict[str, Any]]:
  """The most likely classes, best first and equals in their order, ready for JSON.

  Args:
    chances: float `[classes]`.
    names: one a class.
    count: how many at most.
  """
  return [{'class': names[i], 'index': int(i), 'probability': round(float(chances[i]), 6)}
          for i in np.argsort(-chances, kind='stable')[:count]]


class Progress:
  """One line that moves on a terminal; plain lines in a log file."""

  def __init__(self, total: int, start: int, what: str = 'train'):
    self._total, self._start, self._what = total, start, what
    self._began = time.monotonic()
    self._quiet = jax.process_index() != 0
    self._bar = None
    if sys.stderr.isatty() and not self._quiet:
      self._bar = tqdm.tqdm(total=total, initial=start, desc=what, unit='step',
                            dynamic_ncols=True)

  def advance(self, step: int) -> None:
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the numbers of a log line, with the time left at the pace so far."""
    if self._quiet:
      return
    text = '  '.join(f'{k} {v:.4g}' for k, v in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text)
      return
    pace = (time.monotonic() - self._began) / max(step - self._start, 1)
    left = clock((self._total - step) * pace)
    print(f'{self._what} {step}/{self._total}  {text}  ETA {left}', flush=True)

  def say(self, text: str) -> None:
    """A line that stays, above the moving one."""
    if self._quiet:
      return
    if self._bar is not None:
      self._bar.write(text)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def clock(seconds: float) -> str:
  """'1:02:03' or '2:03'."""
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
