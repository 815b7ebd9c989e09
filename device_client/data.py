"""Where a device's samples come from: a file, a folder of CSV files, a store, or a function.

    npz:/var/lib/sensor/samples.npz     arrays named as the task's inputs (or x), y, sample_weight
    csv:/var/lib/sensor/recordings      files with a header line; the last column is the label
    store:/var/lib/sensor/samples.db    what a sensor records (device_client/sample_store.py)
    my_package.sensor:samples           a function of yours; ?room=3 passes arguments
    /home/pi/sensor.py:samples?room=3   the same from a file

Promises samples that fit the task, or a LocalError of one sentence that names the file,
line or function. A function is the owner's own code and runs with their rights;
nothing here comes from the network.
"""

import csv
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, MidgeError
from broker_bridge.task.samples import Samples, check_samples, from_arrays, preprocess, read_npz
from broker_bridge.task.taskfile import Task, Window, decode_task
from device_client.sample_store import read_store

__all__ = ["load_samples"]

Array = NDArray[Any]
# Whatever the owner's code may end with. A sys.exit() in it would end us without a word.
_THEIRS = (Exception, SystemExit)


def load_samples(spec: str, task: Task) -> Samples:
    """Return the checked samples that `spec` names.

    Raises LocalError when the source cannot be read or does not fit the task.
    """
    kind, _, rest = spec.partition(":")
    if not rest:
        raise LocalError(
            f"the data source {spec!r} is not understood: write npz:FILE, csv:FOLDER, "
            "store:FILE or module:function"
        )
    if kind == "npz":
        return read_npz(rest, task)
    if kind == "csv":
        return _read_csv_folder(Path(rest), task)
    if kind == "store":
        return read_store(Path(rest), task)
    return _call(spec, task)


def _call(spec: str, task: Task) -> Samples:
    target, _, query = spec.partition("?")
    module_name, _, function_name = target.rpartition(":")
    function = _function(module_name, function_name)
    arguments = {name: _value(text) for name, text in parse_qsl(query, keep_blank_values=True)}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise LocalError(f"{target} cannot be called so: {error}") from None
    try:
        result = function(**arguments)
        return _as_samples(result, task)
    except LocalError as error:
        raise LocalError(f"{spec}: {error}") from None
    except _THEIRS as error:
        raise LocalError(f"{spec} failed: {type(error).__name__}: {error}") from error


def _function(module_name: str, function_name: str) -> Callable[..., Any]:
    try:
        if module_name.endswith(".py"):
            module = _load_file(Path(module_name))
        else:
            module = importlib.import_module(module_name)
    except LocalError:
        raise
    except _THEIRS as error:
        raise LocalError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise LocalError(f"{module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise LocalError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LocalError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _as_samples(result: Any, task: Task) -> Samples:
    """Accept Samples, a mapping of arrays, or (x, y) and (x, y, weights)."""
    if isinstance(result, Samples):
        return check_samples(task, result)
    if isinstance(result, Mapping):
        return from_arrays({name: np.asarray(a) for name, a in result.items()}, task)
    if isinstance(result, tuple) and len(result) in (2, 3):
        x, y, *weights = result
        inputs = x if isinstance(x, tuple | list) else (x,)
        samples = Samples(
            tuple(np.asarray(a) for a in inputs),
            np.asarray(y),
            np.asarray(weights[0]) if weights else None,
        )
        return check_samples(task, samples)
    raise LocalError(
        f"the function returned {type(result).__name__}; return (x, y), (x, y, weights), "
        "a dict of arrays, or Samples"
    )


def _read_csv_folder(folder: Path, task: Task) -> Samples:
    if len(task.inputs) != 1:
        raise LocalError(
            f"csv: has one table, and the task {task.name!r} takes "
            f"{len(task.inputs)} inputs: use npz: or a function"
        )
    if not folder.is_dir():
        raise LocalError(f"there is no folder {folder}")
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise LocalError(f"{folder} holds no .csv files")
    parts = [_read_csv(file, task) for file in files]
    samples = Samples(
        (np.concatenate([x for x, _ in parts]),), np.concatenate([y for _, y in parts])
    )
    try:
        return check_samples(task, samples)
    except LocalError as error:
        raise LocalError(f"{folder}: {error}") from None


def _read_csv(file: Path, task: Task) -> tuple[Array, Array]:
    """Return (inputs, labels) of one file: one sample a row, or a recording cut into windows."""
    values, labels = _table(file, task)
    shape = task.inputs[0].shape
    if any(isinstance(step, Window) for step in task.preprocessing):
        return _recording(values, labels, task)
    samples = preprocess(task, values)
    if samples.shape[1] != np.prod(shape):
        raise LocalError(
            f"{file} has {samples.shape[1]} columns beside the label; "
            f"the task needs {int(np.prod(shape))}"
        )
    return samples.reshape(-1, *shape), labels


def _recording(values: Array, labels: Array, task: Task) -> tuple[Array, Array]:
    """Windows across a change of label belong to neither, and are left out."""
    pieces = []
    borders = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    for start, end in itertools.pairwise(borders):
        windows = preprocess(task, values[start:end])
        pieces.append((windows, np.full(len(windows), labels[start])))
    return np.concatenate([x for x, _ in pieces]), np.concatenate([y for _, y in pieces])


def _table(file: Path, task: Task) -> tuple[Array, Array]:
    names = {name: index for index, name in enumerate(task.label_names)}
    values: list[list[float]] = []
    labels: list[float] = []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.reader(lines)
            width = len(next(rows, []))
            for row in rows:
                if len(row) != width:
                    raise ValueError(f"{len(row)} columns where the header has {width}")
                label = names[row[-1]] if row[-1] in names else float(row[-1])
                values.append([float(text) for text in row[:-1]])
                labels.append(label)
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, csv.Error) as error:
        raise LocalError(f"{file}, line {len(values) + 2}: {error}") from None
    if not values:
        raise LocalError(f"{file} holds no rows below its header")
    return np.asarray(values, np.float32), np.asarray(labels)


def _main(task_path: str, spec: str, out: str) -> None:
    """Write the samples that `spec` names to the .npz file `out`: for `midge task verify`."""
    plan, _ = decode_task(Path(task_path).read_bytes())
    samples = load_samples(spec, plan.task)
    arrays = {f"x{i}": array for i, array in enumerate(samples.inputs)} | {"y": samples.labels}
    if samples.weights is not None:
        arrays["sample_weight"] = samples.weights
    np.savez(out, **arrays)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:4])
    except MidgeError as failure:
        sys.exit(str(failure))
