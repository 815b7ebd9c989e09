"""What the database holds, as plain typed values. No secret shows in a `repr`.

Times are seconds since 1970 by the server's clock, for people and for deadlines that are
recomputed after a restart. Fields ending in `_json` are JSON text made by the caller.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

__all__ = [
    "Certificate",
    "Device",
    "DeviceStatus",
    "Model",
    "Receipt",
    "ReceiptStatus",
    "Round",
    "RoundStatus",
    "Run",
    "RunStatus",
    "Token",
    "Wanted",
]

# waiting: has a token that is right, and waits for a person. removed: as revoked, and not listed.
DeviceStatus = Literal["waiting", "enrolled", "suspended", "revoked", "removed"]
Wanted = Literal["", "rotate"]
RunStatus = Literal["open", "paused", "done", "stopped", "failed"]
RoundStatus = Literal["open", "closed", "abandoned"]
ReceiptStatus = Literal["going", "accepted", "rejected", "late", "withdrawn"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that has enrolled, or waits for it.

    `certificate_serial`: of its newest certificate, hexadecimal; "" while unknown.
    `certified_until`: when that one ends; 0 while unknown. `keys_since`: when its present keys
    came; 0 while unknown. `wanted`: what it will be asked for when it is next heard of.
    """

    name: str
    sign_public: bytes
    kem_public: bytes
    tls_public: bytes
    psk: bytes = field(repr=False)
    status: DeviceStatus = "enrolled"
    software: str = ""
    enrolled_at: float
    last_seen: float | None = None
    last_round: int = 0
    certificate_serial: str = ""
    certified_until: float = 0.0
    keys_since: float = 0.0
    wanted: Wanted = ""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One that was made for a name: its serial number, hexadecimal, and when it ends.

    `tls_public`: the device's key in it, and `pem`: itself, for whoever asks for it again; both
    empty for a bundle's, whose key is not the device's own.
    """

    serial: str
    device: str
    until: float
    tls_public: bytes = b""
    pem: str = ""


@dataclass(frozen=True, kw_only=True)
class Token:
    """The right to enrol one device, once; `by_hand`: and a person must accept it."""

    device: str
    secret: bytes = field(repr=False)
    created_at: float
    expires_at: float
    used_at: float | None = None
    by_hand: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an operator started: several rounds of one task. `id` is given by the database."""

    id: int = 0
    task_name: str
    task_digest: bytes
    rounds_total: int
    rounds_done: int = 0
    until_json: str = "{}"
    target: int
    quorum: int
    deadline_s: float
    status: RunStatus = "open"
    reason: str = ""
    started_at: float
    ended_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round. `announcement` is the signed bytes as published; its keys go at the close."""

    number: int
    run_id: int
    status: RoundStatus = "open"
    announcement: bytes
    round_key: bytes | None = field(repr=False)
    fleet_key: bytes | None = field(default=None, repr=False)  # of its epoch; None: the present
    model_before: int
    model_after: int | None = None
    opened_at: float
    closed_at: float | None = None
    summary_json: str = "{}"


# One is made for every update, in a tenth of the time that a dataclass takes.
class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One upload and what became of it. `init` is the device's signed bytes."""

    upload: bytes
    round: int
    device: str
    init: bytes
    status: ReceiptStatus = "going"
    reason: str = ""
    examples: int
    metrics_json: str = "{}"
    at: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """One version of a task's weights; the bytes are a file (server/store/models.py)."""

    version: int
    task_digest: bytes
    digest: bytes
    size_bytes: int
    round: int
    created_at: float
    metrics_json: str = "{}"
    optimiser_state_digest: bytes | None = None
