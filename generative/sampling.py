"""Images drawn pixel after pixel on the device, with cached keys and values."""

import jax
import jax.numpy as jnp
import ml_collections

from core.config import UserError
from core.nn import blocks, decode
from generative import gpt

# A cache grows by so many positions at a time: attention costs what there is room for.
_ROOM = 128


def check(settings: ml_collections.ConfigDict, image_size: int) -> None:
  """Raises `UserError` for settings (`config.model.sample`) that cannot be."""
  if settings.temperature < 0:
    raise UserError(f'config.model.sample.temperature={settings.temperature}; it must be at least '
                    '0, where 0 takes the most likely colour')
  if settings.top_k < 0 or not 0 < settings.top_p <= 1:
    raise UserError(f'config.model.sample.top_k={settings.top_k} and top_p={settings.top_p}: top_k '
                    'counts colours (0 for all), top_p is above 0 and at most 1')
  if settings.count < 1:
    raise UserError(f'config.model.sample.count={settings.count}; it must be at least 1')
  if not 0 <= settings.rows < image_size:
    raise UserError(f'config.model.sample.rows={settings.rows}: a prompt of so many rows leaves '
                    f'nothing to complete in {image_size}; 0 is half of them')


def given_rows(settings: ml_collections.ConfigDict, image_size: int) -> int:
  """How many rows a completion is given: the upper half, as OpenAI's, or what the config says."""
  return settings.rows or image_size // 2


def complete(model: gpt.ImageGPT, params, prompt: jax.Array, rng: jax.Array,
             settings: ml_collections.ConfigDict) -> jax.Array:
  """Draws the rest of each sequence; one compilation for a shape of `prompt`.

  The prompt runs through the model once and fills the caches; then every step computes one
  position and reads the keys and values of those before it. In all the caches take
  `2 * depth * batch * length * width` numbers of the model's dtype.

  Args:
    model: autoregressive.
    params: its parameters.
    prompt: int32 `[batch, given]`, the tokens that sequences begin with; given may be 0.
    rng: key.
    settings: `temperature`, `top_k` and `top_p`, see `decode.draw`.

  Returns:
    int32 `[batch, length]`: the prompt and what was drawn.

  Raises:
    ValueError: the prompt leaves nothing to draw.
  """
  batch, given = prompt.shape
  if given >= model.length:
    raise ValueError(f'a prompt of {given} tokens leaves nothing of a sequence of {model.length}')
  if gpt.LAYERS in params:
    params = blocks.unstack_layers(params, gpt.LAYERS)
  model = model.clone(scan=False, remat='none', num_classes=0, head_layers=())

  def next_token(tokens, caches, at, begin=False):
    made = model.apply({'params': params}, tokens, caches=caches, begin=begin)
    token = decode.draw(jax.random.fold_in(rng, at), made['logits'][:, -1], settings.temperature,
                        settings.top_k, settings.top_p)
    return token, made['caches']

  def step(carry, at):
    token, caches = carry
    token, caches = next_token(token[:, None], caches, at)
    return (token, caches), token

  room = min(-(-(given + 1) // _ROOM) * _ROOM, model.length)
  caches = [decode.Cache.empty(batch, model.heads, room, model.width // model.heads, model.dtype)
            for _ in range(model.depth)]
  token, caches = next_token(prompt, caches, given, begin=True)
  parts = [prompt, token[:, None]]
  start = given + 1
  while start < model.length:
    (token, caches), drawn = jax.lax.scan(step, (token, caches), jnp.arange(start, room))
    parts.append(drawn.T)
    start, room = room, min(room + _ROOM, model.length)
    caches = [cache.grown(room) for cache in caches]
  return jnp.concatenate(parts, axis=1)
