"""The process that tests run in: two CPU devices, one compilation cache a run, repeatable properties."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Before JAX is imported, by whatever test module comes first, and for the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Weights are drawn for most tests: by the generator that compiles fastest.
os.environ.setdefault("JAX_DEFAULT_PRNG_IMPL", "rbg")

import hypothesis
import pytest

from xlarank import device

_CACHE = pytest.StashKey[Path]()

# Marked `once` whole: pure Python, or sweeps of what other files show on the oldest interpreter too.
_ONCE = {
    "cli/test_explain.py",
    "cli/test_inspect.py",
    "cli/test_own_model.py",
    "cli/test_plan.py",
    "cli/test_replay.py",
    "cli/test_sections.py",
    "cli/test_simulate.py",
    "compiler/passes/test_fuse_experts.py",
    "compiler/passes/test_lower_precision.py",
    "compiler/passes/test_rows.py",
    "compiler/test_autotune.py",
    "compiler/test_costs.py",
    "compiler/test_inputs.py",
    "compiler/test_placement.py",
    "compiler/test_refresh.py",
    "compiler/test_table_formats.py",
    "host/test_feature_store.py",
    "host/test_gather_by_hand.py",
    "runtime/test_captures.py",
    "runtime/test_lifecycle.py",
    "runtime/test_simulation.py",
    "serving/test_fuzz.py",
    "serving/test_limits.py",
    "serving/test_security.py",
    "training/test_auc_metric.py",
    "training/test_fit.py",
    "training/test_movielens.py",
    "training/test_training.py",
}

# The machine's speed decides nothing, and a failure is found again by running again.
hypothesis.settings.register_profile("xlarank", deadline=None, database=None, derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    """Runs before test modules are imported: some make arrays, which starts JAX's backend."""
    given: str | None = getattr(config, "workerinput", {}).get("compile_cache")
    config.stash[_CACHE] = Path(given or tempfile.mkdtemp(prefix="xlarank-tests-"))
    device.configure(num_devices=2, compile_cache=config.stash[_CACHE])
    hypothesis.settings.load_profile("xlarank")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in _ONCE:
            item.add_marker("once")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Processes that share the tests share what is compiled: most models are made in both."""
    node.workerinput["compile_cache"] = str(node.config.stash[_CACHE])


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # whoever made it removes it, when the others have ended
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)
