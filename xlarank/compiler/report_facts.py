"""What report.html shows, worked out of a `BuildResult`: `Facts`."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from xlarank.compiler.analyze import MatmulCost
from xlarank.compiler.autotune import Choice, Trial
from xlarank.compiler.costs import Rate
from xlarank.compiler.forms import Form
from xlarank.compiler.limits import Limit
from xlarank.compiler.passes import Expansion
from xlarank.compiler.result import BucketResult, BuildResult, PassNotes
from xlarank.spec import Bucket, LatencyProfile, Precision, RankRequest
from xlarank.spec.ladder import LadderEstimate, SizeHistogram, estimate_ladder, plan_ladder, seconds_by_rows

__all__ = ["BucketFacts", "Facts", "LineFacts", "NetworkFacts", "PassFacts", "TaskError", "TrafficFacts"]

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskError:
    """How far the scores of one task are off in one bucket, and how far they may be."""

    task: str
    p99: float
    max: float
    is_p99_held: bool
    """Whether the 99th percentile is what is held to `allowed`, as in lower precisions, or the maximum."""

    allowed: float
    auc_loss: float | None
    """None without labels of both classes."""

    allowed_auc_loss: float | None
    """None where it isn't held: in float32."""

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return (self.p99 if self.is_p99_held else self.max) / self.allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketFacts:
    """One bucket: how fast, how far off, why this form."""

    bucket: Bucket
    form: Form
    reason: str
    """How the form was chosen."""

    trials: tuple[Trial, ...]
    plain_seconds: float | None
    """Of the plain form while tuning; None when it was not timed."""

    tuned_seconds: float | None
    """Of the chosen form while tuning; None when it was not timed."""

    seconds: float
    """As published."""

    errors: tuple[TaskError, ...]
    limit: Limit
    least_seconds: float
    """That the machine would need at its best."""

    prepared_bytes: int
    notes: PassNotes

    @classmethod
    def of(cls, build: BuildResult, result: BucketResult, choice: Choice, notes: PassNotes) -> BucketFacts:
        """Of one bucket of a build."""
        limit, least = build.tuning.limits.limit_of(result.cost)
        return cls(
            bucket=result.bucket,
            form=result.form,
            reason=choice.reason,
            trials=choice.trials,
            plain_seconds=choice.plain_seconds,
            tuned_seconds=choice.seconds_of(result.form),
            seconds=result.seconds,
            errors=_errors(build, result),
            limit=limit,
            least_seconds=least,
            prepared_bytes=build.tuning.prepared_bytes[build.results.index(result)],
            notes=notes,
        )

    @property
    def gain(self) -> float | None:
        """Plain time over chosen time, both of the tuning; None where either is missing."""
        if self.plain_seconds is None or self.tuned_seconds is None:
            return None
        return self.plain_seconds / self.tuned_seconds

    @property
    def rows_a_second(self) -> float:
        """Of full batches, as published."""
        return self.bucket.rows / self.seconds

    @property
    def roofline_share(self) -> float:
        """Least time over measured time; over 1 when the machine was slower while its limits were taken."""
        return self.least_seconds / min(self.seconds, self.tuned_seconds or math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineFacts:
    """The matmuls of one line of the model's source, as the author wrote them and as they run."""

    source: str
    before: tuple[MatmulCost, ...]
    after: tuple[MatmulCost, ...]

    @property
    def is_changed(self) -> bool:
        """Whether a pass had a hand in it."""
        return self.before != self.after


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """The matmuls of one bucket before and after the passes."""

    bucket: Bucket
    form: Form
    lines: tuple[LineFacts, ...]
    """In the order of the model."""

    context_only: tuple[tuple[str, tuple[str, ...]], ...]
    """Line and operations that read the context alone."""

    @classmethod
    def of(cls, facts: BucketFacts) -> NetworkFacts:
        """Of a bucket."""
        notes = facts.notes
        sources = dict.fromkeys(matmul.source for matmul in (*notes.before, *notes.after))
        lines = tuple(
            LineFacts(
                source=source,
                before=tuple(m for m in notes.before if m.source == source),
                after=tuple(m for m in notes.after if m.source == source),
            )
            for source in sources
        )
        operations: dict[str, list[str]] = collections.defaultdict(list)
        for operation, source in notes.hoisted:
            if operation not in operations[source]:
                operations[source].append(operation)
        context_only = tuple((source, tuple(names)) for source, names in operations.items())
        return cls(bucket=facts.bucket, form=facts.form, lines=lines, context_only=context_only)

    @property
    def most_flops(self) -> float:
        """Of one line and rate, before or after; at least 1."""
        return max([m.flops for line in self.lines for m in (*line.before, *line.after)], default=1.0)

    @property
    def totals(self) -> list[tuple[Rate, float, float]]:
        """By rate that occurs: FLOPs of a batch before and after."""
        sums = [
            (
                rate,
                sum(m.flops for line in self.lines for m in line.before if m.rate is rate),
                sum(m.flops for line in self.lines for m in line.after if m.rate is rate),
            )
            for rate in Rate
        ]
        return [(rate, before, after) for rate, before, after in sums if before or after]

    @property
    def total(self) -> tuple[float, float]:
        """FLOPs of a batch before and after; what runs once at load is left out."""
        running = [(b, a) for rate, b, a in self.totals if rate is not Rate.WEIGHTS]
        return sum(b for b, _ in running), sum(a for _, a in running)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassFacts:
    """What the passes had to say, with the buckets that it is true of."""

    reasons: tuple[tuple[str, tuple[BucketFacts, ...]], ...]
    """Why hoisting doesn't apply, or a remark."""

    expansions: tuple[tuple[Expansion, tuple[BucketFacts, ...]], ...]
    """Of the largest bucket that has it."""

    siblings: tuple[tuple[tuple[int, str], tuple[BucketFacts, ...]], ...]
    """How many, and the line of the first."""

    refusals: tuple[tuple[Bucket, Trial], ...]
    """Forms that were fast enough to be looked at and whose scores may not be served."""

    @classmethod
    def of(cls, buckets: Sequence[BucketFacts]) -> PassFacts:
        """Of all buckets."""
        reasons = _by_key(buckets, lambda notes: [notes.hoist_reason] if notes.hoist_reason else [])
        siblings = _by_key(buckets, lambda notes: notes.siblings)
        expansions = _by_key(buckets, lambda notes: [_kind_of(e) for e in notes.expansions])
        return cls(
            reasons=tuple(reasons.items()),
            siblings=tuple(siblings.items()),
            expansions=tuple(
                (next(e for e in found[-1].notes.expansions if _kind_of(e) == kind), found)
                for kind, found in expansions.items()
            ),
            refusals=tuple((b.bucket, trial) for b in buckets for trial in b.trials if trial.refusal),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrafficFacts:
    """What the golden requests, each alone, would cost on several ladders."""

    sizes: SizeHistogram
    ladders: tuple[tuple[str, LadderEstimate], ...]
    """Name and estimate; the bundle's first."""

    @classmethod
    def of(cls, build: BuildResult, requests: Iterable[RankRequest]) -> TrafficFacts:
        """Of a build's buckets and golden requests; one of them at least has candidates."""
        sizes = SizeHistogram.of_sizes(r.num_candidates for r in requests if r.num_candidates)
        rows = sorted({result.bucket.rows for result in build.results})
        seconds_of = seconds_by_rows(LatencyProfile({r.bucket: r.seconds for r in build.results}))
        plan = plan_ladder(sizes, seconds_of, num_buckets=len(rows), max_rows=rows[-1])
        ladders = (
            ("this bundle", estimate_ladder(sizes, seconds_of, rows)),
            (f"the best of {len(rows)} or fewer", plan.chosen),
            ("powers of two", plan.powers_of_two),
        )
        return cls(sizes=sizes, ladders=ladders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the page shows and a `BuildResult` doesn't say as it stands."""

    buckets: tuple[BucketFacts, ...]
    knee: BucketFacts
    """Of the row count past which batching stops paying, the bucket of fewest requests."""

    networks: tuple[NetworkFacts, ...]
    """Of the largest bucket with one request and the largest with some."""

    passes: PassFacts
    traffic: TrafficFacts

    @classmethod
    def of(cls, build: BuildResult, requests: Iterable[RankRequest]) -> Facts:
        """
        Args:
          build: as it is published.
          requests: the golden ones.
        """
        buckets = tuple(BucketFacts.of(build, *parts) for parts in build.by_bucket)
        knee_rows = LatencyProfile({b.bucket: b.seconds for b in buckets}).knee_rows()
        return cls(
            buckets=buckets,
            knee=next(b for b in buckets if b.bucket.rows == knee_rows),
            networks=tuple(NetworkFacts.of(b) for b in _representative(buckets)),
            passes=PassFacts.of(buckets),
            traffic=TrafficFacts.of(build, requests),
        )

    @property
    def tuned(self) -> tuple[BucketFacts, ...]:
        """The buckets in which forms were tried."""
        return tuple(bucket for bucket in self.buckets if bucket.trials)

    @property
    def forms(self) -> list[Form]:
        """All that were tried anywhere, the simpler first."""
        found = {trial.form for bucket in self.buckets for trial in bucket.trials}
        return sorted(found, key=lambda form: form.complexity)

    @property
    def worst(self) -> tuple[BucketFacts, TaskError]:
        """The error that comes closest to what is allowed."""
        pairs = [(bucket, error) for bucket in self.buckets for error in bucket.errors]
        return max(pairs, key=lambda pair: pair[1].share)

    @property
    def lowered(self) -> tuple[BucketFacts, ...]:
        """The buckets that compute in less than float32."""
        return tuple(b for b in self.buckets if b.form.precision is not Precision.FLOAT32)


def _errors(build: BuildResult, result: BucketResult) -> tuple[TaskError, ...]:
    manifest, judgement = build.manifest, result.judgement
    is_lowered = result.form.precision is not Precision.FLOAT32
    budget = manifest.budget
    return tuple(
        TaskError(
            task=task.name,
            p99=(judgement.budget_errors if is_lowered else judgement.errors)[task.name].p99,
            max=judgement.errors[task.name].max,
            is_p99_held=is_lowered,
            allowed=budget.max_score_error if is_lowered else manifest.tolerance.of(task.kind),
            auc_loss=judgement.auc_loss.get(task.name),
            allowed_auc_loss=budget.max_auc_loss if is_lowered else None,
        )
        for task in manifest.spec.tasks
    )


def _representative(buckets: Sequence[BucketFacts]) -> list[BucketFacts]:
    alone = [b for b in buckets if b.bucket.requests == 1]
    mixed = [b for b in buckets if 1 < b.bucket.requests < b.bucket.rows]
    return [*alone[-1:], *mixed[-1:]] or [buckets[-1]]


def _kind_of(expansion: Expansion) -> tuple[str, str, str]:
    return expansion.operation, expansion.source, expansion.reason


def _by_key(
    buckets: Iterable[BucketFacts], keys_of: Callable[[PassNotes], Iterable[Key]]
) -> dict[Key, tuple[BucketFacts, ...]]:
    """The buckets, ascending, by each key that their notes have."""
    found: dict[Key, list[BucketFacts]] = {}
    for bucket in buckets:
        for key in dict.fromkeys(keys_of(bucket.notes)):
            found.setdefault(key, []).append(bucket)
    return {key: tuple(group) for key, group in found.items()}
