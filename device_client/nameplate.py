"""What others may read of this device: the broker retains it, and `midge-device status` shows it.

A state that lasts is shown. In a short round the next comes before anyone could look.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Literal

from msgspec import UnsetType

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import LinkError, LocalError
from broker_bridge.link.base import Link
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Measured, Presence
from device_client.journal import Journal
from device_client.participant import Participant, State

__all__ = ["Nameplate"]

log = logging.getLogger("midge.device")

_PRESENCE: dict[State, Literal["ready", "training", "uploading"]] = {
    State.IDLE: "ready",
    State.WAITING: "ready",
    State.JOINING: "ready",
    State.FETCHING: "training",
    State.TRAINING: "training",
    State.EVALUATING: "training",
    State.SEALING: "uploading",
    State.UPLOADING: "uploading",
}
_TELLING = (State.IDLE, State.WAITING)  # what a device that does nothing waits for
_DETAIL_CHARS_MAX = 500  # what `Presence` takes; the log has the whole sentence
_LASTS_S = 0.5  # how long a state must last to be worth telling the broker and the disk


class Nameplate:
    """The presence of one device."""

    def __init__(
        self, topic: str, journal: Journal, *, boot: int, clock: Callable[[], float]
    ) -> None:
        self._topic = topic
        self._journal = journal
        self._boot = boot
        self._clock = clock
        self._shown: Presence | None = None  # None: the broker does not know us yet
        self._present: Presence | None = None
        self._since_s = 0.0

    def wiped(self) -> None:
        """The broker may not know any more what it was told."""
        self._shown = None

    def show(self, person: Participant, measured: Measured | UnsetType, link: Link) -> None:
        """Show where `person` stands, and what training costs here, if that is worth it.

        Raises LocalError for a disk that takes nothing more, unless it is only full.
        """
        present = Presence(
            state=_PRESENCE[person.state],
            boot=self._boot,
            role=person.role,
            round=person.round,
            detail=person.detail[:_DETAIL_CHARS_MAX] if person.state in _TELLING else "",
            measured=measured,
        )
        now_s = self._clock()
        if present != self._present:
            self._present, self._since_s = present, now_s
        if self._shown is None or now_s - self._since_s >= _LASTS_S:
            self._show(present, link)

    def show_asleep(self, person: Participant, link: Link) -> None:
        """Nobody need wait for this device, whatever ended its work: its disk, for example."""
        with contextlib.suppress(LocalError):
            self._show(Presence(state="sleeping", boot=self._boot, role=person.role), link)

    def _show(self, presence: Presence, link: Link) -> None:
        if presence == self._shown:
            return
        self._shown = presence
        try:
            link.publish(self._topic, messages.encode_json(presence), retain=True)
        except LinkError as error:
            log.warning("not sent: %s", error)
        # Last: a disk that refuses must not keep it from the others.
        with contextlib.suppress(DiskFullError):
            self._journal.show(presence)
