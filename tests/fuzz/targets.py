"""Every parser of bytes that come from outside, as a function that is fed any bytes at all.

A target raises nothing but MidgeError, which `check` takes for the answer it is. Anything
else is a fault: another exception, an invariant that an assertion names, or memory out of
proportion to the input. Where a signature or a seal would stop random bytes at the door, a
target also plays the insider: it signs or seals the bytes with a real key.

The first byte of most inputs chooses a mode, modulo how many there are.
"""

import atexit
import base64
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import select
import shutil
import socket
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from broker_bridge.config import load_config
from broker_bridge.errors import LocalError, MidgeError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.inspection import certificate_dates
from broker_bridge.link.paho_session import Connection, PahoSession, SessionSettings
from broker_bridge.task.samples import preprocess
from broker_bridge.task.taskfile import Plan, Task, decode_plan, decode_task
from broker_bridge.wire import enrolment, messages, weights
from broker_bridge.wire.chunks import (
    CHUNK_OVERHEAD_BYTES,
    ChunkHeader,
    Layout,
    Reassembler,
    bitmap_of,
    chunk_header,
    missing_in,
    open_chunk,
    tags_digest,
)
from broker_bridge.wire.enrolment import Bundle, Contact
from broker_bridge.wire.envelope import ChunkKey, KemKey, SignKey, exchange_to, seal_message, sha256
from broker_bridge.wire.messages import Configured, Enrol, Init, Welcome
from broker_bridge.wire.topics import DeviceState, DownTopic, Topics, UpTopic, is_name
from broker_bridge.wire.update import Binding, open_update, seal_update, update_key
from device_client import identity as identities
from device_client.agent import Agent
from device_client.config import DeviceConfig
from device_client.journal import Journal
from device_client.outbox import Outbox
from server.aggregation.bounds import check_update
from server.config import ServerConfig
from server.fleet.home import Home
from server.store.spool import Spool
from tests.broker_bridge.wire.test_messages import BINARY, JSON
from tests.fleets import FEDERATION, TASK, TOPICS, Hand, World
from tests.simulation.work import SimulatedTrainer, Trainings

__all__ = ["CORPUS", "TARGETS", "Target", "check", "checked_for_memory", "seeds_of"]

CORPUS = Path(__file__).parent / "corpus"
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """`run` takes any bytes; `seeds` are valid inputs. Memory: `base_bytes` + `factor` × input."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    base_bytes: int = 1 * MIB
    factor: int = 64
    is_slow: bool = False  # a server, a socket or a disk is behind it


def check(target: Target, data: bytes) -> None:
    """Feed `data`; only a fault comes out."""
    said = ""
    try:
        target.run(data)
    except MidgeError as error:
        said = str(error)
    # What a person reads in a log is bounded, whatever was sent.
    assert len(said) < 4 * LIMITS.control_bytes_max, f"{len(said)} characters"


def checked_for_memory(target: Target, data: bytes) -> None:
    """`check`, and fail if Python's heap and numpy's grew out of proportion on the way."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        check(target, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allowed = target.base_bytes + target.factor * len(data)
    assert peak - before <= allowed, f"{len(data)} bytes made {peak - before} bytes of memory"


