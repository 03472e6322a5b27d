"""ViT training and inference speed, side by side with its peers.

  python -m benchmarks.vit                      # ViT-S/16, batch 16, float32 on a CPU
  python -m benchmarks.vit --variants=B,L       # choose; on a GPU B and L in bfloat16 by default
  python -m benchmarks.vit --variants=B --original=DIR

The peers are Hugging Face transformers on torch (which the project itself does not need) and, when
DIR is a checkout of github.com/google-research/vision_transformer, the original model under jit.
All sides do the same work in one process on the same images: a training step is forward, backward
and AdamW; inference is the logits. Rounds alternate between them, so that whatever else the machine
does hits all alike, and the medians are compared. Each side runs the GELU that its users get: ours
is the tanh form of the public JAX code, transformers' ViT defaults to the exact one;
--peer_gelu=tanh gives all the same. For the two JAX models XLA's own count of peak memory is
printed too (arguments, results and temporaries of the compiled step).
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
import types
from collections.abc import Callable

# Two frameworks share the accelerator here: neither may take all of its memory at start.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # pylint: disable=wrong-import-position
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import linen as nn

from core import topologies
from core.nn import losses
from vit_family import vit

PATCH = 16
CLASSES = 1000
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
# Dense half-precision peak in FLOP/s, for model-FLOPs utilisation.
PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'L4': 121e12}


def forward_flops(variant: vit.Variant, size: int) -> int:
  """Multiplications and additions of one image's forward pass, matrix products only."""
  tokens = (size // PATCH) ** 2 + 1
  width = variant.width
  block = tokens * (4 * width ** 2 + 2 * width * variant.mlp_dim) + 2 * tokens ** 2 * width
  patches = (tokens - 1) * PATCH ** 2 * 3 * width
  return 2 * (variant.depth * block + patches + width * CLASSES)


@dataclasses.dataclass
class Side:
  """One contestant: functions that return when the work is done, and GiB where they are known."""
  train: Callable[[], None]
  infer: Callable[[], None]
  gib: dict[str, float] = dataclasses.field(default_factory=dict)


def ours(variant, dtype, scan, remat):
  """Our model: its init, and `(variables, images) -> logits`."""
  model = vit.VisionTransformer(
      CLASSES, PATCH, **dataclasses.asdict(variant), dtype=dtype, scan=scan, remat=remat)
  return model.init, lambda variables, images: model.apply(variables, images)[0]


def original(checkout, variant):
  """The public model, which computes in float32: likewise its init and logits."""
  sys.path.insert(0, checkout)
  from vit_jax import models_vit  # The user's checkout, not a dependency.
  model = models_vit.VisionTransformer(
      num_classes=CLASSES, patches=types.SimpleNamespace(size=(PATCH, PATCH)),
      hidden_size=variant.width, classifier='token', transformer=dict(
          mlp_dim=variant.mlp_dim, num_heads=variant.heads, num_layers=variant.depth,
          attention_dropout_rate=0.0, dropout_rate=0.0))
  return (functools.partial(model.init, train=False),
          lambda variables, images: model.apply(variables, images, train=False))


def jax_side(init_fn, apply, images, labels) -> Side:
  """A JAX model's training step and inference, each compiled once."""
  optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
  images, labels = jnp.asarray(images), jnp.asarray(labels)

  def init(rng):
    params = nn.meta.unbox(init_fn(rng, images[:1]))['params']
    return params, optimizer.init(params)

  def loss(params, images, labels):
    logits = apply({'params': params}, images)
    return losses.softmax_cross_entropy(logits, labels).mean()

  def step(state, images, labels):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, images, labels)
    updates, moments = optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  state = jax.jit(init)(jax.random.key(0))
  train_step = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()
  infer = jax.jit(lambda params, images: apply({'params': params}, images)).lower(
      state[0], images).compile()

  def train():
    nonlocal state
    state, value = train_step(state, images, labels)
    jax.block_until_ready((state, value))

  return Side(train, lambda: infer(state[0], images).block_until_ready(),
              {'train': _gib(train_step), 'infer': _gib(infer)})


def _gib(compiled) -> float:
  return topologies.memory(compiled)['total'] / 2**30


