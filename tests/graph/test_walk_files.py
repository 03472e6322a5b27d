"""Walks in the authors' text format: written, read, kept in the workdir, and trained on."""

import json
import re

import jax
import numpy as np
import pytest

from core import train
from core.config import UserError
from core.plan import make_plan
from graph import network, tables, walk_files
from tests import conftest
from tests.graph import tiny

CONFIG = f'{conftest.ROOT}/configs/metapath2vec.py:smoke'
# The example of the fact sheet.
LINE = 'vADB aArieSegev vADB aAlejandroP.Buchmann vADB\n'


def authors():
  return network.build(tables.Table(
      {'author': ['ArieSegev', 'AlejandroP.Buchmann', 'Nobody'], 'paper': ['1'], 'venue': ['ADB']},
      [tables.Edges('paper-author', 'paper', 'author', np.zeros(2, int), np.arange(2)),
       tables.Edges('paper-venue', 'paper', 'venue', np.zeros(1, int), np.zeros(1, int))]))


def test_lines_are_walks(tmp_path):
  path = tmp_path / 'walks.txt'
  graph = authors()
  blocks = [np.int32([[4, 0, 4, 1, 4], [4, -1, -1, -1, -1], [-1] * 5]),
            np.int32([[0, -1, 4, 2, -1]]), np.int32([[0, 4, 0, 4, 0]])]
  walk_files.write(path, graph.tokens, iter(blocks), 5)
  assert path.read_text() == LINE + 'aArieSegev vADB aNobody\n' + (
      'aArieSegev vADB aArieSegev vADB aArieSegev\n')
  found = walk_files.read(path, graph, 6)
  assert found.dtype == np.int32
  assert found.tolist() == [[4, 0, 4, 1, 4, -1], [0, 4, 2, -1, -1, -1], [0, 4, 0, 4, 0, -1]]
  # Long lines are cut; of what one token is left over, nothing can be learned.
  assert walk_files.read(path, graph, 2).tolist() == [
      [4, 0], [4, 1], [0, 4], [0, 4], [0, 4]]


@pytest.mark.parametrize('text, words', [
    (LINE + 'vADB aNoone\n', "walks.txt:2: 'aNoone' is no node of the graph; its tokens look like "
                             "'aArieSegev' and 'vADB'"),
    ('', 'there is no walk of two nodes'), ('vADB\n\naNobody\n', 'there is no walk of two nodes'),
    (None, 'walks.txt: no such file')])
def test_what_is_no_file_of_walks(tmp_path, text, words):
  path = tmp_path / 'walks.txt'
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError, match=words) as error:
    walk_files.read(path, authors(), 5)
  assert '\n' not in str(error.value)


