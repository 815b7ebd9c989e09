"""What can happen in a round, seen from the server, and what is to be done: frozen words.

Events go into `server.coordinator`, effects come out of it. `server.service` performs
the effects and reports back with events.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from broker_bridge.limits import LIMITS
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Busy,
    Command,
    Go,
    Init,
    Join,
    Need,
    Presence,
    Reply,
    Report,
    RoundSummary,
    Until,
)

__all__ = [
    "AbandonRound",
    "Accept",
    "Accepted",
    "Acknowledge",
    "BeginUpload",
    "Begun",
    "CloseRound",
    "Closed",
    "Commanded",
    "Complete",
    "Effect",
    "EndRun",
    "Evaluate",
    "Evaluated",
    "Event",
    "Forget",
    "Inited",
    "Joined",
    "LinkDown",
    "LinkUp",
    "MarkPaused",
    "OpenRound",
    "Opened",
    "Publish",
    "Refuse",
    "Refused",
    "Reported",
    "Respond",
    "Room",
    "Rules",
    "Run",
    "Seen",
    "Send",
    "ShutOut",
    "StartRun",
    "Started",
    "Tick",
    "Unread",
    "Upload",
    "Withdraw",
]


@dataclass(frozen=True)
class Rules:
    """The operator's settings for rounds. A command may override the first three."""

    target: int = 0  # updates wanted; 0: one from each training device online
    quorum: int = 0  # updates needed at the deadline; 0: half of the target
    deadline_s: float = 600.0
    abandoned_max: int = 3  # abandoned rounds in a row that end a run
    evaluation_wait_s: float = 60.0
    packet_bytes_max: int = LIMITS.packet_bytes_max
    window: int = LIMITS.inflight_max
    uploads_max: int = 2000  # open at once, over all devices
    retry_after_s: float = 5.0


@dataclass(frozen=True)
class Run:
    """What an operator started, as it stands."""

    id: int
    task: str
    rounds: int
    until: Until | None = None
    target: int = 0
    quorum: int = 0
    deadline_s: float = 600.0
    rounds_done: int = 0
    abandoned_in_a_row: int = 0


@dataclass
class Upload:
    """One device's place in the open round."""

    device: str
    upload: bytes
    packet_bytes: int
    init: Init | None = None
    status: Literal["going", "accepting", "accepted", "rejected"] = "going"
    reason: str = ""
    attempt: int = 0
    quiet_until_s: float = 0.0  # told to wait until then; not told again before


# ── Events ──────────────────────────────────────────────────────────────────────────────


class _Word(msgspec.Struct, frozen=True):
    """A Struct, for a round makes several for each update: a frozen dataclass takes four times
    as long to make."""


class Tick(_Word, frozen=True):
    """Time passes; seconds on a clock that never goes back."""

    now_s: float


class LinkDown(_Word, frozen=True):
    """There is no connection to the broker."""


class LinkUp(_Word, frozen=True):
    """There is one again. Not `resumed`: the broker may have forgotten who is there."""

    resumed: bool


class Room(_Word, frozen=True):
    """The disk has room, or `trouble` says for a person what is wrong with it."""

    trouble: str = ""


class Unread(_Word, frozen=True):
    """What a command changed can be read, or `trouble` says why the server goes on as before."""

    trouble: str = ""


class Commanded(_Word, frozen=True):
    """An operator's command, decoded."""

    command: Command


class Started(_Word, frozen=True):
    """The run is written down (after StartRun)."""

    run: Run


class Seen(_Word, frozen=True):
    """An enrolled device's presence."""

    device: str
    presence: Presence


class ShutOut(_Word, frozen=True):
    """A device is suspended, or revoked: then what it gave to the open round is taken back."""

    device: str
    revoked: bool


class Opened(_Word, frozen=True):
    """The round is written down and announced (after OpenRound)."""

    announcement: Announcement
    digest: bytes
    update_bytes: int  # how long every honest update of this round is


class Joined(_Word, frozen=True):
    """A verified join. `uploads` are the ids this device may be given, one for each attempt."""

    device: str
    join: Join
    uploads: tuple[bytes, ...]


