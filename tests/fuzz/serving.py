"""A whole server, over an in-memory link: commands, and a member who says anything."""

import contextlib
import functools
import json
from dataclasses import dataclass

import msgspec

from broker_bridge.link.base import Message
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import ChunkHeader
from broker_bridge.wire.messages import Init
from device_client import identity as identities
from tests.fleets import TOPICS, Hand, World
from tests.fuzz.target import DEVICE_KEM, folder, key, split
from tests.fuzz.wire import chunk_seeds, enrol_seeds

__all__ = ["ctl", "ctl_seeds", "service", "service_seeds", "world_of"]


@functools.cache
def world_of(name: str) -> World:
    world = World(folder(name), rounds={"deadline_s": 5.0})
    world.hand("ward-1")
    return world


def _say(world: World, topic: str, payload: bytes, *, retained: bool = False) -> None:
    """Hand the service one message, as its link would."""
    world.service.turn(Message(topic, payload, retained))
    world.settle()


def ctl(data: bytes) -> None:
    """Bytes on `ctl`, through a real server. Whatever they start is stopped again."""
    mode, rest = split(data, 8)
    world = world_of("ctl")
    if len(TOPICS.ctl) + len(rest) + 8 > world.link.limits.packet_bytes_max:
        return  # no broker would have let it through
    _say(world, TOPICS.ctl, rest, retained=mode == 7)
    for each in world.read_operator():
        if each.topic == TOPICS.ctl_reply:
            answer = json.loads(each.payload)
            assert answer["ok"] or answer["error"]
            assert len(each.payload) < 64 * 1024
    world.pass_time(6.0)
    world.tell(cmd="stop")


def ctl_seeds() -> list[bytes]:
    return [
        b"\x00" + json.dumps(each).encode()
        for each in (
            {"cmd": "status"}, {"cmd": "stop", "id": "a"}, {"cmd": "pause"}, {"cmd": "resume"},
            {"cmd": "start", "rounds": 2, "target": 1, "quorum": 1, "deadline_s": 4.5, "id": "x",
             "task": "wearables", "until": {"accuracy": 0.5}},
            {"cmd": "start", "task": "no-such-task", "until": {"loss": 1.0}},
        )
    ]  # fmt: skip


SAYINGS = ("state", "enrol", "join", "init", "data", "need", "report", "stranger", "renew")


ROUND_LASTS = 100  # inputs; a member has only so many attempts in one round


@dataclass
class Insider:
    """A member on line whose server has a round open, until it is used up."""

    world: World
    hand: Hand
    inputs: int = 0

    def refresh(self) -> None:
        """Open a new round if there is none, or if this one has heard enough."""
        self.inputs += 1
        if self.inputs % ROUND_LASTS == 0:
            self.world.tell(cmd="stop")
        if not self.world.ledger.has_open_round:
            self.world.tell(cmd="start", rounds=1000, target=1, quorum=1, deadline_s=1e6)

    def fitted(self, kind: str, data: bytes) -> bytes:
        """Fill in what a member knows of the round where a message says 0, so it gets further."""
        try:
            said = msgspec.msgpack.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return data
        if not isinstance(said, dict):
            return data
        ledger = self.world.ledger
        if said.get("announcement") == bytes(32):
            said |= {"announcement": self.hand.digest, "round": self.world.announcement().round}
        if said.get("digest") == bytes(32):
            said["digest"] = ledger.announcer.model_blob().digest
        if kind == "init" and said.get("upload") == bytes(8):
            said["upload"] = self.hand.heard[-1].upload if self._was_let_in() else bytes(8)
        if said.get("total_bytes") == 18_000:
            said["total_bytes"] = len(ledger.model_bytes)
        with contextlib.suppress(OverflowError):
            data = msgspec.msgpack.encode(said)
        return data

    def _was_let_in(self) -> bool:
        return bool(self.hand.heard) and hasattr(self.hand.heard[-1], "upload")

    def sealed(self, data: bytes) -> bytes:
        """Any bytes as a chunk of the upload that the server waits for, if it does."""
        opened = self.world.ledger._open
        uploads = list(opened.uploads.items()) if opened is not None else []
        if not uploads or not data:
            return data
        upload, incoming = uploads[-1]
        layout = incoming.init.layout
        index = data[0] % layout.count
        body = (data * layout.body_bytes)[: layout.size(index)]
        header = ChunkHeader(upload, index, layout.count).encode()
        return header + incoming.key.seal(index, body, header)


@functools.cache
def _insider() -> Insider:
    world = world_of("service")
    identity = identities.load(world.folder / "ward-1")
    hand = Hand(world, identity)  # type: ignore[arg-type]
    hand.show("ready")
    world.settle()
    return Insider(world, hand)


def service(data: bytes) -> None:
    """A member says anything, signed, while a round is open for it."""
    mode, rest = split(data, 2 * len(SAYINGS))
    kind, raw = SAYINGS[mode % len(SAYINGS)], mode >= len(SAYINGS)
    insider = _insider()
    insider.refresh()
    if kind in ("join", "init", "need", "report", "renew") and not raw:
        rest = insider.fitted(kind, rest)
        rest = insider.hand.identity.keys.sign.sign(f"{kind} demo/ward-1", rest)
    if kind == "data" and not raw:
        rest = insider.sealed(rest)
    who = "ward-2" if kind == "stranger" else "ward-1"
    topic = TOPICS.up(0, who, "join" if kind == "stranger" else kind)
    _say(insider.world, TOPICS.state(who) if kind == "state" else topic, rest[:60_000])
    del insider.hand.heard[:-1]
    insider.hand.listen()
    insider.world.read_operator()


def service_seeds() -> list[bytes]:
    said: dict[str, bytes] = {
        "state": messages.encode_json(messages.Presence(state="ready", boot=1)),
        "join": messages.encode(
            messages.Join(round=1, announcement=bytes(32), samples=10, packet_bytes_max=8192,
                          inflight_max=20)
        ),
        "init": messages.encode(
            Init(round=1, announcement=bytes(32), upload=bytes(8), enc=DEVICE_KEM.public,
                 total_bytes=18_000, body_bytes=7_896, tags=key(1), examples=10, train_s=0.1,
                 metrics={"loss": 1.0})
        ),
        "data": chunk_seeds()[1][1:],
        "need": messages.encode(messages.NeedBlob(kind="model", digest=bytes(32))),
        "report": messages.encode(
            messages.Report(round=1, model_version=1, examples=4, metrics={"accuracy": 0.5})
        ),
        "enrol": enrol_seeds()[0][1:],
        "stranger": b"x",
        # Without keys: with them, no later input would be signed by keys that hold.
        "renew": messages.encode(
            messages.Renew(nonce=bytes(16), fleet_epoch=0, certified_until=0, software="fuzz")
        ),
    }  # fmt: skip
    return [bytes([SAYINGS.index(kind)]) + data for kind, data in said.items()]
