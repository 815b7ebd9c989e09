"""The MQTT session against a raw socket that answers with any bytes."""

import functools
import select
import socket
import time

from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.paho_session import Connection, PahoSession
from broker_bridge.link.session_settings import SessionSettings
from tests.fuzz.target import split

__all__ = ["CONNACK_5", "Driven", "follow", "listener", "mqtt", "mqtt_seeds"]

CONNACK_5 = bytes.fromhex("2006000003210014")  # no session; properties: receive maximum 20
CONNACK_3 = bytes.fromhex("20020000")


class Driven(PahoSession):
    """The MQTT session without a thread: a target takes its steps."""

    def _poke(self) -> None:
        pass


@functools.cache
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def mqtt(data: bytes) -> None:
    """A TCP server that answers CONNECT, or a session that has begun, with any bytes."""
    mode, rest = split(data, 4)
    v5, greeted = mode % 2 == 0, mode >= 2
    link = Driven(SessionSettings(
        host="127.0.0.1", port=listener().getsockname()[1], client_id="fuzz", keepalive_s=1000,
        protocol="5.0" if v5 else "3.1.1", connect_timeout_s=5.0,
    ))  # fmt: skip
    link.subscribe(["a/#"])
    link.publish("a/b", b"x")
    this = link._begin()
    link._dial(this)
    peer, _ = listener().accept()
    with peer:
        peer.sendall((CONNACK_5 if v5 else CONNACK_3) * greeted + rest)
        peer.shutdown(socket.SHUT_WR)
        follow(link, this)
    link._end(this)
    assert link.limits.packet_bytes_max >= LIMITS.packet_bytes_min
    assert link.limits.inflight_max >= 1
    while (event := link.receive(0)) is not None:
        if isinstance(event, Message):
            link.ack(event)


def follow(link: Driven, this: Connection) -> None:
    """Take the session's steps until the connection ends."""
    while link._goes_on(this, time.monotonic()):
        link._prepare(this)
        if this.socket is None:
            return
        readable, writable, _ = select.select([this.socket], [this.socket], [], 1.0)
        link._work(this, readable=bool(readable), writable=bool(writable))


def mqtt_seeds() -> list[bytes]:
    limits = bytes.fromhex("200f00000c2700040000210014240122000a")
    refused = bytes.fromhex("2003008700")
    session = (
        "9003000101"  # SUBACK, MQTT 3.1.1
        "900400010001"  # SUBACK, MQTT 5
        "40020001"  # PUBACK
        "d000"  # PINGRESP
    )
    news = bytes.fromhex("3207") + b"\x00\x01a\x00\x09" + b"hi"
    news5 = bytes.fromhex("3208") + b"\x00\x01a\x00\x09\x00" + b"hi"
    return [
        b"\x00" + CONNACK_5, b"\x00" + limits, b"\x00" + refused, b"\x01" + CONNACK_3,
        b"\x01\x20\x02\x00\x05", b"\x02" + news5 + bytes.fromhex(session[10:]),
        b"\x03" + news + bytes.fromhex(session[:10]), b"\x02\xe0\x02\x8b\x00",
        b"\x02" + bytes.fromhex("400400011000"), b"\x03\x34\x07\x00\x01a\x00\x09hi",
    ]  # fmt: skip
