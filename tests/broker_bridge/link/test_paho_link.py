"""The MQTT link against a real mosquitto that dies, stalls, limits and refuses."""

import contextlib
import dataclasses
import logging
import os
import random
import select
import socket
import threading
import time

import pytest

from broker_bridge.errors import LinkError, LocalError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Disconnected, Message
from broker_bridge.link.local_broker import free_port
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.poller import raise_file_limit
from broker_bridge.link.queued_link import packet_bytes
from broker_bridge.link.session_settings import Options, SessionSettings
from broker_bridge.link.tls import TlsFiles
from server.fleet.authority import Authority
from tests.broker_bridge.link.proxy import Proxy
from tests.broker_bridge.link.reading import (
    GIVE_UP_S,
    cut_and_back,
    event_of,
    messages_until,
    reason_of,
    subscribed,
)
from tests.fuzz.answering import Driven

VERSIONS = pytest.mark.parametrize("protocol", ["5.0", "3.1.1"])


# ------------------------------------------------------------------ the broker dies


@VERSIONS
def test_a_killed_broker_costs_the_session_but_no_publish_and_no_subscription(
    plain_broker, links, protocol
):
    broker = plain_broker()
    link = subscribed(links(broker.port, "a", protocol=protocol), "news", echo="echo/a")
    broker.kill()
    event_of(link, Disconnected)
    for i in range(100):
        link.publish("news", b"%d" % i)
    broker.start()
    assert not event_of(link, Connected).resumed
    link.publish("news", b"end")
    got = messages_until(link, b"end")
    # The first may leave before the broker knows the subscription again; the rest is heard.
    assert link.flush(GIVE_UP_S)
    assert {int(m.payload) for m in got} <= set(range(100))
    link.publish("news", b"after")
    assert messages_until(link, b"after") == []


@VERSIONS
def test_a_broker_restarted_in_order_resumes_sessions_and_keeps_retained_messages(
    plain_broker, links, protocol
):
    broker = plain_broker("persistence true", "persistence_location /var/lib/mosquitto/")
    link = subscribed(links(broker.port, "a", protocol=protocol), "news", echo="echo/a")
    link.publish("kept", b"still here", retain=True)
    assert link.flush(GIVE_UP_S)
    broker.restart()
    assert event_of(link, Connected).resumed
    link.subscribe(["kept"])
    assert event_of(link, Message).payload == b"still here"
    link.publish("news", b"heard")
    assert messages_until(link, b"heard") == []


def test_publishes_in_flight_when_the_line_breaks_are_sent_again(plain_broker, links):
    broker = plain_broker()
    reader = subscribed(links(broker.port, "reader"), "bulk", echo="echo/r")
    with Proxy(broker.port) as proxy:
        writer = links(proxy.port, "writer")
        sent = [b"%d " % i + bytes(10_000) for i in range(200)]
        for i, payload in enumerate(sent):
            writer.publish("bulk", payload)
            if i % 50 == 25:
                proxy.cut()
        assert writer.flush(GIVE_UP_S)
        assert writer.connections > 1
        writer.publish("bulk", b"end")
        assert {m.payload for m in messages_until(reader, b"end")} == set(sent)
        writer.close()


@VERSIONS
def test_a_line_cut_again_and_again_loses_nothing_in_either_direction(
    plain_broker, links, protocol
):
    broker = plain_broker()
    draw = random.Random(7)
    with Proxy(broker.port) as near, Proxy(broker.port) as far:
        writer = links(near.port, "writer", protocol=protocol)
        reader = subscribed(links(far.port, "reader", protocol=protocol), "bulk", echo="echo/r")
        got, sent = set(), 0
        while len(got) < 1000:
            if sent < 1000 and writer.room() > 0:
                writer.publish("bulk", b"%d " % sent + bytes(2000))
                sent += 1
                if draw.random() < 0.01:
                    draw.choice([near, far]).cut()
            event = reader.receive(0.01 if sent < 1000 else GIVE_UP_S)
            if isinstance(event, Message):
                got.add(int(event.payload.split()[0]))
                reader.ack(event)
            elif sent == 1000:
                assert event is not None, f"{1000 - len(got)} of 1000 never came"
        assert writer.connections > 1
        assert reader.connections > 1
        writer.close()
        reader.close()


