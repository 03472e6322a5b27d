"""Data in COCO's format: what it means, and everything that can be wrong with it."""

import io
import json
import pickle
import shutil

import cv2
import numpy as np
import pytest
from absl import logging
from PIL import Image

from core.config import UserError
from core.data import images
from core.data import pipeline
from detection import categories
from detection import coco
from detection import coco_files
from detection import coco_masks
from detection.image_sizes import image_size

H, W = 20, 30
CATEGORIES = [{'id': 7, 'name': 'dog'}, {'id': 3, 'name': 'cat'}]


def annotation(number, image, box, category=3, **more):
  return {'id': number, 'image_id': image, 'category_id': category, 'bbox': box, 'iscrowd': 0,
          'area': box[2] * box[3]} | more


def content(annotations=(), files=('a.png', 'b.png'), **more):
  return {'images': [{'id': 10 + i, 'file_name': f, 'height': H, 'width': W}
                     for i, f in enumerate(files)],
          'annotations': list(annotations), 'categories': CATEGORIES} | more


def write(folder, what, pictures=None):
  """Writes annotations.json (a dict, or its very bytes) and images/ of its files."""
  (folder / 'images').mkdir(parents=True, exist_ok=True)
  data = what if isinstance(what, bytes) else json.dumps(what).encode()
  (folder / 'annotations.json').write_bytes(data)
  for entry in [] if isinstance(what, bytes) else what['images']:
    if isinstance(entry, dict) and isinstance(entry.get('file_name'), str):
      images.write(folder / 'images' / entry['file_name'], np.full((H, W, 3), 9, np.uint8))
  for name, ids in (pictures or {}).items():
    (folder / 'panoptic').mkdir(exist_ok=True)
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    images.write(folder / 'panoptic' / name, rgb)
  return folder


def opened(tmp_path, what, pictures=None, split='train', **more):
  return coco.CocoSource(str(write(tmp_path / split, what, pictures).parent), split, **more)


# --- What it means -------------------------------------------------------------------------------


def test_examples(tmp_path):
  source = opened(tmp_path, content([
      annotation(5, 11, [1.5, 2, 10, 4], 7), annotation(0, 10, [0, 0, 3, 4]),
      annotation(9, 11, [20, 10, 10.75, 10], 3, iscrowd=1, area=77)]))
  assert source.class_names == ['cat', 'dog'] and source.class_ids == [3, 7]
  assert source.is_thing == [True, True] and len(source) == 2
  assert source.sizes.tolist() == [[H, W]] * 2 and source.sizes.dtype == np.int32
  assert source.image_ids.tolist() == [10, 11] and source.objects.tolist() == [1, 1]
  example = pickle.loads(pickle.dumps(source))[1]
  assert images.decode(example['image']).shape == (H, W, 3)
  assert {k: example[k] for k in ('image_id', 'height', 'width')} == dict(
      image_id=11, height=H, width=W)
  # Less than a pixel beyond the image is rounding; it is clipped.
  np.testing.assert_array_equal(example['boxes'], np.float32([[1.5, 2, 11.5, 6], [20, 10, 30, 20]]))
  assert example['labels'].tolist() == [1, 0] and example['labels'].dtype == np.int32
  assert example['area'].tolist() == [40, 77] and example['area'].dtype == np.float32
  assert example['crowd'].tolist() == [False, True] and example['boxes'].dtype == np.float32
  assert set(source.target(1)) == set(example) - {'image'}


def test_raw_ids_and_images_without_objects(tmp_path):
  source = opened(tmp_path, content([annotation(1, 10, [0, 0, 3, 4], 7)]), labels='ids')
  assert source.class_names == ['', '', '', 'cat', '', '', '', 'dog']
  assert source.class_ids == [-1, -1, -1, 3, -1, -1, -1, 7]
  assert source[0]['labels'].tolist() == [7]
  assert source[1]['boxes'].shape == (0, 4) and source[1]['labels'].shape == (0,)
  with pytest.raises(UserError, match="unknown name 'raw'"):
    opened(tmp_path, content(), labels='raw')


