"""What is known of the devices: the database's rows, put together with what devices say now."""

import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import fingerprint
from broker_bridge.wire.messages import Presence
from broker_bridge.wire.topics import OPERATOR, DeviceState, Topics
from server.fleet.home import Home
from server.store.database import Database
from server.store.rows import Device, DeviceStatus, Token
from server.store.transaction import Transaction

__all__ = ["Entry", "census", "find", "presences"]

_QUIET_S = 0.4  # retained messages come in one go; after such a silence there are no more
_LISTEN_S = 5.0
_PAGE = 500


@dataclass(frozen=True)
class Entry:
    """One name: a device, or a token that nobody used as yet (`device` is None)."""

    name: str
    device: Device | None
    token: Token | None
    rounds: int

    def json(self, presence: Presence | None, now: float) -> dict[str, object]:
        """Everything that may be said of it, as JSON types. Times are seconds since 1970."""
        found: dict[str, object] = {"device": self.name, "status": self.status(now)}
        if self.device is not None:
            d = self.device
            found |= {
                "last_seen": d.last_seen, "last_round": d.last_round, "rounds": self.rounds,
                "software": d.software, "fingerprint": fingerprint(d.sign_public),
                "keys_since": d.keys_since or d.enrolled_at, "enrolled_at": d.enrolled_at,
                "certified_until": d.certified_until or None, "wanted": d.wanted,
            }  # fmt: skip
        elif self.token is not None:
            found |= {"token_expires": self.token.expires_at}
        if presence is not None:
            found["presence"] = {"state": presence.state, "detail": _printable(presence.detail)}
        return found

    def status(self, now: float) -> str:
        """The device's status; `added` or `expired` where only a token is there."""
        if self.device is not None:
            return self.device.status
        return "added" if self.token is not None and now <= self.token.expires_at else "expired"


def find(tx: Transaction, name: str) -> Device:
    """The device of this name. Raises LocalError when there is none, or no more."""
    device = tx.device(name)
    if device is not None and device.status != "removed":
        return device
    if tx.token(name) is not None and device is None:
        raise LocalError(f"the device {name!r} was added and has not enrolled yet; start it first")
    raise LocalError(f"there is no device {name!r}; see `midge device list`")


def census(db: Database, *, status: DeviceStatus | None = None) -> list[Entry]:
    """All devices that are not removed (or those of one status), and the tokens, by name."""
    with db.reading() as tx:
        devices: list[Device] = []
        while page := tx.devices(after=devices[-1].name if devices else "", limit=_PAGE,
                                 status=status):  # fmt: skip
            devices += page
        this = tx.current_round()
        if this is not None:
            seen = tx.seen_in(this.number)
            devices = [_seen(each, this.number, seen.get(each.name)) for each in devices]
        rounds = tx.rounds_by_device()
        tokens = {} if status is not None else {each.device: each for each in tx.unused_tokens()}
    known = {each.name for each in devices}
    entries = [Entry(d.name, d, tokens.get(d.name), rounds.get(d.name, 0)) for d in devices]
    waiting = [Entry(name, None, t, 0) for name, t in tokens.items() if name not in known]
    return sorted(entries + waiting, key=lambda each: each.name)


def _seen(device: Device, number: int, at: float | None) -> Device:
    """The device, with what its row will say of the open round."""
    if at is None or (at < (device.last_seen or 0.0) and not device.last_round):
        return device
    return replace(device, last_seen=at, last_round=number)


def presences(home: Home) -> Mapping[str, Presence] | None:
    """What devices said last, by name; None when the broker cannot be asked.

    They say it themselves, unsigned: nothing is decided by it.
    """
    config = home.config()
    try:
        # A broker that is away says so at once here, where a link would try for a while.
        socket.create_connection((config.broker.host, config.broker.port), timeout=1.0).close()
        link = home.access("operator", config).open(OPERATOR, session_s=0, wait_s=5.0)
    except (OSError, LinkError):
        return None
    with contextlib.closing(link):
        return _hear(link, Topics(home.federation(config)))


def _hear(link: PahoLink, topics: Topics) -> dict[str, Presence]:
    link.subscribe([topics.all_states])
    found: dict[str, Presence] = {}
    until = time.monotonic() + _LISTEN_S
    quiet_at = time.monotonic() + 2 * _QUIET_S
    while time.monotonic() < min(until, quiet_at):
        event = link.receive(0.1)
        if not isinstance(event, Message):
            continue
        link.ack(event)
        quiet_at = time.monotonic() + _QUIET_S
        with contextlib.suppress(PeerError):
            place = topics.parse(event.topic)
            if isinstance(place, DeviceState) and event.payload:
                found[place.device] = messages.decode_json(event.payload, Presence)
    return found


def _printable(text: str) -> str:
    # A device wrote it: nothing in it may move the cursor.
    return "".join(c if c.isprintable() else " " for c in text)
