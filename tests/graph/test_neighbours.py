"""Neighbours against sorting in Python, and what the evaluator and mode predict make of them."""

import re
import tracemalloc

import numpy as np
import pytest

from core.config import RunFailed, UserError
from graph import neighbours, pictures
from tests.graph import embedded


def by_sorting(vectors, id, candidates, occurs, top):
  """(id, cosine), best first, lower ids first among equals."""
  cosine = lambda a, b: np.dot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)
  vectors = vectors.astype(np.float64)
  found = [(-round(cosine(vectors[id], vectors[other]), 6), other) for other in candidates
           if occurs[other] and other != id]
  return [(other, -negative) for negative, other in sorted(found)[:top]]


@pytest.mark.parametrize('queries, few, elements', [(1024, 64, 1 << 22), (3, 2, 24)])
@pytest.mark.parametrize('candidates', [slice(0, 50), slice(17, 42), slice(5, 9)])
def test_nearest(monkeypatch, queries, few, elements, candidates):
  """In one block and in many; of small whole numbers, so that there are ties, and zeros."""
  monkeypatch.setattr(neighbours, '_QUERIES', queries)
  monkeypatch.setattr(neighbours, '_FEW', few)
  monkeypatch.setattr(neighbours, '_ELEMENTS', elements)
  rng = np.random.default_rng(0)
  vectors = rng.integers(-1, 3, (50, 3)).astype(np.float32)
  vectors[[6, 20]] = 0
  occurs = rng.random(50) < .8
  vectors[~occurs] = np.nan
  asked = np.flatnonzero(occurs)[::2]
  ids, cosines = neighbours.nearest(vectors, asked, candidates, occurs, 6)
  assert ids.shape == cosines.shape == (len(asked), 6)
  ties = 0
  for id, others, values in zip(asked, ids, cosines):
    want = by_sorting(vectors, id, range(50)[candidates], occurs, 6)
    assert [other for other in others if other >= 0] == [other for other, _ in want]
    np.testing.assert_allclose(values[:len(want)], [value for _, value in want], atol=2e-6)
    assert (others[len(want):] == -1).all() and (values[len(want):] == -np.inf).all()
    ties += len(want) - len({value for _, value in want})
  assert ties or candidates == slice(5, 9)
  assert (ids < 0).any() == (candidates == slice(5, 9))


def test_opposite_vectors_are_found_and_their_lengths_do_not_matter():
  vectors = np.float32([[1e-10, 0], [-1e10, 0], [1e15, 0], [0, 1]])
  ids, cosines = neighbours.nearest(vectors, np.array([0]), slice(0, 4), np.ones(4, bool), 3)
  assert ids.tolist() == [[2, 3, 1]] and cosines.tolist() == [[1, 0, -1]]


