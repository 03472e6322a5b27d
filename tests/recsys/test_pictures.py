"""What heads look at: the weights by hand, means of them, and whether the picture can be read."""

import functools
import itertools

import jax
import numpy as np
import pytest
import scipy.special
from matplotlib.figure import Figure

from core.evaluate import EvalRun
from core.plan import make_plan
from recsys import pictures
from tests.recsys import tiny

LENGTH = 14


def task_of(sequences=((1, 2, 3, 4),), **changes):
  return tiny.task_of(sequences, items=30, **{**dict(
      model__length=LENGTH, model__width=tiny.WIDTH, model__heads=tiny.HEADS,
      eval__negatives=2, eval__batch_size=8, batch_size=8), **changes})


def attention(task, params, history):
  """`[depth, heads, n, n]` of one user, without padding."""
  items, _ = task.question(np.asarray(history, np.int32))
  weights = jax.jit(functools.partial(pictures.attention_of, task))(params, items[None])
  at = np.flatnonzero(items)
  return np.asarray(weights)[:, 0][:, :, at][..., at]


def draw(task):
  return tiny.params(task.model, scale=1.)  # Far from even attention.


@pytest.mark.parametrize('causal', [False, True])
def test_weights_by_hand(causal):
  """Of the first layer, whose input is the embeddings; and all rows sum to 1."""
  task = task_of(model__kind='sasrec' if causal else 'bert4rec', model__depth=3)
  p, items = draw(task), np.zeros((2, LENGTH), np.int32)
  items[0, :5], items[1, 3:] = [4, 30, 2, 7, task.mask_id], np.arange(1, LENGTH - 2)
  got = np.asarray(jax.jit(functools.partial(pictures.attention_of, task))(p, items))
  assert got.shape == (3, 2, tiny.HEADS, LENGTH, LENGTH) and got.dtype == np.float32
  for row in range(2):
    at = np.flatnonzero(items[row])
    x = (p['item_embedding'][items[row, at]] + p['segment_embedding'][0]
         + p['position_embedding'][at]).astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    x = x * p['embedding_norm']['scale'] + p['embedding_norm']['bias']
    attention = p['encoderblock_0']['MultiHeadDotProductAttention_0']
    for head in range(tiny.HEADS):
      query, key = (x @ attention[name]['kernel'][:, head] + attention[name]['bias'][head]
                    for name in ('query', 'key'))
      scores = query @ key.T / 2
      if causal:
        scores[np.triu_indices(len(at), 1)] = -np.inf
      np.testing.assert_allclose(got[0, row, head][np.ix_(at, at)],
                                 scipy.special.softmax(scores, axis=1), atol=1e-5)
    within = got[:, row][:, :, at]
    np.testing.assert_allclose(within[..., at].sum(-1), 1, atol=1e-5)
    assert not within[..., items[row] == 0].any()
    if causal:
      assert not np.triu(within[..., at], 1).any()
    else:
      assert within[..., -1, :-1].max() > .1 < within[..., 0, 1:].max()


# Events of users, the last of which is what is asked; so many positions bert4rec reads.
USERS = (3, 12, 10, 20, 8, 11, 15, 4, 9, 10, 10)


def run_heads(task, tmp_path, monkeypatch):
  """What the evaluator draws in a real run (attention, labels, title), and the parameters."""
  monkeypatch.setattr('core.task.load', lambda config, workdir=None: task)
  calls = []
  monkeypatch.setattr(pictures, 'heads', lambda *args: calls.append(args))
  run, params = EvalRun(make_plan(task.config), tmp_path), draw(task)
  evaluator = pictures.Heads(task, 'test', every='end')
  assert evaluator.every == 'end' and evaluator(run, params, 3) == {}
  (weights, labels, path, title), = calls
  assert path == tmp_path / 'pictures' / 'attention_heads.png'
  monkeypatch.setattr(EvalRun, 'writes', False)
  assert evaluator(run, params, 4) == {} and len(calls) == 1
  return weights, labels, title, params


def mean_of(task, params, histories, n):
  """The mean over users, one at a time."""
  return sum(attention(task, params, history)[..., -n:, -n:] for history in histories) / len(
      histories)


def sequences(lengths):
  rng = np.random.default_rng(0)
  return [rng.permutation(28)[:n] + 1 for n in lengths]


@pytest.mark.parametrize('kind, padding, limit, mib', [
    ('bert4rec', 'right', 512, 256), ('bert4rec', 'left', 512, 0), ('sasrec', 'right', 512, 256),
    ('bert4rec', 'right', 3, 256)])
