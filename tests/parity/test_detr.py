"""DETR against Hugging Face transformers: weights in and out, outputs, losses.

transformers (5.23) differs from the reference implementation in one thing that shows here: with
`auxiliary_loss` its decoder feeds the shared norm's output into the next layer. The outputs of
single layers are therefore computed from its plain hidden states.
"""

import functools
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import detr as configs
from core import pretrained
from detection import backbone, checkpoints, detector, detr

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.parity

CLASSES, QUERIES, WIDTH, HEADS, MLP, CHANNELS = 7, 6, 32, 8, 48, 8
# Two images in a batch of 64x96, 2x3 cells. The second has 2x2: cell i looks at pixel 32 i, and of
# 33 rows the last is one of those. Of rows in the middle of cells it would have only one.
SIZES = np.array([[64, 96], [33, 60]], np.int32)


def images(seed=0, height=64, width=96, sizes=SIZES):
  pixels = np.random.default_rng(seed).integers(
      0, 256, (len(sizes), height, width, 3), dtype=np.uint8)
  for picture, (h, w) in zip(pixels, sizes):
    picture[h:] = 0
    picture[:, w:] = 0
  return pixels


def fed(pixels, sizes=SIZES):
  """The inputs of transformers: normalised, zero outside, and which pixels are real."""
  x = (pixels.astype(np.float64) / 255 - [.485, .456, .406]) / [.229, .224, .225]
  mask = np.zeros(pixels.shape[:3], np.int64)
  for row, (h, w) in zip(mask, sizes):
    row[:h, :w] = 1
  x = np.where(mask[..., None], x, 0).astype(np.float32)
  return dict(pixel_values=torch.tensor(x.transpose(0, 3, 1, 2)), pixel_mask=torch.tensor(mask))


def config(**changes):
  made = configs.get_config('')
  made.model.update(dict(
      backbone_norm='frozen', norm='post', positions='sine', positions_at='attention',
      dilation=False, width=WIDTH, heads=HEADS, mlp_dim=MLP, encoder_layers=2, decoder_layers=3,
      queries=QUERIES, num_classes=CLASSES, masks='none', scan=True) | changes)
  return made


def model(made, stages=(1, 1, 1, 2), channels=CHANNELS):
  m = made.model
  return detector.DETR(
      m.num_classes, m.queries, m.width, stages, channels, backbone_norm='frozen',
      encoder_layers=m.encoder_layers, decoder_layers=m.decoder_layers, heads=m.heads,
      mlp_dim=m.mlp_dim, positions=m.positions, masks=m.masks, scan=m.scan)


def their_config(made, depths=(1, 1, 1, 2), channels=CHANNELS):
  m = made.model
  return transformers.DetrConfig(
      use_timm_backbone=False, backbone_config=transformers.ResNetConfig(
          embedding_size=channels, hidden_sizes=[4 * channels * 2 ** i for i in range(4)],
          depths=list(depths), out_features=[f'stage{i}' for i in range(1, 5)]),
      d_model=m.width, encoder_layers=m.encoder_layers, decoder_layers=m.decoder_layers,
      encoder_ffn_dim=m.mlp_dim, decoder_ffn_dim=m.mlp_dim, encoder_attention_heads=m.heads,
      decoder_attention_heads=m.heads, num_queries=m.queries, num_labels=m.num_classes,
      position_embedding_type=m.positions)


def randomise(theirs, seed=0):
  """Random numbers everywhere, in norms, biases and statistics too."""
  generator = torch.Generator().manual_seed(seed)
  draw = lambda shape, std: std * torch.randn(shape, generator=generator)
  with torch.no_grad():
    for name, value in theirs.state_dict().items():
      if value.ndim > 1:
        # So much that neither units nor attention average everything away.
        scale = 1. if 'embeddings' in name else (2 / value[0].numel()) ** .5
        value.copy_(draw(value.shape, scale))
      elif name.endswith('running_var'):
        value.copy_(torch.rand(value.shape, generator=generator) + .5)
      else:
        ones = name.endswith('weight')
        value.copy_(draw(value.shape, .2) + ones)
  return theirs.eval()


@functools.cache
def shapes(made):
  params = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8),
                          jnp.ones((1, 2), jnp.int32))
  return flax.linen.unbox(params)['params']