def test_memory_is_bounded():
  """Of many queries that of a block; of a few, no copy of all vectors (64 MB) is made."""
  vectors = np.ones((10 ** 6, 16), np.float32)
  for queries, candidates, most in (2500, 8000, 250e6), (2, 10 ** 6, 40e6):
    tracemalloc.start()
    ids, _ = neighbours.nearest(vectors, np.arange(queries), slice(0, candidates),
                                np.ones(10 ** 6, bool), 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ids[0].tolist() == [1, 2, 3]
    assert ids[-1].tolist() == [0, 1, 2] if queries > 3 else [0, 2, 3]
    assert peak < most


def test_by_type_leaves_out_types_that_never_occur():
  task = embedded.task(silent=[*range(60, 68), 70])
  vectors, occurs = task.vectors(None), task.occurs(None)
  first, second = neighbours.by_type(task.graph, vectors, occurs, np.array([3, 71]), 4)
  for id, found in (3, first), (71, second):
    assert list(found) == ['author', 'term']
    for type, some in found.items():
      want = by_sorting(vectors, id, range(73)[task.graph.nodes_of(type)], occurs, 4)
      assert [other for other, _ in some] == [other for other, _ in want]
  assert len(second['term']) == 3


def test_same_label(monkeypatch):
  """By hand, and of all labelled nodes by sorting."""
  vectors = np.float32([[1, 0], [1, .1], [1, .2], [0, 1], [.1, 1]])
  has = np.array([[1, 0], [1, 1], [0, 1], [0, 1], [0, 1]], bool)
  monkeypatch.setattr(neighbours, '_AMONG', 2)
  # Neighbours: of 0: 1, 2; of 1: 0, 2; of 2: 1, 0; of 3: 4, 2; of 4: 3, 2.
  assert neighbours.same_label(vectors, has, 0) == pytest.approx(
      np.mean([.5, 1, .5, 1, 1]))
  monkeypatch.setattr(neighbours, '_AMONG', 10)
  assert neighbours.same_label(vectors, has, 0) == pytest.approx(np.mean([.25, 1, .75, .75, .75]))


def test_same_label_of_drawn_nodes_is_among_all(monkeypatch, tmp_path):
  task = embedded.task(silent=[5, 61])
  vectors, occurs = task.vectors(None), task.occurs(None)
  evaluator = neighbours.Similarity(task)
  assert evaluator.every == 'end'
  authors = [id for id in range(60) if id != 5]
  share = {id: np.mean([other % 3 == id % 3 for other, _ in by_sorting(
      vectors, id, authors, occurs, 10)]) for id in authors}
  found = evaluator(embedded.run(tmp_path), None, 0)
  assert set(found) == {'author/same_label@10', 'venue/same_label@10'}
  assert found['author/same_label@10'] == pytest.approx(np.mean(list(share.values())))
  monkeypatch.setattr(neighbours, '_SAME_LABEL', 8)
  found = evaluator(embedded.run(tmp_path), None, 0)
  drawn = [authors[i] for i in np.random.default_rng(3).permutation(59)[:8]]
  assert found['author/same_label@10'] == pytest.approx(np.mean([share[id] for id in drawn]))


def tables(path):
  """Heading -> (line below it, rows of its table)."""
  sections = path.read_text('utf-8').split('\n## ')[1:]
  result = {}
  for section in sections:
    heading, _, line, *rest = section.split('\n')
    result[heading] = line, [[cell.strip() for cell in re.split(r'(?<!\\)\|', row)[1:-1]]
                             for row in rest if row.startswith('|')]
  return result


def test_tables_of_queries(tmp_path):
  names = [f'a | b\n{i}' for i in range(60)] + [f'venue {i}' for i in range(8)] + [
      'venue 1', *(f'term {i}' for i in range(1, 5))]
  task = embedded.task(embedded.graph(names=names), silent=[2, *range(70, 73)],
                       queries=('a | b\n7', 'term:venue 1', 'a | b\n2'))
  neighbours.Similarity(task)(embedded.run(tmp_path), None, 0)
  found = tables(tmp_path / 'neighbours.md')
  assert list(found) == [r'a \| b 7', 'venue 1', r'a \| b 2']
  line, rows = found[r'a \| b 7']
  assert line == f'author, in the walks {task.counts(None)[7]:,} times'
  assert rows[0] == ['', 'author', 'similarity', 'venue', 'similarity', 'term', 'similarity']
  assert len(rows) == 2 + 5 and {len(row) for row in rows} == {7}
  vectors, occurs = task.vectors(None), task.occurs(None)
  for column, type, shown in (1, 'author', 5), (3, 'venue', 5), (5, 'term', 2):
    want = by_sorting(vectors, 7, range(73)[task.graph.nodes_of(type)], occurs, 5)
    assert len(want) == shown
    for place in range(5):
      assert rows[2 + place][column:column + 2] == (
          [' '.join(names[want[place][0]].split()).replace('|', r'\|'), f'{want[place][1]:.3f}']
          if place < shown else ['', ''])
  assert found[r'a \| b 2'] == ('author, in the walks 0 times', [])


def test_queries_are_else_what_occurs_most(tmp_path):
  task = embedded.task(silent=[*range(60, 66), *range(68, 73)])
  evaluator = neighbours.Similarity(task)
  evaluator(embedded.run(tmp_path), None, 0)
  counts = task.counts(None)
  most = sorted(range(60), key=lambda id: (-counts[id], id))[:3]
  assert list(tables(tmp_path / 'neighbours.md')) == [f'author {id}' for id in most] + sorted(
      ['venue 6', 'venue 7'], key=lambda name: -counts[60 + int(name[-1])])
  (tmp_path / 'neighbours.md').unlink()
  evaluator(embedded.run(tmp_path, writes=False), None, 0)
  assert not (tmp_path / 'neighbours.md').exists()


def test_unknown_queries_are_refused_before_training():
  with pytest.raises(UserError, match="config.eval.queries: no node is called 'autor 3'"):
    neighbours.Similarity(embedded.task(queries=('author 2', 'autor 3')))


@pytest.fixture
def undrawn(monkeypatch):
  drawn = []
  monkeypatch.setattr(pictures, 'bars', lambda record, path: drawn.append((dict(record), path)))
  return drawn


def test_predict(tmp_path, undrawn):
  task = embedded.task(silent=[4, *range(68, 73)])
  lines = ['author 3', '', 'venue:venue 1', ' author 4 ', '  '] + [f'author {i}'
                                                                  for i in range(10, 18)]
  (tmp_path / 'in.txt').write_text('\ufeff' + '\r\n'.join(lines), 'utf-8')
  records = neighbours.predict(task, None, tmp_path / 'in.txt', tmp_path)
  assert [record['node'] for record in records] == [
      line.strip().removeprefix('venue:') for line in lines if line.strip()]
  assert [record['type'] for record in records] == ['author', 'venue'] + ['author'] * 9
  vectors, occurs = task.vectors(None), task.occurs(None)
  for record in records:
    id = int(record['node'].split()[1]) + 60 * (record['type'] == 'venue')
    assert record['occurrences'] == task.counts(None)[id]
    if id == 4:
      assert record['neighbours'] == {} and 'does not occur' in record['note']
      assert set(record) == {'node', 'type', 'occurrences', 'neighbours', 'note'}
      continue
    assert list(record['neighbours']) == ['author', 'venue'] and 'note' not in record
    for type, some in record['neighbours'].items():
      want = by_sorting(vectors, id, range(73)[task.graph.nodes_of(type)], occurs, 5)
      assert [other['node'] for other in some] == [task.graph.names[other] for other, _ in want]
      np.testing.assert_allclose([other['similarity'] for other in some],
                                 [value for _, value in want], atol=2e-6)
  assert [record.get('picture') for record in records] == [
      'neighbours_1.png', 'neighbours_2.png', None, *(f'neighbours_{i}.png' for i in range(3, 9)),
      None, None]
  assert [path for _, path in undrawn] == [tmp_path / f'neighbours_{i}.png' for i in range(1, 9)]


@pytest.mark.parametrize('content, match', [
    (b'author 1\n\nautor 1\n', r"in.txt, line 3: no node is called 'autor 1'; similar: 'author 1'"),
    (b'author 1\nvenue:author 2\n', r"line 2: no node is called 'venue:author 2'"),
    (b'\n \n', 'names no node'), (b'\xff', 'no text in UTF-8')])
def test_files_that_name_no_node(tmp_path, undrawn, content, match):
  (tmp_path / 'in.txt').write_bytes(content)
  with pytest.raises(UserError, match=match) as e:
    neighbours.predict(embedded.task(), None, tmp_path / 'in.txt', tmp_path)
  assert '\n' not in str(e.value) and not undrawn


def test_a_folder_and_vectors_that_are_not_finite(tmp_path):
  with pytest.raises(UserError, match='is a folder; give a text file'):
    neighbours.predict(embedded.task(), None, tmp_path, tmp_path)
  (tmp_path / 'in.txt').write_text('author 1')
  with pytest.raises(RunFailed, match='not finite'):
    neighbours.predict(embedded.task(vectors=np.full((73, 2), np.inf)), None, tmp_path / 'in.txt',
                       tmp_path)
