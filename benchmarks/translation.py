"""Translation: training and decoding speed, side by side with transformers and torch.

  python -m benchmarks.translation                              # the base Transformer on a CPU
  python -m benchmarks.translation --depth=2 --width=256        # a smaller one
  python -m benchmarks.translation --what=beams,steps           # some of the comparisons

What is compared:

  training   a step of the Transformer (forward, backward, Adam) with transformers' Marian
  beams      beam search of a fixed number of tokens with transformers' `generate`
  steps      our own step of beam search at several lengths of what is decoded: no peer
  lstm       a step (forward, backward, Adam) of two layers of LSTM with `torch.nn.LSTM`
  lengths    our training step of a Transformer and of an LSTM with attention, of as many tokens in
             sentences of several lengths: what runs in parallel and what waits for the word before

Both sides have the same weights and the same numbers of tokens, and run in one process. Rounds
alternate between them, so that whatever else the machine does hits both alike, and the medians are
compared. In beam search no sentence may end, for both, so that both take the same steps; how many
translations agree, token for token, is printed. What bounds a result is told by its share of what
the machine does at best: of a large matrix product for training, of the larger of that and of
reading memory for decoding, both measured here.

Run it on an idle machine: where other work takes a core, torch's threads spin for each other, and
it becomes many times as slow as with --threads=1.
"""

import argparse
import functools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

# Two frameworks share the accelerator here: neither may take all of its memory at start.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # pylint: disable=wrong-import-position
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from configs import transformer as configs
from core.config import UserError
from core.nn import losses
from translation import cells, marian, search, seq2seq, transformer

try:
  import torch
  import transformers
except ImportError as e:
  raise UserError(f"{e}: the peers come with `pip install -e '.[parity]'`") from e

WHAT = ('training', 'beams', 'steps', 'lstm', 'lengths')
LEARNING_RATE = 1e-4
EOS = 1


def make_model(args, dtype) -> transformer.Transformer:
  return transformer.Transformer(
      args.vocab, args.width, args.depth, args.heads, args.mlp_dim, positions='marian',
      attention_bias=True, epsilon=1e-5, dropout=args.dropout, dtype=dtype, scan=args.scan,
      remat=args.remat)


def make_config(args):
  config = configs.get_config()
  config.model.update(dict(width=args.width, depth=args.depth, heads=args.heads,
                           mlp_dim=args.mlp_dim, positions='marian', attention_bias=True,
                           epsilon=1e-5, dropout=args.dropout))
  return config


def make_peer(args, params):
  """Transformers' Marian with our weights."""
  with tempfile.TemporaryDirectory() as folder:
    path = marian.write(params, pathlib.Path(folder) / 'marian', make_config(args))
    model = transformers.MarianMTModel.from_pretrained(path, attn_implementation=args.attention)
  return model.to('cuda' if torch.cuda.is_available() else 'cpu')


def sentences(rng, rows: int, length: int, vocab: int) -> np.ndarray:
  """Ids int32 `[rows, length]` that end with EOS, of one length: nothing is padding."""
  ids = rng.integers(3, vocab, (rows, length)).astype(np.int32)
  ids[:, -1] = EOS
  return ids


def adam_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
  """`(state, *batch) -> state`, compiled, with the state's memory used again."""
  def step(state, *batch):
    params, moments = state
    updates, moments = optimizer.update(jax.grad(loss)(params, *batch), moments)
    return optax.apply_updates(params, updates), moments
  return jax.jit(step, donate_argnums=0)


def ours_training(args, model, params, source, target) -> Callable[[], None]:
  optimizer = optax.adam(LEARNING_RATE, b2=.98)
  source, target = jnp.asarray(source), jnp.asarray(target)

  def loss(params, key):
    logits = model.apply({'params': params}, source, target, train=args.dropout > 0,
                         rngs={'dropout': key})
    return losses.softmax_cross_entropy(logits, target).mean()
  step = adam_step(loss, optimizer)
  state = jax.tree.map(jnp.copy, params), optimizer.init(params)
  count = 0

  def train():
    nonlocal state, count
    count += 1
    state = jax.block_until_ready(step(state, jax.random.key(count)))
  return train


