"""Each row of the table, tried on each broker: it must be as the table says, yes or no."""

import itertools
from datetime import UTC, datetime

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.base import Connected, Disconnected, Message
from broker_bridge.link.local_broker import LocalBroker, free_port
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.tls import TlsFiles
from server.fleet.home import create
from tests.broker_bridge.link.reading import event_of, messages_until, subscribed
from tests.conformance import brokers_doc, test_federations
from tests.conformance.brokers import ENGINES, PACKET_BYTES_MAX, Nats, wait_for_session
from tests.conformance.capabilities import CAPABILITIES, lacks
from tests.fleets import FEDERATION, TOPICS, wait_until

QUIET_S = 0.4  # how long nothing must come before we believe that nothing comes
_names = itertools.count()


class Bench:
    """A broker and links to it."""

    def __init__(self, process, protocol, tls=lambda _: None):
        self.process, self.protocol, self._tls = process, protocol, tls
        self._links = []

    def link(self, name="", **options):
        name = name or f"client-{next(_names)}"
        options = {
            "protocol": self.protocol, "tls": self._tls(name), "wait_s": 20.0, "session_s": 600,
            "backoff_first_s": 0.05, "backoff_max_s": 0.3,
        } | options  # fmt: skip
        found = PahoLink.open("127.0.0.1", self.process.port, client_id=name, **options)
        self._links.append(found)
        return found

    def close(self):
        for each in self._links:
            each.close()


@pytest.fixture(scope="module", params=ENGINES)
def plain(request, tmp_path_factory):
    """Without TLS."""
    make, protocol = ENGINES[request.param]
    process = make(tmp_path_factory.mktemp("broker"))
    process.start()
    bench = Bench(process, protocol)
    yield request.param, bench
    bench.close()
    process.stop()


@pytest.fixture(scope="module", params=ENGINES)
def secured(request, tmp_path_factory):
    """With certificates and access rules, as far as the broker has such things."""
    folder = tmp_path_factory.mktemp("fleet")
    home = create(folder / "fleet", federation=FEDERATION, hosts=["localhost", "127.0.0.1"], port=1)
    process = start_secured(request.param, home, folder)
    bench = Bench(process, ENGINES[request.param][1], tls=certificates(home, folder))
    yield request.param, bench
    bench.close()
    process.stop()


def start_secured(engine, home, folder):
    if engine == "nats-server":
        process = Nats(
            folder, lambda port: brokers_doc.nats_conf(home, folder, port, ("ann", "ben"))
        )
        process.start()
        wait_for_session(process.port, tls=home.tls("server"))
        return process
    name = engine.partition(",")[0]
    if name == "iotcore":
        pytest.importorskip("iotcore", reason="iotcore is not installed; it is in `demo`")
    process = LocalBroker(home.broker, port=free_port(), engine=name)
    process.start()
    return process


def certificates(home, folder):
    """By client id: `midge-server-1` has the server's, `ann-1` that of the device ann."""

    def files(name):
        if name.startswith(("midge-server", "midge-operator")):
            return home.tls(name.split("-")[1])
        name = name.partition("-")[0]
        path = folder / f"{name}.pem"
        if not path.exists():
            issued = home.authority().issue_with_new_key(name, now=datetime.now(UTC))
            path.write_bytes(issued.certificate)
            path.with_suffix(".key").write_bytes(issued.key)
        return TlsFiles(home.folder / "ca" / "ca.pem", path, path.with_suffix(".key"))

    return files


def nothing_comes(link):
    """Whether it stays silent; a change of the connection is no message."""
    for _ in range(3):
        event = link.receive(QUIET_S)
        if event is None or isinstance(event, Message):
            return event is None
    raise AssertionError("the connection comes and goes")


# ── Probes: each says whether a broker can ──────────────────────────────────────────────


def probe_messages_wait_for_the_absent(bench):
    reader = subscribed(bench.link("absent"), "waits", echo="echo/absent")
    reader.close()
    writer = bench.link()
    for i in range(100):
        writer.publish("waits", b"%d" % i)
    assert writer.flush(20)
    reader = bench.link("absent")
    writer.publish("waits", b"end")
    return {m.payload for m in messages_until(reader, b"end")} == {b"%d" % i for i in range(100)}


def is_retained(bench, topic):
    """Whether a newcomer gets it. NATS acknowledges a message a moment before that is so."""
    newcomer = bench.link()
    newcomer.subscribe([topic])
    while (event := newcomer.receive(1.0)) is not None:
        if isinstance(event, Message):
            newcomer.ack(event)
            break
    newcomer.close()
    return event is not None


