"""The newest model for this device's own programs, when it is not going to be trained from.

A round that has an update of ours made a model. The device takes part no more until the next
round, and its programs would wait that long for it.
"""

from broker_bridge.wire.messages import Announcement
from device_client.duties.duty import Duty
from device_client.duties.standing import Standing, State
from device_client.events import Effect, Eligible, Event, Failed, Tick

__all__ = ["KEEP_S", "Keeping"]

KEEP_S = 300.0  # how long to wait for the model


class Keeping(Duty):
    """IDLE ─ begin ─► FETCHING ─ model here ─► IDLE"""

    def __init__(self, here: Standing, announcement: Announcement) -> None:
        super().__init__(here, announcement)
        self._over_s = here.now_s + KEEP_S

    def begin(self) -> list[Effect]:
        """Fetch it."""
        return self._begin_fetching()

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do."""
        match event:
            case Tick() if self._here.now_s >= self._over_s:
                return self._sit_out("the round's deadline is over")
            case Eligible(against) if against:
                return self.give_up(against)
            case Failed(number, reason):
                return self._failed(number, reason)
        return self._fetch_on(event)

    def _act(self) -> list[Effect]:
        self.state = State.IDLE
        return self._here.keep(self.announcement)
