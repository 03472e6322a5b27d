"""What a classifier answers, and what a Vision Transformer saw and learned, as pictures."""

import json
import math
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from core.pictures import show
from vit_family import analysis
from vit_family.analysis import attention, heat, rollout


def _overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
  """The image in grey under the heat in colour: `[h, w, 3]` in [0, 1]."""
  size = image.shape[1::-1]
  big = cv2.resize(heatmap, size, interpolation=cv2.INTER_LINEAR)
  grey = image.mean(-1, keepdims=True) / 255
  return 0.4 * grey + 0.6 * colormaps['inferno'](big)[..., :3]


def prediction(image: np.ndarray, rolled: np.ndarray | None, top: list[dict], path: pathlib.Path,
               token: bool) -> None:
  """One image, where the model looked, and its best answers.

  Args:
    image: uint8 `[h, w, channels]` as the model saw it.
    rolled: `[tokens, tokens]` from `rollout`; None for a model without attention.
    top: records with 'class' and 'probability', best first.
    path: the PNG to write.
    token: whether the model reads the class token, or else the mean of all tokens.
  """
  panels = 2 if rolled is None else 3
  figure = Figure(figsize=(3 * panels, 3), layout='constrained')
  axes = list(figure.subplots(1, panels))
  show(axes[0], image, 'input, as the model saw it')
  if rolled is not None:
    show(axes[1], _overlay(image, heat(rolled, image.shape[:2], token)),
         'attention rollout (bright: read most)')
  right = axes[-1]
  names = [record['class'] for record in top][::-1]
  values = [record['probability'] for record in top][::-1]
  right.barh(range(len(names)), values, color='tab:blue')
  right.set_yticks(range(len(names)), names)
  right.set_xlim(0, 1.25)
  right.set_xticks([0, .25, .5, .75, 1])
  right.set_xlabel('probability')
  for i, value in enumerate(values):
    right.text(value + .02, i, f'{value:.3f}', va='center', fontsize=8)
  right.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)


class Pictures:
  """Evaluator that leaves `predictions.png`: images of a split with the model's answers."""

  def __init__(self, split: str, every: str = 'end', shown: int = 40):
    self.split, self.every, self.shown = split, every, shown
    self._fn = None

  def __call__(self, run, params, step) -> dict[str, float]:
    task = run.plan.task
    if self._fn is None:
      self._fn = lambda params, batch: {
          'answer': task.logits(params, batch).argmax(-1), 'image': batch['image'],
          'label': batch['label']}
    taken = []
    for rows in run.map(self._fn, params, self.split):
      taken.append(rows)
      if sum(len(part['label']) for part in taken) >= self.shown:
        break
    if run.writes and taken:
      image, label, answer = (np.concatenate([part[name] for part in taken])[:self.shown]
                              for name in ('image', 'label', 'answer'))
      predictions(image, label, answer, task.class_names, run.pictures / 'predictions.png')
    return {}


