"""The best candidates of a request, picked on the server: `TopK`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from xlarank.errors import RequestError

__all__ = ["INDICES", "SCORES", "TopK", "parse_weights"]

INDICES = "top_k.indices"
"""Output INT32 [k]: positions of the best candidates in the request, best first."""

SCORES = "top_k.scores"
"""Output FP32 [k]: their scores."""

_MAX_WEIGHT = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class TopK:
    """How many candidates, and by which score."""

    k: int
    """At least 1; all candidates if there are fewer."""

    weights: tuple[tuple[str, float], ...]
    """Task name and weight: the score is the weighted sum. One task of weight 1 is its own score, exactly."""

    def select(self, scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The best candidates; of equal ones those that stand first in the request.

        A score that isn't a number counts as the worst.

        Args:
          scores: [N] float32 by task name.

        Returns:
          [k] int32 positions and [k] float32 scores, best first, k = min(k, N).

        Raises:
          RequestError: if float32 doesn't hold a weighted sum of finite scores.
        """
        values = self._values(scores)
        order = -values  # ascending: best first
        if np.isnan(order).any():
            order = np.where(np.isnan(order), np.inf, order)
        if self.k < len(order):
            # Not argpartition: which of equal ones it picks is up to its algorithm.
            worst = np.partition(order, self.k - 1)[self.k - 1]
            best = np.flatnonzero(order <= worst)
            best = best[np.argsort(order[best], kind="stable")][: self.k]
        else:
            best = np.argsort(order, kind="stable")
        return best.astype(np.int32), values[best]

    def _values(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """[N] float32."""
        if len(self.weights) == 1 and self.weights[0][1] == 1:
            return scores[self.weights[0][0]]
        terms = np.array([scores[task] for task, _ in self.weights], np.float64)  # [T, N]
        weights = np.array([weight for _, weight in self.weights])
        with np.errstate(over="ignore", invalid="ignore"):
            sums = (weights[:, None] * terms).sum(axis=0)  # [N]; not a matmul, whose sums depend on the place
            values = sums.astype(np.float32)
        beyond = np.flatnonzero(~np.isfinite(values) & np.isfinite(terms).all(axis=0))
        if beyond.size:
            raise RequestError(
                f"parameter 'top_k_weights': expected weighted sums that float32 holds, got "
                f"{sums[beyond[0]]:g} for candidate {beyond[0]}"
            )
        return values


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Reads "click:1,like:0.5": names and weights.

    Raises:
      RequestError: for anything else, a name that comes twice or a weight that isn't finite as float32.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition(":")
        name = name.strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not number.isascii() or "_" in number:  # Python's own way of writing numbers
            weight = math.nan
        if not name or not abs(weight) <= _MAX_WEIGHT or name in weights:
            raise RequestError(
                f"parameter 'top_k_weights': expected outputs and weights that are finite as float32, as in "
                f"'click:1,like:0.5', each output once, got {part[:100]!r}"
            )
        weights[name] = weight
    return list(weights.items())
