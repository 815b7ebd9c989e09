"""The draw: the same on both sides, even over devices, and frozen."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.wire.lottery import EVERYONE, drawn

SEED = bytes(range(32))
seeds = st.binary(min_size=32, max_size=32)
names = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
thresholds = st.integers(0, EVERYONE)


@pytest.mark.parametrize(
    ("device", "number"), [("pi-1", 0x37B59EDC), ("pi-2", 0xC1F8E470), ("kitchen", 0xB84A63CF)]
)
def test_the_draw_is_frozen(device: str, number: int) -> None:
    assert not drawn(SEED, device, number)
    assert drawn(SEED, device, number + 1)


@given(seeds, names)
def test_a_threshold_of_zero_draws_nobody_and_the_largest_everybody(seed: bytes, name: str) -> None:
    assert not drawn(seed, name, 0)
    assert drawn(seed, name, EVERYONE)


@given(seeds, names, thresholds, thresholds)
def test_who_is_drawn_stays_drawn_under_a_higher_threshold(
    seed: bytes, name: str, one: int, other: int
) -> None:
    low, high = sorted((one, other))
    assert drawn(seed, name, high) or not drawn(seed, name, low)


@given(seeds, names, thresholds)
def test_it_is_the_first_four_bytes_of_sha256(seed: bytes, name: str, threshold: int) -> None:
    number = int.from_bytes(hashlib.sha256(seed + name.encode()).digest()[:4], "big")
    assert drawn(seed, name, threshold) == (number < threshold)


def test_the_share_that_is_drawn_is_the_share_that_was_asked_for() -> None:
    fleet = [f"device-{i}" for i in range(10_000)]
    for round_number in range(5):
        seed = hashlib.sha256(bytes([round_number])).digest()
        count = sum(drawn(seed, name, EVERYONE // 10) for name in fleet)
        assert abs(count - 1000) < 5 * 30  # five standard deviations of a fair draw


def test_another_seed_draws_other_devices() -> None:
    fleet = [f"device-{i}" for i in range(1000)]
    one = {name for name in fleet if drawn(SEED, name, EVERYONE // 2)}
    other = {name for name in fleet if drawn(bytes(32), name, EVERYONE // 2)}
    assert 400 < len(one ^ other) < 600