class HangsUpOnce(Proxy):
    """Ends the first connection without a word, as a broker does that is going down."""

    def _accept(self):
        self.blocked = not hasattr(self, "was_blocked")
        self.was_blocked = True
        super()._accept()


def test_a_broker_that_was_going_down_is_not_taken_for_an_old_one_for_ever(plain_broker, links):
    """MQTT 3.1.1 does not tell how large a packet may be: one too large would go round for ever."""
    broker = plain_broker("max_packet_size 2000")
    with HangsUpOnce(broker.port) as proxy:
        link = links(proxy.port, "a")
        assert event_of(link, Connected).limits.protocol == "3.1.1"
        proxy.cut()
        limits = event_of(link, Connected).limits
        assert (limits.protocol, limits.packet_bytes_max) == ("5.0", 2000)


def test_a_line_that_breaks_but_carries_a_good_deal_each_time_is_not_left_alone(
    plain_broker, links
):
    """It would be an hour until an update is through that a minute is enough for."""
    broker = plain_broker()
    with Proxy(broker.port) as proxy:
        link = links(proxy.port, "a", backoff_first_s=0.01, backoff_max_s=10_000.0)
        event_of(link, Connected)
        for _ in range(25):  # doubled each time, the wait would be days by now
            link.publish("t", bytes(50_000))
            assert link.flush(GIVE_UP_S)
            cut_and_back(link, proxy.cut)


# ------------------------------------------------------------------ the line stalls


@VERSIONS
def test_a_line_that_carries_nothing_is_noticed_by_the_keep_alive(plain_broker, links, protocol):
    broker = plain_broker()
    with Proxy(broker.port) as proxy:
        link = links(proxy.port, "a", keepalive_s=1, protocol=protocol)
        event_of(link, Connected)
        proxy.stalled = True
        event_of(link, Disconnected)
        proxy.cut()
        proxy.stalled = False
        event_of(link, Connected)
        link.close()


def test_an_idle_link_with_a_short_keep_alive_stays_connected(plain_broker, links):
    broker = plain_broker()
    link = links(broker.port, "a", keepalive_s=2)
    event_of(link, Connected)
    assert link.receive(4.5) is None  # a broker hangs up after one and a half keep-alives
    assert link.connections == 1


def test_a_short_absence_raises_no_will(plain_broker, links):
    broker = plain_broker()
    watcher = subscribed(links(broker.port, "watcher"), "state", echo="echo/w")
    with Proxy(broker.port) as proxy:
        link = links(proxy.port, "a", will=Message("state", b"lost"), will_delay_s=60)
        event_of(link, Connected)
        proxy.cut()
        event_of(link, Connected)
        link.publish("state", b"end")
        assert messages_until(watcher, b"end") == []
        link.close()


# ------------------------------------------------------------------ limits


def test_the_brokers_packet_limit_is_obeyed_to_the_byte(plain_broker, links):
    broker = plain_broker("max_packet_size 2000")
    link = subscribed(links(broker.port, "a"), "t", echo="echo/a")
    assert link.limits.packet_bytes_max == 2000
    largest = bytes(2000 - packet_bytes("t", b"x" * 1000, protocol="5.0") + 1000)
    link.publish("t", largest)
    assert event_of(link, Message).payload == largest
    with pytest.raises(LinkError, match="2001 bytes for t"):
        link.publish("t", largest + b"x")
    assert link.connections == 1


def test_the_brokers_window_is_obeyed(plain_broker, links):
    broker = plain_broker("max_inflight_messages 3")
    link = links(broker.port, "a")
    assert link.limits.inflight_max == 3
    for _ in range(50):
        link.publish("t", b"x")
        assert len(link._inflight) <= 3
    assert link.flush(GIVE_UP_S)
    assert link.connections == 1  # a broker whose window is overrun hangs up


def test_what_a_new_broker_finds_too_large_is_given_up_and_the_rest_is_sent(plain_broker, links):
    broker = plain_broker()
    link = links(broker.port, "a", protocol="5.0")
    event_of(link, Connected)
    broker.kill()
    event_of(link, Disconnected)
    link.publish("large", bytes(10_000))
    link.publish("small", b"x")
    plain_broker("max_packet_size 2000", port=broker.port)
    event_of(link, Connected)
    assert link.flush(GIVE_UP_S)
    assert (link.refused, link.last_refused) == (1, "large")


