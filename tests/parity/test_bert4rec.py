"""Our BERT4Rec against Hugging Face transformers' BertForMaskedLM: the same weights, the same
logits."""

import jax
import numpy as np
import pytest

from configs import bert4rec as configs
from core.checkpoint import shapes
from tests.recsys import tiny

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

# Short, longer than the model reads, and one that is just as long.
HISTORIES = ([3, 1, 4], [5, 9, 2, 6, 5, 3, 8, 11, 7], [10], [1, 2, 3, 4, 5, 6])


def task_of(**changes):
  return tiny.task_of(HISTORIES, **dict(
      model__length=tiny.LENGTH, model__width=tiny.WIDTH, model__depth=tiny.DEPTH,
      model__heads=tiny.HEADS, model__mlp_dim=0, **changes))


def questions(task):
  rows = [task.question(np.array(history, np.int32)) for history in HISTORIES]
  return np.stack([items for items, _ in rows]), np.stack([slot for _, slot in rows])


def their_logits(model, items, slots):
  with torch.no_grad():
    logits = model(input_ids=torch.tensor(items).long(),
                   attention_mask=torch.tensor(items > 0).long()).logits
  return logits[torch.arange(len(items)), torch.tensor(slots).long()].numpy()


@pytest.mark.parametrize('padding', ['right', 'left'])
def test_our_export_there(tmp_path, padding):
  task = task_of(model__padding=padding)
  params = tiny.params(task.model)
  folder = task.export(params, tmp_path / 'export')
  theirs, report = transformers.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  items, slots = questions(task)
  assert (items[np.arange(len(items)), slots] == theirs.config.mask_token_id).all()
  want = their_logits(theirs.eval(), items, slots)
  assert want.shape == (len(HISTORIES), tiny.ROWS) and want.std() > .5
  np.testing.assert_allclose(task.scores(params, items, slots), want, rtol=1e-4, atol=1e-5)


def test_their_weights_here(tmp_path):
  task = task_of()
  torch.manual_seed(0)
  theirs = transformers.BertForMaskedLM(transformers.BertConfig(
      vocab_size=task.rows, hidden_size=tiny.WIDTH, num_hidden_layers=tiny.DEPTH,
      num_attention_heads=tiny.HEADS, intermediate_size=4 * tiny.WIDTH,
      max_position_embeddings=tiny.LENGTH, initializer_range=.3)).eval()
  with torch.no_grad():  # Biases and norms begin alike, whatever their names.
    for p in theirs.parameters():
      p.add_(torch.randn(p.shape) * .1)
  theirs.save_pretrained(tmp_path / 'theirs')
  want_shapes = jax.eval_shape(lambda: tiny.params(task.model))
  weights, _ = task.adapt(task.open_weights(tmp_path / 'theirs'), want_shapes, False)
  assert {name: w.shape for name, w in weights.items()} == shapes(want_shapes)
  params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: weights['/'.join(key.key for key in path)].read(), want_shapes)
  items, slots = questions(task)
  np.testing.assert_allclose(task.scores(params, items, slots), their_logits(theirs, items, slots),
                             rtol=1e-4, atol=1e-5)


def test_as_many_parameters_as_theirs():
  """To the unit: both have two rows of segments and no pooler, and tie the output's weights."""
  theirs = transformers.BertForMaskedLM(transformers.BertConfig(
      vocab_size=3416 + 4, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
      intermediate_size=256, max_position_embeddings=200))
  count = sum(p.numel() for p in theirs.parameters())
  task = tiny.task_of(arg='ml1m')
  ours = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
  assert count == sum(p.size for p in ours) == configs.PARAMETERS['ml1m'] == 339_612
  tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
  assert tied and theirs.bert.pooler is None
