"""Probes on features with a known best layer."""

import json
import pathlib
import types

import ml_collections
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from generative import probe

CLASSES, WIDTH = 4, 6
SETTINGS = dict(strengths=(.01, 1.), max_iter=500, labels=(2, 8, 400), subsets=3, masks=3)


def data(n, seed, noise):
  """features `[n, 3, WIDTH]`: layer 1 is the cleanest; labels `[n]`."""
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
  labels = np.arange(n) % CLASSES
  layers = [centres[labels] + spread * rng.normal(size=(n, WIDTH)) for spread in noise]
  return np.stack(layers, 1).astype(np.float32), labels


class Run:
  """What a probe asks of an `EvalRun`."""

  writes = True

  def __init__(self, pictures: pathlib.Path, objective='ar'):
    self.pictures = pictures
    task = types.SimpleNamespace(features=lambda params, tokens, draw: draw)
    config = ml_collections.ConfigDict(dict(model=dict(objective=objective)))
    self.plan = types.SimpleNamespace(task=task, config=config)
    self.splits = {'probe': data(200, 0, (3., .7, 2.)), 'test': data(300, 1, (3., .7, 2.))}

  def map(self, fn, params, split):
    x, y = self.splits[split]
    draw = fn(params, {'tokens': None, 'label': None})['features']
    x = x + .5 * draw * np.random.default_rng(draw).normal(size=x.shape)
    for rows in np.array_split(np.arange(len(y)), 3):
      yield {'features': x[rows].astype(np.float32), 'label': y[rows]}


def evaluate(run, **changes):
  settings = ml_collections.ConfigDict({**SETTINGS, **changes})
  return probe.Probe('probe', 'test', settings)(run, None, 0)


def test_the_best_layer_is_found_and_scored_by_a_probe_on_all_training_examples(tmp_path):
  run = Run(tmp_path)
  found = evaluate(run)
  assert found['best_layer'] == 1
  written = json.loads((tmp_path / 'probe.json').read_text())
  (x, y), (test, test_y) = run.splits['probe'], run.splits['test']
  x, test = x[:, 1].astype(np.float64), test[:, 1]
  white = lambda z: (z - x.mean(0)) / (x.std(0) + 1e-6)
  model = LogisticRegression(C=written['best_strength'], max_iter=500).fit(white(x), y)
  assert abs(found['accuracy'] - model.score(white(test), test_y)) < .01
  assert np.shape(written['validation_accuracy']) == (3, 2)
  assert (tmp_path / 'probe.png').stat().st_size > 5000
  assert 'vote_accuracy' not in found


def test_low_data_leaves_out_what_the_classes_have_not(tmp_path):
  found = evaluate(Run(tmp_path))
  assert '400_labels' not in found
  assert found['2_labels'] < found['8_labels'] < found['accuracy'] + .05
  assert found['2_labels_std'] > 0


def test_bert_votes(tmp_path):
  found = evaluate(Run(tmp_path, 'bert'))
  assert .5 < found['vote_accuracy'] <= 1


def test_votes_are_modal_and_ties_random():
  np.testing.assert_array_equal(probe.vote(np.array([[1, 2, 1], [3, 3, 0]])), [1, 3])
  ties = probe.vote(np.tile([[0, 2]], (4000, 1)))
  assert set(ties) == {0, 2} and abs(np.mean(ties == 2) - .5) < .05


@pytest.mark.parametrize('answers, want', [([[0, 1], [1, 1]], 1.), ([[0, 0], [0, 0]], .5)])
def test_mask_vote(answers, want):
  class Rows:
    plan = types.SimpleNamespace(task=None)

    def map(self, fn, params, split):
      yield {'label': np.array([0, 1]), 'answers': np.array(answers)}
  found = probe.MaskVote('test', masks=2)(Rows(), None, 0)
  assert found['one_mask'] == np.mean(np.array(answers)[:, 0] == [0, 1])
  if want == .5:
    assert found['accuracy'] == .5
