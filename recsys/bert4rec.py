"""BERT4Rec, and SASRec and gSASRec beside it; the task behind configs/bert4rec.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import partition, task
from core.config import UserError, choose
from recsys import checkpoints, cloze, encoder, logs, losses, markov, pictures, predict, ranking
from recsys import sequences

KINDS = ('bert4rec', 'sasrec')
_PADDINGS = ('right', 'left')


class Task(task.Task):
  """Predicts masked items from both sides (bert4rec), or each next one from the left (sasrec).

  Rows of the item table: 0 is padding, then the items by descending popularity, then [PAD], [MASK]
  and [NO_USE] as in the authors' code (`model.specials=4`), or [MASK] alone (2). What lies above is
  there to make the number of rows divide. The loss is the mean over all masked items of a batch
  (the authors' code; the paper's is a mean of means), in nats.
  """

  def __init__(self, config):
    super().__init__(config)
    model, data = config.model, config.data
    choose('config.model.kind', model.kind, KINDS)
    choose('config.model.padding', model.padding, _PADDINGS)
    choose('config.model.masking', model.masking, cloze.MASKINGS)
    choose('config.model.loss', model.loss, losses.LOSSES)
    choose('config.model.proposal', model.proposal, losses.PROPOSALS)
    choose('config.data.validation', data.validation, sequences.VALIDATIONS)
    if model.specials not in (2, 4):
      raise UserError(f'config.model.specials={model.specials}: rows that are no items, 2 or 4')
    for name in ('length', 'width', 'depth', 'heads', 'rows_multiple', 'max_masks', 'negatives'):
      if model[name] < 1:
        raise UserError(f'config.model.{name}={model[name]}; it must be at least 1')
    if config.eval.top < 1:
      raise UserError(f'config.eval.top={config.eval.top}; it must be at least 1')
    if model.width % model.heads:
      raise UserError(f'config.model.width={model.width} does not divide into '
                      f'config.model.heads={model.heads}')
    if not 0 < model.mask_rate <= 1 or not 0 <= model.last_share <= 1:
      raise UserError(f'config.model.mask_rate={model.mask_rate} and last_share='
                      f'{model.last_share} are shares, and the first is not 0')
    if not 0 < data.sliding <= 1:
      raise UserError(f'config.data.sliding={data.sliding}: the step between windows as a share '
                      'of their length')
    lengths = tuple(data.lengths)
    if lengths and (sorted(set(lengths)) != list(lengths) or lengths[-1] != model.length
                    or lengths[0] < 2):
      raise UserError(f'config.data.lengths={lengths}: ascending from 2, and the last is '
                      f'config.model.length={model.length}')
    if lengths[1:] and model.padding == 'left':
      raise UserError("config.data.lengths needs config.model.padding='right': on the left, a "
                      'position would depend on the length of the batch')

  @property
  def _causal(self) -> bool:
    return self.config.model.kind == 'sasrec'

  @property
  def _lengths(self) -> tuple[int, ...]:
    """Of training's batches: what the model reads, and for sasrec the last answer."""
    lengths = tuple(self.config.data.lengths) or (self.config.model.length,)
    return tuple(length + self._causal for length in lengths)

  # Data.

  @functools.cached_property
  def log(self) -> logs.Log:
    log = logs.find(self.config.data, self.workdir)
    wanted = self.config.model.catalogue
    if wanted and wanted != len(log.items):
      raise UserError(f'config.model.catalogue={wanted:,}, but {self.config.data.name!r} has '
                      f'{len(log.items):,} items after its filters; 0 takes what is there')
    return log

  @functools.cached_property
  def items(self) -> int:
    """Size of the catalogue: from the config when it says so, else counted."""
    if not self.config.model.catalogue and self.workdir is not None and not jax.process_index():
      self.prepare()  # The model's shape is wanted before anything else: the data is read here.
    return self.config.model.catalogue or len(self.log.items)

  @property
  def rows(self) -> int:
    model = self.config.model
    rows = self.items + model.specials
    return -(-rows // model.rows_multiple) * model.rows_multiple

  @property
  def mask_id(self) -> int:
    return self.items + (2 if self.config.model.specials == 4 else 1)

  def prepare(self):
    logs.prepare(self.config.data, self.workdir)
    self.log  # Says what does not fit the config.  # pylint: disable=pointless-statement

  @functools.cached_property
  def _split(self) -> sequences.Split:
    data = self.config.data
    return sequences.split(self.log, data.validation, data.validation_users, self.config.seed)

  @functools.cache
  def dataset(self, split):
    data, eval_ = self.config.data, self.config.eval
    if split == 'train':
      step = max(int(data.sliding * self.config.model.length), 1)
      return sequences.Windows(self._split, self._lengths, step)
    choose('split', split, ('validation', 'test'))
    negatives = sequences.Negatives(self.log.counts, eval_.negatives, eval_.negatives_seed)
    return sequences.Questions(self._split, split, negatives)

  def batch_spec(self, batch_size):
    return self._train_spec(batch_size, self._lengths[-1])

  def _train_spec(self, batch_size: int, length: int):
    return {'items': jax.ShapeDtypeStruct((batch_size, length), np.int32),
            'mask': jax.ShapeDtypeStruct((batch_size,), np.float32)}

  def specs(self, batch_size, train):
    if train:
      return [self._train_spec(batch_size, length) for length in self._lengths]
    model = self.config.model
    int32 = lambda *shape: jax.ShapeDtypeStruct((batch_size, *shape), np.int32)
    return [{'items': int32(model.length), 'slot': int32(), 'answer': int32(),
             'seen': int32(self._longest), 'candidates': int32(self.config.eval.negatives),
             'mask': jax.ShapeDtypeStruct((batch_size,), np.float32)}]

  @functools.cached_property
  def _longest(self) -> int:
    return self.dataset('test').longest

  def transform(self, example, rng, train):
    del rng
    if 'answer' not in example:
      length = self._lengths[example['bucket']]
      return {'items': self._padded(example['items'], length)}
    items, slot = self.question(example['history'])
    seen = np.zeros(self._longest, np.int32)
    different = np.unique(example['history'])
    seen[:len(different)] = different
    return {'items': items, 'slot': slot, 'seen': seen, 'candidates': example['candidates'],
            'answer': np.asarray(example['answer'], np.int32)}

  def _padded(self, items: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros(length, np.int32)
    at = 0 if self.config.model.padding == 'right' else length - len(items)
    padded[at:at + len(items)] = items
    return padded

  def question(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the model reads to say what comes after `history`, and where it answers.

    Args:
      history: int32 `[n]` item ids, at least one for sasrec.

    Returns:
      int32 `[length]`, and the position, int32 scalar. For bert4rec the last item is [MASK], which
      leaves room for one item less (section 3.6).
    """
    length = self.config.model.length
    if self._causal:
      items = history[-length:]
    else:
      items = np.append(history[-(length - 1):] if length > 1 else history[:0], self.mask_id)
    slot = len(items) - 1 if self.config.model.padding == 'right' else length - 1
    return self._padded(items, length), np.asarray(slot, np.int32)

  # What the step computes.

  @functools.cached_property
  def model(self) -> encoder.Encoder:
    model = self.config.model
    return encoder.Encoder(
        self.rows, model.length, model.width, model.depth, model.heads,
        model.mlp_dim or 4 * model.width, causal=self._causal, transform=model.transform,
        positions=model.positions, segments=model.segments, residual=model.residual,
        dropout=model.dropout, attention_dropout=model.attention_dropout,
        dtype=jnp.dtype(self.config.precision), remat=self.config.remat)

  def init(self, rng):
    items = jnp.zeros((1, self.config.model.length), jnp.int32)
    return self.model.init(rng, items, jnp.zeros((1, 1), jnp.int32))['params']

  def puzzle(self, rng: jax.Array, items: jax.Array) -> cloze.Puzzle:
    """What is to be predicted of sequences int32 `[batch, n]`."""
    model = self.config.model
    if self._causal:
      return cloze.next_items(items)
    # A fixed share of the items fills no more slots than the longest sequence needs.
    rate = model.mask_rate if model.masking == 'fixed' else 1.
    return cloze.mask_items(
        rng, items, self.mask_id, rate=model.mask_rate, masking=model.masking,
        slots=cloze.max_masks(items.shape[1], rate, model.max_masks), last_share=model.last_share)

  def loss(self, params, batch, rng, train):
    model = self.config.model
    drawn, negative, dropout = jax.random.split(rng, 3)
    puzzle = self.puzzle(drawn, batch['items'])
    states = self.model.apply({'params': params}, puzzle.items, puzzle.slots, train=train,
                              rngs={'dropout': dropout})
    states = partition.constrain(states.reshape(-1, model.width), ('batch', 'embed'))
    labels = puzzle.labels.reshape(-1)
    weights = (puzzle.weights * batch['mask'][:, None]).reshape(-1)
    if model.loss == 'softmax':
      each = losses.full_softmax(params, states, labels, model.logits_mib)
    else:
      shape = (model.negatives,) if model.shared_negatives else (len(labels), model.negatives)
      proposal = model.proposal if model.loss == 'sampled' else 'uniform'
      negatives = losses.draw_negatives(negative, shape, self.items, proposal)
      if model.loss == 'sampled':
        chances = tuple(losses.log_chance(ids, self.items, proposal)
                        for ids in (jnp.maximum(labels, 1), negatives))
        each = losses.sampled_softmax(params, states, labels, negatives, chances)
      else:
        each = losses.gbce(params, states, labels, negatives, self.items, model.calibration)
    weight = weights.sum()
    loss = jnp.where(weights > 0, each, 0).sum() / jnp.maximum(weight, 1)
    return loss, task.Aux(weight, {})

  def scores(self, params, items: jax.Array, slot: jax.Array) -> jax.Array:
    """float32 `[batch, rows]`: scores of what comes at `slot` int32 `[batch]` of `items`."""
    states = self.model.apply({'params': params}, items, slot[:, None])
    return encoder.logits(params, states[:, 0])

  def in_chunks(self, fn, *arrays):
    """`losses.in_chunks` for functions of scores of the whole catalogue."""
    return losses.in_chunks(fn, losses.rows_within(self.config.model.logits_mib, self.rows),
                            *arrays)

  def ranks(self, params, batch) -> dict[str, jax.Array]:
    """What `ranking.LeaveOneOut` runs: protocol -> int32 `[batch]`."""
    names = ('items', 'slot', 'answer', 'seen', 'candidates')

    def some(*arrays):
      chunk = dict(zip(names, arrays))
      return ranking.ranks(self.scores(params, chunk['items'], chunk['slot']), chunk, self.items)
    return self.in_chunks(some, *(batch[name] for name in names))

  # Use.

  def evaluators(self):
    found: dict[str, Any] = {}
    if self.config.data.validation != 'none':
      found['validation'] = ranking.LeaveOneOut(self, 'validation')
    found['test'] = ranking.LeaveOneOut(self, 'test', every='end')
    found['popularity'] = ranking.Baseline(self, 'test',
                                           lambda history: self._split.train_counts)
    if self.config.data.name == 'markov':
      found['best_possible'] = ranking.Baseline(
          self, 'test', lambda history: markov.chances(history, self.log))
    found['attention'] = pictures.Heads(self, 'test', every='end')
    return found

  def open_weights(self, path):
    return checkpoints.open_weights(path, self.config.model.heads)

  def export(self, params, path):
    return checkpoints.write_huggingface(params, path, self)

  def predict(self, params, inputs, out):
    return predict.predict(self, params, inputs, out)