def test_on_mqtt_3_a_packet_the_broker_hangs_up_on_is_given_up_in_the_end(plain_broker, links):
    broker = plain_broker("max_packet_size 2000")
    link = links(broker.port, "a", protocol="3.1.1", backoff_max_s=0.05)
    link.publish("large", bytes(10_000))
    link.publish("small", b"x")
    assert link.flush(GIVE_UP_S)
    assert (link.refused, link.last_refused) == (1, "large")


@VERSIONS
def test_our_own_limits_are_obeyed_where_the_broker_allows_more_or_says_nothing(
    plain_broker, links, protocol
):
    broker = plain_broker("max_packet_size 4000")
    link = links(broker.port, "a", protocol=protocol, packet_bytes_max=2000, inflight_max=3)
    assert (link.limits.packet_bytes_max, link.limits.inflight_max) == (2000, 3)
    with pytest.raises(LinkError, match="the broker's limit of 2000"):
        link.publish("t", bytes(2000))
    for _ in range(50):
        link.publish("t", bytes(1900))
        assert len(link._inflight) <= 3
    assert link.flush(GIVE_UP_S)
    assert (link.connections, link.refused) == (1, 0)


def test_a_broker_that_takes_less_than_our_own_limit_is_obeyed(plain_broker, links):
    broker = plain_broker("max_packet_size 2000")
    link = links(broker.port, "a", protocol="5.0", packet_bytes_max=4000)
    assert link.limits.packet_bytes_max == 2000


def test_a_publish_waits_for_its_turn(plain_broker, links):
    reader = subscribed(links(plain_broker().port, "reader"), "t", echo="echo/r")
    slow = links(reader._settings.port, "slow", publishes_per_s=0.001)
    slow.publish("t", b"first")
    slow.publish("t", b"second, in a thousand seconds")
    assert event_of(reader, Message).payload == b"first"
    assert not slow.flush(0.5)
    assert reader.receive(0.0) is None
    assert slow.connections == 1


def test_a_pace_loses_nothing(plain_broker, links):
    reader = subscribed(links(plain_broker().port, "reader"), "t", echo="echo/r")
    link = links(reader._settings.port, "paced", publishes_per_s=500.0)
    for i in range(50):
        link.publish("t", b"%d" % i)
    assert link.flush(GIVE_UP_S)
    link.publish("t", b"end")
    assert [int(m.payload) for m in messages_until(reader, b"end")] == list(range(50))


def test_a_publish_whose_turn_came_while_nobody_looked_is_not_left_lying(plain_broker):
    """Between two looks at the clock a busy machine may let any time pass."""
    link = Driven(
        SessionSettings(
            host="127.0.0.1", port=plain_broker().port, client_id="paced", publishes_per_s=0.001
        )
    )
    link.publish("t", b"first")
    link.publish("t", b"second")
    this = link._begin()
    link._dial(this)
    while len(link._outgoing) > 1 or link._inflight:
        assert link._goes_on(this, time.monotonic())
        reading, writing = link._prepare(this)
        select.select([this.socket], [this.socket] if writing else [], [], 1.0)
        link._work(this, readable=reading, writable=writing)
    turn_s = link._next_publish_s
    assert link._wait_s(this, turn_s - 2.0) == pytest.approx(2.0)
    assert link._wait_s(this, turn_s + 0.001) == 0.0
    this.socket.close()


# ------------------------------------------------------------------ back-pressure


def test_a_reader_that_does_not_acknowledge_is_sent_no_more_than_its_window(plain_broker, links):
    broker = plain_broker()
    reader = subscribed(links(broker.port, "reader", receive_max=4), "bulk", echo="echo/r")
    # The echo's acknowledgement goes first: mosquitto 2.0 counts one that comes when more than
    # the window waits already as room for two.
    reader.publish("elsewhere", b"")
    assert reader.flush(GIVE_UP_S)
    writer = links(broker.port, "writer")
    for i in range(50):
        writer.publish("bulk", b"%d" % i)
    assert writer.flush(GIVE_UP_S)
    held = [event_of(reader, Message) for _ in range(4)]
    assert reader.receive(0.5) is None
    for message in held:
        reader.ack(message)
    writer.publish("bulk", b"end")
    rest = messages_until(reader, b"end")
    assert [int(m.payload) for m in held + rest] == list(range(50))


