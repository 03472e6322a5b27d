"""The loop. It knows no model: a paper is one `Task`.

After every update, in this order: log, evaluate, save. So a checkpoint of step n stands behind
everything that was written for step n, and a run resumed from it repeats nothing and misses
nothing. A run ends after its last step, or when nothing has become better for as long as
`config.checkpoint.patience` says; then what waits for the end is measured too.
"""

import functools
import json
import pathlib
import signal
import time

import jax
import ml_collections
from absl import logging

from core import config as config_lib
from core import metrics, partition, pictures, pretrained
from core.checkpoint import Checkpoints
from core.config import RunFailed, UserError
from core.data import devices, pipeline
from core.evaluate import Evaluators
from core.plan import Plan, make_plan


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, force: bool = False) -> None:
  """Trains, or continues the run that `workdir` holds.

  Args:
    config: the run.
    workdir: gets config.json, metrics.jsonl, event files, checkpoints/ and pictures/.
    force: continue a run although its saved config differs.

  Raises:
    UserError: bad config, data or workdir, before any step.
    RunFailed: loss or gradient not finite; the last good checkpoint stays.
  """
  claim_workdir(workdir)
  plan = make_plan(config, workdir=workdir)
  checkpoints = Checkpoints(workdir / 'checkpoints', config.checkpoint)
  try:
    _check_same_run(config, workdir, bool(checkpoints.steps()), force)
    plan.prepare()
    _Loop(plan, workdir, checkpoints).run()
  finally:
    checkpoints.close()


def claim_workdir(workdir: pathlib.Path) -> None:
  """Makes the workdir, or says in one line why it cannot be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f'.writable-{jax.process_index()}'
    probe.touch()
    probe.unlink()
  except OSError as e:
    raise UserError(f'--workdir={workdir}: cannot be written ({e.strerror or e}); name a '
                    'directory you own') from e


def _check_same_run(config, workdir: pathlib.Path, started: bool, force: bool) -> None:
  """Guards a workdir against another config; leaves this run's config.json behind."""
  path = workdir / 'config.json'
  if started and path.exists() and not force:
    changed = config_lib.differences(json.loads(path.read_text()), config)
    if changed:
      raise UserError(f'{workdir} holds a run of another config ({"; ".join(changed)}); use '
                      'another --workdir, or --force to continue it with this config')
  if jax.process_index() == 0:
    temporary = path.with_suffix('.tmp')
    temporary.write_text(config_lib.to_json(config))
    temporary.replace(path)


