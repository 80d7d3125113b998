"""What training learns: embedding tables and the dense model, as one module."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from xlarank.models.embedding import EmbeddingCollection
from xlarank.models.loading import build_model
from xlarank.spec import ModelSpec
from xlarank.spec.config import ModelConfig

__all__ = ["Ranker", "make_ranker"]


class Ranker(nnx.Module):
    """Embedding collection and dense model, trained together and parted at compile time."""

    def __init__(self, embeddings: EmbeddingCollection, model: nnx.Module) -> None:
        """Takes both."""
        self.embeddings = embeddings
        self.model = model

    def __call__(self, inputs: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
        """Maps preprocessed inputs of B rows (see `EmbeddingCollection`) to logits [B] by task."""
        return self.model(self.embeddings(inputs))  # type: ignore[operator]


def make_ranker(config: ModelConfig, spec: ModelSpec, *, seed: int = 0) -> Ranker:
    """Makes a fresh ranker.

    Args:
      config: names the module and its options.
      spec: the fitted spec.
      seed: of parameters and dropout.

    Raises:
      ConfigError: when the config's module can't be built.
    """
    rngs = nnx.Rngs(seed)
    embeddings = EmbeddingCollection(spec, rngs=rngs)
    return Ranker(embeddings, build_model(config.model, spec, config.options, rngs, folders=[config.folder]))
