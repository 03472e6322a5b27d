import functools
import http.server
import sys
import threading
import tracemalloc
import types
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import common
from core import checkpoint, config as config_lib, pretrained, step, task, weights
from core.config import UserError
from core.weights import Notes, Weight


def unread(shape):
  def read():
    raise AssertionError('read before names and shapes were settled')
  return Weight(shape, read)


def plan_of(params, adapt=None):
  """What loading needs of a plan: shapes in shardings (last dimension over 8 devices), a task."""
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))

  def shape(x):
    split = x.shape[-1] % 8 == 0
    spec = PartitionSpec(*(None,) * (x.ndim - 1), 'fsdp') if split else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=NamedSharding(mesh, spec))
  shapes = jax.tree.map(shape, params)
  reader = types.SimpleNamespace(open_weights=weights.open_npz,
                                 adapt=adapt or functools.partial(task.Task.adapt, None))
  return types.SimpleNamespace(config=common.base(), params_shape=shapes, task=reader)


def tree(seed, head=8):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {'body': {'a': draw(4, 16), 'b': draw(8)}, 'head': {'kernel': draw(16, head)}}


def put(plan, params):
  return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, plan.params_shape)


def keeps_head(found, shape, transfer):
  assert transfer
  return {k: w for k, w in found.items() if k != 'head/kernel'}, Notes(
      looks_like='T/4', unused=('head/kernel',), fresh=('head/kernel',))


def save_npz(path, params):
  flat = {'body/a': params['body']['a'], 'body/b': params['body']['b'],
          'head/kernel': params['head']['kernel']}
  np.savez(path, **flat)
  return str(path)


def test_one_parameter_after_the_other_replaces_a_fresh_one(tmp_path, capsys):
  """When one is read, those before it are placed and their fresh buffers gone; none after it."""
  old, new = tree(0), tree(1)
  seen = []

  def adapt(found, shape, transfer):
    found, notes = keeps_head(found, shape, transfer)
    fresh = {'body/a': state.params['body']['a'], 'body/b': state.params['body']['b'],
             'head/kernel': state.params['head']['kernel']}

    def watched(name, weight):
      def read():
        seen.append((name, sorted(n for n, x in fresh.items() if x.is_deleted())))
        return weight.read()
      return Weight(weight.shape, read)
    return {name: watched(name, w) for name, w in found.items()}, notes

  plan = plan_of(old, adapt)
  params = put(plan, old)
  state = step.TrainState(jnp.zeros((), jnp.int32), params, (), jax.tree.map(jnp.copy, params))
  loaded = pretrained.load_into(plan, state, save_npz(tmp_path / 'x.npz', new))
  assert seen == [('body/a', []), ('body/b', ['body/a'])]
  expected = {**new, 'head': old['head']}
  for made in (loaded.params, loaded.ema):
    jax.tree.map(np.testing.assert_array_equal, made, expected)
  assert jax.tree.map(lambda x: x.sharding, loaded.params) == jax.tree.map(
      lambda s: s.sharding, plan.params_shape)
  jax.tree.map(lambda p, e: p.delete(), loaded.params, loaded.ema)
  jax.tree.map(np.testing.assert_array_equal, loaded.ema, expected)  # no shared buffers
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  assert ('x.npz, which looks like T/4, 2 tensors read; not used: head/kernel; '
          'fresh: head/kernel; resized: none') in out


def test_the_host_never_holds_the_model_twice(tmp_path):
  """numpy's memory, which excludes the devices', stays below a third of the 24 parameters."""
  one = np.ones((512, 512), np.float32)
  np.savez(tmp_path / 'x.npz', **{f'{i:02}': one for i in range(24)})
  plan = plan_of({f'{i:02}': one for i in range(24)})
  tracemalloc.start()
  pretrained.read_params(plan, str(tmp_path / 'x.npz'))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 * one.nbytes, peak / one.nbytes


def test_what_does_not_agree_is_named_before_anything_is_read():
  plan = plan_of(tree(0))
  plan.task.open_weights = lambda path: {
      'body/a': unread((4, 17)), 'body/c': unread((1,)), 'head/kernel': unread((16, 8)),
      'z/1': unread((1,)), 'z/2': unread((2,))}
  plan.task.adapt = lambda found, shape, transfer: (found, Notes('S/16 at 224 px'))
  with pytest.raises(UserError, match=r'looks like S/16 at 224 px.*body/a: \(4, 17\) there, '
                     r'\(4, 16\) in the model; body/b: missing there.*; body/c: \(1,\) there, '
                     'not used in the model and 2 more'):
    pretrained.read_params(plan, __file__)


def save_workdir(path, params, average):
  state = step.TrainState(jnp.asarray(3), params, optax.EmptyState(), average)
  options = config_lib.ml_collections.ConfigDict(dict(keep=1, best=''))
  checkpoints = checkpoint.Checkpoints(path / 'checkpoints', options)
  checkpoints.save(3, state, {})
  checkpoints.wait()
  checkpoints.close()


