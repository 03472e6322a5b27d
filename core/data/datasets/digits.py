"""The handwritten digits that every small run of this project learns from.

1,797 real digits, 8x8 pixels, written by 43 people: the test half of "Optical Recognition of
Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn (BSD-3-Clause) carries it inside
its package. Nothing is downloaded.

The split is part of the version below: images are ordered by the SHA-256 of their number in
scikit-learn's file, the first 1,257 train, the next 180 validate, the last 360 test. No image
occurs twice in the file, so no digit is in two splits. Builders that draw scenes, clips or
captions from the same digits take them with `digits(split)` and inherit that promise.
"""

import hashlib

import numpy as np
import tensorflow_datasets as tfds

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}"""

_SPLITS = {'train': slice(0, 1257), 'validation': slice(1257, 1437), 'test': slice(1437, 1797)}


def split_indices(split: str) -> np.ndarray:
  """Says which of scikit-learn's digits belong to a split.

  Args:
    split: `train`, `validation` or `test`.

  Returns:
    int64 `[n]`: positions in scikit-learn's file, in the order the split is written in.

  Raises:
    KeyError: the split is none of the three.
  """
  order = sorted(range(1797), key=lambda i: hashlib.sha256(str(i).encode()).digest())
  return np.array(order[_SPLITS[split]], np.int64)


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the digits of one split as arrays, for builders that render from them.

  Needs scikit-learn, which is why only builders call it: whoever trains reads prepared files.

  Args:
    split: `train`, `validation` or `test`.

  Returns:
    Grey images uint8 `[n, 8, 8]` (0 is paper, 255 full ink; scikit-learn's 0..16 times 255/16,
    rounded) and labels int64 `[n]` in 0..9.

  Raises:
    KeyError: the split is none of the three.
  """
  from sklearn.datasets import load_digits  # Slow to import, and not needed to read.
  raw = load_digits()
  chosen = split_indices(split)
  grey = np.rint(raw.images[chosen] * (255 / 16)).astype(np.uint8)
  return grey, raw.target[chosen].astype(np.int64)


class Digits(tfds.core.GeneratorBasedBuilder):
  """tfds builder of the digits: `image` uint8 [8, 8, 1], `label`, `id` (scikit-learn's index)."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Split by the SHA-256 of the index: 1257 / 180 / 360.'}
  # Checksums of downloads: there are none, and looking for them imports `importlib_resources`,
  # which tfds 4.9.10 uses without requiring it.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    # Not `self.dataset_info_from_configs`: that looks for metadata files beside this module.
    return tfds.core.DatasetInfo(
        builder=self,
        description='1,797 handwritten digits of 8x8 pixels (UCI, via scikit-learn, CC BY 4.0).',
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format='png'),
            'label': tfds.features.ClassLabel(names=[str(d) for d in range(10)]),
            'id': tfds.features.Scalar(np.int64),
        }),
        supervised_keys=('image', 'label'),
        homepage='https://doi.org/10.24432/C50P49',
        license='CC BY 4.0',
        citation=_CITATION,
        disable_shuffling=True,  # `split_indices` already is a fixed random order.
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing is downloaded.
    return {split: self._generate_examples(split) for split in _SPLITS}

  def _generate_examples(self, split: str):
    import cv2  # tfds encodes arrays with TensorFlow, so it is given PNG bytes instead.
    images, labels = digits(split)
    ids = split_indices(split)
    for position, (image, label, number) in enumerate(zip(images, labels, ids)):
      png = cv2.imencode('.png', image)[1].tobytes()
      yield position, {'image': png, 'label': int(label), 'id': int(number)}
