"""Weights: what is decoded is what was encoded, and nothing that could hurt a sum."""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from broker_bridge.wire import weights
from broker_bridge.wire.weights import Form, TensorSpec

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "weights-v1.json").read_text())

DTYPES = st.sampled_from(["float32", "int32", "int64", "uint8", "bool"]).map(np.dtype)
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements=hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False),
    )
)
NAMES = st.text(st.characters(categories=["L", "N", "P"]), max_size=30)
TENSORS = st.dictionaries(NAMES, ARRAYS, max_size=5)

SMALL: dict[str, NDArray[Any]] = {
    "dense/kernel": np.array([[0.5, -1.25], [3.0, 1e-8]], np.float32),
    "dense/bias": np.array([0.0, -0.0], np.float32),
    "steps": np.array(2**40, np.int64),
    "classes": np.array([-1, 7], np.int32),
    "pixels": np.array([0, 255], np.uint8),
    "mask": np.array([True, False, True]),
    "nothing": np.zeros((0, 3), np.float32),
}


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def packed(header: bytes, values: bytes = b"") -> bytes:
    return struct.pack("<4sI", b"mgw1", len(header)) + header + values


def forged(header: object, values: bytes = b"") -> bytes:
    return packed(msgspec.msgpack.encode(header), values)


def reason(data: bytes) -> str:
    with pytest.raises(PeerError) as caught:
        weights.decode(data)
    return caught.value.reason


@settings(deadline=None)
@given(TENSORS)
def test_tensors_come_back_with_name_order_dtype_shape_and_bits(
    tensors: dict[str, NDArray[Any]],
) -> None:
    decoded = weights.decode(weights.encode(tensors))
    assert list(decoded) == list(tensors)
    assert all(same(decoded[name], tensors[name]) for name in tensors)
    weights.check(decoded, weights.specs_of(tensors))


def test_a_transposed_view_travels_by_its_values() -> None:
    kernel = SMALL["dense/kernel"].T
    assert same(weights.decode(weights.encode({"k": kernel}))["k"], kernel.copy())


@pytest.mark.parametrize("layout", ["fortran", "reversed", "big-endian", "read-only"])
def test_however_an_array_lies_in_memory_its_values_travel(layout: str) -> None:
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    lying = {
        "fortran": np.asfortranarray(plain),
        "reversed": plain[::-1, ::-1].copy()[::-1, ::-1],
        "big-endian": plain.astype(">f4"),
        "read-only": np.frombuffer(plain.tobytes(), np.float32).reshape(2, 3),
    }[layout]
    assert weights.encode({"x": lying}) == weights.encode({"x": plain})
    assert lying.tolist() == plain.tolist()


def test_what_is_decoded_cannot_be_written_to() -> None:
    decoded = weights.decode(weights.encode(SMALL))
    with pytest.raises(ValueError, match="read-only"):
        decoded["steps"][...] = 0


def test_weights_cut_short_at_any_length_are_refused() -> None:
    data = weights.encode(SMALL)
    assert {reason(data[:n]) for n in range(len(data))} == {"bad_weights"}


def test_bytes_after_the_last_tensor_are_refused() -> None:
    assert reason(weights.encode(SMALL) + b"\0") == "bad_weights"


def test_the_frozen_vector_of_version_1_still_reads_and_is_still_written() -> None:
    frozen = bytes.fromhex(VECTORS["small"])
    decoded = weights.decode(frozen)
    assert all(same(decoded[name], SMALL[name]) for name in SMALL)
    assert weights.encode(SMALL) == frozen


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    assert reason(data) == "bad_weights"


@settings(deadline=None)
@given(st.data())
def test_an_altered_header_gives_tensors_or_a_peer_error_and_nothing_else(
    data: st.DataObject,
) -> None:
    good = bytearray(weights.encode(SMALL))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with suppress(PeerError):
        weights.decode(bytes(good))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    data = weights.encode({"ok": np.zeros(3, np.float32), "w": np.array([0, value], np.float32)})
    assert reason(data) == "not_finite"


FORGERIES = {
    "another magic": b"mgw2" + weights.encode(SMALL)[4:],
    "a header longer than the limit": struct.pack("<4sI", b"mgw1", 2**32 - 1),
    "a header that is no list": forged({"name": "w"}),
    "an array header without its items": packed(b"\xdd\xff\xff\xff\xff"),
    "a name that is not UTF-8": packed(b"\x91\x93\xa1\xff\xa5uint8\x91\x00"),
    "a dtype of objects": forged([["w", "object", [1]]], bytes(8)),
    "a dtype numpy would parse": forged([["w", "<f8", [1]]], bytes(8)),
    "half floats, which do not travel": forged([["w", "float16", [1]]], bytes(2)),
    "a field too many": forged([["w", "uint8", [1], 0]], bytes(1)),
    "a negative side": forged([["w", "uint8", [-1]]]),
    "two negative sides": forged([["w", "uint8", [-1, -1]]], bytes(1)),
    "nine dimensions": forged([["w", "uint8", [1] * 9]], bytes(1)),
    "more values than a model may have": forged([["w", "uint8", [2**31]]]),
    "sides whose product wraps to zero": forged([["w", "uint8", [2**32, 2**32]]]),
    "sides that a zero hides": forged([["w", "float32", [0, 2**62, 2**62]]]),
    "a side that numpy cannot hold": forged([["w", "float32", [0, 2**64 - 1]]]),
    "two tensors of one name": forged([["w", "uint8", [1]], ["w", "uint8", [1]]], bytes(2)),
    "a bool that is neither 0 nor 1": forged([["w", "bool", [2]]], b"\x01\x02"),
    "a name that would clear a terminal": forged([["\x1b[2J", "uint8", [1]]], bytes(1)),
    "a name of a megabyte": forged([["w" * 1_000_000, "uint8", [1]]], bytes(1)),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forgery_is_refused(forgery: bytes) -> None:
    assert reason(forgery) == "bad_weights"


EXPECTED = (TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "float32", (3,)))
WRONG = {
    "too few": EXPECTED[:1],
    "too many": (*EXPECTED, TensorSpec("c", "float32", ())),
    "another order": EXPECTED[::-1],
    "another name": (EXPECTED[0], TensorSpec("c", "float32", (3,))),
    "another dtype": (EXPECTED[0], TensorSpec("b", "int32", (3,))),
    "another shape of the same size": (TensorSpec("a", "float32", (3, 2)), EXPECTED[1]),
}


