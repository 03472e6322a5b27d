"""What a Vision Transformer saw and learned, as pictures (ViT section 4.5, appendix D)."""

import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def attention(task, params, batch) -> tuple[jax.Array, jax.Array]:
  """Logits `[batch, classes]` and attention weights `[layers, batch, heads, tokens, tokens]`."""
  (logits, _), sown = task.model.apply({'params': params}, task.inputs(batch), mutable=['intermediates'])
  layers = sown['intermediates']['Transformer']
  get = lambda layer: layer['MultiHeadDotProductAttention_0']['attention'][0]
  if 'encoderblock' in layers:
    return logits, get(layers['encoderblock'])
  return logits, jnp.stack([get(layers[f'encoderblock_{i}']) for i in range(len(layers))])


def rollout(weights: np.ndarray) -> np.ndarray:
  """How much each token draws on each patch through all layers (Abnar and Zuidema, 2020).

  Heads are averaged; the identity stands for the residual and rows are normalised again; then
  the layers are multiplied (vit sheet section 13).

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


def heat(rolled: np.ndarray, token: bool) -> np.ndarray:
  """The part of a rollout that the classifier reads, as a square of patches scaled to max 1.

  Args:
    rolled: `[tokens, tokens]` from `rollout`.
    token: whether the first token is the class token; otherwise all tokens are averaged.
  """
  row = rolled[0, 1:] if token else rolled.mean(0)
  side = int(np.sqrt(row.size))
  return (row / row.max()).reshape(side, side)


def _overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
  """The image in grey under the heat in colour: `[h, w, 3]` in [0, 1]."""
  size = image.shape[1::-1]
  big = cv2.resize(heatmap, size, interpolation=cv2.INTER_LINEAR)
  grey = image.mean(-1, keepdims=True) / 255
  return 0.4 * grey + 0.6 * colormaps['inferno'](big)[..., :3]


def _show(axes, image: np.ndarray, title: str = '', color: str = 'black') -> None:
  grey = image.ndim == 3 and image.shape[-1] == 1
  axes.imshow(image[..., 0] if grey else image, cmap='gray' if grey else None,
              vmin=0, vmax=255 if image.dtype == np.uint8 else 1, interpolation='nearest')
  axes.set_title(title, fontsize=8, color=color)
  axes.axis('off')


def prediction(image: np.ndarray, rolled: np.ndarray, top: list[dict], path: pathlib.Path,
               token: bool) -> None:
  """One image, where the model looked, and its five best answers.

  Args:
    image: uint8 `[h, w, channels]` as the model saw it.
    rolled: `[tokens, tokens]` from `rollout`.
    top: records with 'class' and 'probability', best first.
    path: the PNG to write.
    token: see `heat`.
  """
  figure = Figure(figsize=(9, 3), layout='constrained')
  left, middle, right = figure.subplots(1, 3)
  _show(left, image, 'input, as the model saw it')
  _show(middle, _overlay(image, heat(rolled, token)), 'attention rollout (bright: read most)')
  names = [record['class'] for record in top][::-1]
  values = [record['probability'] for record in top][::-1]
  right.barh(range(len(names)), values, color='tab:blue')
  right.set_yticks(range(len(names)), names)
  right.set_xlim(0, 1.15)
  right.set_xlabel('probability')
  for i, value in enumerate(values):
    right.text(value + .02, i, f'{value:.3f}', va='center', fontsize=8)
  right.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)


class Pictures:
  """Evaluator that leaves predictions, rollouts and position-embedding similarity as PNG."""

  def __init__(self, split: str, every: str = 'end', shown: int = 40, rolled: int = 8):
    """`shown` images with predictions, of which the first `rolled` with attention."""
    self.split, self.every, self.shown, self.rolled = split, every, shown, rolled
    self._fn = None

  def __call__(self, run, params, step) -> dict[str, float]:
    task = run.plan.task
    if self._fn is None:
      self._fn = lambda params, batch: (
          *attention(task, params, batch), batch['image'], batch['label'], batch['mask'])
    fn = run.jit(self._fn)
    taken = []
    for batch in run.batches(self.split):
      logits, weights, image, label, mask = jax.device_get(fn(params, batch))
      keep = mask > 0
      taken.append((logits[keep], weights.swapaxes(0, 1)[keep], image[keep], label[keep]))
      if sum(len(part[3]) for part in taken) >= self.shown:
        break
    embedding = run.plan.fetch(params['Transformer']['posembed_input']['pos_embedding'])
    if not run.writes or not taken:
      return {}
    logits, weights, image, label = (
        np.concatenate(parts)[:self.shown] for parts in zip(*taken, strict=True))
    token = task.config.model.classifier == 'token'
    predictions(image, label, logits.argmax(-1), task.class_names,
                run.pictures / 'predictions.png')
    rollouts(image[:self.rolled], weights[:self.rolled], token, run.pictures / 'rollout.png')
    position_similarity(embedding[0, 1 if token else 0:],
                        run.pictures / 'position_similarity.png')
    return {}


def predictions(image, label, predicted, names, path: pathlib.Path, columns: int = 10) -> None:
  """A grid of test images; wrong answers are red and say what was right."""
  rows = -(-len(image) // columns)
  figure = Figure(figsize=(columns, 1.25 * rows + .4), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  for axes in grid.flat:
    axes.axis('off')
  for axes, one, truth, answer in zip(grid.flat, image, label, predicted):
    right = truth == answer
    _show(axes, one, names[answer] if right else f'{names[answer]} (is {names[truth]})',
          'black' if right else 'red')
  wrong = int((label != predicted).sum())
  figure.suptitle(f'the first {len(image)} test images and their predicted classes: {wrong} wrong',
                  fontsize=10)
  figure.savefig(path, dpi=110)


def rollouts(image, weights, token: bool, path: pathlib.Path) -> None:
  """Input above, attention rollout below.

  Args:
    image: uint8 `[n, h, w, channels]`.
    weights: `[n, layers, heads, tokens, tokens]`.
    token: see `heat`.
    path: the PNG to write.
  """
  figure = Figure(figsize=(1.4 * len(image), 3.2), layout='constrained')
  grid = figure.subplots(2, len(image), squeeze=False)
  for above, below, one, w in zip(grid[0], grid[1], image, weights):
    _show(above, one)
    _show(below, _overlay(one, heat(rollout(w), token)))
  figure.suptitle('input, and what its class was read from (attention rollout, bright is most)', fontsize=10)
  figure.savefig(path, dpi=120)


def similarity(embedding: np.ndarray) -> np.ndarray:
  """Cosine similarity of every pair of positions: `[n, width]` -> float64 `[n, n]`."""
  unit = embedding.astype(np.float64)
  unit = unit / np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
  return unit @ unit.T


def position_similarity(embedding: np.ndarray, path: pathlib.Path) -> None:
  """Each tile: how alike one patch's position embedding is to all others (ViT figure 7, centre).

  Args:
    embedding: `[patches, width]` without the class token's.
    path: the PNG to write.
  """
  side = int(np.sqrt(len(embedding)))
  tiles = similarity(embedding).reshape(side, side, side, side)
  figure = Figure(figsize=(6.5, 6), layout='constrained')
  grid = figure.subplots(side, side, squeeze=False)
  for row in range(side):
    for column in range(side):
      axes = grid[row, column]
      drawn = axes.imshow(tiles[row, column], vmin=-1, vmax=1, cmap='viridis')
      axes.set_xticks([])
      axes.set_yticks([])
      if column == 0:
        axes.set_ylabel(row + 1, rotation=0, labelpad=8, va='center', fontsize=8)
      if row == side - 1:
        axes.set_xlabel(column + 1, fontsize=8)
  figure.supxlabel('patch column', fontsize=9)
  figure.supylabel('patch row', fontsize=9)
  figure.colorbar(drawn, ax=grid, label='cosine similarity', shrink=.8)
  figure.suptitle('position embedding similarity', fontsize=10)
  figure.savefig(path, dpi=120)
