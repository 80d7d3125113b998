"""What the tests of versions share."""

import linear
import pytest


@pytest.fixture(scope="session")
def linear_version(tmp_path_factory):
    """The folder of a compiled version of `linear.Linear`."""
    return linear.build(tmp_path_factory.mktemp("linear"))
