"""Files of graphs: tables with tabs between fields, and numbered nodes."""

import gzip

import ml_collections
import numpy as np
import pytest

from core.config import UserError
from graph import readers, tables


def read(name, **changes):
  return readers.read(ml_collections.ConfigDict(dict(name=name, relations=(), labels='') | changes))


def edges(table):
  """{relation: (source type, target type, 'source>target' names)}."""
  return {e.name: (e.source, e.target, ' '.join(
      f'{table.names[e.source][s]}>{table.names[e.target][t]}'
      for s, t in zip(e.sources, e.targets))) for e in table.edges}


@pytest.mark.parametrize('name, words', [
    ('tsf:x', r"config\.data\.name: unknown name 'tsf'; did you mean 'tsv'.*kg"),
    ('somewhere', "='somewhere': write 'planted', or FORMAT:PATH with FORMAT one of tsv, dat, a"),
    ('tsv:', "='tsv:': no such folder; write tsv:FOLDER"),
    ('dat:/no/where', 'no such folder'), ('authors:/no/where', 'no such folder'),
    ('kg:/no/where', 'a file NAME.kg'), ('kg:/no/where.kg', r'no/where\.kg: no such file')])
def test_names_that_mean_nothing(name, words):
  with pytest.raises(UserError, match=words):
    read(name)


# --- tsv -----------------------------------------------------------------------------------------


NODES = ['package\tscratch\tgames|web', 'package\t\u00e9t\u00e9 "x\u2028', 'maintainer\tscratch\t',
         'maintainer\tJ. Doe\t|', 'tag\tt\tx']
EDGES = ['package-maintainer\tscratch\tscratch',
         'package-maintainer\t\u00e9t\u00e9 "x\u2028\tJ. Doe']


def write(folder, nodes=NODES, edges=EDGES, header='relation\tsource\ttarget', end='\n'):
  nodes = [node + '\t' * (2 - node.count('\t')) for node in nodes]  # Without a label.
  for name, lines in (('nodes', ['type\tname\tlabel', *nodes]), ('edges', [header, *edges])):
    (folder / f'{name}.tsv').write_bytes(''.join(line + end for line in lines).encode())
  return f'tsv:{folder}'


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_tsv(tmp_path, end):
  table = read(write(tmp_path, end=end))
  assert table.names == {'package': ['scratch', '\u00e9t\u00e9 "x\u2028'],
                         'maintainer': ['scratch', 'J. Doe'], 'tag': ['t']}
  assert table.labels == {'package': {0: ['games', 'web']}, 'tag': {0: ['x']}}
  assert edges(table) == {'package-maintainer': (
      'package', 'maintainer', 'scratch>scratch \u00e9t\u00e9 "x\u2028>J. Doe')}
  assert table.edges[0].weights is None


def test_tsv_compressed_without_labels_with_weights_in_any_order_of_columns(tmp_path):
  (tmp_path / 'nodes.tsv.gz').write_bytes(gzip.compress(b'\xef\xbb\xbfname\ttype\na\tx\nb\tx\n'))
  (tmp_path / 'edges.tsv').write_text('weight\ttarget\tnote\tsource\trelation\n'
                                      '1e2\tb\t\ta\tx-x\n.5\ta\t!\ta\tx-x\n')
  table = read(f'tsv:{tmp_path}')
  assert table.names == {'x': ['a', 'b']} and not table.labels
  assert edges(table) == {'x-x': ('x', 'x', 'a>b a>a')}
  assert table.edges[0].weights.tolist() == [100, .5]


@pytest.mark.parametrize('relation, source, target, ends', [
    ('package-maintainer', 'scratch', 'scratch', ('package', 'maintainer')),
    ('maintainer-package', 'scratch', 'scratch', ('maintainer', 'package')),
    ('package-needs-package', 'scratch', 'scratch', ('package', 'package')),
    ('package-has-a-maintainer', 'scratch', 'scratch', ('package', 'maintainer')),
    ('has', 'p', 'J. Doe', ('package', 'maintainer')),
    ('package-tagged', 'p', 't', ('package', 'tag')),
    ('tag--package', 't', 'p', ('tag', 'package'))])
def test_ends_of_relations(tmp_path, relation, source, target, ends):
  found = edges(read(write(tmp_path, [*NODES, 'package\tp'], [f'{relation}\t{source}\t{target}'])))
  assert found == {relation: (*ends, f'{source}>{target}')}


