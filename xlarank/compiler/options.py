"""How a bundle is made, and the checks of what it is made of: `BuildOptions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xlarank.compiler.placement import PlacementPolicy
from xlarank.errors import ConfigError
from xlarank.spec import DEFAULT_ROWS, BucketLadder, ModelSpec, PrecisionPolicy, RankRequest
from xlarank.spec.ladder import SizeHistogram

__all__ = ["BuildOptions", "Traffic", "check_arguments", "checked_labels"]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests that a ladder is chosen for."""

    sizes: SizeHistogram
    num_buckets: int = len(DEFAULT_ROWS)
    """Most row counts to choose."""

    max_rows: int = DEFAULT_ROWS[-1]
    """Largest row count to choose; larger requests are split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a bundle is made."""

    version: int | None = None
    """Version to publish; None: one above the highest there."""

    bucket_rows: tuple[int, ...] = DEFAULT_ROWS
    """Row counts of the ladder; each gets buckets of 1, B/32 and B requests, as far as they are worth it."""

    traffic: Traffic | None = None
    """Requests to choose the row counts for, in place of `bucket_rows`."""

    num_devices: int | None = None
    """Devices to leave compiled code for; all by default."""

    policy: PrecisionPolicy = dataclasses.field(default_factory=PrecisionPolicy)
    """Numeric format, and what its scores must keep to."""

    placement: PlacementPolicy = dataclasses.field(default_factory=PlacementPolicy)
    """What of the tables devices hold."""

    tune_seconds: float = 60.0
    """Most time to spend on trying forms, and as much again on formats of tables; 0 tries none."""

    reuse: bool = True
    """Whether programs and forms of an earlier version of the same architecture may be taken."""

    keep_failed: Path | None = None
    """Repository folder for a bundle whose scores leave the budget, for study; None: nothing is kept."""

    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where the weights come from, kept in the manifest."""

    def __post_init__(self) -> None:
        if not isinstance(self.policy, PrecisionPolicy):
            raise ConfigError(f"policy: expected a PrecisionPolicy, got {self.policy!r}")
        if not isinstance(self.placement, PlacementPolicy):
            raise ConfigError(f"placement: expected a PlacementPolicy, got {self.placement!r}")
        if isinstance(self.tune_seconds, bool) or not isinstance(self.tune_seconds, (int, float)):
            raise ConfigError(f"tune_seconds must be a number >= 0; was {self.tune_seconds!r}")
        if self.traffic is None:
            BucketLadder.of_rows(self.bucket_rows)  # refuses what is no ladder
        if not 0 <= self.tune_seconds < float("inf"):
            raise ConfigError(f"tune_seconds must be a number >= 0; was {self.tune_seconds!r}")
        if self.version is not None and type(self.version) is not int:
            raise ConfigError(f"version: expected an integer >= 1, got {self.version!r}")


def check_arguments(spec: object, tables: object, golden: object) -> None:
    """Raises ConfigError for what isn't of the type that `build_bundle` takes."""
    if not isinstance(spec, ModelSpec):
        raise ConfigError(f"spec: expected a ModelSpec, got {type(spec).__name__}")
    if not isinstance(tables, Mapping):
        raise ConfigError(f"tables: expected arrays by table name, got {type(tables).__name__}")
    for number, request in enumerate(golden if isinstance(golden, Sequence) else ()):
        if not isinstance(request, RankRequest):
            raise ConfigError(
                f"golden request {number}: expected a RankRequest, got {type(request).__name__}"
            )
        if request.spec is not spec and request.spec != spec:
            raise ConfigError(
                f"golden request {number}: was made for another spec than model {spec.name!r}'s"
            )


def checked_labels(
    spec: ModelSpec, requests: Sequence[RankRequest], labels: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Labels as float32 [rows]; raises ConfigError for an unknown task or another number of rows."""
    num_rows = sum(request.num_candidates for request in requests)
    checked: dict[str, np.ndarray] = {}
    for task, values in (labels or {}).items():
        if task not in {t.name for t in spec.tasks}:
            raise ConfigError(
                f"labels: the model has no task {task!r}; it has {[t.name for t in spec.tasks]}"
            )
        array = np.asarray(values, np.float32)
        if array.shape != (num_rows,):
            raise ConfigError(
                f"labels of task {task!r}: expected {num_rows}, one a golden row, got an array of shape "
                f"{list(array.shape)}"
            )
        checked[task] = array
    return checked
