"""Samples, and whether they fit a task.

Raw samples go to the trainer and nowhere else; nothing here sends or stores them.
`check_samples` promises that whatever it returns can be trained on: exact shapes and
dtypes, no NaN, and no label out of range, which would otherwise turn every weight
into NaN without an error. It cannot promise that the labels are right.
"""

import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Standardise, Task, Window
from broker_bridge.wire.weights import TensorSpec

__all__ = [
    "Part",
    "Samples",
    "check_samples",
    "from_arrays",
    "part_of",
    "part_size",
    "preprocess",
    "read_npz",
    "standardise",
]

Array = NDArray[Any]

# Of a device's samples: all; most, to train on; and the rest, to measure on.
Part = Literal["all", "most", "rest"]
_REST_SHARE = 0.2
_REST_MAX = 2000
_PARTS_SEED = 1


@dataclass(frozen=True)
class Samples:
    """Inputs, labels and, if they do not count alike, weights. The first axis is the samples.

    Inputs that lie on a disk need no more than a length, a shape, a dtype and `rows[indices]`;
    `descriptors` are what they are read through, to be left open.
    """

    inputs: tuple[Array, ...]
    labels: Array
    weights: Array | None = None
    checked_for: Task | None = field(default=None, repr=False, compare=False)
    descriptors: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def check_samples(task: Task, samples: Samples) -> Samples:
    """Return `samples` in the exact shapes and dtypes of `task`.

    What was checked for this task already is returned as it is. Raises LocalError with one
    sentence that names the tensor, and the row where there is one.
    """
    if samples.checked_for == task:
        return samples
    if len(samples.inputs) != len(task.inputs):
        raise LocalError(
            f"the task {task.name!r} takes {len(task.inputs)} input(s) "
            f"({', '.join(spec.name for spec in task.inputs)}), and the data has "
            f"{len(samples.inputs)}"
        )
    inputs = tuple(
        _fit(array, spec, f"input {spec.name!r}")
        for array, spec in zip(samples.inputs, task.inputs, strict=True)
    )
    labels = _fit(samples.labels, task.label, "the labels (y)")
    weights = samples.weights
    if weights is not None:
        weights = _fit(weights, TensorSpec("sample_weight", "float32", ()), "sample_weight")
        _refuse(weights < 0, weights, "sample_weight", "is negative; weights count from 0 up")
    for name, array in (
        *zip((s.name for s in task.inputs), inputs, strict=True),
        *([("sample_weight", weights)] if weights is not None else []),
    ):
        if len(array) != len(labels):
            raise LocalError(f"{name!r} has {len(array)} rows, and there are {len(labels)} labels")
    if not len(labels):
        raise LocalError("the data has no samples: a device needs at least one to train")
    if weights is not None and not weights.any():
        raise LocalError("sample_weight is 0 in every row: nothing would be learned from this data")
    _check_ranges(task, inputs, labels)
    return Samples(inputs, labels, weights, checked_for=task)


def _check_ranges(task: Task, inputs: tuple[Array, ...], labels: Array) -> None:
    """Refuse what the graph would take without an error, and learn nonsense or NaN from."""
    for spec, array, within in zip(task.inputs, inputs, task.input_ranges, strict=False):
        if within is not None:
            low, high = within
            _refuse(
                (array < low) | (array > high),
                array,
                f"input {spec.name!r}",
                f"is outside {low:g} … {high:g}, what the task {task.name!r} knows",
            )
    if task.label_range is not None:
        low, high = task.label_range
        _refuse(
            (labels < low) | (labels > high),
            labels,
            "the labels (y)",
            f"is outside {low:g} … {high:g}, the range of the task {task.name!r}",
        )


def part_size(count: int, part: Part) -> int:
    """How many of `count` samples are in this part. Raises LocalError for too few to divide."""
    if part == "all":
        return count
    rest = min(max(1, round(count * _REST_SHARE)), _REST_MAX)
    if count - rest < 1:
        raise LocalError(f"{count} samples are too few to hold some of them out")
    return rest if part == "rest" else count - rest


def part_of(samples: Samples, part: Part) -> Samples:
    """This part of `samples`; the same ones each time. Inputs on a disk stay there.

    Raises LocalError as `part_size` does.
    """
    if part == "all":
        return samples
    rest = part_size(len(samples), "rest")
    order = np.random.Generator(np.random.PCG64(_PARTS_SEED)).permutation(len(samples))
    rows = np.sort(order[:rest] if part == "rest" else order[rest:])
    return Samples(
        tuple(_Rows(array, rows) for array in samples.inputs),  # type: ignore[misc]
        samples.labels[rows],
        None if samples.weights is None else samples.weights[rows],
        checked_for=samples.checked_for,
        descriptors=samples.descriptors,
    )


