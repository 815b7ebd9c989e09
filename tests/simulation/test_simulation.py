"""Whole federations in virtual time, under the weather of their seeds; the oracle judges each.

A seed that fails here is run again, told in full, by `python -m tests.simulation --replay SEED -v`.
"""

from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.disk import Crash
from tests.simulation.federation import Federation, simulate
from tests.simulation.soak import soak
from tests.simulation.weather import Weather

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
