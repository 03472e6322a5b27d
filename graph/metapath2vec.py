"""metapath2vec and metapath2vec++, and DeepWalk beside them; the task behind
configs/metapath2vec.py."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn

from core import partition, step, task
from core.config import UserError, choose
from graph import evaluation, metapath, neighbours, network, pictures, skipgram, trips, vectors
from graph import walk_files

SAMPLERS = ('device', 'host')
EXPORTS = ('text', 'binary')


class Tables(nn.Module):
  """The embeddings: `input` (what is exported) and `output`, float32 `[rows, dim]`.

  `counts` int32 `[rows]` is no parameter: how often each node has been a token of a walk.
  """
  rows: int
  dim: int

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """int32 `[...]` -> `[..., dim]`, rows of the input table."""
    # As in word2vec: the one small and random, the other zero.
    def uniform(key, shape):
      return (jax.random.uniform(key, shape) - .5) / self.dim
    split = lambda init, *rest: nn.with_logical_partitioning(init, ('vocab', *rest))
    shape = (self.rows, self.dim)
    table = self.param('input', split(uniform, None), shape)
    self.param('output', split(nn.initializers.zeros, None), shape)
    self.param('counts', split(nn.initializers.zeros), (self.rows,), jnp.int32)
    return table[ids]


class Task(task.Task):
  """Skip-gram on random walks. An epoch is one walk from every node of the path's first type.

  The loss is the mean over pairs (centre, context) of eq. 2 or 6 with its M negatives, in nats.
  """

  constants = '^counts$'

  def __init__(self, config):
    super().__init__(config)
    model, data, optim = config.model, config.data, config.optim
    choose('config.model.negatives_from', model.negatives_from, skipgram.NEGATIVES)
    choose('config.model.export', model.export, EXPORTS)
    choose('config.data.sampler', data.sampler, SAMPLERS)
    for group, names in ((model, ('dim', 'window', 'negatives', 'walks_per_update', 'rows_multiple',
                                  'min_count')), (data, ('block',))):
      for name in names:
        if group[name] < 1:
          key = 'model' if group is model else 'data'
          raise UserError(f'config.{key}.{name}={group[name]}; it must be at least 1')
    if model.length < 2:
      raise UserError(f'config.model.length={model.length}; a walk has at least 2 tokens')
    for name in ('shared_negatives', 'walks_per_draw', 'row_cap', 'sample', 'power', 'piece'):
      if model[name] < 0:
        raise UserError(f'config.model.{name}={model[name]}; it must not be negative')
    if (config.batch_size * data.block) % model.walks_per_update:
      raise UserError(
          f'config.batch_size={config.batch_size} blocks of config.data.block={data.block} walks '
          f'do not divide into updates of config.model.walks_per_update={model.walks_per_update}')
    if model.walks_per_draw and model.walks_per_update % model.walks_per_draw:
      raise UserError(
          f'config.model.walks_per_update={model.walks_per_update} walks do not divide into sets '
          f'of config.model.walks_per_draw={model.walks_per_draw} that share negatives')
    plain = (optim.name == 'sgd' and not optim.args.get('momentum', .9) and not optim.clip_norm
             and not optim.weight_decay and not optim.lr_multipliers and not optim.freeze)
    if not plain or config.accum != 1 or config.ema:
      raise UserError(
          'rows are updated alone, so what would touch whole tables is not there: config.optim '
          'must be sgd with args.momentum=0 and without clip_norm, weight_decay, lr_multipliers '
          'and freeze, config.accum=1 and config.ema=0')

  # The graph, and what of it the config says when it is not here.

  @functools.cached_property
  def graph(self) -> network.Graph:
    if self.workdir is not None and jax.process_index() == 0:
      # The number of rows is wanted before anything else, so the data is read here.
      network.prepare(self.config.data, self.workdir)
    graph = network.find(self.config.data, self.workdir)
    sizes = tuple(zip(graph.types, np.diff(graph.offsets).tolist()))
    declared = tuple(map(tuple, self.config.model.nodes))
    if declared and declared != sizes:
      raise UserError(f'config.model.nodes={declared}, but {self.config.data.name!r} has {sizes}; '
                      'without it the data is counted')
    return graph

  @functools.cached_property
  def sizes(self) -> Mapping[str, int]:
    """Nodes of each type, in the order of their ids."""
    declared = self.config.model.nodes
    if declared:
      return dict(declared)
    return dict(zip(self.graph.types, np.diff(self.graph.offsets).tolist()))

  @property
  def nodes(self) -> int:
    return sum(self.sizes.values())

  @functools.cached_property
  def _links(self) -> tuple[metapath.Link, ...]:
    model = self.config.model
    if model.nodes:
      return metapath.links_from(self.sizes, model.edges)
    return metapath.links_of(self.graph.relations)

  @functools.cached_property
  def trips(self) -> list[trips.Trip]:
    """What walks go along."""
    model = self.config.model
    return trips.make(model.metapath, model.length, model.keep, self._links, self.sizes,
                      lambda: self.graph)

  @functools.cached_property
  def expected(self) -> np.ndarray:
    """float64 `[nodes]`: how often each is a token in an epoch, on average."""
    if self.config.data.walks:
      ids = self._written[self._written >= 0]
      found = np.bincount(ids, minlength=len(self.graph)).astype(np.float64)
      for name, group in zip(self.sizes, self._groups.of_type):
        if group < 0 and found[self.graph.nodes_of(name)].any():
          raise UserError(f'{self.config.data.walks} has nodes of type {name!r}, which is not '
                          f'among {", ".join(self._group_names)}; name its types in '
                          'config.model.keep')
    else:
      found = sum(trip.visits() for trip in self.trips)
    for first, size, name in zip(self._groups.first, self._groups.size, self._group_names):
      if not found[first:first + size].any():
        if self.config.data.walks:
          raise UserError(f'{self.config.data.walks} has no node of type {name!r}; name its types '
                          'in config.model.keep')
        raise UserError(f'no walk along {self.config.model.metapath!r} ever comes to '
                        f'{f"a node of type {name!r}" if name else "a node"}, so there is nothing '
                        'to draw its negatives from')
    return found

  @property
  def _group_names(self) -> list[str]:
    if self.config.model.negatives_from == 'all':
      return ['']
    on_paths = {name for trip in self.trips for name in trip.route.path.types or self.sizes}
    return [name for name in self.sizes if name in (self.config.model.keep or on_paths)]

  @functools.cached_property
  def _groups(self) -> skipgram.Groups:
    ends = np.cumsum(list(self.sizes.values())).tolist()
    names, types = self._group_names, list(self.sizes)
    if names == ['']:
      return skipgram.Groups((0,), (self.nodes,), tuple(ends), (0,) * len(ends))
    at = [types.index(name) for name in names]
    return skipgram.Groups(tuple(ends[i] - self.sizes[types[i]] for i in at),
                           tuple(self.sizes[types[i]] for i in at), tuple(ends),
                           tuple(names.index(name) if name in names else -1 for name in types))

  @functools.cached_property
  def _written(self) -> np.ndarray:
    if self.workdir is not None and jax.process_index() == 0:
      # As of the graph: how many there are says how long an epoch is.
      walk_files.prepare(self.config, self.graph, self.workdir)
    return walk_files.find(self.config, self.workdir, len(self.graph))

  def prepare(self):
    self.graph  # pylint: disable=pointless-statement
    self.expected  # Says what the path cannot do.  # pylint: disable=pointless-statement

  def dataset(self, split):
    choose('split', split, ('train',))
    if self.config.data.walks:
      return trips.Blocks([self._written], self.config.data.block, 'walks')
    return trips.Blocks([trip.starts for trip in self.trips], self.config.data.block, 'starts')

  def transform(self, example, rng, train):
    del train
    if 'starts' in example and self.config.data.sampler == 'host':
      trip = self.trips[example.get('trip', 0)]
      return {'walks': trip.sample_host(rng, example['starts'])}
    return example

  # What the step computes.

  def batch_spec(self, batch_size):
    shape = (batch_size, self.config.data.block)
    mask = jax.ShapeDtypeStruct((batch_size,), np.float32)
    if self.config.data.sampler == 'host' or self.config.data.walks:
      return {'walks': jax.ShapeDtypeStruct((*shape, self.config.model.length), np.int32),
              'mask': mask}
    by_turns = {'trip': jax.ShapeDtypeStruct((batch_size,), np.int32)} if self.trips[1:] else {}
    return {'starts': jax.ShapeDtypeStruct(shape, np.int32), **by_turns, 'mask': mask}

  @property
  def _on_device(self) -> bool:
    return self.config.data.sampler == 'device' and not self.config.data.walks

  def resident_spec(self):
    found = {'accept': jax.ShapeDtypeStruct((self.nodes,), np.float32),
             'alias': jax.ShapeDtypeStruct((self.nodes,), np.int32)}
    if self.config.model.sample:
      found['kept'] = jax.ShapeDtypeStruct((self.nodes,), np.float32)
    if self._on_device:
      found |= trips.device_spec(self.trips, self._links, self.sizes)
    return found

  def resident(self):
    found = dict(zip(('accept', 'alias'), skipgram.noise(
        self.expected, self._groups.first, self._groups.size, self.config.model.power)))
    if self.config.model.sample:
      found['kept'] = skipgram.kept(self.expected, self.config.model.sample)
    if self._on_device:
      found |= trips.device_arrays(self.trips)
    return found

  @functools.cached_property
  def model(self) -> Tables:
    multiple = self.config.model.rows_multiple
    return Tables(-(-self.nodes // multiple) * multiple, self.config.model.dim)

  def init(self, rng):
    return self.model.init(rng, jnp.zeros((1,), jnp.int32))['params']

  @functools.cached_property
  def objective(self) -> skipgram.Objective:
    model = self.config.model
    groups = len(self._groups.first)
    if 0 < model.shared_negatives < groups:
      raise UserError(f'config.model.shared_negatives={model.shared_negatives}: there are {groups} '
                      'groups to draw some of each from; 0 draws for every pair')
    tokens = (model.walks_per_draw or model.walks_per_update) * (model.piece or model.length)
    terms = tokens * 2 * model.window * model.negatives / (model.shared_negatives or np.inf)
    if 0 < model.row_cap < terms:
      # On DBLP NMI falls from .78 to .16 where these are 437 and 128.
      logging.warning(
          'a shared negative stands for %.0f terms of the loss, but config.model.row_cap=%g moves '
          'its row as if for %g: nodes are pushed apart less than they are pulled together, which '
          'costs quality; take more shared_negatives or fewer walks_per_draw', terms, model.row_cap,
          model.row_cap)
    return skipgram.Objective(model.window, model.negatives, model.negatives_from, self._groups,
                              model.shared_negatives, np.dtype(self.config.precision))

  def walks(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The walks of a batch, int32 `[walks, tokens]`, -1 behind dead ends and for dropped tokens."""
    drawn, dropped = jax.random.split(key)
    if self._on_device:
      found = trips.sample(drawn, self.trips, batch)
    else:
      found = batch['walks'].reshape(-1, self.config.model.length)
    if self.config.model.sample:
      found = skipgram.subsample(dropped, found, batch['kept'])
    return partition.constrain(found, ('batch', None))

  def loss(self, params, batch, rng, train):
    del train
    key, negative = jax.random.split(rng)
    found = self.walks(key, batch)
    tables = batch['accept'], batch['alias']
    if self.objective.shared:
      drawn = self.objective.draw_shared(negative, (1,), *tables)
    else:
      drawn = self.objective.draw_own(negative, found, *tables)
    loss, pairs = self.objective.loss(params, found, drawn)
    return loss, task.Aux(pairs, {})

  def update(self, state, batch, rng, optimizer: optax.GradientTransformation):
    """Goes through the walks of a batch by a few tokens of a few walks, each time updating the rows
    that occur: many small steps, as the paper's Algorithm 1 takes them."""
    model, params, objective = self.config.model, state.params, self.objective
    key, negative = jax.random.split(rng)
    found = self.walks(key, batch)
    # Tokens of one walk are often the same few nodes. An update on a piece of each of several walks
    # moves the same rows less often at once than one on a whole walk.
    halo = model.window if 0 < model.piece < model.length else 0
    some = step.microbatches(found, len(found) // model.walks_per_update)
    if halo:
      some = skipgram.pieces(some, model.piece, halo).swapaxes(0, 1)
      some = some.reshape(-1, *some.shape[2:])
    # What a plain optimizer makes of a gradient of one is the step's length.
    length, opt_state = optimizer.update(jnp.ones(()), state.opt_state)
    noise = batch['accept'], batch['alias']
    # What is small is drawn at once; negatives for every pair are not small.
    sets = model.walks_per_update // (model.walks_per_draw or model.walks_per_update)
    draws = (objective.draw_shared(negative, (len(some), sets), *noise) if objective.shared
             else jax.random.split(negative, len(some)))

    def once(carry, x):
      tables, scratch = carry
      some, drawn = x
      if not objective.shared:
        drawn = objective.draw_own(drawn, some, *noise, halo)
      *rows, loss, pairs = objective.gradients(tables, some, drawn, halo)
      for name, one in zip(('input', 'output'), rows):
        tables[name], scratch = skipgram.descend(tables[name], scratch, one, -length, model.row_cap)
      return (tables, scratch), (loss, pairs)
    carry = {name: params[name] for name in ('input', 'output')}, jnp.zeros(self.model.rows)
    (tables, _), (loss, pairs) = jax.lax.scan(once, carry, (some, draws))

    there = found >= 0
    counts = params['counts'].at[jnp.where(there, found, 0)].add(there.astype(jnp.int32))
    tokens = there.sum(1)
    began = (tokens > 0).sum().astype(jnp.float32)
    metrics = {'loss': (loss.sum(), pairs.sum()),
               'tokens_per_walk': (tokens.sum().astype(jnp.float32), began)}
    if not self.config.data.walks and not model.sample:
      stopped = ((tokens > 0) & (tokens < model.length)).sum().astype(jnp.float32)
      metrics['dead_ends'] = (stopped, began)
    return state.replace(params={**tables, 'counts': counts}, opt_state=opt_state), metrics

  # Use.

  def counts(self, params) -> np.ndarray:
    """int32 `[nodes]`: how often each node was a token."""
    return _on_host(params['counts'])[:len(self.graph)]

  def occurs(self, params) -> np.ndarray:
    """bool `[nodes]`: which nodes have an embedding."""
    return self.counts(params) >= self.config.model.min_count

  def vectors(self, params) -> np.ndarray:
    """float32 `[nodes, dim]`."""
    return _on_host(params['input'])[:len(self.graph)]

  def evaluators(self):
    found: dict[str, Any] = {}
    found['classification'] = evaluation.Classification(self)
    found['clustering'] = evaluation.Clustering(self)
    found['similarity'] = neighbours.Similarity(self)
    found['projection'] = pictures.Projection(self)
    return found

  def predict(self, params, inputs, out):
    return neighbours.predict(self, params, inputs, out)

  def open_weights(self, path):
    return vectors.open_weights(path, self.graph.tokens, self.model.rows)

  def export(self, params, path: pathlib.Path):
    occurs = self.occurs(params)
    if not occurs.any():
      raise UserError('no node has occurred in a walk yet, so there is no embedding to export')
    write, ending = {'text': (vectors.write_text, '.txt'),
                     'binary': (vectors.write_binary, '.bin')}[self.config.model.export]
    path = path.with_suffix(ending)
    write(path, self.graph.tokens[occurs], self.vectors(params)[occurs])
    return path


def _on_host(x) -> np.ndarray:
  """A parameter as numpy on every host. All hosts must call."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    from jax.experimental import multihost_utils  # only where there are several hosts
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
