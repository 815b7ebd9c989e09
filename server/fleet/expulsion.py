"""Shutting a device out, for good: one durable word, and everything that follows from it.

    roster ─► status in the database ─► a new fleet key ─► the broker's files ─► the server is told

`expel` writes the roster; `complete` makes the rest true, whatever of it is true already. Each
step is durable and can be repeated, so a command that was killed half-way is finished by the
next one, by `midge broker`, or by the server at its start. The roster is written under a lock:
of two commands at once, one waits for the other.
"""

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Literal

from broker_bridge.disk import alone, disk_errors, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.link.broker_config import ACL_FILE, REVOKED_FILE
from broker_bridge.link.local_broker import shipped_file
from server.fleet.authority import OPERATOR_NAME
from server.fleet.certificates import (
    read_certificate,
    revocation_number,
    write_private,
    write_public,
)
from server.fleet.home import Home
from server.fleet.machines import MADE_AGAIN, certificate_fault
from server.fleet.roster import Expelled, Roster
from server.store.database import Database
from server.store.rows import Device
from server.store.transaction import Transaction

__all__ = ["complete", "expel", "free_name", "keep_broker_files", "replace_operator"]

_ROSTER_EPOCH = "roster_epoch"  # in the database: the newest roster that it has heard of
Gone = Literal["revoked", "removed"]


def expel(
    home: Home,
    db: Database,
    name: str,
    *,
    now: float,
    status: Gone = "revoked",
) -> Roster:
    """Shut out the device `name` and every certificate of that name; return the roster.

    Nobody may use the name at the broker until `free_name`. To say it again changes nothing.
    Raises LocalError when there was never such a device.
    """
    with locked(home):
        with db.reading() as tx:
            who = _expelled(tx, name, now)
        before = home.roster()
        roster = before.expelling(who, fleet_epoch=home.keys().fleet_epoch + 1)
        if roster is not before:
            home.set_roster(roster)
        _complete(home, db, roster, {name: status})
    return roster


def free_name(home: Home, db: Database, name: str) -> Roster:
    """Let a new device use a name whose former holder was shut out; return the roster."""
    with locked(home):
        before = home.roster()
        roster = before.opening(name)
        if roster is not before:
            home.set_roster(roster)
            _complete(home, db, roster, {})
    return roster


def replace_operator(home: Home, db: Database, *, now: datetime) -> Roster:
    """Give the operator a new key and certificate, and have the broker turn the old one away.

    The old certificate is named before it is replaced: of a command that was killed between
    the two, the next one finishes the rest, and no certificate is forgotten.
    """
    with locked(home):
        folder = home.folder / "operator"
        fault = certificate_fault(folder / "client.pem")
        if fault:
            raise LocalError(
                f"{fault}; {MADE_AGAIN.format(home.folder)}, then replace the operator"
            )
        with disk_errors(folder):
            old = (folder / "client.pem").read_bytes()
        with db.reading() as tx:  # those that were renewed are good until they end
            serials = {each.serial for each in tx.certificates(OPERATOR_NAME)}
        roster = home.roster()
        for serial in sorted({*serials, f"{read_certificate(old).serial:x}"}):
            roster = roster.turning_away(OPERATOR_NAME, serial, at=now.timestamp())
        home.set_roster(roster)
        issued = home.authority().issue_for_operator(now=now)
        write_private(folder / "client-key.pem", issued.key)
        write_public(folder / "client.pem", issued.certificate)
        _complete(home, db, roster, {})
    return roster


def complete(home: Home, db: Database) -> Roster:
    """Make true whatever follows from the roster and is not true yet; return the roster.

    Raises LocalError when the roster is older than what the database has heard of.
    """
    with locked(home):
        roster = home.roster()
        _complete(home, db, roster, {})
    return roster


