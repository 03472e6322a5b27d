"""VTAB: published means, published split sizes, labels by hand, and the report."""

import json

import numpy as np
import pytest

from core.config import UserError
from vit_family import vtab

# Accuracies in the order of TASKS, and the published means. ViT table 9: H/14, L/16 (JFT), L/16.
VIT = [
    ('95.3 85.5 75.2 99.7 97.2 65.0 88.9 83.3 96.7 91.4 76.6 '
     '91.7 63.8 53.1 79.4 63.3 84.5 33.2 51.2', 77.6),
    ('95.4 81.9 74.3 99.7 96.7 63.5 87.4 83.6 96.5 89.7 77.1 '
     '86.4 63.1 49.7 74.5 60.5 82.2 36.2 51.1', 76.3),
    ('90.8 84.1 74.1 99.3 92.7 61.0 80.9 82.5 95.6 85.2 75.3 '
     '70.3 56.1 41.9 74.7 64.9 79.9 30.5 41.7', 72.7)]
# AugReg table 5: R+Ti/16, B/32, L/16.
AUGREG = [
    ('93.2 85.3 71.5 99.0 90.3 74.7 95.2 85.2 98.3 95.3 81.3 '
     '95.5 90.5 67.4 99.9 87.4 78.2 24.5 45.2', (87.0, 90.0, 73.6)),
    ('95.2 92.3 77.2 99.5 92.8 81.2 96.6 87.0 98.8 96.0 81.3 '
     '97.7 89.8 70.5 100 92.3 82.7 25.9 83.1', (90.7, 90.8, 80.2)),
    ('95.5 94.1 80.3 99.6 95.0 83.4 97.4 86.4 99.0 96.6 83.3 '
     '99.8 91.7 75.6 100 90.4 84.7 27.5 76.5', (92.2, 91.3, 80.8))]


def accuracies(row):
  return dict(zip(vtab.TASKS, map(float, row.split()), strict=True))


def test_means_are_those_published():
  for row, mean in VIT:
    assert abs(vtab.means(accuracies(row))['mean'] - mean) < .0501
  for row, groups in AUGREG:
    found = vtab.means(accuracies(row))
    np.testing.assert_allclose([found[g] for g in vtab.GROUPS], groups, atol=.0501)


def test_a_missing_task_leaves_no_mean_of_its_group():
  some = accuracies(VIT[0][0])
  del some['camelyon']
  found = vtab.means(some)
  assert found['specialized'] is None and found['mean'] is None
  assert found['natural'] == pytest.approx(86.686, abs=1e-3)


# Training examples before validation, and before the test split where it is cut from train: the
# sizes that the benchmark's own tests state.
SIZES = {'caltech101': (2754, None), 'cifar100': (45_000, None), 'pets': (2944, None),
         'svhn': (65_931, None), 'eurosat': (16_200, 21_600), 'resisc45': (18_900, 25_200),
         'clevr_count': (63_000, None), 'clevr_distance': (63_000, None),
         'dsprites_location': (589_824, 663_552), 'dsprites_orientation': (589_824, 663_552)}


def test_splits():
  for name, task in vtab.TASKS.items():
    assert task.trainval == f'train[:800]+{task.validation}'
    if name in SIZES:
      start, test = SIZES[name]
      assert task.validation == f'train[{start}:{start + 200}]'
      if test:
        assert task.test == f'train[{test}:]'
    elif not name.startswith('smallnorb'):
      assert (task.validation, task.test) == ('validation[:200]', 'test')
  assert vtab.TASKS['clevr_count'].test == 'validation'  # Its test split has no labels.
  assert vtab.TASKS['smallnorb_azimuth'].test == 'test[50%:]'


def test_groups_classes_and_augmentations():
  tasks = vtab.TASKS
  assert [sum(t.group == g for t in tasks.values()) for g in vtab.GROUPS] == [7, 4, 8]
  assert [t.classes for t in tasks.values()] == [
      102, 100, 47, 102, 37, 397, 10, 2, 10, 45, 5, 8, 6, 6, 16, 16, 4, 18, 9]
  assert {n for n, t in tasks.items() if not t.flip} == {
      'dsprites_location', 'dsprites_orientation', 'smallnorb_azimuth'}
  assert {n for n, t in tasks.items() if not t.crop} == {
      'clevr_count', 'clevr_distance', 'dmlab', 'kitti_distance', 'dsprites_location'}


# --- Labels --------------------------------------------------------------------------------------


def clevr(*distances):
  coords = np.array([[100., 50., d] for d in distances], np.float32)
  return {'objects': {'size': np.zeros(len(distances), int), 'pixel_coords': coords}}


def test_clevr():
  assert [vtab.label('clevr_count', clevr(*[9.] * n)) for n in (3, 6, 10)] == [0, 3, 7]
  for distance, want in ((.5, 0), (8., 0), (8.01, 1), (8.5, 1), (8.7, 2), (9.2, 3), (9.6, 4),
                         (10., 4), (10.1, 5), (14., 5)):
    assert vtab.label('clevr_distance', clevr(30., distance, 31.)) == want, distance
  with pytest.raises(UserError, match='clevr_count: an example has class -1, but there are 8'):
    vtab.label('clevr_count', clevr(9., 9.))