def peer(variant, images, labels, half, gelu) -> Side:
  """The same in transformers and torch; compiled on a GPU."""
  gpu = torch.cuda.is_available()
  device = 'cuda' if gpu else 'cpu'
  size = images.shape[1]
  config = transformers.ViTConfig(
      hidden_size=variant.width, num_hidden_layers=variant.depth, num_labels=CLASSES,
      num_attention_heads=variant.heads, intermediate_size=variant.mlp_dim, image_size=size,
      patch_size=PATCH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
      hidden_act={'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh'}[gelu])
  config._attn_implementation = 'sdpa'
  model = transformers.ViTForImageClassification(config).to(device)
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
  pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
  targets = torch.from_numpy(labels).long().to(device)
  forward = torch.compile(model) if gpu else model

  def wait():
    if gpu:
      torch.cuda.synchronize()

  def train():
    model.train()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
      loss = torch.nn.functional.cross_entropy(forward(pixels).logits, targets)
    loss.backward()
    optimizer.step()
    wait()

  def infer():
    model.eval()
    with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=half):
      forward(pixels)
    wait()

  return Side(train, infer)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  gpu = torch.cuda.is_available() and jax.default_backend() == 'gpu'
  parser.add_argument('--variants', default='B,L' if gpu else 'S', help='of vit.VARIANTS, by comma')
  parser.add_argument('--batch', type=int, default=128 if gpu else 16)
  parser.add_argument('--size', type=int, default=224, help='side of the images in pixels')
  parser.add_argument('--rounds', type=int, default=20 if gpu else 7)
  parser.add_argument('--scan', action=argparse.BooleanOptionalAction, default=True,
                      help='our encoder as one scanned block, as in our configs')
  # A CPU waits for memory sooner than for arithmetic: computing again beats keeping.
  parser.add_argument('--remat', default='none' if gpu else 'dots', help='none, dots or full')
  parser.add_argument('--peer_gelu', choices=('exact', 'tanh'), default='exact')
  parser.add_argument('--original', help='checkout of google-research/vision_transformer')
  parser.add_argument('--threads', type=int, default=os.cpu_count(),
                      help="torch's threads; XLA always takes all cores")
  args = parser.parse_args()
  torch.set_num_threads(args.threads)

  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (args.batch, args.size, args.size, 3)).astype(np.float32)
  labels = rng.integers(0, CLASSES, args.batch).astype(np.int32)
  chip = jax.devices()[0].device_kind
  peak = next((flops for name, flops in PEAK_FLOPS.items() if name in chip), None)
  print(f'{chip}, jax {jax.__version__}, torch {torch.__version__}, transformers '
        f'{transformers.__version__}; batch {args.batch}, {args.size} px, '
        f'{"bfloat16" if gpu else "float32"}, {args.rounds} rounds')

  for name in args.variants.split(','):
    variant = vit.VARIANTS[name]
    dtype = jnp.bfloat16 if gpu else jnp.float32
    sides = {'ours': jax_side(*ours(variant, dtype, args.scan, args.remat), images, labels),
             'torch': peer(variant, images, labels, gpu, args.peer_gelu)}
    if args.original:
      sides['original'] = jax_side(*original(args.original, variant), images, labels)
    for what in ('train', 'infer'):
      seconds = {side: [] for side in sides}
      for round_ in range(-2, args.rounds):
        # The order flips every round: whoever runs second finds the caches of the first.
        for side in (list(sides) if round_ % 2 else list(sides)[::-1]):
          start = time.perf_counter()
          getattr(sides[side], what)()
          if round_ >= 0:  # Earlier rounds compile and warm up.
            seconds[side].append(time.perf_counter() - start)
      median = {side: statistics.median(s) for side, s in seconds.items()}
      line = f'ViT-{name}/{PATCH} {what:5}'
      for side, s in median.items():
        best = args.batch / min(seconds[side])
        line += f'  {side} {args.batch / s:8.2f} images/s (best {best:.2f})'
        if what in sides[side].gib:
          line += f', {sides[side].gib[what]:.2f} GiB'
        if peak:
          flops = forward_flops(variant, args.size) * args.batch * (3 if what == 'train' else 1)
          line += f', {flops / s / peak:.1%} of peak'
      for side in list(sides)[1:]:
        ratios = [t / o for o, t in zip(seconds['ours'], seconds[side])]
        line += (f'  against {side}: ratio of medians {median[side] / median["ours"]:.2f},'
                 f' median of ratios {statistics.median(ratios):.2f}')
      print(line, flush=True)


if __name__ == '__main__':
  main()