def seeds_of(target: Target) -> list[bytes]:
    """The valid inputs, and those in the corpus: past crashers among them."""
    folder = CORPUS / target.name
    files = sorted(p for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    return target.seeds() + [path.read_bytes() for path in files]


def _split(data: bytes, modes: int) -> tuple[int, bytes]:
    return (data[0] % modes, data[1:]) if data else (0, b"")


@functools.cache
def folder(name: str) -> Path:
    """A folder for one target, in memory where that is possible: most writes are fsynced."""
    given, shm = os.environ.get("MIDGE_FUZZ_FOLDER"), Path("/dev/shm")
    place = given or (shm if shm.is_dir() else None)
    made = Path(tempfile.mkdtemp(prefix=f"midge-fuzz-{name}-", dir=place))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def key(number: int) -> bytes:
    """32 bytes that are the same in every process, so that findings can be replayed."""
    return bytes([number]) * 32


SIGN = SignKey.from_seed(key(1))
SERVER_KEM, DEVICE_KEM, ROUND_KEM = (KemKey.from_seed(key(n)) for n in (2, 3, 4))
CONTACT = Contact("demo", "ward-1", key(5))


# ── Topics ──────────────────────────────────────────────────────────────────────────────


def topics(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    match TOPICS.parse(text):
        case UpTopic(shard, device, kind):
            assert is_name(device)
            assert TOPICS.parse(TOPICS.up(shard, device, kind)) == UpTopic(shard, device, kind)
        case DownTopic(device, kind):
            assert text == TOPICS.down(device, kind)
        case DeviceState(device):
            assert text == TOPICS.state(device)


def topic_seeds() -> list[bytes]:
    return [
        t.encode()
        for t in (
            TOPICS.ctl, TOPICS.ctl_reply, TOPICS.srv, TOPICS.round, TOPICS.metrics,
            TOPICS.task(0), TOPICS.model(65_535), TOPICS.state("ward-1"),
            TOPICS.up(7, "ward-1", "data"), TOPICS.down("ward-1", "go"),
            "midge/v1/demo/up/007/ward-1/data", "midge/v1/demo/up/٣/ward-1/data",
        )
    ]  # fmt: skip


# ── Messages ────────────────────────────────────────────────────────────────────────────

BINARY_KINDS = [type(each) for each in BINARY]
JSON_KINDS = [type(each) for each in JSON]


def messages_binary(data: bytes) -> None:
    mode, rest = _split(data, len(BINARY_KINDS))
    message = messages.decode(rest, BINARY_KINDS[mode])
    _holds(message)
    assert messages.decode(messages.encode(message), BINARY_KINDS[mode]) == message
    if hasattr(message, "layout"):
        assert 1 <= message.layout.count <= LIMITS.chunks_max


def messages_json(data: bytes) -> None:
    mode, rest = _split(data, len(JSON_KINDS))
    message = messages.decode_json(rest, JSON_KINDS[mode])
    _holds(message)
    assert messages.decode_json(messages.encode_json(message), JSON_KINDS[mode]) == message


def _holds(message: Any) -> None:
    """No number in a message is NaN or infinite, and it can be shown."""
    repr(message)
    for value in msgspec.structs.asdict(message).values():
        if isinstance(value, float):
            assert -1e300 <= value <= 1e300


def signed(data: bytes) -> None:
    mode, rest = _split(data, 2 * len(BINARY_KINDS))
    kind = BINARY_KINDS[mode // 2]
    sent = rest if mode % 2 else SIGN.sign("round demo", rest)
    messages.opened(SIGN.public, "round", "demo", sent, kind)


def signed_seeds() -> list[bytes]:
    inside = [bytes([2 * i]) + messages.encode(m) for i, m in enumerate(BINARY)]
    outside = [
        bytes([2 * i + 1]) + messages.signed(SIGN, "round", "demo", m)
        for i, m in enumerate(BINARY[:4])
    ]
    return inside + outside


# ── Chunks and updates ──────────────────────────────────────────────────────────────────

CHUNK_KEY = ChunkKey(key(6))
TRANSFER = b"transfer"


def chunks(data: bytes) -> None:
    mode, rest = _split(data, 4)
    if mode == 0:
        header = chunk_header(rest)
        assert header.encode() == rest[:24]
        assert header.index < header.count <= LIMITS.chunks_max
    elif mode == 1:
        open_chunk(rest, CHUNK_KEY)
    elif mode == 2:
        bits, tail = rest[1:8193], (rest[0] if rest else 0)
        count = max(0, 8 * len(bits) - tail % 8)
        if count:
            assert bitmap_of(missing_in(bits, count), count)[:-1] == bits[:-1]
    else:
        _reassemble(rest)


def _reassemble(data: bytes) -> None:
    """Chunks of an insider, whose seals fit and whose headers say anything."""
    total, body = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4))
    pieces = Reassembler(Layout(total, body), transfer=TRANSFER, key=CHUNK_KEY)
    rest, held = data[8:], 0
    while rest:
        index, count, length = rest[0], int.from_bytes(rest[1:5], "little"), rest[5:6]
        cut = 6 + (length[0] if length else 0)
        header = ChunkHeader(TRANSFER, index, count).encode()
        body_bytes = rest[6:cut]
        try:
            pieces.add(header + CHUNK_KEY.seal(index, body_bytes, header))
            held += len(body_bytes)
        except PeerError:
            pass
        rest = rest[cut:]
    assert pieces.held <= pieces.layout.count
    assert held >= (total if pieces.complete else 0)
    if pieces.complete:
        assert len(pieces.message()) == total


def chunk_seeds() -> list[bytes]:
    header = ChunkHeader(TRANSFER, 0, 2).encode()
    sealed = header + CHUNK_KEY.seal(0, b"body", header)
    whole = (6).to_bytes(4, "little") + (4).to_bytes(4, "little")
    whole += b"\x00" + (2).to_bytes(4, "little") + b"\x04body"
    whole += b"\x01" + (2).to_bytes(4, "little") + b"\x02en"
    return [b"\x00" + sealed, b"\x01" + sealed, b"\x02\x03\xff\x1f", b"\x03" + whole]


BINDING = Binding("demo", "ward-1", key(7), TRANSFER)
SMALL = {"w": np.array([[0.5, -1.25]], np.float32), "b": np.zeros(3, np.float32)}


def update(data: bytes) -> None:
    """A member seals what it likes, in chunks of any size, and damages them on the way."""
    mode, rest = _split(data, 3)
    packet = LIMITS.packet_bytes_min + (rest[0] if rest else 0)
    sealed = seal_update(
        rest[1:] or b"\x00", BINDING, round_key=ROUND_KEM.public, sender=DEVICE_KEM, psk=key(5),
        ephemeral=KemKey.from_seed(key(8)), packet_bytes=packet,
    )  # fmt: skip
    enc, sent = sealed.enc, list(sealed.chunks)
    if mode == 1:
        enc = rest[:32]
    if mode == 2:
        sent = [rest[: CHUNK_OVERHEAD_BYTES + 1], *sent[1:]]
    opener = update_key(enc, BINDING, round_key=ROUND_KEM, sender=DEVICE_KEM.public, psk=key(5))
    opened = open_update(sent, opener, tags=tags_digest(sent) if mode else sealed.tags)
    assert mode or opened == (rest[1:] or b"\x00")
    found = weights.decode(opened)
    weights.check(found, weights.specs_of(SMALL))
    check_update(found, delta_bound=10.0)


def enrol(data: bytes) -> None:
    """Bytes on `enrol` and `cfg`: raw, and sealed by someone who holds the true token."""
    mode, rest = _split(data, 4)
    if mode == 0:
        enrolment.accept(CONTACT, messages.decode(rest, Enrol), server_kem=SERVER_KEM)
    elif mode == 1:
        asked = Enrol(device="ward-1", kem_public=DEVICE_KEM.public, **_sealed("enrol", rest))
        secret = enrolment.accept(CONTACT, asked, server_kem=SERVER_KEM)
        assert len(secret.sign_public) == 32
    elif mode == 2:
        answer = messages.decode(rest, Welcome)
        enrolment.open_welcome(CONTACT, answer, kem=DEVICE_KEM, server_kem=SERVER_KEM.public)
    else:
        answer = Welcome(**_sealed("welcome", rest))
        found = enrolment.open_welcome(
            CONTACT, answer, kem=DEVICE_KEM, server_kem=SERVER_KEM.public
        )
        assert "fleet_key" not in repr(found)


def _sealed(what: str, data: bytes) -> dict[str, bytes]:
    sender, receiver = (
        (DEVICE_KEM, SERVER_KEM.public) if what == "enrol" else (SERVER_KEM, DEVICE_KEM.public)
    )
    purpose = f"midge v1 {what}".encode()
    exchange = exchange_to(
        receiver, ephemeral=KemKey.from_seed(key(9)), sender=sender, info=purpose,
        psk=CONTACT.token, psk_id=CONTACT.psk_id,
    )  # fmt: skip
    return {"enc": exchange.enc, "sealed": seal_message(exchange, purpose, data)}


def enrol_seeds() -> list[bytes]:
    asked = enrolment.request(
        CONTACT, sign=SIGN, kem=DEVICE_KEM, tls_public=key(10), server_kem=SERVER_KEM.public,
        ephemeral=KemKey.from_seed(key(9)), software="fuzz",
    )  # fmt: skip
    secret = enrolment.accept(CONTACT, asked, server_kem=SERVER_KEM)
    configured = Configured(
        device="ward-1", certificate_pem="PEM", fleet_epoch=1, fleet_key=key(11)
    )
    answer = enrolment.welcome(
        CONTACT, configured, device_kem=DEVICE_KEM.public, server_kem=SERVER_KEM,
        ephemeral=KemKey.from_seed(key(9)),
    )  # fmt: skip
    said = (asked, secret, answer, configured)
    return [bytes([mode]) + messages.encode(each) for mode, each in enumerate(said)]


# ── Weights and tasks ───────────────────────────────────────────────────────────────────


def decode_weights(data: bytes) -> None:
    """Raw bytes, and a header that was changed as a list before the values it describes."""
    mode, rest = _split(data, 2)
    if mode:
        values = weights.encode(SMALL)[-20:]
        rest = b"mgw1" + len(rest).to_bytes(4, "little") + rest + values
    found = weights.decode(rest)
    assert sum(a.nbytes for a in found.values()) <= len(rest)
    for array in found.values():
        assert array.dtype.kind != "f" or np.isfinite(array).all()
    again = weights.decode(weights.encode(found))
    assert weights.specs_of(again) == weights.specs_of(found)
    weights.check(found, weights.specs_of(SMALL))


def weight_seeds() -> list[bytes]:
    header = msgspec.msgpack.encode(weights.specs_of(SMALL))
    return [b"\x00" + weights.encode(SMALL), b"\x01" + header]


TFLITE = b"not a model, but as long as one likes"


def task(data: bytes) -> None:
    """Task files, whole or by header; what the header says is then used as a device uses it."""
    mode, rest = _split(data, 3)
    if mode == 0:
        decode_plan(rest)
        return
    if mode == 1:
        decode_task(rest)
        return
    file = b"midge-task 1\n" + len(rest).to_bytes(4, "little") + rest
    _use(decode_plan(file + TFLITE))


def _use(plan: Plan) -> None:
    found: Task = plan.task
    assert found.parameters >= 0
    for channels in (1, 6):
        with contextlib.suppress(LocalError):
            preprocess(found, np.zeros((60, channels), np.float32))


def task_seeds() -> list[bytes]:
    content = (CORPUS.parents[1] / "broker_bridge" / "task" / "version_1.task").read_bytes()
    plan, _ = decode_task(content)
    small = msgspec.to_builtins(plan.task)
    small |= _as_tflite()
    wearables = msgspec.to_builtins(decode_task(TASK.read_bytes())[0].task) | _as_tflite()
    recorded = small | {"preprocessing": [
        {"step": "window", "samples": 20, "hop": 10},
        {"step": "standardise", "mean": [0.5] * 6, "scale": [2.0] * 6},
    ]}  # fmt: skip
    headers = [msgspec.json.encode(each) for each in (small, wearables, recorded)]
    return [b"\x00" + content, b"\x01" + content, *(b"\x02" + each for each in headers)]


def _as_tflite() -> dict[str, Any]:
    return {"tflite_digest": hashlib.sha256(TFLITE).hexdigest(), "tflite_bytes": len(TFLITE)}


# ── Files on a card or from an operator ─────────────────────────────────────────────────


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
    identities.bootstrap_files(folder("bundle"), found)


@functools.cache
def _bundle() -> bytes:
    root = SignKey.from_seed(key(12))
    identity = messages.ServerIdentity(
        federation="demo", sign_public=SIGN.public, kem_public=SERVER_KEM.public, issued_at=1.0
    )
    return Bundle(
        federation="demo", device="ward-1", broker_host="localhost", broker_port=8883,
        root_public=root.public.hex(),
        server_identity=enrolment.sign_server_identity(root, identity).hex(),
        token=key(5).hex(), token_expires="2026-01-01", ca_pem="PEM",
        bootstrap_certificate_pem="PEM", bootstrap_key_pem="PEM",
    ).encode()  # fmt: skip


def certificate(data: bytes) -> None:
    """PEM by an attacker, and DER that he wrapped."""
    mode, rest = _split(data, 2)
    if mode:
        rest = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(rest)
        rest += b"-----END CERTIFICATE-----\n"
    begins, ends = certificate_dates(rest)
    assert begins.tzinfo is ends.tzinfo is UTC


def certificate_seeds() -> list[bytes]:
    pems = [path.read_bytes() for path in sorted((CORPUS / "certificate").glob("*.pem"))]
    ders = [base64.b64decode(b"".join(pem.splitlines()[1:-1])) for pem in pems]
    return [b"\x00" + pem for pem in pems] + [b"\x01" + der for der in ders]


def config(data: bytes) -> None:
    mode, rest = _split(data, 2)
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
def _outbox_file() -> bytes:
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
    mode, rest = _split(data, len(JOURNAL_FILES))
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
        b"\x03" + msgspec.json.encode(keys),
    ]


