"""Why there is no connection, in sentences for people.

Promises: every way a connection can fail, or end, becomes one sentence that a person can act on.
`paho_session` tells what it saw in plain words and numbers; nothing here knows an MQTT library.
"""

import socket
import ssl
from dataclasses import dataclass, replace

from broker_bridge.limits import LIMITS
from broker_bridge.link.session_settings import SessionSettings

__all__ = [
    "TRESPASS",
    "UNSUPPORTED_VERSION",
    "Failure",
    "explain",
    "explain_goodbye",
    "explain_hang_up",
    "explain_refusal",
    "explain_silence",
    "explain_small_packets",
    "explain_tls",
    "suspect_a_copy",
]

TRESPASS = "it sent"  # begins what a broker did that no broker may
UNSUPPORTED_VERSION = (0x01, 0x84)  # MQTT 3.1.1 and MQTT 5 spelling
_MAY_PASS = (0x03, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F)  # unavailable, busy, quota, moved, rate
_NOT_WHO = (0x86, 0x87)  # bad user name or password; not authorised
_REFUSED_ALERTS = (
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "UNSUPPORTED_CERTIFICATE",
    "ACCESS_DENIED",
    "DECRYPT_ERROR",
)


@dataclass(frozen=True)
class Failure:
    """Why a connection failed. `final`: trying again without a person's help is no use."""

    reason: str
    final: bool = False
    try_older_mqtt: bool = False


# ── No connection came about ────────────────────────────────────────────────────────────


def explain(error: OSError, *, host: str, port: int) -> Failure:
    """Say why no connection to `host`:`port` came about."""
    where = f"{host}:{port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failure(
            f"the broker at {where} is not who it should be: {error.verify_message}; "
            "check that the CA (`ca` under [broker]) belongs to this broker, that its certificate "
            f"names {host!r}, and that this machine's clock is right",
            final=True,
        )
    if isinstance(error, ssl.SSLError):
        return explain_tls(str(error), where=where)
    if isinstance(error, socket.gaierror):
        return Failure(
            f"no machine is called {host!r} ({error.strerror}); "
            "check the broker's name and this machine's DNS"
        )
    if isinstance(error, ConnectionRefusedError):
        return Failure(f"nothing listens at {where}; start the broker there or correct the port")
    if isinstance(error, TimeoutError):
        return Failure(f"no answer from {where}; check the address, the firewall and the network")
    if isinstance(error, ConnectionResetError):
        return Failure(
            f"{where} hung up during the greeting; is it an MQTT broker, with TLS "
            "set as it is here?"
        )
    return Failure(f"no connection to {where}: {error.strerror or error}")


def explain_tls(text: str, *, where: str) -> Failure:
    """Say what OpenSSL meant by `text`."""
    alert = text.upper().replace(" ", "_")
    if "WRONG_VERSION_NUMBER" in alert or "RECORD_LAYER_FAILURE" in alert:
        return Failure(
            f"the broker at {where} does not speak TLS on this port; use its TLS port, or no TLS",
            final=True,
        )
    if "CERTIFICATE_REQUIRED" in alert or "HANDSHAKE_FAILURE" in alert:
        return Failure(
            f"the broker at {where} wants a client certificate; name one and its key in [broker]",
            final=True,
        )
    if any(word in alert for word in _REFUSED_ALERTS):
        return Failure(
            f"the broker at {where} refused our client certificate; it may be from "
            "another CA, expired or revoked: enrol again, or show one that this broker knows",
            final=True,
        )
    return Failure(f"TLS with {where} failed: {text}")


def explain_silence(*, where: str) -> Failure:
    """Say what it may be that took our CONNECT and never answered."""
    return Failure(
        f"{where} accepted the connection but did not answer; is it an MQTT broker?",
        try_older_mqtt=True,
    )


# ── The broker answered, and not as we hoped ────────────────────────────────────────────


def explain_refusal(code: int, said: str, settings: SessionSettings, *, protocol: str) -> Failure:
    """Say what a broker meant that answered CONNECT with `code` (MQTT 5.0 §3.2.2.2; paho turns
    those of 3.1.1 into these), which in words is `said`.
    """
    if code in UNSUPPORTED_VERSION:
        return Failure(
            f"the broker at {settings.where} does not speak MQTT {protocol}", try_older_mqtt=True
        )
    return Failure(_not_let_in(code, said, settings), final=code not in _MAY_PASS)


def _not_let_in(code: int, said: str, settings: SessionSettings) -> str:
    """Some brokers say "not authorised" to a wrong password."""
    broker, advice = f"the broker at {settings.where}", settings.advice
    if code in _NOT_WHO and settings.username is not None:
        refused = f"{broker} refused the user name {settings.username!r} or its password ({said})"
        return f"{refused}; {advice or 'correct them'}"
    refused = f"{broker} would not let {settings.client_id!r} in: {said}"
    return f"{refused}; {advice}" if advice else refused


def explain_small_packets(packet_bytes_max: int, *, where: str) -> Failure:
    """Say that a broker takes no packet that we could do with."""
    return Failure(
        f"the broker at {where} takes packets of at most {packet_bytes_max} bytes, and midge "
        f"needs {LIMITS.packet_bytes_min}; raise its limit (max_packet_size in mosquitto.conf)",
        final=True,
    )


# ── A connection ended ──────────────────────────────────────────────────────────────────


def explain_goodbye(said: str) -> Failure:
    """Say that the broker ended the connection, and said why (MQTT 5.0 §3.14)."""
    return Failure(f"the broker ended the connection: {said}")


def explain_hang_up(error: str, *, where: str, greeted: bool, shook_hands: bool) -> Failure:
    """Say why a connection ended without a goodbye. `error`: what was logged of it, if anything.

    `greeted`: the broker had answered CONNECT. `shook_hands`: TLS was up.
    """
    if "SSL" in error:
        return explain_tls(error, where=where)
    if TRESPASS in error:
        what = error[error.index(TRESPASS) :]
        return Failure(f"hung up on the broker at {where}: {what}, which no broker may")
    if greeted:
        return Failure(f"the connection to {where} was lost")
    if shook_hands:
        perhaps = "after the TLS handshake; is it an MQTT broker that takes our certificate?"
    else:
        perhaps = "at once; is it an MQTT broker, and is TLS set there as it is here?"
    return Failure(f"{where} hung up without a word {perhaps}", try_older_mqtt=True)


def suspect_a_copy(failure: Failure) -> Failure:
    """Add what may be behind it when one connection after another ends soon after it was made."""
    return replace(
        failure,
        reason=f"{failure.reason}, again soon after it was made: is somebody else connected under "
        "our name, from a copy of this card or folder? Stop one of the two",
    )
