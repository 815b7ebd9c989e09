"""Named tensors as bytes, and back.

Layout: magic `mgw1`, header length (u32, little-endian), header, then the raw
little-endian values of each tensor in header order, without padding. The header
is MessagePack: a list of [name, dtype, shape].

`decode` promises that what it returns is finite, of an allowed dtype and exactly as
long as the header says, that a bool is 0 or 1, and that names can go into a log. It
never unpickles, and copies nothing but headers.
"""

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS

__all__ = ["Form", "TensorSpec", "Tensors", "check", "decode", "encode", "specs_of"]

Tensors = Mapping[str, NDArray[Any]]

_MAGIC = b"mgw1"
_PREFIX = struct.Struct("<4sI")
_NAME_CHARS_MAX = 200
_DTYPES = {"float32": "<f4", "int32": "<i4", "int64": "<i8", "uint8": "|u1", "bool": "|b1"}


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The name, dtype (`float32`, …) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many values the tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its values take on the wire."""
        return self.size * np.dtype(_DTYPES[self.dtype]).itemsize


_HEADER = msgspec.msgpack.Decoder(tuple[TensorSpec, ...])


def specs_of(tensors: Tensors) -> tuple[TensorSpec, ...]:
    """Describe `tensors`, in their order."""
    return tuple(TensorSpec(name, a.dtype.name, a.shape) for name, a in tensors.items())


def encode(tensors: Tensors) -> bytes:
    """Return `tensors` as bytes, in their order.

    Raises ValueError for a dtype that does not travel: that is the caller's bug.
    """
    specs = specs_of(tensors)
    for spec in specs:
        if spec.dtype not in _DTYPES:
            raise ValueError(f"tensor {spec.name!r} has dtype {spec.dtype}, which does not travel")
    values = (
        np.ascontiguousarray(array).astype(_DTYPES[spec.dtype], copy=False).tobytes()
        for spec, array in zip(specs, tensors.values(), strict=True)
    )
    return b"".join((_opening(specs), *values))


def _opening(specs: tuple[TensorSpec, ...]) -> bytes:
    """What `encode` writes before the values of tensors with these specs."""
    header = msgspec.msgpack.encode(specs)
    return _PREFIX.pack(_MAGIC, len(header)) + header


def decode(data: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """Return the tensors in `data` as read-only arrays over it.

    Raises PeerError: `bad_weights` when the bytes are not a set of tensors,
    `not_finite` when a value is NaN or infinite.
    """
    specs, start = _decode_header(data)
    if start + sum(spec.nbytes for spec in specs) != len(data):
        raise PeerError("bad_weights", "the weights are not as long as their header says")
    tensors: dict[str, NDArray[Any]] = {}
    for spec in specs:
        dtype = np.dtype(_DTYPES[spec.dtype])
        array = np.frombuffer(data, dtype, spec.size, start).reshape(spec.shape)
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise PeerError("not_finite", f"tensor {spec.name!r} holds NaN or infinity")
        if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
            raise PeerError("bad_weights", f"tensor {spec.name!r} holds a bool that is not 0 or 1")
        tensors[spec.name] = array
        start += spec.nbytes
    return tensors


def check(tensors: Tensors, expected: Sequence[TensorSpec]) -> None:
    """Raise PeerError `wrong_shape` unless `tensors` are exactly the `expected` ones, in order."""
    found = specs_of(tensors)
    if found == tuple(expected):
        return
    for have, want in zip(found, expected, strict=False):
        if have != want:
            raise PeerError(
                "wrong_shape",
                f"expected {want.name} {want.dtype}{list(want.shape)}, "
                f"got {have.name} {have.dtype}{list(have.shape)}",
            )
    raise PeerError("wrong_shape", f"expected {len(expected)} tensors, got {len(found)}")


class Form:
    """The bytes that tensors of given specs have, and where in them which values lie.

    A server reads the same tensors from many devices. Bytes that begin as `encode` would
    begin them, and are as long, need no decoding: they are these tensors by construction.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self._opening = _opening(self.specs)
        ends = itertools.accumulate((s.nbytes for s in self.specs), initial=len(self._opening))
        *starts, self.nbytes = ends
        self._bools = _runs(self.specs, starts, "bool")
        self.floats = _runs(self.specs, starts, "float32")
        """The float32 values, in order, as (first byte, count): what lies together is one."""

    def conform(self, data: bytes) -> bytes:
        """Return `data`, or if its header is written in another way, the same under our own.

        Raises PeerError as `decode` and `check` do, but for one thing: it does not look at
        floats. Whoever reads them must, and has `decode` say where one is not finite.
        """
        if len(data) == self.nbytes and data.startswith(self._opening) and self._bools_hold(data):
            return data
        tensors = decode(data)
        check(tensors, self.specs)
        return encode(tensors)

    def _bools_hold(self, data: bytes) -> bool:
        for start, count in self._bools:
            if np.frombuffer(data, np.uint8, count, start).max() > 1:
                return False
        return True


def _runs(
    specs: Sequence[TensorSpec], starts: Sequence[int], dtype: str
) -> tuple[tuple[int, int], ...]:
    """Where values of this dtype lie, as (first byte, count); none of them is empty."""
    runs: list[tuple[int, int]] = []
    end = -1
    for spec, start in zip(specs, starts, strict=True):
        if spec.dtype == dtype and spec.size:
            first, count = runs.pop() if start == end else (start, 0)
            runs.append((first, count + spec.size))
            end = start + spec.nbytes
    return tuple(runs)


def _decode_header(data: bytes | memoryview) -> tuple[tuple[TensorSpec, ...], int]:
    if len(data) < _PREFIX.size:
        raise PeerError("bad_weights", "the weights are cut short")
    magic, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC or length > LIMITS.weights_header_bytes_max:
        raise PeerError("bad_weights", "these bytes are not midge weights of version 1")
    start = _PREFIX.size + length
    try:
        specs = _HEADER.decode(data[_PREFIX.size : start])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PeerError("bad_weights", f"unreadable weights header: {error}") from None
    for spec in specs:
        _check_spec(spec)
    if len({spec.name for spec in specs}) != len(specs):
        raise PeerError("bad_weights", "two tensors have the same name")
    return specs, start


def _check_spec(spec: TensorSpec) -> None:
    if len(spec.name) > _NAME_CHARS_MAX or not spec.name.isprintable():
        raise PeerError("bad_weights", "a tensor's name is too long or not printable")
    if spec.dtype not in _DTYPES:
        raise PeerError("bad_weights", f"unknown dtype {spec.dtype!r}")
    if len(spec.shape) > LIMITS.tensor_rank_max or any(n < 0 for n in spec.shape):
        raise PeerError("bad_weights", f"impossible shape {list(spec.shape)}")
    # A zero among the dimensions must not hide that numpy cannot shape the rest.
    if math.prod(max(n, 1) for n in spec.shape) > LIMITS.model_bytes_max:
        raise PeerError("bad_weights", f"tensor {spec.name!r} is too large")
