"""A full disk: nothing new is taken on, and what was promised is kept.

What had to be written down and could not be waits here, in order, and is made up for as soon as
there is room. Meanwhile whoever asks hears what is wrong.
"""

import logging
from collections.abc import Callable

from broker_bridge.disk import DiskFullError
from server import events as ev
from server.coordinator import Coordinator
from server.ledger import Ledger

__all__ = ["Room"]

log = logging.getLogger("midge.server")

_LOOK_S = 1.0  # how often to look whether the disk has room


class Room:
    """Whether one server has room for what it is to write down."""

    def __init__(
        self, ledger: Ledger, coordinator: Coordinator, *, clock: Callable[[], float]
    ) -> None:
        self.trouble = ""  # for a person; empty while there is room
        self.postponed: list[ev.Effect] = []  # in the order in which they were decided
        self._ledger = ledger
        self._coordinator = coordinator
        self._clock = clock
        self._look_at_s = 0.0

    def none(self, error: DiskFullError) -> None:
        """There is none: say so, and let nothing begin."""
        if not self.trouble:
            log.error("%s", error)
        self.trouble, self._look_at_s = str(error), self._clock() + _LOOK_S
        self._coordinator.step(ev.Room(self.trouble))

    def is_found(self) -> bool:
        """Whether there is some, seen just now; once a second."""
        if self._clock() < self._look_at_s:
            return False
        self._look_at_s = self._clock() + _LOOK_S
        try:
            self._ledger.check_room()
        except DiskFullError as error:
            self.none(error)
            return False
        return True

    def take_postponed(self) -> list[ev.Effect]:
        """What is to be made up for; what fails again is postponed again."""
        again, self.postponed = self.postponed, []
        return again

    def made_up(self) -> None:
        """What could be written down is: if that was all, the trouble is over."""
        if self.trouble and not self.postponed:
            log.info("the disk has room again")
            self.trouble = ""
            self._coordinator.step(ev.Room())
