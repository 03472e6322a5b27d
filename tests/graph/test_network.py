"""From tables to arrays, and the file that keeps them."""

import itertools
import json

import ml_collections
import numpy as np
import pytest
from absl import logging

from core.config import UserError
from graph import network, planted, tables


def settings(name='planted', **changes):
  return ml_collections.ConfigDict(
      dict(name=name, types={}, relations=(), labels='', min_degree={}) | changes)


def table(pairs, weights=None, labels=None):
  """Authors a, b, c, d and venues x, y, z with edges 'ax by', and those of authors 'a>b'."""
  places = {name: i for names in ('abcd', 'xyz') for i, name in enumerate(names)}
  venues = [pair for pair in pairs.split() if '>' not in pair]
  authors = [pair.split('>') for pair in pairs.split() if '>' in pair]
  weights = None if weights is None else np.array(weights)
  edges = [tables.Edges('author-venue', 'author', 'venue',
                        *np.array([[places[a], places[v]] for a, v in venues]).T, weights)]
  if authors:
    edges.append(tables.Edges('author-cites-author', 'author', 'author',
                              *np.array([[places[a], places[b]] for a, b in authors]).T))
  return tables.Table({'author': list('abcd'), 'venue': list('xyz')}, edges, labels or {})


def listed(graph, relation):
  """'source target' names of every edge in the order of the arrays."""
  rows = np.repeat(np.arange(len(relation.source_ids)), np.diff(relation.ptr))
  return ' '.join(graph.names[relation.source_ids.start + row] + graph.names[col]
                  for row, col in zip(rows, relation.col))


def labels_of(graph):
  return {str(name): [graph.label_names[i] for i in graph.label_col[slice(*ptr)]]
          for name, *ptr in zip(graph.names, graph.label_ptr[:-1], graph.label_ptr[1:])
          if ptr[0] < ptr[1]}


def test_edges_are_sorted_and_numbered_globally():
  graph = network.build(table('cz ay bx ax ay', labels={
      'venue': {1: ['10', '9', '9', 'b']}, 'author': {2: ['a']}}))
  assert graph.types == ('author', 'venue') and len(graph) == 7
  assert graph.offsets.tolist() == [0, 4, 7] and ''.join(graph.names) == 'abcdxyz'
  relation, = graph.relations
  assert (relation.name, relation.source, relation.target) == ('author-venue', 'author', 'venue')
  assert relation.ptr.tolist() == [0, 3, 4, 5, 5] and relation.col.tolist() == [4, 5, 5, 4, 6]
  assert relation.weight is None and relation.source_ids == range(4)
  assert relation.target_ids == range(4, 7)
  assert listed(graph, relation) == 'ax ay ay bx cz'  # What is there twice stays twice.
  assert graph.label_names == ('9', '10', 'a', 'b')
  assert labels_of(graph) == {'y': ['9', '10', 'b'], 'c': ['a']}
  assert [a.dtype.name for a in (graph.offsets, relation.ptr, relation.col, graph.label_ptr,
                                 graph.label_col)] == ['int64', 'int64', 'int32', 'int64', 'int32']


def test_ids_and_types():
  graph = network.build(table('ax'))
  assert graph.type_of(np.array([[0, 3], [4, 6]])).tolist() == [[0, 0], [1, 1]]
  assert graph.type_of(4) == 1
  assert graph.nodes_of('venue') == slice(4, 7)
  with pytest.raises(UserError, match="unknown name 'venu'; did you mean 'venue'"):
    graph.nodes_of('venu')


def test_weights_follow_their_edges_both_ways():
  graph = network.build(table('cz ay bx ax', [1, 2, 3, 4.5]))
  relation, = graph.relations
  assert listed(graph, relation) == 'ax ay bx cz' and relation.weight.dtype == np.float32
  assert relation.weight.tolist() == [4.5, 2, 3, 1]
  back = relation.reversed()
  assert (back.name, back.source, back.target) == ('author-venue', 'venue', 'author')
  assert listed(graph, back) == 'xa xb ya zc' and back.weight.tolist() == [4.5, 3, 2, 1]
  assert network.build(table('cz ay', [7, 7])).relations[0].weight is None


