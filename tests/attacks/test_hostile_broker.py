"""A federation whose broker is Mallory's: she reads, and does to every message what she likes.

Whatever she did, each model is the exact mean of what honest devices trained from the
model before, nothing that is to stay sealed was readable, and no device or server took
in anything that its peer had not said. The worst is that nothing goes on; that shows,
and is over when she is gone.
"""

import json

import numpy as np
import pytest

from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.task.runtime import Evaluation
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import batch, messages, weights
from broker_bridge.wire.envelope import sha256, verify
from broker_bridge.wire.messages import Ack
from device_client.trainer import Trained
from tests.attacks.mallory import OWN_KEY, TRICKS, Mallory
from tests.fleets import TOPICS, World
from tests.flow.test_federation import shared_window
from tests.simulation.work import TFLITE, task_file

DEVICES = ("ann", "ben", "cat")
EXAMPLES = {"ann": 3, "ben": 5, "cat": 11}
DEADLINE_S = 3600.0
SIEGE_S = 60.0
ROUNDS = 2

# All that server and devices say to each other while a run goes on. Commands, presence and
# summaries are unsigned, and what forging them does is in tests of its own, below.
SEALED = ("round", "task", "model", "up join", "up init", "up data", "down go", "down need",
          "down ack")  # fmt: skip

# What they say when the fleet key changes.
RENEWAL = ("up renew", "down cfg", "identity")


class SteadyTrainer:
    """Trains alike whenever it trains the same round on the same device from the same model."""

    def __init__(self, device):
        self.device = device

    def __len__(self):
        return EXAMPLES[self.device]

    def train(self, weights, settings, *, seed, on_step, optimiser_state=None):
        return Trained(
            weights=moved(weights, seed), examples=len(self), steps=1, loss=0.5, metrics={},
            seconds=1.0,
        )  # fmt: skip

    def evaluate(self, weights):
        return Evaluation(10, 0.5, {})


class AtOnce:
    """Training that takes no time."""

    stopping = False

    def __init__(self):
        self.events = []

    def start(self, work):
        self.events = work()

    def stop(self):
        had, self.events = bool(self.events), []
        return had

    def finished(self):
        found, self.events = self.events, []
        return found


def moved(model, seed):
    draw = np.random.Generator(np.random.PCG64(seed))
    return {n: (a + draw.normal(0, 0.1, a.shape)).astype(np.float32) for n, a in model.items()}


def seed_of(device, number):
    drawn = sha256(f"demo/{device}".encode() + number.to_bytes(8, "big"))
    return int.from_bytes(drawn[:8], "big")


