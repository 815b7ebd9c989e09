"""What a session with a broker is told before it begins: whom to call, as whom, how patiently.

`paho_session` says how a session keeps to it.
"""

import random as _random
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.queued_link import MIB

__all__ = ["Options", "SessionSettings"]


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """One session. `PahoLink.open` explains what does not explain itself."""

    host: str
    port: int
    client_id: str
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    advice: str = ""  # what a person changes when the broker does not let us in
    will: Message | None = None
    will_delay_s: int = 0
    keepalive_s: int = 60
    session_s: int = 86_400
    receive_max: int = 64
    receive_queue_bytes_max: int = 8 * MIB
    send_queue_bytes_max: int = 64 * MIB
    connect_timeout_s: float = 5.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    protocol: Literal["auto", "5.0", "3.1.1"] = "auto"
    # What we hold to where the broker does not say (MQTT 3.1.1) or allows more than is wanted.
    packet_bytes_max: int | None = None
    inflight_max: int = LIMITS.inflight_max  # which nobody goes beyond unless the broker says so
    publishes_per_s: float = 0.0  # 0: as fast as they are acknowledged
    random: Callable[[], float] = _random.random

    @property
    def where(self) -> str:
        """The broker's address, as sentences name it."""
        return f"{self.host}:{self.port}"


class Options(TypedDict, total=False):
    """The settings that have a default, as keywords; what they mean is said above and in
    `PahoLink.open`.
    """

    username: str | None
    password: str | None
    advice: str
    will: Message | None
    will_delay_s: int
    keepalive_s: int
    session_s: int
    receive_max: int
    receive_queue_bytes_max: int
    send_queue_bytes_max: int
    connect_timeout_s: float
    backoff_first_s: float
    backoff_max_s: float
    protocol: Literal["auto", "5.0", "3.1.1"]
    packet_bytes_max: int | None
    inflight_max: int
    publishes_per_s: float
    random: Callable[[], float]
