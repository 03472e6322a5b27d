"""DETR: training and inference speed, side by side with transformers on torch.

  python -m benchmarks.detr                          # R50, one image of 800x1066, float32 on a CPU
  python -m benchmarks.detr --batch=2 --rounds=5
  python -m benchmarks.detr --what=training --settings=scan/none --peers=sdpa

What is compared:

  training   our whole train step with the published settings (forward, matching, losses of all
             decoder layers, gradients, clipping at 0.1, AdamW, the backbone at a tenth of the
             rate) with the same of transformers' DetrForObjectDetection, in training mode
  inference  images to scores, labels and boxes with transformers' logits and boxes
  matching   costs and assignment of all decoder layers: our solvers and transformers' matcher, and
             what share of a training step each would be

Each side first finds its own fastest setting: ours of --settings, every one of which is a pair of
config keys (model.scan, remat); theirs of --peers. The fastest two then meet in rounds of their
own, which alternate, so that whatever else the machine does hits both alike; the medians are
compared. Weights are random and not the same. Both get dropout wherever the reference
implementation has it, and train all but the stem and the first stage: transformers' own rule knows
its ResNet's parameters by another name, and would freeze the whole backbone. Our step also
normalises the pixels; theirs are normalised beforehand. The first image fills the batch's shape,
the others are an eighth shorter on both sides, and both get masks that say so.

Run it on an idle machine: where other work takes a core, torch's threads spin for each other.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable

# Two frameworks share the accelerator here: neither may take all of its memory at start.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # pylint: disable=wrong-import-position
import jax.numpy as jnp
import numpy as np

from benchmarks import translation
from benchmarks.matching import boxes_of
from benchmarks.vit import PEAK_FLOPS
from configs import detr as configs
from core import flops, topologies
from core.config import choose
from core.plan import Plan, make_plan
from detection import backbone, criterion, detector, matching
import torch  # `translation` says which extra brings these two when they are missing.
import transformers
from transformers.loss.loss_for_object_detection import HungarianMatcher

WHAT = ('training', 'inference', 'matching')
# Ours, by name: config.model.scan and config.remat.
SETTINGS = {f'{name}/{remat}': (scan, remat) for name, scan in (('scan', True), ('unrolled', False))
            for remat in ('none', 'dots', 'full')}
# What a name of theirs is made of: an attention, and what else is wanted.
PEER_WORDS = ('sdpa', 'eager', 'channels_last', 'compile')
OBJECTS = 7  # COCO's mean of an image.


@dataclasses.dataclass
class Side:
  """One contestant: a function that returns when the work is done, and GiB where they are known."""
  run: Callable[[], None]
  gib: float | None = None


def on_gpu() -> bool:
  return torch.cuda.is_available() and jax.default_backend() == 'gpu'


def make_batch(args) -> dict[str, np.ndarray]:
  """Random pixels and objects, as the task's `batch_spec` wants them."""
  rng = np.random.default_rng(0)
  sizes = np.tile(np.asarray([args.height, args.width], np.int32), (args.batch, 1))
  sizes[1:] -= sizes[1:] // 8
  images = rng.integers(0, 256, (args.batch, args.height, args.width, 3), dtype=np.uint8)
  for image, (height, width) in zip(images, sizes):
    image[height:], image[:, width:] = 0, 0
  slots = make_config(args, 'scan/none').model.queries
  boxes = np.zeros((args.batch, slots, 4), np.float32)
  boxes[:, :OBJECTS] = boxes_of(rng, args.batch, OBJECTS)
  labels = np.zeros((args.batch, slots), np.int32)
  labels[:, :OBJECTS] = rng.integers(0, 91, (args.batch, OBJECTS))
  return {'image': images, 'image_size': sizes, 'boxes': boxes, 'labels': labels,
          'objects': np.full(args.batch, OBJECTS, np.int32),
          'mask': np.ones(args.batch, np.float32)}


def make_config(args, setting: str):
  config = configs.get_config('r50,coco')
  scan, config.remat = SETTINGS[setting]
  config.model.update(dict(backbone=args.backbone, dropout=args.dropout, scan=scan))
  shapes = ((args.height, args.width),)
  config.data.update(dict(buckets=shapes, eval_buckets=shapes))
  config.batch_size = args.batch
  config.precision = 'bfloat16' if on_gpu() else 'float32'
  return config


