"""Preprocessed rows to draw batches from: `Examples`."""

from __future__ import annotations

import numpy as np

from xlarank.host.preprocessing import model_inputs
from xlarank.models.embedding import LENGTHS_SUFFIX
from xlarank.spec import ModelSpec
from xlarank.training.data import RankingData

__all__ = ["Examples"]


class Examples:
    """Preprocessed rows of a data set; a context is kept once and repeated as batches are drawn.

    Attributes:
      num_rows: candidates of all requests.
      labels: [num_rows] float32 by task.
    """

    def __init__(self, spec: ModelSpec, data: RankingData) -> None:
        """Preprocesses every column, as serving does.

        Args:
          spec: the fitted spec.
          data: with the features and labels that the spec names.

        Raises:
          ConfigError: when a feature or label is missing or of another dtype.
          FeatureError: for a value that the spec refuses.
        """
        inputs = model_inputs(spec, data.columns(spec))
        names = {f.name for f in spec.context_features}
        names |= {name + LENGTHS_SUFFIX for name in names}
        self._contexts = {name: array for name, array in inputs.items() if name in names}
        self._candidates = {name: array for name, array in inputs.items() if name not in names}
        self._request_of_row = data.request_of_row
        self.labels = data.labels_of(spec)
        self.num_rows = data.num_rows

    def inputs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What `EmbeddingCollection` takes, for rows [B] by number."""
        requests = self._request_of_row[rows]
        return {
            **{name: array[requests] for name, array in self._contexts.items()},
            **{name: array[rows] for name, array in self._candidates.items()},
        }

    def labels_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """[B] float32 by task, for rows [B] by number."""
        return {name: label[rows] for name, label in self.labels.items()}
