"""The exception tree, as its module draws it."""

import inspect
import re

import pytest

from xlarank import errors

TREE: dict[str, type] = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def drawn():
    """Each exception of the drawing and its parent there."""
    parents, path = {}, []
    for line in (errors.__doc__ or "").splitlines():
        if not (match := re.match(r"([ │├└─]*)([A-Z]\w+Error)\b", line)) or not match[1].startswith("    "):
            continue
        depth = len(match[1]) // 4 - 1
        path = [*path[:depth], match[2]]
        parents[match[2]] = path[depth - 1] if depth else None
    return parents


def test_the_drawing_is_the_tree():
    assert drawn() == {
        name: None if name == "XlarankError" else value.__bases__[0].__name__ for name, value in TREE.items()
    }


@pytest.mark.parametrize("name", TREE)
def test_every_exception_is_documented_and_keeps_its_message(name):
    assert TREE[name].__doc__
    assert str(TREE[name]("table 't': rows must be >= 1; was 0")) == "table 't': rows must be >= 1; was 0"


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("ConfigError", ValueError), ("FeatureError", ValueError), ("ModelNotFoundError", LookupError)],
)
def test_callers_may_catch_the_builtin(name, builtin):
    assert issubclass(TREE[name], builtin)