class _Loop:
  """One run from its first (or resumed) step to its last."""

  def __init__(self, plan: Plan, workdir: pathlib.Path, checkpoints: Checkpoints):
    self.plan, self.workdir, self.checkpoints = plan, workdir, checkpoints
    config = plan.config
    self.log_every = max(plan.steps_of(config.log_every, 'config.log_every'), 1)
    self.save_every = max(plan.steps_of(config.checkpoint.every, 'config.checkpoint.every'), 1)
    self.evaluators = Evaluators(plan, workdir)
    self.profile = _Profile(config.profile, workdir)
    # Fake devices of one CPU share its threads. With steps queued up they may wait for each other
    # in a collective for good, whatever they compute; one step at a time they do not.
    self._may_queue = plan.layout.platform != 'cpu' or jax.local_device_count() == 1

  def run(self) -> None:
    plan = self.plan
    state, extra = self._starting_state()
    start = int(state.step)
    self.window = metrics.Window(extra.get('window'))
    self.best = _Best(plan.config.checkpoint, extra.get('best'))
    self.writer = metrics.Writer(self.workdir, after_step=start)
    self.progress = metrics.Progress(plan.steps, start)
    self._introduce(start)
    complete = start >= plan.steps or self.best.exhausted
    if complete:
      self.progress.say(f'the run of {start} steps in {self.workdir} is complete')
    try:
      with _Stop() as stop, self._stream(start) as stream:
        self._clock, self._starved, running = (time.monotonic(), start), 0., None
        self._examples = 0
        for step in range(start + 1, start + 1 if complete else plan.steps + 1):
          self.profile.before(step)
          waited = stream.waited
          batch = next(stream)
          # While the step before still runs, waiting here costs nothing: the host is ahead.
          if running is not None and running.is_ready():
            self._starved += stream.waited - waited
          self._examples += len(batch['mask'])
          state, step_metrics = plan.train_step(state, batch)
          running = step_metrics['loss'][0]
          if not self._may_queue:
            jax.block_until_ready(state)
          if step == start + 1:
            jax.block_until_ready(state)
            self.progress.say(f'first step done after {time.monotonic() - self._clock[0]:.1f} s '
                              '(compilation included)')
            self._clock, self._starved, self._examples = (time.monotonic(), step), 0., 0
          self.window.add(step, step_metrics)
          self.profile.after(step, state)
          self.progress.advance(step)
          stopping = stop.reached(step)
          self._after(step, state, stopping)
          if stopping or self.best.exhausted:
            break
      self.checkpoints.wait()
      pictures.learning_curves(self.workdir)
    except RunFailed as e:
      self.checkpoints.wait()
      steps = self.checkpoints.steps()
      kept = (f'the last good checkpoint is step {steps[-1]} in {self.workdir}' if steps
              else 'there is no checkpoint yet')
      raise RunFailed(f'{e}; {kept}') from e
    finally:
      self.progress.close()
      self.writer.close()

  def _starting_state(self):
    """Resumed, else pretrained, else fresh."""
    plan = self.plan
    restored = self.checkpoints.restore(plan.state_shape)
    if restored is not None:
      return restored
    state = plan.init(jax.random.key(plan.config.seed))
    if plan.config.init_from:
      state = pretrained.load_into(plan, state, plan.config.init_from)
    return state, {}

  def _introduce(self, start: int) -> None:
    plan = self.plan
    say = self.progress.say
    say(partition.report(plan.params_shape, plan.state_sharding.params, largest=3))
    say(f'{plan.config.task}: {plan.parameter_count:,} parameters, {plan.layout.mesh.size} '
        f'{plan.layout.platform} device(s), {jax.process_count()} process(es), batch '
        f'{plan.config.batch_size}, {plan.steps} steps'
        + (f', resumed at step {start}' if start else ''))

  def _stream(self, start: int):
    plan, data = self.plan, self.plan.config.data
    sizes = [spec['mask'].shape[0] for spec in plan.specs]
    rows = [devices.process_rows(plan.batch_sharding['mask'], size) for size in sizes]
    stream = pipeline.bucket_stream(
        plan.task.dataset(plan.task.train_split),
        functools.partial(plan.task.transform, train=True),
        batch_sizes=sizes, rows=rows, seed=plan.config.seed, start_step=start,
        workers=data.workers, threads=data.threads, reuse_batch=data.reuse_batch)
    unchecked = set(range(len(sizes)))
    resident = plan.resident()

    def put(element):
      bucket, batch = element
      if bucket in unchecked:
        pipeline.check_against_spec(batch, plan.specs[bucket])
        unchecked.remove(bucket)
      placed = devices.to_device(batch, plan.batch_sharding, sizes[bucket], rows[bucket])
      return {**placed, **resident}
    return devices.prefetch(stream, put)

  def _after(self, step: int, state, stopping: bool) -> None:
    """Logs, evaluates and saves what is due after `step` updates."""
    last = step == self.plan.steps
    if step % self.log_every == 0 or last:
      self._log(step)
    values, better = None, False
    due = [] if stopping and not last else self.evaluators.due(step)
    if due or last:
      self.window.sums()  # never score, nor save, a model that has already failed
      began = time.monotonic()
      params = state.params if state.ema is None else state.ema
      values = self.evaluators.run(params, step, due, self.progress.say)
      better = self.best.see(step, values)
      if self.best.exhausted and not last:
        self.progress.say(f'nothing better since step {self.best.step}: the run ends here')
      last = last or self.best.exhausted
      if last and self.evaluators.final:
        values |= self._at_end(params, step)
      self.writer.write(step, values)
      self._pause(time.monotonic() - began)
    if step % self.save_every == 0 or last or stopping or better:
      extra = {'window': self.window.sums(), 'best': self.best.saved()}
      began = time.monotonic()
      self.checkpoints.save(step, state, extra, values or None)
      self._pause(time.monotonic() - began)
      if stopping and not last:
        self.progress.say(f'stopped by a signal; saved step {step}')

  def _at_end(self, params, step: int) -> dict[str, float]:
    """What waits for the end of the run, of the newest parameters or the best."""
    if self.plan.config.checkpoint.select == 'best' and self.best.step not in (None, step):
      self.checkpoints.wait()
      self.progress.say(f'measuring step {self.best.step}, the best')
      # Of equal values another step's may have been kept.
      kept = self.checkpoints.best_step(self.plan.config.checkpoint.best)
      params, _ = self.checkpoints.restore_params(self.plan.params_shape, step=kept)
    return self.evaluators.run(params, step, self.evaluators.final, self.progress.say)

  def _log(self, step: int) -> None:
    values = self.window.flush()  # waits for the device, so the clock below is honest
    began, first = self._clock
    now = time.monotonic()
    seconds = max(now - began, 1e-9)
    line = {f'train/{k}': v for k, v in sorted(values.items())}
    if step > first:
      line['time/examples_per_second'] = self._examples / seconds
      line['time/input_wait_share'] = min(self._starved / seconds, 1.)
    self.writer.write(step, line)
    shown = {'loss': values['loss']}
    if 'time/examples_per_second' in line:
      shown['examples/s'] = line['time/examples_per_second']
    self.progress.show(step, shown)
    self._clock, self._starved, self._examples = (now, step), 0., 0

  def _pause(self, seconds: float) -> None:
    """Keeps time that was not training out of the examples-per-second."""
    began, first = self._clock
    self._clock = (began + seconds, first)