def test_classes_of_published_models():
  assert len(categories.THINGS) == 80 and len(categories.STUFF) == 53
  assert set(range(1, 91)) - set(categories.THINGS) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
  assert list(categories.PANOPTIC) == sorted(categories.PANOPTIC)
  assert (categories.PANOPTIC[1], categories.PANOPTIC[90], categories.PANOPTIC[92],
          categories.PANOPTIC[200]) == ('person', 'toothbrush', 'banner', 'rug-merged')
  for names, count in ((categories.THINGS, 91), (categories.PANOPTIC, 250)):
    things = {i: categories.is_thing(i) for i in names}
    assert len(categories.classes(names, things, 'ids', '').names) == count
    contiguous = categories.classes(names, things, 'contiguous', '')
    assert len(contiguous.names) == len(names) and sum(contiguous.is_thing) == 80
  with pytest.raises(UserError, match='reach from -1 to 3'):
    categories.classes({-1: 'a', 3: 'b'}, {-1: True, 3: True}, 'ids', 'x.json')


def test_layouts(tmp_path):
  one = content(files=('one.png',))
  for name in ('train', 'val'):
    write(tmp_path / 'own' / name, one)
    write(tmp_path / 'flat' / name, one)
    (tmp_path / 'coco' / 'annotations').mkdir(parents=True, exist_ok=True)
    shutil.copytree(tmp_path / 'own' / name / 'images', tmp_path / 'coco' / f'{name}2017')
    shutil.copy(tmp_path / 'own' / name / 'annotations.json',
                tmp_path / 'coco' / 'annotations' / f'instances_{name}2017.json')
  for folder in ('own', 'coco'):
    for split in ('train', 'val', 'validation'):
      assert len(coco.CocoSource(str(tmp_path / folder), split)) == 1
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
      coco.CocoSource(str(tmp_path / folder), 'test')
  with pytest.raises(UserError, match='valid: train, validation, test'):
    coco.CocoSource(str(tmp_path / 'own'), 'train[:5]')
  with pytest.raises(UserError, match='none of the layouts.*it holds annotations, train2017'):
    coco.CocoSource(str(tmp_path / 'coco'), 'train', panoptic=True)
  with pytest.raises(UserError, match='is not a folder'):
    coco.CocoSource(str(tmp_path / 'nowhere'), 'train')
  with pytest.raises(UserError, match='is not panoptic'):
    coco.CocoSource(str(tmp_path / 'own'), 'train', panoptic=True)
  shutil.copytree(tmp_path / 'own' / 'val', tmp_path / 'own' / 'validation')
  with pytest.raises(UserError, match='both validation and val'):
    coco.CocoSource(str(tmp_path / 'own'), 'val')


def test_one_file_is_split_by_hash(tmp_path):
  names = [f'{i}.png' for i in range(200)]
  write(tmp_path, content([annotation(1, 15, [1, 1, 2, 2])], names))
  splits = {s: coco.CocoSource(str(tmp_path), s) for s in ('train', 'validation', 'test')}
  ids = {s: set(source.image_ids.tolist()) for s, source in splits.items()}
  assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 200
  assert 140 < len(ids['train']) < 180 and len(ids['test']) > 8 and len(ids['validation']) > 8
  # The only object stays with its image, whatever its place in the split.
  owner = next(s for s in ids if 15 in ids[s])
  assert {s: int(source.objects.sum()) for s, source in splits.items()} == {
      s: int(s == owner) for s in splits}
  at = splits[owner].image_ids.tolist().index(15)
  assert splits[owner].target(at)['boxes'].tolist() == [[1, 1, 3, 3]]
  assert len(splits[owner].coco()['annotations']) == 1
  # More images leave the others where they are.
  write(tmp_path, content(files=names + ['new.png']))
  more = coco.CocoSource(str(tmp_path), 'train')
  assert set(more.image_ids.tolist()) - {210} == ids['train']


