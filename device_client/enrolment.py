"""Enrol over the broker: send the keys, wait for the certificate and the fleet key.

Asks again every few seconds until it is answered or time is over; the server gives
the same answer to the same keys, so a lost answer or a power cut costs nothing.

Once the identity is on the disk nothing needs the bundle: `forget_bundle` erases the one that
an installation put into the device's folder.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker_bridge.disk import erase
from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Bundle
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, random_bytes
from broker_bridge.wire.messages import Refused, ServerIdentity, Welcome
from broker_bridge.wire.topics import Topics
from device_client import identity
from device_client.access import access_to_enrol
from device_client.identity import Identity, Keys

__all__ = ["enrol", "forget_bundle"]

_ASK_AGAIN_S = 3.0


def enrol(
    bundle: Bundle,
    folder: Path,
    *,
    software: str,
    wait_s: float = 60.0,
    stopped: Callable[[], bool] = lambda: False,
    link_options: dict[str, Any] | None = None,
) -> Identity:
    """Enrol the device of `bundle`, with its state in `folder`, and return its identity.

    Raises LocalError when the server refuses or `folder` belongs to another device, and
    LinkError when broker or server do not answer within `wait_s`.
    """
    present = identity.load(folder)
    if present is not None:
        if (present.federation, present.device) != (bundle.federation, bundle.device):
            raise LocalError(
                f"{folder} belongs to {present.scope}; "
                f"use another folder for {bundle.federation}/{bundle.device}"
            )
        if present.root_public != bytes.fromhex(bundle.root_public):
            raise LocalError(
                f"{folder} belongs to {present.scope} of another fleet, with the same names and "
                "another root of trust; use another folder"
            )
        return present
    keys = identity.pending_keys(folder)
    root = bytes.fromhex(bundle.root_public)
    signed = bytes.fromhex(bundle.server_identity)
    server = enrolment.server_identity(root, bundle.federation, signed)
    link = access_to_enrol(folder, bundle).open(
        bundle.device,
        seed=keys.tls_seed,
        session_s=0,
        wait_s=wait_s,
        **(link_options or {}),
    )
    try:
        found = _converse(link, bundle, keys, server, software, wait_s, stopped)
    finally:
        link.close()
    identity.save(folder, found)
    return found


def _converse(
    link: PahoLink,
    bundle: Bundle,
    keys: Keys,
    server: ServerIdentity,
    software: str,
    wait_s: float,
    stopped: Callable[[], bool],
) -> Identity:
    topics = Topics(bundle.federation)
    link.subscribe([topics.identity, topics.down(bundle.device, "cfg")])
    until = time.monotonic() + wait_s
    ask_at = 0.0
    while time.monotonic() < until and not stopped():
        if time.monotonic() >= ask_at:
            ask_at = time.monotonic() + _ASK_AGAIN_S
            link.publish(
                topics.up(0, bundle.device, "enrol"), _request(bundle, keys, server, software)
            )
        event = link.receive(0.5)
        if isinstance(event, Message):
            link.ack(event)
            if event.topic == topics.identity:
                newest = _newest(bundle, server, event.payload)
                if newest != server:  # an old bundle: what was asked so far, nobody can open
                    server, ask_at = newest, 0.0
                continue
            answer = _understand(event, bundle, keys, server)
            if answer is not None:
                return answer
    raise LinkError(
        f"the broker at {bundle.broker_host}:{bundle.broker_port} answers, but the server of "
        f"{bundle.federation!r} does not; start it with `midge server`; if it runs, a newer bundle "
        f"was made for {bundle.device}, and this one is void"
    )


def _request(bundle: Bundle, keys: Keys, server: ServerIdentity, software: str) -> bytes:
    message = enrolment.request(
        identity.contact(bundle),
        sign=keys.sign,
        kem=keys.kem,
        tls_public=keys.tls_public,
        server_kem=server.kem_public,
        ephemeral=KemKey.from_seed(random_bytes(KEY_BYTES)),
        software=software,
    )
    return messages.encode(message)


def _newest(bundle: Bundle, server: ServerIdentity, signed: bytes) -> ServerIdentity:
    """The server's identity with the higher number, of those that the root signed."""
    try:
        heard = enrolment.server_identity(
            bytes.fromhex(bundle.root_public), bundle.federation, signed
        )
    except PeerError:
        return server
    return heard if heard.sequence > server.sequence else server


def _understand(
    message: Message, bundle: Bundle, keys: Keys, server: ServerIdentity
) -> Identity | None:
    """The identity in a true answer; None for anything that is not one."""
    contact = identity.contact(bundle)
    try:
        answer = messages.opened(
            server.sign_public, "cfg", contact.scope, message.payload, Welcome | Refused
        )
        if isinstance(answer, Refused):
            raise LocalError(f"the server refused to enrol {bundle.device}: {answer.reason}")
        configured = enrolment.open_welcome(
            contact, answer, kem=keys.kem, server_kem=server.kem_public
        )
        return identity.enrolled(bundle, keys, configured, server)
    except PeerError:
        return None  # forged, or for another: not worth ending the wait


def forget_bundle(path: Path, folder: Path, enrolled: Identity) -> bool:
    """Overwrite and remove the bundle of `enrolled`, and what TLS had of it; say whether it did.

    A bundle outside of `folder` is left alone, as somebody's own file; so is another bundle than
    the one this identity came from, which somebody may have put there to enrol anew.
    Raises LocalError.
    """
    shutil.rmtree(folder / "tls-bootstrap", ignore_errors=True)
    if path.parent.resolve() != folder.resolve() or path.is_symlink() or not path.exists():
        return False
    if bytes.fromhex(identity.read_bundle(path).token) != enrolled.psk:
        return False
    erase(path)
    return True
