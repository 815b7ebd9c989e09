"""Making again what the fleet's machines lost: whatever the CA's key can certify.

    ca/ca.pem, broker/ca.pem          from a copy; where there is none, anew for the same key
    a certificate                     again, for the key that is there
    a key that is gone or damaged     a new one, with a certificate
    broker/revoked.pem, .acl          from the roster

What is good stays as it is, and a damaged key is put aside, not overwritten. Each step is one
file, so a repair that was killed is given again. The CA's key itself, and the server's in
`keys/`, nobody can make again: they come from a backup.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from broker_bridge.disk import REAL_DISK, disk_errors, sync_folder
from broker_bridge.errors import LocalError, MidgeError
from broker_bridge.link.broker_config import CA_FILE
from broker_bridge.wire.enrolment import Bundle
from server.fleet.authority import Authority, Issued
from server.fleet.certificates import (
    CertificateFacts,
    is_key,
    read_certificate,
    read_key,
    write_private,
    write_public,
)
from server.fleet.expulsion import keep_broker_files
from server.fleet.home import Home, ca_name, from_backup
from server.fleet.machines import Machine, brokers_ca_fault, ca_fault, machines, read_if_there
from server.store.database import Database
from server.store.rows import Certificate

__all__ = ["Repaired", "repair"]


@dataclass(frozen=True)
class Repaired:
    """One thing that was made again. Both in words; `was` begins with the file."""

    was: str
    done: str


def repair(home: Home, db: Database, *, hosts: Sequence[str], now: datetime) -> Iterator[Repaired]:
    """Make again what is missing, damaged, expired or does not fit; say each when it is done.

    `hosts`: names that the broker's certificate must have. Raises LocalError for what cannot be
    made again, with where to get it.
    """
    home.check_clock(now)
    yield from _ca_certificate(home, now)
    authority = home.authority()
    yield from _brokers_ca(home, authority)
    for each in machines(home.folder):
        yield from _machine(home, db, each, authority, hosts, now)
    keep_broker_files(home)


# ── The CA's certificate ────────────────────────────────────────────────────────────────


def _ca_certificate(home: Home, now: datetime) -> Iterator[Repaired]:
    fault = ca_fault(home.folder)
    if not fault:
        return
    path, key = home.folder / "ca" / "ca.pem", home.ca_key()
    for copy in _copies(home):
        if _is_of(copy, key):
            write_public(path, copy)
            yield Repaired(fault, "copied from where else it lay")
            return
    made = Authority.create(ca_name(home.keys().federation), now=now, of_key=key)
    _check_same(home, made)
    write_public(path, made.certificate)
    yield Repaired(fault, "made again, for the same key: what it certified stays good")


def _copies(home: Home) -> Iterator[bytes]:
    yield read_if_there(home.broker / CA_FILE) or b""
    for path in sorted((home.folder / "bundles").glob("*.bundle")):
        try:
            yield Bundle.decode(read_if_there(path) or b"").ca_pem.encode()
        except (MidgeError, ValueError):
            continue


def _is_of(certificate: bytes, key: bytes) -> bool:
    try:
        Authority.load(certificate, key)
    except LocalError:
        return False
    return True


def _check_same(home: Home, made: Authority) -> None:
    """Nobody could come in if the key were of another CA than the one that certified us all."""
    found = [data for each in machines(home.folder) if (data := read_if_there(each.certificate))]
    readable = [data for data in found if _facts(data) is not None]
    if readable and not any(made.issued(data) for data in readable):
        raise from_backup(home.folder / "ca" / "ca-key.pem", "the key of another CA")


def _brokers_ca(home: Home, authority: Authority) -> Iterator[Repaired]:
    fault = brokers_ca_fault(home.folder)
    if fault:
        write_public(home.broker / CA_FILE, authority.certificate)
        yield Repaired(fault, "copied from ca/")


# ── Broker, server, operator ────────────────────────────────────────────────────────────


def _machine(
    home: Home, db: Database, this: Machine, authority: Authority, hosts: Sequence[str],
    now: datetime,
) -> Iterator[Repaired]:  # fmt: skip
    old = _facts(read_if_there(this.certificate) or b"")
    fault = this.fault_in_fleet(authority.certificate, now)
    wanted = _hosts(home, old, hosts) if this.name == "broker" else []
    hosts_now = old.hosts if old else ()
    if not fault and set(wanted) <= set(hosts_now):
        return
    if old is not None:  # good until it ends, and only what is noted can be revoked
        _note(db, old)
    key = _kept(this)
    issued = _issue(authority, this, wanted, now, key)
    if not key:
        write_private(this.key, issued.key)
    write_public(this.certificate, issued.certificate)
    named = f", for {', '.join(wanted)}" if wanted else ""
    yield Repaired(
        fault or f"{this.certificate} names {', '.join(hosts_now)} only",
        f"{'certified again; the key stays' if key else 'a new key and certificate'}{named}",
    )


def _hosts(home: Home, old: CertificateFacts | None, more: Sequence[str]) -> list[str]:
    """What the broker is called: as in its certificate, or as far as that can be known without."""
    known = old.hosts if old and old.hosts else (home.config().broker.host, *_HERE)
    return list(dict.fromkeys([*known, *more]))


_HERE = ("localhost", "127.0.0.1")


def _facts(pem: bytes) -> CertificateFacts | None:
    try:
        return read_certificate(pem)
    except LocalError:
        return None


def _note(db: Database, old: CertificateFacts) -> None:
    noted = Certificate(serial=f"{old.serial:x}", device=old.name, until=old.expires.timestamp())
    with db.transaction() as tx:
        tx.add_certificate(noted)


def _kept(this: Machine) -> bytes:
    """The key that is there; none if a new one must be made. A damaged one is put aside."""
    found = read_if_there(this.key)
    if found is None:
        return b""
    try:
        read_key(found)
    except LocalError as error:
        if is_key(found):
            raise LocalError(
                f"{this.key}: {error}; put the key that midge made back from a backup, or move "
                "this one away and repair again"
            ) from None
        aside = this.key.with_name(this.key.name + ".damaged")
        with disk_errors(aside):
            REAL_DISK.rename(this.key, aside)
        sync_folder(aside.parent)
        return b""
    return found


def _issue(
    authority: Authority, this: Machine, hosts: Sequence[str], now: datetime, key: bytes
) -> Issued:
    if this.name == "broker":
        return authority.issue_for_broker(hosts, now=now, of_key=key)
    if this.name == "server":
        return authority.issue_for_server(now=now, of_key=key)
    return authority.issue_for_operator(now=now, of_key=key)