def loaded(path, made, ours):
  """Our parameters from the file at `path`, by the way that everything is loaded."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes(ours))
  task = types.SimpleNamespace(adapt=checkpoints.adapt,
                               open_weights=lambda path: checkpoints.open_weights(path, made))
  plan = types.SimpleNamespace(task=task, params_shape=placed, config=made)
  return pretrained.read_params(plan, str(path))


def layers_of(theirs, out):
  """Logits and boxes of every decoder layer, from transformers' hidden states."""
  detector_ = theirs.detr if hasattr(theirs, 'detr') else theirs
  with torch.no_grad():
    # The first is the decoder's input.
    hidden = [detector_.model.decoder.layernorm(x) for x in out.decoder_hidden_states[1:]]
    logits = [detector_.class_labels_classifier(x).numpy() for x in hidden]
    boxes = [detector_.bbox_predictor(x).sigmoid().numpy() for x in hidden]
  return np.stack(logits), np.stack(boxes)


def hidden_states(theirs, inputs):
  """Their outputs, and what every decoder layer gave, before the shared norm."""
  found = []
  detector_ = theirs.detr if hasattr(theirs, 'detr') else theirs
  hooks = [layer.register_forward_hook(lambda module, args, out: found.append(out))
           for layer in detector_.model.decoder.layers]
  with torch.no_grad():
    out = theirs(**inputs)
  for hook in hooks:
    hook.remove()
  out.decoder_hidden_states = (None, *found)
  return out


def close(got, want, relative=1e-4):
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape
  assert abs(want).max() > 0 and abs(got - want).max() <= relative * abs(want).max()


@pytest.mark.parametrize('case', ['sine', 'learned', 'panoptic'])
def test_outputs_of_every_layer_and_the_way_back(tmp_path, case):
  masks = case == 'panoptic'
  made = config(positions='learned' if case == 'learned' else 'sine',
                masks='joint' if masks else 'none', scan=case == 'sine')
  kind = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
  theirs = randomise(kind(their_config(made)))
  theirs.save_pretrained(tmp_path / 'theirs')
  ours = model(made)
  params = loaded(tmp_path / 'theirs', made, ours)
  pixels = images()
  out = hidden_states(theirs, fed(pixels))
  got = jax.jit(ours.apply)({'params': params}, pixels, SIZES)
  logits, boxes = layers_of(theirs, out)
  close(got['logits'], logits)
  close(got['boxes'], boxes)
  close(got['logits'][-1], out.logits)
  # What is compared differs between images, queries and layers.
  assert abs(np.diff(boxes, axis=0)).max() > .01 and boxes.std(axis=2).max() > .01
  if masks:
    close(got['masks'], out.pred_masks)

  names = [f'class {i}' for i in range(CLASSES)]
  folder = checkpoints.write(params, tmp_path / 'export', made, names)
  back, report = kind.from_pretrained(folder, output_loading_info=True)
  assert not any(report.values()), report
  assert back.config.id2label[3] == 'class 3' and back.config.num_queries == QUERIES
  with torch.no_grad():
    again = back.eval()(**fed(pixels))
  close(again.logits, out.logits)
  close(again.pred_boxes, out.pred_boxes)
  if masks:
    close(again.pred_masks, out.pred_masks)
  once_more = loaded(folder, made, ours)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), once_more,
               params)


def test_modules_have_the_names_that_are_read(tmp_path):
  """The names of modules since transformers 5, which files do not have."""
  import safetensors.torch
  made = config(masks='joint', scan=False)
  theirs = randomise(transformers.DetrForSegmentation(their_config(made)))
  theirs.save_pretrained(tmp_path / 'files')
  state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
  (tmp_path / 'modules').mkdir()
  safetensors.torch.save_file(state, tmp_path / 'modules' / 'model.safetensors')
  files, modules = (checkpoints.open_weights(tmp_path / name, made)
                    for name in ('files', 'modules'))
  assert files.keys() == modules.keys()
  assert not [name for name in files if '.' in name]
  for name, weight in files.items():
    np.testing.assert_array_equal(weight.read(), modules[name].read(), err_msg=name)