class Ours:
  """Our task under each setting.

  Attributes:
    args: of the command line.
    batch: numpy, see `make_batch`.
  """

  def __init__(self, args, batch: dict[str, np.ndarray]):
    self.args, self.batch = args, batch
    self._states = {}  # By config.model.scan: remat changes no parameter.

  @functools.cache
  def plan(self, setting: str) -> Plan:
    return make_plan(make_config(self.args, setting), jax.devices()[:1])

  def start(self, plan: Plan):
    """The key of `_states` for a plan, whose state exists then, and the batch on the device."""
    scan = plan.config.model.scan
    if scan not in self._states:
      self._states[scan] = plan.init(jax.random.key(0))
    return scan, jax.device_put(self.batch, plan.batch_sharding)

  def training(self, setting: str) -> Side:
    plan = self.plan(setting)
    scan, batch = self.start(plan)
    step = plan.train_step.lower(plan.state_shape, batch).compile()

    def train():
      self._states[scan], metrics = step(self._states[scan], batch)
      jax.block_until_ready(self._states[scan])
      if not np.isfinite(metrics['loss'][0]):
        raise RuntimeError(f'the loss of {setting} is not finite')
    return Side(train, _gib(step))

  def inference(self, setting: str) -> Side:
    plan = self.plan(setting)
    scan, batch = self.start(plan)
    detect = plan.jit(plan.task.detect).lower(plan.params_shape, batch).compile()
    return Side(lambda: jax.block_until_ready(detect(self._states[scan].params, batch)),
                _gib(detect))

  def outputs(self, setting: str) -> dict[str, jax.Array]:
    """What the model says of the batch: 'logits' and 'boxes' of all decoder layers."""
    plan = self.plan(setting)
    scan, batch = self.start(plan)
    return plan.jit(plan.task.forward)(self._states[scan].params, batch)

  def gflop(self, what: str) -> float:
    """Of a step or of an inference; without what rematerialisation repeats."""
    plan = self.plan('scan/none')
    batch = plan.task.batch_spec(self.args.batch)
    if what == 'training':
      return flops.count_jaxpr(plan.train_step.trace(plan.state_shape, batch).jaxpr) / 1e9
    return flops.count_flops(plan.jit(plan.task.detect), plan.params_shape, batch) / 1e9


def _gib(compiled) -> float:
  return topologies.memory(compiled)['total'] / 2**30


class Peer:
  """Transformers' DETR under one of its settings."""

  def __init__(self, args, batch: dict[str, np.ndarray], setting: str):
    words = setting.split('/')
    device = 'cuda' if on_gpu() else 'cpu'
    size = backbone.BACKBONES[args.backbone]
    stages, channels = size['stages'], size['channels']
    ours = make_config(args, 'scan/none')
    # In transformers all three are separate; the reference implementation has one, everywhere.
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=transformers.ResNetConfig(
            embedding_size=channels, hidden_sizes=[4 * channels * 2**i for i in range(len(stages))],
            depths=list(stages), out_features=[f'stage{len(stages)}']),
        num_labels=ours.model.num_classes, auxiliary_loss=True, dropout=args.dropout,
        attention_dropout=args.dropout, activation_dropout=args.dropout)
    if 'eager' in words:  # Else it is sdpa; asked for by name the ResNet inside would refuse it.
      config._attn_implementation = 'eager'
    layout = torch.channels_last if 'channels_last' in words else torch.contiguous_format
    self.model = transformers.DetrForObjectDetection(config).to(device, memory_format=layout)
    tail, rest = [], []
    for name, parameter in self.model.named_parameters():
      inside = 'backbone' in name
      frozen = inside and ('.embedder.' in name or '.stages.0.' in name)
      parameter.requires_grad_(not frozen)
      if not frozen:
        (tail if inside else rest).append(parameter)
    self.trained = sum(p.numel() for p in tail + rest)
    rate, (_, slower) = ours.optim.lr, ours.optim.lr_multipliers[0]
    self.optimizer = torch.optim.AdamW(
        [dict(params=rest), dict(params=tail, lr=slower * rate)], lr=rate,
        weight_decay=ours.optim.weight_decay, fused=True)
    self.clip = ours.optim.clip_norm
    if 'compile' in words:
      self.model.model.compile()  # Not the loss, which leaves torch to match.
    self.autocast = functools.partial(
        torch.autocast, device, dtype=torch.bfloat16, enabled=device == 'cuda')

    inside = np.zeros(batch['image'].shape[:3], np.int64)
    for mask, (height, width) in zip(inside, batch['image_size']):
      mask[:height, :width] = 1
    pixels = np.asarray(detector.normalize(jnp.asarray(batch['image']), batch['image_size']))
    pixels = torch.tensor(np.moveaxis(pixels, 3, 1))
    self.inputs = dict(
        pixel_values=pixels.contiguous(memory_format=layout).to(device),
        pixel_mask=torch.tensor(inside, device=device))
    self.targets = [
        dict(class_labels=torch.tensor(labels[:count], device=device).long(),
             boxes=torch.tensor(boxes[:count], device=device))
        for labels, boxes, count in zip(batch['labels'], batch['boxes'], batch['objects'])]

  def training(self) -> Side:
    def train():
      self.model.train()
      self.optimizer.zero_grad(set_to_none=True)
      with self.autocast():
        loss = self.model(**self.inputs, labels=self.targets).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
      self.optimizer.step()
      translation.wait()
    return Side(train)

  def inference(self) -> Side:
    def infer():
      self.model.eval()
      with torch.inference_mode(), self.autocast():
        self.model(**self.inputs)
      translation.wait()
    return Side(infer)


