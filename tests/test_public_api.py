"""What `xlarank` and its packages export: sorted, complete, documented, and light to import."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest

import xlarank
from xlarank import errors

HEAVY = ("jax", "flax", "optax", "orbax", "grpc")
PACKAGES = ["xlarank.errors"] + [
    f"xlarank.{module.name}" for module in pkgutil.iter_modules(xlarank.__path__) if module.ispkg
]
WITH_ALL = [
    name
    for name in ("xlarank", *PACKAGES, "xlarank_serving")
    if hasattr(importlib.import_module(name), "__all__")
]
ISSUED = {"FeatureSpec", "TableSpec", "TaskSpec", "ModelSpec", "RankRequest", "build_bundle", "Engine"}


def loaded_after(statement):
    """Which heavy libraries a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("package", WITH_ALL)
def test_exports_are_sorted_distinct_and_importable(package):
    module = importlib.import_module(package)
    # As ruff sorts: constants, classes, the rest.
    ranked = sorted((not name.isupper(), name[0].islower(), name) for name in set(module.__all__))
    assert list(module.__all__) == [name for _, _, name in ranked]
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", WITH_ALL)
def test_every_exported_class_and_function_is_documented(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            own = inspect.getdoc(value) or ""
            generated = inspect.isclass(value) and own.startswith(f"{name}(")  # a dataclass's signature
            documented = bool(own) and not generated
            assert documented, f"{package}.{name} has no docstring"


def test_xlarank_exports_the_nouns_the_entry_points_and_every_exception():
    exceptions = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert set(xlarank.__all__) == ISSUED | exceptions
    assert len(xlarank.__all__) <= 24
    assert dir(xlarank) == xlarank.__all__


def test_an_exported_name_is_that_of_its_package():
    from xlarank.spec import ModelSpec

    assert xlarank.ModelSpec is ModelSpec
    assert xlarank.FeatureError is errors.FeatureError


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'xlarank' has no attribute 'Enginee'"):
        _ = xlarank.Enginee


@pytest.mark.parametrize(
    "statement",
    [
        "import xlarank",
        "import xlarank; xlarank.FeatureSpec; xlarank.RankRequest; xlarank.BundleError",
        "import xlarank.spec, xlarank.host, xlarank.bundle",
    ],
)
def test_the_nouns_load_no_framework(statement):
    assert loaded_after(statement) == set()


@pytest.mark.parametrize("statement", ["from xlarank.runtime import Engine", "from xlarank import Engine"])
def test_the_runtime_loads_jax_and_no_training_stack(statement):
    assert loaded_after(statement) == {"jax"}


def test_a_loaded_library_is_seen():
    assert loaded_after("from xlarank import build_bundle") >= {"jax", "flax"}
