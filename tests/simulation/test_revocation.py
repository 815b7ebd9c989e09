"""A device is revoked in the middle of a round, and the server dies at any point after it."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from server.intake import Intake
from server.service import Service
from tests.simulation.disk import Crash
from tests.simulation.federation import Federation
from tests.simulation.machines import Parts
from tests.simulation.oracle import ViolationError
from tests.simulation.test_broken_builds import taking_in
from tests.simulation.weather import Weather

MOMENTS = (1.0, 3.0, 6.0)  # devices train for 0 to 5 seconds


def revoking(moment_s: float, parts: Parts | None = None) -> Federation:
    """Three devices and one round, and one of them is revoked."""
    weather = Weather.calm(seed=1, devices=3, rounds=1)
    weather.events = [(moment_s, "revoke", "d1")]
    return Federation(weather, parts)


def became_of_it(federation: Federation) -> set[str]:
    with federation.server.database.database.reading() as tx:
        return {r.status for r in tx.receipts(1, device="d1")}


def test_it_is_revoked_before_it_uploads_and_after_its_update_was_accepted() -> None:
    """What the others of these tests are about does happen in them."""
    statuses = set()
    for moment_s in MOMENTS:
        federation = revoking(moment_s)
        outcome = federation.run()
        assert (outcome.status, outcome.receipts) == ("done", 2)
        statuses |= became_of_it(federation) or {"nothing"}
    assert statuses == {"nothing", "withdrawn"}


def crash_after(moment_s: float, point: int) -> str | None:
    federation = revoking(moment_s)
    federation.server.mischief.at[point] = Crash("here", power=point % 2 == 0)
    try:
        federation.run()
    except Exception as error:
        return f"revoked at {moment_s} s, point {point}: {type(error).__name__}: {error}"
    return None


def points_after(moment_s: float) -> range:
    """The points of the server's way from the revocation to the end."""
    federation = revoking(moment_s)
    revoke, seen = federation.revoke, []

    def noted(name: str) -> None:
        seen.append(federation.server.mischief.points)
        revoke(name)

    federation.revoke = noted  # type: ignore[method-assign]
    federation.run()
    return range(seen[0] + 1, federation.server.mischief.points + 1)


def test_a_crash_at_every_point_after_it_changes_nothing_of_it() -> None:
    tries = [(6.0, point) for point in points_after(6.0)]
    with ProcessPoolExecutor(2) as pool:
        found = pool.map(crash_after, *zip(*tries, strict=True), chunksize=10)
        assert [each for each in found if each] == []
    assert len(tries) > 50


class LeftInTheSum(Intake):
    """Takes the receipt back, and forgets the sum."""

    def _take_out(self, init):
        pass


class LeftOnTheDisk(Intake):
    """Takes the update out of the sum, and leaves its receipt."""

    def withdraw(self, device, reason):
        for upload, each in list(self.uploads.items()):
            if each.device == device:
                self._take_out(each.init)
                self.forget(upload)
        return []


class NeverLooks(Service):
    """Hears of a revocation only when it starts."""

    def _look_at_fleet(self, *, now=False):
        pass

    def _close_round(self, summary):
        self._ledger.gone_devices = list  # nobody
        return super()._close_round(summary)


BROKEN = [
    ("left in the sum", Parts(taking_in(LeftInTheSum)), "exact mean"),
    ("left on the disk", Parts(taking_in(LeftOnTheDisk)), "goes on long after"),
    ("never looks", Parts(service=NeverLooks), "was revoked, and is counted"),
]


@pytest.mark.parametrize(("parts", "sentence"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_build_is_caught(parts: Parts, sentence: str) -> None:
    with pytest.raises(ViolationError, match=sentence):
        run_all(parts)


def run_all(parts: Parts) -> None:
    for moment_s in MOMENTS:
        revoking(moment_s, parts).run()
