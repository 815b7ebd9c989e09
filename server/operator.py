"""The operator's side of the control topics: ask the server, and watch it.

Whatever is done here can be done with `mosquitto_pub` and `mosquitto_sub` as well.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from broker_bridge.errors import LinkError, PeerError
from broker_bridge.link.access import Access
from broker_bridge.link.base import Message
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Command, Presence, Reply
from broker_bridge.wire.topics import OPERATOR, DeviceState, Topics
from server.fleet.home import Home

__all__ = ["Operator"]


class Operator:
    """A connection as the operator. Leaves nothing behind on the broker."""

    def __init__(self, access: Access, *, federation: str) -> None:
        """Connect. Raises LinkError with a sentence when the broker cannot be reached."""
        self._topics = Topics(federation)
        self._link = access.open(OPERATOR, session_s=0, wait_s=5.0)

    @classmethod
    def of(cls, home: Home) -> "Operator":
        """Connect with what is in the fleet's folder. Raises LocalError, LinkError."""
        config = home.config()
        return cls(home.access("operator", config), federation=home.federation(config))

    def ask(self, command: Command, *, wait_s: float = 10.0) -> Reply:
        """Publish a command and return the server's reply to it.

        Raises LinkError when none comes: the server is not running, most likely.
        """
        self._link.subscribe([self._topics.ctl_reply])
        self._link.publish(self._topics.ctl, messages.encode_json(command))
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0:
            event = self._link.receive(left)
            if not isinstance(event, Message):
                continue
            self._link.ack(event)
            try:
                reply = messages.decode_json(event.payload, Reply)
            except PeerError:
                continue
            if reply.id == command.id:
                return reply
        said = "the broker answers, but the server does not; start it with `midge server`"
        if command.cmd != "status":  # the server's session lasts, and so does what waits in it
            said += f", which may carry out this {command.cmd} then: the broker keeps it for it"
        raise LinkError(said)

    def devices(self, *, wait_s: float = 5.0) -> dict[str, Presence]:
        """Return what the broker retains of each device's state, by name.

        A broker answers filters in their order, so the server's own state, which comes last,
        ends the list; without one it ends after `wait_s`. What is no presence is passed over.
        """
        topics = self._topics
        self._link.subscribe([topics.all_states, topics.srv])
        found: dict[str, Presence] = {}
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0:
            event = self._link.receive(left)
            if not isinstance(event, Message):
                continue
            self._link.ack(event)
            with contextlib.suppress(PeerError):
                match topics.parse(event.topic):
                    case "srv":
                        break
                    case DeviceState(device) if event.payload:
                        found[device] = messages.decode_json(event.payload, Presence)
        return found

    def watch(self, stopped: Callable[[], bool]) -> Iterator[tuple[str, bytes]]:
        """Yield (topic, payload) of presence and metrics as they come."""
        topics = self._topics
        self._link.subscribe([topics.srv, topics.metrics, topics.all_states])
        while not stopped():
            event = self._link.receive(0.5)
            if isinstance(event, Message):
                self._link.ack(event)
                yield event.topic, event.payload

    def close(self) -> None:
        """Say goodbye."""
        self._link.close()
