"""What can happen in a round, seen from a device, and what is to be done: frozen words.

Events go into `device_client.participant`, effects come out of it. `device_client.agent`
performs the effects and reports back with events.
"""

from dataclasses import dataclass
from typing import Literal

from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Blob,
    Busy,
    Go,
    Init,
    Join,
    Need,
    NeedBlob,
    Numbers,
    Report,
    Settings,
)

__all__ = [
    "Announced",
    "Answered",
    "Discard",
    "Effect",
    "Eligible",
    "Evaluate",
    "Evaluated",
    "Event",
    "Failed",
    "Fetch",
    "Fetched",
    "Fetching",
    "Keep",
    "LinkDown",
    "LinkUp",
    "Memory",
    "Outgoing",
    "Remember",
    "Renew",
    "RenewalAsked",
    "RenewalRefused",
    "Renewed",
    "Room",
    "Seal",
    "Sealed",
    "Send",
    "SendChunks",
    "Stop",
    "Tick",
    "Train",
    "Trained",
]


# ── What survives a power cut ───────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Memory:
    """What the device writes down before it acts on an announcement."""

    round: int = 0  # the highest round seen, open or closed
    digest: bytes = b""  # of the announcement that opened it
    done: bool = False  # nothing more to do in it
    evaluated_version: int = 0  # the newest model reported on


# ── Events ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Tick:
    """Time passes; seconds on a clock that never goes back."""

    now_s: float


@dataclass(frozen=True)
class LinkUp:
    """The broker accepts packets this large and this many publishes in flight."""

    packet_bytes_max: int
    inflight_max: int


@dataclass(frozen=True)
class LinkDown:
    """There is no connection to the broker."""


@dataclass(frozen=True)
class Announced:
    """A verified announcement and the SHA-256 of its payload."""

    announcement: Announcement
    digest: bytes


@dataclass(frozen=True)
class Answered:
    """A verified message from the server to this device."""

    message: Go | Busy | Need | Ack


@dataclass(frozen=True)
class Fetched:
    """The announced task or model is here, its digest checked."""

    kind: Literal["task", "model"]
    digest: bytes


@dataclass(frozen=True)
class Fetching:
    """Chunks of what we fetch are still coming in."""


@dataclass(frozen=True)
class Trained:
    """Local training ended; the agent holds the update."""

    round: int


@dataclass(frozen=True)
class Evaluated:
    """Local evaluation of the model ended."""

    model_version: int
    examples: int
    metrics: Numbers


@dataclass(frozen=True)
class Failed:
    """This device cannot do its part in this round; `reason` is for a person."""

    round: int
    reason: str


@dataclass(frozen=True)
class Sealed:
    """The sealed update is in the outbox, on disk. Also at start, for one found there."""

    init: Init


@dataclass(frozen=True)
class RenewalAsked:
    """The server wants us to renew what we have, with new `keys` or without. Also at start, for
    new keys that were not answered yet."""

    keys: bool
    spread_s: float = 0.0


@dataclass(frozen=True)
class Renewed:
    """The server answered, and all is on disk: we have these fleet keys.

    `keys`: our own are new ones. What was sealed under the old ones is of no use any more.
    """

    fleet_epochs: frozenset[int]
    keys: bool = False


@dataclass(frozen=True)
class RenewalRefused:
    """The server will not renew; `reason` is for a person."""

    reason: str


@dataclass(frozen=True)
class Eligible:
    """What the owner's rules have against working now, for a person; empty: nothing.

    `network`: what of it is about the way to the broker, and holds back an upload, too.
    """

    against: str = ""
    network: str = ""


@dataclass(frozen=True)
class Room:
    """The link can take this many more publishes without queueing."""

    publishes: int


Event = (
    Tick
    | LinkUp
    | LinkDown
    | Announced
    | Answered
    | Fetching
    | Fetched
    | Trained
    | Evaluated
    | Failed
    | Sealed
    | Eligible
    | RenewalAsked
    | Renewed
    | RenewalRefused
    | Room
)


# ── Effects ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Remember:
    """Write this down, durably, before any later effect."""

    memory: Memory


Outgoing = Join | Init | NeedBlob | Report


@dataclass(frozen=True)
class Send:
    """Sign and publish to the server."""

    message: Outgoing


@dataclass(frozen=True)
class SendChunks:
    """Publish these chunks of the update in the outbox."""

    upload: bytes
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Fetch:
    """Collect a task or model from the broker, then say Fetched."""

    kind: Literal["task", "model"]
    blob: Blob


@dataclass(frozen=True)
class Train:
    """Train on local data from the fetched model, then say Trained or Failed."""

    round: int
    settings: Settings


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the fetched model on local data, then say Evaluated or Failed."""

    model_version: int


@dataclass(frozen=True)
class Keep:
    """Put the fetched model where this device's own programs find it. Nobody waits for that."""

    model_version: int
    round: int


@dataclass(frozen=True)
class Seal:
    """Seal what was trained and put it into the outbox, then say Sealed or Failed."""

    announcement: Announcement
    digest: bytes
    go: Go


@dataclass(frozen=True)
class Discard:
    """Delete an update from the outbox: it has a final answer, or its round is over."""

    upload: bytes


@dataclass(frozen=True)
class Renew:
    """Ask the server for what is newer, the `attempt`-th time; with `keys`, offer new ones."""

    keys: bool
    attempt: int


@dataclass(frozen=True)
class Stop:
    """Stop fetching, training or evaluating; `reason` is for a person."""

    reason: str


Effect = (
    Remember | Send | SendChunks | Fetch | Train | Evaluate | Keep | Seal | Discard | Renew | Stop
)