def test_splits_must_share_their_categories(tmp_path):
  write(tmp_path / 'train', content())
  write(tmp_path / 'val', content() | {'categories': CATEGORIES[:1]})
  with pytest.raises(UserError, match=r'train has 3 \(cat\), which it has not'):
    coco.CocoSource(str(tmp_path), 'val')


# --- Masks ---------------------------------------------------------------------------------------


def runs(mask):
  """Uncompressed run lengths, column by column, beginning with zeros."""
  flat = mask.T.ravel()
  ends = np.flatnonzero(np.diff(flat)) + 1
  lengths = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
  return lengths if not flat[0] else [0, *lengths]


def test_masks_of_every_kind_with_the_smaller_on_top(tmp_path):
  pycocotools = pytest.importorskip('pycocotools.mask')
  rectangle = np.zeros((H, W), bool)
  rectangle[4:10, 2:8] = True
  noise = np.random.default_rng(0).random((H, W)) < .2
  noise[:, :15] = False
  crowd = np.ones((H, W), bool)
  code = pycocotools.encode(np.asfortranarray(noise, np.uint8))['counts'].decode()
  box = [1, 1, 5, 5]
  source = opened(tmp_path, content([
      annotation(1, 10, box, segmentation={'size': [H, W], 'counts': runs(rectangle)}),
      annotation(2, 10, box, segmentation={'size': [H, W], 'counts': runs(crowd)}, iscrowd=1),
      annotation(3, 10, box, segmentation=[[0, 0, 12, 0, 12, 12, 0, 12], [20, 15, 25, 15, 25, 20,
                                                                           20, 20]]),
      annotation(4, 10, box, segmentation={'size': [H, W], 'counts': code}),
      annotation(5, 10, box, segmentation=[[3, 5, 5, 5, 5, 7, 3, 7]])]), masks=True)
  want = np.zeros((H, W), int)
  want[0:12, 0:12] = want[15:20, 20:25] = 3
  want[noise] = 4  # 169 pixels of the polygons, and fewer here.
  want[rectangle] = 1
  want[5:7, 3:5] = 5
  assert noise.sum() < 169
  example = source[0]
  np.testing.assert_array_equal(example['segments'], want)
  assert example['segments'].dtype == np.int32
  np.testing.assert_array_equal(source[1]['segments'], 0)
  # The same masks as pycocotools reads in the file itself.
  made = {a['id']: pycocotools.decode(a['segmentation']) for a in source.coco()['annotations']}
  np.testing.assert_array_equal(made[1], rectangle)
  np.testing.assert_array_equal(made[2], crowd)
  np.testing.assert_array_equal(made[4], noise)


@pytest.mark.parametrize('seed', range(5))
def test_compressed_runs_are_read_as_pycocotools_reads_them(seed):
  pycocotools = pytest.importorskip('pycocotools.mask')
  rng = np.random.default_rng(seed)
  mask = rng.random((200, 90)) < rng.choice([.001, .5, .999])
  code = pycocotools.encode(np.asfortranarray(mask, np.uint8))['counts']
  assert coco_masks._decompress(code.decode()) == runs(mask)
  assert coco_masks.encode({'size': [200, 90], 'counts': code.decode()}, 200, 90) == code


@pytest.mark.parametrize('segmentation, words', [
    ([], 'no mask'), (None, 'no mask'), ('x', 'neither a list of polygons nor run lengths'),
    ([[0, 0, 5, 5]], '4 numbers; a polygon has at least three pairs'),
    ([[0, 0, 5, 5, 0, 5, 1]], '7 numbers'), ([['0', 0, 5, 5, 0, 5]], 'not a list of numbers'),
    ([0, 0, 5, 5, 0, 5], 'not a list of numbers'),
    ([[0, 0, float('nan'), 5, 0, 5]], 'not finite'), ([[0, 0, 1e9, 5, 0, 5]], 'far beyond'),
    ({'size': [W, H], 'counts': [H * W]}, r'size \[30, 20\] where the image has \[20, 30\]'),
    ({'size': [H, W], 'counts': [H * W - 1]}, 'add up to 599'),
    ({'size': [H, W], 'counts': [-1, H * W + 1]}, 'not lengths'),
    ({'size': [H, W], 'counts': [1., H * W - 1]}, 'not lengths'),
    ({'size': [H, W], 'counts': 'abc'}, 'malformed run lengths'),
    ({'size': [H, W], 'counts': '\x01'}, r"contain '\\x01'"),
    ({'size': [H, W]}, 'not lengths')])
