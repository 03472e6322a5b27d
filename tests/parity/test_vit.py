"""Our ViT against Hugging Face transformers': the same weights give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from core.nn import blocks
from core.nn import losses
from vit_family import checkpoints, torch_layouts, transfer, vit

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

DEPTH, WIDTH, MLP, HEADS, SIZE, PATCH, CLASSES = 3, 48, 80, 4, 32, 8, 7


def torch_names(params):
  """Our unrolled parameters, or their gradients, in transformers' names and orientation."""
  def dense(name, p):
    # A torch matrix is [outputs, inputs]. The kernels of attention have split outputs (inputs for
    # the last projection).
    if name.endswith('o_proj'):
      kernel = p['kernel'].reshape(-1, p['kernel'].shape[-1])
    else:
      kernel = p['kernel'].reshape(p['kernel'].shape[0], -1)
    return {f'{name}.weight': kernel.T, f'{name}.bias': p['bias'].reshape(-1)}

  def norm(name, p):
    return {f'{name}.weight': p['scale'], f'{name}.bias': p['bias']}

  encoder = params['Transformer']
  out = {
      'vit.embeddings.cls_token': params['cls'],
      'vit.embeddings.position_embeddings': encoder['posembed_input']['pos_embedding'],
      'vit.embeddings.patch_embeddings.projection.weight':
          params['embedding']['kernel'].transpose(3, 2, 0, 1),
      'vit.embeddings.patch_embeddings.projection.bias': params['embedding']['bias'],
  }
  for i in range(DEPTH):
    block, prefix = encoder[f'encoderblock_{i}'], f'vit.layers.{i}'
    out |= norm(f'{prefix}.layernorm_before', block['LayerNorm_0'])
    for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('o', 'out')):
      out |= dense(f'{prefix}.attention.{theirs}_proj',
                   block['MultiHeadDotProductAttention_0'][ours])
    out |= norm(f'{prefix}.layernorm_after', block['LayerNorm_1'])
    out |= dense(f'{prefix}.mlp.fc1', block['MlpBlock_0']['Dense_0'])
    out |= dense(f'{prefix}.mlp.fc2', block['MlpBlock_0']['Dense_1'])
  return out | norm('vit.layernorm', encoder['encoder_norm']) | dense('classifier', params['head'])


def random_params():
  """Every parameter away from its init, so that no scale, bias or zero head is invisible."""
  model = vit.VisionTransformer(CLASSES, PATCH, WIDTH, DEPTH, MLP, HEADS)
  shapes = nn.meta.unbox(jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + 0.15 * rng.normal(size=leaf.shape)).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_model(params, activation):
  config = transformers.ViTConfig(
      hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
      intermediate_size=MLP, image_size=SIZE, patch_size=PATCH, num_labels=CLASSES,
      hidden_act=activation, layer_norm_eps=1e-6, hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0, attn_implementation='eager')
  model = transformers.ViTForImageClassification(config).eval()
  weights = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in torch_names(params).items()}
  model.load_state_dict(weights, strict=True)
  return model


