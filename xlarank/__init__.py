"""xlarank: a JAX/XLA-native inference runtime for ranking models.

The names below are loaded when they are first used: importing xlarank loads neither JAX nor Flax.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# jax 0.10.1 logs two long 'SIGILL' lines at every CPU cache hit unless this is set before its import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if TYPE_CHECKING:
    from xlarank.compiler import build_bundle
    from xlarank.errors import (
        AccessError,
        BucketError,
        BundleError,
        ConfigError,
        DeadlineError,
        ExecutionError,
        FeatureError,
        ModelError,
        ModelNotFoundError,
        OverloadError,
        RequestError,
        UnavailableError,
        UnsupportedError,
        VerifyError,
        XlarankError,
    )
    from xlarank.runtime import Engine
    from xlarank.spec import FeatureSpec, ModelSpec, RankRequest, TableSpec, TaskSpec

__all__ = [
    "AccessError",
    "BucketError",
    "BundleError",
    "ConfigError",
    "DeadlineError",
    "Engine",
    "ExecutionError",
    "FeatureError",
    "FeatureSpec",
    "ModelError",
    "ModelNotFoundError",
    "ModelSpec",
    "OverloadError",
    "RankRequest",
    "RequestError",
    "TableSpec",
    "TaskSpec",
    "UnavailableError",
    "UnsupportedError",
    "VerifyError",
    "XlarankError",
    "build_bundle",
]

_MODULES = {
    "build_bundle": "xlarank.compiler",
    "Engine": "xlarank.runtime",
    "FeatureSpec": "xlarank.spec",
    "ModelSpec": "xlarank.spec",
    "RankRequest": "xlarank.spec",
    "TableSpec": "xlarank.spec",
    "TaskSpec": "xlarank.spec",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'xlarank' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "xlarank.errors")), name)


def __dir__() -> list[str]:
    return __all__
