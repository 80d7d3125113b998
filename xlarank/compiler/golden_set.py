"""What scores are proven with, and how far off they may be: `GoldenSet`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from xlarank.device import GoldenReplay, Replica, ScoreError, check_errors, score_errors
from xlarank.errors import VerifyError
from xlarank.spec import Bucket, ModelSpec, Precision, PrecisionPolicy, TaskKind
from xlarank.spec.metrics import auc

__all__ = ["GoldenSet", "Judgement"]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Every golden row scored by one form in one bucket, held against the reference."""

    errors: Mapping[str, ScoreError]
    """By task."""

    budget_errors: Mapping[str, ScoreError]
    """By task, what the budget is held against: differs from `errors` by what the tables' formats cost."""

    auc_loss: Mapping[str, float]
    """Reference AUC minus this form's, by binary task with labels of both classes; tables count too."""


class GoldenSet:
    """Golden requests, their reference scores and maybe labels, with the policy that judges by them."""

    def __init__(
        self,
        spec: ModelSpec,
        replay: GoldenReplay,
        labels: Mapping[str, np.ndarray],
        policy: PrecisionPolicy,
        exact: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """
        Args:
          spec: the model.
          replay: of the golden requests.
          labels: [rows of all golden requests] float32 by task, NaN where unknown; may lack tasks.
          policy: tolerance and budget.
          exact: [rows of all golden requests] float32 by task, the reference scores with float32 tables,
            where the replay's are of tables in other formats.
        """
        self.spec = spec
        self.replay = replay
        self.policy = policy
        self._expected = replay.expected
        self._exact = self._expected if exact is None else exact
        self._labels = {task: np.asarray(values) for task, values in labels.items()}
        self._reference_auc = {
            task.name: self._auc(task.name, self._exact[task.name])
            for task in spec.tasks
            if task.kind is TaskKind.BINARY
        }

    @property
    def reference_auc(self) -> dict[str, float]:
        """By binary task whose labels hold both classes."""
        return {task: value for task, value in self._reference_auc.items() if not math.isnan(value)}

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Binary tasks whose AUC loss can't be known."""
        return tuple(task for task, value in self._reference_auc.items() if math.isnan(value))

    def judge(self, replica: Replica, bucket: Bucket, leaves: Mapping[str, np.ndarray]) -> Judgement:
        """Scores every golden row once in a bucket.

        Args:
          replica: holds its executable.
          bucket: the one to run.
          leaves: its buffers, written and read here.
        """
        return self.judge_scores(self.replay.score_all(replica, bucket, leaves))

    def judge_reference(self) -> Judgement:
        """Judges the reference scores themselves: what the tables' formats cost."""
        return self.judge_scores(self._expected)

    def judge_scores(self, scores: Mapping[str, np.ndarray]) -> Judgement:
        """Judges scores [rows of all golden requests] by task."""
        errors = score_errors(self.spec, scores, self._expected)
        budget_errors = errors
        if self._exact is not self._expected:
            budget_errors = score_errors(self.spec, scores, self._exact)
        losses = {}
        for task, reference in self.reference_auc.items():
            finite = np.isfinite(scores[task]).all()
            losses[task] = reference - self._auc(task, scores[task]) if finite else math.inf
        return Judgement(errors, budget_errors, losses)

    def check(self, judgement: Judgement, precision: Precision, what: str) -> None:
        """Raises VerifyError naming task, bucket, form and error when scores leave tolerance or budget.

        Args:
          judgement: of the form.
          precision: of the form.
          what: bucket and form, in words.
        """
        where = "over all golden rows"
        if precision is Precision.FLOAT32:
            errors = {task: error.max for task, error in judgement.errors.items()}
            limits = {task.name: self.policy.tolerance.of(task.kind) for task in self.spec.tasks}
            check_errors(self.spec, what, errors, limits, where)
            return
        for task, error in judgement.errors.items():
            if precision is Precision.FLOAT16 and math.isinf(error.max):
                raise VerifyError(
                    f"model {self.spec.name!r}, task {task!r}, {what}, {where}: some scores aren't finite; "
                    f"float16 ends at {np.finfo(np.float16).max:.0f}, and a value in the model is larger: "
                    f"ask for bfloat16 or float32"
                )
        self.check_budget(judgement, what, "another precision")
        if self.policy.precision is None and self.unlabelled:
            raise VerifyError(f"{what}: no labels show the AUC loss of {', '.join(self.unlabelled)}")

    def check_budget(self, judgement: Judgement, what: str, other: str) -> None:
        """Raises VerifyError naming task and error when scores leave the budget.

        Args:
          judgement: of the scores.
          what: gave them, in words.
          other: to ask for instead, in words.
        """
        where = "over all golden rows"
        budget = self.policy.budget
        errors = {task: error.p99 for task, error in judgement.budget_errors.items()}
        # A 99th percentile says nothing of a score that isn't finite.
        errors |= {task: math.inf for task, error in judgement.errors.items() if math.isinf(error.max)}
        limits = dict.fromkeys(errors, budget.max_score_error)
        remedy = f"; raise max_score_error (--max-score-error), or ask for {other}"
        check_errors(self.spec, what, errors, limits, f"99th percentile {where}", remedy)
        losses = {task.name: judgement.auc_loss.get(task.name, 0.0) for task in self.spec.tasks}
        limits = dict.fromkeys(losses, budget.max_auc_loss)
        check_errors(self.spec, what, losses, limits, f"AUC {where}", "; raise max_auc_loss (--max-auc-loss)")

    def _auc(self, task: str, scores: np.ndarray) -> float:
        labels = self._labels.get(task)
        if labels is None:
            return math.nan
        known = np.isfinite(labels)
        return auc(labels[known], scores[known])
