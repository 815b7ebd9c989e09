"""A whole federation, in which each message arrives first with a bit flipped, again and again.

Before server or device hears anything that is signed or sealed, it hears the same with another
bit flipped; what it is, has and says then must be as if it had heard nothing. At the end the
model is the exact mean all the same. (Each message apart, with every bit of it:
tests/broker_bridge/wire/.)
"""

import contextlib
import json
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from broker_bridge.link.base import Message
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import enrolment, messages, weights
from broker_bridge.wire.envelope import KemKey, random_bytes
from broker_bridge.wire.topics import DownTopic, UpTopic
from device_client import identity as identities
from server.fleet.enrolment import add_device
from tests.fleets import FEDERATION, TASK, TOPICS, World, write_samples

FLIPS = 12  # of each message, in each of the runs below
NOT_KEPT = {"rejects", "sqlite_sequence"}


class Valve:
    """A link that lets one event through at a time, so that none slips in behind another."""

    def __init__(self, link):
        self._link = link
        self.shut = False

    def receive(self, timeout_s):
        return None if self.shut else self._link.receive(timeout_s)

    def __getattr__(self, name):
        return getattr(self._link, name)


class Waiting:
    """Work beside the device's loop that is done when it is asked for, and only if it may be."""

    stopping = False
    may = True

    def __init__(self):
        self.work = None

    def start(self, work):
        self.work = work

    def stop(self):
        self.work = None
        return False

    def finished(self):
        work, self.work = (self.work, None) if self.may else (None, self.work)
        return work() if work else []


class TamperedWorld(World):
    """A world in which each message that is signed or sealed comes with flipped bits first."""

    def __init__(self, folder: Path, seed: int, **options):
        self.draw = random.Random(seed)
        self.flipped = Counter()
        super().__init__(folder, **options)

    def make_ledger(self):
        self.link = Valve(self.link)
        return super().make_ledger()

    def settle(self):
        quiet = 0
        while quiet < 2:
            event = self.link.receive(0)
            self.link.shut = True
            heard = self.hear(event, self.service.turn, self.server_now, self.server_rejects)
            self.link.shut = False
            for agent in self.agents:
                heard |= self.hear(
                    agent._link.receive(0),
                    agent.turn,
                    lambda agent=agent: device_now(agent),
                    lambda agent=agent: sum(agent.rejects.values()),
                )
            quiet = 0 if heard else quiet + 1

    def hear(self, event, turn, now, rejects) -> bool:
        if isinstance(event, Message) and event.payload and (kind := protected(event.topic)):
            for agent in self.agents:
                agent._bench.background.may = False
            turn(None)  # what time alone changes has changed then
            before = now()
            for _ in range(FLIPS):
                refused = rejects()
                turn(Message(event.topic, self.flip(event.payload), event.retained))
                assert now() == before, f"a flipped bit in {event.topic} changed something"
                # A chunk of which no header is left that fits is nobody's, and not counted.
                assert rejects() == refused + 1 or kind in ("task", "model", "data")
                self.flipped[kind] += 1
            for agent in self.agents:
                agent._bench.background.may = True
        turn(event)
        return event is not None

    def flip(self, payload: bytes) -> bytes:
        bit = self.draw.randrange(8 * len(payload))
        altered = bytearray(payload)
        altered[bit // 8] ^= 1 << bit % 8
        return bytes(altered)

    def server_now(self):
        """All that a message could change at the server, but the count of what was refused."""
        with contextlib.closing(sqlite3.connect(self.home.database)) as db:
            tables = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
            rows = {t: db.execute(f"SELECT * FROM {t}").fetchall() for t in tables}  # noqa: S608
        status = self.coordinator.status() | {"rejected": None}
        retained = {t: m.payload for t, m in self.broker.retained.items()}
        return (
            {t: r for t, r in rows.items() if t not in NOT_KEPT},
            files(self.home.state, but=("midge.db",)),
            json.dumps(status, default=str),
            retained,
        )

    def server_rejects(self):
        return sum(self.coordinator.rejects.values())


def device_now(agent):
    """All that a message could change at a device, but the count of what was refused."""
    return (
        agent.state,
        agent._participant.memory,
        agent.identity,
        agent._collecting.missing(),
        files(agent._journal.folder, but=()),
    )


def files(folder: Path, *, but: tuple[str, ...]) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(but or ("\0",))
    }


def protected(topic: str) -> str:
    """The kind of a message that is signed or sealed; empty for what is not, on purpose."""
    match TOPICS.parse(topic):
        case UpTopic(kind=kind) | DownTopic(kind=kind):
            return kind
        case ("round" | "task" | "model" | "identity") as kind:
            return kind
    return ""


def enrols_by_wire(world: World, name: str) -> bool:
    """A device asks to enrol, over the broker; say whether its keys are known now."""
    broker = world.config.broker
    bundle = identities.read_bundle(
        add_device(world.home, world.ledger.db, name, broker=broker, now=time.time())
    )
    keys = identities.new_keys()
    server = enrolment.server_identity(
        bytes.fromhex(bundle.root_public), bundle.federation, bytes.fromhex(bundle.server_identity)
    )
    asked = enrolment.request(
        identities.contact(bundle), sign=keys.sign, kem=keys.kem, tls_public=keys.tls_public,
        server_kem=server.kem_public, ephemeral=KemKey.from_seed(random_bytes(32)), software="test",
    )  # fmt: skip
    world.operator.publish(TOPICS.up(0, name, "enrol"), messages.encode(asked))
    world.settle()
    with world.ledger.db.reading() as tx:
        return tx.device(name).sign_public == keys.sign.public


@pytest.mark.parametrize("seed", range(3))
def test_a_bit_flipped_in_any_message_is_refused_and_changes_nothing(tmp_path, seed):
    world = TamperedWorld(tmp_path, seed)
    try:
        assert enrols_by_wire(world, "eve")
        samples = write_samples(tmp_path / "ann.npz", seed=1)
        ann = world.agent("ann", data=samples, background=Waiting())
        ben = world.hand("ben")
        assert world.tell(cmd="start", target=2, rounds=1)["ok"]
        world.until(lambda: world.status().get("round", {}).get("accepted") == 1, "ann's update")
        assert ben.upload(ben.delta()).status == "accepted"
        world.settle()
        assert (world.metrics()["state"], world.metrics()["accepted"]) == ("closed", 2)
        world.until(lambda: ann.state.value == "idle", "ann has her receipt")

        assert set(world.flipped) >= {
            "enrol", "join", "init", "data", "round", "task", "model", "go", "ack",
        }, world.flipped  # fmt: skip
        _, first = decode_task(TASK.read_bytes())
        second = weights.decode(world.ledger.model_bytes)
        assert any(not np.array_equal(first[name], second[name]) for name in first)
        assert FEDERATION in ann.identity.scope
    finally:
        world.close()
