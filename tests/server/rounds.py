"""A round, word by word, for the tests of the server's rules: what comes in, and a server whose
disk never fails."""

import hashlib
from dataclasses import replace

from broker_bridge.wire.messages import (
    Announcement,
    Blob,
    Command,
    Init,
    Join,
    Presence,
    Settings,
)
from server.coordinator import Coordinator
from server.events import (
    Accept,
    Accepted,
    Acknowledge,
    BeginUpload,
    Begun,
    Closed,
    CloseRound,
    Commanded,
    Complete,
    Inited,
    Joined,
    Opened,
    OpenRound,
    Respond,
    Rules,
    Seen,
    Send,
    Started,
    StartRun,
    Tick,
)

UPDATE_BYTES = 5000
BODY_BYTES = 1752  # a packet of 2048 bytes, less what stands around the body
COUNT = 3
BLOB = Blob(digest=b"b" * 32, total_bytes=5000, body_bytes=1000)
WEIGHT_MAX = 100


def announcement_of(effect: OpenRound, number: int) -> Opened:
    """What the ledger makes of `OpenRound`."""
    announcement = Announcement(
        federation="demo", round=number, state="open", task=BLOB, task_name="wearables",
        model=BLOB, model_version=number, settings=Settings(epochs=1, learning_rate=0.1),
        delta_bound=10.0, weight_max=WEIGHT_MAX, fraction_bits=32, round_key=b"k" * 32,
        fleet_epoch=1,
        issued_at=0.0, deadline_s=effect.run.deadline_s, target=effect.target,
        quorum=effect.quorum, lottery_seed=b"s" * 32, lottery_threshold=2**32,
    )  # fmt: skip
    return Opened(announcement, digest_of(number), UPDATE_BYTES)


def digest_of(number: int) -> bytes:
    return hashlib.sha256(bytes([number])).digest()


def ids_of(device: str, number: int = 1) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(f"{device}{number}{i}".encode()).digest()[:8] for i in range(3))


def presence(state: str = "ready", role: str = "train") -> Presence:
    return Presence(state=state, boot=1, role=role)


class Server:
    """A coordinator and a ledger that never fails: what it is asked to write, it has written."""

    def __init__(self, *, online: int = 2, evaluators: int = 0, **rules) -> None:
        self.it = Coordinator(federation="demo", rules=Rules(**rules))
        self.number = self.model = 0
        self.server_evaluates = False
        self.effects: list = []
        self.now_s = 0.0
        for i in range(online):
            self.step(Seen(f"d{i}", presence()))
        for i in range(evaluators):
            self.step(Seen(f"e{i}", presence(role="evaluate")))

    def step(self, event) -> list:
        """Take an event and those that follow from it; return every effect."""
        done, todo = [], [event]
        while todo:
            for effect in self.it.step(todo.pop(0)):
                done.append(effect)
                todo += self.perform(effect)
        self.effects += done
        return done

    def perform(self, effect) -> list:
        match effect:
            case StartRun(_, run):
                return [Started(replace(run, id=1))]
            case OpenRound():
                self.number += 1
                return [announcement_of(effect, self.number)]
            case CloseRound():
                self.model += 1
                return [Closed(self.model, self.server_evaluates)]
            case BeginUpload(_, init):
                return [Begun(init.upload, tuple(range(init.layout.count)))]
            case Accept(_, init):
                return [Accepted((init.upload,))]
        return []

    def start(self, **command) -> list:
        return self.step(Commanded(Command(cmd="start", task="wearables", **command)))

    def command(self, cmd: str) -> list:
        return self.step(Commanded(Command(cmd=cmd)))

    def pass_time(self, seconds: float) -> list:
        self.now_s += seconds
        return self.step(Tick(self.now_s))

    def join(self, device: str, **changes) -> list:
        join = Join(
            **{
                "round": self.number, "announcement": digest_of(self.number), "samples": 10,
                "packet_bytes_max": 2048, "inflight_max": 20,
            } | changes
        )  # fmt: skip
        return self.step(Joined(device, join, ids_of(device, self.number)))

    def init(self, device: str, attempt: int = 0, **changes) -> Init:
        return Init(
            **{
                "round": self.number, "announcement": digest_of(self.number),
                "upload": ids_of(device, self.number)[attempt], "enc": b"e" * 32,
                "total_bytes": UPDATE_BYTES, "body_bytes": BODY_BYTES, "tags": b"t" * 32,
                "examples": 10, "train_s": 1.0, "metrics": {"loss": 2.0},
            } | changes
        )  # fmt: skip

    def commit(self, device: str, *, ours: bool = True, **changes) -> list:
        return self.step(Inited(device, self.init(device, **changes), ours))

    def upload(self, device: str, attempt: int = 0) -> list:
        """A whole update, from join to receipt."""
        effects = self.join(device) + self.commit(device, attempt=attempt)
        return effects + self.step(Complete(ids_of(device, self.number)[attempt]))


def messages_to(device: str, effects) -> list:
    to_it = [e for e in effects if isinstance(e, Send | Acknowledge) and e.device == device]
    return [e.message if isinstance(e, Send) else e.ack for e in to_it]


def of(kind: type, effects) -> list:
    return [effect for effect in effects if isinstance(effect, kind)]


def kinds(effects) -> list[type]:
    return [type(effect) for effect in effects]


def refused(effects) -> str:
    (respond,) = of(Respond, effects)
    assert not respond.reply.ok
    return respond.reply.error
