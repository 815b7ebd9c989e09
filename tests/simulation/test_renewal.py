"""The fleet key changes at any moment, and every honest device has the new one in the end."""

import pytest

from server.fleet.renewal import Renewals
from server.service import Service
from tests.simulation.federation import Federation
from tests.simulation.machines import Parts
from tests.simulation.oracle import ViolationError
from tests.simulation.weather import Weather


def renewing(
    moments_s: tuple[float, ...], parts: Parts | None = None, **strikes: float
) -> Federation:
    """Three devices and five rounds, and new fleet keys at these moments."""
    weather = Weather.calm(seed=int(sum(moments_s)), devices=3, rounds=5)
    weather.training_s, weather.until_s = 10.0, 40.0
    weather.events = [(moment_s, "epoch", "server") for moment_s in moments_s]
    for strike, at_s in strikes.items():
        event, machine = strike.split("_")
        weather.events.append((at_s, event, machine))
    weather.events.sort()
    return Federation(weather, parts)


@pytest.mark.parametrize("moments_s", [(0.5,), (4.0,), (9.0,), (4.0, 5.0, 6.0), (2.0, 7.0, 12.0)])
def test_a_new_fleet_key_costs_no_round_and_no_update(moments_s: tuple[float, ...]) -> None:
    federation = renewing(moments_s)
    outcome = federation.run()
    assert (outcome.status, outcome.rounds, outcome.receipts) == ("done", 5, 15)
    newest = len(moments_s) + 1
    assert {device.fleet_epoch() for device in federation.devices} == {newest}


@pytest.mark.parametrize("strike", ["power_server", "power_d0", "amnesia_server", "drop_server"])
def test_a_new_fleet_key_beside_another_fault_costs_no_device(strike: str) -> None:
    for moment_s in range(0, 10, 3):
        federation = renewing((float(moment_s), moment_s + 4.0), **{strike: moment_s + 1.0})
        assert federation.run().status == "done"
        assert {device.fleet_epoch() for device in federation.devices} == {3}


class NeverAnswers(Renewals):
    """Hears a device that renews, and says nothing."""

    def answer(self, name, payload, *, has_upload):
        super().answer("nobody", payload, has_upload=has_upload)


class Silent(Service):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._hearing.renewals = NeverAnswers(self._renewals.registrar)


def test_a_server_that_answers_no_renewal_is_noticed() -> None:
    with pytest.raises(ViolationError):
        renewing((0.5,), Parts(service=Silent)).run()
