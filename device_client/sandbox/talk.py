"""What agent and training process say to each other, and how it is cut into frames.

A frame is the length of the head (u32), the length of the blob (u64), both little-endian,
the head (MessagePack of one struct below) and the blob (weights, or a plan). Whoever reads
says how long either may be, so a frame that lies about its length is refused before memory
is set aside for it. Nothing is unpickled.
"""

import struct
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.task.samples import Part
from device_client.sandbox.confinement import Confinement

__all__ = [
    "Ack", "Alive", "Build", "Built", "Done", "Evaluate", "Failure", "Load", "Measured", "Ready",
    "Steps", "Stop", "Stopped", "Train", "frame", "read_frame",
]  # fmt: skip

_LENGTHS = struct.Struct("<IQ")
_STEPS_A_MESSAGE_MAX = 4096
Count = Annotated[int, Meta(ge=0, le=2**53)]
Examples = Annotated[int, Meta(ge=0, le=LIMITS.examples_max)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Tagged by its name."""


# ── The agent says ──────────────────────────────────────────────────────────────────────


class Load(_Message, frozen=True, kw_only=True):
    """Fetch the samples, then lock the door. `task`: the plan's header, as JSON; empty: none."""

    task: bytes
    data: str
    threads: int
    prefer: str | None
    idle_s: float


class Build(_Message, frozen=True):
    """Load the plan, which is the blob."""


class Train(_Message, frozen=True, kw_only=True):
    """Train from the weights, which are the blob, up to the last `optimiser_bytes` of it."""

    epochs: int
    learning_rate: float
    proximal_mu: float
    clip_norm: float
    seed: int
    optimiser_bytes: int = 0
    part: Part = "all"


class Evaluate(_Message, frozen=True):
    """Measure the weights, which are the blob."""

    part: Part = "all"


class Ack(_Message, frozen=True):
    """The last `Steps` was read: go on."""


class Stop(_Message, frozen=True):
    """End at the next step."""


# ── The training process says ───────────────────────────────────────────────────────────


class Ready(_Message, frozen=True, kw_only=True):
    """The samples are here, and the door is locked."""

    samples: Examples
    confinement: Confinement


class Built(_Message, frozen=True, kw_only=True):
    """The plan is loaded."""

    runtime: Annotated[str, Meta(max_length=80)]


class Steps(_Message, frozen=True, kw_only=True):
    """Steps since the last such message: the number of the last, and each one's loss."""

    last: Count
    losses: Annotated[list[float], Meta(min_length=1, max_length=_STEPS_A_MESSAGE_MAX)]


class Done(_Message, frozen=True, kw_only=True):
    """Trained. The blob: weights, then the optimiser's state."""

    loss: float
    metrics: dict[str, float]
    seconds: Seconds
    peak_bytes: Count
    optimiser_bytes: Count = 0


class Alive(_Message, frozen=True):
    """Still evaluating."""


class Measured(_Message, frozen=True, kw_only=True):
    """Evaluated."""

    loss: float
    metrics: dict[str, float]


class Stopped(_Message, frozen=True):
    """Stopped, as it was told to."""


class Failure(_Message, frozen=True, kw_only=True):
    """It went wrong, in a way that can be said. `reason`: of a PeerError; empty: this machine's."""

    sentence: Annotated[str, Meta(max_length=2000)]
    reason: Annotated[str, Meta(max_length=40)] = ""


# ── Frames ──────────────────────────────────────────────────────────────────────────────


def frame(message: msgspec.Struct, *blobs: Any) -> list[Any]:
    """Return the parts of a frame, to be sent one after the other; blobs are not copied."""
    head = msgspec.msgpack.encode(message)
    return [_LENGTHS.pack(len(head), sum(map(len, blobs))), head, *blobs]


def read_frame(
    read: Callable[[int], bytearray],
    decoder: "msgspec.msgpack.Decoder[Any]",
    *,
    head_bytes_max: int,
    blob_bytes_max: int,
) -> tuple[Any, memoryview]:
    """Read one frame with `read`, which returns as many bytes as it is asked for.

    Raises PeerError `bad_frame` when it is too long or not one of the messages.
    """
    head_bytes, blob_bytes = _LENGTHS.unpack(read(_LENGTHS.size))
    if head_bytes > head_bytes_max or blob_bytes > blob_bytes_max:
        raise PeerError("bad_frame", f"a frame of {head_bytes} and {blob_bytes} bytes")
    try:
        message = decoder.decode(read(head_bytes))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError("bad_frame", f"unreadable: {error}") from None
    return message, memoryview(read(blob_bytes)).toreadonly()