@pytest.mark.parametrize('averaged', [False, True])
def test_a_workdir_of_another_head(tmp_path, averaged):
  old, saved, average = tree(0), tree(1, head=5), tree(2, head=5)
  save_workdir(tmp_path, saved, average if averaged else None)
  plan = plan_of(old, keeps_head)
  state = step.TrainState(jnp.zeros((), jnp.int32), put(plan, old), (), None)
  loaded = pretrained.load_into(plan, state, str(tmp_path)).params
  body = (average if averaged else saved)['body']
  jax.tree.map(np.testing.assert_array_equal, loaded, {'body': body, 'head': old['head']})
  with pytest.raises(UserError, match=r'head/kernel: \(16, 5\) there, \(16, 8\) in the model'):
    pretrained.read_params(plan, str(tmp_path))


def test_a_damaged_workdir_is_one_line(tmp_path):
  save_workdir(tmp_path, tree(1), None)
  for path in (tmp_path / 'checkpoints' / '3' / 'state').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(b'')
  plan = plan_of(tree(0), keeps_head)
  state = step.TrainState(jnp.zeros((), jnp.int32), put(plan, tree(0)), (), None)
  with pytest.raises(UserError, match='checkpoint 3 in .* cannot be read .*move it away'):
    pretrained.load_into(plan, state, str(tmp_path))


LAYERS = {f't/block_{i}/w': np.full((2, 3), i, np.float32) for i in range(11)}


def weights_of(arrays, reads=None):
  def read(name):
    if reads is not None:
      reads.append(name)
    return arrays[name]
  return {name: Weight(x.shape, functools.partial(read, name)) for name, x in arrays.items()}


def test_layers_are_stacked_in_the_order_of_their_numbers():
  other = {'other': np.zeros(1, np.float32)}
  made = weights.match_layers(weights_of(LAYERS | other), ['t/block/w', 'other'], 't/block')
  assert {k: w.shape for k, w in made.items()} == {'other': (1,), 't/block/w': (11, 2, 3)}
  np.testing.assert_array_equal(made['t/block/w'].read()[:, 0, 0], np.arange(11))


def test_a_stack_is_taken_apart_and_read_once():
  stacked = {f't/block/{k}': np.stack([LAYERS[f't/block_{i}/w'] for i in range(11)])
             for k in ('w', 'u')}
  reads = []
  names = [f't/block_{i}/{k}' for i in range(11) for k in ('w', 'u')]
  made = weights.match_layers(weights_of(stacked, reads), names, 't/block')
  plan = plan_of({'t': {f'block_{i}': {k: np.zeros((2, 3)) for k in ('w', 'u')}
                        for i in range(11)}})
  plan.task.open_weights = lambda path: made
  params = pretrained.read_params(plan, __file__)
  assert sorted(reads) == ['t/block/u', 't/block/w']
  for i in range(11):
    assert (np.asarray(params['t'][f'block_{i}']['u']) == i).all()


def test_a_parameter_that_one_layer_lacks_is_left_to_be_named():
  arrays = {k: v for k, v in LAYERS.items() if k != 't/block_5/w'} | {
      f't/block_{i}/b': np.zeros(1, np.float32) for i in range(11)}
  made = weights.match_layers(weights_of(arrays), ['t/block/w', 't/block/b'], 't/block')
  assert made['t/block/b'].shape == (11, 1) and 't/block/w' not in made and 't/block_0/w' in made


def test_an_archive_gives_shapes_without_values_and_bfloat16(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {'a/b': rng.normal(size=(300, 7)).astype(np.float32),
            'half': rng.normal(size=5).astype(np.float16),
            'brain': np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
            'fortran': np.asfortranarray(rng.normal(size=(3, 4)))}
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / 'x.npz', **arrays)
    made = weights.open_npz(tmp_path / 'x.npz')
    assert {k: w.shape for k, w in made.items()} == {k: v.shape for k, v in arrays.items()}
    for name, value in arrays.items():
      np.testing.assert_array_equal(made[name].read().astype(np.float64),
                                    value.astype(np.float64))


def test_damage_inside_an_archive_shows_when_that_array_is_read(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, good=np.ones(1000, np.float32), bad=np.full(1000, 7, np.float32))
  content = bytearray(path.read_bytes())
  content[content.rindex(np.float32(7).tobytes() * 3)] ^= 1
  path.write_bytes(content)
  made = weights.open_npz(path)
  assert made['good'].read().sum() == 1000
  with pytest.raises(UserError, match='x.npz: bad cannot be read .*fetch it again'):
    made['bad'].read()


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 cut short', b'no archive at all'])
@pytest.mark.parametrize('ending', ['npz', 'safetensors'])
def test_not_an_archive(content, ending, tmp_path):
  path = tmp_path / f'x.{ending}'
  path.write_bytes(content)
  opened = weights.open_npz if ending == 'npz' else weights.open_safetensors
  with pytest.raises(UserError, match=f'x.{ending}: not a .{ending}.*cut short'):
    opened(path)


