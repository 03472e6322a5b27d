"""Our Transformer with Marian's settings against Hugging Face transformers' MarianMTModel.

Beams are compared without a length penalty: transformers divides by length ** penalty, which is no
alpha of Wu et al. 2016 but 0. The stopping rule is then the same, but for hypotheses that are cut
at the limit: theirs count as ended. None of several beams is here.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.nn import losses
from tests.translation import test_marian as tiny
from translation import marian, search

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

VOCAB, SOURCE_VOCAB, LEAST, ROOM = 40, 30, 5, 24


def model(**changes):
  return tiny.model(**dict(vocab=VOCAB, width=16, mlp_dim=24, heads=4) | changes)


def pair(tmp_path, made, params):
  """Transformers' model with our weights."""
  folder = marian.write(params, tmp_path / 'export', tiny.config(made))
  theirs, report = transformers.MarianMTModel.from_pretrained(folder, output_loading_info=True)
  assert not any(report.values())
  return theirs.eval()


def sentences(seed, size, lengths):
  rows = np.zeros((len(lengths), max(lengths)), np.int32)
  for row, length in zip(rows, lengths):
    row[:length] = [*np.random.default_rng(seed + length).integers(2, size, length - 1), 1]
  return rows


SOURCE = sentences(0, SOURCE_VOCAB, (7, 3, 1, 5))
TARGET = sentences(9, VOCAB, (2, 8, 5, 1))


def fed(source=SOURCE):
  return dict(input_ids=torch.tensor(source).long(), attention_mask=torch.tensor(source != 0))


def labels():
  return torch.tensor(np.where(TARGET, TARGET, -100)).long()


@pytest.mark.parametrize('source_vocab', [0, SOURCE_VOCAB])
@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_logits(tmp_path, source_vocab, attention):
  made = model(source_vocab=source_vocab)
  params = tiny.params(made)
  theirs = pair(tmp_path, made, params)
  theirs.set_attn_implementation(attention)
  with torch.no_grad():
    out = theirs(**fed(), labels=labels())
  got = jax.jit(made.apply)({'params': params}, SOURCE, TARGET)
  real = TARGET != 0
  np.testing.assert_allclose(got[real], out.logits.numpy()[real][:, :-1], rtol=1e-4, atol=1e-4)
  # Of the start, which is their last entry, nothing is left in any probability.
  loss = losses.softmax_cross_entropy(got, TARGET)[real].mean()
  np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-5)
  encode = lambda params: made.apply({'params': params}, SOURCE, None, False, method='_encode')
  memory = jax.jit(encode)(params)
  np.testing.assert_allclose(memory[SOURCE != 0], out.encoder_last_hidden_state[
      torch.tensor(SOURCE != 0)], rtol=1e-4, atol=1e-4)


def test_gradients(tmp_path):
  made = model()
  params = tiny.params(made)
  theirs = pair(tmp_path, made, params)
  theirs(**fed(), labels=labels()).loss.backward()
  real = TARGET != 0
  mean = lambda p: losses.softmax_cross_entropy(
      made.apply({'params': p}, SOURCE, TARGET), TARGET)[real].mean()
  wanted = marian.to_huggingface(jax.jit(jax.grad(mean))(params))
  got = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
  assert set(wanted) - set(got) == {'final_logits_bias'}  # Theirs is a constant.
  for name, gradient in got.items():
    rows = slice(None, -1) if name == 'model.shared.weight' else slice(None)  # Ours has no start.
    np.testing.assert_allclose(gradient[rows], wanted[name][rows], rtol=2e-3, atol=1e-6,
                               err_msg=name)


def ours(made, params, beams):
  call = lambda params, method, *args: made.apply({'params': params}, *args, method=method)

  @jax.jit
  def find(params):
    memory = call(params, 'encode', SOURCE)

    def step(tokens, state):
      early = state[0].position < LEAST
      logits, state, attention = call(params, 'step', tokens, state, memory)
      return logits.at[:, 1].add(jnp.where(early, -jnp.inf, 0)), state, attention
    return search.beam_search(
        step, call(params, 'begin', memory, beams, ROOM), batch=len(SOURCE), beams=beams,
        limits=jnp.full(len(SOURCE), ROOM), room=ROOM, alpha=0.)
  return find(params)


