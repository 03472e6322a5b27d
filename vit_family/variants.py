"""Sizes of the models by name; no JAX here, which configs must not import."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ViT:
  """The size of an encoder.

  B, L and H are ViT table 1, Ti and S "How to train your ViT" table 1, g and G "Scaling Vision
  Transformers" (arXiv 2106.04560), M and So400m big_vision's.
  """
  width: int
  depth: int
  mlp_dim: int
  heads: int


VIT = {
    'Ti': ViT(192, 12, 768, 3),
    'S': ViT(384, 12, 1536, 6),
    'B': ViT(768, 12, 3072, 12),
    'L': ViT(1024, 24, 4096, 16),
    'H': ViT(1280, 32, 5120, 16),
    'g': ViT(1408, 40, 6144, 16),
    'G': ViT(1664, 48, 8192, 16),
    'M': ViT(512, 12, 2048, 8),
    'So400m': ViT(1152, 27, 4304, 16),
    # Ours, for the small runs on a laptop.
    'mini': ViT(64, 6, 128, 4),
    # For tests: big_vision's mu, and vit_jax's "testing".
    'mu': ViT(32, 1, 128, 2),
    'testing': ViT(10, 1, 10, 2),
}


@dataclasses.dataclass(frozen=True)
class BiT:
  """The size of a ResNet: residual units in each stage, and what multiplies all channels."""
  stages: tuple[int, ...]
  width_factor: float


BIT = {
    'R26x1': BiT((2, 2, 2, 2), 1),
    'R50x1': BiT((3, 4, 6, 3), 1),
    'R50x2': BiT((3, 4, 6, 3), 2),
    'R50x3': BiT((3, 4, 6, 3), 3),
    'R101x1': BiT((3, 4, 23, 3), 1),
    'R101x3': BiT((3, 4, 23, 3), 3),
    'R152x1': BiT((3, 8, 36, 3), 1),
    'R152x2': BiT((3, 8, 36, 3), 2),
    'R152x4': BiT((3, 8, 36, 3), 4),
    'R200x3': BiT((3, 24, 36, 3), 3),
    # Ours: for the small runs on a laptop, and for tests.
    'R26x0.5': BiT((2, 2, 2, 2), 0.5),
    'R14x0.5': BiT((1, 1, 1, 1), 0.5),
}
