"""How long a dead process is waited for."""

from xlarank.runtime.process_ends import Backoff


def test_who_dies_again_and_again_is_started_ever_later_and_who_served_well_at_once_again():
    backoff = Backoff()
    assert [backoff.after(0.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.after(59.0) == 30
    assert [backoff.after(60.0), backoff.after(0.0)] == [1, 2]
