"""What a Vision Transformer learned, in numbers (ViT section 4.5, figures 6, 7 and 11).

Sizes of images are (height, width) in pixels. Tokens are patches in raster order, behind the class
token where there is one; `token` says whether there is.
"""

import jax
import jax.numpy as jnp
import numpy as np


def attention(task, params, batch) -> tuple[jax.Array, jax.Array]:
  """Logits `[batch, classes]` and attention weights `[layers, batch, heads, tokens, tokens]`.

  The weights of a large model are large (L/16 at 224 px: 60 MB an image): reduce them where they
  are made, or pass few images.
  """
  (logits, _), sown = task.model.apply(
      {'params': params}, task.inputs(batch), mutable=['intermediates'])
  layers = sown['intermediates']['Transformer']
  get = lambda layer: layer['MultiHeadDotProductAttention_0']['attention'][0]
  if 'encoderblock' in layers:
    return logits, get(layers['encoderblock'])
  return logits, jnp.stack([get(layers[f'encoderblock_{i}']) for i in range(len(layers))])


def grid(patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of square patches that tile an image. Raises ValueError when none do."""
  height, width = image_size
  rows = round((patches * height / width) ** .5)
  columns = patches // max(rows, 1)
  if rows * columns != patches or rows * width != columns * height:
    raise ValueError(f'{patches} square patches do not tile an image of {height}x{width}')
  return rows, columns


def rollout(weights: np.ndarray) -> np.ndarray:
  """How much each token draws on each patch through all layers (ViT appendix D.7, figure 6).

  Attention rollout of Abnar and Zuidema (2020): heads are averaged; the identity stands for the
  residual and rows are normalised again; then the layers are multiplied.

  Args:
    weights: `[layers, heads, tokens, tokens]` of one image.

  Returns:
    float64 `[tokens, tokens]`; every row sums to 1.
  """
  mixed = weights.astype(np.float64).mean(1)
  mixed = mixed + np.eye(mixed.shape[-1])
  mixed /= mixed.sum(-1, keepdims=True)
  result = mixed[0]
  for layer in mixed[1:]:
    result = layer @ result
  return result


def heat(rolled: np.ndarray, image_size: tuple[int, int], token: bool) -> np.ndarray:
  """The part of a rollout that the classifier reads: `[rows, columns]`, scaled to max 1.

  Args:
    rolled: `[tokens, tokens]` from `rollout`.
    image_size: of the image.
    token: True takes the class token's row, False the mean over all tokens.
  """
  row = rolled[0, 1:] if token else rolled.mean(0)
  return (row / max(row.max(), 1e-12)).reshape(grid(row.size, image_size))


def patch_distances(image_size: tuple[int, int], patches: int) -> np.ndarray:
  """Euclidean distances between patch centres in pixels: float64 `[patches, patches]`."""
  rows, columns = grid(patches, image_size)
  centres = np.indices((rows, columns)).reshape(2, -1).T * (image_size[0] / rows)
  return np.linalg.norm(centres[:, None] - centres[None], axis=-1)


def attention_distance(weights: jax.Array, image_size: tuple[int, int], token: bool) -> jax.Array:
  """How far heads look, in pixels (ViT section 4.5, figures 7 and 11).

  The mean over query patches of the distance to the key patches, weighted by attention. The class
  token neither asks nor is asked, and what patches attend to it is not spread over the others: a
  head that reads only the class token has distance 0.

  Args:
    weights: `[layers, batch, heads, tokens, tokens]`, numpy or on a device (also under `jax.jit`).
    image_size: of the images.
    token: whether the first token is the class token.

  Returns:
    float32 `[layers, batch, heads]`.
  """
  between = weights[..., int(token):, int(token):].astype(jnp.float32)
  patches = between.shape[-1]
  # No matrix product: a TPU would round its inputs to bfloat16.
  distances = jnp.asarray(patch_distances(image_size, patches), jnp.float32)
  return (between * distances).sum((-2, -1)) / patches


def similarity(embedding: np.ndarray) -> np.ndarray:
  """Cosine similarity of every pair of positions: `[n, width]` -> float64 `[n, n]`."""
  unit = embedding.astype(np.float64)
  unit = unit / np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
  return unit @ unit.T


def similarity_by_distance(
    similarities: np.ndarray, rows: int, columns: int) -> dict[str, float]:
  """Mean similarity of positions next to each other, in one row or column, and of all others.

  The paper sees nearer patches, and patches of one row or column, become more alike (section 4.5).

  Args:
    similarities: `[rows * columns, rows * columns]` from `similarity`.
    rows, columns: of the grid of patches.

  Returns:
    'adjacent' (above, below, left, right), 'same_row_or_column' (further apart) and 'others'; a
    kind of pair that the grid does not have is left out.
  """
  row, column = np.indices((rows, columns)).reshape(2, -1)
  down, across = abs(row[:, None] - row), abs(column[:, None] - column)
  aligned = (down == 0) ^ (across == 0)
  kinds = {'adjacent': down + across == 1, 'same_row_or_column': aligned & (down + across > 1),
           'others': (down > 0) & (across > 0)}
  return {name: float(similarities[pairs].mean()) for name, pairs in kinds.items() if pairs.any()}


def principal_filters(kernel: np.ndarray, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
  """Principal components of the filters of a convolution (ViT figure 7, left).

  Each output channel is one observation of `height * width * channels` weights.

  Args:
    kernel: `[height, width, channels, outputs]`.
    count: components wanted; there are at most as many as observations less one, or weights.

  Returns:
    float64 components `[found, height, width, channels]`, each stretched to fill [0, 1], largest
    variance first; and the share of the variance that each explains, `[found]`. A component's
    sign, which means nothing, is that which makes its sum positive.
  """
  observations = kernel.reshape(-1, kernel.shape[-1]).T.astype(np.float64)
  observations = observations - observations.mean(0)
  _, scale, components = np.linalg.svd(observations, full_matrices=False)
  found = min(count, len(observations) - 1, observations.shape[1])
  explained = scale ** 2 / max((scale ** 2).sum(), 1e-300)
  components = components[:found] * np.where(components[:found].sum(1) < 0, -1, 1)[:, None]
  low, high = components.min(1, keepdims=True), components.max(1, keepdims=True)
  stretched = (components - low) / np.maximum(high - low, 1e-300)
  return stretched.reshape(found, *kernel.shape[:3]), explained[:found]
