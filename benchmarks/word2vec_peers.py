"""gensim's Word2Vec, torch_geometric's MetaPath2Vec and the authors' walks, for
benchmarks/metapath2vec.py: run by the Python of an environment that has them, with the folder that
the benchmark left its graph and walks in. It imports nothing of ours."""

import functools
import json
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np


def serve(commands: Mapping[str, Callable]) -> None:
  """Answers every line of JSON that comes in: {'do': a command, and its arguments}."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # What libraries print is no answer.
  for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(commands[asked.pop('do')](**asked)), file=answers, flush=True)


class Peers:
  """What can be asked for. The folder has walks.npy, int32 [walks, tokens], -1 behind dead ends;
  and graph.npz: int64 `sizes` [3] of authors, papers and venues, edges `author_paper` and
  `paper_venue` [2, edges], each type's nodes from 0, and `starts`, authors that walks start at."""

  def __init__(self, folder: pathlib.Path):
    self._walks = np.load(folder / 'walks.npy', allow_pickle=False)
    with np.load(folder / 'graph.npz', allow_pickle=False) as arrays:
      self._graph = dict(arrays)

  @functools.cached_property
  def _sentences(self) -> list[list[str]]:
    return [[str(id) for id in walk if id >= 0] for walk in self._walks.tolist()]

  def gensim(self, workers: int, save: str, **settings) -> dict:
    """One pass over the walks; leaves vectors [nodes, dim] where `save` says, unless it is ''."""
    from gensim.models import Word2Vec
    model = Word2Vec(sg=1, shrink_windows=False, sample=0, min_count=1, workers=workers, **settings)
    model.build_vocab(self._sentences)
    start = time.perf_counter()
    model.train(self._sentences, total_examples=len(self._sentences), epochs=1)
    seconds = time.perf_counter() - start
    if save:
      vectors = np.zeros((self._graph['sizes'].sum(), model.vector_size), np.float32)
      vectors[[int(word) for word in model.wv.index_to_key]] = model.wv.vectors
      np.save(save, vectors, allow_pickle=False)
    return {'seconds': seconds}

  def _pyg(self, **settings):
    import torch
    from torch_geometric.nn import MetaPath2Vec
    path = [('author', 'to', 'paper'), ('paper', 'to', 'venue'),
            ('venue', 'to', 'paper'), ('paper', 'to', 'author')]
    edges = [torch.from_numpy(self._graph[name]) for name in ('author_paper', 'paper_venue')]
    edges += [edges[1].flip(0), edges[0].flip(0)]
    sizes = dict(zip(('author', 'paper', 'venue'), self._graph['sizes'].tolist()))
    return MetaPath2Vec(dict(zip(path, edges)), metapath=path, num_nodes_dict=sizes, sparse=True,
                        **settings)

  def pyg_walks(self, tokens: int) -> dict:
    """A walk from every start. The only window is the walk, so nothing is cut into pieces."""
    import torch
    model = self._pyg(embedding_dim=1, walk_length=tokens - 1, context_size=tokens)
    starts = torch.from_numpy(self._graph['starts'])
    start = time.perf_counter()
    found = model._pos_sample(starts)  # pylint: disable=protected-access
    return {'seconds': time.perf_counter() - start, 'steps': len(found) * (tokens - 1)}

  @functools.cached_property
  def _trained(self):
    import torch
    model = self._pyg(embedding_dim=128, walk_length=50, context_size=7, walks_per_node=5,
                      num_negative_samples=5)
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=.01)

    def batches():
      while True:
        yield from model.loader(batch_size=128, shuffle=True, drop_last=True)
    return model, optimizer, batches()

  def pyg_train(self, steps: int) -> dict:
    """Steps of training with the settings of the library's example, its loader included."""
    model, optimizer, batches = self._trained
    pairs, start = 0, time.perf_counter()
    for _ in range(steps):
      found = next(batches)
      optimizer.zero_grad()
      model.loss(*found).backward()
      optimizer.step()
      pairs += found[0].shape[0] * (found[0].shape[1] - 1)
    return {'seconds': time.perf_counter() - start, 'pairs': pairs, 'tokens': steps * 128 * 5 * 51}

  def authors_walks(self, steps: int) -> dict:
    """What the authors' py4genMetaPaths.py does, written after its description: lines 'venue author
    venue ...' of 201 tokens from every venue, about `steps` steps in all."""
    venue_of = {paper: f'v{venue}' for paper, venue in self._graph['paper_venue'].T.tolist()}
    authors, venues = {}, {}  # Of each venue, and of each author, once for every paper.
    for author, paper in self._graph['author_paper'].T.tolist():
      if paper in venue_of:
        authors.setdefault(venue_of[paper], []).append(f'a{author}')
        venues.setdefault(f'a{author}', []).append(venue_of[paper])
    walks = max(steps // (len(authors) * 200), 1)
    start = time.perf_counter()
    with open(os.devnull, 'w', encoding='utf-8') as file:
      for first in list(authors) * walks:
        line = venue = first
        for _ in range(100):
          author = random.choice(authors[venue])
          venue = random.choice(venues[author])
          line += ' ' + author + ' ' + venue
        file.write(line + '\n')
    return {'seconds': time.perf_counter() - start, 'steps': len(authors) * walks * 200}


if __name__ == '__main__':
  peers = Peers(pathlib.Path(sys.argv[1]))
  serve({name: getattr(peers, name)
         for name in ('gensim', 'pyg_walks', 'pyg_train', 'authors_walks')})
