import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn

from core.config import UserError
from vit_family import bit
from vit_family import vit
from vit_family import zoo


def make(**kwargs):
  """A `config.model`; by default B/16."""
  return ml_collections.ConfigDict(dict(
      variant='B', patch_size=16, backbone='', classifier='token', representation_size=0,
      dropout_rate=0.0, attention_dropout_rate=0.0, stochastic_depth=0.0, activation='gelu_tanh',
      head_bias_init=0.0, scan=True) | kwargs)


def shapes(config, size=224, classes=1000):
  """Flat parameter shapes of the model of a config, without memory or compilation."""
  model = zoo.build(config, classes, jnp.float32, 'none')
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))['params']
  return {k: v.shape for k, v in flax.traverse_util.flatten_dict(params, sep='/').items()}


@pytest.mark.parametrize('config, want, name, side', [
    (make(), 86_567_656, 'B/16 at 224 px', 16),
    (make(variant='S', classifier='gap'), 22_049_896, 'S/16 at 224 px with gap', 16),
    (make(variant='Ti', backbone='R', patch_size=8), 6_337_704, 'R+Ti/16 at 224 px', 32),
    (make(variant='S', backbone='R26', patch_size=1), 36_431_912, 'R26+S/32 at 224 px', 32),
    (make(backbone='R26', patch_size=1), 101_383_976, 'R26+B/32 at 224 px', 32),
    (make(backbone='R50/16', patch_size=1), 98_659_112, 'R50+B/16 at 224 px', 16),
    (make(variant='L', backbone='R50', patch_size=1), 328_994_856, 'R50+L/32 at 224 px', 32),
    (make(variant='R50x1'), 25_549_352, 'BiT-R50x1', 1),
])
def test_published_models_by_name(config, want, name, side):
  zoo.check(config, 224)
  flat = shapes(config)
  assert sum(int(np.prod(shape)) for shape in flat.values()) == want
  assert zoo.looks_like(flat) == name
  assert zoo.downsampling(config) == side
  assert zoo.is_vit(config) == (side > 1)


@pytest.mark.parametrize('config, size, name', [
    (make(variant='Ti', backbone='R', patch_size=8, representation_size=192), 384,
     'R+Ti/16 at 384 px'),
    (make(variant='Ti', scan=False), 384, 'Ti/16 at 384 px'),
    (make(variant='H', patch_size=14), 518, 'H/14 at 518 px'),
    (make(variant='mini', patch_size=8, classifier='map'), 32, 'mini/8 at 32 px with map'),
    (make(variant='R14x0.5'), 33, 'BiT-R14x0.5'),
])
def test_parameters_are_recognised_without_their_head(config, size, name):
  flat = {k: v for k, v in shapes(config, size).items() if not k.startswith('head/')}
  assert zoo.looks_like(flat) == name


def test_every_variant_has_a_size_of_its_own():
  # Otherwise parameters could not be told apart.
  assert len(set(vit.VARIANTS.values())) == len(vit.VARIANTS)
  assert len(set(bit.VARIANTS.values())) == len(bit.VARIANTS)
  assert not set(vit.VARIANTS) & set(bit.VARIANTS)


def test_other_parameters_are_an_unknown_model():
  base = shapes(make(variant='Ti'))
  unknown = 'an unknown model'
  assert zoo.looks_like({}) == unknown
  assert zoo.looks_like({'dense/kernel': (3, 4)}) == unknown
  without = {k: v for k, v in base.items() if not k.startswith('embedding/')}
  assert zoo.looks_like(without) == unknown
  wide = 'Transformer/encoderblock/MlpBlock_0/Dense_0/kernel'
  assert zoo.looks_like(base | {wide: (12, 192, 767)}) == unknown
  bits = shapes(make(variant='R14x0.5'))
  extra = {'block4/unit02/a/standardized_conv2d/kernel': (1, 1, 1024, 256)}
  assert zoo.looks_like(bits | extra) == unknown
  stem = {'conv_root/kernel': (7, 7, 3, 64), 'block1/unit1/conv1/kernel': (1, 1, 64, 64)}
  assert zoo.looks_like(base | stem) == unknown
  # Positions that form no square.
  positions = {'Transformer/posembed_input/pos_embedding': (1, 151, 192)}
  assert zoo.looks_like(base | positions) == 'Ti/16 of 150 tokens'


def test_every_key_reaches_the_model():
  config = make(variant='S', patch_size=32, backbone='R26', classifier='gap',
                representation_size=24, dropout_rate=0.1, attention_dropout_rate=0.2,
                stochastic_depth=0.3, activation='gelu_erf', head_bias_init=-10.0, scan=False)
  assert zoo.build(config, 7, jnp.bfloat16, 'full') == vit.VisionTransformer(
      num_classes=7, patch_size=32, width=384, depth=12, mlp_dim=1536, heads=6, classifier='gap',
      stages=(2, 2, 2, 2), representation_size=24, head_bias_init=-10.0, dropout_rate=0.1,
      attention_dropout_rate=0.2, stochastic_depth=0.3, activation='gelu_erf',
      dtype=jnp.bfloat16, scan=False, remat='full')
  plain = zoo.build(make(), 7, jnp.float32, 'none')
  assert plain.stages is None and plain.representation_size is None
  # The stem alone is a backbone of no stages, which is not the same as none.
  assert zoo.build(make(backbone='R'), 7, jnp.float32, 'none').stages == ()
  assert zoo.build(make(variant='R26x0.5', head_bias_init=-6.9), 7, jnp.bfloat16,
                   'dots') == bit.BiT(num_classes=7, stages=(2, 2, 2, 2), width_factor=0.5,
                                      head_bias_init=-6.9, dtype=jnp.bfloat16, remat='dots')


@pytest.mark.parametrize('config, size, message', [
    (make(variant='R50x4'), 224, "config.model.variant: unknown name 'R50x4'; did you mean 'R50x"),
    (make(backbone='R5'), 224, "config.model.backbone: unknown name 'R5'; did you mean 'R50'"),
    (make(classifier='tok'), 224, "config.model.classifier: unknown name 'tok'"),
    (make(activation='relu'), 224, "config.model.activation: unknown name 'relu'"),
    (make(stochastic_depth=1.0), 224, 'config.model.stochastic_depth=1.0 is not a rate'),
    (make(dropout_rate=-0.1), 224, 'config.model.dropout_rate=-0.1 is not a rate'),
    (make(patch_size=0), 224, 'config.model.patch_size=0; it must be at least 1'),
    (make(patch_size=14), 384,
     'config.data.image_size=384 is not a multiple of config.model.patch_size=14; the nearest is '
     '378'),
    (make(backbone='R50', patch_size=1), 240,
     'config.data.image_size=240 is not a multiple of 32, which is config.model.patch_size=1 times '
     "the downsampling of config.model.backbone='R50'; the nearest is 256"),
    (make(variant='Ti', backbone='R', patch_size=8), 16, 'not a multiple of 32'),
])
def test_mistakes_are_named_in_one_line(config, size, message):
  with pytest.raises(UserError) as error:
    zoo.check(config, size)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_bit_takes_any_size_and_ignores_what_means_nothing_to_it():
  zoo.check(make(variant='R26x0.5', patch_size=0, backbone='none', classifier='?'), 33)
