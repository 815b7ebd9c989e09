"""When a device asks for newer keys, and what a round has to do with it."""

from itertools import pairwise
from typing import Any

from device_client.events import (
    Discard,
    LinkDown,
    LinkUp,
    Memory,
    Remember,
    Renew,
    RenewalAsked,
    RenewalRefused,
    Renewed,
    Send,
    Tick,
)
from device_client.participant import Participant, State
from tests.device_client.rounds import (
    FIRST,
    UPLOAD,
    at,
    closing,
    device,
    kinds,
    opening,
)


def asked(made: Participant, now_s: float) -> list[Any]:
    return [e for e in made.step(Tick(now_s)) if isinstance(e, Renew)]


def test_a_round_under_a_new_fleet_key_is_begun_once_the_key_is_here() -> None:
    made = device()
    assert made.step(opening(fleet_epoch=2)) == []
    assert "fleet key" in made.detail
    assert made.memory == Memory()
    assert asked(made, 0.0) == [Renew(keys=False, attempt=1)]
    begun = made.step(Renewed(frozenset({1, 2})))
    assert kinds(begun) == [Remember, Send]
    assert made.state is State.JOINING
    assert asked(made, 1e6) == []


def test_a_fleet_that_hears_of_a_new_key_does_not_ask_in_one_moment() -> None:
    made = Participant("ward-3", memory=Memory(), samples=5, fleet_epochs=FIRST, draw=lambda: 0.5)
    made.step(Tick(100.0))
    made.step(opening(fleet_epoch=2, jitter_s=20.0))
    assert asked(made, 109.9) == []
    assert len(asked(made, 110.0)) == 1


def test_a_question_is_asked_again_ever_more_slowly_and_for_ever() -> None:
    made, times = device(), []
    made.step(opening(fleet_epoch=2))
    for now_s in range(100_000):
        times += [now_s] * len(asked(made, float(now_s)))
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps[:3] == [9, 15, 30]
    assert gaps == sorted(gaps)
    assert set(gaps[8:]) == {450}


def test_a_device_without_a_connection_does_not_ask_and_asks_soon_after() -> None:
    made = device()
    made.step(opening(fleet_epoch=2))
    made.step(LinkDown())
    assert asked(made, 50.0) == []
    made.step(LinkUp(0, 20))
    assert len(asked(made, 50.0)) == 1


def test_a_round_under_an_older_fleet_key_that_is_still_here_goes_on() -> None:
    made = device(fleet_epochs=frozenset({1, 2}))
    assert kinds(made.step(opening(fleet_epoch=1))) == [Remember, Send]
    assert made.fleet_epoch == 1


def test_a_round_under_a_fleet_key_from_before_our_time_is_sat_out_in_silence() -> None:
    made = device(fleet_epochs=frozenset({2}))
    assert made.step(opening(fleet_epoch=1)) == []
    assert asked(made, 1e6) == []
    assert made.memory == Memory()


def test_the_end_of_a_round_needs_no_key() -> None:
    made = device()
    made.step(opening())
    effects = made.step(closing(fleet_epoch=2))
    assert made.state is State.IDLE
    assert made.memory.done
    assert Remember in kinds(effects)
    assert len(asked(made, 2.0)) == 1


def test_new_keys_are_offered_by_a_device_at_rest_only() -> None:
    made = device()
    made.step(RenewalAsked(keys=True))
    assert asked(made, 0.0) == [Renew(keys=True, attempt=1)]
    made.step(opening())
    assert asked(made, 1e3) == [Renew(keys=False, attempt=2)]


def test_new_keys_that_were_wanted_are_wanted_until_they_hold() -> None:
    made = device()
    made.step(RenewalAsked(keys=True))
    made.step(Renewed(frozenset({1})))
    assert asked(made, 1e3) == [Renew(keys=True, attempt=1)]
    made.step(Renewed(frozenset({1}), keys=True))
    assert asked(made, 1e6) == []


def test_an_update_that_old_keys_sealed_is_given_up_when_new_keys_hold() -> None:
    made = at(State.UPLOADING)
    effects = made.step(Renewed(frozenset({1}), keys=True))
    assert effects[0] == Discard(UPLOAD)
    assert kinds(effects) == [Discard, Send]
    assert made.state is State.JOINING


def test_a_refusal_is_shown_and_asked_about_again_much_later_or_in_the_next_round() -> None:
    made = device()
    made.step(opening(fleet_epoch=2))
    assert len(asked(made, 0.0)) == 1
    made.step(RenewalRefused("the device is suspended"))
    assert made.detail == "the device is suspended"
    made.step(opening(fleet_epoch=2))
    assert asked(made, 600.0) == []
    made.step(opening(2, fleet_epoch=2))
    assert len(asked(made, 602.0)) == 1
    made.step(RenewalRefused("the device is suspended"))
    assert len(asked(made, 602.0 + 4500.0)) == 1