class Inited(_Word, frozen=True):
    """A verified commit. `ours`: its upload id is one that we hand to this device in this round."""

    device: str
    init: Init
    ours: bool = True


class Begun(_Word, frozen=True):
    """The spool is ready for an upload and lacks these chunks (after BeginUpload)."""

    upload: bytes
    missing: tuple[int, ...]


class Complete(_Word, frozen=True):
    """The last chunk of an upload was opened and stored."""

    upload: bytes


class Accepted(_Word, frozen=True):
    """These updates are in the sum, and on disk by one commit (after Accept)."""

    uploads: tuple[bytes, ...]


class Refused(_Word, frozen=True):
    """The update was not taken, for good (`rejected`) or for now (`busy`, `resend`)."""

    upload: bytes
    status: Literal["rejected", "busy", "resend"]
    reason: str


class Closed(_Word, frozen=True):
    """The new model is on disk and on the broker (after CloseRound)."""

    model_version: int
    server_evaluates: bool


class Evaluated(_Word, frozen=True):
    """The server measured a model on its own held-out data (after Evaluate)."""

    model_version: int
    examples: int
    metrics: Mapping[str, float]


class Reported(_Word, frozen=True):
    """A device that holds its data out measured a model."""

    device: str
    report: Report


Event = (
    Tick
    | LinkDown
    | LinkUp
    | Room
    | Unread
    | Commanded
    | Started
    | Seen
    | ShutOut
    | Opened
    | Joined
    | Inited
    | Begun
    | Complete
    | Accepted
    | Refused
    | Closed
    | Evaluated
    | Reported
)


# ── Effects ─────────────────────────────────────────────────────────────────────────────


class Respond(_Word, frozen=True):
    """Answer an operator."""

    reply: Reply


class StartRun(_Word, frozen=True):
    """Check the task, write the run down, then say Started."""

    command: Command
    run: Run


class OpenRound(_Word, frozen=True):
    """Make a round key, write the round down, announce it, then say Opened."""

    run: Run
    target: int
    quorum: int
    online: int


class Send(_Word, frozen=True):
    """Sign and publish to one device."""

    device: str
    message: Go | Busy | Need


class Acknowledge(_Word, frozen=True):
    """Tell a device what became of its update; those that follow one another are signed together.

    Decision 0136.
    """

    device: str
    ack: Ack


class BeginUpload(_Word, frozen=True):
    """Make room in the spool for an upload, then say Begun."""

    device: str
    init: Init


class Accept(_Word, frozen=True):
    """Open, check and sum a complete update, put it on disk, then say Accepted or Refused."""

    device: str
    init: Init


class Refuse(_Word, frozen=True):
    """Write down that an upload was rejected, and drop what was stored of it."""

    device: str
    upload: bytes
    reason: str


class Forget(_Word, frozen=True):
    """Drop what was stored of an attempt that its device replaced by another."""

    upload: bytes


class Withdraw(_Word, frozen=True):
    """Take back whatever a device gave to the open round, accepted or not, for good."""

    device: str
    reason: str


class CloseRound(_Word, frozen=True):
    """Make the new model, write it and the round's end down, announce it, then say Closed."""

    summary: RoundSummary


class AbandonRound(_Word, frozen=True):
    """Write down that the round ended without a model, and announce it."""

    summary: RoundSummary


class Evaluate(_Word, frozen=True):
    """Measure this model on the server's held-out data, then say Evaluated."""

    model_version: int


class Publish(_Word, frozen=True):
    """Retain the summary of a finished round on `metrics`, and write it down."""

    summary: RoundSummary


class MarkPaused(_Word, frozen=True):
    """Write down that the run is paused, or goes on."""

    run: Run
    paused: bool


class EndRun(_Word, frozen=True):
    """Write down that the run is over."""

    run: Run
    status: Literal["done", "stopped", "failed"]
    reason: str


Effect = (
    Respond
    | StartRun
    | OpenRound
    | Send
    | Acknowledge
    | BeginUpload
    | Accept
    | Refuse
    | Forget
    | Withdraw
    | CloseRound
    | AbandonRound
    | Evaluate
    | Publish
    | MarkPaused
    | EndRun
)
