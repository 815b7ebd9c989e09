"""A device that holds its data out measures each model once."""

from broker_bridge.wire.messages import Report
from device_client.events import (
    Evaluate,
    Evaluated,
    Fetch,
    Fetched,
    Memory,
    Remember,
    Send,
    Stop,
    Tick,
)
from device_client.participant import State
from tests.device_client.rounds import (
    MODEL,
    ROUND,
    TASK,
    closing,
    evaluating,
    evaluator,
    kinds,
    opening,
)


def test_a_device_that_evaluates_never_trains() -> None:
    made = evaluator()
    assert kinds(made.step(ROUND)) == [Remember, Fetch]
    assert made.step(Fetched("task", TASK.digest)) == [Fetch("model", MODEL)]
    assert made.step(Fetched("model", MODEL.digest)) == [Evaluate(1)]
    assert made.step(Evaluated(1, 30, {"accuracy": 0.5})) == [
        Send(Report(round=1, model_version=1, examples=30, metrics={"accuracy": 0.5})),
        Remember(Memory(round=1, digest=ROUND.digest, evaluated_version=1)),
    ]


def test_each_model_is_measured_once() -> None:
    made = evaluating(closing(1, model_version=2))
    assert made.step(closing(1, model_version=2)) == []
    made.step(Evaluated(2, 30, {}))
    assert Fetch not in kinds(made.step(closing(1, model_version=2)))
    assert kinds(made.step(opening(2, model_version=2))) == [Remember]
    assert made.state is State.IDLE
    assert Fetch in kinds(made.step(closing(2, model_version=3)))


def test_a_report_that_may_be_lost_is_made_again_when_the_server_or_the_broker_came_back() -> None:
    made = evaluating(closing(1, model_version=2))
    said = made.step(Evaluated(2, 30, {}))[0]
    assert made.step(closing(1, model_version=2)) == [said]
    assert said not in made.step(closing(2, model_version=3))


def test_a_newer_model_ends_the_measuring_of_an_older_one() -> None:
    made = evaluating(closing(1, model_version=2))
    effects = made.step(closing(2, model_version=3))
    assert Stop in kinds(effects)
    assert made.step(Evaluated(2, 30, {})) == []
    assert made.state is State.FETCHING


def test_a_rounds_deadline_does_not_stop_a_device_that_evaluates() -> None:
    made = evaluating(ROUND)
    assert made.step(Tick(10_000.0)) == []
    assert made.state is State.EVALUATING