def server_files(data: bytes) -> None:
    """The server's keys, and a file of its spool, damaged."""
    mode, rest = _split(data, 2)
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
    from server.fleet.home import create

    home = create(place / "fleet", federation="demo", hosts=["localhost"], port=1)
    keys = (home.folder / "keys" / "server.json").read_bytes()
    whole = b""
    for index, size in enumerate((64, 64, 64, 8)):
        header = ChunkHeader(TRANSFER, index, 4).encode()
        whole += header + CHUNK_KEY.seal(index, bytes(size), header)
    return [b"\x00" + keys, b"\x01" + whole, b"\x01" + whole[:150]]


# ── A whole server ──────────────────────────────────────────────────────────────────────


@functools.cache
def _world(name: str) -> World:
    logging.getLogger("midge").setLevel(logging.CRITICAL)
    world = World(folder(name), rounds={"deadline_s": 5.0})
    world.hand("ward-1")
    return world


def _say(world: World, topic: str, payload: bytes, *, retained: bool = False) -> None:
    """Hand the service one message, as its link would."""
    world.service.turn(Message(topic, payload, retained))
    world.settle()


def ctl(data: bytes) -> None:
    """Bytes on `ctl`, through a real server. Whatever they start is stopped again."""
    mode, rest = _split(data, 8)
    world = _world("ctl")
    if len(TOPICS.ctl) + len(rest) + 8 > world.link.limits.packet_bytes_max:
        return  # no broker would have let it through
    _say(world, TOPICS.ctl, rest, retained=mode == 7)
    for each in world.read_operator():
        if each.topic == TOPICS.ctl_reply:
            answer = json.loads(each.payload)
            assert answer["ok"] or answer["error"]
            assert len(each.payload) < 64 * 1024
    world.pass_time(6.0)
    world.tell(cmd="stop")


