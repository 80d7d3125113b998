"""Online: engine, batcher, device pool, lifecycle, metrics. No Flax, no compiler."""

from xlarank.host import FeatureOptions
from xlarank.runtime.answer import Answer, Timings
from xlarank.runtime.captures import Captures
from xlarank.runtime.engine import Engine
from xlarank.runtime.lifecycle import ModelRepository
from xlarank.runtime.loading import LoadReport
from xlarank.runtime.metrics import Metrics, ModelMetrics, ModelStatistics
from xlarank.runtime.pool import DevicePool
from xlarank.spec.versions import (
    ModelPolicy,
    Policy,
    VersionLabel,
    VersionOptions,
    VersionState,
    VersionStatus,
)

__all__ = [
    "Answer",
    "Captures",
    "DevicePool",
    "Engine",
    "FeatureOptions",
    "LoadReport",
    "Metrics",
    "ModelMetrics",
    "ModelPolicy",
    "ModelRepository",
    "ModelStatistics",
    "Policy",
    "Timings",
    "VersionLabel",
    "VersionOptions",
    "VersionState",
    "VersionStatus",
]
