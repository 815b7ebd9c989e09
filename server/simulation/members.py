"""Devices enrolled in bulk, and the file that says who they are.

For simulation only: it makes the secrets that a real device makes itself, keeps them in the
fleet's folder `simulated/`, and marks the devices as simulated.
"""

import contextlib
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.wire.enrolment import server_identity
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, SignKey, random_bytes
from broker_bridge.wire.members import Member, Members
from server.fleet.authority import Authority
from server.fleet.home import Home
from server.store.database import Database
from server.store.rows import Device

__all__ = ["enrol_members"]

_MEMBERS_FILE = "members.msgpack"
_SOFTWARE = "simulated"


def enrol_members(home: Home, count: int) -> Path:
    """Make `count` enrolled devices, those made before among them; return the file that says who.

    A real device makes its keys itself and enrols over the broker.
    """
    path = home.folder / "simulated" / _MEMBERS_FILE
    with disk_errors(path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    members = _made_before(path)[:count]
    now, authority = time.time(), home.authority()
    with contextlib.closing(Database(home.database)) as db, db.transaction() as tx:
        for number in range(len(members), count):
            member, device = _made_up(f"sim-{number:05d}", authority, now)
            tx.add_device(device)
            members.append(member)
    write_atomic(path, msgspec.msgpack.encode(_all(home, authority, members)))
    return path


def _made_before(path: Path) -> list[Member]:
    if not path.exists():
        return []
    return msgspec.msgpack.decode(path.read_bytes(), type=Members).members


def _made_up(name: str, authority: Authority, now: float) -> tuple[Member, Device]:
    """One more device: its secrets, and what the server knows of it."""
    sign_seed, kem_seed, tls_seed, psk = (random_bytes(KEY_BYTES) for _ in range(4))
    tls_public = SignKey.from_seed(tls_seed).public
    certificate = authority.issue_for_public_key(
        tls_public, name, now=datetime.fromtimestamp(now, UTC)
    )
    member = Member(
        device=name, sign_seed=sign_seed, kem_seed=kem_seed, tls_seed=tls_seed, psk=psk,
        certificate_pem=certificate.decode(),
    )  # fmt: skip
    device = Device(
        name=name, sign_public=SignKey.from_seed(sign_seed).public,
        kem_public=KemKey.from_seed(kem_seed).public, tls_public=tls_public, psk=psk,
        software=_SOFTWARE, enrolled_at=now,
    )  # fmt: skip
    return member, device


def _all(home: Home, authority: Authority, members: list[Member]) -> Members:
    keys, broker = home.keys(), home.config().broker
    server = server_identity(keys.root_public, keys.federation, keys.identity)
    return Members(
        federation=keys.federation, broker_host=broker.host, broker_port=broker.port,
        root_public=keys.root_public, server_sign=server.sign_public,
        server_kem=server.kem_public, fleet_epoch=keys.fleet_epoch, fleet_key=keys.fleet_key,
        ca_pem=authority.certificate.decode(), members=members,
    )  # fmt: skip