class Learned:
  """Evaluator that leaves pictures of what the model learned, and `learned.json` with the numbers.

  `attention_distance.png`, `filters.png`, `position_similarity.png` (ViT figure 7) and
  `rollout.png` (figure 6). Numbers: see `numbers`. A model without attention leaves nothing.
  """

  def __init__(self, split: str, every: str = 'end', images: int = 128, rolled: int = 8):
    """Distances are means over the first `images`; the first `rolled` are drawn with attention."""
    self.split, self.every, self.images, self.rolled = split, every, images, rolled
    self._fn = None

  def __call__(self, run, params, step) -> dict[str, float]:
    if 'Transformer' not in params:
      return {}
    token = 'cls' in params
    distance, image, mixed = self._measure(run, params, token)
    source = 'conv_root' if 'conv_root' in params else 'embedding'
    kernel = run.plan.fetch(params[source]['kernel'])
    embedding = run.plan.fetch(params['Transformer']['posembed_input']['pos_embedding'])
    if not run.writes or not len(image):
      return {}
    embedding, size = embedding[0, int(token):], image.shape[1:3]
    components, explained = analysis.principal_filters(kernel)
    found = numbers(distance, embedding, size, source, explained)
    attention_distance(distance.mean(0), found['uniform_distance'],
                       run.pictures / 'attention_distance.png')
    filters(components, explained, source, run.pictures / 'filters.png')
    position_similarity(embedding, size, run.pictures / 'position_similarity.png')
    rollouts(image, mixed[:, :, None], token, run.pictures / 'rollout.png')
    (run.pictures / 'learned.json').write_text(json.dumps(found, indent=1) + '\n')
    return {}

  def _measure(self, run, params, token):
    """Distances `[images, layers, heads]`; images to draw, and their attention averaged over heads
    `[rolled, layers, tokens, tokens]`. All processes call it and get the same."""
    # The weights of a whole batch would not fit on a chip: eight images a device at a time.
    ways = run.plan.layout.batch_ways
    size = math.gcd(run.batch_size, 8 * ways)
    if self._fn is None:
      self._fn = lambda params, batch, part: self._part(
          run.plan.task, params, batch, part, size, token)
    fn = run.jit(self._fn)
    distances, images, mixed = [], [], []
    for batch in run.batches(self.split):
      for part in range(run.batch_size // size):
        made = fn(params, batch, part)
        mask = jax.device_get(made['mask']) > 0
        distances.append(jax.device_get(made['distance'])[mask])
        if sum(map(len, images)) < self.rolled:
          drawn = mask[:self.rolled]
          images.append(jax.device_get(made['image'])[drawn])
          mixed.append(jax.device_get(made['mixed'])[drawn])
        if sum(map(len, distances)) >= self.images:
          break
      if sum(map(len, distances)) >= self.images:
        break
    return (np.concatenate(distances)[:self.images], np.concatenate(images)[:self.rolled],
            np.concatenate(mixed)[:self.rolled])

  def _part(self, task, params, batch, part, size, token):
    # Rows a stride apart: each device takes its own, where a slice would move the batch around.
    rows = {name: jax.lax.dynamic_index_in_dim(
        x.reshape(size, -1, *x.shape[1:]), part, 1, keepdims=False) for name, x in batch.items()}
    _, weights = attention(task, params, rows)
    distance = analysis.attention_distance(weights, rows['image'].shape[1:3], token)
    return {'distance': distance.swapaxes(0, 1), 'mask': rows['mask'],
            'image': rows['image'][:self.rolled],
            'mixed': weights[:, :self.rolled].astype(jnp.float32).mean(2).swapaxes(0, 1)}


def numbers(distance: np.ndarray, embedding: np.ndarray, image_size: tuple[int, int], source: str,
            explained: np.ndarray) -> dict:
  """What the pictures of `Learned` show, ready for JSON.

  Args:
    distance: `[images, layers, heads]` in pixels.
    embedding: `[patches, width]` without the class token's.
    image_size: (height, width) in pixels.
    source: name of the parameters whose filters are shown.
    explained: share of variance of each filter component.

  Returns:
    'images'; 'grid' (rows, columns); 'attention_distance' `[layers][heads]` in pixels, and
    'uniform_distance', what a head has that attends to all patches alike; 'position_similarity',
    see `analysis.similarity_by_distance`; 'filters' with 'of' and 'explained_variance'.
  """
  shape = analysis.grid(len(embedding), image_size)
  rounded = lambda values, digits: np.round(np.asarray(values, np.float64), digits).tolist()
  by_distance = analysis.similarity_by_distance(analysis.similarity(embedding), *shape)
  return {
      'images': len(distance), 'grid': list(shape),
      'attention_distance': rounded(distance.mean(0, dtype=np.float64), 3),
      'uniform_distance': rounded(analysis.patch_distances(image_size, len(embedding)).mean(), 3),
      'position_similarity': {name: rounded(value, 4) for name, value in by_distance.items()},
      'filters': {'of': source, 'explained_variance': rounded(explained, 6)}}


def predictions(image, label, predicted, names, path: pathlib.Path, columns: int = 10) -> None:
  """A grid of test images; wrong answers are red and say what was right."""
  rows = -(-len(image) // columns)
  figure = Figure(figsize=(columns, 1.45 * rows + .4), layout='constrained')
  cells = figure.subplots(rows, columns, squeeze=False)
  for axes in cells.flat:
    axes.axis('off')
  for axes, one, truth, answer in zip(cells.flat, image, label, predicted):
    right = truth == answer
    # Two lines always, so that images of a row stand level.
    show(axes, one, f'{names[answer]}\n' if right else f'{names[answer]}\n(is {names[truth]})',
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
    token: see `prediction`.
    path: the PNG to write.
  """
  figure = Figure(figsize=(max(1.4 * len(image), 5), 3.2), layout='constrained')
  cells = figure.subplots(2, len(image), squeeze=False)
  for above, below, one, w in zip(cells[0], cells[1], image, weights):
    show(above, one)
    show(below, _overlay(one, heat(rollout(w), one.shape[:2], token)))
  figure.suptitle('input, and what its class was read from\n(attention rollout, bright is most)',
                  fontsize=10)
  figure.savefig(path, dpi=120)


def _mosaic(tiles: np.ndarray, gap: int, fill: float) -> np.ndarray:
  """`[rows, columns, h, w, ...]` -> one image, with `gap` pixels of `fill` after every tile."""
  rows, columns, height, width, *rest = tiles.shape
  framed = np.full((rows, columns, height + gap, width + gap, *rest), fill)
  framed[:, :, :height, :width] = tiles
  framed = framed.swapaxes(1, 2)
  return framed.reshape(rows * (height + gap), columns * (width + gap), *rest)[:-gap, :-gap]


def position_similarity(
    embedding: np.ndarray, image_size: tuple[int, int], path: pathlib.Path) -> None:
  """Each tile: how alike one patch's position embedding is to all others (ViT figure 7, centre).

  Args:
    embedding: `[patches, width]` without the class token's.
    image_size: (height, width) in pixels.
    path: the PNG to write.
  """
  rows, columns = analysis.grid(len(embedding), image_size)
  tiles = analysis.similarity(embedding).reshape(rows, columns, rows, columns)
  # Pixels of the mosaic for a number: small tiles are drawn large, so that gaps stay narrow.
  cell = max(1, 32 // max(rows, columns))
  tiles = tiles.repeat(cell, 2).repeat(cell, 3)
  gap = max(1, max(tiles.shape[2:]) // 10)
  drawn = _mosaic(tiles, gap, np.nan)
  # At least one pixel of the picture for each of the mosaic.
  inches = max(5.5, max(drawn.shape) / 100)
  tall, wide = (inches * n / max(drawn.shape) for n in drawn.shape)
  figure = Figure(figsize=(max(wide, 3) + 1.4, max(tall, 2) + .8), layout='constrained')
  axes = figure.subplots()
  colors = axes.imshow(drawn, vmin=-1, vmax=1, cmap='viridis', interpolation='nearest')
  for count, set_ticks in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
    named = np.arange(0, count, -(-count // 14))
    set_ticks(named * (count * cell + gap) + (count * cell - 1) / 2, named + 1, fontsize=8)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xlabel('patch column')
  axes.set_ylabel('patch row')
  figure.colorbar(colors, ax=axes, label='cosine similarity', shrink=.8)
  axes.set_title('position embedding similarity: each tile, one patch with all others', fontsize=10)
  figure.savefig(path, dpi=120)


def attention_distance(distance: np.ndarray, uniform: float, path: pathlib.Path) -> None:
  """One dot a head over the depth of the network (ViT figure 7, right).

  Args:
    distance: `[layers, heads]` in pixels.
    uniform: distance of a head that attends to all patches alike, in pixels.
    path: the PNG to write.
  """
  layers, heads = distance.shape
  depth = np.arange(1, layers + 1)
  figure = Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  axes.axhline(uniform, color='grey', linestyle='--', linewidth=1, label='uniform attention')
  axes.plot(depth, distance.mean(1), color='tab:orange', linewidth=1, label='mean of the heads')
  axes.scatter(np.repeat(depth, heads), distance.ravel(), s=22, alpha=.7, linewidths=0,
               color='tab:blue', label='one head', zorder=3)
  axes.set_xticks(depth[::-(-layers // 24)])
  axes.set_xlim(.5, layers + .5)
  axes.set_ylim(0, 1.05 * max(uniform, float(distance.max()), 1e-3))
  axes.set_xlabel('layer')
  axes.set_ylabel('mean attention distance (pixels)')
  axes.set_title('how far each head looks', fontsize=10)
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(fontsize=8, loc='outside lower center', ncols=3, frameon=False)
  figure.savefig(path, dpi=120)


def filters(components: np.ndarray, explained: np.ndarray, source: str, path: pathlib.Path) -> None:
  """Principal components of the first filters (ViT figure 7, left).

  Args:
    components: `[n, h, w, 1 or 3]` in [0, 1].
    explained: `[n]`, share of the variance.
    source: 'embedding', or 'conv_root' for a hybrid, whose patches are not made of pixels.
    path: the PNG to write.
  """
  columns = min(7, len(components))
  rows = -(-len(components) // columns)
  figure = Figure(figsize=(max(1.05 * columns, 6), 1.25 * rows + .6), layout='constrained')
  cells = figure.subplots(rows, columns, squeeze=False)
  for axes in cells.flat:
    axes.axis('off')
  for i, (axes, one, share) in enumerate(zip(cells.flat, components, explained)):
    show(axes, one, f'{i + 1}: {share:.1%}')
  height, width = components.shape[1:3]
  of = {'embedding': f'patch embedding, {height}x{width}',
        'conv_root': f"root convolution, {height}x{width}, a hybrid's only filters of pixels"}
  figure.suptitle(f'principal components of the filters ({of[source]})\n'
                  f'and the variance they explain: {explained.sum():.0%} together', fontsize=10)
  figure.savefig(path, dpi=120)