class _Rows:
    """Some rows of an array, fetched when they are asked for."""

    def __init__(self, array: Array, rows: NDArray[np.int64]) -> None:
        self._array = array
        self._rows = rows
        self.dtype = array.dtype
        self.shape = (len(rows), *array.shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> Array:
        found: Array = self._array[self._rows[rows]]
        return found


def preprocess(task: Task, recording: Array) -> Array:
    """Return the samples in one `recording` [rows, channels]: the task's steps, in order.

    Raises LocalError when the recording does not have the channels that a step was made for.
    """
    values = np.asarray(recording, np.float32)
    for step in task.preprocessing:
        if isinstance(step, Window):
            values = _windows(values, step)
        elif isinstance(step, Standardise):
            values = _standardised(values, step, task)
    return values


def standardise(task: Task, windows: Array) -> Array:
    """Return windows [rows, …, channels] standardised as the task's steps say; the rest is done.

    Raises LocalError when they do not have the channels that a step was made for.
    """
    values = windows
    for step in task.preprocessing:
        if isinstance(step, Standardise):
            values = _standardised(values, step, task)
    return values


def from_arrays(arrays: Mapping[str, Array], task: Task) -> Samples:
    """Return the checked samples in `arrays`, named as the inputs (or `x`), `y`, `sample_weight`.

    Raises LocalError when one is missing or does not fit.
    """
    names = [spec.name for spec in task.inputs]
    if len(names) == 1 and names[0] not in arrays and "x" in arrays:
        names = ["x"]
    for name in (*names, "y"):
        if name not in arrays:
            have = ", ".join(sorted(arrays)) or "none"
            raise LocalError(
                f"the data has no array {name!r} (it has: {have}): name the arrays as the task's "
                "inputs, and y"
            )
    samples = Samples(
        tuple(arrays[name] for name in names), arrays["y"], arrays.get("sample_weight")
    )
    return check_samples(task, samples)


def read_npz(path: str, task: Task) -> Samples:
    """Return the checked samples in an .npz file. Never unpickles.

    Raises LocalError naming the file.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):  # one bare array
            raise LocalError(f"{path} is not an .npz file: write one with numpy.savez")
        with found as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise LocalError(f"{path} is not an .npz of plain arrays: {error}") from None
    try:
        return from_arrays(arrays, task)
    except LocalError as error:
        raise LocalError(f"{path}: {error}") from None


def _fit(array: Array, spec: TensorSpec, what: str) -> Array:
    """Return `array` as [rows, *spec.shape] of spec.dtype; only casts that lose nothing."""
    array = np.asarray(array)
    if array.ndim == 0:
        raise LocalError(f"{what} is a single value; the first axis must be the samples")
    shape = tuple(spec.shape)
    if array.shape[1:] != shape:
        # [rows] for [rows, 1], and the other way round, can only mean one thing.
        if math.prod(array.shape[1:]) != 1 or math.prod(shape) != 1:
            raise LocalError(
                f"{what} has samples of shape {list(array.shape[1:])}; the task needs {list(shape)}"
                + _one_hot(array, spec)
            )
        array = array.reshape(-1, *shape)
    if array.dtype.kind not in "fiub":
        raise LocalError(f"{what} has dtype {array.dtype}; the task needs {spec.dtype}")
    if array.dtype.kind == "f":
        _refuse(~np.isfinite(array), array, what, "is not a finite number; drop or repair it")
    with np.errstate(over="ignore", invalid="ignore"):  # what was lost is looked for below
        cast = np.ascontiguousarray(array, dtype=spec.dtype)
    if cast.dtype.kind != "f":
        _refuse(cast != array, array, what, f"does not fit {spec.dtype}, which the task needs")
    elif array.dtype.kind == "f":
        _refuse(~np.isfinite(cast), array, what, f"does not fit {spec.dtype}")
    return cast


def _one_hot(array: Array, spec: TensorSpec) -> str:
    """Say what to do with labels of which each is a row of zeros and a one."""
    if array.shape[1:-1] != tuple(spec.shape) or spec.dtype == "float32":
        return ""
    if array.dtype.kind not in "fiub" or not np.all(np.sum(array != 0, axis=-1) == 1):
        return ""
    return ": these are one-hot; give class numbers, with numpy.argmax(y, axis=-1)"


def _refuse(wrong: Array, values: Array, what: str, why: str) -> None:
    if not wrong.any():
        return
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise LocalError(f"{what}, row {place[0]}: {values[place]} {why}")


def _standardised(values: Array, step: Standardise, task: Task) -> Array:
    channels = values.shape[-1] if values.ndim else 1
    # numpy would repeat a single channel without a word.
    if not len(step.mean) == len(step.scale) == channels:
        raise LocalError(
            f"the recording has {channels} channels, and the task {task.name!r} standardises "
            f"{len(step.mean)}; use the task for this sensor"
        )
    return (values - np.array(step.mean, np.float32)) / np.array(step.scale, np.float32)


def _windows(recording: Array, step: Window) -> Array:
    starts = range(0, len(recording) - step.samples + 1, step.hop)
    rows = [recording[start : start + step.samples] for start in starts]
    if not rows:
        return np.empty((0, step.samples, *recording.shape[1:]), np.float32)
    return np.stack(rows)
