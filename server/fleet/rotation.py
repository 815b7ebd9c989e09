"""Renewing what the fleet itself has: the server's keys, and the certificates of the machines.

Each step is one file, written whole or not at all, so a command that was interrupted is given
again. A server that is running looks at its keys every second and goes on with the new ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from broker_bridge.disk import REAL_DISK, Disk, disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import fingerprint, random_bytes
from server.fleet.certificates import CertificateFacts, read_certificate, write_public
from server.fleet.home import Home
from server.fleet.keys import ServerKeys, read_root
from server.fleet.machines import MADE_AGAIN, certificate_fault, machines
from server.store.database import Database
from server.store.rows import Certificate

__all__ = ["HeldKey", "certificates", "keys_of", "renew_certificates", "rotate_identity"]


@dataclass(frozen=True)
class HeldKey:
    """A key of the server, as a person may see it. Times are seconds since 1970; 0: not known."""

    name: str
    fingerprint: str
    number: int
    since: float


def keys_of(keys: ServerKeys) -> list[HeldKey]:
    """What there is, without a secret."""
    said = keys.said
    return [
        HeldKey("root", fingerprint(keys.root_public), 1, 0.0),
        HeldKey("server signs", fingerprint(said.sign_public), said.sequence, said.issued_at),
        HeldKey("server opens", fingerprint(said.kem_public), said.sequence, said.issued_at),
        # Of a secret nothing is shown, not even a digest.
        HeldKey("fleet key", "", keys.fleet_epoch, keys.fleet_since),
    ]


def certificates(home: Home) -> Iterator[tuple[str, Path, CertificateFacts]]:
    """The certificates of the machines: whose, where, and what they say. Raises LocalError."""
    named = [("ca", home.folder / "ca" / "ca.pem")]
    for name, path in named + [(each.name, each.certificate) for each in machines(home.folder)]:
        fault = certificate_fault(path)
        if fault:
            raise LocalError(f"{fault}; {MADE_AGAIN.format(home.folder)}")
        with disk_errors(path):
            yield name, path, read_certificate(path.read_bytes())


def rotate_identity(home: Home, root_file: Path, *, disk: Disk = REAL_DISK) -> ServerKeys:
    """Give the server new keys under the root. Raises LocalError, and nothing changed."""
    root, now = read_root(root_file), datetime.now(UTC).timestamp()
    return home.change_keys(
        lambda keys: keys.with_next_identity(root, random_bytes, now=now), disk=disk
    )


def renew_certificates(
    home: Home, db: Database, *, now: datetime
) -> list[tuple[str, CertificateFacts]]:
    """Certify broker, server and operator again, each for the key that it has.

    The old certificates are good until they end, so they are noted first: only what is noted
    can be revoked.
    """
    home.check_clock(now)
    authority = home.authority()
    renewed: list[tuple[str, CertificateFacts]] = []
    for name, path, old in certificates(home):
        if name == "ca":
            continue
        noted = Certificate(
            serial=f"{old.serial:x}", device=old.name, until=old.expires.timestamp()
        )
        with db.transaction() as tx:
            tx.add_certificate(noted)
        pem = authority.renew(path.read_bytes(), now=now)
        write_public(path, pem)
        renewed.append((name, read_certificate(pem)))
    return renewed
