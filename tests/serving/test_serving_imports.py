"""A serving process starts without the training stack, and a client without JAX."""

import os
import subprocess
import sys

import pytest

TRAINING_STACK = ("flax", "orbax", "optax")


def loaded_after(statement, watched):
    """Which of the watched packages a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint([name for name in {watched!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    [
        "import xlarank_serving.server, xlarank_serving.client, xlarank.runtime",
        "import xlarank.cli.main",
    ],
)
def test_serving_loads_no_training_stack(statement):
    assert loaded_after(statement, TRAINING_STACK) == "[]"


def test_the_client_loads_neither_jax_nor_the_training_stack():
    watched = ("jax", "xlarank.host", *TRAINING_STACK)
    assert loaded_after("import xlarank_serving.client", watched) == "[]"


def test_this_test_can_fail():
    assert loaded_after("import xlarank_serving.server, optax", TRAINING_STACK) == "['optax']"