def _expelled(tx: Transaction, name: str, now: float) -> Expelled:
    device, certificates = tx.device(name), tx.certificates(name)
    if device is None and tx.token(name) is None and not certificates:
        raise LocalError(f"there is no device {name!r}; see `midge device list`")
    keys = () if device is None else (device.sign_public, device.kem_public, device.tls_public)
    serials = tuple(sorted(each.serial for each in certificates))
    return Expelled(device=name, keys=keys, serials=serials, at=now)


def _complete(home: Home, db: Database, roster: Roster, statuses: dict[str, Gone]) -> None:
    changed = _tell_database(home, db, roster, statuses)
    while home.keys().fleet_epoch < roster.fleet_epoch:
        home.next_epoch()
        changed = True
    changed = write_broker_files(home, roster) or changed
    if changed:
        with db.transaction() as tx:  # last: whoever hears of it finds all of it done
            tx.count_fleet_change()


def _tell_database(home: Home, db: Database, roster: Roster, statuses: dict[str, Gone]) -> bool:
    with db.transaction() as tx:
        known = int(tx.meta(_ROSTER_EPOCH) or 0)
        if roster.epoch < known:
            raise LocalError(
                f"{home.folder / 'keys' / 'roster.json'} is older than the database: devices were "
                "revoked since; restore the newest backup of the keys"
            )
        changed = roster.epoch != known
        tx.set_meta(_ROSTER_EPOCH, str(roster.epoch))
        wanted: dict[str, Gone] = {row.name: "revoked" for row in _still_in(tx, roster)}
        for name, status in (wanted | statuses).items():
            changed = _mark(tx, name, status) or changed
        return changed


def _mark(tx: Transaction, name: str, status: Gone) -> bool:
    """Write the status down, and take back a token that nobody used; say if that is new."""
    token, device = tx.token(name), tx.device(name)
    if token is not None and token.used_at is None:
        tx.drop_token(name)
    if device is None or device.status == status:
        return False
    tx.set_device_status(name, status)
    return True


def _still_in(tx: Transaction, roster: Roster) -> list[Device]:
    """The devices that the database lets in, and whose keys were revoked."""
    found = (tx.device(name) for name in sorted({each.device for each in roster.expelled}))
    return [
        row
        for row in found
        if row is not None
        and row.status not in ("revoked", "removed")
        and roster.shuts_out(row.name, (row.sign_public, row.kem_public, row.tls_public))
    ]


# ── What the broker reads ───────────────────────────────────────────────────────────────


def _acl_text(roster: Roster) -> str:
    """The shipped rules, and below them one for each name that nobody may use."""
    text = shipped_file(ACL_FILE).read_text()
    if not roster.closed:
        return text
    denied = "\n".join(f"\nuser {name}\ntopic deny #" for name in roster.closed)
    return f"{text}\n# Shut out by `midge device revoke`.\n{denied}\n"


def keep_broker_files(home: Home) -> Roster:
    """See to it that the broker's files say what the roster says; return the roster."""
    with locked(home):  # or a command that writes the same files would trip over us
        roster = home.roster()
        write_broker_files(home, roster)
    return roster


def write_broker_files(home: Home, roster: Roster) -> bool:
    """Write the list of revoked certificates and the rules; say whether anything changed."""
    acl, revoked = home.broker / ACL_FILE, home.broker / REVOKED_FILE
    text = _acl_text(roster).encode()
    with disk_errors(home.broker):
        old_acl = acl.read_bytes() if acl.exists() else b""
        old_list = revoked.read_bytes() if revoked.exists() else b""
    # By its number, for a list is signed anew, to other bytes, each time it is made.
    listed = revocation_number(old_list, home.ca_certificate()) == roster.epoch
    if not listed:  # only then is the CA's key needed: without it a fleet can still start
        serials, authority = [int(each, 16) for each in roster.serials], home.authority()
        write_atomic(revoked, authority.revocation_list(serials, number=roster.epoch), mode=0o644)
    if old_acl != text:
        write_atomic(acl, text, mode=0o644)
    return not listed or old_acl != text


def locked(home: Home) -> AbstractContextManager[None]:
    """One at a time, over all processes; the others wait."""
    return alone(home.folder / "keys" / "roster.lock")
