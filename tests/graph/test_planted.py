"""The embedded network, and that it is as hard as it says."""

import functools
import hashlib

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from graph import planted


def names(graph, ids):
  return graph.names[ids].tolist()


def edges(relation):
  """int `[edges, 2]`, global ids."""
  rows = np.repeat(np.array(relation.source_ids), np.diff(relation.ptr))
  return np.stack([rows, relation.col], 1)


def test_it_is_the_same_everywhere():
  graph = planted.graph()
  text = '\n'.join('|'.join(names(graph, pair)) for r in graph.relations for pair in edges(r))
  assert hashlib.sha256(text.encode()).hexdigest() == (
      '3a1eeb0e31611f77b9abe0e1346ab843c6484e774eced971ede794e99c2203c9')
  assert planted.graph() is graph


def test_what_it_has():
  graph = planted.graph()
  assert graph.types == ('author', 'paper', 'venue')
  assert graph.offsets.tolist() == [0, 800, 3200, 3220] and graph.made_of == ''
  assert names(graph, [123, 817, 3212]) == ['author 0123', 'paper 00017', 'venue 2-3']
  assert len(set(graph.tokens.tolist())) == 3220 and graph.tokens[123] == 'aauthor_0123'
  assert graph.find('venue 2-3') == 3212
  wrote, at = graph.relations
  assert [(r.name, r.source, r.target, r.weight) for r in graph.relations] == [
      ('paper-author', 'paper', 'author', None), ('paper-venue', 'paper', 'venue', None)]
  team = np.diff(wrote.ptr)
  assert np.bincount(team).tolist()[0] == 0 and set(team) == {1, 2, 3, 4}
  assert np.bincount(np.diff(at.ptr)).tolist() == [24, 2376]
  assert np.count_nonzero(np.bincount(wrote.col, minlength=800) == 0) == 10
  assert np.bincount(at.col - 3200, minlength=20).min() > 60
  for relation in graph.relations:  # No edge is there twice.
    assert len(np.unique(edges(relation), axis=0)) == len(relation.col)


def areas(graph):
  """The area of each node, -1 for none; int `[nodes]`."""
  there = np.diff(graph.label_ptr)
  assert there.max() == 1
  found = np.full(len(graph), -1)
  found[there == 1] = graph.label_col
  return found


def test_areas():
  graph = planted.graph()
  area = areas(graph)
  assert graph.label_names == ('area 0', 'area 1', 'area 2', 'area 3')
  assert area[3200:].tolist() == [int(name[6]) for name in names(graph, slice(3200, None))]
  assert (area[:800] >= 0).all() and (area[800:3200] == -1).all()
  assert np.bincount(area[:800]).min() > 150
  wrote, at = graph.relations
  venue_of = dict(edges(at).tolist())
  # .85 + .15 / 4 of papers are in the first author's area, .9 + .1 / 4 of venues in the paper's,
  # .75 + .25 / 4 of co-authors in the first author's.
  home = [area[author] == area[venue_of[paper]] for paper, author in edges(wrote).tolist()
          if paper in venue_of]
  assert .7 < np.mean(home) < .85
  pairs = [area[wrote.col[a:b]] for a, b in zip(wrote.ptr[:-1], wrote.ptr[1:]) if b - a == 2]
  assert .7 < np.mean([a == b for a, b in pairs]) < .88


def matrix(relation):
  """Chances of one step from each source to each target, float64 `[sources, targets]`."""
  out = np.zeros((len(relation.source_ids), len(relation.target_ids)))
  rows, cols = (edges(relation) - [relation.source_ids.start, relation.target_ids.start]).T
  np.add.at(out, (rows, cols), 1)
  return out / np.maximum(out.sum(1, keepdims=True), 1)


def nmi(round_, truth):
  """Of four clusters of authors, by where one to three rounds of a meta-path lead."""
  active = round_.sum(1) > 0
  round_, truth = round_[active][:, active], truth[active]
  reach = sum(np.linalg.matrix_power(round_, n) for n in (1, 2, 3))
  # How often one is reached against how often by chance, as skip-gram with 5 negatives has it.
  lift = np.log(np.maximum(reach / reach.sum(0) * len(reach) / 3 * 5, 1))
  u, s, _ = np.linalg.svd(lift)
  vectors = u[:, :32] * s[:32] ** .5
  vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
  return normalized_mutual_info_score(
      truth, KMeans(planted.AREAS, n_init=3, random_state=0).fit_predict(vectors))


def test_venues_tell_areas_and_who_writes_with_whom_does_not():
  graph = planted.graph()
  wrote, at = graph.relations
  step = functools.partial(functools.reduce, np.matmul)
  truth = areas(graph)[:800]
  authors = step([matrix(wrote.reversed()), matrix(wrote)])
  venues = step([matrix(wrote.reversed()), matrix(at), matrix(at.reversed()), matrix(wrote)])
  assert nmi(authors, truth) == pytest.approx(.11, abs=.05)
  assert nmi(venues, truth) == pytest.approx(.86, abs=.04)