def ctl_seeds() -> list[bytes]:
    return [
        b"\x00" + json.dumps(each).encode()
        for each in (
            {"cmd": "status"}, {"cmd": "stop", "id": "a"}, {"cmd": "pause"}, {"cmd": "resume"},
            {"cmd": "start", "rounds": 2, "target": 1, "quorum": 1, "deadline_s": 4.5, "id": "x",
             "task": "wearables", "until": {"accuracy": 0.5}},
            {"cmd": "start", "task": "no-such-task", "until": {"loss": 1.0}},
        )
    ]  # fmt: skip


SAYINGS = ("state", "enrol", "join", "init", "data", "need", "report", "stranger")


ROUND_LASTS = 100  # inputs; a member has only so many attempts in one round


@dataclass
class Insider:
    """A member on line whose server has a round open, until it is used up."""

    world: World
    hand: Hand
    inputs: int = 0

    def refresh(self) -> None:
        """Open a new round if there is none, or if this one has heard enough."""
        self.inputs += 1
        if self.inputs % ROUND_LASTS == 0:
            self.world.tell(cmd="stop")
        if not self.world.ledger.has_open_round:
            self.world.tell(cmd="start", rounds=1000, target=1, quorum=1, deadline_s=1e6)

    def fitted(self, kind: str, data: bytes) -> bytes:
        """Fill in what a member knows of the round where a message says 0, so it gets further."""
        try:
            said = msgspec.msgpack.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return data
        if not isinstance(said, dict):
            return data
        ledger = self.world.ledger
        if said.get("announcement") == bytes(32):
            said |= {"announcement": self.hand.digest, "round": self.world.announcement().round}
        if said.get("digest") == bytes(32):
            said["digest"] = ledger.model_blob().digest
        if kind == "init" and said.get("upload") == bytes(8):
            said["upload"] = self.hand.heard[-1].upload if self._was_let_in() else bytes(8)
        if said.get("total_bytes") == 18_000:
            said["total_bytes"] = len(ledger.model_bytes)
        with contextlib.suppress(OverflowError):
            data = msgspec.msgpack.encode(said)
        return data

    def _was_let_in(self) -> bool:
        return bool(self.hand.heard) and hasattr(self.hand.heard[-1], "upload")

    def sealed(self, data: bytes) -> bytes:
        """Any bytes as a chunk of the upload that the server waits for, if it does."""
        opened = self.world.ledger._open
        uploads = list(opened.uploads.items()) if opened is not None else []
        if not uploads or not data:
            return data
        upload, incoming = uploads[-1]
        layout = incoming.init.layout
        index = data[0] % layout.count
        body = (data * layout.body_bytes)[: layout.size(index)]
        header = ChunkHeader(upload, index, layout.count).encode()
        return header + incoming.key.seal(index, body, header)


