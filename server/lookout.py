"""What commands change beside a running server: who belongs to the fleet, and its keys.

A server looks once a second, and goes on with what it finds, in the middle of a round, too. While a
file cannot be read it goes on with what it knew, and whoever asks for its status hears which
file that is. Now and then it also looks who should renew, and asks whoever is here.
"""

import logging
from collections.abc import Callable

from broker_bridge.errors import LocalError
from broker_bridge.wire.topics import Topics
from server import events as ev
from server.coordinator import Coordinator
from server.fleet.home import Home
from server.fleet.keys import ServerKeys
from server.fleet.renewal import Renewals
from server.ledger import Ledger
from server.mail import Mail
from server.members import Change, Members
from server.noticeboard import Noticeboard
from server.store.rows import Device

__all__ = ["Lookout"]

log = logging.getLogger("midge.server")

_KEYS_S = 1.0  # how often to look whether a command changed the keys
_SWEEP_S = 600.0  # how often to look for members that should renew


class Lookout:
    """Of one server."""

    def __init__(
        self,
        home: Home,
        ledger: Ledger,
        members: Members,
        renewals: Renewals,
        coordinator: Coordinator,
        *,
        board: Noticeboard,
        mail: Mail,
        topics: Topics,
        clock: Callable[[], float],
    ) -> None:
        self._home = home
        self._ledger = ledger
        self._members = members
        self._renewals = renewals
        self._coordinator = coordinator
        self._board = board
        self._mail = mail
        self._topics = topics
        self._clock = clock
        self._keys_at_s = self._sweep_at_s = clock()
        self._unread: dict[str, str] = {}  # what goes on as before, and why

    # ── members ─────────────────────────────────────────────────────────────────────────

    def look_at_members(self, *, now: bool = False) -> Change | None:
        """Who came and went since the last look; once a second, or `now`."""
        if not (now or self._members.is_due):
            return None
        try:
            change = self._members.look(now=True)
        except LocalError as error:
            self._cannot_read("members", error)
            return None
        self._can_read("members")
        if change is not None:
            self._sweep_at_s = self._clock()  # somebody may be wanted to renew
        return change

    def shut(self, device: str, *, revoked: bool) -> ev.ShutOut:
        """This one is out, and nobody hears any more what a revoked one said last."""
        log.info("%s is %s", device, "revoked" if revoked else "suspended")
        if revoked and self._coordinator.knows(device):
            self._board.publish(self._topics.state(device), b"", retain=True)
        return ev.ShutOut(device, revoked)

    # ── keys ────────────────────────────────────────────────────────────────────────────

    def look_at_keys(self) -> None:
        """Whether they are others; and now and then, who should renew his."""
        now_s = self._clock()
        if now_s >= self._keys_at_s:
            self._keys_at_s = now_s + _KEYS_S
            self._read_keys()
        if now_s >= self._sweep_at_s:
            self._sweep_at_s = now_s + _SWEEP_S
            self._ask_to_renew()

    def _read_keys(self) -> None:
        try:
            keys = self._home.keys()
        except LocalError as error:
            self._cannot_read("keys", error)
            return
        self._can_read("keys")
        if keys != self._ledger.keys:
            self._take_keys(keys)

    def _take_keys(self, keys: ServerKeys) -> None:
        """Go on with other keys. An open round goes on under the fleet key it began with."""
        log.info("new keys: identity %d, fleet key %d", keys.said.sequence, keys.fleet_epoch)
        self._ledger.take_keys(keys)
        self._mail.sign = keys.sign
        self._board.identify()
        self._board.reseal()
        if self._board.announced is not None:
            self._board.announce(self._ledger.announcer.again(self._board.announced))

    def _ask_to_renew(self) -> None:
        """Ask whoever is here and should."""
        online = {*self._coordinator.online(), *self._coordinator.online("evaluate")}
        for device in self._renewals.due():
            if device.name in online:
                self.ask_to_renew(device)

    def ask_to_renew(self, device: Device) -> None:
        """Ask this one, if it should and was not asked just now."""
        online = self._coordinator.online_count()
        asked = self._renewals.request(device, now_s=self._clock(), online=online)
        if asked is not None:
            self._mail.configure(device.name, asked)

    # ── what cannot be read ─────────────────────────────────────────────────────────────

    def _cannot_read(self, what: str, error: LocalError) -> None:
        trouble = f"{error}; going on with the {what} of before"
        if self._unread.get(what) != trouble:  # said once, not every second
            log.error("%s", trouble)
            self._unread[what] = trouble
            self._tell()

    def _can_read(self, what: str) -> None:
        if self._unread.pop(what, None):
            log.info("the %s can be read again", what)
            self._tell()

    def _tell(self) -> None:
        self._coordinator.step(ev.Unread("; ".join(self._unread.values())))
