"""Image GPT: Chen et al., "Generative Pretraining from Pixels", 2020.

Parameters have the names of the released TensorFlow code and, but for attention, its shapes. Where
the paper's prose and that code disagree the code is followed: its norms have neither mean nor bias,
no projection has a bias, and the output head is not tied to the token embedding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core import partition
from core.nn import attention, blocks, decode

INITS = ('code', 'sparse', 'huggingface')
LAYERS = 'h'


class ImageGPT(nn.Module):
  """A stack of pre-norm blocks over palette indices, autoregressive or BERT.

  Attributes:
    colors: size of the palette.
    length: pixels of an image.
    width, depth, heads: see `variants.GPTS`.
    bert: full attention to masked inputs, instead of causal attention to shifted ones.
    num_classes: size of the class head; 0 for none.
    head_layers: the layers whose features the class head reads, side by side: l < depth is the norm
      that block l begins with, depth the final norm; () for the final norm alone.
    frozen: whether the class head trains on features that it does not change (linear probe).
    initializer: 'code', 'sparse' (Child et al. 2019, whom the paper's prose cites), 'huggingface'.
    dtype: computation dtype; parameters, statistics and logits are float32.
    scan: one compiled block instead of `depth`.
    remat: what the backward pass computes again: 'none', 'dots' or 'full'.
  """
  colors: int
  length: int
  width: int
  depth: int
  heads: int
  bert: bool = False
  num_classes: int = 0
  head_layers: tuple[int, ...] = ()
  frozen: bool = False
  initializer: str = 'code'
  dtype: Any = jnp.float32
  scan: bool = False
  remat: str = 'none'

  @nn.compact
  def __call__(
      self, tokens: jax.Array, *, keep: jax.Array | None = None, pooled: bool = False,
      caches: Sequence[decode.Cache] | None = None, begin: bool = True) -> dict[str, Any]:
    """Runs the model; what the caller does not use is never computed under `jax.jit`.

    Args:
      tokens: int32 `[batch, length]`, palette indices in the order of the sequence.
      keep: float `[batch, length]`, only for BERT: 0 where a pixel's content is hidden.
      pooled: also give the features of every layer.
      caches: one a layer, to generate: `tokens` are then those that come next, one or more, and
        the logits are those of the token after each. Needs `scan=False`.
      begin: with `caches`, whether to begin with the start vector, before `tokens`.

    Returns:
      'logits' float32 `[batch, length, colors]`: row i is for pixel i (with `caches`, the last row
      is for the pixel to come). 'class_logits' float32 `[batch, classes]`, with a class head.
      'features' float32 `[depth + 1, batch, width]`, with `pooled`: the mean over positions of the
      norm that block l begins with, and of the final norm (section 3.3). 'caches' after.
    """
    std = stddevs(self.initializer, self.width, self.depth)
    table = lambda name, shape, names: self.param(
        name, nn.with_logical_partitioning(_normal(std[name]), names), shape, jnp.float32)
    wte = table('wte', (self.colors, self.width), ('vocab', 'embed'))
    wpe = table('wpe', (self.length, self.width), ('length', 'embed'))
    x = jnp.asarray(wte, self.dtype)[tokens]
    if self.bert:
      # The released code has no mask token: a hidden pixel is its position and nothing else.
      x = x * keep[..., None].astype(self.dtype)
    else:
      sos = table('sos', (self.width,), ('embed',)).astype(self.dtype)
      first = jnp.broadcast_to(sos, (len(x), 1, self.width))
      if caches is None:
        x = jnp.concatenate([first, x[:, :-1]], axis=1)
      elif begin:
        x = jnp.concatenate([first, x], axis=1)
    if caches is None:
      x = x + wpe.astype(self.dtype)
    else:
      rows = jax.lax.dynamic_slice_in_dim(wpe, caches[0].position, x.shape[1])
      x = x + rows.astype(self.dtype)
    x = partition.constrain(x, ('batch', 'length', 'embed'))

    wanted = pooled or bool(self.head_layers)
    def make_block(name):
      return Block(self.heads, causal=not self.bert, stddevs=std, pooled=wanted, dtype=self.dtype,
                   name=name)

    x, kept = blocks.run_blocks(
        make_block, self.depth, x, prefix=LAYERS, scan=self.scan, remat=self.remat, outputs=True,
        layer_inputs={} if caches is None else {'cache': caches})
    x = rms_norm(self.dtype, 'ln_f')(x)
    wtet = table('wtet', (self.colors, self.width), ('vocab', 'embed'))
    # In generation only the last row is asked for.
    last = x if caches is None else x[:, -1:]
    out: dict[str, Any] = {'logits': jnp.einsum(
        'bnd,kd->bnk', last, wtet.astype(self.dtype), preferred_element_type=jnp.float32)}
    if caches is not None:
      out['caches'] = [layer['cache'] for layer in kept]
      return out
    final = _mean(x)
    features = None
    if wanted:
      layers = kept['pooled'] if self.scan else jnp.stack([layer['pooled'] for layer in kept])
      features = jnp.concatenate([layers, final[None]])
    if pooled:
      out['features'] = features
    if self.num_classes:
      read = final
      if self.head_layers:
        read = jnp.concatenate([features[layer] for layer in self.head_layers], axis=-1)
      if self.frozen:
        read = jax.lax.stop_gradient(read)
      wclf = table('wclf', (self.num_classes, read.shape[-1]), ('classes', 'embed'))
      out['class_logits'] = read @ wclf.T
    return out


def stddevs(init: str, width: int, depth: int) -> dict[str, float]:
  """Standard deviations of the normal initialisers of every tensor but the norms, which are 1."""
  if init == 'code':
    return {'wte': .02, 'wpe': .01, 'sos': .02, 'qkv': width ** -.5,
            'out': (width * depth) ** -.5, 'c_fc': .02, 'c_proj': .02, 'wtet': 0., 'wclf': 0.}
  if init == 'sparse':
    # One table of positions: the recipe's number of embeddings is 1.
    each, last = .125 * width ** -.5, (2 * depth) ** -.5
    return {'wte': each, 'wpe': each, 'sos': each, 'qkv': each, 'out': each * last, 'c_fc': each,
            'c_proj': each / 2 * last, 'wtet': 0., 'wclf': 0.}
  if init == 'huggingface':
    last = .02 * (2 * depth) ** -.5
    return {'wte': .02, 'wpe': .02, 'sos': .02, 'qkv': .02, 'out': last, 'c_fc': .02,
            'c_proj': last, 'wtet': .02, 'wclf': .02}
  raise ValueError(f'init={init!r}: expected one of {INITS}')


def _normal(stddev: float):
  return nn.initializers.normal(stddev) if stddev else nn.initializers.zeros


def rms_norm(dtype: Any, name: str) -> nn.RMSNorm:
  """x / sqrt(mean(x^2) + 1e-5) * scale: what the paper calls layer norm, as its code has it."""
  return nn.RMSNorm(epsilon=1e-5, dtype=dtype, name=name, scale_init=nn.with_logical_partitioning(
      nn.initializers.ones, ('embed',)))


def _mean(x: jax.Array) -> jax.Array:
  """`[batch, length, width]` -> float32 `[batch, width]`."""
  return x.astype(jnp.float32).mean(axis=1)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), without a bias anywhere (section 2.2).

  Attributes:
    heads: attention heads.
    causal: whether a position sees only itself and what is before it.
    stddevs: of the initialisers.
    pooled: whether to keep the mean of the first norm's output.
    dtype: computation dtype.
  """
  heads: int
  causal: bool
  stddevs: dict[str, float]
  pooled: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, *, cache: decode.Cache | None = None,
               train: bool = False) -> tuple[jax.Array, dict[str, Any]]:
    """`[batch, length, width]` -> the same, and what is to keep: 'pooled', 'cache'."""
    del train  # Nothing is dropped.
    width = x.shape[-1]
    kept = {}
    y = rms_norm(self.dtype, 'ln_1')(x)
    if self.pooled:
      kept['pooled'] = _mean(y)
    attend = attention.MultiHeadAttention(
        self.heads, dtype=self.dtype, use_bias=False, kernel_init=_normal(self.stddevs['qkv']),
        out_init=_normal(self.stddevs['out']), name='attn')
    if cache is None:
      y = attend(y, causal=self.causal)
    else:
      y, kept['cache'] = attend(y, cache=cache)
    x = partition.constrain(x + y, ('batch', 'length', 'embed'))

    dense = lambda name, features, names: nn.Dense(
        features, use_bias=False, dtype=self.dtype, name=name,
        kernel_init=nn.with_logical_partitioning(_normal(self.stddevs[name]), names))
    y = dense('c_fc', 4 * width, ('embed', 'mlp'))(rms_norm(self.dtype, 'ln_2')(x))
    y = partition.constrain(y, ('batch', 'length', 'mlp'))
    y = dense('c_proj', width, ('mlp', 'embed'))(blocks.ACTIVATIONS['quick_gelu'](y))
    return partition.constrain(x + y, ('batch', 'length', 'embed')), kept
