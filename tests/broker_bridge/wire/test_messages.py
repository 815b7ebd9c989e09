"""Messages: each comes back as it was sent, and whatever is not one of ours is refused."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import SignKey
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Blob,
    Busy,
    Command,
    Configured,
    Enrol,
    EnrolSecret,
    FleetKey,
    Go,
    Init,
    Join,
    Measured,
    Need,
    NeedBlob,
    Presence,
    Refused,
    Renew,
    Renewal,
    RenewKeys,
    Reply,
    Report,
    RoundSummary,
    ServerIdentity,
    ServerPresence,
    Settings,
    Until,
    Welcome,
)

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "messages-v1.json").read_text())

A, B, C = bytes([0xA0] * 32), bytes([0xB0] * 32), bytes([0xC0] * 32)
UPLOAD = bytes(range(8))
TASK = Blob(digest=A, total_bytes=70_000, body_bytes=61_144)
MODEL = Blob(digest=B, total_bytes=9_000, body_bytes=61_144)
SETTINGS = Settings(epochs=2, learning_rate=0.05, proximal_mu=0.01, clip_norm=5.0)
NEW_KEYS = RenewKeys(sign_public=A, kem_public=B, tls_public=C, sign_proof=A + B, tls_proof=B + C)

# One of each, every field set.
BINARY: list[msgspec.Struct] = [
    TASK,
    SETTINGS,
    Announcement(
        federation="demo", round=7, state="open", task=TASK, task_name="wearables", model=MODEL,
        model_version=6, settings=SETTINGS, delta_bound=10.0, weight_max=10_000, fraction_bits=24,
        round_key=C, fleet_epoch=1, issued_at=1.5, deadline_s=60.0, target=8, quorum=4,
        lottery_seed=A, lottery_threshold=2**32, jitter_s=0.5,
    ),
    Join(round=7, announcement=B, samples=320, packet_bytes_max=61_440, inflight_max=20),
    Init(
        round=7, announcement=B, upload=UPLOAD, enc=C, total_bytes=9_000, body_bytes=4_096, tags=A,
        examples=320, train_s=12.5, metrics={"accuracy": 0.75, "loss": 0.5},
    ),
    NeedBlob(kind="model", digest=B),
    Report(round=7, model_version=6, examples=40, metrics={"accuracy": 0.8}),
    Go(round=7, announcement=B, upload=UPLOAD, shard=0, packet_bytes=61_440, window=20),
    Busy(round=7, retry_after_s=-1.0, reason="the cohort is full"),
    Need(upload=UPLOAD, bitmap=b"\x07"),
    Ack(round=7, upload=UPLOAD, status="rejected", reason="wrong shape", retry_after_s=0.0),
    Refused(reason="this token has been used"),
    Enrol(device="anna", kem_public=A, enc=B, sealed=b"sealed"),
    EnrolSecret(sign_public=A, tls_public=B, proof=b"proof", software="midge 0.1.0"),
    Welcome(enc=A, sealed=b"sealed"),
    Configured(
        device="anna", certificate_pem="PEM", certified_until=2, issued_at=1.5, fleet_epoch=1,
        fleet_key=C, former=FleetKey(epoch=0, key=A),
    ),
    FleetKey(epoch=0, key=A),
    NEW_KEYS,
    Renew(nonce=A[:16], fleet_epoch=1, certified_until=2, software="midge 0.1.0", keys=NEW_KEYS),
    Renewal(sign_public=A, certified_until=2, keys=True, spread_s=1.5),
    ServerIdentity(federation="demo", sequence=3, sign_public=A, kem_public=B, issued_at=1.5),
]  # fmt: skip
JSON: list[msgspec.Struct] = [
    Presence(state="training", boot=3, role="train", round=7, detail="epoch 1 of 2"),
    Measured(
        task="wearables", digest="0123456789abcdef", step_s=0.0025, memory_bytes=68_000_000,
        runtime="tflite-runtime 2.14.0", machine="aarch64",
    ),
    ServerPresence(state="online"),
    Until(accuracy=0.8, loss=0.5),
    Command(
        cmd="start", id="mine-1", task="wearables", rounds=10, until=Until(accuracy=0.8), target=8,
        quorum=4, deadline_s=60.0,
    ),
    Reply(ok=False, cmd="start", id="mine-1", error="Send …", status={"round": 7}),
    RoundSummary(
        federation="demo", run=2, round=7, state="closed", task="wearables", model_version=7,
        invited=11, joined=9, accepted=8, rejected=1, target=8, quorum=4, examples=2_560,
        train_loss=0.5, evaluation={"accuracy": 0.8}, evaluation_examples=640,
        evaluated_by="server", update_bytes=72_320, round_s=4.5, train_s_max=2.5, reason="target",
    ),
]  # fmt: skip


def named(examples: list[msgspec.Struct]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("message", examples, ids=lambda m: type(m).__name__)


EVERY_BINARY = named(BINARY)
EVERY_JSON = named(JSON)


def reason(data: bytes, kind: Any) -> str:
    with pytest.raises(PeerError) as caught:
        messages.decode(data, kind)
    return caught.value.reason


def reason_json(data: bytes, kind: Any) -> str:
    with pytest.raises(PeerError) as caught:
        messages.decode_json(data, kind)
    return caught.value.reason


def fields(message: msgspec.Struct) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.msgpack.decode(messages.encode(message))
    return decoded


def packed(**values: object) -> bytes:
    return msgspec.msgpack.encode(values)


# ── Anything that a type allows ─────────────────────────────────────────────────────────


def anything(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Whatever the type allows, bounds included."""
    match kind:
        case inspect.IntType():
            return st.integers(kind.ge, kind.le)
        case inspect.FloatType():
            low, high = kind.ge if kind.gt is None else kind.gt, kind.le
            return st.floats(
                low, high, allow_nan=False, allow_infinity=False, exclude_min=kind.gt is not None
            )
        case inspect.StrType():
            return st.text(
                st.characters(exclude_categories=["Cs"]),
                min_size=kind.min_length or 0,
                max_size=min(kind.max_length or 20, 20),
            )
        case inspect.BytesType():
            low = kind.min_length or 0
            return st.binary(min_size=low, max_size=low or 40)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.UnionType():
            return st.one_of([anything(t) for t in kind.types])
        case inspect.DictType():
            return st.dictionaries(anything(kind.key_type), anything(kind.value_type), max_size=4)
        case inspect.StructType():
            return st.builds(kind.cls, **{f.name: anything(f.type) for f in kind.fields})
        case inspect.AnyType():
            return st.integers(-5, 5)
    raise AssertionError(f"a message has a field of a kind that is new here: {kind}")


