"""Who belongs to the fleet, as a running server knows it.

A command may change that at any moment. The database says who is enrolled; the roster says who
was revoked, whatever the database says, for that may be an old copy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from broker_bridge.errors import PeerError
from server.fleet.home import Home
from server.store.database import Database
from server.store.rows import Device, DeviceStatus

__all__ = ["Change", "Members", "check_member"]

_LOOK_S = 1.0  # how often to look whether a command changed who belongs to the fleet
_KNOWN_S = 60.0  # until a row is read again; a change of the fleet is seen in a second
_KNOWN_MAX = 20_000


@dataclass(frozen=True)
class Change:
    """What became of the fleet since the last look."""

    shut_out: dict[str, DeviceStatus]  # who is out since then, or out in another way
    is_anyone_back: bool


class Members:
    """The members of one fleet. What was read a moment ago is not read again for each message."""

    def __init__(self, db: Database, home: Home, *, clock: Callable[[], float]) -> None:
        self._db = db
        self._home = home
        self._clock = clock
        self._look_at_s = clock()
        self._changes = -1  # how many of them are known here
        self._shut_out: dict[str, DeviceStatus] = {}
        self._roster = home.roster()
        self._known: dict[str, tuple[Device, float]] = {}

    def begin(self) -> None:
        """Know who is out: nobody need be told of these. Before a round is taken up."""
        with self._db.reading() as tx:
            self._changes, self._shut_out = tx.fleet_changes(), tx.shut_out()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a look."""
        return self._clock() >= self._look_at_s

    def look(self, *, now: bool = False) -> Change | None:
        """Whether a command changed who belongs to the fleet; once a second, or `now`.

        Raises LocalError.
        """
        if not (now or self.is_due):
            return None
        self._look_at_s = self._clock() + _LOOK_S
        with self._db.reading() as tx:
            changes = tx.fleet_changes()
            if changes == self._changes:
                return None
            gone = tx.shut_out()
        self._roster = self._home.roster()  # if that fails, it is tried again at the next look
        self._changes = changes
        self.forget()
        before, self._shut_out = self._shut_out, gone
        shut_out = {name: status for name, status in gone.items() if before.get(name) != status}
        return Change(shut_out, is_anyone_back=bool(before.keys() - gone.keys()))

    def member(self, name: str) -> Device:
        """An enrolled device. Raises PeerError for anybody else."""
        device = self.row(name)
        check_member(device)
        return device

    def row(self, name: str) -> Device:
        """Whoever has this name, also one who is shut out. Raises PeerError for a stranger."""
        now = self._clock()
        device, until_s = self._known.get(name, (None, 0.0))
        if now >= until_s:
            device = self._read(name)
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            if device is not None:  # nor can strangers fill it with names
                self._known[name] = device, now + _KNOWN_S
        if device is None:
            raise PeerError("unknown_device", f"no device {name!r} is enrolled")
        return device

    def _read(self, name: str) -> Device | None:
        with self._db.reading() as tx:
            device = tx.device(name)
        if device is not None and self._roster.shuts_out(name, (device.sign_public,)):
            return replace(device, status="revoked")
        return device

    def forget(self, name: str | None = None) -> None:
        """Read this row again, or every one: it changed."""
        if name is None:
            self._known.clear()
        else:
            self._known.pop(name, None)


def check_member(device: Device) -> None:
    """Raise PeerError unless it is enrolled."""
    if device.status != "enrolled":
        raise PeerError("revoked_device", f"the device {device.name!r} is {device.status}")
