"""Builds that break one promise each. The simulation finds every one of them.

Each is the real class with one line gone wrong, as a hurried change might make it.
"""

import re

import pytest

from device_client import events as device_events
from device_client.agent import Agent
from server.events import Accepted
from server.intake import Intake
from server.ledger import Ledger
from server.service import Service
from server.store import schema
from tests.simulation.federation import Federation
from tests.simulation.machines import Parts
from tests.simulation.oracle import ViolationError
from tests.simulation.weather import Weather

SEEDS_MAX = 150


class ReceiptBeforeFsync(Intake):
    """Writes the receipt down without waiting for the disk to have the update."""

    def commit(self, effects, **options):
        held = self._spool.sync
        self._spool.sync = lambda _: None
        try:
            super().commit(effects, **options)
        finally:
            self._spool.sync = held


class WrittenLate(Intake):
    """Says accepted, and writes it down when there is time."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._late = []

    def commit(self, effects, **options):
        late, self._late = self._late, list(effects)
        super().commit(late, **options)


class ReceiptBeforeCommit(Ledger):
    """Writes down what is late before a round is closed."""

    intake = WrittenLate

    def close_round(self, summary):
        self._open.commit([])
        return super().close_round(summary)


class DedupeOff(Intake):
    """Adds an update to the sum each time it is asked to."""

    def accept(self, effects, *, at_disk):
        results = super().accept(effects, at_disk=at_disk)
        for effect in effects:
            if any(isinstance(r, Accepted) and effect.init.upload in r.uploads for r in results):
                self.add(effect.init)
        return results


class DedupeOffAfterRestart(Intake):
    """After a restart counts whatever is complete in the spool, receipt or no receipt."""

    def begin(self, device, init):
        missing = super().begin(device, init)
        if not missing:
            self.add(init)
        return missing


class AnnouncedBeforeWritten(Service):
    """Announces a round, then writes it down."""

    def _open_round(self, effect):
        ledger, transaction = self._ledger, self._ledger.db.transaction
        signed = []

        def announced_first():
            self._board.announce(signed[0])
            return transaction()

        sign = ledger.announcer.sign

        def kept(announcement):
            signed.append(sign(announcement))
            ledger.db.transaction = announced_first
            return signed[-1]

        ledger.announcer.sign = kept
        try:
            return super()._open_round(effect)
        finally:
            ledger.announcer.sign, ledger.db.transaction = sign, transaction


class NotedLate(Ledger):
    """Notes the highest round when the round is over."""

    def open_round(self, effect):
        with self.db.reading() as tx:
            before = tx.highest_round()
        note = self._highest.note
        self._highest.note = lambda _: note(before)
        try:
            return super().open_round(effect)
        finally:
            self._highest.note = note


class NonceReuse(Agent):
    """Seals each attempt of an upload under the key of the first."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._random = lambda length: b"\x07" * length


class RememberedAfterActing(Agent):
    """Speaks of a round, and writes it down at the end of the turn."""

    def _perform(self, effect):
        if isinstance(effect, device_events.Remember):
            self._later = effect
            return []
        return super()._perform(effect)

    def turn(self, event):
        super().turn(event)
        later = self.__dict__.pop("_later", None)
        if later is not None:
            super()._perform(later)


class KeyKept(Ledger):
    """Keeps the key of a round that is over."""

    def close_round(self, summary):
        key = self._open.key.seed
        found = super().close_round(summary)
        with self.db.transaction() as tx:
            tx._change(schema.rounds, {"number": summary.round}, {"round_key": key})
        return found


def taking_in(intake: type[Intake]) -> type[Ledger]:
    """A ledger whose rounds take updates in so."""
    return type("_", (Ledger,), {"intake": intake})


BROKEN = [
    ("receipt before fsync", Parts(taking_in(ReceiptBeforeFsync)), "receipt and cannot be read"),
    ("receipt before commit", Parts(ledger=ReceiptBeforeCommit), "has a receipt"),
    ("dedupe off", Parts(taking_in(DedupeOff)), "exact mean"),
    ("dedupe off after a restart", Parts(taking_in(DedupeOffAfterRestart)), "exact mean"),
    ("highest round noted late", Parts(ledger=NotedLate), "before the second file knew"),
    ("nonce reuse", Parts(agent=NonceReuse), "nonce was used twice"),
    ("announced before written", Parts(service=AnnouncedBeforeWritten), "opened in two ways"),
    ("remembered after acting", Parts(agent=RememberedAfterActing), "it may forget"),
    ("key kept", Parts(ledger=KeyKept), "outlived"),
]


@pytest.mark.parametrize(("parts", "sentence"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_build_is_caught(parts: Parts, sentence: str) -> None:
    with pytest.raises(ViolationError, match=sentence):
        run_seeds(parts, sentence)


def run_seeds(parts: Parts, sentence: str) -> None:
    """Until it is caught by this sentence: one fault shows in several ways, by chance one first."""
    for seed in range(SEEDS_MAX):
        try:
            Federation(Weather.of(seed), parts).run()
        except ViolationError as caught:
            if re.search(sentence, str(caught)):
                raise
