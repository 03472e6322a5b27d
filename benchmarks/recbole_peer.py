"""RecBole's BERT4Rec, for benchmarks/bert4rec.py, in an environment of its own.

RecBole 1.2.1 wants numpy before 2.0, which we do not run with, so it lives in another process: this
file is run by that environment's Python, imports nothing of ours and answers lines of JSON.
`recbole.quick_start` is not used, as it imports ray.
"""

import json
import logging
import os
import sys
import tempfile
import time

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def prepare(batch: int, length: int):
  """(config, train data, validation data, model) on the MovieLens-100K inside RecBole's package."""
  config = Config(model='BERT4Rec', dataset='ml-100k', config_dict={
      'load_col': {'inter': ['user_id', 'item_id', 'timestamp']},
      'eval_args': {'split': {'LS': 'valid_and_test'}, 'group_by': 'user', 'order': 'TO',
                    'mode': 'full'},
      'MAX_ITEM_LIST_LENGTH': length, 'train_batch_size': batch, 'train_neg_sample_args': None,
      'metrics': ['Hit', 'NDCG'], 'topk': [10], 'valid_metric': 'NDCG@10', 'epochs': 1,
      'show_progress': False, 'use_gpu': False, 'save_dataset': False, 'seed': 0,
      'checkpoint_dir': tempfile.mkdtemp(), 'state': 'ERROR'})
  logging.disable(logging.WARNING)
  init_seed(0, True)
  data = create_dataset(config)
  train, valid, _ = data_preparation(config, data)
  init_seed(0, True)
  model = get_model(config['model'])(config, train._dataset)  # pylint: disable=protected-access
  return config, train, valid, model


def main():
  began = float(sys.argv[1])
  batch, length, threads = (int(x) for x in sys.argv[2:])
  torch.set_num_threads(threads)
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # RecBole prints.
  say = lambda **answer: print(json.dumps(answer), file=answers, flush=True)
  config, train, valid, model = prepare(batch, length)
  trainer = get_trainer(config['MODEL_TYPE'], config['model'])(config, model)
  say(parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__)
  batches = iter(train)
  for line in sys.stdin:
    asked = json.loads(line)
    if asked['do'] == 'steps':
      taken = []
      while len(taken) < asked['count']:
        start = time.perf_counter()
        found = next(batches, None)
        if found is None:
          batches = iter(train)
          continue
        if len(found) < batch:
          continue
        trainer.optimizer.zero_grad()
        loss = model.calculate_loss(found)
        loss.backward()
        trainer.optimizer.step()
        taken.append(time.perf_counter() - start)
      say(seconds=taken)
    else:  # Train until validation is good enough.
      epoch, value = 0, 0.
      while value < asked['target'] and time.time() - began < asked['limit']:
        trainer._train_epoch(train, epoch)  # pylint: disable=protected-access
        epoch += 1
        value = float(trainer.evaluate(valid, load_best_model=False)['ndcg@10'])
        say(epoch=epoch, ndcg=value, seconds=time.time() - began)
      say(done=value >= asked['target'])


if __name__ == '__main__':
  main()