def peer_training(model, source, target, half: bool) -> Callable[[], None]:
  device = model.device
  source, target = (torch.tensor(x, device=device).long() for x in (source, target))
  mask = torch.ones_like(source)
  optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(.9, .98), fused=True)

  def train():
    model.train()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
      loss = model(input_ids=source, attention_mask=mask, labels=target).loss
    loss.backward()
    optimizer.step()
    wait()
  return train


def wait():
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def ours_beams(args, model, source, tokens: int) -> Callable:
  """`params -> int32 [batch, tokens]`, the best translations; none may end."""
  @jax.jit
  def translate(params, source):
    unrolled, params = transformer.unrolled(model, params)
    call = lambda method, *args: unrolled.apply({'params': params}, *args, method=method)
    memory = call('encode', source)

    def step(last, state):
      logits, state, attention = call('step', last, state, memory)
      return logits.at[:, EOS].set(-jnp.inf), state, attention
    found = search.beam_search(
        step, call('begin', memory, args.beams, tokens), batch=len(source), beams=args.beams,
        limits=jnp.full(len(source), tokens), room=tokens, alpha=0.)
    return found.tokens[:, 0]
  return lambda params: np.asarray(translate(params, source))


def peer_beams(args, model, source, tokens: int, half: bool) -> Callable[[], np.ndarray]:
  source = torch.tensor(source, device=model.device).long()

  def translate():
    model.eval()
    with torch.inference_mode(), torch.autocast(model.device.type, dtype=torch.bfloat16,
                                                enabled=half):
      made = model.generate(
          input_ids=source, attention_mask=torch.ones_like(source), num_beams=args.beams,
          do_sample=False, use_cache=True, min_new_tokens=tokens, max_new_tokens=tokens,
          max_length=None, length_penalty=0., early_stopping='never')
    wait()
    return made.cpu().numpy()[:, 1:]  # Without the start.
  return translate


def lstm_pair(args, rng, dtype) -> dict[str, Callable[[], None]]:
  """Steps of training two layers, `[batch, length, width]` to the same, on a sum of squares."""
  width, shape = args.lstm_width, (args.lstm_batch, args.lstm_length, args.lstm_width)
  x = rng.normal(size=shape).astype(np.float32)
  stack = cells.Stack('lstm', width, width, layers=2, dtype=dtype)
  params = nn.unbox(stack.init(jax.random.key(0), jnp.asarray(x)))['params']
  optimizer = optax.adam(LEARNING_RATE)
  step = adam_step(lambda p, x: jnp.square(
      stack.apply({'params': p}, x)[0].astype(jnp.float32)).mean(), optimizer)
  state, given = (params, optimizer.init(params)), jnp.asarray(x)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  # Time first, as torch likes it best.
  theirs = torch.nn.LSTM(width, width, 2).to(device)
  its_optimizer = torch.optim.Adam(theirs.parameters(), lr=LEARNING_RATE, fused=True)
  its_input = torch.tensor(x.swapaxes(0, 1).copy(), device=device)

  def ours():
    nonlocal state
    state = jax.block_until_ready(step(state, given))

  def peer():
    its_optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == jnp.bfloat16):
      loss = theirs(its_input)[0].square().mean()
    loss.backward()
    its_optimizer.step()
    wait()
  return {'ours': ours, 'torch': peer}