def trained(plan: Plan) -> int:
  """Parameters that have moments: those that the optimizer changes."""
  moments = jax.tree.leaves(plan.state_shape.opt_state)
  return sum(m.size for m in moments if m.ndim) // 2


def fastest(label: str, sides: dict[str, Side], rounds: int) -> str:
  """The name of the side with the least median, after a heat where there are several."""
  if len(sides) == 1:
    return next(iter(sides))
  seconds = translation.measure({name: side.run for name, side in sides.items()}, rounds)
  median = {name: statistics.median(s) for name, s in seconds.items()}
  best = min(median, key=median.get)
  print(f'{"heat":10}{label}: ' + ', '.join(
      f'{name} {s:.3g} s' + (f' ({sides[name].gib:.2f} GiB)' if sides[name].gib else '')
      for name, s in median.items()) + f'; fastest: {best}', flush=True)
  return best


def contest(what: str, args, ours: dict[str, Side], theirs: dict[str, Side], gflop: float,
            product: float, peak: float | None) -> float:
  """Heats and the final of one kind of work; prints them, and returns our seconds."""
  chosen = fastest('ours', ours, args.rounds)
  rival = fastest('transformers', theirs, args.rounds)
  names = {f'ours ({chosen})': ours[chosen], f'transformers ({rival})': theirs[rival]}
  seconds = translation.measure({name: side.run for name, side in names.items()}, args.rounds)
  line = ''
  for name, side in names.items():
    median = statistics.median(seconds[name])
    line += (f'{name} {median:.3g} s, {args.batch / median:.3g} images/s '
             f'(best {args.batch / min(seconds[name]):.3g})')
    line += f', {side.gib:.2f} GiB  ' if side.gib else '  '
  first, second = seconds.values()
  median = statistics.median(first)
  ratio = statistics.median(second) / median
  ratios = statistics.median(b / a for a, b in zip(first, second))
  speed = gflop * 1e9 / median
  share = f'{speed / peak:.1%} of peak' if peak else f'{speed / product:.0%} of a large product'
  print(f'{what:10}{line}ratio of medians {ratio:.2f}, median of ratios {ratios:.2f}\n'
        f'{"":10}ours: {gflop:,.1f} GFLOP at {speed / 1e9:,.0f} GFLOP/s, {share}', flush=True)
  return median


