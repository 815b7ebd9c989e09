"""The `.task` file: a model that can be trained, and all a device must know to train it.

Layout: the line `midge-task 2`, header length (u32, little-endian), SHA-256 of the header,
header (JSON), the .tflite bytes, and in a file the initial weights (`broker_bridge.wire.weights`).
The header holds the digests of these two, so no byte can be altered without a word. Version 1,
which is still read, had no digest of the header.
A *plan* is the same without the weights: what devices fetch from the broker.

`decode_plan` and `decode_task` promise that every length and digest fits and that
the header makes sense. They do not promise that the .tflite is harmless: a model
is a program, so its sender must have been verified first.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import weights as wire
from broker_bridge.wire.weights import TensorSpec

__all__ = [
    "Noise",
    "Plan",
    "Preprocessing",
    "Slot",
    "Standardise",
    "Task",
    "Training",
    "Window",
    "decode_plan",
    "decode_task",
    "encode_plan",
    "encode_task",
    "weights_of",
]

_NAME = b"midge-task "
_VERSION_1, _VERSION_2 = _NAME + b"1\n", _NAME + b"2\n"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 32
_DTYPES = ("float32", "int32", "int64", "uint8", "bool")


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings of one round of local training. Each is an input of the graph."""

    epochs: int = 1
    learning_rate: float = 0.01
    proximal_mu: float = 0.0  # FedProx, arXiv 1812.06127; 0 = off
    clip_norm: float = 0.0  # bound on the gradient's global norm; 0 = off


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of optimiser state, and the value it is filled with at the start."""

    tensor: TensorSpec
    initial: float = 0.0


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Random numbers that a training step is fed: `uniform` in [0, 1) or standard `normal`."""

    kind: str
    shape: tuple[int, ...]  # the batch is part of it


class Window(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="window", tag_field="step"
):
    """Cut a recording into windows of `samples` rows, one every `hop` rows."""

    samples: int
    hop: int


class Standardise(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="standardise", tag_field="step"
):
    """Subtract `mean` and divide by `scale`, channel by channel (the last axis)."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]


Preprocessing = Window | Standardise


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The header: what goes in, what comes out, what travels, and how it is trained.

    Shapes are those of one sample, without the batch. The graph's arguments are
    named by position: x0… inputs, y, sample_weight, rows, learning_rate, proximal_mu,
    clip_norm, r0… noise, w0… weights, o0… optimiser state, a0… the anchor
    (docs/tasks.md, "Signatures").
    """

    name: str
    description: str = ""
    licence: str = ""
    versions: dict[str, str] = {}
    operations: dict[str, int] = {}  # TensorFlow Lite ops of one training step
    batch_size: int
    evaluation_batch_size: int
    inputs: tuple[TensorSpec, ...]
    input_ranges: tuple[tuple[float, float] | None, ...] = ()  # inclusive; of token numbers
    label: TensorSpec
    label_range: tuple[float, float] | None = None  # inclusive; a label outside makes NaN
    label_names: tuple[str, ...] = ()
    output: TensorSpec
    weights: tuple[TensorSpec, ...]  # trainable first, then statistics
    trainable_count: int
    noise: tuple[Noise, ...] = ()
    optimiser: str
    optimiser_state: tuple[Slot, ...] = ()
    keep_optimiser_state: bool = False
    loss: str
    metrics: tuple[str, ...] = ()
    preprocessing: tuple[Preprocessing, ...] = ()
    defaults: Training = Training()
    tflite_digest: str
    tflite_bytes: int
    weights_digest: str
    weights_bytes: int

    @property
    def parameters(self) -> int:
        """How many values travel in one update."""
        return sum(spec.size for spec in self.weights)


@dataclass(frozen=True)
class Plan:
    """A task without weights, as a device gets it. `digest` is the SHA-256 of its bytes."""

    task: Task
    tflite: bytes
    digest: bytes


def encode_plan(task: Task, tflite: bytes) -> bytes:
    """Return what devices fetch: header and .tflite, no weights."""
    header = msgspec.json.encode(task)
    digest = hashlib.sha256(header).digest()
    return b"".join((_VERSION_2, _LENGTH.pack(len(header)), digest, header, tflite))


def encode_task(task: Task, tflite: bytes, weights: bytes) -> bytes:
    """Return the `.task` file: the plan, followed by the initial weights."""
    return encode_plan(task, tflite) + weights


def decode_plan(data: bytes) -> Plan:
    """Return the plan in `data`.

    Raises PeerError `bad_task` (not a task of this version, cut short, altered, or
    a header that makes no sense).
    """
    task, start = _decode_header(data)
    end = start + task.tflite_bytes
    if len(data) != end:
        raise _bad(f"the plan should have {end} bytes, and has {len(data)}: fetch it again")
    return _plan(task, data, start)


def decode_task(data: bytes) -> tuple[Plan, dict[str, NDArray[Any]]]:
    """Return the plan and the initial weights in a `.task` file's bytes.

    Raises PeerError `bad_task`, or what `weights.decode` raises.
    """
    task, start = _decode_header(data)
    end = start + task.tflite_bytes
    if len(data) != end + task.weights_bytes:
        raise _bad(
            f"the file should have {end + task.weights_bytes} bytes, and has {len(data)}: "
            "copy or build it again"
        )
    plan = _plan(task, data[:end], start)
    initial = data[end:]
    if hashlib.sha256(initial).hexdigest() != task.weights_digest:
        raise _bad("the initial weights do not have the digest in the header: build it again")
    tensors = wire.decode(initial)
    weights_of(task, tensors)
    return plan, tensors


