import hashlib
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.task.taskfile import (
    Noise,
    Plan,
    Slot,
    Task,
    Window,
    decode_plan,
    decode_task,
    encode_plan,
    encode_task,
    weights_of,
)
from broker_bridge.wire import weights as wire
from broker_bridge.wire.weights import TensorSpec

TFLITE = b"not really a model"
WEIGHTS = {"dense/kernel": np.ones((2, 3), np.float32), "dense/bias": np.zeros(3, np.float32)}


def task_for(tflite: bytes = TFLITE, **changes: object) -> Task:
    weights = wire.encode(WEIGHTS)
    fields: dict[str, object] = {
        "name": "small",
        "batch_size": 4,
        "evaluation_batch_size": 8,
        "inputs": (TensorSpec("x", "float32", (2,)),),
        "label": TensorSpec("y", "int32", ()),
        "label_range": (0, 2),
        "output": TensorSpec("out", "float32", (3,)),
        "weights": wire.specs_of(WEIGHTS),
        "trainable_count": 2,
        "optimiser": "sgd",
        "loss": "sparse_categorical_crossentropy",
        "tflite_digest": hashlib.sha256(tflite).hexdigest(),
        "tflite_bytes": len(tflite),
        "weights_digest": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
    }
    return Task(**(fields | changes))  # type: ignore[arg-type]


def file_for(**changes: object) -> bytes:
    return encode_task(task_for(**changes), TFLITE, wire.encode(WEIGHTS))  # type: ignore[arg-type]


def _file_of(header: bytes) -> bytes:
    """A plan with any header, and a digest that fits."""
    digest = hashlib.sha256(header).digest()
    return b"midge-task 2\n" + struct.pack("<I", len(header)) + digest + header + TFLITE


@given(st.binary(max_size=200), st.text(max_size=20), st.integers(1, 9))
def test_what_is_encoded_is_decoded(tflite: bytes, description: str, batch_size: int) -> None:
    task = task_for(
        tflite,
        description=description,
        batch_size=batch_size,
        preprocessing=(Window(50, 25),),
        noise=(Noise("uniform", (4, 2)),),
        optimiser_state=(Slot(TensorSpec("velocity", "float32", (2, 3))),),
    )
    data = encode_plan(task, tflite)
    plan, weights = decode_task(encode_task(task, tflite, wire.encode(WEIGHTS)))
    assert plan == decode_plan(data) == Plan(task, tflite, hashlib.sha256(data).digest())
    np.testing.assert_array_equal(weights["dense/kernel"], WEIGHTS["dense/kernel"])


def test_a_file_or_plan_cut_short_at_any_length_is_refused() -> None:
    file, plan = file_for(), encode_plan(task_for(), TFLITE)
    for length in range(len(file)):
        with pytest.raises(PeerError):
            decode_task(file[:length])
    for length in range(len(plan)):
        with pytest.raises(PeerError):
            decode_plan(plan[:length])


def test_an_altered_byte_anywhere_is_refused() -> None:
    file = file_for()
    for place in range(len(file)):
        altered = bytearray(file)
        altered[place] ^= 1
        with pytest.raises(PeerError) as caught:
            decode_task(bytes(altered))
        if place >= len(b"midge-task 2\n") + 4:
            assert "digest" in str(caught.value)


def test_a_header_that_was_edited_is_refused_though_it_makes_sense() -> None:
    file = file_for()
    edited = file.replace(b'"batch_size":4', b'"batch_size":8')
    assert len(edited) == len(file)
    with pytest.raises(PeerError, match="the header does not have the digest before it"):
        decode_task(edited)


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(PeerError, match="should have"):
        decode_task(file_for() + b"x")


def test_a_plan_with_weights_is_not_a_plan() -> None:
    with pytest.raises(PeerError, match="should have"):
        decode_plan(file_for())


def test_a_newer_format_says_so() -> None:
    with pytest.raises(PeerError, match="newer midge"):
        decode_plan(b"midge-task 3\n" + file_for()[13:])


def test_another_file_is_not_a_task() -> None:
    with pytest.raises(PeerError, match="not a midge task"):
        decode_plan(b"\x89PNG\r\n")


def test_an_absurd_header_length_is_refused_before_it_is_read() -> None:
    with pytest.raises(PeerError, match="larger than any task"):
        decode_plan(b"midge-task 2\n" + struct.pack("<I", 2**32 - 1) + bytes(32))


def test_an_unknown_field_is_refused() -> None:
    header = msgspec.json.decode(msgspec.json.encode(task_for())) | {"extra": 1}
    data = msgspec.json.encode(header)
    with pytest.raises(PeerError, match="extra"):
        decode_plan(_file_of(data))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"batch_size": 0}, "at least one sample"),
        ({"trainable_count": 3}, "trainable"),
        ({"trainable_count": 0}, "trainable"),
        ({"inputs": ()}, "an input"),
        ({"inputs": (TensorSpec("x", "float32", (0,)),)}, "impossible shape"),
        ({"inputs": (TensorSpec("x", "complex64", (1,)),)}, "unknown dtype"),
        ({"inputs": (TensorSpec("x", "float32", (1 << 20, 1 << 20)),)}, "too large"),
        ({"weights": wire.specs_of(WEIGHTS)[:1] * 2}, "same name"),
        ({"weights": (TensorSpec("w", "int32", (1,)),), "trainable_count": 1}, "must be float32"),
        ({"label_range": (3, 2)}, "tensor is empty"),
        ({"noise": (Noise("cauchy", (1,)),)}, "unknown noise"),
        ({"preprocessing": (Window(0, 1),)}, "at least one row"),
        ({"tflite_bytes": -1}, "larger than any"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(PeerError, match=why):
        decode_task(file_for(**changes))


def test_weights_of_another_task_are_refused() -> None:
    task = task_for()
    with pytest.raises(PeerError, match="not the weights"):
        weights_of(task, {"dense/kernel": WEIGHTS["dense/kernel"]})
    with pytest.raises(PeerError, match="expected dense/bias"):
        weights_of(task, WEIGHTS | {"dense/bias": np.zeros(4, np.float32)})


@pytest.mark.parametrize("version", [1, 2])
def test_the_formats_of_every_version_stay_readable(version: int) -> None:
    frozen = Path(__file__).with_name(f"version_{version}.task").read_bytes()
    plan, weights = decode_task(frozen)
    assert plan == Plan(task_for(), TFLITE, plan.digest)
    assert list(weights) == list(WEIGHTS)


def test_the_newest_format_is_written_as_it_always_was() -> None:
    assert Path(__file__).with_name("version_2.task").read_bytes() == file_for()