def test_a_broken_off_file_is_not_left(tmp_path):
  def blocks():
    yield np.int32([[0, 4]])
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    walk_files.write(tmp_path / 'walks.txt', authors().tokens, blocks(), 2)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A file that the command wrote: two walks of 12 tokens from every author who writes."""
  path = tmp_path_factory.mktemp('walks') / 'walks.txt'
  assert walk_files.main([f'--config={CONFIG}', f'--out={path}', '--walks=2', '--seed=1']) == 0
  return path


def test_the_command_writes_walks_along_the_path(written, tmp_path, capsys):
  task = tiny.task_of()
  walks = [line.split(' ') for line in written.read_text().splitlines()]
  assert len(walks) == 2 * len(task.trips[0].starts) == 2 * 790
  starts = sorted(walk[0] for walk in walks)
  assert starts == sorted(2 * task.graph.tokens[task.trips[0].starts].tolist())
  relations = [{frozenset(pair) for pair in _edges(task.graph, r)} for r in task.graph.relations]
  for walk in walks:
    assert ''.join(token[0] for token in walk) == 'apvpapvpapvp'[:len(walk)]
    for at, pair in enumerate(zip(walk, walk[1:])):
      assert frozenset(pair) in relations[(0, 1, 1, 0)[at % 4]]
  assert {len(walk) for walk in walks} == {2, 6, 10, 12}  # Those of papers without a venue.
  # The same again from the same seed, others from another.
  capsys.readouterr()
  for seed, same in (1, True), (2, False):
    path = tmp_path / f'{seed}.txt'
    args = [f'--config={CONFIG}', f'--out={path}', f'--seed={seed}']
    assert walk_files.main(args) == 0
    assert capsys.readouterr().out == f'790 walks in {path}\n'
    lines = path.read_text().splitlines()
    assert (lines == written.read_text().splitlines()[:790]) == same


def _edges(graph, relation):
  sources = np.repeat(relation.source_ids, np.diff(relation.ptr))
  return zip(graph.tokens[sources].tolist(), graph.tokens[relation.col].tolist())


def test_the_command_takes_what_configs_take(tmp_path):
  path = tmp_path / 'walks.txt'
  assert walk_files.main([f'--config={CONFIG}', f'--out={path}', '--config.model.length=3',
                          '--config.model.keep=("author", "venue")']) == 0
  kinds = {''.join(token[0] for token in line.split()) for line in path.read_text().splitlines()}
  assert kinds == {'ava', 'av'} or kinds == {'ava'}


@pytest.mark.parametrize('args, words', [
    (['--walks=0'], 'error: --walks=0; it must be at least 1'),
    (['--config.model.metapath=APX'], "error: config.model.metapath='APX': 'X': no type"),
    (['--config.data.name=tsv:nowhere'], 'error: .*nowhere'),
    (['--out=/proc/none/walks.txt'], 'error: /proc/none/walks.txt: cannot be written')])
def test_the_command_says_what_is_wrong(args, words, tmp_path, capsys):
  assert walk_files.main([f'--config={CONFIG}', f'--out={tmp_path / "walks.txt"}', *args]) == 2
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1 and re.match(words, said[0]), said
  assert not list(tmp_path.iterdir())


def task_in(workdir, walks, **changes):
  task = tiny.task_of(data__walks=str(walks), **changes)
  task.workdir = workdir
  return task


def test_a_run_learns_from_a_file(written, tmp_path):
  """Its length may be in epochs: how long one is, the file says."""
  config = tiny.config_of(data__walks=str(written), steps='1 epoch', log_every='1 step',
                          data__block=32, optim__schedule__name='constant')
  plan = make_plan(config, jax.devices()[:1], tmp_path)
  assert plan.examples == -(-2 * 790 // 32) and plan.steps == -(-plan.examples // 8)
  plan.prepare()
  kept = np.load(tmp_path / walk_files.FILE)
  lines = [line.split() for line in written.read_text().splitlines()]
  assert [plan.task.graph.tokens[walk[walk >= 0]].tolist() for walk in kept] == lines
  # Negatives are by the file's own counts.
  counts = np.bincount(kept[kept >= 0], minlength=len(plan.task.graph))
  np.testing.assert_array_equal(plan.task.expected, counts)
  state, resident = plan.init(jax.random.key(0)), plan.resident()
  source = plan.task.dataset('train')
  blocks = [source[i]['walks'] for i in range(len(source))]
  everything = np.concatenate(blocks)
  assert sorted(map(tuple, everything[everything[:, 0] >= 0])) == sorted(map(tuple, kept))
  assert 'ptr_0' not in resident
  losses = []
  for step in range(14):
    some = np.stack(blocks[8:16] if step else blocks[:8])
    batch = {'walks': some, 'mask': np.ones(8, np.float32)}
    before = np.asarray(state.params['counts'])
    state, metrics = plan.train_step(state, {**batch, **resident})
    np.testing.assert_array_equal(np.asarray(state.params['counts']) - before,
                                  np.bincount(some[some >= 0], minlength=len(before)))
    losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
  assert losses[0] < 6 * np.log(2) and losses[-1] < .85 * losses[0], losses
  assert 'dead_ends' not in metrics


def test_a_workdir_is_of_one_file(written, tmp_path):
  task_in(tmp_path, written).prepare()
  about = json.loads((tmp_path / walk_files.ABOUT).read_text())
  assert about == {'walks': str(written), 'length': 12}
  # What was read is kept.
  other = tmp_path / 'other.txt'
  other.write_text(LINE)
  with pytest.raises(UserError, match="was made of .*walks.txt.* not of .*other.txt.*; use another "
                                      '--workdir'):
    task_in(tmp_path, other).prepare()
  with pytest.raises(UserError, match="'length': 12.* not of .*'length': 9"):
    task_in(tmp_path, written, model__length=9).dataset('train')
  with pytest.raises(UserError, match='has not been read yet; --mode=prepare'):
    walk_files.find(tiny.config_of(data__walks=str(written)), None, 9)


@pytest.mark.parametrize('damage', ['cut', 'text', 'gone', 'ids', 'pickle', 'about'])
def test_damaged_files_are_told(written, tmp_path, damage):
  task_in(tmp_path, written).prepare()
  path = tmp_path / walk_files.FILE
  found = np.load(path)
  if damage == 'cut':
    path.write_bytes(path.read_bytes()[:-100])
  elif damage == 'text':
    path.write_text('no walks')
  elif damage == 'gone':
    path.unlink()
  elif damage == 'ids':
    found[3, 4] = 3220
    np.save(path, found)
  elif damage == 'pickle':
    np.save(path, found.astype(object), allow_pickle=True)
  else:
    (tmp_path / walk_files.ABOUT).write_text('{"walks": ')
  with pytest.raises(UserError, match=r'walks\.(npy|json): damaged.* remove it') as error:
    task_in(tmp_path, written).dataset('train')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes, words', [
    (dict(model__negatives_from='context', model__keep=('author', 'venue')),
     "walks.txt has nodes of type 'paper', which is not among author, venue"),
    (dict(model__negatives_from='centre', model__metapath='APA'), "has nodes of type 'venue'"),
    (dict(model__keep=('author',)), '')])
def test_groups_are_of_what_the_file_has(written, tmp_path, changes, words):
  task = task_in(tmp_path, written, **changes)
  if not words:
    return task.prepare()
  with pytest.raises(UserError, match=words):
    task.prepare()


def test_the_authors_walks_have_no_papers(written, tmp_path):
  path = tmp_path / 'cac.txt'
  path.write_text('\n'.join(' '.join(token for token in line.split() if token[0] != 'p')
                            for line in written.read_text().splitlines()))
  changes = dict(model__negatives_from='context')
  with pytest.raises(UserError, match="cac.txt has no node of type 'paper'; name its types in "
                                      'config.model.keep'):
    task_in(tmp_path, path, **changes).prepare()
  task = task_in(tmp_path, path, model__keep=('author', 'venue'), **changes)
  task.prepare()
  assert len(task.objective.groups.first) == 2
  papers = task.graph.nodes_of('paper')
  assert not task.expected[papers].any() and task.expected.sum() > 0


def test_a_bad_file_ends_a_run_before_it_begins(tmp_path):
  path = tmp_path / 'walks.txt'
  path.write_text(LINE)
  config = tiny.config_of(data__walks=str(path))
  with pytest.raises(UserError, match="walks.txt:1: 'vADB' is no node of the graph"):
    train.train(config, tmp_path / 'run')
