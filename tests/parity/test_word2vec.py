"""Files of vectors as gensim reads and writes them."""

import numpy as np
import pytest

from graph import planted, vectors

pytestmark = pytest.mark.parity
keyedvectors = pytest.importorskip('gensim.models.keyedvectors')


@pytest.mark.parametrize('binary', [False, True])
def test_gensim_opens_what_we_write_and_we_what_it_writes(tmp_path, binary):
  tokens = planted.graph().tokens[:50]
  values = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
  (vectors.write_binary if binary else vectors.write_text)(tmp_path / 'ours', tokens, values)
  found = keyedvectors.KeyedVectors.load_word2vec_format(str(tmp_path / 'ours'), binary=binary)
  assert found.index_to_key == tokens.tolist()
  np.testing.assert_array_equal(found.vectors, values)
  # The nearest by cosine are the same, too.
  nearest = found.most_similar(str(tokens[3]), topn=1)[0][0]
  unit = values / np.linalg.norm(values, axis=1, keepdims=True)
  order = np.argsort(-(unit @ unit[3]))
  assert nearest == tokens[order[1]]
  found.save_word2vec_format(str(tmp_path / 'theirs'), binary=binary)
  names, back = vectors.read(tmp_path / 'theirs')
  assert names == tokens.tolist()
  np.testing.assert_allclose(back, values, rtol=1e-6)
