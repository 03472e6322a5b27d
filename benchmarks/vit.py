"""ViT training and inference speed, side by side with Hugging Face transformers on torch.

  python -m benchmarks.vit                      # ViT-S/16, batch 16, float32 on a CPU
  python -m benchmarks.vit --variants=B,L       # choose; on a GPU B and L in bfloat16 by default

Needs torch and transformers, which the project itself does not. Both sides do the same work in one
process on the same images: a training step is forward, backward and AdamW; inference is the logits.
Rounds alternate between the two, so that whatever else the machine does hits both alike, and the
medians are compared. Each side runs the GELU that its users get: ours is the tanh form of the
public JAX code, transformers' ViT defaults to the exact one; --peer_gelu=tanh gives both the same.
"""

import argparse
import dataclasses
import os
import statistics
import time
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


def ours(variant, images, labels, dtype, scan, remat) -> dict[str, Callable[[], None]]:
  """Our training step and inference as functions that return when the work is done."""
  model = vit.VisionTransformer(
      CLASSES, PATCH, **dataclasses.asdict(variant), dtype=dtype, scan=scan,
      remat=remat)
  optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
  images, labels = jnp.asarray(images), jnp.asarray(labels)

  def init(rng):
    params = nn.meta.unbox(model.init(rng, images[:1]))['params']
    return params, optimizer.init(params)

  def loss(params, images, labels):
    logits, _ = model.apply({'params': params}, images)
    return losses.softmax_cross_entropy(logits, labels).mean()

  def step(state, images, labels):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, images, labels)
    updates, moments = optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  train_step = jax.jit(step, donate_argnums=0)
  infer = jax.jit(lambda params, images: model.apply({'params': params}, images)[0])
  state = jax.jit(init)(jax.random.key(0))

  def train():
    nonlocal state
    state, value = train_step(state, images, labels)
    jax.block_until_ready((state, value))

  return {'train': train, 'infer': lambda: infer(state[0], images).block_until_ready()}


def peer(variant, images, labels, half, gelu) -> dict[str, Callable[[], None]]:
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

  return {'train': train, 'infer': infer}


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
    sides = {'ours': ours(variant, images, labels, jnp.bfloat16 if gpu else jnp.float32, args.scan,
                          args.remat),
             'torch': peer(variant, images, labels, gpu, args.peer_gelu)}
    for what in ('train', 'infer'):
      seconds = {side: [] for side in sides}
      for round_ in range(-2, args.rounds):
        # The order flips every round: whoever runs second finds the caches of the first.
        for side in (list(sides) if round_ % 2 else list(sides)[::-1]):
          start = time.perf_counter()
          sides[side][what]()
          if round_ >= 0:  # Earlier rounds compile and warm up.
            seconds[side].append(time.perf_counter() - start)
      median = {side: statistics.median(s) for side, s in seconds.items()}
      ratios = [t / o for o, t in zip(seconds['ours'], seconds['torch'])]
      line = f'ViT-{name}/{PATCH} {what:5}'
      for side, s in median.items():
        best = args.batch / min(seconds[side])
        line += f'  {side} {args.batch / s:8.2f} images/s (best {best:.2f})'
        if peak:
          flops = forward_flops(variant, args.size) * args.batch * (3 if what == 'train' else 1)
          line += f', {flops / s / peak:.1%} of peak'
      line += (f'  ratio of medians {median["torch"] / median["ours"]:.2f},'
               f' median of ratios {statistics.median(ratios):.2f}')
      print(line, flush=True)


if __name__ == '__main__':
  main()