class _Best:
  """Follows `config.checkpoint.best`: which step had the best value, and how long ago.

  Attributes:
    step: None before the first evaluation, or where nothing is followed.
    exhausted: whether there were as many evaluations since as `config.checkpoint.patience`.
  """

  def __init__(self, options: ml_collections.ConfigDict, saved: list | None):
    self._name, self._sign = options.best.lstrip('-'), -1 if options.best.startswith('-') else 1
    self._patience, self._always = options.patience, options.select == 'best'
    self.step, self._value, self._since = saved or (None, None, 0)

  def see(self, step: int, values: dict[str, float]) -> bool:
    """Takes note of an evaluation; returns whether its parameters must be saved."""
    if self._name not in values:
      return False
    value = self._sign * values[self._name]
    if self._value is None or value > self._value:
      self.step, self._value, self._since = step, value, 0
      return self._always
    self._since += 1
    return False

  @property
  def exhausted(self) -> bool:
    return 0 < self._patience <= self._since

  def saved(self) -> list:
    return [self.step, self._value, self._since]


class _Stop:
  """Turns SIGTERM into an orderly end after the current step, on all processes at once."""

  def __init__(self):
    self._asked = False
    self._previous = None

  def __enter__(self):
    # With several processes the runtime's own preemption service listens, and agrees on a step.
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def _on_signal(self, number, frame):
    del number, frame
    self._asked = True

  def reached(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self._asked
    from jax.experimental import multihost_utils  # only where there are several hosts
    return multihost_utils.reached_preemption_sync_point(step)

  def __exit__(self, *exc):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)


class _Profile:
  """Traces the steps [first, first + steps) for TensorBoard's profiler; 0 steps is off."""

  def __init__(self, profile: ml_collections.ConfigDict, workdir: pathlib.Path):
    self._first, self._last = profile.first, profile.first + profile.steps - 1
    self._directory = workdir / 'profile'
    self._on = False

  def before(self, step: int) -> None:
    if step == self._first <= self._last:
      jax.profiler.start_trace(self._directory)
      self._on = True

  def after(self, step: int, state) -> None:
    if self._on and step == self._last:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._on = False
      logging.info('profile of steps %d to %d in %s', self._first, self._last, self._directory)
