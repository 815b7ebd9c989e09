"""Files from an operator, and files that a dying card gives back wrong."""

import base64
import contextlib
import functools
import io
import json
import re
import shutil
import tarfile
import tempfile
from datetime import UTC
from pathlib import Path

import msgspec

from broker_bridge.config import load_config
from broker_bridge.errors import MidgeError
from broker_bridge.link.inspection import certificate_dates
from broker_bridge.wire import enrolment, messages, weights
from broker_bridge.wire.chunks import (
    CHUNK_OVERHEAD_BYTES,
    ChunkHeader,
    Layout,
)
from broker_bridge.wire.enrolment import Bundle, Credentials
from broker_bridge.wire.envelope import KemKey, SignKey
from broker_bridge.wire.messages import Init
from broker_bridge.wire.topics import Topics, is_name
from broker_bridge.wire.update import seal_update
from device_client import identity as identities
from device_client.access import access_to_enrol
from device_client.config import DeviceConfig
from device_client.journal import Journal
from device_client.outbox import Outbox
from server.config import ServerConfig
from server.fleet.backup import back_up, restore
from server.fleet.home import Home, create
from server.fleet.sealed_file import Cost, Reader, Writer
from server.store.database import Database
from server.store.spool import Spool
from tests.fuzz.target import (
    CORPUS,
    DEVICE_KEM,
    ROUND_KEM,
    SERVER_KEM,
    SIGN,
    folder,
    key,
    split,
)
from tests.fuzz.wire import BINDING, CHUNK_KEY, SMALL, TRANSFER

__all__ = [
    "LOGIN",
    "backup",
    "backup_seeds",
    "bundle",
    "bundle_seed",
    "certificate",
    "certificate_seeds",
    "config",
    "config_seeds",
    "journal",
    "journal_seeds",
    "outbox",
    "outbox_file",
    "server_file_seeds",
    "server_files",
]


LOGIN = Credentials(username="u", password="p", certificate_pem="PEM", key_pem="PEM")


def bundle(data: bytes) -> None:
    found = Bundle.decode(data)
    repr(found)
    path = folder("bundle") / "one.bundle"
    path.write_bytes(data)
    identities.read_bundle(path)
    # What a device does with it first.
    Topics(found.federation)
    assert is_name(found.device)
    assert 1 <= found.broker_port <= 65_535
    access = access_to_enrol(folder("bundle"), found)
    assert access.port == found.broker_port
    assert len((access.username or "").encode()) <= 65_535


@functools.cache
def bundle_seed(broker: Credentials | msgspec.UnsetType = msgspec.UNSET) -> bytes:
    root = SignKey.from_seed(key(12))
    identity = messages.ServerIdentity(
        federation="demo", sign_public=SIGN.public, kem_public=SERVER_KEM.public, issued_at=1.0
    )
    return Bundle(
        federation="demo", device="ward-1", broker_host="localhost", broker_port=8883,
        root_public=root.public.hex(),
        server_identity=enrolment.sign_server_identity(root, identity).hex(),
        token=key(5).hex(), token_expires="2026-01-01", ca_pem="PEM",
        bootstrap_certificate_pem="PEM", bootstrap_key_pem="PEM", broker=broker,
    ).encode()  # fmt: skip


def certificate(data: bytes) -> None:
    """PEM by an attacker, and DER that he wrapped."""
    mode, rest = split(data, 2)
    if mode:
        rest = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(rest)
        rest += b"-----END CERTIFICATE-----\n"
    begins, ends = certificate_dates(rest)
    assert begins.tzinfo is ends.tzinfo is UTC


def certificate_seeds() -> list[bytes]:
    pems = [path.read_bytes() for path in sorted((CORPUS / "certificate").glob("*.pem"))]
    ders = [base64.b64decode(b"".join(pem.splitlines()[1:-1])) for pem in pems]
    return [b"\x00" + pem for pem in pems] + [b"\x01" + der for der in ders]


