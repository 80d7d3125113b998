"""Metrics of scores, whoever made them: `score_requests` and `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec import Column, TaskKind, TaskSpec
from xlarank.spec.metrics import auc, grouped_auc, log_loss, normalised_entropy
from xlarank.training.baseline import additive_scores
from xlarank.training.data import RankingData, Splits, concatenate

__all__ = ["RequestScorer", "evaluate", "score_requests"]

RequestScorer = Callable[[Mapping[str, Column]], Mapping[str, np.ndarray]]
"""Raw features of one request by name → [N] float32 by task."""


def score_requests(
    data: RankingData,
    scorer: RequestScorer,
    *,
    features: tuple[str, ...],
    tasks: tuple[TaskSpec, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Scores every request of a data set, one at a time, as it would be served.

    Args:
      data: the requests.
      scorer: of the Flax module, an engine or a server.
      features: names that the model reads; the data may have more.
      tasks: the model's.
      progress: called with the requests done and their number.

    Returns:
      [num_rows] float32 by task.

    Raises:
      ConfigError: when the data lack a feature.
    """
    if missing := sorted(set(features) - set(data.contexts) - set(data.candidates)):
        has = sorted({*data.contexts, *data.candidates})
        raise ConfigError(f"the data have no features {missing}; they have {has}")
    scores = {task.name: np.zeros(data.num_rows, np.float32) for task in tasks}
    for request in range(data.num_requests):
        rows = data.rows_of(request)
        if rows.stop > rows.start:
            raw = data.features_of(request)
            answer = scorer({name: raw[name] for name in features})
            for task in tasks:
                scores[task.name][rows] = answer[task.name]
        progress(request + 1, data.num_requests)
    return scores


def evaluate(tasks: tuple[TaskSpec, ...], splits: Splits, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compares scores of the test split with its labels.

    Args:
      tasks: the model's.
      splits: test is judged; train and validation fit the baseline, where the data name items.
      scores: [rows of test] by task: probabilities of binary tasks.

    Returns:
      ``{"tasks": {task: {...}}, "rows": n}`` of JSON values. A binary task has ``auc``, ``gauc``,
      ``log_loss`` and ``normalised_entropy``, and ``auc`` of the ``baseline`` and, for made-up data, of
      the ``truth``: the ceiling. A regression has ``mean_squared_error``, also of both. What can't be
      computed, such as the AUC of one class, is None.

    Raises:
      ConfigError: when a task has no labels.
    """
    test = splits.test
    known = concatenate([splits.train, splits.validation])
    user = test.groups[test.request_of_row]
    report = {}
    for task in tasks:
        if task.name not in test.labels:
            raise ConfigError(f"the data have no label {task.name!r}; they have {sorted(test.labels)}")
        labels, task_scores = test.labels[task.name], scores[task.name]
        metrics = _metrics(task.kind, labels, task_scores)
        if task.kind is TaskKind.BINARY:
            metrics["gauc"] = grouped_auc(labels, task_scores, user)
            metrics["log_loss"] = log_loss(labels, task_scores)
            metrics["normalised_entropy"] = normalised_entropy(labels, task_scores)
        entry: dict[str, Any] = {name: _json(value) for name, value in metrics.items()}
        others = {"truth": test.truth.get(task.name), "baseline": _baseline(known, test, task.name)}
        for name, other in others.items():
            if other is not None:
                values = _metrics(task.kind, labels, other)
                entry[name] = {key: _json(value) for key, value in values.items()}
        report[task.name] = entry
    return {"tasks": report, "rows": test.num_rows}


def _metrics(kind: TaskKind, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """What model, baseline and truth are compared by."""
    if kind is TaskKind.BINARY:
        return {"auc": auc(labels, scores)}
    error = np.asarray(scores, np.float64) - labels
    return {"mean_squared_error": float(np.mean(error**2)) if len(error) else math.nan}


def _baseline(known: RankingData, test: RankingData, task: str) -> np.ndarray | None:
    if known.items is None or test.items is None or not known.num_rows:
        return None
    return additive_scores(
        known.groups[known.request_of_row],
        known.items,
        known.labels[task],
        test.groups[test.request_of_row],
        test.items,
    )


def _json(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
