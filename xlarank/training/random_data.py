"""Random requests of any shape, for benchmarks and for models without data of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec import Column
from xlarank.training.data import RankingData, Splits

__all__ = ["read"]


def read(
    path: Path,
    *,
    tasks: Sequence[str],
    candidate_ids: Mapping[str, int],
    context_ids: Mapping[str, int] | None = None,
    candidate_dense: Mapping[str, int] | None = None,
    context_dense: Mapping[str, int] | None = None,
    num_requests: int = 200,
    num_candidates: int = 64,
    seed: int = 0,
) -> Splits:
    """Draws data; nothing is read.

    Every id has an effect of its own on every task; a label is 1 with the sigmoid of the scaled sum.

    Args:
      path: not looked at.
      tasks: names of binary tasks.
      candidate_ids: features of scope candidate: int64 ids in [0, n), by name.
      context_ids: features of scope context, likewise.
      candidate_dense: features of scope candidate: floats [n] of a log-normal distribution, by name.
      context_dense: features of scope context, likewise.
      num_requests: of the training split; the others have a fifth of it, at least one.
      num_candidates: of every request.
      seed: of everything that is drawn; the same data for the same arguments.

    Raises:
      ConfigError: when a size is below 1.
    """
    del path
    ids = {**(context_ids or {}), **candidate_ids}
    dense = {**(context_dense or {}), **(candidate_dense or {})}
    sizes = {**ids, **dense, "num_requests": num_requests, "num_candidates": num_candidates}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"random data: {name} must be an integer >= 1; was {size!r}")
    rng = np.random.default_rng(seed)
    effects = {
        (task, name): rng.normal(size=size) / np.sqrt(len(ids))
        for task in tasks
        for name, size in ids.items()
    }

    def columns(id_sizes: Mapping[str, int], widths: Mapping[str, int], rows: int) -> dict[str, Column]:
        drawn: dict[str, Column] = {name: rng.integers(0, size, rows) for name, size in id_sizes.items()}
        for name, width in widths.items():
            drawn[name] = rng.lognormal(size=(rows, width)).astype(np.float32)
        return drawn

    def split(requests: int) -> RankingData:
        owner = np.repeat(np.arange(requests), num_candidates)
        contexts = columns(context_ids or {}, context_dense or {}, requests)
        candidates = columns(candidate_ids, candidate_dense or {}, len(owner))
        labels, truth = {}, {}
        for task in tasks:
            logits = np.zeros(len(owner))
            for name in ids:
                column = contexts[name] if name in contexts else candidates[name]
                assert isinstance(column, np.ndarray)
                effect = effects[task, name][column]
                logits += effect[owner] if name in contexts else effect
            truth[task] = (1 / (1 + np.exp(-logits))).astype(np.float32)
            labels[task] = (rng.random(len(owner)) < truth[task]).astype(np.float32)
        return RankingData(
            contexts=contexts,
            candidates=candidates,
            request_of_row=owner,
            labels=labels,
            groups=np.arange(requests),
            truth=truth,
        )

    few = max(1, num_requests // 5)
    return Splits(train=split(num_requests), validation=split(few), test=split(few))