@functools.cache
def _insider() -> Insider:
    world = _world("service")
    identity = identities.load(world.folder / "ward-1")
    hand = Hand(world, identity)  # type: ignore[arg-type]
    hand.show("ready")
    world.settle()
    return Insider(world, hand)


def service(data: bytes) -> None:
    """A member says anything, signed, while a round is open for it."""
    mode, rest = _split(data, 2 * len(SAYINGS))
    kind, raw = SAYINGS[mode % len(SAYINGS)], mode >= len(SAYINGS)
    insider = _insider()
    insider.refresh()
    if kind in ("join", "init", "need", "report") and not raw:
        rest = insider.fitted(kind, rest)
        rest = insider.hand.identity.keys.sign.sign(f"{kind} demo/ward-1", rest)
    if kind == "data" and not raw:
        rest = insider.sealed(rest)
    who = "ward-2" if kind == "stranger" else "ward-1"
    topic = TOPICS.up(0, who, "join" if kind == "stranger" else kind)
    _say(insider.world, TOPICS.state(who) if kind == "state" else topic, rest[:60_000])
    del insider.hand.heard[:-1]
    insider.hand.listen()
    insider.world.read_operator()


def service_seeds() -> list[bytes]:
    said: dict[str, bytes] = {
        "state": messages.encode_json(messages.Presence(state="ready", boot=1)),
        "join": messages.encode(
            messages.Join(round=1, announcement=bytes(32), samples=10, packet_bytes_max=8192,
                          inflight_max=20)
        ),
        "init": messages.encode(
            Init(round=1, announcement=bytes(32), upload=bytes(8), enc=DEVICE_KEM.public,
                 total_bytes=18_000, body_bytes=7_896, tags=key(1), examples=10, train_s=0.1,
                 metrics={"loss": 1.0})
        ),
        "data": chunk_seeds()[1][1:],
        "need": messages.encode(messages.NeedBlob(kind="model", digest=bytes(32))),
        "report": messages.encode(
            messages.Report(round=1, model_version=1, examples=4, metrics={"accuracy": 0.5})
        ),
        "enrol": enrol_seeds()[0][1:],
        "stranger": b"x",
    }  # fmt: skip
    return [bytes([SAYINGS.index(kind)]) + data for kind, data in said.items()]