def any_of(examples: list[msgspec.Struct]) -> st.SearchStrategy[Any]:
    return st.one_of([anything(inspect.type_info(type(m))) for m in examples])


@settings(deadline=None, max_examples=300)
@given(any_of(BINARY))
def test_a_message_comes_back_as_it_was_sent(message: msgspec.Struct) -> None:
    assert messages.decode(messages.encode(message), type(message)) == message


@settings(deadline=None)
@given(any_of(JSON))
def test_a_message_with_people_comes_back_as_it_was_sent(message: msgspec.Struct) -> None:
    line = messages.encode_json(message)
    assert messages.decode_json(line, type(message)) == message
    assert b"\n" not in line


def test_there_is_an_example_of_every_message_here() -> None:
    offered = {getattr(messages, name) for name in messages.__all__}
    structs = {o for o in offered if isinstance(o, type) and issubclass(o, msgspec.Struct)}
    assert {type(m) for m in BINARY + JSON} == structs


# ── Cut short, frozen, forged ───────────────────────────────────────────────────────────


@EVERY_BINARY
def test_a_message_cut_short_at_any_length_is_refused(message: msgspec.Struct) -> None:
    data = messages.encode(message)
    assert {reason(data[:n], type(message)) for n in range(len(data))} == {"bad_message"}


