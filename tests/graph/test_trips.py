"""Several meta-paths by turns."""

import jax
import numpy as np
import pytest

from core.config import UserError
from graph import trips
from tests.graph import tiny

BOTH = 'user-item-user,tag-item-tag'
BACK = 'item-tag-item,item-user-item'  # Both begin at any item.


def task_of(path=BOTH, **changes):
  return tiny.task_of(tiny.graph(weighted=True), model__metapath=path, **changes)


def test_blocks_are_of_one_trip_each():
  items = [np.arange(5, dtype=np.int32), np.arange(10, 17, dtype=np.int32)]
  source = trips.Blocks(items, 2, 'starts')
  found = [source[at] for at in range(len(source))]
  assert [int(one['trip']) for one in found] == [0, 0, 0, 1, 1, 1, 1]
  assert [one['starts'].tolist() for one in found] == [
      [0, 3], [1, 4], [2, -1], [10, 14], [11, 15], [12, 16], [13, -1]]


@pytest.mark.parametrize('path', [BOTH, BACK])
@pytest.mark.parametrize('sampler', ['device', 'host'])
def test_walks_are_along_the_path_of_their_block(sampler, path):
  task = task_of(path, batch_size=4, data__block=6, data__sampler=sampler)
  first, second = task.trips
  source = task.dataset('train')
  assert len(source) == -(-len(first.starts) // 6) - (-len(second.starts) // 6)
  rows = [task.transform(source[at], np.random.default_rng(at), True)
          for at in (0, len(source) - 1)]
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  spec = task.batch_spec(2)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
      name: (x.shape, x.dtype) for name, x in spec.items() if name != 'mask'}
  resident = task.resident()
  assert {name: (x.shape, x.dtype) for name, x in resident.items()} == {
      name: (x.shape, x.dtype) for name, x in task.resident_spec().items()}
  found = np.asarray(jax.jit(task.walks)(jax.random.key(0), {**batch, **resident}))
  for walks, trip in zip(np.split(found, 2), (first, second)):
    assert set(walks[walks[:, 0] >= 0, 0]) <= set(trip.starts.tolist())
    for at in range(walks.shape[1] - 1):
      edges = tiny.matrix(task.graph, trip.steps[at % 2])
      some = walks[walks[:, at + 1] >= 0]
      assert len(some) and (edges[some[:, at], some[:, at + 1]] > 0).all()


def test_steps_that_paths_share_are_there_once_and_visits_add_up():
  task = tiny.task_of(tiny.graph(weighted=False),
                      model__metapath='user-item-user,user-item-tag-item-user')
  assert {name for name in task.resident_spec() if name.startswith('ptr')} == {
      f'ptr_{at}' for at in range(4)}
  np.testing.assert_allclose(task.expected, sum(trip.visits() for trip in task.trips))


def test_each_path_must_be_one():
  with pytest.raises(UserError, match="no type 'users'"):
    tiny.task_of(tiny.graph(weighted=False),
                 model__metapath='user-item-user,users-item-user').trips