def test_heads_are_means_over_the_last_ten_positions(tmp_path, monkeypatch, kind, padding, limit,
                                                     mib):
  monkeypatch.setattr(pictures, '_USERS', limit)
  users, yielded, run_map = sequences(USERS), [], EvalRun.map
  monkeypatch.setattr(EvalRun, 'map', lambda *args: (
      yielded.append(rows) or rows for rows in run_map(*args)))
  task = task_of(users, model__kind=kind, model__padding=padding, model__logits_mib=mib)
  got, labels, title, params = run_heads(task, tmp_path, monkeypatch)
  fewest = 10 if kind == 'bert4rec' else 11  # Events; one more position is the mask.
  chosen = [user[:-1] for user in users if len(user) >= fewest][:limit]
  assert len(chosen) == {'bert4rec': min(7, limit), 'sasrec': 4}[kind]
  np.testing.assert_allclose(got, mean_of(task, params, chosen, 10), atol=1e-5)
  assert (not np.triu(got, 1).any()) == (kind == 'sasrec')
  assert f'last 10 positions: mean of {len(chosen)} users with at least so many' in title
  assert labels == [*range(-9, 0), 'mask' if kind == 'bert4rec' else 0]
  assert len(yielded) == (2 if limit == 3 else 4)  # Of two batches, twice.


def test_where_no_user_has_ten_positions_the_longest_are_taken(tmp_path, monkeypatch):
  users = sequences((3, 5, 4, 6, 4, 6, 3, 3, 7, 5, 7, 7))  # In the second batch.
  task = task_of(users)
  got, labels, title, params = run_heads(task, tmp_path, monkeypatch)
  chosen = [user[:-1] for user in users if len(user) == 7]
  np.testing.assert_allclose(got, mean_of(task, params, chosen, 7), atol=1e-5)
  assert 'last 7 positions: mean of 3 users with so many' in title and len(labels) == 7


def test_a_model_that_reads_fewer_than_ten(tmp_path, monkeypatch):
  users = sequences((3, 5, 9, 9))
  task = task_of(users, model__length=4)
  got, _, title, params = run_heads(task, tmp_path, monkeypatch)
  chosen = [user[:-1] for user in users[1:]]
  np.testing.assert_allclose(got, mean_of(task, params, chosen, 4), atol=1e-5)
  assert 'mean of 3 users with at least so many' in title


# Names that are long, mathematics to matplotlib, in several lines, or of no letters.
NAMES = ['$5 & $10', 'The Good, the Bad and the Ugly (1966)', 'two\nlines', ' ', '$\\frac{$']


@pytest.mark.parametrize('depth, heads, n', [(2, 2, 30), (1, 1, 1), (2, 4, 5)])
def test_labels_can_be_read(tmp_path, monkeypatch, depth, heads, n):
  figures, savefig = [], Figure.savefig
  monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: (
      figures.append(self), savefig(self, *args, **kwargs))[1])
  weights = np.random.default_rng(0).random((depth, heads, n, n))
  names = [*itertools.islice(itertools.cycle(NAMES), n - 1), '[mask]']
  pictures.heads(weights, names, tmp_path / 'a.png', 'attention of user $\\frac{$')
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  figure, = figures
  panels, (_,) = figure.axes[:depth * heads], figure.axes[depth * heads:]  # And one bar of colours.
  shown = weights[..., -20:, -20:]
  for axes, want in zip(panels, shown.reshape(-1, *shown.shape[2:])):
    np.testing.assert_array_equal(axes.images[0].get_array(), want)
    assert axes.images[0].get_clim() == (0, shown.max())
  assert [axes.get_title() for axes in panels] == [
      f'layer {i + 1}, head {j + 1}' for i in range(depth) for j in range(heads)]
  first, last = panels[0], panels[-1]
  texts = [text.get_text() for text in first.get_yticklabels()]
  assert texts == [text.get_text() for text in last.get_xticklabels()]
  assert texts[-1] == '[mask]' and max(map(len, texts)) <= 24
  if n > 4:
    assert {'The Good, the Bad and t…', 'two lines'} < set(texts)

  canvas = figure.get_window_extent()
  boxes = [[text.get_window_extent() for text in labels if text.get_text().strip()]
           for labels in (first.get_yticklabels(), last.get_xticklabels())]
  titles = [figure._suptitle.get_window_extent(), figure._supxlabel.get_window_extent(),
            figure._supylabel.get_window_extent()]
  for box in (*boxes[0], *boxes[1], *titles):
    assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1
    assert canvas.y0 <= box.y0 and box.y1 <= canvas.y1
  everything = [*boxes[0], *boxes[1], *titles, *(a.title.get_window_extent() for a in panels)]
  assert not [pair for pair in itertools.combinations(everything, 2) if pair[0].overlaps(pair[1])]
