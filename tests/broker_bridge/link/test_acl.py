"""mosquitto.conf and mosquitto.acl as shipped: who gets in, and who gets heard."""

import itertools
import shutil

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker_bridge.errors import LinkError
from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import LocalBroker, free_port, shipped_file
from broker_bridge.link.tls import TlsFiles
from server.fleet.authority import Authority, Issued
from tests.broker_bridge.link.reading import GIVE_UP_S, event_of, messages_until, subscribed

FED = "midge/v1/demo"
_marks = itertools.count()


@pytest.fixture
def fleet(tls_broker, pki, links):
    def connect(name, **options):
        files = options.pop("tls", None) or pki.files(name)
        options = {"session_s": 0} | options
        return links(tls_broker.port, name, tls=files, **options)

    return connect


@pytest.fixture
def server(fleet):
    return subscribed(fleet("midge-server"), "midge/v1/#", echo=f"{FED}/up/0/echo/x")


def heard(server, speaker, topic):
    """What the server hears of `speaker` until its permitted mark on `topic` arrives."""
    mark = b"mark %d" % next(_marks)
    speaker.publish(topic, mark)
    return [m.topic for m in messages_until(server, mark) if m.topic != f"{FED}/up/0/echo/x"]


FORBIDDEN_TO_A_DEVICE = [
    f"{FED}/{tail}"
    for tail in (
        "up/0/ward-2/join",
        "up/0/ward-2/data",
        "up/0/ward-1",
        "up/0/ward-1/data/more",
        "up/ward-1/join",
        "up/0/0/ward-1/join",
        "round",
        "identity",
        "ctl",
        "ctl/reply",
        "srv",
        "metrics",
        "model/0",
        "task/0",
        "down/ward-1/go",
        "down/ward-2/go",
        "dev/ward-2/state",
        "dev/ward-1",
        "dev/ward-1/state/x",
        "dev/ward-1/other",
        "up/0/midge-server/join",
    )
] + [
    "midge/v1/ward-1",
    "midge/v2/demo/up/0/ward-1/join",
    "elsewhere",
    "$CONTROL/dynamic-security/v1",
    "$SYS/broker/uptime",
]


@pytest.mark.parametrize("protocol", ["5.0", "3.1.1"])
def test_a_device_is_heard_under_its_own_name_only(fleet, server, protocol):
    device = fleet("ward-1", protocol=protocol)
    for topic in FORBIDDEN_TO_A_DEVICE:
        device.publish(topic, b"forged", retain=True)
    assert device.flush(GIVE_UP_S)
    assert heard(server, device, f"{FED}/up/0/ward-1/join") == []
    if protocol == "5.0":  # MQTT 3.1.1 has no word for "not authorised"
        assert device.refused == len(FORBIDDEN_TO_A_DEVICE)
        assert device.last_refused == FORBIDDEN_TO_A_DEVICE[-1]


def test_what_a_device_may_say_arrives(fleet, server):
    device = fleet("ward-1")
    allowed = [
        f"{FED}/up/{shard}/ward-1/{kind}"
        for shard in ("0", "7")
        for kind in ("enrol", "join", "init", "data", "need")
    ]
    allowed.append(f"{FED}/dev/ward-1/state")
    for topic in allowed:
        device.publish(topic, b"hello")
    assert device.flush(GIVE_UP_S)
    assert heard(server, device, f"{FED}/up/0/ward-1/join") == allowed
    assert device.refused == 0


@pytest.mark.parametrize(
    ("topic", "is_heard"), [(f"{FED}/dev/ward-1/state", True), (f"{FED}/dev/ward-2/state", False)]
)
def test_a_last_will_is_published_on_the_devices_own_state_only(fleet, server, topic, is_heard):
    fleet("ward-1", will=Message(topic, b"lost", retained=True))
    # The same name again throws the first connection out, and so raises its will.
    again = fleet("ward-1")
    assert (topic in heard(server, again, f"{FED}/up/0/ward-1/join")) == is_heard


def test_a_device_that_subscribes_to_everything_hears_its_own_and_the_public(fleet, server):
    public = [f"{FED}/{tail}" for tail in ("round", "identity", "task/0", "model/0", "srv")]
    own = [f"{FED}/down/ward-1/{kind}" for kind in ("go", "need", "ack", "cfg")]
    others = [
        f"{FED}/{tail}"
        for tail in (
            "down/ward-2/go",
            "down/ward-2/cfg",
            "ctl",
            "ctl/reply",
            "metrics",
            "dev/ward-2/state",
            "up/0/ward-2/data",
            "up/0/ward-1/data",
            "model/0/x",
        )
    ]
    for topic in (*public, *own, *others):
        server.publish(topic, b"kept", retain=True)
    assert server.flush(GIVE_UP_S)
    device = fleet("ward-1")
    device.subscribe(["#", "+/#", "$SYS/#"])
    first = event_of(device, Message)  # what is retained shows that the filters hold
    for topic in (*public, *own, *others):
        server.publish(topic, b"live")
    server.publish(f"{FED}/down/ward-1/ack", b"end")
    # The filters overlap, so a message may come more than once.
    got = {(m.topic, m.payload) for m in [first, *messages_until(device, b"end")]}
    expected = {(topic, payload) for topic in (*public, *own) for payload in (b"kept", b"live")}
    assert got == expected
    for topic in (*public, *own, *others):
        server.publish(topic, b"", retain=True)
    assert server.flush(GIVE_UP_S)