def test_ends_that_the_name_tells_in_two_ways_are_those_of_the_names(tmp_path):
  nodes = ['a\tx', 'a-b\ty', 'c\tz', 'b-c\tw']
  found = edges(read(write(tmp_path, nodes, ['a-b-c\tx\tz', 'a-b-b-c\ty\tw'])))
  assert found == {'a-b-c': ('a', 'c', 'x>z'), 'a-b-b-c': ('a-b', 'b-c', 'y>w')}


@pytest.mark.parametrize('edge, words', [
    (['has\tscratch\tt'], r"edges\.tsv: the sources of relation 'has' are all of the types package"
                          ', maintainer; call it A-B or A-has-B'),
    (['has\tt\tp', 'has\tt\tJ. Doe'], "the targets of relation 'has' are of different types; call"),
    (['has\tt\tp', 'has\tt\tq'], r"edges\.tsv:3: no node is called 'q'"),
    (['has\tt\tp', 'has\tu\tt'], r"edges\.tsv:3: no node is called 'u'"),
    (['tag-package\tt\tp', 'package-tag\tp\tp'],
     r"edges\.tsv:3: no node of type 'tag' is called 'p'"),
    (['tag-package\tt'], r'edges\.tsv:2: 2 fields, not 3 as in its header'),
    (['tag-package\tt\tp\t1'], r'edges\.tsv:2: 4 fields, not 3'),
    (['tag-package\tt\tp', ''], r'edges\.tsv:3: 1 fields'),
    (['tag-package\tt\tp', 'tag-package\t\tp'], r'edges\.tsv:3: the source is empty'),
    (['\tt\tp'], r'edges\.tsv:2: the relation is empty'), ([], r'edges\.tsv has no edges below')])
def test_edges_that_are_wrong(tmp_path, edge, words):
  with pytest.raises(UserError, match=words):
    read(write(tmp_path, [*NODES, 'package\tp'], edge))


@pytest.mark.parametrize('weight', ['0', '-1', 'nan', 'inf', '', 'x', '1_0', '1e-60', '1e39'])
def test_weights_that_are_wrong(tmp_path, weight):
  lines = [f'package-tag\tscratch\tt\t{w}' for w in ('1', weight)]
  with pytest.raises(UserError, match=rf"edges\.tsv:3: the weight '{weight}' is not a positive"):
    read(write(tmp_path, NODES, lines, 'relation\tsource\ttarget\tweight'))


@pytest.mark.parametrize('nodes, words', [
    (['a\tx', 'b\tx', 'a\tx'], r"nodes\.tsv:4: a second a called 'x'"),
    (['a\tx\ty\tz'], r'nodes\.tsv:2: 4 fields, not 3'),
    (['a\t'], r'nodes\.tsv:2: the name is empty'),
    (['\tx'], r'nodes\.tsv:2: the type is empty'), ([], r'nodes\.tsv has no nodes below'),
    (['a\tx\0'], r'nodes\.tsv:2: a byte of value 0')])
def test_nodes_that_are_wrong(tmp_path, nodes, words):
  with pytest.raises(UserError, match=words):
    read(write(tmp_path, nodes))


@pytest.mark.parametrize('header, words', [
    ('relation\tsource', r"edges\.tsv: no column is called 'target'; its header is 'relation.tsou"),
    ('relation\tsource\ttarget\tsource', "several columns are called 'source'"),
    ('relation\tsource\ttarget\tweight\tweight', "several columns are called 'weight'"),
    ('', "no column is called 'relation'; its header is ''")])
def test_headers_that_are_wrong(tmp_path, header, words):
  with pytest.raises(UserError, match=words):
    read(write(tmp_path, header=header))


# --- dat -----------------------------------------------------------------------------------------


def put(folder, **files):
  for name, text in files.items():
    (folder / f'{name}.dat').write_text(text)
  return f'dat:{folder}'