def match(args, batch: dict[str, np.ndarray], outputs: dict[str, jax.Array],
          step: float | None) -> None:
  """Times costs and assignment of a batch.

  Args:
    args: of the command line.
    batch: see `make_batch`.
    outputs: 'logits' and 'boxes' of all decoder layers.
    step: seconds of a training step, where that was measured.
  """
  weights = make_config(args, 'scan/none').model
  device = 'cuda' if on_gpu() else 'cpu'
  given = jax.device_put(batch)
  cost = jax.jit(lambda outputs, batch: criterion.match_cost(outputs, batch, weights))
  solvers: dict[str, Callable] = {'costs alone': lambda: cost(outputs, given).block_until_ready()}
  kinds = ('lockstep',) if on_gpu() else ('scipy', 'lockstep')
  for kind in kinds:
    solve = jax.jit(lambda outputs, batch, kind=kind: matching.assign(
        criterion.match_cost(outputs, batch, weights), batch['objects'], kind))
    solvers[kind] = lambda solve=solve: solve(outputs, given).block_until_ready()

  matcher = HungarianMatcher(weights.class_cost, weights.bbox_cost, weights.giou_cost)
  layers = [dict(logits=torch.tensor(logits, device=device),
                 pred_boxes=torch.tensor(boxes, device=device))
            for logits, boxes in zip(*(np.asarray(outputs[k]) for k in ('logits', 'boxes')))]
  targets = [dict(class_labels=torch.tensor(labels[:OBJECTS], device=device).long(),
                  boxes=torch.tensor(boxes[:OBJECTS], device=device))
             for labels, boxes in zip(batch['labels'], batch['boxes'])]
  solvers['transformers'] = lambda: [matcher(layer, targets) for layer in layers]

  # Whoever is compared must have solved the same problems.
  costs = np.asarray(cost(outputs, given), np.float64)[..., :OBJECTS]
  total = lambda queries: np.take_along_axis(costs, queries[:, :, None], 2).sum()
  theirs = np.stack([[queries[np.argsort(slots)] for queries, slots in layer]
                     for layer in solvers['transformers']()])
  for kind in kinds:
    found = np.asarray(solvers[kind]())[..., :OBJECTS]
    np.testing.assert_allclose(total(found), total(theirs), rtol=1e-4, err_msg=kind)

  seconds = translation.measure(solvers, max(args.rounds, 10))
  print(f'{"matching":10}' + ', '.join(
      f'{name} {1e3 * median:.2f} ms' + (f' ({median / step:.2%} of a step)' if step else '')
      for name, median in ((n, statistics.median(s)) for n, s in seconds.items())) +
        f'; {len(layers)} layers x {args.batch} images, {costs.shape[2]} queries, '
        f'{OBJECTS} objects in {batch["labels"].shape[1]} slots, costs included', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  gpu = on_gpu()
  add = parser.add_argument
  add('--what', default=','.join(WHAT), help='of these, by comma')
  add('--height', type=int, default=800)
  add('--width', type=int, default=1066)
  add('--batch', type=int, default=1)
  add('--backbone', default='r50', choices=list(backbone.BACKBONES))
  add('--dropout', type=float, default=.1, help='in training, of both sides')
  add('--settings', default='scan/none,scan/dots,scan/full,unrolled/none',
      help=f'ours, by comma, of {", ".join(SETTINGS)}')
  add('--peers', default='sdpa,eager,sdpa/channels_last' + (',sdpa/compile' if gpu else ''),
      help=f'theirs, by comma, each of {", ".join(PEER_WORDS)} with a slash between them')
  add('--rounds', type=int, default=20 if gpu else 3)
  add('--threads', type=int, default=os.cpu_count(), help='of torch')
  args = parser.parse_args()
  chosen, settings, peers = (x.split(',') for x in (args.what, args.settings, args.peers))
  words = [word for name in peers for word in name.split('/')]
  for flag, given, valid in (('--what', chosen, WHAT), ('--settings', settings, SETTINGS),
                             ('--peers', words, PEER_WORDS)):
    for name in given:
      choose(flag, name, valid)
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  product, _ = translation.machine(jnp.bfloat16 if gpu else jnp.float32)
  chip = jax.devices()[0].device_kind
  peak = next((value for name, value in PEAK_FLOPS.items() if name in chip), None)
  batch = make_batch(args)
  ours = Ours(args, batch)
  print(f'{chip}, jax {jax.__version__}, torch {torch.__version__}, transformers '
        f'{transformers.__version__}; DETR {args.backbone}, batch {args.batch} of {args.height}x'
        f'{args.width}, {"bfloat16" if gpu else "float32"}, dropout {args.dropout}, {args.rounds} '
        f'rounds; a large matrix product runs at {product / 1e9:,.0f} GFLOP/s', flush=True)

  theirs = {}
  if {'training', 'inference'} & set(chosen):
    began = time.perf_counter()
    theirs = {name: Peer(args, batch, name) for name in peers}
    counts = trained(ours.plan('scan/none')), *(peer.trained for peer in theirs.values())
    if len(set(counts)) > 1:
      raise RuntimeError(f'the sides train different numbers of parameters: {counts}')
    print(f'{"":10}{counts[0]:,} trained parameters on both sides '
          f'({time.perf_counter() - began:.0f} s to build theirs)', flush=True)
  step = None
  if 'inference' in chosen:
    # Rematerialisation is for the backward pass: one setting of each kind is enough.
    kinds = {SETTINGS[name][0]: name for name in reversed(settings)}
    contest('inference', args, {name: ours.inference(name) for name in kinds.values()},
            {name: peer.inference() for name, peer in theirs.items()}, ours.gflop('inference'),
            product, peak)
  # As an untrained network has them; training moves them little in so few steps.
  outputs = ours.outputs(settings[0]) if 'matching' in chosen else None
  if 'training' in chosen:
    step = contest('training', args, {name: ours.training(name) for name in settings},
                   {name: peer.training() for name, peer in theirs.items()},
                   ours.gflop('training'), product, peak)
  if 'matching' in chosen:
    match(args, batch, outputs, step)


if __name__ == '__main__':
  main()
