"""Is it good enough? What ends a run."""

import math

import pytest

from broker_bridge.errors import PeerError
from broker_bridge.wire.messages import Report, Until
from server.coordinator import Phase
from server.events import (
    EndRun,
    Evaluate,
    Evaluated,
    OpenRound,
    Publish,
    Reported,
)
from server.measuring import Measuring
from tests.server.rounds import WEIGHT_MAX, Server, kinds, of


def one_round(server: Server) -> list:
    return server.upload("d0") + server.upload("d1")


def test_the_server_measures_and_the_run_ends_at_the_target() -> None:
    server = Server()
    server.server_evaluates = True
    server.start(rounds=9, until=Until(accuracy=0.8))
    assert kinds(one_round(server))[-1] is Evaluate
    assert OpenRound in kinds(server.step(Evaluated(1, 50, {"accuracy": 0.79})))
    one_round(server)
    effects = server.step(Evaluated(2, 50, {"accuracy": 0.8}))
    assert of(Publish, effects)[0].summary.evaluated_by == "server"
    assert "reached the target" in of(EndRun, effects)[0].reason


def test_devices_measure_and_each_example_counts_alike() -> None:
    server = Server(evaluators=2)
    server.start(rounds=9, until=Until(accuracy=0.5))
    one_round(server)
    assert server.it.phase is Phase.EVALUATING
    report = {"round": 1, "model_version": 1}
    first = Report(**report, examples=30, metrics={"accuracy": 0.2, "loss": 1.0})
    assert server.step(Reported("e0", first)) == []
    second = Report(**report, examples=10, metrics={"accuracy": 0.6, "extra": 1.0})
    (published, _) = server.step(Reported("e1", second))
    assert published.summary.evaluation == {"accuracy": pytest.approx(0.3)}
    assert (published.summary.evaluation_examples, published.summary.evaluated_by) == (
        40, "devices",
    )  # fmt: skip


def test_a_report_on_another_model_is_not_counted() -> None:
    server = Server(evaluators=1)
    server.start(rounds=9)
    one_round(server)
    old = Report(round=1, model_version=0, examples=30, metrics={"accuracy": 1.0})
    assert server.step(Reported("e0", old)) == []
    assert server.it.phase is Phase.EVALUATING


def test_a_device_that_trains_does_not_judge_its_own_model() -> None:
    server = Server(evaluators=1)
    server.start(rounds=9, until=Until(accuracy=0.9))
    one_round(server)
    report = Report(round=1, model_version=1, examples=30, metrics={"accuracy": 1.0})
    with pytest.raises(PeerError) as refused:
        server.step(Reported("d0", report))
    assert refused.value.reason == "not_evaluating"
    assert server.it.phase is Phase.EVALUATING


def test_no_report_counts_for_more_examples_than_an_update_may() -> None:
    server = Server(evaluators=2)
    server.start(rounds=9)
    one_round(server)
    most = WEIGHT_MAX
    report = Report(round=1, model_version=1, examples=10**9, metrics={"accuracy": 1.0})
    server.step(Reported("e0", report))
    honest = Report(round=1, model_version=1, examples=most, metrics={"accuracy": 0.0})
    effects = server.step(Reported("e1", honest))
    assert of(Publish, effects)[0].summary.evaluation == {"accuracy": pytest.approx(0.5)}


def test_devices_that_do_not_report_are_waited_for_so_long_and_no_longer() -> None:
    server = Server(evaluators=2, evaluation_wait_s=20.0)
    server.start(rounds=9)
    one_round(server)
    report = Report(round=1, model_version=1, examples=30, metrics={"accuracy": 0.2})
    server.step(Reported("e0", report))
    assert server.pass_time(19) == []
    effects = server.pass_time(2)
    assert of(Publish, effects)[0].summary.evaluation == {"accuracy": pytest.approx(0.2)}
    assert OpenRound in kinds(effects)


@pytest.mark.parametrize(
    ("by_server", "evaluators", "wait_s", "over_s"),
    [(True, 0, 60.0, 60.0), (False, 1, 60.0, 60.0), (False, 0, 60.0, 5.0), (False, 0, 2.0, 2.0)],
    ids=["server", "somebody", "nobody", "nobody-and-little-patience"],
)
def test_nobody_is_waited_for_who_does_not_show_up(by_server, evaluators, wait_s, over_s) -> None:
    this = Measuring(1, by_server=by_server, now_s=100.0, wait_s=wait_s, examples_max=9)
    assert not this.is_over(100.0 + over_s - 0.01, evaluators=evaluators)
    assert this.is_over(100.0 + over_s, evaluators=evaluators)


def test_a_model_that_nobody_measured_is_not_good_enough() -> None:
    server = Server(evaluators=1, evaluation_wait_s=20.0)
    server.start(rounds=2, until=Until(accuracy=0.1, loss=9.0))
    one_round(server)
    assert OpenRound in kinds(server.pass_time(21))


@pytest.mark.parametrize("until", [Until(accuracy=0.1), Until(loss=9.0)])
def test_what_is_not_a_number_is_not_good_enough(until: Until) -> None:
    server = Server()
    server.server_evaluates = True
    server.start(rounds=9, until=until)
    one_round(server)
    assert OpenRound in kinds(
        server.step(Evaluated(1, 5, {"accuracy": math.nan, "loss": math.nan}))
    )


def test_reports_of_absurd_size_stay_numbers() -> None:
    server = Server(evaluators=2)
    server.start(rounds=9)
    one_round(server)
    effects = []
    for device, loss in (("e0", 1e300), ("e1", -1e300)):
        said = Report(round=1, model_version=1, examples=10**9, metrics={"loss": loss})
        effects += server.step(Reported(device, said))
    assert math.isfinite(of(Publish, effects)[0].summary.evaluation["loss"])