@pytest.mark.parametrize('seed', range(5))
def test_reversed_against_dense_matrices(seed):
  rng = np.random.default_rng(seed)
  sources, targets = rng.integers(0, 9, 40), rng.integers(0, 6, 40)
  graph = network.build(tables.Table(
      {'z': ['only'], 'a': list(map(str, range(9))), 'b': list(map(str, range(6)))},
      [tables.Edges('r', 'a', 'b', sources, targets)]))
  dense = np.zeros((16, 16), int)
  np.add.at(dense, (sources + 1, targets + 10), 1)

  def matrix(relation):
    out = np.zeros((16, 16), int)
    for row, part in zip(relation.source_ids, itertools.pairwise(relation.ptr)):
      part = relation.col[slice(*part)]
      assert (np.diff(part) >= 0).all()
      np.add.at(out[row], part, 1)
    return out
  relation = graph.relations[0]
  np.testing.assert_array_equal(matrix(relation), dense)
  np.testing.assert_array_equal(matrix(relation.reversed()), dense.T)
  back = relation.reversed().reversed()
  np.testing.assert_array_equal(back.col, relation.col, strict=True)
  np.testing.assert_array_equal(back.ptr, relation.ptr, strict=True)


def test_types_are_renamed_and_relations_follow():
  graph = network.build(table('ax a>b', labels={'author': {0: ['l']}}),
                        {'author': 'person'}, {'person': 1})
  assert graph.types == ('person', 'venue') and labels_of(graph) == {'a': ['l']}
  assert [(r.name, r.source, r.target) for r in graph.relations] == [
      ('person-venue', 'person', 'venue'), ('person-cites-person', 'person', 'person')]
  names = {type: ['x'] for type in ('a-b', 'b-c')}
  one = np.zeros(1, np.int64)
  graph = network.build(tables.Table(names, [
      tables.Edges(name, 'a-b', 'b-c', one, one) for name in ('a-b-c', 'a-b-b-c', 'cites')]),
                        {'a-b': 'p', 'b-c': 'q'})
  assert [r.name for r in graph.relations] == ['a-b-c', 'p-q', 'cites']


def test_min_degree_drops_once_with_edges_and_labels():
  given = table('ax ay bx cy cz a>c', labels={'author': {0: ['1'], 1: ['2']}, 'venue': {2: ['3']}})
  graph = network.build(given, min_degree={'author': 2, 'venue': 2})
  # b has one edge and d none; x keeps one of two, and stays: that was counted before.
  assert ''.join(graph.names) == 'acxy' and labels_of(graph) == {'a': ['1']}
  assert graph.label_names == ('1',)
  assert [listed(graph, r) for r in graph.relations] == ['ax ay cy', 'ac']
  assert ''.join(network.build(given, min_degree={'venue': 2}).names) == 'abcdxy'
  weighted = network.build(table('ax ay bx', [1, 2, 3]), min_degree={'venue': 2})
  assert listed(weighted, weighted.relations[0]) == 'ax bx'
  assert weighted.relations[0].weight.tolist() == [1, 3]


@pytest.mark.parametrize('changes, words', [
    (dict(types={'autor': 'x'}), r"data\.types: unknown name 'autor'; did you mean 'author'"),
    (dict(types={'author': 'venue'}), "2 types would be called 'venue'"),
    (dict(types={'author': ''}), "types would be called ''"),
    (dict(types={'author': 'x'}, min_degree={'author': 1}), r"min_degree: unknown name 'author'"),
    (dict(min_degree={'author': 0}), r'min_degree\.author=0 is not'),
    (dict(min_degree={'author': '2'}), r"min_degree\.author='2' is not"),
    (dict(min_degree={'venue': 9}), r"min_degree=\{'venue': 9\}: there is no node of type 'venue'"),
    (dict(min_degree={'author': 3}), "there is no edge of relation 'author-cites-author'")])
def test_settings_that_do_not_fit(changes, words):
  with pytest.raises(UserError, match=words):
    network.build(table('ax ay bx cy a>d'), **changes)


