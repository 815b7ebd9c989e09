"""What the rest of midge may ask of a connection to a broker, whichever engine carries it.

A Link delivers at least once: a message may come twice, late, or out of order, and
a publish that was taken may still be lost by the broker. Everything above is built
on that. A Link promises only bounds: it holds no more than LIMITS allows, it never
sends a packet larger than the broker accepts, and it keeps no more publishes in
flight than the broker asked for.

One thread owns a Link. Only `close` and `wake` may be called from another.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec

__all__ = ["Connected", "Disconnected", "Link", "LinkEvent", "LinkLimits", "Message"]


class Message(msgspec.Struct, frozen=True):
    """One message from the broker. Hand it to `Link.ack` once it needs no redelivery.

    `retained`: it was waiting on the broker before we asked for its topic. `token` is the
    link's own. The same type describes a last will.
    """

    topic: str
    payload: bytes
    retained: bool = False
    token: int = 0


@dataclass(frozen=True)
class LinkLimits:
    """What the broker told us when it accepted the connection (MQTT 5), or safe guesses (3.1.1)."""

    packet_bytes_max: int
    inflight_max: int
    protocol: str = "5.0"


@dataclass(frozen=True)
class Connected:
    """The session is up. `resumed`: the broker still has our subscriptions and queue.

    Not resumed, it may have forgotten what we retained there, too.
    """

    limits: LinkLimits
    resumed: bool


@dataclass(frozen=True)
class Disconnected:
    """The connection went away; the Link is already trying again."""

    reason: str


LinkEvent = Message | Connected | Disconnected


@runtime_checkable
class Link(Protocol):
    """A session with a broker. QoS 1 throughout."""

    @property
    def limits(self) -> LinkLimits:
        """The limits of the present (or last) connection."""

    def room(self) -> int:
        """How many publishes would go out at once, without waiting for acknowledgements.

        0 while there is no connection.
        """

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue a publish and return at once.

        Survives a reconnect, not a restart of this process. Raises LinkError when the
        packet is larger than the broker accepts, the send queue is full or the link is
        closed, and ValueError for a topic with a wildcard: that is the caller's bug.
        """

    def together(self) -> AbstractContextManager[None]:
        """What is published and acknowledged inside may wait for its end, and go out at once.

        For an owner who answers many messages in a row. The network rests meanwhile, though never
        for long: two threads that run for one message each spend more on that than on messages.
        """

    def apart(self) -> AbstractContextManager[None]:
        """Inside `together`: while the owner waits for something else, the network goes on."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged every publish; say whether it did."""

    def subscribe(self, filters: Sequence[str]) -> None:
        """Ask for topics, now and after each reconnect; retained messages are sent again.

        Raises ValueError for what is no filter.
        """

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Stop asking for topics."""

    def receive(self, timeout_s: float) -> LinkEvent | None:
        """Return the next message or change of the connection, or None after `timeout_s`.

        A change nobody looked at gives way to a later one: what is told is where we stand.
        """

    def wake(self) -> None:
        """Make a waiting `receive` return None early. For another thread that has news."""

    def ack(self, message: Message) -> None:
        """Tell the broker that `message` needs no redelivery.

        What is not acknowledged holds up what comes after it, once the receive window is
        full, and comes again on the next connection.
        """

    def close(self) -> None:
        """Send what is queued if the broker is there (a second at most), say goodbye, and stop."""
