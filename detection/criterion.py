"""The set prediction loss (section 3.1, appendix A.2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from core.nn import losses
from detection import boxes as boxes_lib

Sums = dict[str, tuple[jax.Array, jax.Array]]


def match_cost(outputs: Mapping[str, jax.Array], targets: Mapping[str, jax.Array],
               weights: Any) -> jax.Array:
  """What it costs to match a query with a target (equation 1 and appendix A.2).

  Probabilities, not their logarithms: commensurable with the box terms, and better (section 3.1).

  Args:
    outputs: 'logits' `[layers, batch, queries, classes + 1]`, 'boxes' `[layers, batch, queries,
      4]` cxcywh.
    targets: 'labels' int `[batch, slots]`, 'boxes' float32 `[batch, slots, 4]` cxcywh.
    weights: with `class_cost`, `bbox_cost` and `giou_cost`.

  Returns:
    float32 `[layers, batch, queries, slots]`, without a gradient; columns of slots that hold no
    target mean nothing.
  """
  outputs = lax.stop_gradient(outputs)
  probability = jax.nn.softmax(outputs['logits'].astype(jnp.float32))
  # A product with ones and zeros and not a gather: on an accelerator that is the fast one.
  one_hot = jax.nn.one_hot(targets['labels'], probability.shape[-1])
  class_cost = -jnp.einsum('lbqc,bnc->lbqn', probability, one_hot, precision='highest')
  predicted, wanted = outputs['boxes'][:, :, :, None], targets['boxes'][None, :, None]
  distance = jnp.abs(predicted - wanted).sum(-1)
  giou = boxes_lib.giou(boxes_lib.to_xyxy(predicted), boxes_lib.to_xyxy(wanted))
  return (weights.class_cost * class_cost + weights.bbox_cost * distance
          - weights.giou_cost * giou)


def set_losses(outputs: Mapping[str, jax.Array], targets: Mapping[str, jax.Array],
               matched: jax.Array, eos_coef: float) -> tuple[list[Sums], Sums]:
  """Losses of every decoder layer, given who is matched with whom.

  Args:
    outputs: as in `match_cost`.
    targets: as in `match_cost`, and 'objects' int `[batch]`, how many slots of each image hold a
      target (the first ones), and 'mask' float32 `[batch]`, 0 for images that do not count.
    matched: int `[layers, batch, slots]`, the query of every target, -1 where there is none.
    eos_coef: weight of 'no object' in the cross entropy.

  Returns:
    For every layer 'loss_ce', 'loss_bbox' and 'loss_giou' as (sum, what it is divided by): the
    cross entropy by the sum of its class weights, boxes by the number of targets; and of the last
    layer 'class_error', in percent of the matched queries, and 'cardinality_error', by how many
    objects an image is off.
  """
  logits, boxes = outputs['logits'].astype(jnp.float32), outputs['boxes']
  layers, _, queries, classes = logits.shape
  rows = targets['mask']
  slots = targets['labels'].shape[1]
  valid = (jnp.arange(slots) < targets['objects'][:, None]) * rows[:, None]  # [batch, slots]
  total = valid.sum()

  hit = (matched[..., None] == jnp.arange(queries)) & (valid[None, :, :, None] > 0)
  label = jnp.where(hit.any(2), (hit * targets['labels'][None, :, :, None]).sum(2), classes - 1)
  weight = jnp.where(label == classes - 1, eos_coef, 1.) * rows[None, :, None]
  entropy = (losses.softmax_cross_entropy(logits, label) * weight).sum((1, 2))

  at = jnp.maximum(matched, 0)[..., None]
  found = jnp.take_along_axis(boxes, at, axis=2)  # [layers, batch, slots, 4]
  wanted = targets['boxes'][None]
  distance = (jnp.abs(found - wanted).sum(-1) * valid).sum((1, 2))
  giou = boxes_lib.giou(boxes_lib.to_xyxy(found), boxes_lib.to_xyxy(wanted))
  overlap = ((1 - giou) * valid).sum((1, 2))
  by_layer = [{'loss_ce': (entropy[i], weight[i].sum()), 'loss_bbox': (distance[i], total),
               'loss_giou': (overlap[i], total)} for i in range(layers)]

  best = logits[-1].argmax(-1)
  right = jnp.take_along_axis(best, at[-1, ..., 0], axis=1) == targets['labels']
  count = (best != classes - 1).sum(-1)
  extra = {'class_error': (100 * (~right * valid).sum(), total),
           'cardinality_error': ((jnp.abs(count - targets['objects']) * rows).sum(), rows.sum())}
  return by_layer, extra
