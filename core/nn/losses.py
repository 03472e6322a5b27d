"""Classification losses, one number an example, in float32 whatever the logits are."""

import jax
import jax.numpy as jnp


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Cross entropy of a softmax.

  Args:
    logits: `[..., classes]` float.
    labels: int `[...]` class indices, or float `[..., classes]` target distributions.
    label_smoothing: share of the target spread evenly over all classes, the true one included
      (Szegedy et al. 2016, section 7).

  Returns:
    float32 `[...]`, in nats.
  """
  logits = logits.astype(jnp.float32)
  log_sum = jax.nn.logsumexp(logits, axis=-1)
  if jnp.issubdtype(labels.dtype, jnp.integer):
    hit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    mass = 1.0
  else:
    labels = labels.astype(jnp.float32)
    hit = (labels * logits).sum(axis=-1)
    # Targets that do not sum to one (a padded example's are zero) keep their own mass.
    mass = labels.sum(axis=-1)
  if label_smoothing:
    hit = (1.0 - label_smoothing) * hit + label_smoothing * mass * logits.mean(axis=-1)
  return mass * log_sum - hit


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Binary cross entropy of every class, summed over the classes.

  The loss that ViT was pretrained with (stated by the authors, not in the paper).

  Args:
    logits: `[..., classes]` float.
    labels: float `[..., classes]` in [0, 1].

  Returns:
    float32 `[...]`, in nats.
  """
  logits = logits.astype(jnp.float32)
  labels = labels.astype(jnp.float32)
  return -(labels * jax.nn.log_sigmoid(logits)
           + (1.0 - labels) * jax.nn.log_sigmoid(-logits)).sum(axis=-1)
