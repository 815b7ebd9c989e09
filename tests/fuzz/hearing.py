"""A whole device, over an in-memory link: what a broker brings, and what a server signs."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from broker_bridge.link.base import Message
from broker_bridge.wire import batch, messages
from broker_bridge.wire.envelope import sha256
from device_client import identity as identities
from device_client.agent import Agent
from device_client.journal import Journal
from tests.broker_bridge.wire.test_messages import BINARY
from tests.fleets import FEDERATION, TOPICS, World
from tests.fuzz.serving import world_of
from tests.fuzz.target import split
from tests.fuzz.wire import TRANSFER, chunk_seeds
from tests.simulation.work import SimulatedTrainer, Trainings

__all__ = ["device", "device_seeds"]

HEARD = ("round", "go", "need", "ack", "cfg", "task", "model")
DEVICE_LASTS = 50  # inputs; a device that has heard of round 2**53 takes part in no other


class AtOnce:
    """A Background without a thread: work is done when it is begun."""

    stopping = False

    def __init__(self) -> None:
        self._events: list[Any] = []

    def start(self, work: Callable[[], list[Any]]) -> None:
        self._events = work()

    def stop(self) -> bool:
        return False

    def finished(self) -> list[Any]:
        found, self._events = self._events, []
        return found


@dataclass
class Listening:
    """A device over a broker that retains a true task and model, and the round it thinks is next.

    A new one takes its place now and then.
    """

    world: World
    announced: dict[str, Any]
    agent: Agent
    link: Any
    inputs: int = 0
    round: int = 0
    digest: bytes = bytes(32)

    def fitted(self, kind: str, data: bytes) -> bytes:
        """Fill in what the server knows where a message says 0, and sign it as the server does."""
        keys = self.world.ledger.keys
        try:
            said = msgspec.msgpack.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            said = None
        if isinstance(said, dict):
            if said.get("round") == 0:
                self.round += kind == "round"
                said["round"] = self.round
            for name, true in self.announced.items():
                if kind == "round" and said.get(name) == 0:
                    said[name] = true
            if said.get("announcement") == bytes(32):
                said["announcement"] = self.digest
            with contextlib.suppress(OverflowError):
                data = msgspec.msgpack.encode(said)
        if kind == "round":
            self.digest = sha256(data)
        scope = FEDERATION if kind == "round" else f"{FEDERATION}/ward-1"
        if kind == "ack":
            return batch.sign_together(keys.sign, [(f"{kind} {scope}", data)])[0]
        return keys.sign.sign(f"{kind} {scope}", data)


_now: list[Listening] = []


def _listening() -> Listening:
    world = world_of("device")
    if not world.ledger.has_open_round:
        world.tell(cmd="start", rounds=1, target=1, quorum=1, deadline_s=1e6)
    if _now and _now[0].inputs < DEVICE_LASTS:
        return _now[0]
    if _now:
        _now.pop().link.close()
    place = world.folder / "ward-1"
    for path in (place / "rounds.json", place / "outbox" / "update.sealed"):
        path.unlink(missing_ok=True)
    identity = identities.load(place)
    link = world.broker.connect("the-device", session_s=0)
    agent = Agent(
        identity, link, journal=Journal(place), boot=1,  # type: ignore[arg-type]
        load=lambda _: SimulatedTrainer("ward-1", Trainings()), background=AtOnce(),
        clock=lambda: world.broker.now_s, draw=lambda: 0.5,
    )  # fmt: skip
    agent.begin()
    announced = msgspec.msgpack.decode(messages.encode(world.announcement()))
    true = {name: announced[name] for name in ("task", "model", "round_key", "fleet_epoch")}
    made = Listening(world, true, agent, link)
    _now.append(made)
    _quiet(made)
    return made


def _quiet(device: Listening) -> None:
    """Let the device hear and do what there is, but not for ever."""
    for _ in range(40):
        event = device.link.receive(0)
        device.agent.turn(event)
        if event is None:
            break


def device(data: bytes) -> None:
    """What a device hears: from a broker, and signed by a server that says anything."""
    mode, rest = split(data, 2 * len(HEARD))
    kind, raw = HEARD[mode % len(HEARD)], mode >= len(HEARD)
    listening = _listening()
    listening.inputs += 1
    if not raw and kind not in ("task", "model"):
        rest = listening.fitted(kind, rest)
    topic = {"round": TOPICS.round, "task": TOPICS.task(0), "model": TOPICS.model(0)}.get(kind)
    listening.agent.turn(Message(topic or TOPICS.down("ward-1", kind), rest[:60_000]))
    _quiet(listening)
    listening.world.broker.advance(1.0)
    _quiet(listening)


def device_seeds() -> list[bytes]:
    announcement = msgspec.msgpack.decode(messages.encode(BINARY[2]))
    empty = dict.fromkeys(("round", "task", "model", "round_key", "fleet_epoch"), 0)
    go = messages.Go(round=0, announcement=bytes(32), upload=TRANSFER, shard=0,
                     packet_bytes=8192, window=20)  # fmt: skip
    said = {
        "round": msgspec.msgpack.encode(announcement | empty),
        "go": messages.encode(go),
        "need": messages.encode(messages.Need(upload=TRANSFER, bitmap=b"\x07")),
        "ack": messages.encode(messages.Ack(round=0, upload=TRANSFER, status="accepted")),
        "cfg": messages.encode(messages.Refused(reason="no")),
        "task": chunk_seeds()[1][1:],
        "model": chunk_seeds()[1][1:],
    }
    busy = messages.encode(messages.Busy(round=0, retry_after_s=1.0))
    resend = messages.encode(
        messages.Ack(round=0, upload=TRANSFER, status="resend", retry_after_s=1.0)
    )
    renewal = messages.encode(messages.Renewal(sign_public=bytes(32), certified_until=0, keys=True))
    return [bytes([HEARD.index(kind)]) + each for kind, each in said.items()] + [
        b"\x01" + busy, b"\x03" + resend, b"\x04" + renewal,
    ]  # fmt: skip