def assert_close(got, want, relative, what=None):
  """The largest difference is a small share of the largest value."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, what
  assert abs(want).max() > 0, what
  assert abs(got - want).max() <= relative * abs(want).max(), what


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('ours, theirs', [
    ('gelu_tanh', 'gelu_pytorch_tanh'), ('gelu_erf', 'gelu')])
def test_logits_attention_and_gradients_equal_those_of_transformers(ours, theirs, scan):
  rng = np.random.default_rng(1)
  images = rng.uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
  labels = np.array([5, 0, 3], np.int32)
  params = random_params()
  peer = torch_model(params, theirs)
  out = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_attentions=True)
  peer_loss = torch.nn.functional.cross_entropy(out.logits, torch.from_numpy(labels).long())
  peer_loss.backward()

  model = vit.VisionTransformer(
      CLASSES, PATCH, WIDTH, DEPTH, MLP, HEADS, activation=ours, scan=scan)

  def loss(params):
    if scan:
      params = params | {
          'Transformer': blocks.stack_layers(params['Transformer'], 'encoderblock')}
    (logits, _), state = model.apply({'params': params}, images, mutable=['intermediates'])
    return losses.softmax_cross_entropy(logits, labels).mean(), (logits, state['intermediates'])
  # Weights are wanted on one path and must not change the other, which training takes.
  plain = jax.jit(lambda params: jax.grad(lambda p: losses.softmax_cross_entropy(
      model.apply({'params': p}, images)[0], labels).mean())(params))
  (value, (logits, seen)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  assert_close(logits, out.logits.detach(), 1e-4)
  np.testing.assert_allclose(value, peer_loss.item(), rtol=1e-4)
  seen = seen['Transformer']
  if not scan:
    seen = blocks.stack_layers(seen, 'encoderblock')
  attention = seen['encoderblock']['MultiHeadDotProductAttention_0']['attention'][0]
  assert attention.shape == (DEPTH, 3, HEADS, 17, 17)
  for i, want in enumerate(out.attentions):
    np.testing.assert_allclose(attention[i], want.detach(), atol=1e-5)

  peer_grads = {name: p.grad for name, p in peer.named_parameters()}
  got = torch_names(grads)
  assert got.keys() == peer_grads.keys()
  stacked = params | {'Transformer': blocks.stack_layers(params['Transformer'], 'encoderblock')}
  alone = plain(stacked if scan else params)
  if scan:
    alone = alone | {'Transformer': blocks.unstack_layers(alone['Transformer'], 'encoderblock')}
  alone = torch_names(alone)
  for name, want in peer_grads.items():
    if name.endswith('k_proj.bias'):
      # A bias of the keys shifts all scores of a query alike: its gradient is rounding.
      continue
    assert_close(got[name], want, 1e-3, name)
    assert_close(alone[name], want, 1e-3, name)


def our_logits(params, activation, images):
  """Logits and the features that the head reads."""
  size = params['pre_logits']['bias'].size if 'pre_logits' in params else None
  model = vit.VisionTransformer(CLASSES, PATCH, WIDTH, DEPTH, MLP, HEADS, activation=activation,
                                representation_size=size)
  return jax.jit(model.apply)({'params': params}, images)


def fitted(path, params):
  """The checkpoint at `path` as a tree like `params`."""
  found, _ = transfer.adapt(checkpoints.open_weights(path), params, transfer=False)
  want = traverse_util.flatten_dict(params, sep='/')
  assert {k: w.shape for k, w in found.items()} == {k: v.shape for k, v in want.items()}
  return traverse_util.unflatten_dict({k: w.read() for k, w in found.items()}, sep='/')


@pytest.mark.parametrize('ours, theirs', [('gelu_tanh', 'gelu_new'), ('gelu_erf', 'gelu')])
def test_transformers_reads_what_we_export(ours, theirs, tmp_path):
  params = random_params()
  images = np.random.default_rng(1).uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
  names = [f'class {i}' for i in range(CLASSES)]
  out = torch_layouts.write_huggingface(
      params, tmp_path / 'export', image_size=SIZE, activation=ours, class_names=names)
  peer, info = transformers.ViTForImageClassification.from_pretrained(
      out, output_loading_info=True)
  assert not any(info.values()), info
  assert peer.config.id2label == dict(enumerate(names)) and peer.config.hidden_act == theirs
  with torch.no_grad():
    want = peer.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits
  assert_close(our_logits(params, ours, images)[0], want, 1e-4)


@pytest.mark.parametrize('ours, theirs', [
    ('gelu_tanh', 'gelu_pytorch_tanh'), ('gelu_erf', 'gelu')])
def test_we_read_what_transformers_saves(ours, theirs, tmp_path):
  params = random_params()
  images = np.random.default_rng(1).uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
  peer = torch_model(params, theirs)
  peer.save_pretrained(tmp_path)
  with torch.no_grad():
    want = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits
  read = fitted(tmp_path, params)
  assert_close(our_logits(read, ours, images)[0], want, 1e-4)
  # By way of Google's layout nothing changes.
  again = fitted(checkpoints.write_npz(read, tmp_path / 'x'), params)
  np.testing.assert_array_equal(our_logits(again, ours, images)[0],
                                our_logits(read, ours, images)[0])


def test_the_pooler_of_transformers_is_pre_logits(tmp_path):
  params = random_params() | {'pre_logits': {
      'kernel': np.random.default_rng(3).normal(0, .15, (WIDTH, WIDTH)).astype(np.float32),
      'bias': np.random.default_rng(4).normal(0, .15, WIDTH).astype(np.float32)}}
  images = np.random.default_rng(1).uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
  config = torch_model(random_params(), 'gelu').config
  peer = transformers.ViTModel(config, add_pooling_layer=True).eval()
  weights = {k.removeprefix('vit.'): v for k, v in torch_names(params).items()
             if 'classifier' not in k} | {
      'pooler.dense.weight': params['pre_logits']['kernel'].T,
      'pooler.dense.bias': params['pre_logits']['bias']}
  peer.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in weights.items()},
                       strict=True)
  peer.save_pretrained(tmp_path)
  with torch.no_grad():
    want = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output
  headless = {k: v for k, v in params.items() if k != 'head'}
  read = fitted(tmp_path, headless) | {'head': params['head']}
  assert_close(our_logits(read, 'gelu_erf', images)[1]['pre_logits'], want, 1e-4)
