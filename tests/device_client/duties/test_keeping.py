"""Which models come to the device's own programs."""

from device_client.duties.keeping import KEEP_S
from device_client.events import (
    Discard,
    Fetch,
    Fetched,
    Keep,
    Remember,
    Sealed,
    Stop,
    Tick,
    Train,
    Trained,
)
from device_client.participant import State
from tests.device_client.rounds import (
    MODEL,
    ROUND,
    TASK,
    UPLOAD,
    at,
    closing,
    commit_for,
    device,
    go_for,
    kinds,
    opening,
    receipt,
)


def accepted(**options):
    """A device whose update of round 1 is in."""
    made = device(kept_version=0, **options)
    made.step(ROUND)
    made.step(go_for(ROUND))
    made.step(Fetched("task", TASK.digest))
    assert made.step(Fetched("model", MODEL.digest))[1:] == [Keep(1, 1)]
    made.step(Trained(1))
    made.step(Sealed(commit_for(ROUND)))
    assert Discard(UPLOAD) in made.step(receipt("accepted"))
    return made


def test_the_model_of_a_round_with_its_update_is_fetched_and_kept() -> None:
    made = accepted()
    assert made.step(closing(1, model_version=2)) == [Fetch("model", MODEL)]
    assert made.step(Fetched("model", MODEL.digest)) == [Keep(2, 1)]
    assert made.state is State.IDLE
    assert made.step(closing(1, model_version=2)) == []


def test_it_is_not_fetched_by_a_device_that_keeps_none_or_was_not_in_the_round() -> None:
    made = at(State.UPLOADING)
    made.step(receipt("accepted"))
    assert made.step(closing(1, model_version=2)) == []
    other = device(kept_version=0)
    assert kinds(other.step(closing(1, model_version=2))) == [Remember]


def test_the_next_round_comes_before_a_model_to_keep() -> None:
    made = accepted()
    made.step(closing(1, model_version=2))
    effects = made.step(opening(2, model_version=2))
    assert Stop in kinds(effects)
    assert made.state is State.JOINING
    made.step(go_for(opening(2, model_version=2)))
    assert kinds(made.step(Fetched("model", MODEL.digest))) == [Train, Keep]


def test_an_opening_that_is_heard_again_does_not_stop_a_model_to_keep() -> None:
    made = accepted()
    made.step(closing(1, model_version=2))
    assert made.step(ROUND) == []
    assert made.step(Fetched("model", MODEL.digest)) == [Keep(2, 1)]


def test_a_model_to_keep_that_never_comes_is_given_up() -> None:
    made = accepted()
    made.step(closing(1, model_version=2))
    made.step(Tick(KEEP_S + 10.0))
    assert made.state is State.IDLE


def test_a_model_that_is_there_already_is_not_kept_again() -> None:
    made = device(kept_version=5)
    made.step(ROUND)
    made.step(go_for(ROUND))
    made.step(Fetched("task", TASK.digest))
    assert kinds(made.step(Fetched("model", MODEL.digest))) == [Train]