@EVERY_JSON
def test_json_cut_short_at_any_length_is_refused(message: msgspec.Struct) -> None:
    data = messages.encode_json(message)
    assert {reason_json(data[:n], type(message)) for n in range(len(data))} == {"bad_message"}


@EVERY_BINARY
def test_the_frozen_vector_of_version_1_still_reads_and_is_still_written(
    message: msgspec.Struct,
) -> None:
    frozen = bytes.fromhex(VECTORS["msgpack"][type(message).__name__])
    assert messages.decode(frozen, type(message)) == message
    assert messages.encode(message) == frozen


@EVERY_JSON
def test_the_frozen_json_of_version_1_still_reads_and_is_still_written(
    message: msgspec.Struct,
) -> None:
    frozen = VECTORS["json"][type(message).__name__].encode()
    assert messages.decode_json(frozen, type(message)) == message
    assert messages.encode_json(message) == frozen


def test_what_a_device_measured_is_in_its_presence_once_it_has_trained() -> None:
    presence, measured = (m for m in JSON if isinstance(m, Presence | Measured))
    after = msgspec.structs.replace(presence, measured=measured)
    frozen = VECTORS["json"]["Presence, measured"].encode()
    assert messages.decode_json(frozen, Presence) == after
    assert messages.encode_json(after) == frozen
    assert b"measured" not in messages.encode_json(presence)


@EVERY_BINARY
def test_a_message_of_another_version_is_refused_as_such(message: msgspec.Struct) -> None:
    for version in (0, 2, "1", True, None):
        assert reason(packed(**{**fields(message), "v": version}), type(message)) == "bad_version"


@EVERY_BINARY
def test_a_field_that_is_not_ours_is_refused(message: msgspec.Struct) -> None:
    assert reason(packed(**fields(message), surprise=1), type(message)) == "bad_message"


@EVERY_BINARY
def test_a_required_field_left_out_is_refused(message: msgspec.Struct) -> None:
    whole = fields(message)
    for field in msgspec.structs.fields(type(message)):
        if field.required:
            rest = {k: v for k, v in whole.items() if k != field.encode_name}
            assert reason(packed(**rest), type(message)) == "bad_message"


@EVERY_BINARY
def test_a_field_of_another_kind_is_refused(message: msgspec.Struct) -> None:
    for name in set(fields(message)) - {"v"}:
        forged = packed(**{**fields(message), name: [1]})
        assert reason(forged, type(message)) == "bad_message"


@EVERY_BINARY
def test_bytes_after_a_message_are_refused(message: msgspec.Struct) -> None:
    assert reason(messages.encode(message) + b"\xc0", type(message)) == "bad_message"


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    assert reason(data, Join | Init | NeedBlob | Report) in {"bad_message", "bad_version"}
    assert reason_json(data, Command) == "bad_message"


def test_a_message_of_one_kind_is_not_taken_for_another() -> None:
    go = messages.encode(BINARY[7])
    assert messages.decode(go, Go | Busy) == BINARY[7]
    assert reason(go, Busy) == "bad_message"
    assert reason(go, Join | Init) == "bad_message"


