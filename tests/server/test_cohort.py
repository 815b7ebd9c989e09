"""How many are invited, and which share of the fleet that is."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.wire.lottery import EVERYONE, drawn
from server.cohort import invitations, threshold

fleets = st.integers(1, 1_000_000)
targets = st.integers(1, 1_000_000)
factors = st.floats(1.0, 3.0)


@pytest.mark.parametrize(
    ("target", "invited"), [(1, 2), (8, 11), (10, 13), (30, 39), (70, 91), (1000, 1300)]
)
def test_130_percent_are_invited(target: int, invited: int) -> None:
    assert invitations(target) == invited


@given(targets, st.floats(0.0, 3.0))
def test_never_fewer_than_the_target_are_invited(target: int, factor: float) -> None:
    assert invitations(target, factor) >= target


@given(fleets, targets, factors)
def test_more_are_drawn_than_invited_by_three_deviations(
    online: int, target: int, factor: float
) -> None:
    limit = threshold(online, target, factor)
    expected = online * limit / EVERYONE
    invited = invitations(target, factor)
    assert 0 <= limit <= EVERYONE
    assert expected >= min(online, invited + 3 * invited**0.5) - 1e-6
    assert expected <= min(online, invited + 3 * invited**0.5 + 1 + online / EVERYONE)


@given(st.integers(0, 20), targets)
def test_a_small_fleet_is_invited_whole(online: int, more: int) -> None:
    assert threshold(online, online + more) == EVERYONE


def test_nobody_is_drawn_for_a_round_that_needs_nobody() -> None:
    assert threshold(100, 0) == 0
    assert threshold(0, 0) == 0


@pytest.mark.parametrize(("online", "target"), [(10, 2), (100, 10), (2_000, 100), (5_000, 1_000)])
def test_the_lottery_draws_enough_and_not_many_more(online: int, target: int) -> None:
    invited = invitations(target)
    for number in range(50):
        seed = hashlib.sha256(bytes([number])).digest()
        count = sum(drawn(seed, f"pi-{i}", threshold(online, target)) for i in range(online))
        assert target <= count <= invited + 8 * invited**0.5
