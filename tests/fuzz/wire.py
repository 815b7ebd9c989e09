"""What is said on the wire: topics, messages, signatures, chunks, updates, enrolment."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import batch, enrolment, messages, weights
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
from broker_bridge.wire.envelope import ChunkKey, KemKey, SignKey, exchange_to, seal_message
from broker_bridge.wire.messages import Ack, Configured, Enrol, Renew, ServerIdentity, Welcome
from broker_bridge.wire.renewal import NONCE_BYTES, accept_keys, offer_keys
from broker_bridge.wire.topics import DeviceState, DownTopic, UpTopic, is_name
from broker_bridge.wire.update import Binding, open_update, seal_update, update_key
from server.aggregation.exact import ExactSum
from tests.broker_bridge.wire.test_messages import BINARY, JSON
from tests.fleets import TOPICS
from tests.fuzz.target import CONTACT, DEVICE_KEM, ROUND_KEM, SERVER_KEM, SIGN, key, split

__all__ = [
    "BINARY_KINDS",
    "BINDING",
    "CHUNK_KEY",
    "JSON_KINDS",
    "SMALL",
    "TRANSFER",
    "batch_seeds",
    "batches",
    "chunk_seeds",
    "chunks",
    "enrol",
    "enrol_seeds",
    "messages_binary",
    "messages_json",
    "numbered",
    "renew",
    "renew_seeds",
    "signed",
    "signed_seeds",
    "topic_seeds",
    "topics",
    "update",
    "update_seeds",
]

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
    mode, rest = split(data, len(BINARY_KINDS))
    message = messages.decode(rest, BINARY_KINDS[mode])
    _holds(message)
    assert messages.decode(messages.encode(message), BINARY_KINDS[mode]) == message
    if hasattr(message, "layout"):
        assert 1 <= message.layout.count <= LIMITS.chunks_max


def messages_json(data: bytes) -> None:
    mode, rest = split(data, len(JSON_KINDS))
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
    mode, rest = split(data, 2 * len(BINARY_KINDS))
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


def batches(data: bytes) -> None:
    """A receipt of any bytes, one that was true before, and any bytes that the server signed."""
    mode, rest = split(data, 3)
    kind = f"ack {CONTACT.scope}"
    if mode == 0:
        parts = batch.split(rest)
        assert parts.entry <= parts.last
        assert rest.endswith(parts.payload)
        assert len(rest) == 66 + 32 * len(parts.path) + len(parts.payload)
    elif mode == 1:
        batch.verify_one_of(SIGN.public, kind, rest)
    else:
        count = 1 + (rest[0] if rest else 0) % 70
        said = [(kind if n == count // 2 else "ack demo/other", rest) for n in range(count)]
        signed = batch.sign_together(SIGN, said)[count // 2]
        messages.opened(SIGN.public, "ack", CONTACT.scope, signed, Ack)


def batch_seeds() -> list[bytes]:
    ack = Ack(round=1, upload=TRANSFER, status="accepted")
    several = [(CONTACT.scope if n == 5 else f"demo/w-{n}", ack) for n in range(13)]
    alone = messages.signed(SIGN, "ack", CONTACT.scope, ack)
    one_of = messages.signed_together(SIGN, "ack", several)[5]
    seeds = [bytes([mode]) + each for mode in (0, 1) for each in (alone, one_of)]
    return [*seeds, b"\x02" + messages.encode(ack)]


# ── Chunks and updates ──────────────────────────────────────────────────────────────────

CHUNK_KEY = ChunkKey(key(6))
TRANSFER = b"transfer"


def chunks(data: bytes) -> None:
    mode, rest = split(data, 4)
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
    mode, rest = split(data, 3)
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
    ExactSum(weights.specs_of(SMALL), fraction_bits=24).add(opened, 10, delta_bound=10.0)


def enrol(data: bytes) -> None:
    """Bytes on `enrol` and `cfg`: raw, and sealed by someone who holds the true token."""
    mode, rest = split(data, 4)
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


def renew(data: bytes) -> None:
    """Bytes on `renew` and `identity`: raw, and signed by who may; new keys of any bytes."""
    mode, rest = split(data, 4)
    if mode == 0:
        said = messages.opened(SIGN.public, "renew", CONTACT.scope, rest, Renew)
        assert len(said.nonce) == NONCE_BYTES
    elif mode == 1:
        signed = SIGN.sign(f"renew {CONTACT.scope}", rest)
        said = messages.opened(SIGN.public, "renew", CONTACT.scope, signed, Renew)
        if said.keys is not None:
            accept_keys(CONTACT.scope, said.keys)
    elif mode == 2:
        enrolment.server_identity(SIGN.public, "demo", rest)
    else:
        signed = SIGN.sign("server-identity demo", rest)
        assert enrolment.server_identity(SIGN.public, "demo", signed).federation == "demo"


def renew_seeds() -> list[bytes]:
    tls = SignKey.from_seed(key(12))
    offer = offer_keys(CONTACT.scope, sign=SIGN, kem_public=DEVICE_KEM.public, tls=tls)
    said = Renew(
        nonce=key(13)[:NONCE_BYTES], fleet_epoch=1, certified_until=2, software="fuzz", keys=offer
    )
    server = ServerIdentity(
        federation="demo", sequence=1, sign_public=key(14), kem_public=key(15), issued_at=1.0
    )
    return [
        b"\x00" + messages.signed(SIGN, "renew", CONTACT.scope, said),
        b"\x01" + messages.encode(said),
        b"\x02" + enrolment.sign_server_identity(SIGN, server),
        b"\x03" + messages.encode(server),
    ]


def numbered(kinds: list[Any], encode: Callable[[Any], bytes]) -> Callable[[], list[bytes]]:
    return lambda: [bytes([i]) + encode(each) for i, each in enumerate(kinds)]


def update_seeds() -> list[bytes]:
    good = b"\x00" + weights.encode(SMALL)
    return [b"\x00" + good, b"\x01" + good, b"\x02" + good]