def lengths_sides(rng, tokens: int = 2048) -> dict[str, Callable[[], None]]:
  """Steps of training two models of about 3.5 million parameters on `tokens` a side."""
  vocab, width = 4000, 256
  models = {
      'Transformer': transformer.Transformer(vocab, width, 2, 4, 2 * width, scan=True, remat='dots'),
      'LSTM': seq2seq.Seq2Seq(vocab, width=width, embed=width, layers=2, attention='general',
                              bidirectional=True)}
  optimizer, sides = optax.adam(LEARNING_RATE), {}
  for name, model in models.items():
    ids = jnp.ones((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids))['params']

    def loss(params, source, target, model=model):
      logits = model.apply({'params': params}, source, target)
      return losses.softmax_cross_entropy(logits, target).mean()
    step, holder = adam_step(loss, optimizer), [(params, optimizer.init(params))]
    for length in (16, 32, 64, 128, 256):
      batch = [jnp.asarray(sentences(rng, tokens // length, length, vocab)) for _ in range(2)]

      def train(step=step, holder=holder, batch=batch):
        holder[0] = jax.block_until_ready(step(holder[0], *batch))
      sides[f'{name}, {length} tokens'] = train
  return sides


def measure(sides: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
  """Seconds of each call of each side, after one that compiles and warms up."""
  seconds: dict[str, list[float]] = {side: [] for side in sides}
  for round_ in range(-1, rounds):
    # The order flips every round: whoever runs second finds the caches of the first.
    for side in (list(sides) if round_ % 2 else list(sides)[::-1]):
      start = time.perf_counter()
      sides[side]()
      if round_ >= 0:
        seconds[side].append(time.perf_counter() - start)
  return seconds


def report(what: str, seconds: dict[str, list[float]], count: int, unit: str, bound: str) -> None:
  median = {side: statistics.median(s) for side, s in seconds.items()}
  line = '  '.join(f'{side} {count / s:,.1f} {unit} (best {count / min(seconds[side]):,.1f})'
                   for side, s in median.items())
  peer = next((side for side in median if side != 'ours'), None)
  ratio = f'  ratio of medians {median[peer] / median["ours"]:.2f}' if peer else ''
  print(f'{what:9}{line}{ratio}\n         {bound}', flush=True)


def machine(dtype, rounds: int = 5) -> tuple[float, float]:
  """FLOP/s of a large matrix product, and bytes/s of reading (a sum of half a GiB)."""
  size = 2048
  a = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  long = jnp.ones((2**27,), jnp.float32)
  read = jax.jit(jnp.sum)
  seconds = measure({'product': lambda: product(a).block_until_ready(),
                     'read': lambda: read(long).block_until_ready()}, rounds)
  return 2 * size**3 / min(seconds['product']), long.nbytes / min(seconds['read'])


def layer_weights(args, cross: bool) -> int:
  """Weights that every token of a layer is multiplied with."""
  return (8 if cross else 4) * args.width**2 + 2 * args.width * args.mlp_dim


def training_flops(args) -> float:
  """Of a step, matrix products only: forward, and twice that backward."""
  layers = args.depth * (layer_weights(args, False) + layer_weights(args, True))
  tokens = args.batch * args.length
  scores = args.depth * 3 * 2 * args.length * args.width
  return 3 * 2 * tokens * (layers + args.vocab * args.width + scores)


def step_costs(args, room: int, itemsize: int) -> tuple[float, float]:
  """FLOPs and bytes read of one step of beam search: weights, and keys and values once."""
  rows, width = args.sentences * args.beams, args.width
  # Keys and values of the source were computed before.
  weights = args.depth * (layer_weights(args, True) - 2 * width**2) + args.vocab * width
  attended = args.depth * 2 * width * (room + args.source)
  caches = args.depth * 2 * width * (rows * room + args.sentences * args.source)
  return 2 * rows * (weights + attended), 4 * weights + itemsize * caches


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  gpu = torch.cuda.is_available() and jax.default_backend() == 'gpu'
  add = parser.add_argument
  add('--what', default=','.join(WHAT), help='of these, by comma')
  add('--vocab', type=int, default=37_000)
  add('--width', type=int, default=512)
  add('--depth', type=int, default=6)
  add('--heads', type=int, default=8)
  add('--mlp_dim', type=int, default=2048)
  add('--dropout', type=float, default=0., help='in training, of both sides')
  add('--batch', type=int, default=128 if gpu else 16, help='pairs of sentences of a training step')
  add('--length', type=int, default=32, help='tokens of either side of a pair')
  # A CPU waits for memory sooner than for arithmetic: computing again beats keeping.
  add('--remat', default='none' if gpu else 'dots', help='none, dots or full')
  add('--scan', action=argparse.BooleanOptionalAction, default=True)
  add('--attention', default='sdpa', choices=('sdpa', 'eager'), help="transformers'")
  add('--sentences', type=int, default=16, help='translated at once')
  add('--source', type=int, default=24, help='tokens of a sentence that is translated')
  add('--tokens', type=int, default=32, help='of a translation')
  add('--beams', type=int, default=4)
  add('--rooms', default='16,32,64,128', help='tokens of the translations of "steps", by comma')
  add('--lstm_width', type=int, default=512)
  add('--lstm_batch', type=int, default=64)
  add('--lstm_length', type=int, default=32)
  add('--rounds', type=int, default=20 if gpu else 5)
  add('--threads', type=int, default=os.cpu_count(), help='of torch')
  args = parser.parse_args()
  chosen = args.what.split(',')
  if set(chosen) - set(WHAT):
    raise UserError(f'--what={args.what}: expected some of {", ".join(WHAT)}, by comma')
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  rng = np.random.default_rng(0)
  dtype = jnp.bfloat16 if gpu else jnp.float32
  flops, bandwidth = machine(dtype)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, '
        f'transformers {transformers.__version__} ({args.attention} attention), '
        f'{jnp.dtype(dtype).name}, {args.rounds} rounds\n'
        f'Transformer {args.depth}+{args.depth}, width {args.width}, {args.vocab:,} entries; the '
        f'machine multiplies at {flops / 1e9:,.0f} GFLOP/s and reads {bandwidth / 1e9:,.1f} GB/s',
        flush=True)

  model = make_model(args, dtype)
  ids = jnp.ones((1, 2), jnp.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids))['params']
  theirs = make_peer(args, params) if {'training', 'beams'} & set(chosen) else None

  # Before training changes the weights of one side and the other.
  if 'beams' in chosen:
    source = sentences(rng, args.sentences, args.source, args.vocab)
    ours = ours_beams(args, model, source, args.tokens)
    peer = peer_beams(args, theirs, source, args.tokens, gpu)
    same = (ours(params) == peer()).all(1)
    seconds = measure({'ours': lambda: ours(params), 'transformers': peer}, args.rounds)
    report('beams', seconds, args.sentences, 'sentences/s',
           f'{args.tokens} tokens, {args.beams} beams, {same.sum()} of {len(same)} translations '
           f'are the same; {decoding_bound(args, seconds["ours"], args.tokens, flops, bandwidth)}')
  if 'steps' in chosen:
    source = sentences(rng, args.sentences, args.source, args.vocab)
    rooms = [int(room) for room in args.rooms.split(',')]
    sides = {room: functools.partial(ours_beams(args, model, source, room), params)
             for room in rooms}
    for room, seconds in measure(sides, args.rounds).items():
      report('steps', {'ours': seconds}, room, 'steps/s',
             f'room for {room} tokens; '
             f'{decoding_bound(args, seconds, room, flops, bandwidth)}')
  if 'training' in chosen:
    source, target = (sentences(rng, args.batch, args.length, args.vocab) for _ in range(2))
    seconds = measure({'ours': ours_training(args, model, params, source, target),
                       'transformers': peer_training(theirs, source, target, gpu)}, args.rounds)
    share = training_flops(args) / statistics.median(seconds['ours']) / flops
    report('training', seconds, 2 * args.batch * args.length, 'tokens/s',
           f'{args.batch} pairs of {args.length}+{args.length} tokens; our matrix products run at '
           f'{share:.0%} of the speed of a large one, all other work included')
  if 'lstm' in chosen:
    seconds = measure(lstm_pair(args, rng, dtype), max(args.rounds, 10))
    tokens = args.lstm_batch * args.lstm_length
    work = 3 * 2 * tokens * 2 * 8 * args.lstm_width**2
    share = work / statistics.median(seconds['ours']) / flops
    report('lstm', seconds, tokens, 'tokens/s',
           f'2 layers of width {args.lstm_width}, {args.lstm_batch} rows of {args.lstm_length}; '
           f'our matrix products run at {share:.0%} of the speed of a large one')


  if 'lengths' in chosen:
    for side, seconds in measure(lengths_sides(rng), args.rounds).items():
      print(f'lengths  {side}: {1 / statistics.median(seconds):.2f} steps/s', flush=True)


def decoding_bound(args, seconds, room: int, flops: float, bandwidth: float) -> str:
  work, read = step_costs(args, room, 2 if torch.cuda.is_available() else 4)
  multiply, load = work / flops, read / bandwidth
  step = statistics.median(seconds) / room
  kind = 'products' if multiply > load else 'reading weights and caches'
  return (f'of a step of {step * 1e3:.1f} ms products need {multiply * 1e3:.1f}, reading '
          f'{load * 1e3:.1f}: {max(multiply, load) / step:.0%} of what {kind} would allow')


if __name__ == '__main__':
  main()
