"""What the server says is believed only after its signature was verified: here.

Each function takes what came over the link, opens it under the server's keys of an identity,
and returns what it says. Raises PeerError for what the server did not say to this device.
"""

from broker_bridge.errors import PeerError
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import sha256, verify
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Busy,
    Go,
    Need,
    Refused,
    Renewal,
    Welcome,
)
from device_client.events import Announced
from device_client.identity import Identity

__all__ = ["ANSWERS", "announcement", "answer", "configuration"]

_ANSWERS = {"go": Go | Busy, "need": Need, "ack": Ack}
ANSWERS = frozenset(_ANSWERS)  # kinds of topics


def announcement(identity: Identity, signed: bytes) -> Announced:
    """What is said to all of the federation about its round."""
    payload = verify(identity.server_sign, f"round {identity.federation}", signed)
    found: Announcement = messages.decode(payload, Announcement)
    if found.federation != identity.federation:
        raise PeerError("other_federation", "an announcement of another federation")
    return Announced(found, sha256(payload))


def answer(identity: Identity, kind: str, signed: bytes) -> Go | Busy | Need | Ack:
    """What is said to this device in a round."""
    found: Go | Busy | Need | Ack = messages.opened(
        identity.server_sign, kind, identity.scope, signed, _ANSWERS[kind]
    )
    return found


def configuration(identity: Identity, signed: bytes) -> Welcome | Refused | Renewal:
    """What is said to this device about its keys and certificate."""
    found: Welcome | Refused | Renewal = messages.opened(
        identity.server_sign, "cfg", identity.scope, signed, Welcome | Refused | Renewal
    )
    return found
