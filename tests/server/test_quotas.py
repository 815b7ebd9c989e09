"""What one device may take up of the server."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from server import quotas
from server.quotas import Quotas, Shares


def taken(made: Quotas, device: str, times: int, *, now_s: float) -> int:
    """How many of so many messages are let through."""
    refused = 0
    for _ in range(times):
        try:
            made.control(device, now_s=now_s)
        except PeerError as error:
            refused += error.reason == "too_fast"
    return times - refused


def test_a_device_may_say_a_minutes_worth_at_once_and_no_more() -> None:
    made = Quotas(Shares(control_per_minute=60))
    assert taken(made, "a", 100, now_s=5.0) == 60


def test_a_device_that_was_too_fast_is_heard_again_later() -> None:
    made = Quotas(Shares(control_per_minute=60))
    taken(made, "a", 100, now_s=5.0)
    assert taken(made, "a", 100, now_s=15.0) == 10


def test_each_round_gives_a_device_what_a_round_takes_and_no_hoard() -> None:
    made = Quotas(Shares(control_per_minute=60, control_per_round=8))
    taken(made, "a", 100, now_s=5.0)
    for _ in range(50):
        made.begin_round(80_000)
        assert taken(made, "a", 100, now_s=5.0) == 8
    for _ in range(50):
        made.begin_round(80_000)
    assert taken(made, "a", 100, now_s=5.0) == 60


def test_one_devices_haste_is_not_anothers() -> None:
    made = Quotas(Shares(control_per_minute=60))
    taken(made, "a", 1000, now_s=5.0)
    assert taken(made, "b", 60, now_s=5.0) == 60


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 200)), max_size=20))
def test_whatever_the_clock_does_no_more_gets_through_than_the_rate_allows(
    bursts: list[tuple[float, int]],
) -> None:
    made = Quotas(Shares(control_per_minute=60))
    through = sum(taken(made, "a", times, now_s=now_s) for now_s, times in bursts)
    times_s = [now_s for now_s, _ in bursts] or [0.0]
    assert through <= 60 + max(times_s) - times_s[0] + 1


def test_an_update_may_be_sent_so_many_times_in_a_round() -> None:
    made = Quotas(Shares(repeats_max=3))
    made.begin_round(80_000)
    for _ in range(3 * 80):
        made.chunk("a", 1060)
    with pytest.raises(PeerError, match="too many times") as caught:
        made.chunk("a", 80_000)
    assert caught.value.reason == "too_much"
    made.chunk("b", 1060)


def test_a_new_round_is_a_new_share() -> None:
    made = Quotas(Shares(repeats_max=1))
    made.begin_round(1000)
    with pytest.raises(PeerError):
        made.chunk("a", 10_000)
    made.begin_round(10_000)
    made.chunk("a", 10_000)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_NAMES_MAX", 10)
    made = Quotas()
    made.begin_round(1000)
    for number in range(100):
        made.control(f"d{number}", now_s=0.0)
        made.chunk(f"d{number}", 10)
    assert len(made._buckets) == 10
    assert len(made._bytes) == 10
