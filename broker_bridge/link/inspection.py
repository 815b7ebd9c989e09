"""Look at a broker from outside, and at the certificates that lead there: for the doctors.

Each function yields findings, as `broker_bridge.checkup` explains. The connections have client
ids of their own, keep no session, and publish only what changes nothing: so a fleet at work
can be looked at.
"""

import base64
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from broker_bridge.checkup import Finding
from broker_bridge.disk import disk_errors
from broker_bridge.errors import LinkError, LocalError
from broker_bridge.limits import LIMITS
from broker_bridge.link.access import Access
from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.tls import TlsFiles
from broker_bridge.wire.envelope import random_bytes

__all__ = ["DAYS_WARNING", "Broker", "certificate", "certificate_dates"]

DAYS_WARNING = 30  # a certificate that ends sooner
_ANSWER_S = 5.0
_INFLIGHT_MAX = 65_535  # what a broker may say (MQTT 5.0 §3.2.2.3.3); so we hear what it does


# ── Certificates ────────────────────────────────────────────────────────────────────────


def certificate(name: str, path: Path, now: datetime, *, renew: str) -> Iterator[Finding]:
    """Whether the certificate in `path` is valid now, and for how long."""
    with disk_errors(path):
        pem = path.read_bytes()
    try:
        begins, ends = certificate_dates(pem)
    except LocalError as error:
        yield Finding(name, "problem", f"{path}: {error}", renew)
        return
    if now < begins:
        yield Finding(
            name, "problem", f"valid only from {begins:%Y-%m-%d} on", "set this machine's clock"
        )
    elif now >= ends:
        yield Finding(name, "problem", f"expired on {ends:%Y-%m-%d}", renew)
    elif (left := (ends - now).days) < DAYS_WARNING:
        yield Finding(name, "warning", f"expires on {ends:%Y-%m-%d}, in {left} days", renew)
    else:
        yield Finding(name, "ok", f"valid until {ends:%Y-%m-%d}")


def certificate_dates(pem: bytes) -> tuple[datetime, datetime]:
    """Return from when and until when a certificate is valid (RFC 5280 §4.1.2.5), UTC.

    Verifies nothing. A device has no X.509 library, so this walks the few levels of DER
    down to the dates. Raises LocalError for what is no certificate.
    """
    match = re.search(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", pem, re.S)
    try:
        der = base64.b64decode(match[1]) if match else b""
        fields = _parts(_parts(_parts(der)[0][1])[0][1])
        skip = 1 if fields[0][0] == 0xA0 else 0  # the version, in every X.509 v3
        begins, ends = (_moment(*each) for each in _parts(fields[skip + 3][1])[:2])
    except (ValueError, IndexError):
        raise LocalError("this is no certificate in PEM form") from None
    return begins, ends


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """The (tag, content) of each element that stands in `der`. Raises ValueError, IndexError."""
    found: list[tuple[int, bytes]] = []
    while der:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start], "big")
        if start + length > len(der):
            raise ValueError("cut short")
        found.append((tag, der[start : start + length]))
        der = der[start + length :]
    return found


def _moment(tag: int, text: bytes) -> datetime:
    """UTCTime (0x17) has two digits of the year, up to 2049; GeneralizedTime has four."""
    digits = text.decode("ascii")
    if tag == 0x17:
        digits = ("20" if digits[:2] < "50" else "19") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


