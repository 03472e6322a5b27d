"""The model against a plain float64 one, what it may see, and how many parameters it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from core.nn import dropout
from recsys import encoder
from tests.recsys import tiny

# Padded on either side, full, and one item alone.
ITEMS = np.array([[3, 1, 4, 0, 0, 0, 0], [0, 0, 5, 9, 2, 6, 5], [7, 8, 13, 1, 2, 3, 11],
                  [6, 0, 0, 0, 0, 0, 0]], np.int32)
EVERY = np.tile(np.arange(tiny.LENGTH, dtype=np.int32), (len(ITEMS), 1))


# --- A float64 model -----------------------------------------------------------------------------


def norm(x, p):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-12) * p['scale'] + p['bias']


def gelu(x):
  return x * scipy.special.ndtr(x)


def dense(x, p):
  return x @ p['kernel'] + p['bias']


def block(x, p, causal, residual):
  """Equations 1 to 6 for one sequence `[n, width]` without padding, a head at a time."""
  attention = p['MultiHeadDotProductAttention_0']
  out = attention['out']['bias'].copy()
  for head in range(attention['query']['kernel'].shape[1]):
    query, key, value = (x @ attention[name]['kernel'][:, head] + attention[name]['bias'][head]
                         for name in ('query', 'key', 'value'))
    scores = query @ key.T / np.sqrt(query.shape[1])
    if causal:
      scores[np.triu_indices(len(x), 1)] = -np.inf
    out = out + scipy.special.softmax(scores, axis=1) @ value @ attention['out']['kernel'][head]
  x = norm(x * residual + out, p['LayerNorm_0'])
  inner = dense(gelu(dense(x, p['MlpBlock_0']['Dense_0'])), p['MlpBlock_0']['Dense_1'])
  return norm(x * residual + inner, p['LayerNorm_1'])


def oracle(model, params, items):
  """Scores `[n, rows]` of one sequence, of which padding is left out altogether."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  at = np.flatnonzero(items)
  x = p['item_embedding'][items[at]]
  if model.segments:
    x = x + p['segment_embedding'][0]
  if model.positions:
    x = x + p['position_embedding'][at]
  x = norm(x, p['embedding_norm'])
  for i in range(model.depth):
    x = block(x, p[f'encoderblock_{i}'], model.causal, model.residual)
  scores = np.full((len(items), model.rows), np.nan)
  if model.transform:
    x = norm(gelu(dense(x, p['transform'])), p['transform_norm'])
  scores[at] = x @ p['item_embedding'].T + (p['output_bias'] if model.transform else 0)
  return scores


# Each way is one compiled program. Small parameters show an epsilon of the norms that is not 1e-12.
WAYS = {'bert4rec': (dict(), .3),
        'sasrec': (dict(causal=True, transform=False, segments=False), .3),
        'bare': (dict(residual=False, positions=False), .02)}


@functools.cache
def run(way):
  """(model, params, compiled function of params, items and slots to states and scores)."""
  changes, scale = WAYS[way]
  model = tiny.model(**changes)

  def both(params, items, slots):
    states = model.apply({'params': params}, items, slots)
    return states, encoder.logits(params, states)
  return model, tiny.params(model, scale), jax.jit(both)


