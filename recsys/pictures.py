"""What the attention heads look at (BERT4Rec's heat maps of average attention)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from core.evaluate import EvalRun
from recsys import losses
from recsys.encoder import LAYERS

_WINDOW, _USERS = 10, 512  # Positions and users that an average is over.
_DRAWN, _LETTERS = 20, 24  # The most positions in a picture, and letters in a label.


def attention_of(task: Any, params, items: jax.Array) -> jax.Array:
  """Attention weights of all layers: float32 `[depth, batch, heads, n, n]`, from the positions of
  the fourth axis to those of the last.

  They are many (2 layers of 2 heads over 200 positions: 640 kB a user): reduce them where they are
  made, or pass few users.

  Args:
    task: the `bert4rec.Task`.
    params: the model's.
    items: int32 `[batch, n]`, as the model reads them.
  """
  # The last layer only looks from the positions that are read: here, from all.
  slots = jnp.broadcast_to(jnp.arange(items.shape[1]), items.shape)
  _, sown = task.model.apply({'params': params}, items, slots, mutable=['intermediates'])
  layers = sown['intermediates']
  return jnp.stack([layers[f'{LAYERS}_{i}']['MultiHeadDotProductAttention_0']['attention'][0]
                    for i in range(len(layers))])


class Heads:
  """Evaluator that leaves attention_heads.png: what each head looks at, on average.

  The mean is over the first 512 users of the split with ten positions or more, the mask included,
  of the attention among their last ten. Where no user has ten, it is over those who have most.
  """

  def __init__(self, task: Any, split: str, every: str = 'end'):
    self._task, self._split, self.every = task, split, every

  def __call__(self, run: EvalRun, params, step: int) -> dict[str, float]:
    reach, count, total = 0, 0, 0.
    for rows in run.map(self._windows, params, self._split):
      window = rows['attention'].shape[-1]
      positions = np.minimum(rows['positions'], window)
      if positions.max() > reach:
        reach, count, total = int(positions.max()), 0, 0.
      chosen = rows['attention'][positions == reach][:_USERS - count, ..., -reach:, -reach:]
      count, total = count + len(chosen), total + chosen.sum(axis=0, dtype=np.float64)
      if (reach, count) == (window, _USERS):
        break
    if run.writes and count:
      masked = self._task.config.model.kind == 'bert4rec'
      labels = [*range(1 - reach, 0), 'mask' if masked else 0]
      who = 'user' if count == 1 else 'users'
      heads(total / count, labels, run.pictures / 'attention_heads.png',
            f'attention among the last {reach} positions: mean of {count} {who} with '
            f'{"at least " if reach == window else ""}so many')
    return {}

  def _windows(self, params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """'positions' int32 `[batch]`, how many a user has, and 'attention' float32 `[batch, depth,
    heads, w, w]` among the last w of them; what lies before the first is filled with anything."""
    model, length = self._task.config.model, batch['items'].shape[1]
    offsets = jnp.arange(1 - min(_WINDOW, length), 1)

    def some(items, slot):
      weights = attention_of(self._task, params, items)
      at = jnp.maximum(slot[:, None] + offsets, 0)
      weights = jnp.take_along_axis(weights, at[None, :, None, :, None], axis=3)
      weights = jnp.take_along_axis(weights, at[None, :, None, None, :], axis=4)
      return weights.swapaxes(0, 1)
    fitting = losses.rows_within(model.logits_mib, model.depth * model.heads * length ** 2)
    return {'positions': (batch['items'] > 0).sum(axis=1),
            'attention': losses.in_chunks(some, fitting, batch['items'], batch['slot'])}


def heads(attention: np.ndarray, labels: Sequence[Any], path: pathlib.Path, title: str) -> None:
  """Draws attention from positions (down) to positions (across): a row of panels a layer.

  Args:
    attention: `[depth, heads, n, n]`; of more than 20 positions the last 20 are drawn.
    labels: of the n positions; long ones are cut.
    path: the PNG to write.
    title: of the picture, a line.
  """
  attention = attention[..., -_DRAWN:, -_DRAWN:]
  names = [short(str(label)) for label in labels[-_DRAWN:]]
  depth, count, n = attention.shape[:3]
  side = max(.16 * n, 2.4)
  margin = .06 * max(map(len, names)) + .4
  figure = Figure(figsize=(max(count * (side + .1) + margin + .8, 6.),
                           depth * (side + .3) + margin + .3), dpi=120, layout='compressed')
  panels = figure.subplots(depth, count, squeeze=False, sharex=True, sharey=True)
  for layer, row in enumerate(panels):
    for head, axes in enumerate(row):
      drawn = axes.imshow(attention[layer, head], cmap='Blues', vmin=0, vmax=attention.max(),
                          interpolation='nearest')
      axes.set_title(f'layer {layer + 1}, head {head + 1}', fontsize=8)
      # Names are not mathematics, whatever dollars they have.
      axes.set_xticks(range(n), names, fontsize=7, parse_math=False,
                      rotation=90 if max(map(len, names)) > 4 else 0)
      axes.set_yticks(range(n), names, fontsize=7, parse_math=False)
      axes.tick_params(length=0)
      axes.spines[:].set_color('lightgrey')
  figure.supxlabel('to', fontsize=8)
  figure.supylabel('from', fontsize=8)
  figure.suptitle(title, fontsize=9, parse_math=False)
  bar = figure.colorbar(drawn, ax=panels, shrink=.8)
  bar.set_label('attention weight', fontsize=8)
  bar.ax.tick_params(labelsize=7)
  figure.savefig(path)


def short(name: str) -> str:
  """A name on one line, cut to 24 letters."""
  name = ' '.join(name.split())
  return name if len(name) <= _LETTERS else f'{name[:_LETTERS - 1]}…'
