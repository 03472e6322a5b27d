"""metapath2vec and metapath2vec++ (Dong, Chawla and Swami, 2017), with DeepWalk beside them.

configs/metapath2vec.py                an embedded network with planted areas, a minute on 2 cores
configs/metapath2vec.py:smoke          the same in seconds, for tests
configs/metapath2vec.py:DATA[,METHOD]  a method on a network; METHOD metapath2vec (default), pp
                                       (metapath2vec++), pp_released (its negatives as the released
                                       code has them) or deepwalk (no types)
configs/metapath2vec.py:own[,METHOD]   your own: --config.data.name=tsv:DIR and
                                       --config.model.metapath=type-type-type
"""

import ml_collections

from configs import common
from core.config import UserError, choose

METHODS = {'metapath2vec': 'all', 'pp': 'context', 'pp_released': 'centre', 'deepwalk': 'all'}

# `walks` from every node of the path's first type. Say where the files are with
# --config.data.name=FORMAT:PATH.
DATASETS = {
    # The paper's: every node kept, as its text has it; w=1000, l=100.
    'aminer': dict(name='authors:net_aminer', metapath='author-paper-venue-paper-author',
                   walks=1000, nodes=(('author', 1_693_531), ('paper', 3_194_405),
                                      ('venue', 3_883)),
                   edges=(('paper', 'author', 9_323_739), ('paper', 'venue', 3_194_405))),
    'dbis': dict(name='authors:net_dbis', metapath='author-paper-venue-paper-author', walks=1000),
    # The four areas of DBLP.
    'dblp': dict(name='dat:dblp', metapath='author-paper-venue-paper-author', walks=5,
                 types={'conference': 'venue', 'type': 'term'}),
    'debian': dict(name='tsv:debian_graph', metapath='PMP,PTP,PP', shared_negatives=256,
                   walks=2, shares=(.1, .5), repeats=3, clusterings=3, max_nodes=10_000),
    # Genres are what films are labelled with, so the relation that says them is left out.
    'films': dict(name='kg:ml-100k.kg', metapath='film-actor-film', walks=20,
                  relations=(('film.film.actor', 'film', 'actor'),
                             ('film.film.directed_by', 'film', 'director'),
                             ('film.film.written_by', 'film', 'writer')),
                  labels='class', min_degree={'actor': 2}),
    'own': dict(name='tsv:', metapath='', shared_negatives=256, walks=10),
}

# Both tables, 2 x 128 numbers a node; 853 rows fill up to a multiple of 1,024.
PARAMETERS = {'aminer': 256 * (1_693_531 + 3_194_405 + 3_883 + 853)}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config of one of the settings above."""
  if not arg or arg == 'smoke':
    return _planted(bool(arg))
  parts = arg.split(',')
  if len(parts) > 2:
    raise UserError(f'configs/metapath2vec.py:{arg}: write DATA[,METHOD], e.g. dblp,pp; data sets: '
                    f'{", ".join(DATASETS)}; methods: {", ".join(METHODS)}')
  data = choose('configs/metapath2vec.py data set', parts[0], DATASETS)
  config = _base()
  _use(config, (parts + ['metapath2vec'])[1])
  config.data.update(dict(name=data['name'], relations=data.get('relations', ()),
                          labels=data.get('labels', '')))
  config.data.types = ml_collections.ConfigDict(data.get('types', {}))
  config.data.min_degree = ml_collections.ConfigDict(data.get('min_degree', {}))
  if config.model.metapath != '*':
    config.model.metapath = data['metapath']
  config.steps = f'{data["walks"]} epochs'
  config.model.shared_negatives = data.get('shared_negatives', config.model.shared_negatives)
  for name in ('shares', 'repeats', 'clusterings', 'max_nodes'):
    config.eval[name] = data.get(name, config.eval[name])
  if parts[0] == 'aminer':
    _large(config, data)
  return config


def _use(config: ml_collections.ConfigDict, method: str) -> None:
  config.model.negatives_from = choose('configs/metapath2vec.py method', method, METHODS)
  if method == 'deepwalk':
    config.model.metapath = '*'


def _base() -> ml_collections.ConfigDict:
  """The paper's model and training (section 4.1), and its code's where the paper is silent."""
  config = common.base()
  config.task = 'graph.metapath2vec'
  config.model = ml_collections.ConfigDict(dict(
      metapath='',                  # see graph.metapath; '*' for any edge
      length=100,                   # tokens a walk
      keep=(),                      # types that become tokens; () for all
      dim=128, window=7, negatives=5,
      negatives_from='all',         # all, context (++), centre (++ as released)
      power=.75,                    # of counts, for negatives
      sample=0.,                    # word2vec's subsampling of frequent nodes; 0 is off
      walks_per_update=4, piece=25,  # rows move after so many tokens of so many walks; piece=0 is
                                    # all of their tokens; more suit larger devices
      shared_negatives=128,         # that walks share, more are slower and nearer to 0: every pair
                                    # has its own
      walks_per_draw=0,             # that share them; 0: all of an update
      row_cap=128.,                 # terms that move a row at once; 0 is off
      min_count=1,                  # nodes that occur less often have no embedding
      rows_multiple=1,              # rows are brought to a multiple, so that a mesh can split them
      nodes=(), edges=(),           # sizes of a graph that is not here, to compile for it
      export='text',                # text or binary, of word2vec
  ))
  config.data.update(dict(
      threads=1,
      types=ml_collections.ConfigDict(), min_degree=ml_collections.ConfigDict(),
      relations=(), labels='',      # see graph.network
      walks='',                     # a file of walks, instead of drawing them
      sampler='device',             # device, or host: for graphs that no device holds
      block=32))                    # walks an example
  config.eval.update(dict(
      every='end', top=10, queries=(),
      shares=(.05, .1, .2, .3, .4, .5, .6, .7, .8, .9), repeats=10, clusterings=10,
      max_nodes=0))                 # labelled nodes that are measured; 0 is all
  config.batch_size = 16            # blocks
  config.optim.update(dict(name='sgd', args=dict(momentum=0.), lr=.025, clip_norm=0.))
  config.optim.schedule.update(dict(name='linear', warmup='0 steps', end_lr=2.5e-6))
  config.log_every = '2%'
  config.checkpoint.every = '10%'
  config.topology = 'v5e:2x4'
  return config


def _planted(smoke: bool) -> ml_collections.ConfigDict:
  config = _base()
  config.data.name = 'planted'
  config.model.update(dict(metapath='author-paper-venue-paper-author', dim=64, length=60))
  config.steps = '30 epochs'
  if smoke:
    common.smoke(config)
    config.update(dict(batch_size=8))
    config.data.block = 4
    config.model.update(dict(dim=16, length=12, window=3, walks_per_update=2, piece=6,
                             shared_negatives=48, row_cap=64.))
    config.optim.lr = .15  # Few tokens must do.
    config.eval.update(dict(shares=(.2, .5), repeats=2, clusterings=2))
  return config


def _large(config: ml_collections.ConfigDict, data) -> None:
  """Tables by rows over the slice; updates of a hundred thousand tokens."""
  config.model.update(dict(nodes=data['nodes'], edges=data['edges'], rows_multiple=1024,
                           walks_per_update=1024, piece=0, walks_per_draw=1))
  config.update(dict(batch_size=128, rules='fsdp'))
  config.data.examples = -(-dict(data['nodes'])['author'] // config.data.block)
  config.eval.max_nodes = 20_000