def test_nothing_there_is_an_error():
  none = np.zeros(0, np.int64)
  with pytest.raises(UserError, match="^there is no edge of relation 'r'"):
    network.build(tables.Table({'a': ['x']}, [tables.Edges('r', 'a', 'a', none, none)]))
  with pytest.raises(UserError, match="^there is no node of type 'b'"):
    network.build(tables.Table({'a': ['x'], 'b': []}, []))


def named(**names):
  return network.build(tables.Table(names, []))


def test_find():
  graph = named(package=['scratch', 'Game', 'x:y', 'venue:z'], venue=['scratch', 'z', '\u017bar'])
  assert [graph.find(text) for text in (
      'Game', 'x:y', 'package:scratch', 'venue:scratch', 'venue:z', 'package:x:y', '\u017bar')] == [
          1, 2, 0, 4, 3, 2, 6]
  with pytest.raises(UserError, match="write one of 'package:scratch', 'venue:scratch'$"):
    graph.find('scratch')
  with pytest.raises(UserError, match="no node is called 'game1'; similar: 'Game'$"):
    graph.find('game1')
  with pytest.raises(UserError, match="called 'venue:scratc'; similar: 'scratch'$"):
    graph.find('venue:scratc')
  with pytest.raises(UserError, match="called 'venue:Game'; write NAME .* one of package, venue$"):
    graph.find('venue:Game')
  with pytest.raises(UserError, match="no node is called 'ame'; similar: 'Game'$"):
    graph.find('ame')
  with pytest.raises(UserError, match="no node is called ''"):
    graph.find('')


def test_similar_names_in_a_large_graph(monkeypatch):
  monkeypatch.setattr(network, '_COMPARED', 2)
  graph = named(a=['gamma', 'Beta 3', 'beta 1', 'alpha', 'BETA 0', 'beta 2'])
  with pytest.raises(UserError, match="called 'Beta1'; similar: 'Beta 3', 'beta 2'$"):
    graph.find('Beta1')  # Comes after all of 'beta '.
  with pytest.raises(UserError, match="called 'alphb'; similar: 'alpha'$"):
    graph.find('alphb')


def test_tokens():
  graph = named(author=['Jia  Wei Han', 'Li\u00a0\tX'], venue=['KDD', 'Jia Wei Han'])
  assert graph.tokens.tolist() == ['aJia_Wei_Han', 'aLi_X', 'vKDD', 'vJia_Wei_Han']
  assert named(paper=['x y'], package=['x y']).tokens.tolist() == ['paper:x_y', 'package:x_y']
  assert named(author=['x y'], venue=['x y', 'x_y_2', 'x_y', 'x  y']).tokens.tolist() == [
      'ax_y', 'vx_y', 'vx_y_2', 'vx_y_3', 'vx_y_4']


# --- find and prepare ----------------------------------------------------------------------------


def write(tmp_path):
  (tmp_path / 'nodes.tsv').write_text('type\tname\tlabel\na\t\u00e9 1\tr|s\na\t2\t\nb\t1\tr\n')
  (tmp_path / 'edges.tsv').write_text(
      'relation\tsource\ttarget\tweight\na-b\t\u00e9 1\t1\t2\na-b\t2\t1\t1\na-b\t2\t1\t.5\n'
      'a-a\t2\t2\t3\n')
  return settings(f'tsv:{tmp_path}')


def same(a, b):
  assert (a.types, a.label_names, a.made_of) == (b.types, b.label_names, b.made_of)
  for name in ('offsets', 'names', 'label_ptr', 'label_col'):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
  assert len(a.relations) == len(b.relations)
  for one, two in zip(a.relations, b.relations):
    for field in ('name', 'source', 'target', 'source_ids', 'target_ids'):
      assert getattr(one, field) == getattr(two, field)
    for field in ('ptr', 'col', 'weight'):
      x, y = getattr(one, field), getattr(two, field)
      assert (x is None) == (y is None)
      if x is not None:
        np.testing.assert_array_equal(x, y, strict=True)


