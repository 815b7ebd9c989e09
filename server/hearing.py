"""What a message says to the server is believed only after its signature was verified: here.

It becomes events for the coordinator. What touches no rule of a round is answered at once:
enrolment, renewal, a blob that somebody missed. What is wrong, from a stranger or beyond a device's
share is a PeerError, and nothing comes of it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import PeerError
from broker_bridge.link.base import Message
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.messages import Busy, Init, Join, NeedBlob, Presence, Report
from broker_bridge.wire.topics import DeviceState, Topics, UpTopic
from server import events as ev
from server.desk import Desk
from server.fleet.enrolment import Registrar
from server.fleet.renewal import Renewals
from server.ledger import Ledger
from server.lookout import Lookout
from server.mail import Mail
from server.members import Members, check_member
from server.noticeboard import Noticeboard
from server.quotas import Quotas
from server.room import Room

__all__ = ["BUSY", "Hearing"]

log = logging.getLogger("midge.server")

BUSY = "the server has no room for updates now"
_SIGNED = {"join": Join, "init": Init, "need": NeedBlob, "report": Report}


@dataclass(kw_only=True, eq=False, repr=False)
class Hearing:
    """The ears of one server.

    `accept` sums the updates that are complete: some things must come after that.
    `look_at_fleet` sees at once whether a command changed who belongs to it.
    """

    ledger: Ledger
    members: Members
    registrar: Registrar
    renewals: Renewals
    lookout: Lookout
    quotas: Quotas
    desk: Desk
    room: Room
    board: Noticeboard
    mail: Mail
    topics: Topics
    clock: Callable[[], float]
    accept: Callable[[], None]
    look_at_fleet: Callable[[], None]

    def understand(self, message: Message) -> list[ev.Event]:
        """What happened, by this message. Raises PeerError, DiskFullError."""
        match self.topics.parse(message.topic):
            # First, for these come by the thousand.
            case UpTopic(device=device, kind="data"):
                self.quotas.chunk(device, len(message.payload))
                if self.room.postponed:
                    raise _no_room()
                return self._chunk(device, message.payload)
            case UpTopic(device=device, kind=kind):
                self.quotas.control(device, now_s=self.clock())
                if self.room.postponed:
                    raise _no_room()
                return self._said(device, kind, message.payload)
            case DeviceState(device):
                self.quotas.control(device, now_s=self.clock())
                return self._presence(device, message.payload)
            case "ctl":
                self.accept()  # a stop must not take the round from under what is complete
                return self.desk.hear(message)
        return []

    def _chunk(self, device: str, chunk: bytes) -> list[ev.Event]:
        try:
            complete = self.ledger.put_chunk(device, chunk)
        except DiskFullError as error:
            self.room.none(error)
            return [ev.Refused(chunk_header(chunk).transfer, "busy", BUSY)]
        return [] if complete is None else [ev.Complete(complete)]

    def _said(self, device: str, kind: str, payload: bytes) -> list[ev.Event]:
        match kind:
            case "enrol":
                self._enrol(device, payload)
            case "renew":
                self._renew(device, payload)
            case _:
                return self._signed(device, kind, payload)
        return []

    # ── from a member ───────────────────────────────────────────────────────────────────

    def _signed(self, device: str, kind: str, payload: bytes) -> list[ev.Event]:
        row, scope = self.members.row(device), self.mail.scope(device)
        said = messages.opened(row.sign_public, kind, scope, payload, _SIGNED[kind])
        if row.status != "enrolled" and isinstance(said, Join):  # or it would ask again and again
            reason = f"the device {device!r} is {row.status}"
            self.mail.send(device, Busy(round=said.round, retry_after_s=-1, reason=reason))
        check_member(row)
        match said:
            case Join():
                return [ev.Joined(device, said, self._upload_ids(device))]
            case Init():
                return [ev.Inited(device, said, said.upload in self._upload_ids(device))]
            case NeedBlob():
                self.board.repeat(said)
            case Report():
                return [ev.Reported(device, said)]
        return []

    def _upload_ids(self, device: str) -> tuple[bytes, ...]:
        return self.ledger.upload_ids(device) if self.ledger.has_open_round else ()

    def _presence(self, device: str, payload: bytes) -> list[ev.Event]:
        if not payload:
            return []
        presence = messages.decode_json(payload, Presence)
        row = self.members.member(device)
        if presence.state not in ("lost", "sleeping"):
            self.lookout.ask_to_renew(row)
        return [ev.Seen(device, presence)]

    # ── about keys ──────────────────────────────────────────────────────────────────────

    def _enrol(self, device: str, payload: bytes) -> None:
        self.look_at_fleet()  # its name may be that of one who is to go
        answer = self.registrar.answer(device, payload)
        self.members.forget(device)
        self.mail.configure(device, answer)
        log.info("enrolment of %s answered", device)

    def _renew(self, device: str, payload: bytes) -> None:
        self.accept()  # what is complete is summed under the keys that sealed it
        has_upload = self.ledger.has_upload_of(device)
        answer = self.renewals.answer(device, payload, has_upload=has_upload)
        self.members.forget(device)
        self.mail.configure(device, answer)
        log.debug("renewal of %s answered", device)


def _no_room() -> PeerError:
    return PeerError("no_room", "nothing can be written down now")