# ── A whole device ──────────────────────────────────────────────────────────────────────

HEARD = ("round", "go", "need", "ack", "cfg", "task", "model")
DEVICE_LASTS = 50  # inputs; a device that has heard of round 2**53 takes part in no other


class AtOnce:
    """A Background without a thread: work is done when it is begun."""

    stopping = False

    def __init__(self) -> None:
        self._events: list[Any] = []

    def start(self, work: Callable[[], list[Any]]) -> None:
        self._events = work()

    def stop(self) -> bool:
        return False

    def finished(self) -> list[Any]:
        found, self._events = self._events, []
        return found


@dataclass
class Listening:
    """A device over a broker that retains a true task and model, and the round it thinks is next.

    A new one takes its place now and then.
    """

    world: World
    announced: dict[str, Any]
    agent: Agent
    link: Any
    inputs: int = 0
    round: int = 0
    digest: bytes = bytes(32)

    def fitted(self, kind: str, data: bytes) -> bytes:
        """Fill in what the server knows where a message says 0, and sign it as the server does."""
        keys = self.world.ledger.keys
        try:
            said = msgspec.msgpack.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            said = None
        if isinstance(said, dict):
            if said.get("round") == 0:
                self.round += kind == "round"
                said["round"] = self.round
            for name, true in self.announced.items():
                if kind == "round" and said.get(name) == 0:
                    said[name] = true
            if said.get("announcement") == bytes(32):
                said["announcement"] = self.digest
            with contextlib.suppress(OverflowError):
                data = msgspec.msgpack.encode(said)
        if kind == "round":
            self.digest = sha256(data)
        scope = FEDERATION if kind == "round" else f"{FEDERATION}/ward-1"
        return keys.sign.sign(f"{kind} {scope}", data)