def probe_subscribing_again_brings_what_is_retained(bench):
    link = subscribed(bench.link(), echo="echo/again")
    link.publish("again", b"kept", retain=True)
    assert link.flush(20)
    wait_until(lambda: is_retained(bench, "again"), "the broker retains it")
    link.subscribe(["again"])
    link.ack(event_of(link, Message))
    link.subscribe(["again"])
    link.publish("echo/again", b"end")  # the broker has dealt with what came before it
    return bool(messages_until(link, b"end")) or not nothing_comes(link)


def probe_it_speaks_mqtt_5(bench):
    event = bench.link(protocol="5.0", wait_s=None).receive(20)
    assert isinstance(event, Connected | Disconnected), "it neither let us in nor hung up"
    return isinstance(event, Connected)


def probe_it_says_what_it_takes(bench):
    return bench.link().limits.packet_bytes_max == PACKET_BYTES_MAX


def probe_it_keeps_to_our_window(bench):
    reader = subscribed(bench.link(receive_max=4), "bulk", echo="echo/bulk")
    writer = bench.link()
    for i in range(30):
        writer.publish("bulk", b"%d" % i)
    assert writer.flush(20)
    for _ in range(4):
        event_of(reader, Message)
    return nothing_comes(reader)


def comes_back(link):
    """The connection after the first one; what was told in between may have given way to it."""
    wait_until(lambda: link.connections > 1 and link.room() > 0, "the link is back")
    return event_of(link, Connected)


def what_is_kept(bench):
    late = bench.link()
    late.subscribe(["kept"])
    while (event := late.receive(QUIET_S)) is not None:
        if isinstance(event, Message):
            return event.payload
    return b""


def probe_a_restart_in_order_keeps_everything(bench):
    link = subscribed(bench.link(), "news", echo="echo/news")
    link.publish("kept", b"still here", retain=True)
    assert link.flush(20)
    bench.process.stop()
    bench.process.start()
    return comes_back(link).resumed and what_is_kept(bench) == b"still here"


def probe_a_kill_keeps_what_is_retained(bench):
    link = bench.link()
    link.publish("kept", b"newer", retain=True)
    assert link.flush(20)
    event_of(link, Connected)
    bench.process.kill()
    bench.process.start()
    comes_back(link)
    return what_is_kept(bench) == b"newer"


def probe_strangers_are_kept_out(bench):
    ca = bench._tls("midge-server").ca
    assert bench.link("midge-server-1").limits, "with a certificate one gets in"
    try:
        bench.link("stranger", tls=TlsFiles(ca), wait_s=5.0)
    except LinkError:
        return True
    return False


def forged(bench):
    """Ann speaks as ben and as the server; return what is heard, and how often she was told."""
    server = subscribed(
        bench.link(f"midge-server-{next(_names)}"), TOPICS.all_up(0), TOPICS.round,
        TOPICS.all_down("ben"), echo=TOPICS.up(0, "eve", "join"),
    )  # fmt: skip
    ann = bench.link(f"ann-{next(_names)}", session_s=0)
    wrong = [TOPICS.up(0, "ben", "join"), TOPICS.round, TOPICS.down("ben", "ack")]
    for topic in wrong:
        ann.publish(topic, b"forged")
    ann.publish(TOPICS.up(0, "ann", "join"), b"end")
    heard = {m.topic for m in messages_until(server, b"end")} & set(wrong)
    assert ann.flush(20)
    return heard, ann.refused


def probe_a_device_speaks_under_its_own_name_only(bench):
    heard, _ = forged(bench)
    ann = bench.link(f"ann-{next(_names)}", session_s=0)
    ann.subscribe([TOPICS.all_down("ben")])
    server = bench.link(f"midge-server-{next(_names)}")
    server.publish(TOPICS.down("ben", "ack"), b"for ben")
    assert server.flush(20)
    return not heard and nothing_comes(ann)


def probe_a_refused_publish_is_told(bench):
    return forged(bench)[1] == 3


PLAIN = ("absent", "again", "v5", "says", "window", "stopped", "retained killed")
SECURED = ("certificates", "rights", "refusals")


@pytest.mark.parametrize("capability", PLAIN)
def test_a_broker_can_what_the_table_says_and_no_more(plain, capability):
    engine, bench = plain
    can = globals()[CAPABILITIES[capability].shown_by](bench)
    assert can is not lacks(engine, capability)


@pytest.mark.parametrize("capability", SECURED)
def test_a_secured_broker_can_what_the_table_says_and_no_more(secured, capability):
    engine, bench = secured
    can = globals()[CAPABILITIES[capability].shown_by](bench)
    assert can is not lacks(engine, capability)


def test_every_row_is_shown_by_something_that_runs():
    for key, each in CAPABILITIES.items():
        if each.shown_by.startswith("probe_"):
            assert key in PLAIN + SECURED
            assert callable(globals()[each.shown_by])
        else:
            assert callable(getattr(test_federations, each.shown_by))
        assert set(each.lacks) <= set(ENGINES)