def backup(data: bytes) -> None:
    """A backup as somebody may have altered it, and what one holds, sealed anew by an insider."""
    mode, rest = split(data, 2)
    place = folder("backup")
    path, into = place / "one.backup", place / "restored"
    if mode == 0:  # no more may be asked of us than the cheapest: the rest is only slow
        path.write_bytes(rest[:15] + _PASSES_AND_KIB + rest[23:])
    else:
        with path.open("wb") as out:
            writer = Writer(out, _WORDS, cost=_CHEAP)
            writer.write(rest)
            writer.finish()
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    try:
        restore(path, into, _WORDS, now=0.0)
    except MidgeError:
        assert not any(into.iterdir()), "half a fleet was left"
        raise
    assert is_name(Home.find(into).keys().federation)
    assert {found.name for found in place.iterdir()} == {path.name, into.name}


_WORDS = "four words nobody guesses"
_CHEAP = Cost(passes=1, memory_kib=8)
_PASSES_AND_KIB = bytes([0, 0, 0, 1, 0, 0, 0, 8])


@functools.cache
def backup_seeds() -> tuple[bytes, ...]:
    place = Path(tempfile.mkdtemp(prefix="midge-fuzz-fleet-", dir=folder("backed up")))
    home = create(place / "fleet", federation="demo", hosts=["localhost"], port=1)
    (home.state / "models").mkdir()
    with contextlib.closing(Database(home.database)):
        pass
    back_up(home, place / "one.backup", _WORDS, now=0.0, cost=_CHEAP)
    whole = (place / "one.backup").read_bytes()
    tar = Reader(io.BytesIO(whole), _WORDS, name="seed").read(len(whole))
    member = tarfile.TarInfo("keys/server.json")
    member.size, member.pax_headers = 5, {"comment": "x" * 600}
    small = io.BytesIO()
    with tarfile.open(mode="w|", fileobj=small, format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"a key"))
    return b"\x00" + whole, b"\x01" + tar, b"\x01" + small.getvalue()


def config(data: bytes) -> None:
    mode, rest = split(data, 2)
    path = folder("config") / "settings.toml"
    path.write_bytes(rest)
    kinds: tuple[type[msgspec.Struct], ...] = (ServerConfig, DeviceConfig)
    load_config(path, kinds[mode])


def config_seeds() -> list[bytes]:
    from device_client.config import EXAMPLE as DEVICE
    from server.config import EXAMPLE as SERVER

    full = re.sub("(?m)^# (?=[a-z_]+ = )", "",
                  SERVER.format(federation="demo", host="localhost", port=8883))  # fmt: skip
    return [
        b"\x00" + SERVER.format(federation="demo", host="localhost", port=8883).encode(),
        b"\x00" + full.encode(),
        b"\x00tasks = ['a']\n[rounds]\ntarget = 3\ndeadline_s = 5.5\n[evaluation]\nnpz = 'x'\n",
        b"\x01" + DEVICE.encode(),
        b"\x01data = 'npz:a'\nrole = 'evaluate'\nthreads = 2\nbroker_port = 1\n",
    ]


def outbox(data: bytes) -> None:
    """The sealed update as a dying card gives it back. Damage is forgotten, never a crash."""
    box = Outbox(folder("outbox"))
    (folder("outbox") / "update.sealed").write_bytes(data)
    init = box.load()
    if init is None:
        assert box.load() is None
        return
    for index in (0, init.layout.count - 1):
        chunk = box.chunk(init.upload, index)
        assert len(chunk) == init.layout.size(index) + CHUNK_OVERHEAD_BYTES


