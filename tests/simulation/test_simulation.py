"""Whole federations in virtual time, under the weather of their seeds; the oracle judges each.

A seed that fails here is run again, told in full, by `python -m tests.simulation --replay SEED -v`.
"""

from concurrent.futures import ProcessPoolExecutor

import msgspec
import pytest

from server.service import Service
from tests.simulation.disk import Crash
from tests.simulation.federation import Federation, simulate
from tests.simulation.machines import Parts
from tests.simulation.soak import soak
from tests.simulation.weather import OUTAGE_S, Weather

SEEDS = 500


def calm() -> Federation:
    return Federation(Weather.calm(devices=2, rounds=1))


def test_an_undisturbed_federation_counts_everybody() -> None:
    outcome = Federation(Weather.calm(devices=3, rounds=2)).run()
    assert (outcome.status, outcome.rounds, outcome.receipts) == ("done", 2, 6)


def test_every_promise_is_kept_in_any_weather(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak(0, SEEDS, processes=2) == 0, capsys.readouterr().out


def test_a_seed_tells_the_same_story_again() -> None:
    for seed in (3, 181, 307):
        assert simulate(seed) == simulate(seed)


ONE_FAULT = [
    [("amnesia", "server")],
    [("amnesia", "server"), ("power", "d0")],
    [("rewind", "server"), ("kill", "d0")],
    [("away", "server")],
    [("limits", "server")],
    [("drop", "server")],
    [("drop", "d0")],
    [("kill", "server")],
    [("power", "server")],
    [("power", "d0")],
    [("kill", "server"), ("amnesia", "server"), ("power", "d1")],
    [("clock", "server"), ("clock", "d0")],
    [("replay", "d0"), ("replay", "d0"), ("corrupt", "d0")],
]


@pytest.mark.parametrize("events", ONE_FAULT, ids=["+".join(e for e, _ in f) for f in ONE_FAULT])
def test_a_few_faults_in_a_run_cost_no_round_an_update(events: list[tuple[str, str]]) -> None:
    for moment in range(8):
        assert updates_lost(events, moment * 2.0) == []


def test_a_broker_that_is_away_for_five_minutes_costs_no_round_an_update() -> None:
    for moment in range(8):
        lost = updates_lost([("outage", "server")], moment * 2.0, deadline_s=OUTAGE_S + 60.0)
        assert lost == []


def updates_lost(
    events: list[tuple[str, str]],
    moment_s: float,
    parts: Parts | None = None,
    deadline_s: float = 60.0,
) -> list[str]:
    """The rounds that ended without an update of each device that was there."""
    weather = Weather.calm(seed=int(moment_s), devices=3, rounds=2)
    weather.training_s, weather.until_s = 10.0, moment_s + 25.0
    weather.deadline_s = deadline_s
    if ("outage", "server") in events:
        weather.until_s += OUTAGE_S
    weather.events = [(0.0, "copy", "server")]
    weather.events += [(moment_s + after, *each) for after, each in enumerate(events)]
    federation = Federation(weather, parts)
    assert federation.run().virtual_s >= weather.until_s
    with federation.server.database.database.reading() as tx:
        ended = [msgspec.json.decode(r.summary_json) for r in tx.rounds_of(1)]
    return [str(r) for r in ended if r["state"] != "closed" or r["accepted"] < r["target"]]


def test_a_server_that_does_not_lay_out_again_what_a_broker_forgot_is_noticed() -> None:
    class NeverLaysOut(Service):
        def begin(self):
            self._board.lay_out = lambda **_: None
            super().begin()

    parts = Parts(service=NeverLaysOut)
    assert any(updates_lost(ONE_FAULT[1], moment * 2.0, parts) for moment in range(8))


def crash_at(which: int, point: int, power: bool) -> str | None:
    federation = calm()
    federation.machines[which].mischief.at[point] = Crash("here", power=power)
    try:
        federation.run()
    except Exception as error:
        return f"machine {which}, point {point}, power {power}: {type(error).__name__}: {error}"
    return None


def test_a_crash_at_every_point_of_a_round_loses_nothing() -> None:
    undisturbed = calm()
    undisturbed.run()
    points = [(i, m.mischief.points) for i, m in enumerate(undisturbed.machines[:2])]
    tries = [(i, n, power) for i, most in points for n in range(1, most + 1) for power in (0, 1)]
    with ProcessPoolExecutor(2) as pool:
        found = pool.map(crash_at, *zip(*tries, strict=True), chunksize=20)
        assert [each for each in found if each] == []
    assert len(tries) > 300