def test_kitti():
  def scene(*objects):
    kinds, depths = zip(*objects) if objects else ((), ())
    location = np.array([[7., 1., z] for z in depths], np.float32)
    return {'objects': {'type': np.array(kinds, np.int64), 'location': location}}
  car, van, truck, pedestrian, misc = 0, 1, 2, 3, 7
  for objects, want in (
      ([(car, 7.)], 0), ([(car, -2.)], 0), ([(car, 8.)], 0), ([(van, 8.5), (car, 30.)], 1),
      ([(truck, 20.)], 1), ([(truck, 20.5), (pedestrian, 3.)], 2), ([(pedestrian, 3.)], 3),
      ([(misc, 1.)], 3), ([], 3)):
    assert vtab.label('kitti_distance', scene(*objects)) == want, objects


def test_dsprites_bins_are_equal():
  location = [vtab.label('dsprites_location', {'label_x_position': i}) for i in range(32)]
  assert location == [i // 2 for i in range(32)]
  orientation = [vtab.label('dsprites_orientation', {'label_orientation': np.int64(i)})
                 for i in range(40)]
  assert orientation == [int(np.floor(np.float32(i) / 2.5)) for i in range(40)]
  assert set(orientation) == set(range(16))


def test_plain_labels():
  assert vtab.label('pets', {'label': np.int64(36)}) == 36
  assert vtab.label('smallnorb_azimuth', {'label_azimuth': 17, 'label_elevation': 3}) == 17
  assert vtab.label('smallnorb_elevation', {'label_azimuth': 17, 'label_elevation': 3}) == 3
  with pytest.raises(UserError, match='is the data oxford_iiit_pet'):
    vtab.label('pets', {'label': 37})
  with pytest.raises(UserError, match="did you mean 'caltech101'"):
    vtab.label('caltech', {'label': 0})


# --- The report ----------------------------------------------------------------------------------


def runs(root, row):
  for name, accuracy in accuracies(row).items():
    run = root / name
    run.mkdir()
    (run / 'config.json').write_text(json.dumps({'data': {'vtab': name}}))
    lines = [{'step': 5, 'test/accuracy': .01}, {'step': 9, 'test/accuracy': accuracy / 100},
             {'step': 9, 'time/x': 1.}]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return [str(root / name) for name in reversed(vtab.TASKS)]


def test_report_of_all_tasks(tmp_path, capsys):
  dirs = runs(tmp_path, VIT[0][0])
  assert vtab.main(dirs) == 0
  printed = capsys.readouterr().out
  assert ' 77.6  mean of all 19' in printed and ' 95.3  Caltech101' in printed
  assert 'missing' not in printed
  written = json.loads((tmp_path / 'vtab.json').read_text())
  assert list(written['tasks']) == list(vtab.TASKS) and written['tasks']['dmlab'] == .531
  assert round(100 * written['means']['mean'], 1) == 77.6 and written['missing'] == []
  assert (tmp_path / 'vtab.png').read_bytes().startswith(b'\x89PNG')


def test_report_of_some_tasks(tmp_path, capsys):
  runs(tmp_path, VIT[0][0])
  out = tmp_path / 'out'
  dirs = [str(tmp_path / name) for name, task in vtab.TASKS.items() if task.group == 'specialized']
  assert vtab.main([f'--out={out}', *dirs]) == 0
  printed = capsys.readouterr().out
  assert ' 87.0  mean of specialized' in printed and '-  mean of all 19' in printed
  assert 'missing: caltech101, cifar100' in printed
  written = json.loads((out / 'vtab.json').read_text())
  assert written['means']['natural'] is None and written['tasks']['dtd'] is None
  assert len(written['missing']) == 15 and (out / 'vtab.png').exists()


@pytest.mark.parametrize('files, match', [
    ({}, 'config.json: No such file'), ({'config.json': '{'}, 'config.json is not JSON'),
    ({'config.json': '[]'}, 'names no VTAB task'),
    ({'config.json': '{"data": {}}'}, 'valid: caltech'),
    ({'config.json': '{"data": {"vtab": "pet"}}'}, "unknown name 'pet'; did you mean 'pets'"),
    ({'config.json': '{"data": {"vtab": "pets"}}'}, 'metrics.jsonl: No such file'),
    ({'config.json': '{"data": {"vtab": "pets"}}', 'metrics.jsonl': '{"step": 1}\n'},
     'the run has not ended'),
    ({'config.json': '{"data": {"vtab": "pets"}}', 'metrics.jsonl': 'x\n{"step": 1}\n'},
     'metrics.jsonl:1: not a JSON line')])
def test_bad_workdirs_end_with_2(tmp_path, capsys, files, match):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  assert vtab.main([str(tmp_path)]) == 2
  error = capsys.readouterr().err
  assert match in error and error.startswith('error: ') and error.count('\n') == 1


def test_two_runs_of_one_task(tmp_path, capsys):
  dirs = runs(tmp_path, VIT[0][0])
  assert vtab.main([dirs[0], dirs[0]]) == 2
  assert 'are both runs of smallnorb_elevation' in capsys.readouterr().err
