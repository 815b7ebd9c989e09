"""Every message, as a typed struct and as bytes.

Between server and devices: MessagePack of the structs below, signed by their sender
(`signed`, `opened`), verified before anything is decoded. With people: JSON.
A field that is not listed here, or a version that is not ours, is refused.

Times called `_s` are durations. No message asks a device to believe a date.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import batch, envelope
from broker_bridge.wire.chunks import Layout

__all__ = [
    "Ack",
    "Announcement",
    "Blob",
    "Busy",
    "Command",
    "Configured",
    "Enrol",
    "EnrolSecret",
    "FleetKey",
    "Go",
    "Init",
    "Join",
    "Measured",
    "Need",
    "NeedBlob",
    "Presence",
    "Refused",
    "Renew",
    "RenewKeys",
    "Renewal",
    "Reply",
    "Report",
    "RoundSummary",
    "ServerIdentity",
    "ServerPresence",
    "Settings",
    "Until",
    "Welcome",
    "decode",
    "decode_json",
    "encode",
    "encode_json",
    "opened",
    "signed",
    "signed_together",
]

Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes8 = Annotated[bytes, Meta(min_length=8, max_length=8)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=LIMITS.model_bytes_max)]
Name = Annotated[str, Meta(min_length=1, max_length=LIMITS.name_chars_max)]
Sentence = Annotated[str, Meta(max_length=500)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
# The bounds hold any float32 and keep out NaN (every comparison with it is false), infinity,
# and whatever could become infinite in a sum weighted by examples.
Finite = Annotated[float, Meta(ge=-1e39, le=1e39)]
Numbers = Annotated[dict[Annotated[str, Meta(max_length=40)], Finite], Meta(max_length=32)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    v: Literal[1] = 1


# ── The announcement: server to everyone, signed, retained ──────────────────────────────


class Blob(_Message, frozen=True, kw_only=True):
    """A task or a model that lies in chunks on the broker, sealed under the fleet key."""

    digest: Bytes32
    total_bytes: Size
    body_bytes: Size

    @property
    def layout(self) -> Layout:
        """How it is cut. Raises PeerError `bad_size`."""
        return Layout(self.total_bytes, self.body_bytes)

    @property
    def transfer(self) -> bytes:
        """The id its chunks carry."""
        return self.digest[:8]


class Settings(_Message, frozen=True, kw_only=True):
    """How a device trains: what the task's file calls its defaults, as set for this round."""

    epochs: Annotated[int, Meta(ge=1, le=10_000)]
    learning_rate: Annotated[float, Meta(gt=0, le=1e3)]
    proximal_mu: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    clip_norm: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


class Announcement(_Message, frozen=True, kw_only=True):
    """A round, open or closed. Its SHA-256 binds each update to exactly these settings."""

    federation: Name
    round: Count
    state: Literal["open", "closed"]
    task: Blob
    task_name: Name
    model: Blob
    model_version: Count
    settings: Settings
    codec: Literal["f32"] = "f32"
    mode: Literal["plain"] = "plain"
    delta_bound: Annotated[float, Meta(gt=0, le=1e300)]
    weight_max: Annotated[int, Meta(ge=1, le=LIMITS.examples_max)]
    fraction_bits: Annotated[int, Meta(ge=8, le=48)]
    round_key: Bytes32
    fleet_epoch: Count
    issued_at: Finite  # for people; no device decides by it
    deadline_s: Seconds
    target: Count
    quorum: Count
    lottery_seed: Bytes32
    lottery_threshold: Annotated[int, Meta(ge=0, le=2**32)]
    jitter_s: Seconds = 0.0


# ── Device to server, signed by the device ──────────────────────────────────────────────


class Join(_Message, frozen=True, kw_only=True, tag="join"):
    """I am here for this round. `packet_bytes_max` is what my broker connection takes."""

    round: Count
    announcement: Bytes32
    samples: Annotated[int, Meta(ge=0, le=LIMITS.examples_max)]
    packet_bytes_max: Count
    inflight_max: Count


class Init(_Message, frozen=True, kw_only=True, tag="init"):
    """The commit to one sealed update; repeating it asks for its present state."""

    round: Count
    announcement: Bytes32
    upload: Bytes8
    enc: Bytes32
    total_bytes: Size
    body_bytes: Size
    tags: Bytes32
    codec: Literal["f32"] = "f32"
    examples: Count
    train_s: Seconds
    metrics: Numbers = {}

    @property
    def layout(self) -> Layout:
        """How the update is cut. Raises PeerError `bad_size`."""
        return Layout(self.total_bytes, self.body_bytes)


class NeedBlob(_Message, frozen=True, kw_only=True, tag="need"):
    """The broker does not have all chunks of this blob: please retain it again."""

    kind: Literal["task", "model"]
    digest: Bytes32