def test_malformed_masks(tmp_path, segmentation, words):
  pytest.importorskip('pycocotools')
  data = content([annotation(4, 10, [1, 1, 5, 5], segmentation=segmentation)])
  with pytest.raises(UserError, match=words) as error:
    opened(tmp_path, data, masks=True)
  assert 'annotation 4 in a.png' in str(error.value)
  assert len(opened(tmp_path, data)[0]['boxes']) == 1  # Nobody asked for masks.
  assert len(opened(tmp_path, data, masks=True, strict=False)[0]['boxes']) == 0


# --- Panoptic ------------------------------------------------------------------------------------


def panoptic_content():
  ids = np.zeros((H, W), np.int64)
  ids[:, 10:] = 70_001  # B = 1, G = 17, R = 113.
  ids[2:6, 3:9] = 300
  ids[0, 29] = 5
  segment = lambda number, category, box, **more: {
      'id': number, 'category_id': category, 'bbox': box, 'area': box[2] * box[3],
      'iscrowd': 0} | more
  segments = [segment(300, 1, [3, 2, 6, 4]), segment(70_001, 92, [10, 0, 20, 20]),
              segment(5, 1, [29, 0, 1, 1], iscrowd=1)]
  return {'images': content()['images'],
          'annotations': [{'image_id': 11, 'file_name': 'b.png', 'segments_info': segments}],
          'categories': [{'id': 1, 'name': 'person', 'isthing': 1},
                         {'id': 92, 'name': 'banner', 'isthing': 0}]}, ids


def test_panoptic(tmp_path):
  data, ids = panoptic_content()
  source = opened(tmp_path, data, {'b.png': ids}, masks=True, panoptic=True)
  assert source.is_thing == [True, False] and source.objects.tolist() == [0, 2]
  example = source[1]
  want = np.select([ids == 300, ids == 70_001, ids == 5], [1, 2, 3])
  np.testing.assert_array_equal(example['segments'], want)
  # They end at the last pixel, without one more.
  assert example['boxes'].tolist() == [[3, 2, 8, 5], [10, 0, 29, 19], [29, 0, 29, 0]]
  assert example['labels'].tolist() == [0, 1, 0] and example['crowd'].tolist() == [0, 0, 1]
  assert source[0]['boxes'].shape == (0, 4) and not source[0]['segments'].any()
  boxes_only = opened(tmp_path, data)
  assert 'segments' not in boxes_only[1]
  np.testing.assert_array_equal(boxes_only[1]['boxes'], example['boxes'])


def test_panoptic_ground_truth_has_masks(tmp_path):
  pycocotools = pytest.importorskip('pycocotools.mask')
  data, ids = panoptic_content()
  truth = opened(tmp_path, data, {'b.png': ids}, masks=True).coco()
  made = [pycocotools.decode(a['segmentation']) for a in truth['annotations']]
  for mask, number in zip(made, (300, 70_001, 5), strict=True):
    np.testing.assert_array_equal(mask, ids == number)
  assert truth['annotations'][0]['bbox'] == [3, 2, 6, 4]