_now: list[Listening] = []


def _listening() -> Listening:
    world = _world("device")
    if not world.ledger.has_open_round:
        world.tell(cmd="start", rounds=1, target=1, quorum=1, deadline_s=1e6)
    if _now and _now[0].inputs < DEVICE_LASTS:
        return _now[0]
    if _now:
        _now.pop().link.close()
    place = world.folder / "ward-1"
    for path in (place / "rounds.json", place / "outbox" / "update.sealed"):
        path.unlink(missing_ok=True)
    identity = identities.load(place)
    link = world.broker.connect("the-device", session_s=0)
    agent = Agent(
        identity, link, journal=Journal(place), boot=1,  # type: ignore[arg-type]
        load=lambda _: SimulatedTrainer("ward-1", Trainings()), background=AtOnce(),
        clock=lambda: world.broker.now_s, draw=lambda: 0.5,
    )  # fmt: skip
    agent.begin()
    announced = msgspec.msgpack.decode(messages.encode(world.announcement()))
    true = {name: announced[name] for name in ("task", "model", "round_key", "fleet_epoch")}
    made = Listening(world, true, agent, link)
    _now.append(made)
    _quiet(made)
    return made


def _quiet(device: Listening) -> None:
    """Let the device hear and do what there is, but not for ever."""
    for _ in range(40):
        event = device.link.receive(0)
        device.agent.turn(event)
        if event is None:
            break


def device(data: bytes) -> None:
    """What a device hears: from a broker, and signed by a server that says anything."""
    mode, rest = _split(data, 2 * len(HEARD))
    kind, raw = HEARD[mode % len(HEARD)], mode >= len(HEARD)
    listening = _listening()
    listening.inputs += 1
    if not raw and kind not in ("task", "model"):
        rest = listening.fitted(kind, rest)
    topic = {"round": TOPICS.round, "task": TOPICS.task(0), "model": TOPICS.model(0)}.get(kind)
    listening.agent.turn(Message(topic or TOPICS.down("ward-1", kind), rest[:60_000]))
    _quiet(listening)
    listening.world.broker.advance(1.0)
    _quiet(listening)


def device_seeds() -> list[bytes]:
    announcement = msgspec.msgpack.decode(messages.encode(BINARY[2]))
    empty = dict.fromkeys(("round", "task", "model", "round_key", "fleet_epoch"), 0)
    go = messages.Go(round=0, announcement=bytes(32), upload=TRANSFER, shard=0,
                     packet_bytes=8192, window=20)  # fmt: skip
    said = {
        "round": msgspec.msgpack.encode(announcement | empty),
        "go": messages.encode(go),
        "need": messages.encode(messages.Need(upload=TRANSFER, bitmap=b"\x07")),
        "ack": messages.encode(messages.Ack(round=0, upload=TRANSFER, status="accepted")),
        "cfg": messages.encode(messages.Refused(reason="no")),
        "task": chunk_seeds()[1][1:],
        "model": chunk_seeds()[1][1:],
    }
    busy = messages.encode(messages.Busy(round=0, retry_after_s=1.0))
    resend = messages.encode(
        messages.Ack(round=0, upload=TRANSFER, status="resend", retry_after_s=1.0)
    )
    return [bytes([HEARD.index(kind)]) + each for kind, each in said.items()] + [
        b"\x01" + busy, b"\x03" + resend,
    ]  # fmt: skip


# ── What a broker sends ─────────────────────────────────────────────────────────────────

CONNACK_5 = bytes.fromhex("2006000003210014")  # no session; properties: receive maximum 20
CONNACK_3 = bytes.fromhex("20020000")


class Driven(PahoSession):
    """The MQTT session without a thread: a target takes its steps."""

    def _poke(self) -> None:
        pass


