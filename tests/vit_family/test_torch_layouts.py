import json

import numpy as np
import pytest
from flax import traverse_util

from core.config import UserError
from core.weights import Weight, match_layers
from vit_family import checkpoints, torch_layouts, transfer

D, HEADS, MLP, CLASSES, PATCH = 8, 2, 16, 5, 4
BLOCK = 'Transformer/encoderblock_1'
ATTENTION = f'{BLOCK}/MultiHeadDotProductAttention_0'


def ours(seed=0, depth=2):
  """A small model's parameters under our names."""
  rng = np.random.default_rng(seed)
  shapes = {'cls': (1, 1, D), 'embedding/kernel': (PATCH, PATCH, 3, D), 'embedding/bias': (D,),
            transfer.POSITIONS: (1, 10, D), 'Transformer/encoder_norm/scale': (D,),
            'Transformer/encoder_norm/bias': (D,), 'head/kernel': (D, CLASSES),
            'head/bias': (CLASSES,)}
  for i in range(depth):
    block = f'Transformer/encoderblock_{i}'
    for n in (0, 1):
      shapes |= {f'{block}/LayerNorm_{n}/{leaf}': (D,) for leaf in ('scale', 'bias')}
    for n in ('query', 'key', 'value'):
      shapes[f'{block}/MultiHeadDotProductAttention_0/{n}/kernel'] = (D, HEADS, D // HEADS)
      shapes[f'{block}/MultiHeadDotProductAttention_0/{n}/bias'] = (HEADS, D // HEADS)
    shapes |= {f'{block}/MultiHeadDotProductAttention_0/out/kernel': (HEADS, D // HEADS, D),
               f'{block}/MultiHeadDotProductAttention_0/out/bias': (D,),
               f'{block}/MlpBlock_0/Dense_0/kernel': (D, MLP),
               f'{block}/MlpBlock_0/Dense_0/bias': (MLP,),
               f'{block}/MlpBlock_0/Dense_1/kernel': (MLP, D),
               f'{block}/MlpBlock_0/Dense_1/bias': (D,)}
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def tree(flat):
  return traverse_util.unflatten_dict(flat, sep='/')


def read_back(tensors, want):
  """What our reader makes of torch tensors, fitted to a model with the parameters `want`."""
  weights = torch_layouts.from_torch(
      {k: Weight(v.shape, lambda v=v: v) for k, v in tensors.items()})
  found, _ = transfer.adapt(weights, tree(want), transfer=False)
  return {k: w.read() for k, w in found.items()}


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_huggingface_names_and_orientation_by_hand():
  flat = ours()
  made = torch_layouts.to_huggingface(tree(flat))
  assert len(made) == len(flat)
  query = made['vit.encoder.layer.1.attention.attention.query.weight']
  # Output 1 * 4 + 2 is element 2 of head 1.
  assert query[6, 3] == flat[f'{ATTENTION}/query/kernel'][3, 1, 2]
  assert made['vit.encoder.layer.1.attention.attention.query.bias'][6] == flat[
      f'{ATTENTION}/query/bias'][1, 2]
  assert made['vit.encoder.layer.1.attention.output.dense.weight'][3, 6] == flat[
      f'{ATTENTION}/out/kernel'][1, 2, 3]
  assert made['vit.encoder.layer.1.intermediate.dense.weight'].shape == (MLP, D)
  assert made['vit.encoder.layer.1.output.dense.weight'].shape == (D, MLP)
  patch = made['vit.embeddings.patch_embeddings.projection.weight']
  assert patch[5, 2, 0, 3] == flat['embedding/kernel'][0, 3, 2, 5]
  np.testing.assert_array_equal(made['vit.encoder.layer.1.layernorm_after.weight'],
                                flat[f'{BLOCK}/LayerNorm_1/scale'])
  np.testing.assert_array_equal(made['classifier.weight'], flat['head/kernel'].T)
  assert_same(read_back(made, flat), flat)


def test_new_names_of_transformers_and_a_bare_model_with_its_pooler():
  flat = ours()
  made = torch_layouts.to_huggingface(tree(flat))
  for old, new in (('encoder.layer', 'layers'), ('attention.attention.query', 'attention.q_proj'),
                   ('attention.attention.key', 'attention.k_proj'),
                   ('attention.attention.value', 'attention.v_proj'),
                   ('attention.output.dense', 'attention.o_proj'),
                   ('intermediate.dense', 'mlp.fc1'), ('output.dense', 'mlp.fc2')):
    made = {k.replace(old, new): v for k, v in made.items()}
  assert_same(read_back(made, flat), flat)
  bare = {k.removeprefix('vit.'): v for k, v in made.items() if 'classifier' not in k}
  pooler = np.arange(D * D, dtype=np.float32).reshape(D, D)
  got = read_back(bare | {'pooler.dense.weight': pooler}, flat)
  np.testing.assert_array_equal(got['pre_logits/kernel'], pooler.T)


def test_timm_names_and_its_fused_projection():
  flat = ours()
  made = {'cls_token': flat['cls'], 'pos_embed': flat[transfer.POSITIONS],
          'patch_embed.proj.weight': flat['embedding/kernel'].transpose(3, 2, 0, 1),
          'patch_embed.proj.bias': flat['embedding/bias'],
          'norm.weight': flat['Transformer/encoder_norm/scale'],
          'norm.bias': flat['Transformer/encoder_norm/bias'],
          'head.weight': flat['head/kernel'].T, 'head.bias': flat['head/bias']}
  for i in range(2):
    block = f'Transformer/encoderblock_{i}'
    attention = f'{block}/MultiHeadDotProductAttention_0'
    parts = [flat[f'{attention}/{n}/kernel'] for n in ('query', 'key', 'value')]
    made |= {
        f'blocks.{i}.attn.qkv.weight': np.concatenate([p.reshape(D, D).T for p in parts]),
        f'blocks.{i}.attn.qkv.bias': np.concatenate(
            [flat[f'{attention}/{n}/bias'].reshape(D) for n in ('query', 'key', 'value')]),
        f'blocks.{i}.attn.proj.weight': flat[f'{attention}/out/kernel'].reshape(D, D).T,
        f'blocks.{i}.attn.proj.bias': flat[f'{attention}/out/bias']}
    for n in (0, 1):
      made |= {f'blocks.{i}.norm{n + 1}.weight': flat[f'{block}/LayerNorm_{n}/scale'],
               f'blocks.{i}.norm{n + 1}.bias': flat[f'{block}/LayerNorm_{n}/bias'],
               f'blocks.{i}.mlp.fc{n + 1}.weight': flat[f'{block}/MlpBlock_0/Dense_{n}/kernel'].T,
               f'blocks.{i}.mlp.fc{n + 1}.bias': flat[f'{block}/MlpBlock_0/Dense_{n}/bias']}
  assert_same(read_back(made, flat), flat)


def test_timm_hybrids():
  names = {'patch_embed.backbone.conv.weight': ('conv_root/kernel', (64, 3, 7, 7)),
           'patch_embed.backbone.norm.bias': ('gn_root/bias', (64,)),
           'patch_embed.backbone.stem.conv.weight': ('conv_root/kernel', (64, 3, 7, 7)),
           'patch_embed.backbone.stem.norm.weight': ('gn_root/scale', (64,)),
           'patch_embed.backbone.stages.1.blocks.0.conv2.weight':
               ('block2/unit1/conv2/kernel', (16, 8, 3, 3)),
           'patch_embed.backbone.stages.1.blocks.0.norm3.bias': ('block2/unit1/gn3/bias', (8,)),
           'patch_embed.backbone.stages.0.blocks.2.downsample.conv.weight':
               ('block1/unit3/conv_proj/kernel', (16, 8, 1, 1)),
           'patch_embed.backbone.stages.0.blocks.2.downsample.norm.weight':
               ('block1/unit3/gn_proj/scale', (16,)),
           'patch_embed.unheard_of': ('patch_embed.unheard_of', (1,))}
  made = torch_layouts.from_torch({k: Weight(s, None) for k, (_, s) in names.items()})
  assert set(made) == {name for name, _ in names.values()}
  assert made['conv_root/kernel'].shape == (7, 7, 3, 64)
  assert made['block2/unit1/conv2/kernel'].shape == (3, 3, 8, 16)


@pytest.mark.parametrize('change, match', [
    (dict(pre_logits={}), 'pre_logits'), (dict(MAPHead_0={}), "classifier='map'"),
    (dict(conv_root={}), 'hybrid'), (dict(root_block={}), 'BiT'), (dict(cls=None), 'gap')])
def test_what_transformers_cannot_hold(change, match, tmp_path):
  params = {k: v for k, v in (tree(ours()) | change).items() if v is not None}
  with pytest.raises(UserError, match=f"'huggingface' cannot hold .*{match}.*; use 'npz'"):
    torch_layouts.write_huggingface(params, tmp_path / 'out', image_size=12, class_names=[],
                                    activation='gelu_tanh')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('scan', [False, True])
def test_the_folder_says_what_it_holds_and_reads_back(scan, tmp_path):
  flat = ours()
  if scan:
    weights = {k: Weight(v.shape, lambda v=v: v) for k, v in flat.items()}
    flat = {k: w.read() for k, w in match_layers(
        weights, [f'{transfer.LAYERS}/x'], transfer.LAYERS).items()}
  out = torch_layouts.write_huggingface(
      tree(flat), tmp_path / 'out', image_size=12, activation='gelu_erf', class_names=list('abcde'))
  assert sorted(p.name for p in out.iterdir()) == ['config.json', 'model.safetensors']
  config = json.loads((out / 'config.json').read_text())
  assert {k: config[k] for k in (
      'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'image_size',
      'patch_size', 'num_channels', 'hidden_act', 'layer_norm_eps')} == dict(
          hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=MLP,
          image_size=12, patch_size=PATCH, num_channels=3, hidden_act='gelu', layer_norm_eps=1e-6)
  assert config['id2label'] == dict(zip('01234', 'abcde'))
  for path in (out, out / 'model.safetensors'):
    found, notes = transfer.adapt(checkpoints.open_weights(path), tree(flat), transfer=False)
    assert_same({k: w.read() for k, w in found.items()}, flat)
  assert notes.looks_like