def test_the_operator_commands_and_watches_and_cannot_announce(fleet, server):
    operator = fleet("midge-operator")
    forbidden = [
        f"{FED}/{tail}"
        for tail in (
            "round",
            "identity",
            "model/0",
            "task/0",
            "srv",
            "metrics",
            "ctl/reply",
            "down/ward-1/go",
            "dev/ward-1/state",
        )
    ]
    for topic in forbidden:
        operator.publish(topic, b"forged")
    assert operator.flush(GIVE_UP_S)
    assert operator.refused == len(forbidden)
    assert heard(server, operator, f"{FED}/ctl") == []

    operator.subscribe(["midge/v1/#"])
    seen = [
        f"{FED}/{tail}"
        for tail in ("ctl/reply", "srv", "metrics", "round", "identity", "dev/ward-1/state")
    ]
    unseen = [f"{FED}/{tail}" for tail in ("down/ward-1/go", "up/0/ward-1/data", "ctl")]
    while not any(m.payload == b"ready" for m in _poll(operator)):
        server.publish(f"{FED}/metrics", b"ready")
    for topic in (*seen, *unseen):
        server.publish(topic, b"x")
    server.publish(f"{FED}/metrics", b"end")
    got = [m.topic for m in messages_until(operator, b"end") if m.payload == b"x"]
    assert got == seen


def _poll(link):
    event = link.receive(0.5)
    return [event] if isinstance(event, Message) else []


def test_without_a_certificate_there_is_no_connection(tls_broker, pki, links):
    with pytest.raises(LinkError, match="wants a client certificate"):
        links(tls_broker.port, "ward-1", tls=TlsFiles(pki.folder / "ca.pem"))


def test_a_certificate_of_another_ca_gets_nobody_in(tls_broker, pki, links):
    stranger = Authority.create("midge test", now=pki.now)
    files = pki.files("stranger", issued=stranger.issue_with_new_key("ward-1", now=pki.now))
    with pytest.raises(LinkError, match="refused our client certificate"):
        links(tls_broker.port, "ward-1", tls=files)


def test_an_expired_certificate_gets_nobody_in(tls_broker, pki, links):
    files = pki.files("expired", issued=pki.ca.issue_with_new_key("ward-1", now=pki.now, days=0))
    with pytest.raises(LinkError, match="expired"):
        links(tls_broker.port, "ward-1", tls=files)


def test_the_brokers_own_certificate_is_no_ticket_in(tls_broker, pki, links):
    with pytest.raises(LinkError, match="refused our client certificate"):
        links(
            tls_broker.port,
            "ward-1",
            tls=TlsFiles(
                pki.folder / "ca.pem", pki.folder / "broker.pem", pki.folder / "broker-key.pem"
            ),
        )


def test_a_device_with_its_own_ed25519_key_gets_in(fleet, server, pki):
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    certificate = pki.ca.issue_for_public_key(public, "ward-9", now=pki.now)
    device = fleet("ward-9", tls=pki.files("ward-9", issued=Issued(certificate, private)))
    assert heard(server, device, f"{FED}/up/0/ward-9/enrol") == []


def switched_on(option, pki, tmp_path):
    """The shipped broker with an option that the shipped file has as a comment."""
    folder = tmp_path / "broker"
    shutil.copytree(pki.folder, folder)
    text = shipped_file("mosquitto.conf").read_text()
    assert f"\n#{option} " in text
    shutil.copyfile(shipped_file("mosquitto.acl"), folder / "mosquitto.acl")
    return LocalBroker(
        folder,
        port=free_port(),
        engine="mosquitto",
        conf_text=text.replace(f"\n#{option} ", f"\n{option} "),
    )


def test_with_the_user_name_as_client_id_no_device_can_cut_off_another(pki, tmp_path, links):
    with switched_on("use_username_as_clientid", pki, tmp_path) as broker:
        victim = links(broker.port, "ward-1", tls=pki.files("ward-1"))
        assert links(broker.port, "ward-1", tls=pki.files("ward-2")).connections == 1
        victim.publish(f"{FED}/up/0/ward-1/join", b"x")
        assert victim.flush(GIVE_UP_S)
        assert victim.connections == 1


def test_the_limits_of_the_file_reach_the_client(fleet):
    limits = fleet("ward-1").limits
    assert (limits.packet_bytes_max, limits.inflight_max) == (262_144, 20)