def test_panoptic_mistakes(tmp_path):
  data, ids = panoptic_content()
  with pytest.raises(UserError, match='no pixel of segment 5 '):
    opened(tmp_path, data, {'b.png': np.where(ids == 5, 0, ids)})[1]
  with pytest.raises(images.ImageError, match='no pixel of segment 5 '):
    opened(tmp_path, data, strict=False)[1]
  with pytest.raises(UserError, match='b.png is 20 x 30 pixels.*says 30 x 20'):
    opened(tmp_path, data, {'b.png': ids.T})[1]
  (tmp_path / 'train' / 'panoptic' / 'b.png').rename(tmp_path / 'b.png')
  with pytest.raises(UserError, match=r'missing panoptic pictures in .*: 1 \(b.png\)'):
    opened(tmp_path, data)
  data['annotations'][0]['segments_info'][0]['id'] = 5
  with pytest.raises(UserError, match='ids are not different.*segment 5 of b.png'):
    opened(tmp_path, data, {'b.png': ids})
  del data['categories'][1]['isthing']
  with pytest.raises(UserError, match="'banner' does not say whether it is a thing"):
    opened(tmp_path, data)


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize('data, words', [
    (b'{"images": [],\n "annotations": [}', 'line 2, column 18: Expecting value'),
    (b'', 'line 1, column 1'), (b'\xff\xfe\xfa', 'is not JSON'), (b'[' * 100_000, 'is not JSON'),
    (b'[]', 'holds a list, not an object'),
    (b'{"images": [], "annotations": {}}', "no list 'annotations' and no list 'categories'"),
    (content() | {'categories': []}, 'has no categories'),
    (content() | {'images': []}, 'has no images'),
    (content() | {'categories': CATEGORIES + [{'id': 3, 'name': 'cow'}]},
     "'cat' and 'cow' share the id 3"),
    (content() | {'categories': [{'id': '3', 'name': 'cat'}]}, 'lacks an integer id')])
@pytest.mark.parametrize('strict', [True, False])
def test_files_that_cannot_be_read(tmp_path, data, words, strict):
  with pytest.raises(UserError, match=words) as error:
    opened(tmp_path, data, strict=strict)
  assert 'train/annotations.json' in str(error.value) and '\n' not in str(error.value)


GOOD = annotation(1, 10, [1, 1, 5, 5])


@pytest.mark.parametrize('wrong, words', [
    (annotation(1, 11, [1, 1, 5, 5]), r'with the id of another: 1 \(id 1\)'),
    (annotation('x', 10, [1, 1, 5, 5]), 'annotations without an integer id'),
    (annotation(2, 99, [1, 1, 5, 5]), 'image_id that no image has: 1 .annotation 2: 99'),
    (annotation(2, '10', [1, 1, 5, 5]), 'image_id that no image has'),
    (annotation(2, 10, [1, 1, 5, 5], 4), 'category_id that no category has: 1 .annotation 2 in a'),
    (GOOD | {'id': 2, 'bbox': ['1', '1', '5', '5']}, 'not four numbers'),
    (GOOD | {'id': 2, 'bbox': [1, 1, 5]}, 'not four numbers'),
    (GOOD | {'id': 2, 'bbox': None}, 'not four numbers'),
    (GOOD | {'id': 2, 'bbox': [1, float('nan'), 5, 5]}, 'NaN or infinity'),
    (GOOD | {'id': 2, 'bbox': [1, 1, 10**400, 5]}, 'NaN or infinity'),
    (annotation(2, 10, [1, 1, 0, 5]), 'without a positive width and height'),
    (annotation(2, 10, [9, 9, -3, 5]), 'without a positive width and height'),
    (annotation(2, 10, [31, 1, 5, 5]), 'boxes outside their image.*of 30 x 20 pixels'),
    (annotation(2, 10, [1, -7, 5, 7]), 'boxes outside their image'),
    (annotation(2, 10, [1, 1, 1e-9, 5]), 'boxes outside their image'),
    (annotation(2, 10, [1, 1, 5, 5], area=-1), 'area is not a number'),
    (annotation(2, 10, [1, 1, 5, 5], area='9'), 'area is not a number'),
    (annotation(2, 10, [1, 1, 5, 5], iscrowd=2), 'iscrowd is neither'),
    ('x', r'annotations that are not objects: 1 \(annotations\[1\]\)')])