@VERSIONS
def test_a_wide_window_is_only_for_brokers_that_say_they_take_it(plain_broker, links, protocol):
    broker = plain_broker("max_inflight_messages 200")
    link = links(broker.port, "a", protocol=protocol, inflight_max=LIMITS.server_inflight_max)
    assert link.limits.inflight_max == {"5.0": 200, "3.1.1": 20}[protocol]


@VERSIONS
def test_a_full_queue_stops_the_reading_and_loses_nothing(plain_broker, links, protocol):
    broker = plain_broker("max_inflight_messages 0", "max_queued_messages 100000")
    reader = subscribed(
        links(
            broker.port,
            "reader",
            protocol=protocol,
            receive_max=1000,
            receive_queue_bytes_max=100_000,
        ),
        "bulk",
        echo="echo/r",
    )
    writer = links(broker.port, "writer")
    for i in range(500):
        writer.publish("bulk", b"%d " % i + bytes(20_000))
    assert writer.flush(GIVE_UP_S)
    writer.publish("bulk", b"end")
    got = []
    while (message := event_of(reader, Message)).payload != b"end":
        got.append(message)  # acknowledged late, so that only the queue holds it back
        assert reader._given_bytes - reader._taken_bytes < 100_000 + 20 * 21_000
    for each in got:
        reader.ack(each)
    assert len({m.payload for m in got}) == 500
    assert reader.dropped_messages == 0


# ------------------------------------------------------------------ versions of MQTT


def test_a_broker_that_ignores_mqtt_5_is_spoken_to_in_3_1_1(plain_broker, links):
    broker = plain_broker()
    with Proxy(broker.port) as proxy:
        proxy.swallow = b"\x00\x04MQTT\x05"
        link = links(proxy.port, "a", connect_timeout_s=0.3)
        assert link.limits.protocol == "3.1.1"
        link.close()


def test_mqtt_5_alone_does_not_fall_back(plain_broker, links):
    broker = plain_broker()
    with Proxy(broker.port) as proxy:
        proxy.swallow = b"\x00\x04MQTT\x05"
        link = links(proxy.port, "a", connect_timeout_s=0.2, protocol="5.0", wait_s=None)
        assert "did not answer" in reason_of(link)


# ------------------------------------------------------------------ no connection, and why


def test_nothing_listens_there():
    port = free_port()
    with pytest.raises(LinkError, match=f"nothing listens at 127.0.0.1:{port}; start the broker"):
        PahoLink.open("127.0.0.1", port, client_id="a", wait_s=2.0)


def test_a_name_that_does_not_exist():
    link = PahoLink.open("broker.invalid", 8883, client_id="a", wait_s=None)
    assert "no machine is called" in reason_of(link)


def test_something_that_is_no_broker():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        link = PahoLink.open("127.0.0.1", port, client_id="a", wait_s=None, connect_timeout_s=0.2)
        assert "is it an MQTT broker" in reason_of(link)


def test_something_that_speaks_another_protocol():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(1000)
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        link = PahoLink.open("127.0.0.1", port, client_id="a", wait_s=None)
        assert "is it an MQTT broker" in reason_of(link)


def test_a_plain_broker_where_tls_was_expected(plain_broker, pki):
    broker = plain_broker()
    with pytest.raises(LinkError, match="TLS"):
        PahoLink.open("127.0.0.1", broker.port, client_id="a", tls=pki.files("ward-1"))


def test_a_tls_broker_where_none_was_expected(tls_broker):
    link = PahoLink.open("127.0.0.1", tls_broker.port, client_id="a", wait_s=None)
    assert "TLS" in reason_of(link)


def test_a_broker_with_a_certificate_of_another_ca(tls_broker, pki, tmp_path):
    (tmp_path / "ca.pem").write_bytes(Authority.create("x", now=pki.now).certificate)
    with pytest.raises(LinkError, match="is not who it should be"):
        PahoLink.open(
            "127.0.0.1", tls_broker.port, client_id="a", tls=TlsFiles(tmp_path / "ca.pem")
        )


def test_a_broker_under_a_name_that_its_certificate_lacks(tls_broker, pki):
    with (
        Proxy(tls_broker.port, host="127.0.0.2") as proxy,
        pytest.raises(LinkError, match=r"names '127\.0\.0\.2'"),
    ):
        PahoLink.open("127.0.0.2", proxy.port, client_id="a", tls=pki.files("ward-1"))