class Report(_Message, frozen=True, kw_only=True, tag="report"):
    """What a device that holds its data out found of a model: counts and means, no samples."""

    round: Count
    model_version: Count
    examples: Annotated[int, Meta(ge=1, le=LIMITS.examples_max)]
    metrics: Numbers


# ── Server to one device, signed by the server ──────────────────────────────────────────


class Go(_Message, frozen=True, kw_only=True, tag="go"):
    """You are in: train, seal, send under this id, `window` chunks at a time."""

    round: Count
    announcement: Bytes32
    upload: Bytes8
    shard: Annotated[int, Meta(ge=0, le=99_999)]
    packet_bytes: Annotated[int, Meta(ge=LIMITS.packet_bytes_min, le=LIMITS.model_bytes_max)]
    window: Annotated[int, Meta(ge=1, le=65_535)]


class Busy(_Message, frozen=True, kw_only=True, tag="busy"):
    """Not now; ask again after `retry_after_s`, or not in this round if it is negative."""

    round: Count
    retry_after_s: Annotated[float, Meta(ge=-1, le=1e9)]
    reason: Sentence = ""


class Need(_Message, frozen=True, kw_only=True, tag="missing"):
    """Of this upload these chunks are not here (a bitmap, least significant bit first)."""

    upload: Bytes8
    bitmap: Annotated[bytes, Meta(max_length=-(-LIMITS.chunks_max // 8))]


class Ack(_Message, frozen=True, kw_only=True, tag="ack"):
    """The signed receipt. All but `resend` and `busy` are final."""

    round: Count
    upload: Bytes8
    status: Literal["accepted", "resend", "rejected", "late", "busy"]
    reason: Sentence = ""
    retry_after_s: Seconds = 0.0


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """Enrolment or renewal was refused; the sentence says why and what to do."""

    reason: Sentence


# ── Enrolment ───────────────────────────────────────────────────────────────────────────


class Enrol(_Message, frozen=True, kw_only=True):
    """First contact: the device's key for sealing in clear, the rest sealed under the token."""

    device: Name
    kem_public: Bytes32
    enc: Bytes32
    sealed: Annotated[bytes, Meta(max_length=4096)]


class EnrolSecret(_Message, frozen=True, kw_only=True):
    """What is sealed in `Enrol`. `proof` is `device` and `kem_public` signed by `sign_public`."""

    sign_public: Bytes32
    tls_public: Bytes32
    proof: Annotated[bytes, Meta(max_length=256)]
    software: Annotated[str, Meta(max_length=80)]


class Welcome(_Message, frozen=True, kw_only=True, tag="welcome"):
    """The answer to `Enrol` or `Renew`: signed by the server, `sealed` to the device."""

    enc: Bytes32
    sealed: Annotated[bytes, Meta(max_length=LIMITS.control_bytes_max)]


class FleetKey(_Message, frozen=True, kw_only=True):
    """What opens task and model in an epoch."""

    epoch: Count
    key: Bytes32

    def __repr__(self) -> str:
        return f"FleetKey({self.epoch})"


class Configured(_Message, frozen=True, kw_only=True):
    """What is sealed in `Welcome`. An empty certificate: the one that the device has stays."""

    device: Name
    certificate_pem: str
    certified_until: Count = 0  # names the certificate; no device holds it against a clock
    issued_at: Finite = 0.0  # a device's clock cannot be right if it is behind this
    fleet_epoch: Count
    fleet_key: Bytes32
    former: FleetKey | None = None  # of a round that is still open under an older one

    def __repr__(self) -> str:
        return f"Configured({self.device}, fleet epoch {self.fleet_epoch})"


# ── Renewal: a new fleet key, a new certificate, new keys ───────────────────────────────


class RenewKeys(_Message, frozen=True, kw_only=True):
    """Keys to take the place of a device's present ones, each signed by itself where it can."""

    sign_public: Bytes32
    kem_public: Bytes32
    tls_public: Bytes32
    sign_proof: Bytes64
    tls_proof: Bytes64


class Renew(_Message, frozen=True, kw_only=True, tag="renew"):
    """This is what I have: send me what is newer. With `keys`: these are mine from now on."""

    nonce: Bytes16
    fleet_epoch: Count
    certified_until: Count
    software: Annotated[str, Meta(max_length=80)]
    keys: RenewKeys | None = None


class Renewal(_Message, frozen=True, kw_only=True, tag="renewal"):
    """The server asks a device to renew: it means the key and the certificate that are named."""

    sign_public: Bytes32
    certified_until: Count
    keys: bool = False
    spread_s: Seconds = 0.0


class ServerIdentity(_Message, frozen=True, kw_only=True):
    """The server's public keys, signed by the federation's root. The highest `sequence` holds."""

    federation: Name
    sequence: Count = 0
    sign_public: Bytes32
    kem_public: Bytes32
    issued_at: Finite


# ── For people: JSON ────────────────────────────────────────────────────────────────────


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device's last training cost it. It says so itself, and nobody decides by it."""

    task: Name
    digest: Annotated[str, Meta(min_length=16, max_length=16)]  # first hex digits of the task's
    step_s: Seconds  # the mean over the training's steps
    memory_bytes: Count  # the most that the process which trained ever held; 0: not known
    runtime: Annotated[str, Meta(max_length=80)]
    machine: Annotated[str, Meta(max_length=40)]


class Presence(_Message, frozen=True, kw_only=True):
    """Retained on a device's `state` topic, and sent by the broker as its last will."""

    state: Literal["init", "ready", "training", "uploading", "sleeping", "lost"]
    boot: Count
    role: Literal["train", "evaluate"] = "train"
    round: Count = 0
    detail: Sentence = ""
    measured: Measured | UnsetType = UNSET


class ServerPresence(_Message, frozen=True, kw_only=True):
    """Retained on `srv`, and sent by the broker as the server's last will."""

    state: Literal["online", "offline", "lost"]


class Until(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Stop when the model is this good on the held-out data."""

    accuracy: Annotated[float, Meta(gt=0, le=1)] | None = None
    loss: Annotated[float, Meta(ge=0)] | None = None


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an operator publishes on `ctl`."""

    cmd: Literal["start", "stop", "pause", "resume", "status"]
    id: Annotated[str, Meta(max_length=64)] | None = None
    task: Name | None = None
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    until: Until | None = None
    target: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    quorum: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=1e7)] | None = None


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer on `ctl/reply`. `error` is a sentence that says what to send instead."""

    ok: bool
    cmd: str | None = None
    id: str | None = None
    error: str | None = None
    status: dict[str, Any] | None = None


class RoundSummary(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What `metrics` says of the last round: counts, means and seconds."""

    federation: str
    run: int
    round: int
    state: Literal["closed", "abandoned"]
    task: str
    model_version: int
    invited: int
    joined: int
    accepted: int
    rejected: int = 0
    target: int = 0
    quorum: int = 0
    examples: int = 0
    train_loss: float | None = None
    evaluation: dict[str, float] = {}
    evaluation_examples: int = 0
    evaluated_by: str = ""
    update_bytes: int = 0
    round_s: float = 0.0
    train_s_max: float = 0.0
    reason: str = ""


# ── Bytes ───────────────────────────────────────────────────────────────────────────────

T = TypeVar("T")


def encode(message: msgspec.Struct) -> bytes:
    """Return a message as MessagePack."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: Any) -> Any:
    """Return the message of type `kind` (or of one type of a union) in `data`.

    Raises PeerError `bad_message` or `bad_version`."""
    if len(data) > LIMITS.control_bytes_max:
        raise PeerError("too_large", "a message is larger than the protocol allows")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(error) from None


def encode_json(message: msgspec.Struct) -> bytes:
    """Return a message as one line of JSON."""
    return msgspec.json.encode(message)


def decode_json(data: bytes, kind: type[T]) -> T:
    """Return the message in the JSON `data`. Raises PeerError with a sentence for the sender."""
    if len(data) > LIMITS.control_bytes_max:
        raise PeerError("too_large", "a message is larger than the protocol allows")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> PeerError:
    text = str(error)
    reason = "bad_version" if text.endswith("`$.v`") else "bad_message"
    return PeerError(reason, text)


_TOGETHER = frozenset({"ack"})  # kinds that are signed as `batch` does, also when there is one


def signed(key: envelope.SignKey, kind: str, scope: str, message: msgspec.Struct) -> bytes:
    """Encode and sign a message of this `kind`, the last level of its topic.

    `scope` is the federation for what goes to everyone, and `federation/device` for what
    goes to or comes from one device: a message signed for one says nothing to another.
    """
    if kind in _TOGETHER:
        return signed_together(key, kind, [(scope, message)])[0]
    return key.sign(f"{kind} {scope}", encode(message))


def signed_together(
    key: envelope.SignKey, kind: str, said: Iterable[tuple[str, msgspec.Struct]]
) -> list[bytes]:
    """`signed` for many pairs of scope and message, in one go; of a kind that is signed so."""
    if kind not in _TOGETHER:
        raise ValueError(f"each {kind} has a signature of its own")
    return batch.sign_together(key, [(f"{kind} {scope}", encode(each)) for scope, each in said])


def opened(public: bytes, kind: str, scope: str, data: bytes, expected: Any) -> Any:
    """Verify, then decode. Raises PeerError `bad_signature`, `bad_message` or `bad_version`."""
    if len(data) > LIMITS.control_bytes_max:
        raise PeerError("too_large", "a message is larger than the protocol allows")
    verify = batch.verify_one_of if kind in _TOGETHER else envelope.verify
    return decode(verify(public, f"{kind} {scope}", data), expected)