def test_dat(tmp_path):
  table = read(put(tmp_path, p_a='2\t1\t1\n1\t3\t1\n2\t1\t1\n', p_v='3\t1\t.5\r\n1\t2\t2\r\n',
                   a_map_id='1\t70\n2\t80\n4\t2\n3\t1\n', a_label='80\tx y\n1\t2\n80\tz\n',
                   v_label='2\tw\n'))
  assert table.names == {'a': list('1234'), 'p': list('123'), 'v': list('12')}
  assert edges(table) == {'p-a': ('p', 'a', '2>1 1>3 2>1'), 'p-v': ('p', 'v', '3>1 1>2')}
  assert [e.weights.tolist() for e in table.edges] == [[1, 1, 1], [.5, 2]]
  assert table.labels == {'a': {1: ['x y', 'z'], 2: ['2']}, 'v': {1: ['w']}}


@pytest.mark.parametrize('files, words', [
    (dict(p_a='1\t0\t1\n'), r'p_a\.dat:1: nodes are numbered from 1'),
    (dict(p_a='1\t1\t1\n2\t1\t0\n'), r'p_a\.dat:2: the weight is not a positive'),
    (dict(p_a='1\t1\t1\n2\t1\t-1\n'), r'p_a\.dat:2: the weight'),
    (dict(p_a='1\t1\t1\n1\t1.5\t1\n'), r'p_a\.dat:2: an id is not a whole number'),
    (dict(p_a='1\t1\t1\n1\t-1\t1\n'), r'p_a\.dat:2: an id'),
    (dict(p_a='1\t1\t1\n1\t1e300\t1\n'), r'p_a\.dat:2: an id'),
    (dict(p_a='1\t1\t1\n1\t1\n'), r"p_a\.dat:2: not three numbers 'i j weight' with tabs"),
    (dict(p_a='1\t1\t1\n\n1\t1\t1\n'), r"p_a\.dat:2: '' is not three numbers"),
    (dict(p_a='1\t1\n1\t1\n'), r"p_a\.dat:1: '1.t1' is not three numbers"),
    (dict(p_a='1\t1\t1\n1\tx\t1\n'), r'p_a\.dat:2: not three numbers'),
    (dict(p_a='1\t1\t1\n1\t1\tnan\n'), r'p_a\.dat:2: not three numbers'),
    (dict(p_a=''), r'p_a\.dat is empty; its lines are three numbers'),
    (dict(p_a_b='1\t1\t1\n'), r'p_a_b\.dat: the name is not A_B\.dat'),
    (dict(pa='1\t1\t1\n'), r'pa\.dat: the name is not A_B\.dat'),
    (dict(p_label='1\t1\n'), 'has no relation: no file A_B.dat'), (dict(), 'has no relation'),
    (dict(p_a='1\t1\t1\n', q_label='1\t1\n'), "q_label.dat or q_map_id.dat, but no relation of"),
    (dict(p_a='1\t1\t1\n', p_label='1\tx\n2\tx\n'),
     r"p_label\.dat:2: there is no node with the id '2'"),
    (dict(p_a='1\t1\t1\n', p_map_id='1\t9\n', p_label='1\tx\n'), r'p_label\.dat:1: there is'),
    (dict(p_a='1\t1\t1\n', p_label='1 x\n'), r"p_label\.dat:1: '1 x' is not 'id label'"),
    (dict(p_a='1\t1\t1\n', p_label='1\t\n'), r"p_label\.dat:1: .* is not 'id label'"),
    (dict(p_a='1\t1\t1\n', p_map_id='1\t9\n0\t8\n'), r'p_map_id\.dat:2: nodes are numbered')])
def test_dat_that_is_wrong(tmp_path, files, words):
  with pytest.raises(UserError, match=words):
    read(put(tmp_path, **files))


# --- tables --------------------------------------------------------------------------------------


def test_numbers_are_read_whole(tmp_path):
  path = tmp_path / 'n'
  lines = np.random.default_rng(0).integers(0, 2**53, (70000, 2))  # More than one block.
  path.write_text('\n'.join(f'{a}\t{b}' for a, b in lines))
  found = tables.numbers(path, 2, 'two')
  assert found.dtype == np.float64 and (found == lines).all()
  text = path.read_text().split('\n')
  text[66001] = '12\tx'
  path.write_text('\n'.join(text))
  with pytest.raises(UserError, match=f'^{path}:66002: not two'):
    tables.numbers(path, 2, 'two')
  text[66001] = '12 13'
  path.write_text('\n'.join(text))
  with pytest.raises(UserError, match=f'^{path}:66002: not two'):
    tables.numbers(path, 2, 'two')
