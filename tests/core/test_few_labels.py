import numpy as np
import pytest

from core import few_labels
from core.config import UserError


def test_support_is_balanced_nested_and_seeded():
  labels = np.random.default_rng(0).permutation(np.arange(60) % 5)
  drawn = few_labels.draw_support(labels, 5, (1, 4, 10), seed=0)
  for k, rows in drawn.items():
    np.testing.assert_array_equal(np.bincount(labels[rows]), [k] * 5)
    assert len(set(rows)) == len(rows)
  assert set(drawn[1]) < set(drawn[4]) < set(drawn[10])
  again, other = (few_labels.draw_support(labels, 5, (4,), seed=s)[4] for s in (0, 1))
  np.testing.assert_array_equal(again, drawn[4])
  assert set(other) != set(again)


def test_too_few_examples_of_a_class():
  labels = np.repeat([0, 1, 3], 6)
  with pytest.raises(UserError, match='class 2 has 0 of the 18 training examples, fewer than 5'):
    few_labels.draw_support(labels, 4, (1, 5), seed=0)
  labels = np.array([0] * 6 + [1] * 4)
  with pytest.raises(UserError, match='class 1 has 4 of the 10'):
    few_labels.draw_support(labels, 2, (1, 5), seed=0)
