"""What a run trains: its task, and the line of models from the first to the newest.

The first model is the task file's own weights; each next one is the server optimiser's
step from the one before by a round's mean. A model is a file before its row exists, and
becomes the present one when its row is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from broker_bridge.disk import Disk, disk_errors
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.taskfile import Plan, decode_task, encode_plan
from broker_bridge.wire import weights
from server.aggregation.optimisers import FedAdam, FedAvg, FedAvgM, FedYogi, ServerOptimiser
from server.config import ServerConfig
from server.store import rows
from server.store.models import ModelFiles

__all__ = ["Lineage", "LoadedTask", "Next", "TaskFiles", "Weights"]

Weights = dict[str, NDArray[Any]]


@dataclass
class LoadedTask:
    """A task that a run trains."""

    plan: Plan
    plan_bytes: bytes
    initial: Weights


@dataclass(frozen=True)
class Next:
    """A model that is on the disk and whose row is not written yet."""

    row: rows.Model
    model: Weights
    data: bytes
    state: Weights


class TaskFiles:
    """The task files that a start may name: those in the fleet's folder, and those given."""

    def __init__(self, folder: Path, given: tuple[str, ...], *, disk: Disk) -> None:
        self._folder = folder
        self._given = given
        self._disk = disk

    def paths(self) -> dict[str, Path]:
        """Every task file, by file name without `.task`."""
        with disk_errors(self._folder):
            names = self._disk.names(self._folder) if self._disk.exists(self._folder) else []
        found = [
            *(self._folder / n for n in names if n.endswith(".task")),
            *map(Path, self._given),
        ]
        return {path.stem: path for path in found}

    def named(self, name: str) -> Path:
        """The file of this task, or the only one if `name` is empty. Raises LocalError."""
        paths = self.paths()
        if not name and len(paths) == 1:
            return next(iter(paths.values()))
        if name in paths:
            return paths[name]
        known = ", ".join(sorted(paths)) or "none"
        raise LocalError(
            f"there is no task {name!r} here; known are: {known}. Put NAME.task into "
            "the fleet's folder tasks/, or start the server with --task FILE"
        )

    def load(self, path: Path) -> LoadedTask:
        """Read a task file. Raises LocalError."""
        with disk_errors(path):
            data = self._disk.read(path)
        try:
            plan, initial = decode_task(data)
        except PeerError as error:
            raise LocalError(f"{path}: {error}") from None
        return LoadedTask(plan, encode_plan(plan.task, plan.tflite), initial)


class Lineage:
    """The present task and model, and how the next model is made."""

    def __init__(
        self, files: ModelFiles, config: ServerConfig, *, clock: Callable[[], float]
    ) -> None:
        self.task: LoadedTask | None = None
        self.model: Weights = {}
        self.version = 0
        self.data = b""  # the model, encoded
        self._files = files
        self._config = config
        self._clock = clock
        self._optimiser: ServerOptimiser = FedAvg()
        self._state: Weights = {}

    def first(self, task: LoadedTask, version: int) -> rows.Model:
        """Write a task's initial weights as a model; return its row."""
        data = weights.encode(task.initial)
        return self._row(task, max(version, 1), data, number=0, state_digest=None)

    def use(self, task: LoadedTask, model: rows.Model) -> None:
        """Go on from this model. Raises LocalError if it cannot be read; then all is as before."""
        data = self._files.read(model.version, model.digest)
        values = weights.decode(data)
        statistics = task.plan.task.weights[task.plan.task.trainable_count :]
        optimiser = _optimiser(self._config, frozenset(spec.name for spec in statistics))
        state = optimiser.init(weights.specs_of(values))
        if model.optimiser_state_digest is not None:
            kept = weights.decode(
                self._files.read(model.version, model.optimiser_state_digest, kind="optimiser")
            )
            if weights.specs_of(kept) == weights.specs_of(state):
                state = kept
        # All of it could be read: only now is it the present one.
        self.task, self.model, self.data, self.version = task, values, data, model.version
        self._optimiser, self._state = optimiser, state

    def write_next(self, mean: weights.Tensors, *, version: int, number: int) -> Next:
        """Make round `number`'s model and write its files. Raises LocalError."""
        assert self.task is not None  # noqa: S101 - a round is closing
        new, state = self._optimiser.apply(self.model, mean, self._state)
        data = weights.encode(new)
        state_digest = None
        if state:
            state_digest = self._files.write(version, weights.encode(state), kind="optimiser")
        row = self._row(self.task, version, data, number=number, state_digest=state_digest)
        return Next(row, new, data, state)

    def use_next(self, made: Next) -> None:
        """Go on from a model whose row is written now."""
        self.model, self.data, self.version = made.model, made.data, made.row.version
        self._state = made.state

    def _row(
        self, task: LoadedTask, version: int, data: bytes, *, number: int,
        state_digest: bytes | None,
    ) -> rows.Model:  # fmt: skip
        return rows.Model(
            version=version,
            task_digest=task.plan.digest,
            digest=self._files.write(version, data),
            size_bytes=len(data),
            round=number,
            created_at=self._clock(),
            optimiser_state_digest=state_digest,
        )


def _optimiser(config: ServerConfig, plain: frozenset[str]) -> ServerOptimiser:
    """The configured rule; the tensors in `plain` (statistics) are averaged by FedAvg anyway."""
    rate = config.aggregation.learning_rate
    match config.aggregation.optimiser:
        case "fedavg":
            return FedAvg(learning_rate=rate, plain=plain)
        case "fedavgm":
            return FedAvgM(learning_rate=rate, plain=plain)
        case "fedadam":
            return FedAdam(learning_rate=rate, plain=plain)
        case "fedyogi":
            return FedYogi(learning_rate=rate, plain=plain)
