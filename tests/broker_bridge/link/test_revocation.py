"""What mosquitto makes of a revocation while it runs (decision 0085)."""

import shutil
import socket
import ssl

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.local_broker import LocalBroker, free_port, shipped_file
from server.fleet.certificates import read_certificate
from tests.broker_bridge.link.reading import messages_until, subscribed

FED = "midge/v1/demo"
RULES = shipped_file("mosquitto.acl").read_text()
NOT_WARD_1 = RULES + "\nuser ward-1\ntopic deny #\n"


class Door:
    """A broker with the shipped files, whose list of revoked certificates a test writes."""

    def __init__(self, pki, folder):
        shutil.copytree(pki.folder, folder)
        self.pki = pki
        self.number = 0
        self.broker = LocalBroker(folder, port=free_port(), engine="mosquitto")

    def revoke(self, *names, rules=RULES):
        """Revoke these, and nobody else, and have the broker read it."""
        self.number += 1
        serials = [
            read_certificate(self.pki.files(n).certificate.read_bytes()).serial for n in names
        ]
        listed = self.pki.ca.revocation_list(serials, number=self.number)
        (self.broker.folder / "revoked.pem").write_bytes(listed)
        (self.broker.folder / "mosquitto.acl").write_text(rules)
        self.broker.reload()


@pytest.fixture
def door(pki, tmp_path):
    made = Door(pki, tmp_path / "broker")
    with made.broker:
        yield made


@pytest.fixture
def come_in(door, pki, links):
    return lambda name, **options: links(
        door.broker.port, f"{name}-id", tls=pki.files(name), **{"session_s": 0} | options
    )


def test_a_revoked_certificate_is_turned_away_and_nobody_else_notices(door, come_in):
    other = come_in("ward-2")
    come_in("ward-1").close()
    door.revoke("ward-1")
    with pytest.raises(LinkError, match="refused our client certificate"):
        come_in("ward-1", wait_s=5.0)
    other.publish(f"{FED}/up/0/ward-2/join", b"x")
    assert other.flush(20.0)
    assert other.connections == 1


def test_each_list_is_believed_however_soon_it_follows_the_last(door, come_in):
    for names in (("ward-1",), ("ward-1", "ward-2"), ("ward-1", "ward-2", "ward-3")):
        door.revoke(*names)
        for name in names:
            with pytest.raises(LinkError, match="refused our client certificate"):
                come_in(name, wait_s=5.0)
    come_in("ward-4")


def test_a_broker_that_has_only_begun_to_listen_is_not_ended_by_a_reload(pki, tmp_path):
    """mosquitto listens before it catches signals; here a slow second listener lies between."""
    many = tmp_path / "many.pem"
    many.write_bytes(pki.files("ward-1").ca.read_bytes() * 5000)
    second = (
        f"listener {free_port()} 127.0.0.1\ncafile {many}\n"
        f"certfile {pki.folder / 'broker.pem'}\nkeyfile {pki.folder / 'broker-key.pem'}\n"
    )
    first = "user mosquitto\nlistener 8883\nallow_anonymous true\n"
    with LocalBroker(
        tmp_path, port=free_port(), engine="mosquitto", conf_text=first, conf_more=second
    ) as broker:
        broker.reload()
        assert broker.is_running


def test_a_broker_whose_log_was_emptied_or_put_aside_still_reads_its_files_again(tmp_path):
    """As logrotate does, with `copytruncate` and without."""
    text = "user mosquitto\nlistener 8883\nallow_anonymous true\n"
    with LocalBroker(tmp_path, port=free_port(), engine="mosquitto", conf_text=text) as broker:
        broker.reload()
        broker.log_path.write_bytes(b"")
        broker.reload()
        aside = broker.log_path.rename(tmp_path / "broker.log.1")
        broker.log_path.write_bytes(b"")
        broker.reload()
        broker.log_path.unlink()
        broker.reload()
        assert broker.is_running
        assert aside.read_bytes().count(b"Reloading config") >= 3


def test_a_device_that_is_connected_is_mute_and_deaf_at_once(door, come_in):
    """mosquitto looks at a certificate once, so its list alone cuts nobody off: the rules do."""
    server = subscribed(come_in("midge-server"), "midge/v1/#", echo=f"{FED}/up/0/echo/x")
    server.publish(f"{FED}/round", b"the first round", retain=True)
    stolen, other = come_in("ward-1"), come_in("ward-2")
    for each in (stolen, other):
        each.subscribe([f"{FED}/round"])
        messages_until(each, b"the first round")
    door.revoke("ward-1")
    stolen.publish(f"{FED}/up/0/ward-1/join", b"still heard")
    messages_until(server, b"still heard")
    door.revoke("ward-1", rules=NOT_WARD_1)
    stolen.publish(f"{FED}/up/0/ward-1/join", b"too late")
    stolen.flush(20.0)
    other.publish(f"{FED}/up/0/ward-2/join", b"mark")
    assert b"too late" not in [m.payload for m in messages_until(server, b"mark")]
    server.publish(f"{FED}/round", b"a new round")
    messages_until(other, b"a new round")
    assert stolen.receive(0.5) is None
    assert other.connections == 1


def test_a_tls_session_from_before_does_not_get_in(door, pki):
    """A resumed session shows no certificate anew; a reload makes all tickets void."""
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        name = f"ward-{version.name[-1]}"
        context = _context(pki.files(name), version)
        first, _ = _shake_hands(door, context, None)
        again, reused = _shake_hands(door, context, first)
        assert reused
        door.revoke(name)
        with pytest.raises(ssl.SSLError, match=r"(?i)revoked"):
            _shake_hands(door, context, again, listens=True)


def _context(files, version):
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.certificate, files.key)
    context.minimum_version = context.maximum_version = version
    return context


def _shake_hands(door, context, session, *, listens=False):
    """Connect, resuming a session; return the session to resume next, and whether this was one.

    `listens`: say nothing, and wait to be refused. Who speaks meanwhile may lose the reason: what
    a closed socket has not read makes the system throw away what it still had to say.
    """
    raw = socket.create_connection(("localhost", door.broker.port), timeout=20.0)
    with context.wrap_socket(raw, server_hostname="localhost", session=session) as tls:
        if listens:
            tls.recv(1)
        tls.sendall(bytes.fromhex("100c00044d5154540402003c0000"))  # MQTT 3.1.1, no client id
        assert tls.recv(4)[:1] == b"\x20"
        return tls.session, tls.session_reused
