"""A CA, certificates and brokers for the tests of links."""

from datetime import UTC, datetime

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.link.local_broker import LocalBroker, find_mosquitto, free_port
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.tls import TlsFiles
from server.fleet.authority import Authority
from server.fleet.certificates import write_private, write_public


class Pki:
    """A folder with a CA, the broker's certificate, and one for each name asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.now = datetime.now(UTC)
        self.ca = Authority.create("midge test", now=self.now)
        write_public(folder / "ca.pem", self.ca.certificate)
        write_public(folder / "revoked.pem", self.ca.revocation_list([], number=0))
        self._put("broker", self.ca.issue_for_broker(["localhost", "127.0.0.1"], now=self.now))

    def files(self, name, *, issued=None):
        """Where the certificate of `name` is; made when first asked for."""
        if not (self.folder / f"{name}.pem").exists():
            self._put(name, issued or self._issue(name))
        return TlsFiles(
            self.folder / "ca.pem", self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        )

    def _issue(self, name):
        if name == "midge-server":
            return self.ca.issue_for_server(now=self.now)
        if name == "midge-operator":
            return self.ca.issue_for_operator(now=self.now)
        return self.ca.issue_with_new_key(name, now=self.now)

    def _put(self, name, issued):
        write_public(self.folder / f"{name}.pem", issued.certificate)
        write_private(self.folder / f"{name}-key.pem", issued.key)


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def tls_broker(pki):
    """mosquitto with the shipped mosquitto.conf and mosquitto.acl."""
    with LocalBroker(pki.folder, port=free_port(), engine="mosquitto") as broker:
        yield broker


@pytest.fixture
def plain_broker(tmp_path):
    """Makes brokers without TLS: `plain_broker("max_packet_size 2000")`."""
    if find_mosquitto() is None:
        raise LocalError("these tests need mosquitto; run `sudo apt install mosquitto`")
    running = []

    def start(*options, port=None):
        text = "\n".join(["listener 1", "user mosquitto", "allow_anonymous true", *options])
        broker = LocalBroker(tmp_path, port=port or free_port(), engine="mosquitto", conf_text=text)
        broker.start()
        running.append(broker)
        return broker

    yield start
    for each in running:
        each.stop()


@pytest.fixture
def links():
    """Opens links and closes them after the test: `links(port, "name", …)`."""
    opened = []

    def connect(port, name, **options):
        quick = {"backoff_first_s": 0.05, "backoff_max_s": 0.3, "wait_s": 20.0} | options
        link = PahoLink.open("127.0.0.1", port, client_id=name, **quick)
        opened.append(link)
        return link

    yield connect
    for each in opened:
        each.close()