def test_the_losses():
  """transformers' matcher and criterion on the same outputs and targets; with D3's divisors."""
  from transformers.loss import loss_for_object_detection as theirs
  rng = np.random.default_rng(0)
  layers, batch, slots = 3, 3, 5
  logits = rng.normal(size=(layers, batch, QUERIES, CLASSES + 1)).astype(np.float32)
  boxes = np.concatenate([rng.uniform(.3, .7, (layers, batch, QUERIES, 2)),
                          rng.uniform(.05, .5, (layers, batch, QUERIES, 2))], -1).astype(np.float32)
  counts = [4, 0, 2]
  labels = rng.integers(0, CLASSES, (batch, slots)).astype(np.int32)
  wanted = np.concatenate([rng.uniform(.3, .7, (batch, slots, 2)),
                           rng.uniform(.05, .5, (batch, slots, 2))], -1).astype(np.float32)
  made = config(queries=QUERIES)
  described = their_config(made)
  described.auxiliary_loss = True
  tensor = lambda x: torch.tensor(x, requires_grad=True)
  their_logits, their_boxes = tensor(logits), tensor(boxes)
  targets = [dict(class_labels=torch.tensor(labels[i, :n]).long(),
                  boxes=torch.tensor(wanted[i, :n])) for i, n in enumerate(counts)]
  total, parts, _ = theirs.ForObjectDetectionLoss(
      their_logits[-1], targets, 'cpu', their_boxes[-1], described, their_logits, their_boxes)
  total.backward()

  made.model.aux_loss = True
  task = detr.Task(made)
  batch_ = dict(labels=labels, boxes=wanted, objects=np.array(counts, np.int32),
                mask=np.ones(batch, np.float32))

  def loss(logits, boxes):
    task.forward = lambda *_: dict(logits=logits, boxes=boxes)
    value, aux = task.loss(None, batch_, None, False)
    return value, aux.metrics
  (value, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(logits, boxes)
  np.testing.assert_allclose(value, total.item(), rtol=1e-5)
  compared = 0
  for name, want in parts.items():
    if name.startswith(('loss_', 'cardinality_error')) and name in metrics:
      got = metrics[name][0] / metrics[name][1]
      np.testing.assert_allclose(got, want.item(), rtol=1e-5, err_msg=name)
      compared += 1
  assert compared == 3 * layers + 1
  close(grads[0], their_logits.grad)
  close(grads[1], their_boxes.grad)


def test_a_dilated_backbone():
  """Against convolutions of torch: transformers dilates only through timm.

  The first unit of the last stage has stride 1 and, as in torchvision, no dilation yet; the
  following ones are dilated by 2.
  """
  made = backbone.ResNet((1, 1, 1, 3), CHANNELS, dilation=True)
  x = np.random.default_rng(0).normal(size=(1, 66, 90, 3)).astype(np.float32)
  params = flax.linen.unbox(jax.jit(made.init)(jax.random.key(0), x))['params']
  rng = np.random.default_rng(1)
  params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: np.asarray(leaf) if path[-1].key == 'kernel' else rng.normal(
          path[-1].key == 'scale', .2, leaf.shape).astype(np.float32), params)

  def conv(x, unit, stride=1, dilation=1):
    kernel = torch.tensor(unit['kernel'].transpose(3, 2, 0, 1))
    pad = dilation * (kernel.shape[-1] // 2)
    scale, bias = (torch.tensor(unit[name])[:, None, None] for name in ('scale', 'bias'))
    return torch.nn.functional.conv2d(x, kernel, None, stride, pad, dilation) * scale + bias

  y = torch.relu(conv(torch.tensor(x.transpose(0, 3, 1, 2)), params['conv1'], 2))
  y = torch.nn.functional.max_pool2d(y, 3, 2, 1)
  want = []
  for stage, strides in enumerate(([1], [2], [2], [1, 1, 1])):
    for i, stride in enumerate(strides):
      unit = params[f'layer{stage + 1}_{i}']
      z = torch.relu(conv(y, unit['conv1']))
      z = torch.relu(conv(z, unit['conv2'], stride, 2 if stage == 3 and i else 1))
      z = conv(z, unit['conv3'])
      y = torch.relu(z + (conv(y, unit['downsample'], stride) if i == 0 else y))
    want.append(y.numpy().transpose(0, 2, 3, 1))
  for got, wanted in zip(jax.jit(made.apply)({'params': params}, x), want, strict=True):
    close(got, wanted)
  assert want[-1].shape[1:3] == (5, 6)


@pytest.mark.slow
def test_the_published_size(tmp_path):
  """R50, 91 classes, 100 queries, 256 x 320 pixels in a batch of 288 x 320."""
  made = config(width=256, heads=8, mlp_dim=2048, encoder_layers=6, decoder_layers=6, queries=100,
                num_classes=91)
  depths = backbone.BACKBONES['r50']['stages']
  theirs = randomise(transformers.DetrForObjectDetection(their_config(made, depths, 64)))
  theirs.save_pretrained(tmp_path)
  ours = model(made, depths, 64)
  params = loaded(tmp_path, made, ours)
  sizes = np.array([[256, 320]], np.int32)
  pixels = images(0, 288, 320, sizes)
  out = hidden_states(theirs, fed(pixels, sizes))
  got = jax.jit(ours.apply)({'params': params}, pixels, sizes)
  logits, boxes = layers_of(theirs, out)
  close(got['logits'], logits)
  close(got['boxes'], boxes)
