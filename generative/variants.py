"""Sizes of Image GPT by name; no JAX here, which configs must not import."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GPT:
  """The size of a decoder; the MLP is four times as wide. Paper section 3.2, the released code."""
  width: int
  depth: int
  heads: int


GPTS = {
    'S': GPT(512, 24, 8),
    'M': GPT(1024, 36, 8),
    'L': GPT(1536, 48, 16),
    # The number of heads was never published; these have the size of L's.
    'XL': GPT(3072, 60, 32),
    # Ours: three for the small runs on a laptop, and one for tests.
    'small': GPT(32, 4, 1),
    'medium': GPT(64, 6, 2),
    'large': GPT(96, 8, 2),
    'mu': GPT(16, 2, 2),
}
