"""What a build found out: `Tuning`, which travels with the bundle, and `BuildResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.extend import core

from xlarank.bundle import Manifest
from xlarank.compiler.analyze import Analysis, MatmulCost, matmuls_of
from xlarank.compiler.autotune import Choice
from xlarank.compiler.costs import Rate
from xlarank.compiler.forms import Form
from xlarank.compiler.golden_set import Judgement
from xlarank.compiler.limits import MachineLimits
from xlarank.compiler.passes import Expansion, Hoisted, sensitive_matmuls, siblings_of
from xlarank.compiler.program import Program
from xlarank.compiler.table_formats import TableChoice
from xlarank.compiler.tracing import nested_equations, source_of
from xlarank.device import ProgramCost
from xlarank.spec import Bucket

__all__ = ["BucketResult", "BuildResult", "PassNotes", "Tuning"]

_BUSY = 1.5
"""Ratio of two times of one program that an idle machine doesn't show."""


@dataclasses.dataclass(frozen=True)
class PassNotes:
    """What the passes had to say of a bucket, and what became of its network."""

    hoist_applies: bool
    hoist_reason: str
    """Why it doesn't apply, or a remark; may be empty."""

    expansions: tuple[Expansion, ...]
    """Context values that had to be repeated for their candidates."""

    hoisted: tuple[tuple[str, str], ...]
    """Operation and author's line of what can run once a request."""

    siblings: tuple[tuple[int, str], ...]
    """Groups of sibling matmuls: how many, and the author's line of the first."""

    sensitive: tuple[str, ...]
    """Lines of matmuls that no lower precision touches, as the scores feel their error most."""

    inside: tuple[str, ...]
    """Lines of matmuls inside scan, while or cond, which are neither merged nor lowered."""

    before: tuple[MatmulCost, ...]
    """Matmuls of the plain form."""

    after: tuple[MatmulCost, ...]
    """Matmuls of the chosen form."""

    @classmethod
    def of(cls, hoisted: Hoisted, plain: Program, chosen: Program) -> PassNotes:
        """Reads them off the programs."""
        return cls(
            hoisted.program is not None,
            hoisted.reason,
            hoisted.expansions,
            hoisted.hoisted_sources,
            tuple((len(group), source_of(group[0])) for group in siblings_of(plain)),
            _lines(e for e in plain.closed.jaxpr.eqns if id(e) in sensitive_matmuls(plain)),
            _lines(
                e
                for e, depth in nested_equations(plain.closed.jaxpr)
                if depth and e.primitive.name == "dot_general"
            ),
            matmuls_of(plain),
            matmuls_of(chosen),
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PassNotes:
        """Reads `dataclasses.asdict`'s values."""
        return cls(
            value["hoist_applies"],
            value["hoist_reason"],
            tuple(Expansion(**(e | {"shape": tuple(e["shape"])})) for e in value["expansions"]),
            tuple((operation, source) for operation, source in value["hoisted"]),
            tuple((count, source) for count, source in value["siblings"]),
            tuple(value["sensitive"]),
            tuple(value["inside"]),
            *(
                tuple(MatmulCost(**(m | {"rate": Rate(m["rate"])})) for m in value[key])
                for key in ("before", "after")
            ),
        )


def _lines(equations: Iterable[core.JaxprEqn]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(source_of(equation) for equation in equations))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the forms of a bundle were found; kept in it as tuning.json and reused with it."""

    choices: tuple[Choice, ...]
    """One a bucket, ascending."""

    notes: tuple[PassNotes, ...]
    """Of the same buckets."""

    dropped: tuple[Bucket, ...]
    """Buckets that a neighbour serves as fast."""

    limits: MachineLimits
    """Of the device that tuned."""

    prepared_bytes: tuple[int, ...]
    """Of the arrays that each bucket takes."""

    total_prepared_bytes: int
    """Of all distinct ones."""

    param_bytes: int
    """Of the weights as trained."""

    seconds: float
    """The budget that it had."""

    precision_note: str
    """Why lower precisions were not tried; may be empty."""

    @property
    def forms(self) -> dict[Bucket, Form]:
        """The chosen form by bucket, ascending."""
        return {choice.bucket: choice.form for choice in self.choices}

    def to_dict(self) -> dict[str, Any]:
        """JSON values for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Tuning:
        """Reads `to_dict`'s values.

        Raises:
          KeyError, TypeError, ValueError: if they aren't.
        """
        return cls(
            choices=tuple(Choice.from_dict(choice) for choice in value["choices"]),
            notes=tuple(PassNotes.from_dict(note) for note in value["notes"]),
            dropped=tuple(Bucket(b["rows"], b["requests"]) for b in value["dropped"]),
            limits=MachineLimits(**value["limits"]),
            prepared_bytes=tuple(value["prepared_bytes"]),
            total_prepared_bytes=value["total_prepared_bytes"],
            param_bytes=value["param_bytes"],
            seconds=value["seconds"],
            precision_note=value["precision_note"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketResult:
    """A bucket as it was proven."""

    bucket: Bucket
    form: Form
    seconds: float
    """Median of a full batch."""

    judgement: Judgement
    cost: ProgramCost


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A published bundle and what is known of it."""

    path: Path = Path()
    """``<repository>/<model>/<version>``."""

    manifest: Manifest
    """As published."""

    analysis: Analysis
    """Costs of the model."""

    tuning: Tuning
    results: tuple[BucketResult, ...]
    """Of the buckets of `tuning`."""

    reference_auc: Mapping[str, float]
    """Of the reference scores with float32 tables, by labelled binary task."""

    tables: TableChoice
    """The tables' formats and what they cost."""

    reused: int | None = None
    """The version whose programs and forms were taken."""

    note: str = ""
    """What else is worth saying."""

    @property
    def by_bucket(self) -> list[tuple[BucketResult, Choice, PassNotes]]:
        """What was measured, how it was chosen and what the passes said, ascending by bucket."""
        return list(zip(self.results, self.tuning.choices, self.tuning.notes, strict=True))

    @property
    def timing_note(self) -> str:
        """What a busy machine did to the times; empty where it was steady, or no form was timed."""
        drift, at = max(
            (max(tuned / found.seconds, found.seconds / tuned), str(found.bucket))
            for found, choice, _ in self.by_bucket
            for tuned in (choice.seconds_of(found.form) or found.seconds,)
        )
        if drift <= _BUSY:
            return ""
        return (
            f"Between tuning and publishing the time of one program changed by a factor of {drift:.1f} "
            f"(bucket {at}): the machine was busy, and gains smaller than that may be noise."
        )
