"""A round, word by word, for the tests of the device's rules: what comes in, and devices in the
middle of one."""

import hashlib

from broker_bridge.wire.chunks import bitmap_of
from broker_bridge.wire.lottery import EVERYONE
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Blob,
    Go,
    Init,
    Need,
    Settings,
)
from device_client.events import (
    Announced,
    Answered,
    Fetched,
    LinkUp,
    Memory,
    Sealed,
    Tick,
    Trained,
)
from device_client.participant import Participant, State

TASK = Blob(digest=b"t" * 32, total_bytes=5000, body_bytes=1000)
MODEL = Blob(digest=b"m" * 32, total_bytes=4000, body_bytes=1000)
UPLOAD = b"upload-1"
CHUNKS = 7
FIRST = frozenset({1})  # the fleet keys of a device that enrolled in the first epoch


def opening(number: int = 1, **changes) -> Announced:
    """The announcement of an open round, as the agent hands it over."""
    announcement = Announcement(
        **{
            "federation": "demo",
            "round": number,
            "state": "open",
            "task": TASK,
            "task_name": "wearables",
            "model": MODEL,
            "model_version": number,
            "settings": Settings(epochs=1, learning_rate=0.1),
            "delta_bound": 10.0,
            "weight_max": 100,
            "fraction_bits": 32,
            "round_key": b"k" * 32,
            "fleet_epoch": 1,
            "issued_at": 0.0,
            "deadline_s": 600.0,
            "target": 2,
            "quorum": 1,
            "lottery_seed": b"s" * 32,
            "lottery_threshold": EVERYONE,
        }
        | changes
    )
    return Announced(announcement, hashlib.sha256(repr(announcement).encode()).digest())


def closing(number: int = 1, **changes) -> Announced:
    return opening(number, state="closed", **changes)


def go_for(announced: Announced, upload: bytes = UPLOAD) -> Answered:
    return Answered(
        Go(
            round=announced.announcement.round,
            announcement=announced.digest,
            upload=upload,
            shard=0,
            packet_bytes=2048,
            window=20,
        )
    )


def commit_for(announced: Announced, upload: bytes = UPLOAD) -> Init:
    return Init(
        round=announced.announcement.round,
        announcement=announced.digest,
        upload=upload,
        enc=b"e" * 32,
        total_bytes=CHUNKS * 1000,
        body_bytes=1000,
        tags=b"g" * 32,
        examples=10,
        train_s=1.0,
    )


def need(*indices: int, upload: bytes = UPLOAD) -> Answered:
    return Answered(Need(upload=upload, bitmap=bitmap_of(indices, CHUNKS)))


def receipt(status: str, upload: bytes = UPLOAD, number: int = 1, **changes) -> Answered:
    return Answered(Ack(round=number, upload=upload, status=status, **changes))


def device(memory: Memory | None = None, **options) -> Participant:
    """A device that knows nothing yet, without jitter, one second after its start."""
    made = Participant(
        "ward-3",
        memory=memory or Memory(),
        samples=5,
        **{"fleet_epochs": FIRST, "draw": lambda: 0.0} | options,
    )
    made.step(Tick(1.0))
    made.step(LinkUp(8192, 20))
    return made


ROUND = opening()


def at(state: State, announced: Announced = ROUND) -> Participant:
    """A device in the middle of a round."""
    made = device()
    steps = {
        State.JOINING: [announced],
        State.FETCHING: [go_for(announced)],
        State.TRAINING: [Fetched("task", TASK.digest), Fetched("model", MODEL.digest)],
        State.SEALING: [Trained(announced.announcement.round)],
        State.UPLOADING: [Sealed(commit_for(announced))],
    }
    for name, events in steps.items():
        for event in events:
            made.step(event)
        if name is state:
            break
    assert made.state is state
    return made


def kinds(effects) -> list[type]:
    return [type(effect) for effect in effects]


def evaluator(**options) -> Participant:
    return device(role="evaluate", **options)


def evaluating(announced: Announced) -> Participant:
    made = evaluator()
    made.step(announced)
    made.step(Fetched("task", TASK.digest))
    made.step(Fetched("model", MODEL.digest))
    assert made.state is State.EVALUATING
    return made
