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

# Marked `oldest` whole: what an older JAX, Python or NumPy may break. Jaxprs and programs, the kernel's
# interface, processes, signals and threads of a server, and the commands that are shown first.
_OLDEST = {
    "bundle/test_repository.py",
    "bundle/test_round_trip.py",
    "cli/test_command_line.py",
    "compiler/passes/test_hoist_context.py",
    "compiler/passes/test_hoist_indices.py",
    "compiler/passes/test_hoist_traps.py",
    "compiler/test_build.py",
    "device/test_device.py",
    "device/test_layout.py",
    "host/test_extension.py",
    "host/test_gather.py",
    "host/test_strings.py",
    "runtime/test_engine.py",
    "runtime/test_pool.py",
    "serving/test_http.py",
    "serving/test_http_limits.py",
    "serving/test_http_stop.py",
    "serving/test_protos.py",
    "serving/test_serve_process.py",
    "serving/test_server.py",
    "serving/test_tritonclient.py",
    "test_end_to_end.py",
    "test_errors.py",
    "test_public_api.py",
}

# The machine's speed decides nothing, and a failure is found again by running again.
hypothesis.settings.register_profile("xlarank", deadline=None, database=None, derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    """Runs before test modules are imported: some make arrays, which starts JAX's backend."""
    given: str | None = getattr(config, "workerinput", {}).get("compile_cache")
    config.stash[_CACHE] = Path(given or tempfile.mkdtemp(prefix="xlarank-tests-"))
    is_cpu = os.environ["JAX_PLATFORMS"].startswith("cpu")
    device.configure(num_devices=2 if is_cpu else None, compile_cache=config.stash[_CACHE])
    hypothesis.settings.load_profile("xlarank")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in _OLDEST:
            item.add_marker("oldest")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Processes that share the tests share what is compiled: most models are made in both."""
    node.workerinput["compile_cache"] = str(node.config.stash[_CACHE])


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # whoever made it removes it, when the others have ended
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def linear_version(tmp_path_factory):
    """The folder of a compiled version of `linear.Linear`."""
    import linear  # makes arrays: see `pytest_configure`

    return linear.build(tmp_path_factory.mktemp("linear"))
