"""The palette: a few hundred colours that stand for all, so that a pixel is one token.

A palette file is OpenAI's: a `.npy` of floats `[colors, channels]` in [-1, 1] (paper section 3.1;
`kmeans_centers.npy` of the released code). Hugging Face has the same numbers as `clusters` in a
`preprocessor_config.json`.
"""

import json
import pathlib

import numpy as np

from core.config import UserError
from core.weights import appearing

_BATCH = 4096  # Pixels of a k-means step.


class Palette:
  """Colours, and the way from pixels to tokens and back.

  Attributes:
    centers: float32 `[colors, channels]` in [-1, 1].
  """

  def __init__(self, centers: np.ndarray):
    self.centers = np.asarray(centers, np.float32)
    self._squares = (self.centers ** 2).sum(-1)

  def encode(self, image: np.ndarray) -> np.ndarray:
    """The nearest colour of each pixel: uint8 `[height, width, channels]` -> int32 `[pixels]`.

    Row by row; of equally near colours the first.
    """
    pixels = image.reshape(-1, image.shape[-1]).astype(np.float32) / 127.5 - 1
    # |x|^2 is the same for all colours.
    return (self._squares - 2 * (pixels @ self.centers.T)).argmin(-1).astype(np.int32)

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """Tokens `[...]` -> uint8 colours `[..., channels]`.

    Raises:
      UserError: a token that no colour has.
    """
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= len(self.centers)):
      raise UserError(f'tokens from {tokens.min()} to {tokens.max()}: the palette has colours 0 to '
                      f'{len(self.centers) - 1}')
    return np.clip(np.rint(127.5 * (self.centers + 1)), 0, 255).astype(np.uint8)[tokens]

  def save(self, path: pathlib.Path) -> None:
    with appearing(path) as temporary, temporary.open('wb') as file:
      np.save(file, self.centers, allow_pickle=False)


def load(path: pathlib.Path, colors: int, channels: int) -> Palette:
  """Reads a palette: a `.npy`, or a `preprocessor_config.json` of Hugging Face.

  Args:
    path: the file.
    colors, channels: what the model needs.

  Raises:
    UserError: unreadable, or of another shape or range.
  """
  try:
    if path.suffix == '.json':
      centers = np.asarray(json.loads(path.read_text())['clusters'], np.float32)
    else:
      centers = np.load(path, allow_pickle=False)
      if not isinstance(centers, np.ndarray):
        centers.close()
        raise ValueError('an archive, not one array')
  except FileNotFoundError as e:
    raise UserError(f'palette {path}: no such file') from e
  except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
    raise UserError(f'palette {path}: neither a .npy of one array nor a preprocessor_config.json '
                    f'with clusters ({type(e).__name__}: {e})') from e
  want = (colors, channels)
  if centers.shape != want or centers.dtype.kind not in 'fiu':
    raise UserError(f'palette {path}: {centers.dtype}{list(centers.shape)}, but '
                    f'config.model.colors and config.data.channels say float{list(want)}')
  low, high = float(centers.min()), float(centers.max())
  # Real palettes have dark colours: one that has none was scaled to [0, 1] or [0, 255].
  if not -1.01 <= low < 0 or not high <= 1.01:
    raise UserError(f'palette {path}: values from {low:.4g} to {high:.4g}; colours are scaled to '
                    '[-1, 1] by x / 127.5 - 1')
  return Palette(np.clip(centers, -1, 1))


def grey_levels(colors: int) -> Palette:
  """Evenly spaced levels from black to white, for data of one channel."""
  return Palette(np.linspace(-1, 1, colors)[:, None])


def fit(pixels: np.ndarray, colors: int, seed: int) -> Palette:
  """k-means on pixels (section 3.1; its sample, seed and number of iterations are not published).

  Args:
    pixels: uint8 `[pixels, channels]`.
    colors: k.
    seed: of the initialisation and of the order.

  Returns:
    The palette, from dark to light.

  Raises:
    UserError: fewer different colours than k.
  """
  from sklearn.cluster import MiniBatchKMeans  # slow to import, and done once
  different = len(np.unique(pixels, axis=0))
  if different < colors:
    raise UserError(f'the training images have {different} different colours; set '
                    f'config.model.colors, now {colors}, to at most that')
  found = MiniBatchKMeans(colors, batch_size=_BATCH, n_init=3, random_state=seed).fit(
      pixels.astype(np.float32) / 127.5 - 1)
  centers = np.clip(found.cluster_centers_, -1, 1)
  return Palette(centers[np.argsort(centers.sum(-1), kind='stable')])
