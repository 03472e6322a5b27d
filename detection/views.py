"""A detection source seen through views: which shape every example will have, before it is read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.config import UserError


class Viewed:
  """Every view of every image as an example of its own: view k of image i is number i * views + k.

  Examples are those of the source, and `view`, one `augment.View`; `shape`, the (height, width) of
  the bucket it is padded to.

  Attributes:
    source: whose examples these are. With one view an image, as in evaluation, numbers are its.
    buckets: int32 `[len]`, the index of that shape: the smallest by area that holds the view, the
      first of equal ones.
  """

  def __init__(self, source: Any, views: np.ndarray, shapes: Sequence[tuple[int, int]]):
    """Chooses the buckets.

    Args:
      source: a detection source.
      views: `augment.View` `[len(source), views an image]`.
      shapes: height and width of each bucket.

    Raises:
      UserError: there is no bucket, or a view that none holds.
    """
    if not len(shapes):
      raise UserError('config.data.buckets=(): at least one (height, width) is needed')
    self.source = source
    self._views, self._shapes = views, [tuple(map(int, shape)) for shape in shapes]
    heights, widths = views['height'].ravel(), views['width'].ravel()
    self.buckets = np.full(heights.shape, -1, np.int32)
    areas = [height * width for height, width in self._shapes]
    for number in np.argsort(areas, kind='stable'):
      height, width = self._shapes[number]
      self.buckets[(self.buckets < 0) & (heights <= height) & (widths <= width)] = number
    homeless = np.flatnonzero(self.buckets < 0)
    if len(homeless):
      at = homeless[0]
      height, width = self._shapes[int(np.argmax(areas))]
      raise UserError(
          f'image {source.image_ids[at // views.shape[1]]} is {heights[at]}x{widths[at]} (height x '
          f'width) once resized, and no bucket holds that ({len(homeless)} of {views.size} views '
          f'fit none); the largest of config.data.buckets is {height}x{width}')

  def __len__(self) -> int:
    return self._views.size

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    image, view = divmod(int(index), self._views.shape[1])
    return {**self.source[image], 'view': self._views[image, view],
            'shape': self._shapes[self.buckets[index]]}

  def __repr__(self) -> str:
    return f'Viewed({self.source!r}, {self._views.shape[1]} views, {self._shapes})'
