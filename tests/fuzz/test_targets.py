"""The default share of fuzzing: every target, on its corpus and on what Hypothesis thinks of.

`make fuzz` gives the same targets to atheris, for as long as one likes.
"""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from tests.fuzz.mutation import mutate
from tests.fuzz.target import Target, check, checked_for_memory, seeds_of
from tests.fuzz.targets import TARGETS

EVERY = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
EXAMPLES, SLOW_EXAMPLES = 300, 60


@pytest.fixture(autouse=True)
def quiet():
    """What is dropped is logged, each time: thousands of lines that say nothing new."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@EVERY
def test_every_valid_input_and_every_past_crasher_is_taken_in_little_memory(
    target: Target,
) -> None:
    for seed in seeds_of(target):
        check(target, seed)  # what is made once is made here
    for seed in seeds_of(target):
        checked_for_memory(target, seed)


@EVERY
def test_a_valid_input_that_was_changed_raises_only_our_own_errors(target: Target) -> None:
    seeds = seeds_of(target)
    changed = st.builds(mutate, st.sampled_from(seeds), st.integers(0, 2**40))

    @settings(
        max_examples=SLOW_EXAMPLES if target.is_slow else EXAMPLES, deadline=None, database=None,
        derandomize=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(changed, changed, st.binary(max_size=200)))
    def feed(data: bytes) -> None:
        checked_for_memory(target, data)

    check(target, seeds[0])
    feed()


# ── The net holds what it should ────────────────────────────────────────────────────────


def test_an_error_of_ours_is_an_answer_and_any_other_is_a_fault() -> None:
    def refuses(_: bytes) -> None:
        raise PeerError("bad_message")

    def breaks(data: bytes) -> None:
        data.decode("ascii")

    check(Target("refuses", refuses, list), b"\xff")
    with pytest.raises(UnicodeDecodeError):
        check(Target("breaks", breaks, list), b"\xff")


def test_a_few_bytes_that_make_much_memory_are_a_fault() -> None:
    def greedy(data: bytes) -> None:
        bytearray(int.from_bytes(data, "big"))

    checked_for_memory(Target("greedy", greedy, list), b"\x0f\xff")
    with pytest.raises(AssertionError, match="made"):
        checked_for_memory(Target("greedy", greedy, list), b"\xff\xff\xff")


def test_a_change_can_be_made_again() -> None:
    seed = seeds_of(TARGETS["messages_binary"])[0]
    assert [mutate(seed, n) for n in range(50)] == [mutate(seed, n) for n in range(50)]
    assert len({mutate(seed, n) for n in range(50)}) > 40