@pytest.mark.parametrize('beams', [1, 4])
def test_translations(tmp_path, beams):
  """Token for token, every beam; for both no sentence may end in its first tokens."""
  made = model()
  params = tiny.params(made, seed=14)
  # Tokens and ends that are far from equally likely.
  params['embedding'] *= 2
  params['embedding'][1] *= 2
  theirs = pair(tmp_path, made, params)
  with torch.no_grad():
    out = theirs.generate(
        **fed(), num_beams=beams, num_return_sequences=beams, do_sample=False, max_new_tokens=ROOM,
        min_new_tokens=LEAST, renormalize_logits=True, length_penalty=0., early_stopping='never',
        output_scores=True, return_dict_in_generate=True)
  found = ours(made, params, beams)
  want = out.sequences.numpy()[:, 1:].reshape(len(SOURCE), beams, -1)
  lengths = np.asarray(found.lengths)
  assert len(np.unique(found.tokens[..., :LEAST].reshape(-1, LEAST), axis=0)) > 1
  for item, beam in np.ndindex(lengths.shape):
    n = lengths[item, beam]
    np.testing.assert_array_equal(found.tokens[item, beam, :n], want[item, beam, :n])
  if beams > 1:
    assert LEAST < lengths.min() and lengths.max() < ROOM and len(np.unique(lengths)) > 2
    np.testing.assert_allclose(found.scores, out.sequences_scores.numpy().reshape(-1, beams),
                               rtol=1e-4)


def test_their_weights_in(tmp_path):
  """A model of theirs with ids like opus-mt's: the end 0, padding the last, which begins too."""
  torch.manual_seed(0)
  made = model(scan=True)
  settings = tiny.DESCRIBED | dict(
      d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=4,
      decoder_attention_heads=4, vocab_size=VOCAB, pad_token_id=VOCAB - 1,
      decoder_start_token_id=VOCAB - 1, max_position_embeddings=20, forced_eos_token_id=None)
  settings.pop('model_type')
  theirs = transformers.MarianMTModel(transformers.MarianConfig(**settings)).eval()
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      if 'positions' not in name:
        p.copy_(torch.randn(p.shape) * (.3 if p.ndim > 1 else .2) + (p.ndim == 1))
    theirs.model.shared.weight[-1] = 0
  theirs.save_pretrained(tmp_path / 'theirs')
  shapes = tiny.shapes(made)
  weights, _ = marian.adapt(marian.open_weights(tmp_path / 'theirs', tiny.config(made)), shapes,
                            False)
  params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: weights['/'.join(key.key for key in path)].read(), shapes)
  assert flax.traverse_util.flatten_dict(params, sep='/').keys() == weights.keys()
  back = lambda ids: torch.tensor((ids - 1) % VOCAB).long()  # Our padding is 0, their end is 0.
  with torch.no_grad():
    want = theirs(input_ids=back(SOURCE), attention_mask=torch.tensor(SOURCE != 0),
                  labels=back(TARGET)).logits.numpy()
  got = jax.jit(made.apply)({'params': params}, SOURCE, TARGET)
  np.testing.assert_allclose(got, np.roll(want, 1, axis=-1), rtol=1e-4, atol=1e-4)


def test_the_vocabulary_is_that_of_their_tokenizer(tmp_path):
  pytest.importorskip('tokenizers')
  from translation import vocabulary
  texts = ['A bush, and "bushes" are green.', 'Grün ist der Busch; wie Büsche eben sind'] * 3
  vocab = vocabulary.train(texts, 'bpe', VOCAB * 3)
  made = model(vocab=len(vocab))
  params = tiny.params(made)
  folder = marian.write(params, tmp_path / 'export', tiny.config(made),
                        dict(source=vocab, target=vocab))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  coded = tokenizer(texts[:2], padding=True, return_tensors='np')
  want = [ids + [vocabulary.EOS] for ids in vocab.encode(texts[:2])]
  for row, mask, ids in zip(coded['input_ids'], coded['attention_mask'], want):
    assert row[mask == 1].tolist() == ids and not row[len(ids):].any()
  # What `generate` gives begins with the start, which no tokenizer has a text for.
  assert tokenizer.decode([len(vocab), *want[1], 0], skip_special_tokens=True) == texts[1]