@pytest.mark.parametrize("specs", WRONG.values(), ids=WRONG.keys())
def test_tensors_that_the_task_does_not_expect_are_refused(specs: tuple[TensorSpec, ...]) -> None:
    tensors = {s.name: np.zeros(s.shape, s.dtype) for s in specs}
    with pytest.raises(PeerError) as caught:
        weights.check(tensors, EXPECTED)
    assert caught.value.reason == "wrong_shape"


def test_a_double_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="float64"):
        weights.encode({"w": np.zeros(1)})


# ── The form of given tensors ───────────────────────────────────────────────────────────


def refusal(read: Callable[[], object]) -> tuple[str, str] | None:
    """The reason and the sentence with which `read` refuses, if it does."""
    try:
        read()
    except PeerError as error:
        return error.reason, str(error)
    return None


def read_as(data: bytes, specs: tuple[TensorSpec, ...]) -> None:
    """What `Form.conform` promises to agree with, in as many words."""
    weights.check(weights.decode(data), specs)


@settings(deadline=None)
@given(TENSORS)
def test_a_form_takes_the_bytes_as_they_are_and_knows_where_the_floats_lie(
    tensors: dict[str, NDArray[Any]],
) -> None:
    form, data = Form(weights.specs_of(tensors)), weights.encode(tensors)
    assert form.conform(data) is data
    floats = [a.tobytes() for a in tensors.values() if a.dtype == np.float32]
    assert b"".join(data[at : at + 4 * n] for at, n in form.floats) == b"".join(floats)


def test_floats_that_lie_together_are_one_stretch() -> None:
    form = Form(weights.specs_of(SMALL))  # a kernel and a bias; what follows has no values
    assert [count for _, count in form.floats] == [6]
    apart = ("a", "float32", (2,)), ("n", "uint8", (1,)), ("b", "float32", (3,))
    assert [n for _, n in Form([TensorSpec(*each) for each in apart]).floats] == [2, 3]


def test_a_header_written_in_another_way_is_written_anew() -> None:
    data = weights.encode({"w": np.arange(3, dtype=np.float32)})
    wordy = packed(b"\xdc\x00\x01\x93\xd9\x01w\xa7float32\x91\xcd\x00\x03", data[-12:])
    assert wordy != data
    assert Form([TensorSpec("w", "float32", (3,))]).conform(wordy) == data


ALTERED = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4)


@settings(deadline=None)
@given(ALTERED, st.integers(0, 500) | st.none())
def test_a_form_refuses_what_decoding_refuses_in_the_same_words(
    changes: list[tuple[int, int]], length: int | None
) -> None:
    good = {n: a for n, a in SMALL.items() if a.dtype != np.float32} | {"w": np.ones(1, "f4")}
    form, changed = Form(weights.specs_of(good)), bytearray(weights.encode(good))
    for place, value in changes:
        changed[place % len(changed)] = value
    data = bytes(changed[:length])
    wanted = refusal(lambda: read_as(data, form.specs))
    if wanted is None or wanted[0] != "not_finite":  # those it leaves to whoever reads them
        assert refusal(lambda: form.conform(data)) == wanted


def test_a_form_refuses_what_is_cut_short_or_goes_on() -> None:
    form, data = Form(weights.specs_of(SMALL)), weights.encode(SMALL)
    for wrong in (*(data[:n] for n in range(len(data))), data + b"\0", data + data):
        found = refusal(lambda: form.conform(wrong))  # noqa: B023 - called here
        assert found is not None
        assert found == refusal(lambda: weights.decode(wrong))  # noqa: B023 - called here


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_form_refuses_a_forgery(forgery: bytes) -> None:
    for specs in (EXPECTED, (TensorSpec("w", "bool", (2,)),)):
        assert refusal(lambda: Form(specs).conform(forgery)) == refusal(  # noqa: B023 - called here
            lambda: weights.decode(forgery)
        )


@pytest.mark.parametrize("specs", WRONG.values(), ids=WRONG.keys())
def test_a_form_refuses_other_tensors(specs: tuple[TensorSpec, ...]) -> None:
    data = weights.encode({s.name: np.zeros(s.shape, s.dtype) for s in specs})
    found = refusal(lambda: Form(EXPECTED).conform(data))
    assert found is not None
    assert found[0] == "wrong_shape"
    assert found == refusal(lambda: read_as(data, EXPECTED))
