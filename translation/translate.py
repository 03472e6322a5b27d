"""Translation, by recurrent models and by the Transformer: the task behind configs/seq2seq.py and
configs/transformer.py."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from core import task
from core.config import UserError, choose
from core.nn import blocks, losses
from translation import (cells, corpus, marian, pairs, pictures, scoring, search, seq2seq, texts,
                         transformer, vocabulary)

MODELS = ('transformer', 'recurrent')
_METHODS = ('beam', 'sample')
_UNITS = ('tokens', 'sentences')


class Task(task.Task):
  """Maximum likelihood of the target sentence given the source sentence.

  Batches hold padded sentences of about one length (buckets), or rows packed with several pairs
  (`data.packed`). The loss is a mean over the target's tokens, ends included, or over sentences of
  the sum over theirs (`model.loss_per`). Metrics: 'nll', without label smoothing, in nats a token,
  and in evaluation 'accuracy' of the next token.
  """

  def __init__(self, config):
    super().__init__(config)
    model, data, found = config.model, config.data, config.eval.search
    choose('config.model.kind', model.kind, MODELS)
    choose('config.data.vocab.kind', data.vocab.kind, vocabulary.KINDS)
    choose('config.eval.search.method', found.method, _METHODS)
    choose('config.data.batch_of', data.batch_of, _UNITS)
    choose('config.model.loss_per', model.loss_per, _UNITS)
    if list(data.buckets) != sorted(set(data.buckets)) or not data.buckets or data.buckets[0] < 1:
      raise UserError(f'config.data.buckets={tuple(data.buckets)}: lengths, each longer than the '
                      'one before')
    if not 0 <= model.label_smoothing < 1:
      raise UserError(f'config.model.label_smoothing={model.label_smoothing}; it must be at least '
                      '0 and below 1')
    if found.beams < 1 or found.extra < 1 or found.alpha < 0 or found.coverage < 0:
      raise UserError(f'config.eval.search: beams={found.beams} and extra={found.extra} are at '
                      f'least 1, alpha={found.alpha} and coverage={found.coverage} at least 0')
    if model.kind == 'transformer':
      choose('config.model.norm', model.norm, ('post', 'pre'))
      choose('config.model.positions', model.positions, transformer.POSITIONS)
      choose('config.model.activation', model.activation, blocks.ACTIVATIONS)
      if not (model.head_dim and model.value_dim) and model.width % model.heads:
        raise UserError(f'config.model.width={model.width} does not divide into '
                        f'{model.heads} heads')
      if model.positions != 'learned' and model.width % 2:
        raise UserError(f'config.model.width={model.width}: sinusoidal positions need an even one')
      if not -model.depth <= found.layer < model.depth:
        raise UserError(f'config.eval.search.layer={found.layer}: there are {model.depth} layers')
      if not set(found.heads) <= set(range(model.heads)):
        raise UserError(f'config.eval.search.heads={tuple(found.heads)}: there are heads 0 to '
                        f'{model.heads - 1}')
    else:
      choose('config.model.cell', model.cell, cells.GATES)
      choose('config.model.attention', model.attention, seq2seq.ATTENTIONS)
      choose('config.model.initializer', model.initializer, cells.INITS)
      if data.packed:
        raise UserError('config.data.packed: a recurrent model reads one sentence a row; only the '
                        'Transformer can be kept from seeing its neighbours')

  @functools.cached_property
  def model(self):
    model, vocab = self.config.model, self.config.data.vocab
    dtype = jnp.dtype(self.config.precision)
    if model.kind == 'transformer':
      return transformer.Transformer(
          vocab.size, model.width, model.depth, model.heads, model.mlp_dim,
          source_vocab=vocab.source_size, head_dim=model.head_dim or None,
          value_dim=model.value_dim or None, norm=model.norm,
          positions=model.positions, max_length=self.room, dropout=model.dropout,
          attention_dropout=model.attention_dropout, hidden_dropout=model.hidden_dropout,
          attention_bias=model.attention_bias, activation=model.activation, epsilon=model.epsilon,
          dtype=dtype, scan=model.scan, remat=self.config.remat)
    return seq2seq.Seq2Seq(
        vocab.size, source_vocab=vocab.source_size, width=model.width, embed=model.embed,
        layers=model.layers, cell=model.cell, attention=model.attention,
        bidirectional=model.bidirectional, reverse=model.reverse,
        input_feeding=model.input_feeding, dropout=model.dropout,
        initializer=model.initializer, dtype=dtype)

  @property
  def longest(self) -> int:
    """Tokens of the longest sentence, its end included."""
    return self.config.data.buckets[-1]

  @property
  def room(self) -> int:
    """Tokens of the longest translation, its end included."""
    return self.longest + self.config.eval.search.extra

  @functools.cached_property
  def texts(self) -> texts.Texts:
    return texts.Texts(self.config, self.workdir)

  def prepare(self):
    self.texts.prepare()

  @property
  def vocabularies(self) -> dict[str, vocabulary.Vocabulary]:
    """'source' and 'target', the same object when it is shared."""
    return self.texts.vocabularies

  # Data.

  def pairs(self, split: str) -> pairs.Pairs:
    """The text of a split, as it was written."""
    return self.texts.pairs(self._split(split))

  def _split(self, name: str) -> str:
    return self.config.data.splits.get(name, name)

  @functools.cache
  def dataset(self, split):
    name = self._split(split)
    encoded = self.texts.encoded(name)
    if split == self.train_split and self.config.data.packed:
      found = corpus.Packed(encoded, self.longest, self.config.seed)
    else:
      found = corpus.Bucketed(encoded, tuple(self.config.data.buckets))
    if len(found.left_out):
      logging.warning('%s: %d of %d pairs have a sentence of more than %d tokens '
                      '(config.data.buckets) and are left out', name, len(found.left_out),
                      len(encoded), self.longest)
    return found

  def examples(self):
    raise UserError('give the length of a run in steps: how many batches hold all sentences '
                    'depends on their lengths')

  def specs(self, batch_size, train):
    if train and self.config.data.packed:
      return [self.batch_spec(batch_size)]
    equal = self.config.data.batch_of == 'tokens'
    return [self._spec(batch_size * (self.longest // length if equal else 1), length,
                       ('source', 'target')) for length in self.config.data.buckets]

  def batch_spec(self, batch_size):
    names = ['source', 'target']
    if self.config.data.packed:
      names += ['source_segments', 'target_segments']
    return self._spec(batch_size, self.longest, names)

  def _spec(self, rows, length, names):
    return {**{name: jax.ShapeDtypeStruct((rows, length), np.int32) for name in names},
            'mask': jax.ShapeDtypeStruct((rows,), np.float32)}

  def transform(self, example, rng, train):
    del rng, train
    return {name: value for name, value in example.items() if name != 'pair'}

  # What the step computes.

  def init(self, rng):
    ids = jnp.zeros((1, 2), jnp.int32)
    return self.model.init(rng, ids, ids)['params']

  def loss(self, params, batch, rng, train):
    target = batch['target']
    segments = {name: value for name, value in batch.items() if name.endswith('_segments')}
    logits = self.model.apply({'params': params}, batch['source'], target, train=train,
                              rngs={'dropout': rng} if train else None, **segments)
    real = (target != 0) * batch['mask'][:, None]
    total = lambda each: (each * real).sum()
    tokens = real.sum()
    weight = tokens if self.config.model.loss_per == 'tokens' else batch['mask'].sum()
    # The authors' code gives the share to the other entries, not to all (tensor2tensor).
    share = self.config.model.label_smoothing * logits.shape[-1] / (logits.shape[-1] - 1)
    loss = total(losses.softmax_cross_entropy(logits, target, share)) / jnp.maximum(weight, 1)
    metrics = {'nll': (total(losses.softmax_cross_entropy(logits, target)), tokens)}
    if not train:
      metrics['accuracy'] = (total(logits.argmax(-1) == target), tokens)
    return loss, task.Aux(weight, metrics)

  def translate(self, params, source: jax.Array, rng: jax.Array, items: jax.Array) -> search.Found:
    """Searches, or draws, translations of sources int32 `[batch, length]`; call it under jit.

    Args:
      params: of the model.
      source: ids, each sentence with its end; 0 is padding.
      rng: key of the draws.
      items: int32 `[batch]`, numbers of the sentences: a draw depends on nothing else.
    """
    settings = self.config.eval.search
    model, params = self._unrolled(params)
    call = lambda method, *args: model.apply({'params': params}, *args, method=method)
    memory = call('encode', source)
    beams = settings.beams if settings.method == 'beam' else 1
    room = source.shape[1] + settings.extra
    state = call('begin', memory, beams, room)
    step = lambda tokens, state: call('step', tokens, state, memory)
    shared = dict(batch=len(source), limits=(source != 0).sum(-1) + settings.extra, room=room)
    if settings.method == 'beam':
      return search.beam_search(step, state, beams=beams, alpha=settings.alpha,
                                coverage=settings.coverage, source_mask=source != 0, **shared)
    return search.sample(step, state, rng=rng, items=items, temperature=settings.temperature,
                         top_k=settings.top_k, top_p=settings.top_p, **shared)

  def translate_batch(self, params, batch) -> dict[str, jax.Array]:
    """The best translations 'tokens' int32 `[batch, room]` of a batch with its `index`."""
    rng = jax.random.key(self.config.seed)
    return {'tokens': self.translate(params, batch['source'], rng, batch['index']).tokens[:, 0]}

  def _unrolled(self, params):
    if self.config.model.kind == 'transformer':
      return transformer.unrolled(self.model, params)
    return self.model, params

  def attention(self, params, source: jax.Array, target: jax.Array) -> jax.Array:
    """Attention of every token of a given translation to the source.

    Returns:
      float32 `[batch, maps, target_len, source_len]`: the Transformer's chosen layer, its mean over
      heads first and then each chosen head; a recurrent model's only one.
    """
    model, params = self._unrolled(params)
    if self.config.model.kind == 'transformer':
      shown = self.config.eval.search
      _, kept = model.apply({'params': params}, source, target, mutable=['intermediates'])
      layer = range(model.depth)[shown.layer]
      weights = kept['intermediates']['decoder'][f'{transformer.LAYERS}_{layer}'][
          'MultiHeadDotProductAttention_1']['attention'][0]
      heads = jnp.asarray(self.shown_heads, jnp.int32)
      return jnp.concatenate([weights.mean(1, keepdims=True), weights[:, heads]], axis=1)
    call = lambda method, *args: model.apply({'params': params}, *args, method=method)
    memory = call('encode', source)

    def body(state, tokens):
      _, state, weights = call('step', tokens, state, memory)
      return state, weights
    fed = transformer.shift_right(target)
    _, weights = jax.lax.scan(body, call('begin', memory, 1, target.shape[1]), fed.T)
    return weights.swapaxes(0, 1)[:, None]

  @property
  def shown_heads(self) -> list[int]:
    """Heads whose attention is drawn one by one."""
    if self.config.model.kind == 'recurrent':
      return []
    return list(self.config.eval.search.heads or range(self.config.model.heads))

  # Use.

  def evaluators(self):
    splits, found = self.config.data.splits, {}
    if splits.validation:
      found['validation'] = scoring.Perplexity('validation')
    for split in ([splits.test] if splits.test else []) + list(splits.extra):
      name = 'test' if split == splits.test else split
      found[name] = scoring.Perplexity(name, every='end')
      found[f'{name}_translated'] = scoring.Translated(name, every=self.config.eval.translate)
    return found

  def open_weights(self, path):
    return marian.open_weights(path, self.config)

  def adapt(self, weights, params_shape, transfer):
    return marian.adapt(weights, params_shape, transfer)

  def export(self, params, path):
    folder = marian.write(params, path, self.config, self.vocabularies)
    self.texts.save_vocabularies(folder)
    return folder

  def predict(self, params, inputs, out):
    """Translates the lines of the text file `inputs`.

    Leaves translations.txt, a line for a line, and pictures of the first alignments.
    """
    lines = _read_lines(inputs)
    coded = [ids + [vocabulary.EOS] for ids in self.vocabularies['source'].encode(lines)]
    for number, ids in enumerate(coded, 1):
      if len(ids) > self.longest:
        raise UserError(f'{inputs}, line {number}: {len(ids)} tokens; this model translates '
                        f'sentences of at most {self.longest} (config.data.buckets)')
    translate = jax.jit(self.translate)
    rng, rows = jax.random.key(self.config.seed), self.config.eval.batch_size or 16
    records: list[dict[str, Any]] = [{'line': n, 'source': line, 'translation': '', 'score': 0.0}
                                     for n, line in enumerate(lines, 1)]
    tokens: dict[int, np.ndarray] = {}
    buckets = np.searchsorted(self.config.data.buckets, [len(ids) for ids in coded])
    buckets[[not line.strip() for line in lines]] = -1
    for bucket in np.unique(buckets[buckets >= 0]):
      length, members = self.config.data.buckets[bucket], np.flatnonzero(buckets == bucket).tolist()
      for start in range(0, len(members), rows):
        part = members[start:start + rows]
        source = np.zeros((rows, length), np.int32)
        for row, member in enumerate(part):
          source[row, :len(coded[member])] = coded[member]
        items = np.zeros(rows, np.int32)
        items[:len(part)] = part
        found = jax.device_get(translate(params, source, rng, items))
        for row, member in enumerate(part):
          tokens[member] = found.tokens[row, 0]
          records[member]['score'] = float(found.scores[row, 0])
          records[member]['translation'] = self.vocabularies['target'].decode(tokens[member])
    (out / 'translations.txt').write_text(''.join(f'{r["translation"]}\n' for r in records),
                                          encoding='utf-8')
    if self.has_attention:
      for member in sorted(tokens)[:self.config.eval.search.pictures]:
        records[member]['picture'] = f'line_{member + 1}.png'
        self.draw_alignment(params, coded[member], tokens[member],
                            out / records[member]['picture'])
    return records

  @property
  def has_attention(self) -> bool:
    return self.config.model.kind == 'transformer' or self.config.model.attention != 'none'

  @functools.cached_property
  def _attend(self):
    return jax.jit(self.attention)  # One program for all that are drawn.

  def draw_alignment(self, params, source: np.ndarray, target: np.ndarray,
                     path: pathlib.Path) -> None:
    """Draws where a translation looked.

    Args:
      params: of the model.
      source: int `[n]`, a source with its end.
      target: int `[m]`, its translation; what follows its end is ignored.
      path: of the picture.
    """
    ends = np.flatnonzero(target == vocabulary.EOS)
    # Cut at its limit it has no end, but room after it.
    count = ends[0] + 1 if len(ends) else np.flatnonzero(target)[-1] + 1 if target.any() else 1
    padded = np.zeros((1, self.longest), np.int32), np.zeros((1, self.room), np.int32)
    padded[0][0, :len(source)], padded[1][0, :count] = source, target[:count]
    maps = np.asarray(self._attend(params, *padded))[0, :, :count, :len(source)]
    titles = ['mean of heads', *(f'head {head}' for head in self.shown_heads)]
    pictures.alignment(
        path, self.vocabularies['source'].pieces(source),
        self.vocabularies['target'].pieces(target[:count]), maps, titles if len(maps) > 1 else [''])


def _read_lines(path: pathlib.Path) -> list[str]:
  if path.is_dir():
    raise UserError(f'--input={path} is a folder; give a text file, a sentence a line')
  lines = []
  data = path.read_bytes().removeprefix(b'\xef\xbb\xbf')  # The mark that Windows programs write.
  for number, line in enumerate(data.splitlines(), 1):
    try:
      lines.append(line.decode('utf-8'))
    except UnicodeDecodeError as e:
      raise UserError(f'{path}, line {number}: not UTF-8 ({e.reason} at byte {e.start})') from e
  if not any(line.strip() for line in lines):
    raise UserError(f'{path} has no sentence')
  return lines
