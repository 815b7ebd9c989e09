"""docs/brokers.md says what the tests found, and its nats.conf runs a fleet as it stands."""

import re
import socket

from broker_bridge.link.local_broker import shipped_file
from tests.conformance.brokers import PACKET_BYTES_MAX, Nats, wait_for_session
from tests.conformance.brokers_doc import nats_conf, printed_table, shipped_nats_conf
from tests.conformance.capabilities import table
from tests.fleets import TOPICS


def test_the_table_in_the_doc_is_the_one_that_the_tests_hold():
    assert printed_table() == table()


def test_a_fleet_enrols_and_trains_over_nats_with_the_configuration_in_the_doc(fleets):
    """Its packets are made small, of which NATS says nothing; the server is told, and no device."""
    fleet = fleets(settings='log = "info"')
    with (fleet.home.folder / "midge.toml").open("a") as file:
        file.write(f"packet_bytes_max = {PACKET_BYTES_MAX}\n")  # in [broker], which comes last
    text = nats_conf(fleet.home, fleet.folder, fleet.port, ("ann", "ben"))
    assert "max_payload: 256KB" in text
    text = text.replace("256KB", str(PACKET_BYTES_MAX))
    broker = Nats(fleet.folder, lambda _: text)
    broker.port = fleet.port
    fleet.broker = broker
    broker.start()
    wait_for_session(fleet.port, tls=fleet.home.tls("server"))
    fleet.start_server()
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics)
    for name in ("ann", "ben"):
        assert fleet.midge("device", "add", name).returncode == 0
        fleet.device(name, "--bundle", str(fleet.home.bundle(name)))
    for name in ("ann", "ben"):
        listener.wait_for_json(TOPICS.state(name), state="ready")
    fleet.start_run(rounds=1, target=2)
    listener.wait_for_json(TOPICS.metrics, round=1, state="closed", accepted=2)
    status = fleet.status()
    assert status["rejected"] == {}
    assert "connection lost" not in fleet.server.log, "nobody hung up on a packet"
    assert "Violation" not in (fleet.folder / "nats.log").read_text(), (
        "nothing midge does is refused"
    )
    for user in ("CN=midge-server", "CN=ann"):
        assert b"Authorization Violation" in by_natss_own_protocol(fleet.folder, user)


def test_the_rights_in_nats_conf_are_those_in_mosquitto_acl():
    users = granted_by_nats(shipped_nats_conf())
    rights = granted_by_mosquitto(shipped_file("mosquitto.acl").read_text())
    assert set(users) == {"midge-server", "midge-operator", "ward-3", "ward-4"}
    for user, granted in users.items():
        meant = rights.get(user) or {
            how: {each.replace("%u", user) for each in subjects}
            for how, subjects in rights["%u"].items()
        }
        assert granted == meant, user


def granted_by_nats(conf):
    """Subjects, by user, and whether they may be published or subscribed to."""
    found = {}
    for user, rest in re.findall(r'\{ user: "CN=([^"]+)"(.*?)\} \}', conf, re.S):
        lists = re.findall(r'(publish|subscribe): (\[[^]]*\]|"[^"]*")', rest)
        found[user] = {how: set(re.findall(r'"([^"]+)"', subjects)) for how, subjects in lists}
    return found


def granted_by_mosquitto(acl):
    """The same of an ACL file, its federation being `demo`; `%u` for who is no user there."""
    found = {"%u": {"publish": set(), "subscribe": set()}}
    user = ""
    for line in acl.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "user":
            user = rest
            found[user] = {"publish": set(), "subscribe": set()}
        elif kind in ("topic", "pattern"):
            access, _, topic = rest.partition(" ")
            levels = ["midge", "v1", "demo", *topic.split("/")[3:]]
            subject = ".".join({"+": "*", "#": ">"}.get(each, each) for each in levels)
            for how in {"read": ["subscribe"], "write": ["publish"]}.get(access, found["%u"]):
                found[user if kind == "topic" else "%u"][how].add(subject)
    return found


def by_natss_own_protocol(folder, user):
    """No user has a password: what a client that is not MQTT gets who names one."""
    port = re.search(r'^listen: "127.0.0.1:(\d+)"$', (folder / "nats.conf").read_text(), re.M)[1]
    with socket.create_connection(("127.0.0.1", int(port)), timeout=20) as line:
        assert line.recv(4096).startswith(b"INFO ")
        line.sendall(b'CONNECT {"user": "%s", "pass": "", "protocol": 1}\r\n' % user.encode())
        return line.recv(4096)
