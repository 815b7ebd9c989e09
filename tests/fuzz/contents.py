"""What updates and blobs hold: weights and tasks."""

import contextlib
import hashlib
import io
from typing import Any

import msgspec
import numpy as np

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.samples import preprocess
from broker_bridge.task.taskfile import Plan, Task, decode_plan, decode_task
from broker_bridge.wire import weights
from device_client.sandbox import talk
from device_client.sandbox.confinement import Confinement
from tests.fleets import TASK
from tests.fuzz.target import CORPUS, split
from tests.fuzz.wire import SMALL

__all__ = [
    "TFLITE", "decode_weights", "frame", "frame_seeds", "task", "task_seeds", "weight_seeds",
]  # fmt: skip


def decode_weights(data: bytes) -> None:
    """Raw bytes, and a header that was changed as a list before the values it describes."""
    mode, rest = split(data, 2)
    if mode:
        values = weights.encode(SMALL)[-20:]
        rest = b"mgw1" + len(rest).to_bytes(4, "little") + rest + values
    found = weights.decode(rest)
    assert sum(a.nbytes for a in found.values()) <= len(rest)
    for array in found.values():
        assert array.dtype.kind != "f" or np.isfinite(array).all()
    again = weights.decode(weights.encode(found))
    assert weights.specs_of(again) == weights.specs_of(found)
    weights.check(found, weights.specs_of(SMALL))


def weight_seeds() -> list[bytes]:
    header = msgspec.msgpack.encode(weights.specs_of(SMALL))
    return [b"\x00" + weights.encode(SMALL), b"\x01" + header]


_SAID = msgspec.msgpack.Decoder(
    talk.Ready | talk.Built | talk.Steps | talk.Done | talk.Alive | talk.Measured | talk.Stopped
    | talk.Failure
)  # fmt: skip


def frame(data: bytes) -> None:
    """What a training process says that its model took over."""
    source = io.BytesIO(data)

    def read(length: int) -> bytearray:
        found = bytearray(source.read(length))
        if len(found) < length:
            raise PeerError("bad_frame", "the process ended")
        return found

    said, blob = talk.read_frame(read, _SAID, head_bytes_max=1 << 16, blob_bytes_max=1 << 20)
    assert len(blob) <= len(data)
    if isinstance(said, talk.Failure):
        assert len(said.sentence) <= 2000


def frame_seeds() -> list[bytes]:
    said: list[msgspec.Struct] = [
        talk.Ready(samples=48, confinement=Confinement(0)), talk.Built(runtime="a runtime"),
        talk.Steps(last=3, losses=[1.0, 0.5]), talk.Measured(loss=0.5, metrics={"accuracy": 0.9}),
        talk.Failure(sentence="it does not work", reason="bad_task"), talk.Alive(), talk.Stopped(),
    ]  # fmt: skip
    done = talk.Done(loss=0.5, metrics={}, seconds=1.0, peak_bytes=1, optimiser_bytes=0)
    frames = [talk.frame(each) for each in said] + [talk.frame(done, weights.encode(SMALL))]
    return [b"".join(each) for each in frames]


TFLITE = b"not a model, but as long as one likes"


def task(data: bytes) -> None:
    """Task files, whole or by header; what the header says is then used as a device uses it."""
    mode, rest = split(data, 3)
    if mode == 0:
        decode_plan(rest)
        return
    if mode == 1:
        decode_task(rest)
        return
    # Version 1, which has no digest of the header: what is made of one that makes no sense?
    file = b"midge-task 1\n" + len(rest).to_bytes(4, "little") + rest
    _use(decode_plan(file + TFLITE))


def _use(plan: Plan) -> None:
    found: Task = plan.task
    assert found.parameters >= 0
    for channels in (1, 6):
        with contextlib.suppress(LocalError):
            preprocess(found, np.zeros((60, channels), np.float32))


def task_seeds() -> list[bytes]:
    content = (CORPUS.parents[1] / "broker_bridge" / "task" / "version_2.task").read_bytes()
    plan, _ = decode_task(content)
    small = msgspec.to_builtins(plan.task)
    small |= _as_tflite()
    wearables = msgspec.to_builtins(decode_task(TASK.read_bytes())[0].task) | _as_tflite()
    recorded = small | {"preprocessing": [
        {"step": "window", "samples": 20, "hop": 10},
        {"step": "standardise", "mean": [0.5] * 6, "scale": [2.0] * 6},
    ]}  # fmt: skip
    headers = [msgspec.json.encode(each) for each in (small, wearables, recorded)]
    return [b"\x00" + content, b"\x01" + content, *(b"\x02" + each for each in headers)]


def _as_tflite() -> dict[str, Any]:
    return {"tflite_digest": hashlib.sha256(TFLITE).hexdigest(), "tflite_bytes": len(TFLITE)}