@pytest.mark.parametrize('way', WAYS)
def test_scores_are_those_of_a_float64_model_that_sees_no_padding(way):
  model, params, both = run(way)
  names = {'output_bias', 'transform', 'segment_embedding', 'position_embedding'} & set(params)
  assert names == {'bert4rec': {'output_bias', 'transform', 'segment_embedding',
                                'position_embedding'},
                   'sasrec': {'position_embedding'},
                   'bare': {'output_bias', 'transform', 'segment_embedding'}}[way]
  scores = np.asarray(both(params, ITEMS, EVERY)[1])
  for got, items in zip(scores, ITEMS):
    want = oracle(model, params, items)
    assert want[items > 0].std() > .01
    np.testing.assert_allclose(got[items > 0], want[items > 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('way', ['bert4rec', 'sasrec'])
def test_slots_are_read_in_their_order(way):
  _, params, both = run(way)
  slots = np.tile(np.int32([6, 0, 3, 3, 5, 1, 2]), (len(ITEMS), 1))
  whole, some = (both(params, ITEMS, s)[0] for s in (EVERY, slots))
  np.testing.assert_allclose(some, np.asarray(whole)[:, slots[0]], rtol=1e-5, atol=1e-5)


def test_scores_of_single_rows_are_those_of_all():
  _, params, both = run('bert4rec')
  states, scores = both(params, ITEMS, EVERY)
  rows = np.random.default_rng(0).integers(0, tiny.ROWS, ITEMS.shape)
  np.testing.assert_allclose(
      encoder.row_logits(params, states, rows),
      np.take_along_axis(np.asarray(scores), rows[..., None], -1)[..., 0], rtol=1e-5, atol=1e-5)
  without = {name: value for name, value in params.items() if name != 'output_bias'}
  np.testing.assert_allclose(encoder.row_logits(params, states, rows) - params['output_bias'][rows],
                             encoder.row_logits(without, states, rows), atol=1e-5)


@pytest.mark.parametrize('way, sees', [('bert4rec', True), ('sasrec', False)])
def test_a_later_item_changes_what_comes_before_only_from_both_sides(way, sees):
  _, params, both = run(way)
  changed = ITEMS.copy()
  changed[1, -1], changed[2, 4] = 10, 12
  before, after = (np.asarray(both(params, items, EVERY)[0]) for items in (ITEMS, changed))
  for row, first, at in ((1, 2, 6), (2, 0, 4)):
    moved = np.abs(after[row] - before[row]).max(-1)[first:] > 1e-4
    assert moved[at - first:].all(), 'the item itself and what follows it'
    assert moved[:at - first].all() == sees and moved[:at - first].any() == sees


@pytest.mark.parametrize('way', WAYS)
def test_what_padding_holds_changes_nothing(way):
  """The row of padding, and positions where there is nothing but padding, on either side."""
  _, params, both = run(way)
  other = {**params, 'item_embedding': params['item_embedding'].copy()}
  other['item_embedding'][0] = 1e3
  if 'position_embedding' in params:
    other['position_embedding'] = params['position_embedding'].copy()
    other['position_embedding'][1:] = -7.
  for row in (0, 1, 3):
    some = dict(other) if row == 3 else {**params, 'item_embedding': other['item_embedding']}
    before, after = (np.asarray(both(p, ITEMS, EVERY)[0])[row] for p in (params, some))
    np.testing.assert_array_equal(after[ITEMS[row] > 0], before[ITEMS[row] > 0])
    assert np.isfinite(after).all() and np.isfinite(before).all()


@pytest.mark.parametrize('train', [True, False])
def test_what_is_dropped(monkeypatch, train):
  """The sum of embeddings and what each branch gives; attention weights at their own rate; not
  what is inside the feed-forward networks. Of the last block only three slots are computed."""
  found = []
  monkeypatch.setattr(dropout, 'dropout', lambda x, rate, rng: found.append((rate, x.shape)) or x)
  model, params = tiny.model(dropout=.5, attention_dropout=.2), run('bert4rec')[1]
  jax.eval_shape(lambda rng: model.apply({'params': params}, ITEMS, EVERY[:, :3], train=train,
                                         rngs={'dropout': rng}), jax.random.key(0))
  assert sorted(found) == train * ([(.2, (4, 3, 3, 7)), (.2, (4, 3, 7, 7))]
                                   + [(.5, (4, 3, 12))] * 2 + [(.5, (4, 7, 12))] * 3)


# --- Sizes ---------------------------------------------------------------------------------------


def count(**changes):
  model = encoder.Encoder(**{**dict(rows=3420, length=200, width=64, depth=2, heads=2,
                                    mlp_dim=256), **changes})
  items = jnp.zeros((1, model.length), jnp.int32)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), items, items))
  return sum(x.size for x in jax.tree.leaves(shapes))


def test_counts_of_the_sheet():
  d, layer = 64, 49_984
  assert layer == 4 * (d * d + d) + (d * 4 * d + 4 * d + 4 * d * d + d) + 4 * d
  assert count() == 339_612
  assert count() == 3420 * d + 200 * d + 2 * d + 2 * d + 2 * layer + d * d + d + 2 * d + 3420
  assert count(segments=False, positions=False, transform=False, causal=True) == (
      339_612 - 2 * d - 200 * d - (d * d + d) - 2 * d - 3420)
  # RecBole on ml-100k has 217,043: its output bias leaves out the last row, the mask's.
  assert count(rows=1684, length=50, segments=False) == 217_043 + 1
