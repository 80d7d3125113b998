"""Online: engine, batcher, device pool, lifecycle, metrics. No Flax, no compiler.

The names below are loaded when they are first used: a process that holds tables for others, and forks them,
must not have loaded JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "Answer": "xlarank.runtime.answer",
    "Captures": "xlarank.runtime.captures",
    "DevicePool": "xlarank.runtime.pool",
    "Engine": "xlarank.runtime.engine",
    "FeatureOptions": "xlarank.host",
    "LoadReport": "xlarank.runtime.loading",
    "Metrics": "xlarank.runtime.metrics",
    "ModelMetrics": "xlarank.runtime.metrics",
    "ModelPolicy": "xlarank.spec.versions",
    "ModelRepository": "xlarank.runtime.lifecycle",
    "ModelStatistics": "xlarank.runtime.metrics",
    "Policy": "xlarank.spec.versions",
    "Timings": "xlarank.runtime.answer",
    "VersionLabel": "xlarank.spec.versions",
    "VersionOptions": "xlarank.spec.versions",
    "VersionState": "xlarank.spec.versions",
    "VersionStatus": "xlarank.spec.versions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'xlarank.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