@functools.cache
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def mqtt(data: bytes) -> None:
    """A TCP server that answers CONNECT, or a session that has begun, with any bytes."""
    mode, rest = _split(data, 4)
    v5, greeted = mode % 2 == 0, mode >= 2
    link = Driven(SessionSettings(
        host="127.0.0.1", port=listener().getsockname()[1], client_id="fuzz", keepalive_s=1000,
        protocol="5.0" if v5 else "3.1.1", connect_timeout_s=5.0,
    ))  # fmt: skip
    link.subscribe(["a/#"])
    link.publish("a/b", b"x")
    this = link._begin()
    link._dial(this)
    peer, _ = listener().accept()
    with peer:
        peer.sendall((CONNACK_5 if v5 else CONNACK_3) * greeted + rest)
        peer.shutdown(socket.SHUT_WR)
        follow(link, this)
    link._end(this)
    assert link.limits.packet_bytes_max >= LIMITS.packet_bytes_min
    assert link.limits.inflight_max >= 1
    while (event := link.receive(0)) is not None:
        if isinstance(event, Message):
            link.ack(event)


def follow(link: Driven, this: Connection) -> None:
    """Take the session's steps until the connection ends."""
    while link._goes_on(this, time.monotonic()):
        link._prepare(this)
        if this.socket is None:
            return
        readable, writable, _ = select.select([this.socket], [this.socket], [], 1.0)
        link._work(this, readable=bool(readable), writable=bool(writable))


def mqtt_seeds() -> list[bytes]:
    limits = bytes.fromhex("200f00000c2700040000210014240122000a")
    refused = bytes.fromhex("2003008700")
    session = (
        "9003000101"  # SUBACK, MQTT 3.1.1
        "900400010001"  # SUBACK, MQTT 5
        "40020001"  # PUBACK
        "d000"  # PINGRESP
    )
    news = bytes.fromhex("3207") + b"\x00\x01a\x00\x09" + b"hi"
    news5 = bytes.fromhex("3208") + b"\x00\x01a\x00\x09\x00" + b"hi"
    return [
        b"\x00" + CONNACK_5, b"\x00" + limits, b"\x00" + refused, b"\x01" + CONNACK_3,
        b"\x01\x20\x02\x00\x05", b"\x02" + news5 + bytes.fromhex(session[10:]),
        b"\x03" + news + bytes.fromhex(session[:10]), b"\x02\xe0\x02\x8b\x00",
        b"\x02" + bytes.fromhex("400400011000"), b"\x03\x34\x07\x00\x01a\x00\x09hi",
    ]  # fmt: skip


# ── All of them ─────────────────────────────────────────────────────────────────────────


def _numbered(kinds: list[Any], encode: Callable[[Any], bytes]) -> Callable[[], list[bytes]]:
    return lambda: [bytes([i]) + encode(each) for i, each in enumerate(kinds)]


def _update_seeds() -> list[bytes]:
    good = b"\x00" + weights.encode(SMALL)
    return [b"\x00" + good, b"\x01" + good, b"\x02" + good]


ALL = [
    Target("topics", topics, topic_seeds),
    Target("messages_binary", messages_binary, _numbered(BINARY, messages.encode)),
    Target("messages_json", messages_json, _numbered(JSON, messages.encode_json)),
    Target("signed", signed, signed_seeds),
    Target("chunks", chunks, chunk_seeds),
    Target("update", update, _update_seeds),
    Target("enrolment", enrol, enrol_seeds),
    Target("weights", decode_weights, weight_seeds),
    Target("task", task, task_seeds, base_bytes=2 * MIB),
    Target("bundle", bundle, lambda: [_bundle()]),
    # tomllib descends by calling itself, as deep as Python lets it: 1.7 MB of frames.
    Target("config", config, config_seeds, base_bytes=4 * MIB),
    Target("certificate", certificate, certificate_seeds),
    Target("outbox", outbox, lambda: [_outbox_file()]),
    Target("journal", journal, journal_seeds),
    Target("server_files", server_files, server_file_seeds),
    Target("mqtt", mqtt, mqtt_seeds, base_bytes=4 * MIB, is_slow=True),
    Target("ctl", ctl, ctl_seeds, base_bytes=32 * MIB, is_slow=True),
    Target("device", device, device_seeds, base_bytes=32 * MIB, is_slow=True),
    Target("service", service, service_seeds, base_bytes=32 * MIB, is_slow=True),
]
TARGETS = {target.name: target for target in ALL}
