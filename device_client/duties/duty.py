"""What the participant may count on in whatever duty the device has."""

from abc import ABC, abstractmethod

from broker_bridge.wire.messages import Announcement
from device_client.duties.asking import Asking
from device_client.duties.fetching import Fetching
from device_client.duties.standing import Standing, State
from device_client.events import Effect, Event, Stop

__all__ = ["Duty"]

_WORKING = frozenset({State.FETCHING, State.TRAINING, State.SEALING, State.EVALUATING})


class Duty(ABC):
    """One thing to do for the federation. When its state is IDLE, it is over."""

    def __init__(self, here: Standing, announcement: Announcement) -> None:
        self.announcement = announcement
        self.state = State.IDLE
        self._here = here
        self._asking = Asking(here)
        self._fetching = Fetching(here, announcement, self._asking)

    @abstractmethod
    def begin(self) -> list[Effect]:
        """Begin, and say what to do."""

    @abstractmethod
    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do. Raises PeerError, having changed nothing."""

    @abstractmethod
    def _act(self) -> list[Effect]:
        """Task and model are here: do what they were fetched for."""

    def give_up(self, reason: str) -> list[Effect]:
        """End it, for a `reason` that a person will read."""
        effects: list[Effect] = [Stop(reason)] if self.state in _WORKING else []
        self.state, self._here.detail = State.IDLE, reason
        return effects

    def _sit_out(self, reason: str) -> list[Effect]:
        """Give up, and take no part in this round any more."""
        return self.give_up(reason) + self._here.remember(done=True)

    def _failed(self, number: int, reason: str) -> list[Effect]:
        if self.state not in _WORKING or number != self._here.memory.round:
            return []
        return self._sit_out(reason)

    def _begin_fetching(self) -> list[Effect]:
        self.state = State.FETCHING
        return self._fetching.begin()

    def _fetch_on(self, event: Event) -> list[Effect]:
        effects = self._fetching.step(event)
        if self._fetching.in_vain:
            return self._sit_out("the server did not answer")
        return effects + self._act() if self._fetching.is_complete else effects