def test_prepare_makes_a_graph_once_and_find_reads_it(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: said.append(text % values))
  data = write(tmp_path)
  data.types = {'a': 'c'}
  data.min_degree = {'b': 2}
  workdir = tmp_path / 'runs' / 'new'
  read = network.find(data, None)
  assert said.pop() == (
      f'read {data.name}: nodes: c 2, b 1; edges: c-b 3, c-c 1, of which 1 are there before; '
      'labelled: c 1, b 1; without an edge: none')
  network.prepare(data, workdir)
  assert len(said) == 1 and [p.name for p in workdir.iterdir()] == ['graph.npz']
  (tmp_path / 'edges.tsv').unlink()
  found = network.find(data, workdir)
  same(found, read)
  assert found.relations[0].weight.tolist() == [2, 1, .5] and found.relations[1].weight is None
  assert json.loads(found.made_of) == {'name': data.name, 'types': {'a': 'c'}, 'labels': '',
                                       'relations': [], 'min_degree': {'b': 2}}
  network.prepare(data, workdir)  # Is content with what is there.
  assert len(said) == 1


def test_isolated_nodes_are_said(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: said.append(text % values))
  data = write(tmp_path)
  with (tmp_path / 'nodes.tsv').open('a') as file:
    file.write('a\t7\t\nb\t8\tq\nb\t9\t\n')
  network.find(data, None)
  assert said[0].endswith('labelled: a 1, b 2; without an edge: a 1, b 2')


def test_the_embedded_graph_needs_no_file(tmp_path):
  network.prepare(settings(), tmp_path)
  assert not list(tmp_path.iterdir())
  assert network.find(settings(), None) is planted.graph()
  for change in (dict(types={'author': 'a'}), dict(min_degree={'author': 2})):
    with pytest.raises(UserError, match="not for config.data.name='planted'"):
      network.find(settings(**change), None)


@pytest.mark.parametrize('change, words', [
    (dict(name='tsv:elsewhere'), r"name='tsv:.*' \(now 'tsv:elsewhere'\); use another --workdir"),
    (dict(types={'a': 'c'}), r"types=\{\} \(now \{'a': 'c'\}\)"),
    (dict(min_degree={'a': 1}, labels='class'), r"labels='' \(now 'class'\), min_degree="),
    (dict(relations=(('r', 'x', 'y'),)), r"relations=\[\] \(now \[\['r', 'x', 'y'\]\]\)")])
def test_a_graph_of_other_settings_is_refused(tmp_path, change, words):
  data = write(tmp_path)
  network.prepare(data, tmp_path)
  other = settings(**{'name': data.name} | change)
  for use in (network.find, network.prepare):
    with pytest.raises(UserError, match=words):
      use(other, tmp_path)


def test_relations_as_a_config_gives_them_are_the_same(tmp_path):
  data = write(tmp_path)
  data.relations = (('r', 'x', 'y'),)
  network.prepare(data, tmp_path)
  found = network.find(settings(data.name, relations=[['r', 'x', 'y']]), tmp_path)
  assert found.names.tolist() == network.load(tmp_path / 'graph.npz').names.tolist()


@pytest.mark.parametrize('change', [
    dict(offsets=np.array([0, 2, 4])), dict(offsets=np.array([0., 2, 3])),
    dict(ptr_0=np.array([0, 1])), dict(ptr_0=np.array([0, 2, 1])), dict(ptr_0=None),
    dict(col_0=np.array([2, 2, 3])), dict(col_0=np.array([2, 2, 1])), dict(col_1=None),
    dict(weight_0=np.array([1., 2])), dict(weight_1=None), dict(weight_0=np.array([1., 2, 0])),
    dict(weight_0=np.array([1., 2, np.nan])), dict(relations=np.array([['r', 'a', 'q']] * 2)),
    dict(relations=np.array(['r', 'a'])), dict(names=np.array([255], np.uint8)),
    dict(names=np.array(['a', 'b', 'c'])), dict(label_col=np.array([0, 1, 2], np.int32)),
    dict(label_ptr=np.array([0, 3])), dict(label_names=np.array(['r'])),
    dict(types=np.array(['a', None], object))])
def test_arrays_that_do_not_belong_together(tmp_path, change):
  network.prepare(write(tmp_path), tmp_path)
  with np.load(tmp_path / 'graph.npz') as found:
    arrays = dict(found) | change
  np.savez(tmp_path / 'graph.npz', **{k: v for k, v in arrays.items() if v is not None})
  with pytest.raises(UserError, match='damaged'):
    network.load(tmp_path / 'graph.npz')