def weights_of(task: Task, weights: wire.Tensors) -> list[NDArray[np.float32]]:
    """Return `weights` in the task's order.

    Raises PeerError `wrong_shape` unless they are exactly the tensors of `task`.
    """
    if set(weights) != {spec.name for spec in task.weights}:
        raise PeerError("wrong_shape", f"these are not the weights of the task {task.name!r}")
    ordered = {spec.name: weights[spec.name] for spec in task.weights}
    wire.check(ordered, task.weights)
    return list(ordered.values())


def _bad(sentence: str) -> PeerError:
    return PeerError("bad_task", sentence)


def _decode_header(data: bytes) -> tuple[Task, int]:
    """Return the header, and where what is behind it begins."""
    start = len(_VERSION_2) + _LENGTH.size
    if data.startswith(_VERSION_2):
        start += _DIGEST_BYTES
    elif not data.startswith(_VERSION_1):
        if data.startswith(_NAME):
            raise _bad("this task was made by a newer midge: update midge on this machine")
        raise _bad("this is not a midge task")
    if len(data) < start:
        raise _bad("the task is cut short: copy or build it again")
    (length,) = _LENGTH.unpack_from(data, len(_VERSION_2))
    if length > LIMITS.task_header_bytes_max:
        raise _bad("the header is larger than any task needs")
    end = start + length
    if len(data) < end:
        raise _bad("the task is cut short: copy or build it again")
    header = data[start:end]
    if data.startswith(_VERSION_2):
        digest = data[start - _DIGEST_BYTES : start]
        if hashlib.sha256(header).digest() != digest:
            raise _bad("the header does not have the digest before it: copy or build it again")
    try:
        task = msgspec.json.decode(header, type=Task)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"unreadable header: {error}") from None
    _check(task)
    return task, end


def _plan(task: Task, data: bytes, start: int) -> Plan:
    tflite = data[start:]
    if hashlib.sha256(tflite).hexdigest() != task.tflite_digest:
        raise _bad("the model does not have the digest in the header: copy or build it again")
    return Plan(task, tflite, hashlib.sha256(data).digest())


def _check(task: Task) -> None:
    """Refuse a header that a decoder could accept and a trainer could not use."""
    specs = (*task.inputs, task.label, task.output, *task.weights)
    slots = tuple(slot.tensor for slot in task.optimiser_state)
    for spec in (*specs, *slots):
        _check_shape(spec.name, spec.shape)
        if spec.dtype not in _DTYPES:
            raise _bad(f"tensor {spec.name!r} has the unknown dtype {spec.dtype!r}")
    for noise in task.noise:
        _check_shape("noise", noise.shape)
        if noise.kind not in ("uniform", "normal"):
            raise _bad(f"unknown noise {noise.kind!r}")
    for group in (task.inputs, task.weights, slots):
        if len({spec.name for spec in group}) != len(group):
            raise _bad("two tensors have the same name")
    if any(spec.dtype != "float32" for spec in (*task.weights, *slots)):
        raise _bad("weights and optimiser state must be float32")
    _check_numbers(task)


def _check_shape(name: str, shape: Sequence[int]) -> None:
    if len(shape) > LIMITS.tensor_rank_max or any(n < 1 for n in shape):
        raise _bad(f"tensor {name!r} has the impossible shape {list(shape)}")
    if math.prod(shape) > LIMITS.model_bytes_max:
        raise _bad(f"tensor {name!r} is too large")


def _check_numbers(task: Task) -> None:
    if not task.inputs or not 1 <= task.trainable_count <= len(task.weights):
        raise _bad("a task needs an input and a trainable tensor")
    if min(task.batch_size, task.evaluation_batch_size) < 1:
        raise _bad("a batch has at least one sample")
    if not 0 <= task.tflite_bytes <= LIMITS.plan_bytes_max:
        raise _bad("the model is larger than any task may be")
    if not 0 <= task.weights_bytes <= LIMITS.model_bytes_max:
        raise _bad("the weights are larger than any task may have")
    if len(task.input_ranges) not in (0, len(task.inputs)):
        raise _bad("there must be one range for each input, or none")
    for within in (task.label_range, *task.input_ranges):
        if within is not None and not within[0] <= within[1]:
            raise _bad("the range of a tensor is empty")
    defaults = task.defaults
    numbers = (defaults.learning_rate, defaults.proximal_mu, defaults.clip_norm)
    if defaults.epochs < 1 or any(not math.isfinite(n) or n < 0 for n in numbers):
        raise _bad("the training defaults are out of range")
    if sum(isinstance(step, Window) for step in task.preprocessing) > 1:
        raise _bad("a recording is cut into windows once")  # each cut repeats rows: memory
    for step in task.preprocessing:
        if isinstance(step, Window):
            if min(step.samples, step.hop) < 1:
                raise _bad("a window has at least one row, and moves by at least one")
            if max(step.samples, step.hop) > LIMITS.examples_max:
                raise _bad("a window is longer than any recording")
        if isinstance(step, Standardise) and 0.0 in step.scale:
            raise _bad("a scale of 0 cannot be divided by")
