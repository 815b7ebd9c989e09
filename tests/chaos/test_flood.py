"""A member that says anything at full speed, and the round of the others."""

import contextlib
import json
import threading

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.local_broker import find_mosquitto
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import random_bytes
from broker_bridge.wire.messages import Join
from device_client import identity as identities
from tests.fleets import TOPICS, wait_until

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")

NAMES = ("ann", "ben")


class Flood:
    """Publishes on one topic as fast as the broker lets it, until it is closed."""

    def __init__(self, fleet, name, kind, payload):
        folder = fleet.folder / name
        identity = identities.load(folder)
        self.sent = 0
        self._link = PahoLink.open(
            "localhost", fleet.port, client_id=f"flood-{name}-{kind}",
            tls=identities.tls_files(folder, identity), session_s=0,
        )  # fmt: skip
        self._topic = TOPICS.state(name) if kind == "state" else TOPICS.up(0, name, kind)
        self._payload = payload
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._over.is_set():
            with contextlib.suppress(LinkError):
                self._link.publish(self._topic, self._payload(self.sent))
                self.sent += 1
            if self.sent % 20 == 0:
                self._link.flush(1.0)
            self._link.receive(0.0)

    def close(self):
        self._over.set()
        self._thread.join()
        self._link.close()


def states(number):
    state = "ready" if number % 2 else "lost"
    return json.dumps({"v": 1, "state": state, "boot": 1, "role": "train"}).encode()


def joins(fleet):
    """The same join, true but for its round, again and again."""
    identity = identities.load(fleet.folder / "evil")
    join = Join(round=1, announcement=bytes(32), samples=1, packet_bytes_max=0, inflight_max=0)
    signed = messages.signed(identity.keys.sign, "join", identity.scope, join)
    return lambda _: signed


@pytest.mark.parametrize("kind", ["garbage", "join", "data", "state"])
def test_the_round_of_the_others_goes_on(fleet, kind):
    fleet.enrol(*NAMES, "evil")
    for name in NAMES:
        fleet.device(name)
    for name in NAMES:
        wait_until(lambda name=name: fleet.state_of(name).get("state") == "ready", name)
    topic, payload = {
        "garbage": ("init", lambda _: random_bytes(1000)),
        "join": ("join", joins(fleet)),
        "data": ("data", lambda _: random_bytes(50_000)),
        "state": ("state", states),
    }[kind]
    flood = Flood(fleet, "evil", topic, payload)
    try:
        wait_until(lambda: flood.sent > 500, "the flood is on")
        fleet.start_run(rounds=2, target=2, quorum=2)
        wait_until(lambda: "round 2 closed: 2 updates" in fleet.server.log, "the rounds end", 120)
    finally:
        flood.close()
    status = fleet.status()  # once it has worked off what the flood left in the broker
    assert sum(status["rejected"].values()) > 100
    if kind != "data":
        assert status["rejected"]["too_fast"] > 100
    assert len(fleet.server.log.splitlines()) < 200, "nonsense fills no log"