# ── The broker ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Broker:
    """A broker to be looked at, from here, by who gets in with `access`.

    `name`: what our client ids begin with. Where `access` gives the one that is in use
    already, the broker cuts that off; it comes back.
    """

    access: Access
    name: str

    def connect(self, access: Access | None = None, *, wait_s: float = 3.0) -> PahoLink:
        """A connection that leaves nothing behind. Raises LinkError, LocalError."""
        return (access or self.access).open(
            self.name, session_s=0, wait_s=wait_s, inflight_max=_INFLIGHT_MAX
        )

    def reach(self) -> Iterator[Finding]:
        """Whether it lets us in, and what it takes."""
        with contextlib.closing(self.connect()) as link:
            limits = link.limits
        who = self.access.username
        by = "" if who is None else f" with the password of {who!r}"
        yield Finding("broker", "ok", f"{self.access.host}:{self.access.port} let us in{by}")
        yield from _limits(limits)

    def strangers_refused(self) -> Iterator[Finding]:
        """Whether a stranger, who has neither certificate nor password, is turned away."""
        files = TlsFiles(self.access.tls.ca, floor_s=self.access.tls.floor_s)
        stranger = replace(self.access, tls=files, username=None, password=None)
        wants = "certificate" if self.access.username is None else "password"
        try:
            self.connect(stranger).close()
        except LinkError:
            yield Finding("strangers", "ok", f"without a {wants} nobody gets in")
        else:
            yield Finding(
                "strangers",
                "problem",
                f"a client without a {wants} was let in",
                "set `require_certificate true` in mosquitto.conf, as midge's does"
                if wants == "certificate"
                else "set `allow_anonymous false` in mosquitto.conf, or what your broker calls it",
            )

    def access_ruled(self, *, forbidden: str) -> Iterator[Finding]:
        """Whether the broker refuses us `forbidden`. What is sent there is empty, and not kept."""
        with contextlib.closing(self.connect()) as link:
            link.publish(forbidden, b"")
            answered = link.flush(_ANSWER_S)
            refused, protocol = link.refused, link.limits.protocol
        if protocol != "5.0":
            yield Finding(
                "access rules",
                "warning",
                "MQTT 3.1.1 does not say what is refused",
                "use a broker that speaks MQTT 5, and mosquitto.acl",
            )
        elif not answered:
            yield Finding(
                "access rules",
                "warning",
                f"no answer to a publish on {forbidden}",
                "ask again; look at the broker's log",
            )
        elif refused:
            yield Finding("access rules", "ok", f"{forbidden} was refused to us, as it should be")
        else:
            yield Finding(
                "access rules",
                "problem",
                f"we may publish on {forbidden}, where only the server may",
                "set `acl_file` in mosquitto.conf to midge's mosquitto.acl, and restart the broker",
            )

    def retains(self, scratch: str) -> Iterator[Finding]:
        """Whether it keeps a retained message on the topic `scratch`, which is cleared again."""
        mark = random_bytes(8)
        with contextlib.closing(self.connect()) as link:
            link.publish(scratch, mark, retain=True)
            taken = link.flush(_ANSWER_S) and not link.refused
        if taken and self._kept(scratch) == mark:
            yield Finding("retained", "ok", "a retained message came back to a new client")
        else:
            yield Finding(
                "retained",
                "problem",
                "a retained message was not taken, or did not come back",
                "set `retain_available true`, and let midge-server write everywhere below "
                "midge/v1 (mosquitto.acl)",
            )

    def _kept(self, scratch: str) -> bytes | None:
        """What lies retained on `scratch`, which is cleared."""
        with contextlib.closing(self.connect()) as link:
            link.subscribe([scratch])
            kept = _first_message(link)
            link.publish(scratch, b"", retain=True)
            link.flush(_ANSWER_S)
        return kept.payload if kept is not None and kept.retained else None


def _first_message(link: PahoLink) -> Message | None:
    while (event := link.receive(_ANSWER_S)) is not None:
        if isinstance(event, Message):
            return event
    return None


def _limits(limits: LinkLimits) -> Iterator[Finding]:
    said = (
        f"MQTT {limits.protocol}, packets up to {limits.packet_bytes_max:,} bytes, "
        f"{limits.inflight_max:,} in flight"
    )
    if limits.protocol != "5.0":
        yield Finding(
            "broker limits",
            "warning",
            f"{said} (guessed: MQTT 3.1.1 does not say)",
            "use a broker that speaks MQTT 5, or set packet_bytes_max to what this one takes",
        )
    elif limits.packet_bytes_max < LIMITS.packet_bytes_max:
        yield Finding(
            "broker limits",
            "warning",
            f"{said}: models go in more and smaller chunks",
            f"set max_packet_size to {LIMITS.packet_bytes_max:,} or more",
        )
    elif limits.inflight_max < LIMITS.inflight_max:
        yield Finding(
            "broker limits",
            "warning",
            f"{said}: uploads over slow lines take longer",
            f"set max_inflight_messages to {LIMITS.inflight_max}",
        )
    else:
        yield Finding("broker limits", "ok", said)