def test_a_client_that_may_not_come_in(plain_broker):
    broker = plain_broker("allow_anonymous false")
    with pytest.raises(LinkError, match=r"would not let 'a' in: Not authori[sz]ed"):
        PahoLink.open("127.0.0.1", broker.port, client_id="a")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda files: files.ca.unlink(), "CA certificate .* does not exist"),
        (lambda files: files.key.unlink(), "client key .* does not exist"),
        (lambda files: files.ca.write_bytes(b"x"), "holds no CA certificate"),
        (lambda files: files.key.write_bytes(b"x"), "are not a certificate and its unencrypted"),
        (lambda files: files.key.write_bytes(files.other), "does not belong to the certificate"),
    ],
)
def test_files_that_cannot_be_used_are_named(pki, tmp_path, spoil, sentence):
    class Copies(TlsFiles):
        other = pki.files("ward-2").key.read_bytes()

    source = pki.files("ward-1")
    files = Copies(*(tmp_path / each.name for each in (source.ca, source.certificate, source.key)))
    for origin, copy in zip(
        (source.ca, source.certificate, source.key),
        (files.ca, files.certificate, files.key),
        strict=True,
    ):
        copy.write_bytes(origin.read_bytes())
    spoil(files)
    with pytest.raises(LocalError, match=sentence):
        PahoLink.open("127.0.0.1", 1, client_id="a", tls=files)


def test_without_waiting_failure_and_success_are_events(plain_broker, links):
    port = free_port()
    link = links(port, "a", wait_s=None)
    assert "nothing listens" in event_of(link, Disconnected).reason
    plain_broker(port=port)
    event_of(link, Connected)


def test_two_clients_of_one_name_cannot_both_stay(plain_broker, links):
    broker = plain_broker()
    first = links(broker.port, "twin", backoff_first_s=30.0, backoff_max_s=30.0)
    event_of(first, Connected)
    second = links(broker.port, "twin")
    event_of(first, Disconnected)
    second.publish("t", b"x")
    assert second.flush(GIVE_UP_S)


def test_whoever_is_thrown_out_again_and_again_is_told_of_another_under_its_name(
    plain_broker, links
):
    broker = plain_broker()
    with Proxy(broker.port) as proxy:
        link = links(proxy.port, "twin", backoff_first_s=0.5, backoff_max_s=0.5)
        reasons = []
        while not reasons or "somebody else connected under our name" not in reasons[-1]:
            event_of(link, Connected)
            proxy.cut()
            reasons.append(event_of(link, Disconnected).reason)
            assert len(reasons) < 20
        assert len(reasons) >= 3


# ------------------------------------------------------------------ house rules


def test_secrets_and_payloads_are_not_logged(plain_broker, links, caplog):
    caplog.set_level(logging.DEBUG)
    broker = plain_broker("max_packet_size 2000")
    link = links(
        broker.port,
        "a",
        username="someone",
        password="hunter2",
        protocol="3.1.1",
        backoff_max_s=0.05,
    )
    link.publish("t", b"payload!" * 1000)
    assert link.flush(GIVE_UP_S)
    assert caplog.text
    assert "hunter2" not in caplog.text
    assert "payload!" not in caplog.text


def test_every_setting_of_a_session_can_be_given_when_a_link_is_opened():
    settings = {each.name: each for each in dataclasses.fields(SessionSettings)}
    given = {name for name, each in settings.items() if each.default is not dataclasses.MISSING}
    assert set(Options.__annotations__) == given - {"tls"}


def test_a_bug_in_the_network_thread_reaches_the_owner(links):
    def broken():
        raise ZeroDivisionError

    link = links(free_port(), "a", wait_s=None, random=broken)
    with pytest.raises(ZeroDivisionError):
        event_of(link, Message)


def test_a_process_with_more_than_1024_open_files_still_has_a_link(plain_broker, links):
    raise_file_limit(2000)
    with contextlib.ExitStack() as held:
        for _ in range(1100):
            held.enter_context(open(os.devnull))
        link = subscribed(links(plain_broker().port, "a"), "news", echo="echo/a")
        link.publish("news", b"heard")
        assert messages_until(link, b"heard") == []
        link.close()
