"""The task at hand, the model at hand, and one piece of work at a time beside the loop.

Training and evaluating take long, so they run in a `Background`: a second thread on a
device, whatever a simulation likes elsewhere. They are stopped between two steps. What
comes of them is an event for the participant.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, make_folder, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.machine import machine_name
from broker_bridge.task.taskfile import Plan, Training, decode_plan
from broker_bridge.wire import weights
from broker_bridge.wire.envelope import sha256
from broker_bridge.wire.messages import Measured, Settings
from device_client import events as ev
from device_client import model as models
from device_client import personal
from device_client.background import Background, guarded
from device_client.trainer import Apart, LocalTrainer, Progress, Trained

__all__ = ["Workbench"]

log = logging.getLogger("midge.device")

Array = NDArray[Any]


class Workbench:
    """What the agent trains with. One thread uses it; `background` runs the work."""

    def __init__(
        self,
        folder: Path,
        *,
        scope: str,
        load: Callable[[Plan], LocalTrainer],
        background: Background,
        disk: Disk = REAL_DISK,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.background = background
        self.measured: Measured | UnsetType = UNSET  # what the last training cost
        self._folder = folder
        self._disk = disk
        self._scope = scope
        self._load = load
        self._on_progress = on_progress
        self._plan: Plan | None = None
        self._trainer: LocalTrainer | None = None
        self._model: tuple[bytes, dict[str, Array]] | None = None
        self._trained: Trained | None = None
        self._is_personalising = False
        self._kept: dict[str, Array] = {}  # optimiser state, of a task that keeps it

    @property
    def samples(self) -> int:
        """How many samples there are for the task at hand."""
        return 0 if self._trainer is None else len(self._trainer)

    # ── task and model ──────────────────────────────────────────────────────────────────

    def stored_task(self, digest: bytes) -> bytes | None:
        """The task with this digest, if it was fetched before."""
        path = self._path(digest)
        with disk_errors(path):
            if not self._disk.exists(path):
                return None
            content = self._disk.read(path)
        return content if sha256(content) == digest else None

    def use_task(self, content: bytes) -> None:
        """Load a task and the samples for it. Raises PeerError, LocalError, NotLoadedError."""
        plan = decode_plan(content)
        if self._plan is not None and self._plan.digest == plan.digest:
            return
        trainer = self._load(plan)
        self._trainer, self._plan, self._model = trainer, plan, None
        self._kept = {}
        path = self._path(plan.digest)
        if self.stored_task(plan.digest) is None:
            make_folder(path.parent, disk=self._disk)
            write_atomic(path, content, disk=self._disk)
        log.info("task %s: %d samples here", plan.task.name, self.samples)

    def has_model(self, digest: bytes) -> bool:
        """Whether this model is at hand."""
        return self._model is not None and self._model[0] == digest

    def expect_model(self) -> None:
        """A model is on its way: what it will be trained in may get ready meanwhile."""
        self._end_personalising()
        if isinstance(self._trainer, Apart):
            with contextlib.suppress(LocalError):  # said when it is to train
                self._trainer.warm()

    def use_model(self, digest: bytes, content: bytes) -> None:
        """Take a model. Raises PeerError when it is not one of the task's."""
        found = weights.decode(content)
        if self._plan is not None:
            weights.check(found, self._plan.task.weights)
        self._model = (digest, found)

    def keep(self, *, version: int, number: int) -> None:
        """Put the model at hand where this device's own programs find it. Raises LocalError.

        A personal model was better than an older one: until it is trained anew there is none.
        """
        if self._plan is not None and self._model is not None:
            self._keep("global", self._plan, self._model[1], version, number)
            models.discard(self._folder, "personal", disk=self._disk)

    def _keep(
        self, kind: models.Kind, plan: Plan, found: dict[str, Array], version: int, number: int
    ) -> None:
        models.keep(
            self._folder, kind, plan, found, version=version, number=number, disk=self._disk
        )

    def _path(self, digest: bytes) -> Path:
        return self._folder / "tasks" / f"{digest.hex()[:16]}.plan"

    # ── work ────────────────────────────────────────────────────────────────────────────

    def train(self, number: int, settings: Settings) -> list[ev.Event]:
        """Begin training for round `number`."""
        trainer, plan, model = self._trainer, self._plan, self._model
        if trainer is None or plan is None or model is None:
            return [ev.Failed(number, "the task is not loaded")]
        training = Training(
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            proximal_mu=settings.proximal_mu,
            clip_norm=settings.clip_norm,
        )

        def work() -> list[ev.Event]:
            trained = trainer.train(
                model[1], training, seed=self._seed(number), on_step=self._step_done,
                optimiser_state=self._kept,
            )  # fmt: skip
            if trained is None:
                return []
            if plan.task.keep_optimiser_state:
                self._kept = trained.optimiser_state
            self._trained = trained
            self.measured = _measured(plan, trained)
            log.info(
                "round %d: trained %d steps in %.2f s, loss %.4f",
                number, trained.steps, trained.seconds, trained.loss,
            )  # fmt: skip
            return [ev.Trained(number)]

        self._end_personalising()
        log.info("round %d: training", number)
        self.background.start(guarded(work, number))
        return []

    def evaluate(self, number: int, version: int) -> list[ev.Event]:
        """Begin measuring model `version`."""
        trainer, model = self._trainer, self._model
        if trainer is None or model is None:
            return [ev.Failed(number, "the task is not loaded")]

        def work() -> list[ev.Event]:
            found = trainer.evaluate(model[1])
            log.info("model %d: %s on %d samples", version, found.metrics, found.examples)
            metrics = {"loss": found.loss} | found.metrics
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            return [ev.Evaluated(version, found.examples, finite)]

        self.background.start(guarded(work, number))
        return []

    def personalise(self, number: int, version: int, *, epochs: int) -> None:
        """Begin to train model `version` on from here, for this device's own programs."""
        trainer, plan, model = self._trainer, self._plan, self._model
        if trainer is None or plan is None or model is None:
            return
        defaults = plan.task.defaults
        training = Training(
            epochs=epochs, learning_rate=defaults.learning_rate, clip_norm=defaults.clip_norm
        )

        def work() -> list[ev.Event]:
            found = personal.better(
                trainer, model[1], training, version=version, seed=self._seed(number),
                on_step=self._step_done,
            )  # fmt: skip
            if found is not None and not self.background.stopping:
                self._keep("personal", plan, found, version, number)
            return []

        self._is_personalising = True
        self.background.start(guarded(work, number))

    def _end_personalising(self) -> None:
        """A round comes first."""
        if self._is_personalising:
            self.stop("there is other work")

    def stop(self, reason: str) -> None:
        """End whatever is being done."""
        self._is_personalising = False
        if isinstance(self._trainer, Apart):
            self._trainer.interrupt()
        if self.background.stop():
            log.info("training stopped: %s", reason)

    def take_update(self, bound: float) -> tuple[Trained, dict[str, NDArray[np.float32]]] | None:
        """What was trained, once, and its difference from the model it started from.

        The difference is scaled down to the L2 norm `bound` that the round allows.
        """
        trained, model = self._trained, self._model
        self._trained = None
        if trained is None or model is None:
            return None
        return trained, _delta(trained.weights, model[1], bound)

    def _step_done(self, progress: Progress) -> bool:
        self._on_progress(progress)
        return not self.background.stopping

    def _seed(self, number: int) -> int:
        """The same round on the same device trains alike, so a power cut changes nothing."""
        drawn = hashlib.sha256(self._scope.encode() + number.to_bytes(8, "big")).digest()
        return int.from_bytes(drawn[:8], "big")


def _measured(plan: Plan, trained: Trained) -> Measured:
    return Measured(
        task=plan.task.name,
        digest=plan.digest.hex()[:16],
        step_s=round(trained.seconds / max(1, trained.steps), 6),
        memory_bytes=trained.peak_bytes,
        runtime=trained.runtime[:80],
        machine=machine_name(),
    )


def _delta(
    new: Mapping[str, Array], old: Mapping[str, Array], bound: float
) -> dict[str, NDArray[np.float32]]:
    """Clip a whole update: McMahan et al. 2018 (arXiv:1710.06963), Algorithm 1."""
    delta = {name: np.subtract(new[name], old[name], dtype=np.float32) for name in old}
    norm = sum(float(np.sum(np.square(d, dtype=np.float64))) for d in delta.values()) ** 0.5
    if norm <= bound:
        return delta
    return {name: (d * np.float32(bound / norm)).astype(np.float32) for name, d in delta.items()}
