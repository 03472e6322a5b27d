"""Boxes: two ways to write them, and how much two of them overlap.

'xyxy' is the left, top, right and bottom edge; 'cxcywh' the centre and the size. Edges are
continuous: a box from 2 to 5 is 3 wide.
"""

import jax
import jax.numpy as jnp

# Padded slots hold boxes without area; dividing by this instead keeps their gradients finite.
_TINY = 1e-9


def to_xyxy(boxes: jax.Array) -> jax.Array:
  """cxcywh `[..., 4]` -> xyxy `[..., 4]`."""
  centre, size = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def to_cxcywh(boxes: jax.Array) -> jax.Array:
  """xyxy `[..., 4]` -> cxcywh `[..., 4]`."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Generalised intersection over union (Rezatofighi et al. 2019; DETR appendix A.2).

  IoU minus the share of the smallest enclosing box that neither of the two covers.

  Args:
    a: xyxy float `[..., 4]`.
    b: the same, broadcastable to `a`.

  Returns:
    float32 `[...]` in [-1, 1]; 0 where both boxes are the same point.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  size = lambda low, high: jnp.maximum(high - low, 0).prod(-1)
  area = lambda box: size(box[..., :2], box[..., 2:])
  overlap = size(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
  hull = size(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
  union = area(a) + area(b) - overlap
  return (overlap / jnp.maximum(union, _TINY)
          - (hull - union) / jnp.maximum(hull, _TINY))