def numbers_of(kind: inspect.Type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    match kind:
        case inspect.StructType():
            for field in kind.fields:
                yield from numbers_of(field.type, (*path, field.encode_name))
        case inspect.DictType():
            yield from numbers_of(kind.value_type, (*path, "x"))
        case inspect.FloatType():
            yield path


@EVERY_BINARY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_nan_or_infinite(message: msgspec.Struct, value: float) -> None:
    for path in numbers_of(inspect.type_info(type(message))):
        forged = fields(message)
        place = forged
        for level in path[:-1]:
            place = place[level]
        place[path[-1]] = value
        assert reason(packed(**forged), type(message)) == "bad_message"


def test_what_would_make_us_hold_too_much_is_refused_before_it_is_read() -> None:
    large = bytes(LIMITS.control_bytes_max + 1)
    key = SignKey.from_seed(A)
    assert reason(large, Join) == reason_json(large, Command) == "too_large"
    with pytest.raises(PeerError, match="larger"):
        messages.opened(key.public, "join", "demo", large, Join)


DEEP = {
    "arrays": b"\x91" * 60_000,
    "maps": b"\x81\xa1v" * 20_000,
    "metrics": b"\x81\xa7metrics" + b"\x81\xa1a" * 20_000,
}


@pytest.mark.parametrize("data", DEEP.values(), ids=DEEP.keys())
def test_a_message_nested_without_end_is_refused(data: bytes) -> None:
    assert reason(data, Init) in {"bad_message", "bad_version"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"start",
        b"null",
        b"[]",
        b'{"cmd":"explode"}',
        b'{"cmd":"start","rounds":0}',
        b'{"cmd":"start","rounds":1.5}',
        b'{"cmd":"start","rounds":"5"}',
        b'{"cmd":"start","until":{"accuracy":80}}',
        b'{"cmd":"start","until":{"accuracy":NaN}}',
        b'{"cmd":"start","until":{"loss":1e999}}',
        b'{"cmd":"start","deadline_s":-1}',
        b'{"cmd":"start","round":5}',
        b'{"cmd":"start"}{"cmd":"stop"}',
        b"\xef\xbb\xbf{}",
        b'{"cmd":"start","task":"\xff"}',
        b'{"cmd":"start","id":"' + b"x" * 65 + b'"}',
        b'{"cmd":"start","rounds":' + b"9" * 5_000 + b"}",
        b'{"cmd":' + b"[" * 30_000,
    ],
)
def test_a_command_that_is_not_one_is_refused_with_a_sentence(line: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        messages.decode_json(line, Command)
    assert caught.value.reason == "bad_message"
    assert 0 < len(str(caught.value)) < 500


# ── Signed ──────────────────────────────────────────────────────────────────────────────

KEY, STRANGER = SignKey.from_seed(A), SignKey.from_seed(B)
JOIN = BINARY[3]
SIGNED = messages.signed(KEY, "join", "demo", JOIN)


def refused(public: bytes, kind: str, federation: str, data: bytes) -> bool:
    with pytest.raises(PeerError) as caught:
        messages.opened(public, kind, federation, data, Join)
    return caught.value.reason == "bad_signature"


def test_a_signed_message_opens_for_its_kind_and_federation() -> None:
    assert messages.opened(KEY.public, "join", "demo", SIGNED, Join) == JOIN
    assert bytes.fromhex(VECTORS["signed"]["join demo"]) == SIGNED


@settings(deadline=None)
@given(st.integers(0, 8 * len(SIGNED) - 1))
def test_any_bit_flipped_in_a_signed_message_is_refused(bit: int) -> None:
    flipped = bytearray(SIGNED)
    flipped[bit // 8] ^= 1 << bit % 8
    assert refused(KEY.public, "join", "demo", bytes(flipped))


def test_a_signed_message_cut_short_at_any_length_is_refused() -> None:
    assert all(refused(KEY.public, "join", "demo", SIGNED[:n]) for n in range(len(SIGNED)))


def test_a_signature_fits_no_other_key_kind_or_federation() -> None:
    assert refused(STRANGER.public, "join", "demo", SIGNED)
    assert refused(KEY.public, "init", "demo", SIGNED)
    assert refused(KEY.public, "join", "demo2", SIGNED)
    assert refused(KEY.public, "join demo", "", SIGNED)


def test_nothing_unsigned_is_decoded() -> None:
    unsigned = bytes(64) + messages.encode(JOIN)
    assert refused(KEY.public, "join", "demo", unsigned)


def test_a_true_signature_over_garbage_is_still_refused() -> None:
    signed = KEY.sign("join demo", b"garbage")
    with pytest.raises(PeerError) as caught:
        messages.opened(KEY.public, "join", "demo", signed, Join)
    assert caught.value.reason == "bad_message"


def test_no_secret_is_shown_where_a_message_is_printed() -> None:
    configured = Configured(device="anna", certificate_pem="", fleet_epoch=1, fleet_key=b"S" * 32)
    assert "SSSS" not in repr(configured)
