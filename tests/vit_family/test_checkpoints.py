import jax
import numpy as np
import pytest

from configs import vit as vit_config
from core.config import UserError
from core.plan import make_plan
from vit_family import checkpoints


def params_of(scan, representation_size=0):
  config = vit_config.get_config('smoke')
  config.model.scan = scan
  config.model.variant = 'mini'
  config.model.representation_size = representation_size
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32),
                      make_plan(config, jax.devices()[:1]).params_shape)


# Sheet section 4: the layout of the public files, at width 64, 4 heads, patch 8, 10 classes.
BLOCK = {
    'LayerNorm_0/scale': (64,), 'LayerNorm_0/bias': (64,),
    **{f'MultiHeadDotProductAttention_1/{n}/kernel': (64, 4, 16) for n in ('query', 'key', 'value')},
    **{f'MultiHeadDotProductAttention_1/{n}/bias': (4, 16) for n in ('query', 'key', 'value')},
    'MultiHeadDotProductAttention_1/out/kernel': (4, 16, 64),
    'MultiHeadDotProductAttention_1/out/bias': (64,),
    'LayerNorm_2/scale': (64,), 'LayerNorm_2/bias': (64,),
    'MlpBlock_3/Dense_0/kernel': (64, 128), 'MlpBlock_3/Dense_0/bias': (128,),
    'MlpBlock_3/Dense_1/kernel': (128, 64), 'MlpBlock_3/Dense_1/bias': (64,)}
PUBLIC = {
    'cls': (1, 1, 64), 'embedding/kernel': (8, 8, 1, 64), 'embedding/bias': (64,),
    'Transformer/posembed_input/pos_embedding': (1, 5, 64),
    'Transformer/encoder_norm/scale': (64,), 'Transformer/encoder_norm/bias': (64,),
    'head/kernel': (64, 10), 'head/bias': (10,),
    **{f'Transformer/encoderblock_{i}/{k}': s for i in range(6) for k, s in BLOCK.items()}}


@pytest.mark.parametrize('scan', [True, False])
def test_the_public_layout_and_back(scan, tmp_path):
  params = params_of(scan)
  path = checkpoints.write_npz(params, tmp_path / 'model')
  assert path.name == 'model.npz'
  with np.load(path, allow_pickle=False) as archive:
    assert {k: archive[k].shape for k in archive.files} == PUBLIC
  back = checkpoints.read_npz(str(path), params)
  jax.tree.map(np.testing.assert_array_equal, params, back)


def test_scanned_and_unrolled_write_the_same_file_names_and_values(tmp_path):
  scanned = checkpoints.to_public(params_of(True))
  unrolled = checkpoints.from_public(scanned, scan=False)
  again = checkpoints.to_public(unrolled)
  assert scanned.keys() == again.keys()
  for name, value in scanned.items():
    np.testing.assert_array_equal(value, again[name])


def test_pre_logits_are_kept():
  assert checkpoints.to_public(params_of(True, 64))['pre_logits/kernel'].shape == (64, 64)


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 cut short', b'no archive at all'])
def test_not_an_archive(content, tmp_path):
  path = tmp_path / 'x.npz'
  path.write_bytes(content)
  with pytest.raises(UserError, match='x.npz: not a .npz'):
    checkpoints.read_npz(str(path), params_of(True))


def test_nothing_is_unpickled(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, cls=np.array([{'a': print}], dtype=object))
  with pytest.raises(UserError, match='not a .npz of arrays'):
    checkpoints.read_npz(str(path), params_of(True))