def test_cut_short(tmp_path):
  import safetensors.numpy
  arrays = {'a': np.ones(4000, np.float32)}
  np.savez(tmp_path / 'x.npz', **arrays)
  safetensors.numpy.save_file(arrays, tmp_path / 'x.safetensors')
  assert weights.open_safetensors(tmp_path / 'x.safetensors')['a'].read().sum() == 4000
  for name, opened in (('x.npz', weights.open_npz),
                       ('x.safetensors', weights.open_safetensors)):
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match='cut short'):
      opened(path)


def test_nothing_is_unpickled(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, good=np.ones(3), cls=np.array([{'a': print}], dtype=object))
  with pytest.raises(UserError, match='cls is of dtype object, and nothing is unpickled'):
    weights.open_npz(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'hello')
  with pytest.raises(UserError, match='not a .npz of arrays'):
    weights.open_npz(path)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_state_dict_of_torch(tmp_path, zipped):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'x.pth'
  state = {'a': torch.arange(12.).reshape(3, 4).T, 'brain': torch.arange(5).bfloat16(),
           'p': torch.nn.Parameter(torch.ones(2))}
  save = functools.partial(torch.save, f=path, _use_new_zipfile_serialization=zipped)
  for content, inside in ((state, ()), (state, ('model',)),
                          ({'epoch': 3, 'model': state}, ('state', 'model'))):
    save(content)
    made = weights.open_torch(path, inside)
    assert {k: w.shape for k, w in made.items()} == {'a': (4, 3), 'brain': (5,), 'p': (2,)}
    np.testing.assert_array_equal(made['a'].read(), np.arange(12.).reshape(3, 4).T)
    np.testing.assert_array_equal(made['brain'].read(), np.arange(5))
    assert made['p'].read().dtype == np.float32
  with pytest.raises(UserError, match='x.pth: not a state dict; epoch is no tensor'):
    weights.open_torch(path)
  save([1])
  with pytest.raises(UserError, match='not a state dict; list is no tensor'):
    weights.open_torch(path)


class Attack:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


@pytest.mark.parametrize('zipped', [True, False])
def test_nothing_of_torch_is_unpickled_but_tensors(tmp_path, zipped):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'x.pth'
  for thing in (Attack(tmp_path / 'made'), types.SimpleNamespace(lr=1)):
    torch.save({'model': {'a': torch.ones(2)}, 'args': thing}, path,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match='GLOBAL.*nothing else is unpickled') as error:
      weights.open_torch(path, ('model',))
    assert '\n' not in str(error.value)
  assert not (tmp_path / 'made').exists()
  content = path.read_bytes()
  for damaged in (b'', b'PK\x03\x04 cut short', b'no archive at all', content[:len(content) // 2]):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='x.pth: not a file of tensors alone.*damaged'):
      weights.open_torch(path)


def test_without_torch_the_extra_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=r"needs torch: `pip install -e '.\[torch\]'`"):
    weights.open_torch(tmp_path / 'x.pth')


@pytest.fixture
def server(tmp_path, monkeypatch):
  """Serves tmp_path/served and counts requests; /short says more bytes than it sends."""
  served = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      served.append(self.path)
      body = b'x' * 100
      self.send_response(404 if self.path == '/gone.npz' else 200)
      self.send_header('Content-Length', str(200 if 'short' in self.path else 100))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('no_proxy', '*')
  with http.server.HTTPServer(('127.0.0.1', 0), Handler) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{running.server_port}', served
    running.shutdown()


def test_a_url_is_fetched_once_into_the_cache(server, tmp_path):
  url, served = server
  path = weights.local_copy(f'{url}/models/a.npz')
  assert path.read_bytes() == b'x' * 100 and path.suffix == '.npz'
  assert (tmp_path / 'cache' / 'throughline' / 'weights') in path.parents
  assert weights.local_copy(f'{url}/models/a.npz') == path and served == ['/models/a.npz']
  other = weights.local_copy(f'{url}/models/a.npz?version=2')
  assert other != path and other.suffix == '.npz'
  up = weights.local_copy(f'{url}/../../../../../up.npz')
  assert (tmp_path / 'cache') in up.resolve().parents


@pytest.mark.parametrize('name', ['short.npz', 'gone.npz'])
def test_a_fetch_that_fails_leaves_nothing(server, tmp_path, name):
  with pytest.raises(UserError, match=f"{name}': cannot be fetched"):
    weights.local_copy(f'{server[0]}/{name}')
  assert not [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()]


def test_a_bucket_that_cannot_be_reached_says_where_else(monkeypatch, tmp_path):
  def no_backend(path):
    raise ImportError('Please install gcsfs')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(weights.epath, 'Path', no_backend)
  with pytest.raises(UserError, match='gcsfs; .*https://storage.googleapis.com/vit_models/a/b.npz'):
    weights.local_copy('gs://vit_models/a/b.npz')


def test_no_such_file():
  with pytest.raises(UserError, match='no such file or workdir'):
    weights.local_copy('/no/such.npz')