class Besieged(World):
    """A server, three devices and a run of rounds, with Mallory between them."""

    def __init__(self, folder):
        super().__init__(
            folder,
            rounds={"target": 3, "quorum": 3, "deadline_s": DEADLINE_S},
            make_broker=Mallory,
            limits=LinkLimits(1536, 20),  # small models travel in several chunks
        )
        (self.home.folder / "tasks" / "wearables.task").unlink()
        (self.home.folder / "tasks" / "dice.task").write_bytes(task_file())
        for name in DEVICES:
            steady = SteadyTrainer(name)
            self.agent(name, load=lambda _, steady=steady: steady, background=AtOnce())
        self.settle()

    def start(self):
        assert self.tell(cmd="start", rounds=ROUNDS)["ok"]

    def meddle(self, trick, *against):
        self.broker.trick = None if trick is None else TRICKS[trick]
        self.broker.against, self.broker.meddled = frozenset(against), 0

    def endure(self, seconds=SIEGE_S):
        for _ in range(int(seconds / 4)):
            self.pass_time(4)

    def rounds(self):
        """Of all runs."""
        with self.ledger.db.reading() as tx:
            return [r for run in range(1, tx.latest_run().id + 1) for r in tx.rounds_of(run)]

    def finish(self):
        """Another broker takes her place, which knows nothing: the run goes on to its end."""
        self.meddle(None)
        self.broker.restart(keep=False)
        self.read_operator()
        self.settle()  # all come back
        for _ in range(100):
            if self.coordinator.run is None:
                return
            self.pass_time(4)
        raise AssertionError(self.status())

    def check(self):
        """What must be true whatever was done."""
        self.check_models()
        self.check_what_was_taken_in()

    def check_models(self):
        _, model = decode_task(task_file())
        files = self.home.state / "models"
        assert (files / "000001.weights").read_bytes() == weights.encode(model)
        for this in self.rounds():
            if this.model_after is None:
                continue
            with self.ledger.db.reading() as tx:
                receipts = tx.receipts(this.number, status="accepted")
            assert sorted(r.device for r in receipts) == sorted(DEVICES)
            model = mean_of_all(model, this.number)
            found = (files / f"{this.model_after:06d}.weights").read_bytes()
            assert found == weights.encode(model)

    def check_what_was_taken_in(self):
        """No device stands in a round that the server did not announce."""
        true = set()
        for message in self.broker.by_kind["round"]:
            payload = verify(self.ledger.keys.sign.public, "round demo", message.payload)
            true.add(sha256(payload))
        for agent in self.agents:
            memory = agent._participant.memory
            assert memory.digest == b"" or memory.digest in true
            assert memory.round <= self.rounds()[-1].number

    def check_nothing_was_readable(self):
        said = b"".join(m.payload for m in self.broker.seen if len(m.payload) >= 32)
        secrets = {"task": TFLITE, "fleet key": self.home.keys().fleet_key}
        for file in (self.home.state / "models").iterdir():
            secrets[file.name] = file.read_bytes()
        _, model = decode_task(task_file())
        for this in self.rounds()[:1]:
            for name in DEVICES:
                new = moved(model, seed_of(name, this.number))
                delta = {n: np.subtract(new[n], model[n], dtype=np.float32) for n in model}
                secrets[f"the update of {name}"] = weights.encode(delta)
        for what, secret in secrets.items():
            assert shared_window(secret, said) is None, what


def mean_of_all(model, number):
    total = sum(EXAMPLES.values())
    found = {}
    for name, old in model.items():
        parts = []
        for device, examples in EXAMPLES.items():
            new = moved(model, seed_of(device, number))[name]
            delta = np.subtract(new, old, dtype=np.float32).astype(np.float64)
            parts.append(examples * np.rint(delta * 2**32).astype(np.int64))
        mean = (sum(parts).astype(np.float64) / total * 2.0**-32).astype(np.float32)
        found[name] = (old.astype(np.float64) + mean).astype(np.float32)
    return found


@pytest.fixture
def besieged(tmp_path):
    made = Besieged(tmp_path)
    yield made
    made.close()


def test_left_alone_it_ends_with_the_exact_mean(besieged):
    besieged.start()
    besieged.finish()
    assert [r.status for r in besieged.rounds()] == ["closed"] * ROUNDS
    besieged.check()
    besieged.check_nothing_was_readable()


@pytest.mark.parametrize("trick", TRICKS)
def test_whatever_the_broker_does_to_a_message(besieged, trick):
    """One run for each kind of message: that kind is struck, then she is gone."""
    for number, kind in enumerate(SEALED, start=1):
        besieged.meddle(trick, kind)
        strike(besieged, kind, runs=number)
    besieged.check_nothing_was_readable()


@pytest.mark.parametrize("trick", TRICKS)
def test_whatever_the_broker_does_while_the_fleet_key_changes(besieged, trick):
    for number, kind in enumerate(RENEWAL, start=1):
        besieged.meddle(trick, kind)
        besieged.home.next_epoch()
        besieged.pass_time(2.0)  # the server sees it
        strike(besieged, kind, runs=number)
        newest = besieged.home.keys().fleet_epoch
        assert [agent.identity.fleet_epoch for agent in besieged.agents] == [newest] * 3, kind
    besieged.check_nothing_was_readable()