@functools.cache
def outbox_file() -> bytes:
    sealed = seal_update(
        weights.encode(SMALL), BINDING, round_key=ROUND_KEM.public, sender=DEVICE_KEM,
        psk=key(5), ephemeral=KemKey.from_seed(key(8)), packet_bytes=1024,
    )  # fmt: skip
    init = Init(
        round=1, announcement=key(7), upload=TRANSFER, enc=sealed.enc,
        total_bytes=sealed.layout.total_bytes, body_bytes=sealed.layout.body_bytes,
        tags=sealed.tags, examples=10, train_s=0.1,
    )  # fmt: skip
    made = Path(tempfile.mkdtemp(dir=folder("outbox")))
    Outbox(made).put(init, sealed)
    return (made / "update.sealed").read_bytes()


JOURNAL_FILES = ("rounds.json", "boots", "identity.json", "enrolling.json")


def journal(data: bytes) -> None:
    """Each small file of a device, damaged."""
    mode, rest = split(data, len(JOURNAL_FILES))
    place = folder("journal")
    (place / JOURNAL_FILES[mode]).write_bytes(rest)
    kept = Journal(place)
    if mode == 0:
        memory = kept.memory()
        assert 0 <= memory.round <= 2**53
    elif mode == 1:
        assert 1 <= kept.boot() <= 2**53
    elif mode == 2:
        found = identities.load(place)
        assert found is not None
        Topics(found.federation)
        assert is_name(found.device)
        _ = found.keys.sign, found.keys.kem, found.keys.tls_public, repr(found)
        assert len(found.psk) == len(found.fleet_key) == 32
        identities.tls_files(place, found)
    else:
        keys = identities.pending_keys(place)
        _ = keys.sign, keys.kem, keys.tls_public


def journal_seeds() -> list[bytes]:
    memory = {"round": 7, "digest": "oKCgoA==", "done": True, "evaluated_version": 3}
    keys = identities.Keys(key(1), key(2), key(3))
    identity = identities.Identity(
        federation="demo", device="ward-1", broker_host="localhost", broker_port=8883,
        root_public=key(4), server_sign=key(5), server_kem=key(6), keys=keys, psk=key(7),
        fleet_epoch=1, fleet_key=key(8), ca_pem="PEM", certificate_pem="PEM",
    )  # fmt: skip
    return [
        b"\x00" + json.dumps(memory).encode(),
        b"\x0112",
        b"\x02" + msgspec.json.encode(identity),
        b"\x02" + msgspec.json.encode(msgspec.structs.replace(identity, broker=LOGIN)),
        b"\x03" + msgspec.json.encode(keys),
    ]


def server_files(data: bytes) -> None:
    """The server's keys, and a file of its spool, damaged."""
    mode, rest = split(data, 2)
    place = folder("server")
    if mode == 0:
        (place / "keys").mkdir(exist_ok=True)
        (place / "keys" / "server.json").write_bytes(rest)
        found = Home(place).keys()
        _ = found.sign, found.kem, repr(found)
        assert is_name(found.federation)
        assert len(found.fleet_key) == 32
        return
    spool_folder = place / "spool"
    spool_folder.mkdir(exist_ok=True)
    (spool_folder / f"{TRANSFER.hex()}.update").write_bytes(rest)
    spool = Spool(spool_folder)
    layout = Layout(200, 64)
    spool.begin(TRANSFER, layout)
    if spool.complete(TRANSFER):
        assert len(list(spool.chunks(TRANSFER, layout))) == layout.count
    assert spool.bytes_held >= len(rest) or len(rest) > 200
    spool.close()


def server_file_seeds() -> list[bytes]:
    place = Path(tempfile.mkdtemp(dir=folder("server")))
    home = create(place / "fleet", federation="demo", hosts=["localhost"], port=1)
    keys = (home.folder / "keys" / "server.json").read_bytes()
    whole = b""
    for index, size in enumerate((64, 64, 64, 8)):
        header = ChunkHeader(TRANSFER, index, 4).encode()
        whole += header + CHUNK_KEY.seal(index, bytes(size), header)
    return [b"\x00" + keys, b"\x01" + whole, b"\x01" + whole[:150]]
