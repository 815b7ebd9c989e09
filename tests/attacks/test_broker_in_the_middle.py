"""Real processes whose broker is two mosquittos, with Mallory's hands between them.

Devices are connected to one, the server to the other, and every message goes through this
test, which has a broker's rights on both. Each arrives with altered, forged, old and
misdirected ones around it, late and in another order. What comes out is what would have.
"""

import json
import random
import shutil
import threading

import pytest

from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import LocalBroker, free_port
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import weights
from tests.attacks.mallory import TRICKS, Mallory, kind_of
from tests.fleets import FEDERATION, TASK, TOPICS, Fleet, Listener
from tests.flow.test_federation import next_model, plaintexts, shared_window

ROUNDS = 2
DEVICES = ("ann", "ben")
EXTRA = ("flip", "cut", "grow", "forge", "swap", "misdirect", "replay")
FROM_DEVICES = (f"midge/v1/{FEDERATION}/up/#", f"midge/v1/{FEDERATION}/dev/#")
FROM_SERVER = tuple(
    f"midge/v1/{FEDERATION}/{name}"
    for name in ("round", "task/+", "model/+", "srv", "metrics", "down/#", "identity")
)
RETAINED = ("round", "task", "model", "srv", "metrics", "state", "identity")


class Relay(threading.Thread):
    """Carries every message from one broker to the other, in bad company."""

    def __init__(self, devices: PahoLink, server: PahoLink) -> None:
        super().__init__(name="mallory", daemon=True)
        self.mallory = Mallory()  # her memory and her tricks; the brokers are real
        self.over = threading.Event()
        self.failed: BaseException | None = None
        self._ways = ((devices, server), (server, devices))
        devices.subscribe(list(FROM_DEVICES))
        server.subscribe(list(FROM_SERVER))

    def run(self) -> None:
        try:
            while not self.over.is_set():
                for source, sink in self._ways:
                    self._carry(source, sink)
        except BaseException as error:
            self.failed = error
            raise

    def _carry(self, source: PahoLink, sink: PahoLink) -> None:
        batch = []
        while len(batch) < 8 and (event := source.receive(0.005)) is not None:
            if isinstance(event, Message):
                source.ack(event)
                batch.append(event)
        self.mallory.draw.shuffle(batch)
        for message in batch:
            for each in self._company(message):
                kept = kind_of(each.topic) in RETAINED and each is message
                sink.publish(each.topic, each.payload, retain=kept)

    def _company(self, message: Message) -> list[Message]:
        """The message, and what she sends around it."""
        self.mallory.seen.append(message)
        if not message.payload:
            return [message]
        kind = kind_of(message.topic)
        around = []
        for name in self.mallory.draw.sample(EXTRA, 3):
            made = TRICKS[name](self.mallory, message)
            around += [m for m in made if m.payload and m.payload != message.payload]
        self.mallory.by_kind[kind].append(message)
        self.mallory.meddled += len(around)
        middle = self.mallory.draw.randrange(len(around) + 1)
        if kind == "state":  # who has the broker can say for ever that nobody is here
            middle = len(around)
        return [*around[:middle], message, *around[middle:]]


def wait_among_spoilt(operator: Listener, topic: str, **fields: object) -> None:
    """Wait for a message with these fields, where Mallory leaves some that are not even JSON."""

    def is_it(message: Message) -> bool:
        if message.topic != topic:
            return False
        try:
            said = json.loads(message.payload)
        except ValueError:
            return False
        return isinstance(said, dict) and fields.items() <= said.items()

    operator.wait(is_it, f"{fields} on {topic}")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A federation that trained through Mallory's hands."""
    fleet = Fleet(tmp_path_factory.mktemp("middle"))
    port = free_port()
    folder = fleet.folder / "other-broker"
    shutil.copytree(fleet.home.broker, folder)
    links, relay = [], None
    other = LocalBroker(folder, port=port, engine="mosquitto")
    try:
        fleet.broker.start()
        other.start()
        for at in (fleet.port, port):
            links.append(PahoLink.open("localhost", at, client_id="mallory",
                                       tls=fleet.home.tls("server"), session_s=0))  # fmt: skip
        relay = Relay(*links)
        relay.mallory.draw = random.Random(7)
        relay.start()
        # What she sends in a device's name counts against its share, so with shares she could keep
        # a device out of a round; as she could by carrying nothing.
        shares = ("limits.repeats_max=1000", "limits.control_per_minute=100000")
        settings = (f"broker.port={port}", *shares)
        fleet.start_server(*(word for each in settings for word in ("--set", each)))
        fleet.enrol(*DEVICES)
        for name in DEVICES:
            fleet.device(name).wait_for("connected")
        fleet.port = port  # the operator sits with the server
        operator = fleet.listen(TOPICS.metrics, TOPICS.all_states)
        for name in DEVICES:
            wait_among_spoilt(operator, TOPICS.state(name), state="ready")
        fleet.start_run(task="wearables", rounds=ROUNDS, target=2, quorum=2)
        wait_among_spoilt(operator, TOPICS.metrics, round=ROUNDS, state="closed")
        fleet.relay = relay
        yield fleet
    finally:
        if relay is not None:
            relay.over.set()
            relay.join()
        for link in links:
            link.close()
        fleet.stop()
        other.stop()
    assert relay.failed is None


def test_each_model_is_what_it_would_have_been_without_her(done):
    assert done.relay.mallory.meddled > 100
    _, model = decode_task(TASK.read_bytes())
    files = done.model_files()
    for number in range(1, ROUNDS + 1):
        model = next_model(done, model, number)
        assert weights.encode(model) == files[f"{number + 1:06d}.weights"]


def test_she_could_read_nothing_that_is_sealed(done):
    said = b"".join(m.payload for m in done.relay.mallory.seen if len(m.payload) >= 32)
    for what, secret in plaintexts(done, others=()).items():
        assert shared_window(secret, said) is None, what


def test_what_she_did_shows_in_the_servers_status_and_the_devices_logs(done):
    assert "signature" in done.server.log
    for name in DEVICES:
        log = (done.folder / f"{name}.log").read_text()
        assert "ignored a message" in log
        assert "Traceback" not in log
    assert "Traceback" not in done.server.log
