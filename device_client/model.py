"""The newest model on this device, for the programs that use it.

    from device_client.model import Model

    model = Model.open("/var/lib/midge")
    probabilities = model.predict(window)          # [rows, classes]
    print(model.version, model.label(probabilities[0]))

Two files in the device's folder, each a whole task file and replaced in one step:

    model/global.task      the newest model of the federation that this device has verified
    model/personal.task    the same, trained on from there on local samples, while it is better

Whoever reads them gets one or the other version, never half of each.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, make_folder, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import preprocess
from broker_bridge.task.taskfile import Plan, decode_task, encode_task
from broker_bridge.wire import weights as wire
from broker_bridge.wire.envelope import sha256

__all__ = ["Kind", "Model", "discard", "keep", "kept", "newest"]

Array = NDArray[Any]
Kind = Literal["global", "personal"]

_VERSION, _ROUND = "model", "round"  # in the header's `versions`


def keep(
    folder: Path,
    kind: Kind,
    plan: Plan,
    weights: Mapping[str, Array],
    *,
    version: int,
    number: int,
    disk: Disk = REAL_DISK,
) -> None:
    """Put model `version` of round `number` where programs look for it, in one step.

    Raises LocalError, and DiskFullError; the former file is then still there.
    """
    data = wire.encode({name: np.asarray(array) for name, array in weights.items()})
    task = msgspec.structs.replace(
        plan.task,
        versions=plan.task.versions | {_VERSION: str(version), _ROUND: str(number)},
        weights_digest=sha256(data).hex(),
        weights_bytes=len(data),
    )
    path = _path(folder, kind)
    make_folder(path.parent, disk=disk)
    write_atomic(path, encode_task(task, plan.tflite, data), disk=disk, mode=0o640)


def discard(folder: Path, kind: Kind, *, disk: Disk = REAL_DISK) -> None:
    """Take a model away, if there is one."""
    path = _path(folder, kind)
    with disk_errors(path):
        if disk.exists(path):
            disk.unlink(path)


def kept(folder: Path, kind: Kind, *, disk: Disk = REAL_DISK) -> int | None:
    """The version of the model that is kept, or None. A damaged file counts as none."""
    path = _path(folder, kind)
    try:
        with disk_errors(path):
            return _version(decode_task(disk.read(path))[0]) if disk.exists(path) else None
    except (PeerError, ValueError):  # a header is not sealed: its version may be no number
        return None


def _path(folder: Path, kind: Kind) -> Path:
    return folder / "model" / f"{kind}.task"


def _version(plan: Plan) -> int:
    return int(plan.task.versions.get(_VERSION, "0"))


class Model:
    """A model to ask. Not safe for use by two threads at once."""

    def __init__(self, path: Path, kind: Kind, content: bytes, *, threads: int = 1) -> None:
        """Load the task file `content`, which was read from `path`. Raises LocalError."""
        self._threads = threads
        self._take(path, kind, content)

    def _take(self, path: Path, kind: Kind, content: bytes) -> None:
        try:
            plan, weights = decode_task(content)
        except PeerError as error:
            raise LocalError(
                f"{path} is damaged ({error}); the next round brings a new one"
            ) from None
        self._runtime = TaskRuntime(plan, num_threads=self._threads)
        self.path, self.kind = path, kind
        self._plan, self._weights, self._content = plan, weights, sha256(content)

    @classmethod
    def open(cls, folder: str | Path, *, kind: Kind | None = None, threads: int = 1) -> "Model":
        """The newest model in the device's `folder`: the personal one, if there is one.

        Raises LocalError when no round has brought a model yet.
        """
        path, chosen, content = newest(Path(folder), kind)
        return cls(path, chosen, content, threads=threads)

    @property
    def task(self) -> str:
        """The name of its task."""
        return self._plan.task.name

    @property
    def version(self) -> int:
        """Its number in the federation; a personal model has the one it was trained on from."""
        return _version(self._plan)

    @property
    def label_names(self) -> tuple[str, ...]:
        """What the outputs stand for, where the task says so."""
        return self._plan.task.label_names

    def predict(self, *inputs: Any, raw: bool = False) -> Array:
        """The outputs [rows, …] for one array for each input of the task.

        A single sample, without the first axis, is one row. `raw`: a recording as the sensor
        gave it, to be prepared as the task says. Raises LocalError for other shapes.
        """
        task = self._plan.task
        if len(inputs) != len(task.inputs):
            raise LocalError(f"the task {task.name!r} takes {len(task.inputs)} input(s)")
        arrays = [np.asarray(each) for each in inputs]
        if raw:
            arrays = [preprocess(task, each) for each in arrays]
        rows = [_rows(array, spec) for array, spec in zip(arrays, task.inputs, strict=True)]
        if len({len(each) for each in rows}) != 1 or not len(rows[0]):
            raise LocalError("the inputs need the same number of rows, and at least one")
        return self._runtime.infer(self._weights, rows)

    def label(self, output: Array) -> str:
        """The name of the class with the highest output; its number, if it has no name."""
        best = int(np.argmax(output))
        return self.label_names[best] if best < len(self.label_names) else str(best)

    def refresh(self) -> bool:
        """Take the newest model if there is a newer one; say whether there was."""
        path, kind, content = newest(self.path.parents[1])
        if sha256(content) == self._content:
            return False
        self._take(path, kind, content)
        return True


def newest(folder: Path, kind: Kind | None = None) -> tuple[Path, Kind, bytes]:
    """The file of the newest model, its kind and its bytes. Raises LocalError."""
    kinds: Sequence[Kind] = ("personal", "global") if kind is None else (kind,)
    for each in kinds:
        path = _path(folder, each)
        try:
            return path, each, path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror or error}") from None
    raise LocalError(
        f"there is no {kind or 'trained'} model in {folder / 'model'} yet; a round that this "
        "device takes part in brings one"
    )


def _rows(array: Array, spec: wire.TensorSpec) -> Array:
    shape = tuple(spec.shape)
    if array.shape == shape:
        array = array[None]
    if array.shape[1:] != shape:
        raise LocalError(
            f"{spec.name!r} has the shape {list(array.shape)}; the model takes [rows, "
            f"{', '.join(map(str, shape))}]"
        )
    if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise LocalError(f"{spec.name!r} holds something that is not a finite number")
    return np.ascontiguousarray(array, dtype=spec.dtype)