def test_wrong_annotations(tmp_path, wrong, words, monkeypatch):
  data = content([GOOD, wrong])
  with pytest.raises(UserError, match=words) as error:
    opened(tmp_path, data)
  assert '--config.data.strict=False' in str(error.value) and '\n' not in str(error.value)
  warned = []
  monkeypatch.setattr(logging, 'warning', lambda text, *args: warned.append(text % args))
  source = opened(tmp_path, data, strict=False)
  assert source.objects.tolist() == [1, 0] and len(warned) == 1
  assert len(source.coco()['annotations']) == 1


def test_boxes_that_reach_out_are_clipped_when_not_strict(tmp_path):
  data = content([annotation(2, 10, [-3, 5, 10, 17], area=170)])
  with pytest.raises(UserError, match='reach more than a pixel out of their image: 1'):
    opened(tmp_path, data)
  source = opened(tmp_path, data, strict=False)
  assert source[0]['boxes'].tolist() == [[0, 5, 7, 20]]
  assert source.coco()['annotations'][0]['bbox'] == [0, 5, 7, 15]


@pytest.mark.parametrize('wrong, words', [
    ({'id': 10, 'file_name': 'c.png', 'height': H, 'width': W}, 'images with the id of another'),
    ({'id': 1.5, 'file_name': 'c.png', 'height': H, 'width': W}, 'without an integer id'),
    ({'id': 12, 'height': H, 'width': W}, 'without a file_name'),
    ({'id': 12, 'file_name': 'c.png', 'width': W}, 'without a whole width and height'),
    ({'id': 12, 'file_name': 'c.png', 'height': 0, 'width': W}, 'without a whole width'),
    ({'id': 12, 'file_name': 'c.png', 'height': '20', 'width': W}, 'without a whole width')])
def test_wrong_images(tmp_path, wrong, words):
  data = content([GOOD, annotation(2, 12, [1, 1, 5, 5])])
  data['images'].append(wrong)
  with pytest.raises(UserError, match=words):
    opened(tmp_path, data)
  source = opened(tmp_path, data, strict=False)
  assert source.image_ids.tolist() == [10, 11] and source.objects.tolist() == [1, 0]


def test_missing_images_and_counts_of_every_kind(tmp_path):
  data = content([GOOD, *(annotation(i, 10, [1, 1, 0, 1]) for i in range(2, 6)),
                  annotation(6, 11, [1, 1, 5, 5])],
                 [f'{i}.png' for i in range(7)])
  write(tmp_path / 'train', data)
  for i in range(1, 6):
    (tmp_path / 'train' / 'images' / f'{i}.png').unlink()
  with pytest.raises(UserError) as error:
    coco.CocoSource(str(tmp_path), 'train')
  for words in ('images: 5 (1.png, 2.png, 3.png, ...)', 'height: 4 (annotation 2 in 0.png'):
    assert words in str(error.value)
  # That one object is of an image that is missing is no mistake of its own.
  assert 'image_id' not in str(error.value)
  assert len(coco.CocoSource(str(tmp_path), 'train', strict=False)) == 2
  shutil.rmtree(tmp_path / 'train' / 'images')
  with pytest.raises(UserError, match='train/images: No such file'):
    coco.CocoSource(str(tmp_path), 'train')


def test_files_are_parsed_once_and_again_when_they_change(tmp_path, monkeypatch):
  parsed = []
  load = coco_files._load
  monkeypatch.setattr(coco_files, '_load', lambda path: parsed.append(path) or load(path))
  opened(tmp_path, content())
  coco.CocoSource(str(tmp_path), 'train')
  assert len(parsed) == 1
  write(tmp_path / 'train', content([GOOD]))
  assert coco.CocoSource(str(tmp_path), 'train').objects.sum() == 1 and len(parsed) == 2