def strike(besieged, kind, *, runs):
    """A run with that kind of message struck; then she is gone, and the very rounds are closed."""
    besieged.start()
    besieged.endure()
    assert besieged.broker.meddled, kind
    besieged.check()
    besieged.finish()
    assert [r.status for r in besieged.rounds()] == ["closed"] * ROUNDS * runs, kind
    besieged.check()


@pytest.mark.parametrize("seed", range(3))
def test_a_broker_that_does_everything_to_everything(besieged, seed):
    broker = besieged.broker
    broker.draw.seed(seed)

    def any_trick(mallory, message):
        return mallory.draw.choice(list(TRICKS.values()))(mallory, message)

    besieged.start()
    for _ in range(3):
        besieged.meddle(None)
        broker.trick, broker.against = any_trick, frozenset(SEALED)
        besieged.endure()
        besieged.check()
        broker.restart()  # it is Mallory's again at once
        besieged.settle()
    besieged.finish()
    assert {r.status for r in besieged.rounds()} == {"closed"}
    besieged.check()
    besieged.check_nothing_was_readable()


@pytest.mark.parametrize("kind", [kind for kind in SEALED if kind != "down ack"])
def test_the_worst_is_that_nothing_goes_on_and_that_shows(besieged, kind):
    besieged.meddle("lose", kind)
    besieged.start()
    for _ in range(10):
        besieged.pass_time(DEADLINE_S / 2)
        besieged.endure(8)
    assert besieged.coordinator.run is None  # three rounds in a row, then it gives up
    assert {r.status for r in besieged.rounds()} == {"abandoned"}
    besieged.check()
    status = besieged.status()
    assert "failed" in status["detail"]
    assert "0 updates at the deadline, 3 were needed" in besieged.metrics()["reason"]


def test_receipts_that_never_arrive_take_no_update_from_the_model(besieged):
    besieged.meddle("lose", "down ack")
    besieged.start()
    besieged.endure()
    assert [r.status for r in besieged.rounds()] == ["closed"] * ROUNDS
    besieged.check()


# ── What she may say herself ────────────────────────────────────────────────────────────


def test_an_old_announcement_shown_to_one_device_alone_changes_nothing(besieged):
    besieged.start()
    besieged.finish()
    old = besieged.broker.by_kind["round"][0]
    besieged.meddle("lose", "round")  # the others hear nothing new
    besieged.start()
    before = [agent._participant.memory for agent in besieged.agents]
    besieged.broker.whisper("ann", Message(old.topic, old.payload, True))
    besieged.endure()
    assert [agent._participant.memory for agent in besieged.agents] == before
    besieged.finish()
    besieged.check()


def test_two_devices_in_different_rounds_do_not_meet_in_one_sum(besieged):
    """She holds one device back in a round that is over for the others."""
    ann = besieged.agents[0]
    besieged.meddle("lose", "up data")
    besieged.start()
    besieged.endure(40)  # all have sealed
    held = [m for m in besieged.broker.by_kind["up data"] if "/ann/" in m.topic]
    assert held
    besieged.pass_time(DEADLINE_S)  # abandoned
    besieged.meddle(None)
    for message in held:
        besieged.broker.say(message)
    besieged.finish()
    assert ann._participant.memory.round == besieged.rounds()[-1].number
    besieged.check()


@pytest.mark.parametrize("status", ["accepted", "rejected", "late"])
def test_a_forged_receipt_loses_no_update(besieged, status):
    """She swallows the updates and thanks for them."""

    def thank(mallory, message):
        init = messages.decode(message.payload[64:], messages.Init)
        device = message.topic.split("/")[5]
        ack = Ack(round=init.round, upload=init.upload, status=status)
        forged = messages.signed(OWN_KEY, "ack", f"demo/{device}", ack)
        mallory.say(Message(TOPICS.down(device, "ack"), forged))
        return []

    besieged.broker.trick, besieged.broker.against = thank, frozenset({"up init"})
    besieged.start()
    besieged.endure()
    for name in DEVICES:
        assert list((besieged.folder / name / "outbox").iterdir())
    besieged.finish()
    assert [r.status for r in besieged.rounds()] == ["closed"] * ROUNDS
    besieged.check()


