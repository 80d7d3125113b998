"""Counts in messages agree with their nouns."""

import pytest

from xlarank.spec.wording import counted


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (2, "sibling matmul", "2 sibling matmuls"),
        (1024, "row", "1,024 rows"),
    ],
)
def test_a_noun_agrees_with_its_count(count, noun, text):
    assert counted(count, noun) == text


def test_an_odd_plural_is_given():
    assert [counted(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
