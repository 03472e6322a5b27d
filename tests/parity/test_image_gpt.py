"""Our Image GPT against Hugging Face transformers': the same weights give the same numbers."""

import jax
import numpy as np
import pytest

from configs import image_gpt
from core.nn import losses
from generative import checkpoints, palette, sampling, variants
from tests.generative import tiny

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

SIDE, COLORS = 6, 20
SIZE = variants.GPTS['mu']


def model(**changes):
  return tiny.model(colors=COLORS, length=SIDE ** 2, width=SIZE.width, depth=SIZE.depth,
                    heads=SIZE.heads, **changes)


def export(tmp_path, params):
  config = image_gpt.get_config('smoke')
  config.model.colors = COLORS
  config.data.image_size = SIDE
  colors = palette.Palette(np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)))
  return checkpoints.write_huggingface(params, tmp_path / 'export', colors, config), colors


def shifted(tokens):
  """What transformers must be fed: the start token, and not the last pixel."""
  first = np.full((len(tokens), 1), COLORS)
  return torch.tensor(np.concatenate([first, tokens[:, :-1]], 1))


def tokens_of(batch=3):
  return np.random.default_rng(3).integers(0, COLORS, (batch, SIDE ** 2)).astype(np.int32)


def test_logits_gradients_and_features(tmp_path):
  ours, tokens = model(), tokens_of()
  params = tiny.params(ours)
  folder, _ = export(tmp_path, params)
  theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder).eval()
  out = theirs(input_ids=shifted(tokens), output_hidden_states=True)
  made = ours.apply({'params': params}, tokens, pooled=True)
  np.testing.assert_allclose(made['logits'], out.logits.detach().numpy(), rtol=1e-4, atol=1e-4)
  with torch.no_grad():
    for layer, block in enumerate(theirs.transformer.h):
      want = block.ln_1(out.hidden_states[layer]).mean(1).numpy()
      np.testing.assert_allclose(made['features'][layer], want, rtol=1e-4, atol=1e-5)

  loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1),
                                           torch.tensor(tokens).long().flatten())
  loss.backward()
  mean = lambda p: losses.softmax_cross_entropy(
      ours.apply({'params': p}, tokens)['logits'], tokens).mean()
  value, grads = jax.value_and_grad(mean)(params)
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  by_name = dict(theirs.named_parameters())
  for name, want in (
      ('transformer.h.1.mlp.c_fc.weight', grads['h_1']['c_fc']['kernel']),
      ('transformer.h.0.attn.c_proj.weight',
       grads['h_0']['attn']['out']['kernel'].reshape(SIZE.width, -1)),
      ('transformer.h.0.ln_1.weight', grads['h_0']['ln_1']['scale']),
      ('lm_head.weight', grads['wtet']), ('transformer.wpe.weight', grads['wpe'])):
    np.testing.assert_allclose(by_name[name].grad.numpy(), want, rtol=2e-3, atol=1e-6)


def test_without_the_start_token_transformers_is_off_by_one(tmp_path):
  """The trap: fed as its own examples do, it answers another question."""
  ours, tokens = model(), tokens_of()
  params = tiny.params(ours)
  theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(
      export(tmp_path, params)[0]).eval()
  with torch.no_grad():
    wrong = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
  made = np.asarray(ours.apply({'params': params}, tokens)['logits'])
  assert np.abs(wrong - made).max() > .1


def test_greedy_completion_is_that_of_generate(tmp_path):
  ours, tokens = model(), tokens_of()
  params = tiny.params(ours)
  theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(
      export(tmp_path, params)[0]).eval()
  given = SIDE ** 2 // 2
  with torch.no_grad():
    prompt = shifted(tokens)[:, :given + 1]
    # No start token may be drawn: ours has no logit for it, and neither has lm_head.
    want = theirs.generate(input_ids=prompt, max_length=SIDE ** 2 + 1, do_sample=False,
                           use_cache=True).numpy()[:, 1:]
  settings = image_gpt.get_config('smoke').model.sample
  settings.temperature = 0.
  got = sampling.complete(ours, params, tokens[:, :given], jax.random.key(0), settings)
  np.testing.assert_array_equal(got, want)


def test_their_weights_in(tmp_path):
  config = transformers.ImageGPTConfig(
      vocab_size=COLORS + 1, n_positions=SIDE ** 2, n_embd=SIZE.width, n_layer=SIZE.depth,
      n_head=SIZE.heads, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
  torch.manual_seed(0)
  theirs = transformers.ImageGPTForCausalImageModeling(config).eval()
  theirs.save_pretrained(tmp_path / 'theirs')
  ours, tokens = model(scan=True), tokens_of()
  shapes = jax.eval_shape(lambda: tiny.params(ours))
  weights, _ = checkpoints.adapt(checkpoints.open_weights(tmp_path / 'theirs'), shapes, False)
  params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: weights['/'.join(key.key for key in path)].read(), shapes)
  with torch.no_grad():
    want = theirs(input_ids=shifted(tokens)).logits.numpy()
  np.testing.assert_allclose(ours.apply({'params': params}, tokens)['logits'], want,
                             rtol=1e-4, atol=1e-5)


def test_classification_with_the_same_input(tmp_path):
  ours, tokens = model(num_classes=4), tokens_of()
  params = tiny.params(ours)
  theirs = transformers.ImageGPTForImageClassification.from_pretrained(
      export(tmp_path, params)[0]).eval()
  with torch.no_grad():
    want = theirs(input_ids=shifted(tokens)).logits.numpy()
  made = ours.apply({'params': params}, tokens)['class_logits']
  np.testing.assert_allclose(made, want, rtol=1e-4, atol=1e-5)


def test_the_palette_is_that_of_their_processor(tmp_path):
  folder, colors = export(tmp_path, tiny.params(model()))
  clusters = np.array(transformers.ImageGPTImageProcessor.from_pretrained(folder).clusters)
  image = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
  pixels = image.reshape(-1, 3) / 127.5 - 1
  want = ((pixels[:, None] - clusters) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(colors.encode(image), want)
