"""Image GPT training and sampling speed, side by side with Hugging Face transformers.

  python -m benchmarks.image_gpt                # iGPT-S, 16 pixels, float32 on a CPU
  python -m benchmarks.image_gpt --side=32      # ... at the paper's size

Both sides have the same weights' shapes and do the same work in one process: a training step is
forward, backward and Adam on a batch of images; sampling completes the lower halves of a batch of
images with cached keys and values, temperature 1, all colours (transformers' `generate`). Rounds
alternate between the two, so that whatever else the machine does hits both alike, and the medians
are compared. For ours, XLA's own count of memory is printed beside what the caches come to.
"""

import argparse
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

from configs import image_gpt
from core import topologies
from core.nn import decode, losses
from generative import gpt, sampling, variants

COLORS = 512
LEARNING_RATE = 1e-4


def ours(size: variants.GPT, tokens, prompts, dtype) -> tuple[Callable, Callable]:
  """Functions that train a step and complete the prompts, and return when that is done."""
  model = gpt.ImageGPT(COLORS, tokens.shape[1], size.width, size.depth, size.heads, dtype=dtype,
                       scan=True, remat='dots')
  optimizer = optax.adam(LEARNING_RATE, b2=.95)
  tokens, prompts = jnp.asarray(tokens), jnp.asarray(prompts)

  def init(rng):
    params = nn.unbox(model.init(rng, tokens))['params']
    return params, optimizer.init(params)

  def step(state, tokens):
    params, moments = state
    loss = lambda p: losses.softmax_cross_entropy(
        model.apply({'params': p}, tokens)['logits'], tokens).mean()
    value, grads = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), value

  settings = image_gpt.get_config('').model.sample
  complete = lambda params, prompts, rng: sampling.complete(model, params, prompts, rng, settings)
  state = jax.jit(init)(jax.random.key(0))
  train_step = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
  complete = jax.jit(complete, compiler_options=decode.compiler_options()).lower(
      state[0], prompts, jax.random.key(0)).compile()
  caches = 2 * size.depth * len(prompts) * tokens.shape[1] * size.width * jnp.dtype(dtype).itemsize
  print(f'ours: training holds {_gib(train_step):.2f} GiB at its peak; sampling '
        f'{_gib(complete):.2f}, of which the parameters are '
        f'{sum(p.nbytes for p in jax.tree.leaves(state[0])) / 2**30:.2f} and the caches '
        f'{caches / 2**30:.2f}', flush=True)

  def train():
    nonlocal state
    state, value = train_step(state, tokens)
    jax.block_until_ready((state, value))

  return train, lambda: complete(state[0], prompts, jax.random.key(1)).block_until_ready()


def _gib(compiled) -> float:
  return topologies.memory(compiled)['total'] / 2**30


def peer(size: variants.GPT, tokens, prompts, half: bool) -> tuple[Callable, Callable]:
  """The same in transformers and torch."""
  gpu = torch.cuda.is_available()
  device = 'cuda' if gpu else 'cpu'
  length = tokens.shape[1]
  # One position more than the image has: `generate` counts the start token.
  config = transformers.ImageGPTConfig(
      vocab_size=COLORS + 1, n_positions=length + 1, n_embd=size.width, n_layer=size.depth,
      n_head=size.heads, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
  model = transformers.ImageGPTForCausalImageModeling(config).to(device)
  optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(.9, .95), fused=True)
  begin = lambda x: torch.tensor(
      np.concatenate([np.full((len(x), 1), COLORS), x], 1), device=device)
  targets = torch.tensor(tokens, device=device).long()
  inputs, prompts = begin(tokens[:, :-1]), begin(prompts)

  def wait():
    if gpu:
      torch.cuda.synchronize()

  def train():
    model.train()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
      logits = model(input_ids=inputs, use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    wait()

  def sample():
    model.eval()
    with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=half):
      drawn = model.generate(input_ids=prompts, max_length=length + 1, min_length=length + 1,
                             do_sample=True, use_cache=True, temperature=1., top_k=0)
    assert drawn.shape[1] == length + 1, drawn.shape
    wait()

  return train, sample


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  gpu = torch.cuda.is_available() and jax.default_backend() == 'gpu'
  parser.add_argument('--variant', default='S', choices=list(variants.GPTS))
  parser.add_argument('--side', type=int, default=32 if gpu else 16, help='pixels')
  parser.add_argument('--batch', type=int, default=32 if gpu else 4, help='images of a step')
  parser.add_argument('--samples', type=int, default=32 if gpu else 8, help='images completed')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--threads', type=int, default=os.cpu_count(), help='of torch')
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  length = args.side ** 2
  tokens = rng.integers(0, COLORS, (args.batch, length)).astype(np.int32)
  prompts = rng.integers(0, COLORS, (args.samples, length // 2)).astype(np.int32)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, '
        f'transformers {transformers.__version__}; iGPT-{args.variant}, {args.side} px, '
        f'{"bfloat16" if gpu else "float32"}, {args.rounds} rounds')
  size = variants.GPTS[args.variant]
  dtype = jnp.bfloat16 if gpu else jnp.float32
  sides = {'ours': ours(size, tokens, prompts, dtype), 'torch': peer(size, tokens, prompts, gpu)}
  for index, (what, count) in enumerate((
      ('training', args.batch * length), ('sampling', args.samples * (length - length // 2)))):
    seconds = {side: [] for side in sides}
    for round_ in range(-1, args.rounds):
      # The order flips every round: whoever runs second finds the caches of the first.
      for side in (list(sides) if round_ % 2 else list(sides)[::-1]):
        start = time.perf_counter()
        sides[side][index]()
        if round_ >= 0:  # The earlier round warms up.
          seconds[side].append(time.perf_counter() - start)
    median = {side: statistics.median(s) for side, s in seconds.items()}
    line = '  '.join(f'{side} {count / s:.0f} tokens/s (best {count / min(seconds[side]):.0f})'
                     for side, s in median.items())
    print(f'{what}: {line}  ratio of medians {median["torch"] / median["ours"]:.2f}', flush=True)


if __name__ == '__main__':
  main()
