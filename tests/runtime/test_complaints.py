"""What the log hears of things that go wrong again and again."""

import logging

import pytest

from xlarank.runtime.complaints import Complaints


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def complaints(now):
    return Complaints(logging.getLogger("xlarank.test"), clock=lambda: now[0])


def fail(text):
    raise ValueError(text)


def caught(fail, *args):
    try:
        fail(*args)
    except ValueError as error:
        return error


def test_the_first_of_a_kind_is_said_with_its_traceback_and_then_one_a_minute_with_their_count(
    complaints, now, caplog
):
    for number in range(5):
        complaints.add("device %d failed", number, error=caught(fail, "overflow"))
    now[0] += 60
    complaints.add("device %d failed", 7, error=caught(fail, "overflow"))
    assert caplog.messages == ["device 0 failed", "device 7 failed (5 since the last such line)"]
    assert [record.exc_info[1].args for record in caplog.records] == [("overflow",)] * 2
    assert {record.funcName for record in caplog.records} == {
        "test_the_first_of_a_kind_is_said_with_its_traceback_and_then_one_a_minute_with_their_count"
    }


def test_models_lines_and_errors_of_another_type_or_origin_are_kinds_of_their_own(complaints, caplog):
    def fail_elsewhere():
        raise ValueError

    for _ in range(2):
        complaints.add("a batch failed", about="feed", error=caught(fail, "overflow"))
        complaints.add("a batch failed", about="films", error=caught(fail, "overflow"))
        complaints.add("a batch failed", about="feed", error=caught(fail_elsewhere))
        complaints.add("a batch failed", about="feed", error=KeyError("x"))
        complaints.add("it failed again", about="feed", level=logging.WARNING)
    assert caplog.messages == ["a batch failed"] * 4 + ["it failed again"]
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 4 + ["WARNING"]


def test_what_was_not_said_is_said_at_the_end_once(complaints, caplog):
    for number in range(3):
        complaints.add("device %d failed", number)
    complaints.close()
    complaints.close()
    assert caplog.messages == ["device 0 failed", "device 2 failed (2 since the last such line)"]