def made_of(receipts, said):
    """What can be made of true receipts for others so that one of them may seem to say `said`."""
    for receipt in receipts:
        parts = batch.split(receipt)
        path = b"".join(parts.path)
        yield receipt
        yield parts.signature + said
        yield parts.signature + b"\0\0" + said
        yield parts.signature + bytes([parts.entry // 2, parts.last // 2]) + path[32:] + said
        for entry in range(len(receipts)):
            for payload in (said, parts.payload):
                yield parts.signature + bytes([entry, parts.last]) + path + payload


@pytest.mark.parametrize("others", [("ann", "ben"), ("ann", "ben", "cat")])
def test_a_true_receipt_is_no_receipt_for_another_device_or_upload(besieged, others):
    """She swallows the updates; she has true receipts for others, under one signature."""

    def thank(mallory, message):
        init = messages.decode(message.payload[64:], messages.Init)
        device = message.topic.split("/")[5]
        ack = Ack(round=init.round, upload=init.upload, status="accepted")
        other = Ack(round=init.round, upload=b"another!", status="accepted")
        said = [(f"demo/{name}", other if name == device else ack) for name in others]
        receipts = messages.signed_together(besieged.ledger.keys.sign, "ack", said)
        for false in made_of(receipts, messages.encode(ack)):
            mallory.say(Message(TOPICS.down(device, "ack"), false))
        return []

    besieged.broker.trick, besieged.broker.against = thank, frozenset({"up init"})
    besieged.start()
    besieged.endure(20)
    for name, agent in zip(DEVICES, besieged.agents, strict=True):
        assert list((besieged.folder / name / "outbox").iterdir())
        assert agent.rejects["bad_signature"] > 20
    besieged.finish()
    assert [r.status for r in besieged.rounds()] == ["closed"] * ROUNDS
    besieged.check()


def test_a_command_that_the_broker_forged_cannot_change_how_a_round_trains(besieged):
    """Commands are unsigned: she may start and stop, and no more."""
    for forged in (
        {"cmd": "start", "learning_rate": 1000.0},
        {"cmd": "start", "weight_max": 10**9},
        {"cmd": "start", "delta_bound": 1e9},
        {"cmd": "start", "quorum": 1},
        {"cmd": "start", "task": "../../etc/passwd"},
    ):
        besieged.broker.say(Message(TOPICS.ctl, json.dumps(forged).encode()))
        besieged.settle()
        assert besieged.coordinator.run is None, forged
    besieged.broker.say(Message(TOPICS.ctl, b'{"cmd":"start","rounds":1}'))
    besieged.settle()
    besieged.finish()
    announced = besieged.announcement()
    assert (
        announced.settings.learning_rate == decode_task(task_file())[0].task.defaults.learning_rate
    )
    assert announced.quorum == 3
    besieged.check()


def test_forged_presence_brings_nobody_into_a_round(besieged):
    """She says that a thousand are here, and that those who are here are lost."""
    for number in range(1000):
        besieged.broker.say(Message(TOPICS.state(f"ghost-{number}"), b'{"state":"ready","boot":1}'))
    for name in DEVICES:
        besieged.broker.say(Message(TOPICS.state(name), b'{"state":"lost","boot":1}'))
    besieged.settle()
    assert besieged.status()["devices"]["online"] == 0
    assert set(besieged.rejected()) <= {"unknown_device", "too_fast"}
    besieged.start()
    assert "waiting for devices" in besieged.status()["detail"]  # held up, and it shows
    besieged.finish()
    besieged.check()


def test_forged_summaries_are_for_people_and_change_nothing(besieged):
    besieged.start()
    besieged.broker.say(Message(TOPICS.metrics, b'{"round":99,"state":"closed"}', True))
    besieged.broker.say(Message(TOPICS.srv, b'{"state":"lost"}', True))
    besieged.broker.say(Message(TOPICS.ctl_reply, b'{"ok":true}'))
    besieged.finish()
    besieged.check()
