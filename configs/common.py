"""The defaults that every config shares; a paper's config changes what it needs.

Durations are strings: '300 steps', '5 epochs', '1e6 examples', '10%' of the run; a bare number
counts steps.
"""

import ml_collections


def base() -> ml_collections.ConfigDict:
  """Every top-level key, with values that change nothing. `task`, `model` and `data` are the
  paper's to fill."""
  config = ml_collections.ConfigDict()
  config.task = ''                  # import path of the module that holds the Task
  config.model = ml_collections.ConfigDict()
  config.data = ml_collections.ConfigDict(dict(
      name='',                      # which data set; names are the task's
      data_dir='',                  # where prepared data sets are; '' is tfds's own default
      examples=0,                   # examples an epoch; 0 counts them
      workers=0,                    # decoding processes; 0 decodes in threads
      threads=4,
      reuse_batch=False,            # train on the first batch over and over: isolates input cost
  ))
  config.batch_size = 64            # over all devices and hosts
  config.steps = '1000 steps'
  config.optim = ml_collections.ConfigDict(dict(
      name='adamw', args=ml_collections.ConfigDict(), lr=1e-3,
      schedule=dict(name='cosine', warmup='0 steps', end_lr=0.0, boundaries=(), factor=0.1),
      clip_norm=1.0,                # global norm; 0 is off
      weight_decay=0.0, decay_mask='kernel$',
      lr_multipliers=(),            # ((regular expression, factor), ...)
      freeze='',                    # regular expression of parameters that keep their values
  ))
  config.precision = 'float32'      # of the computation: float32 or bfloat16; parameters stay fp32
  config.remat = 'none'             # none, dots, full: memory for time
  config.accum = 1                  # microbatches a step
  config.ema = 0.0                  # decay of the parameters' moving average; 0 is off
  config.mesh = ml_collections.ConfigDict(dict(data=0, fsdp=0, tensor=0))  # 0 is automatic
  config.rules = 'dp'               # dp, fsdp, tp, fsdp_tp
  config.eval = ml_collections.ConfigDict(dict(every='10%', batch_size=0))
  config.checkpoint = ml_collections.ConfigDict(dict(
      every='10%', keep=2, best='',
      average=1,                    # evaluate, predict, export: mean of so many of the newest
      select='newest',              # newest or best: which one they, and what is measured at the
                                    # end of a run, are of
      patience=0))                  # evaluations without a better `best` that end a run; 0 is off
  config.init_from = ''             # a workdir of ours, or foreign weights
  config.seed = 0
  config.topology = ''              # TPU slice that --mode=compile is for, such as v5e:4x4
  config.log_every = '50 steps'
  config.profile = ml_collections.ConfigDict(dict(first=10, steps=0))
  return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The same code in seconds: few steps, with a log line, an evaluation and a checkpoint inside."""
  config.steps = '4 steps'
  config.log_every = '2 steps'
  config.eval.every = '4 steps'
  config.checkpoint.every = '2 steps'
  config.optim.schedule.warmup = '0 steps'
  return config