def test_an_image_of_another_size(tmp_path):
  source = opened(tmp_path, content([GOOD]))
  path = tmp_path / 'train' / 'images' / 'a.png'
  images.write(path, np.zeros((W, H, 3), np.uint8))
  # Not an ImageError, which the pipeline would pass over: every box may be wrong.
  with pytest.raises(UserError, match=r'a.png is 20 x 30 pixels.*says 30 x 20'):
    next(pipeline.eval_stream(source, lambda e, _: {'n': e['boxes']}, batch_size=1, rows=[0]))
  with pytest.raises(images.ImageError):
    opened(tmp_path / 'lenient', content([GOOD]), strict=False)
    shutil.copy(path, tmp_path / 'lenient' / 'train' / 'images' / 'a.png')
    coco.CocoSource(str(tmp_path / 'lenient'), 'train', strict=False)[0]
  path.unlink()
  with pytest.raises(images.ImageError, match='No such file'):
    source[0]


# --- Evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_ground_truth_found_exactly_is_all_right(tmp_path, kind, capsys):
  pytest.importorskip('pycocotools')
  from pycocotools import coco as official
  from pycocotools import cocoeval
  square = lambda x, y, s: [[x, y, x + s, y, x + s, y + s, x, y + s]]
  # Number 0 is an id that pycocotools takes for "no match".
  source = opened(tmp_path, content([
      annotation(i, 10 + i % 2, [x, 3, 6, 6], (3, 7)[i % 3 == 0], segmentation=square(x, 3, 6))
      for i, x in enumerate((0, 1, 10, 15, 22))]), masks=True)
  truth = official.COCO()
  truth.dataset = source.coco()
  truth.createIndex()
  found = truth.loadRes([{k: a[k] for k in ('image_id', 'category_id', 'bbox', 'segmentation')
                          if k != 'bbox' or kind == 'bbox'} | {'score': .5 + a['id'] / 100}
                         for a in source.coco()['annotations']])
  judge = cocoeval.COCOeval(truth, found, kind)
  judge.evaluate()
  judge.accumulate()
  judge.summarize()
  assert judge.stats[0] == 1 and judge.stats[8] == 1


# --- Sizes of images -----------------------------------------------------------------------------


def jpeg(orientation=None, **more):
  out, exif = io.BytesIO(), Image.Exif()
  if orientation is not None:
    exif[0x0112] = orientation
  noise = np.random.default_rng(0).integers(0, 255, (17, 23, 3), np.uint8)
  Image.fromarray(noise).save(out, 'jpeg', exif=exif.tobytes() if orientation else b'', **more)
  return out.getvalue()


def other(fmt, **more):
  out = io.BytesIO()
  Image.fromarray(np.zeros((17, 23, 3), np.uint8)).save(out, fmt, **more)
  return out.getvalue()


def turned(fmt):
  exif = Image.Exif()
  exif[0x0112] = 6
  return other(fmt, exif=exif)


def with_thumbnail():
  """A JPEG with another, smaller one in its EXIF data, and padding before the next segment."""
  small = cv2.imencode('.jpg', np.zeros((5, 4, 3), np.uint8))[1].tobytes()
  head = b'\xff\xd8\xff\xe1' + (8 + len(small)).to_bytes(2, 'big') + b'Exif\0\0' + small
  return head + b'\xff\xff' + jpeg()[2:]


@pytest.mark.parametrize('data', [
    *(jpeg(i) for i in range(1, 9)), jpeg(), jpeg(progressive=True), jpeg(9), other('png'),
    other('webp'), other('bmp'), turned('png'), turned('webp'),
    with_thumbnail()])
def test_sizes_are_those_of_the_decoded_image(data):
  assert image_size(data) == images.decode(data).shape[:2]


@pytest.mark.parametrize('data', [b'', b'hello', jpeg()[:30], other('png')[:18], b'\xff\xd8\xff'])
def test_no_size(data):
  with pytest.raises(images.ImageError):
    image_size(data)
