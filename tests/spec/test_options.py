"""Priorities and deadlines that a request may ask for."""

import math

import pytest

from xlarank.errors import RequestError
from xlarank.spec import DEFAULT_PRIORITY, NUM_PRIORITIES, RequestOptions


def test_a_request_that_asks_for_nothing_has_the_default_priority_and_no_deadline():
    options = RequestOptions()
    assert (options.priority, options.deadline, options.affinity_key) == (DEFAULT_PRIORITY, math.inf, None)


@pytest.mark.parametrize("priority", [0, NUM_PRIORITIES + 1, -1, 1.5, "1"])
def test_a_priority_that_is_no_level_is_refused(priority):
    with pytest.raises(RequestError, match=rf"priority must be in \[1, 4\], 1 the highest; was {priority!r}"):
        RequestOptions(priority=priority)


def test_a_deadline_that_is_no_time_is_refused():
    with pytest.raises(RequestError, match="deadline must be a number; was nan"):
        RequestOptions(deadline=math.nan)


def test_an_arrival_that_is_no_number_is_refused():
    with pytest.raises(RequestError, match="arrived_at must be a number; was nan"):
        RequestOptions(arrived_at=math.nan)
