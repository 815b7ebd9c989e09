"""A trainer that trains in another process: what the workbench has on a real device.

It keeps one process for one task: started when the task comes, or when the next model is on
its way, kept between rounds, gone after some minutes without work (it ends itself). Whatever
becomes of it is a LocalError of one sentence; the next round starts another. A task that ends
process after process is tried less and less often.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.runtime import Evaluation
from broker_bridge.task.samples import Part, part_size
from broker_bridge.task.taskfile import Plan, Task, Training, encode_plan
from broker_bridge.wire import weights as wire
from device_client.config import DeviceConfig
from device_client.sandbox import talk
from device_client.sandbox.confinement import Confinement
from device_client.sandbox.deaths import Deaths
from device_client.sandbox.process import COMMAND, Process, ProcessEndedError, StoppedError
from device_client.trainer import NotLoadedError, Progress, Trained

__all__ = ["Sandbox", "SandboxSettings", "SandboxedTrainer"]

log = logging.getLogger("midge.device")

Array = NDArray[Any]
T = TypeVar("T")

_READY = msgspec.msgpack.Decoder(talk.Ready | talk.Failure)
_BUILT = msgspec.msgpack.Decoder(talk.Built | talk.Failure)
_TRAINING = msgspec.msgpack.Decoder(talk.Steps | talk.Done | talk.Stopped | talk.Failure)
_MEASURED = msgspec.msgpack.Decoder(talk.Alive | talk.Measured | talk.Stopped | talk.Failure)


@dataclass(frozen=True)
class SandboxSettings:
    """`data`: the samples, as for `run`. `memory_bytes` 0: half of the machine's."""

    data: str
    threads: int = 1
    prefer: str | None = None
    memory_bytes: int = 0
    stall_s: float = 300.0  # a process that is silent for so long is ended
    idle_s: float = 180.0  # one that has no work for so long ends itself
    fresh_s: float = 600.0  # a round begins with samples that were fetched no longer ago
    stop_grace_s: float = 10.0  # how long a step may still take when it is to stop
    command: Sequence[str] = COMMAND

    @classmethod
    def of(cls, config: DeviceConfig, data: str = "") -> "SandboxSettings":
        """As device.toml has it; `data` instead of the samples named there."""
        return cls(
            data or config.data, threads=config.threads,
            memory_bytes=config.memory_mb * 1_000_000, stall_s=config.stall_s,
        )  # fmt: skip


class Sandbox:
    """Makes the trainers of one device; one of them has a process at a time."""

    def __init__(
        self, settings: SandboxSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._deaths = Deaths(clock)
        self.while_waiting: Callable[[], bool] = lambda: False
        self._confined: Confinement | None = None
        self._trainer: SandboxedTrainer | None = None

    def load(self, plan: Plan) -> "SandboxedTrainer":
        """Fetch the samples for `plan`; load it where it can do no harm.

        `while_waiting` is asked every second; True: give up. Raises NotLoadedError then, and
        LocalError when data, plan or process do not work.
        """
        self.close()
        self._deaths.begin(plan.digest)
        self._trainer = SandboxedTrainer(plan, self._settings, self._deaths, self._say_once)
        try:
            self._trainer.open(self.while_waiting)
        except StoppedError:
            raise NotLoadedError("the device is stopping") from None
        except BaseException:
            self.close()
            raise
        return self._trainer

    def examine(self) -> Confinement:
        """Start a process without a task, and say what holds it. Raises LocalError."""
        process = _start(self._settings, b"")
        try:
            return _ready(process).confinement
        finally:
            process.end()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _say_once(self, confinement: Confinement) -> None:
        if confinement == self._confined:
            return
        self._confined = confinement
        if confinement.missing:
            log.warning(
                "training runs in a process of its own, but not locked in: %s", confinement.missing
            )
        else:
            log.info("training runs in a process of its own, locked in by seccomp")


class SandboxedTrainer:
    """A LocalTrainer, and what `device_client.workbench.Apart` asks for."""

    def __init__(
        self,
        plan: Plan,
        settings: SandboxSettings,
        deaths: Deaths,
        on_ready: Callable[[Confinement], None],
    ) -> None:
        self.plan = plan
        self.runtime_name = ""
        self._settings = settings
        self._deaths = deaths
        self._on_ready = on_ready
        self._samples = 0
        self._lock = threading.Lock()  # guards the next two: a start may come from two threads
        self._process: Process | None = None
        self._is_open = False
        self._started_s = 0.0

    def __len__(self) -> int:
        """How many samples there were when they were last fetched."""
        return self._samples

    # ── the process ─────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int | None:
        """The present process, if there is one."""
        process = self._process
        return process.pid if process is not None and process.is_running else None

    def warm(self) -> None:
        """Get ready for a round, and do not wait for it. Raises LocalError.

        A process whose samples are old makes room for another: a sensor has gone on meanwhile.
        """
        with self._lock:
            is_old = time.monotonic() - self._started_s >= self._settings.fresh_s
            if self._process is not None and is_old:
                self._process.end()
        self._start()

    def _start(self) -> None:
        """Start a process, unless there is one."""
        with self._lock:
            if self._process is not None and self._process.is_running:
                return
            self._deaths.check()
            if self._process is not None:
                self._process.end()
            header = msgspec.json.encode(self.plan.task)
            self._process, self._is_open = _start(self._settings, header), False
            self._started_s = time.monotonic()

    def open(self, while_waiting: Callable[[], bool] | None = None) -> Process:
        """Return a process that has samples and plan. Raises LocalError."""
        self._start()
        process = self._process
        assert process is not None  # noqa: S101 - warm made it
        if not self._is_open:
            process.begin()
            process.while_waiting = while_waiting
            with self._deaths.counted():
                ready = self._samples_fetched(process)
                if not ready.samples:
                    raise process.nonsense("no samples")
                process.say(talk.Build(), encode_plan(self.plan.task, self.plan.tflite))
                built, _ = process.hear(_BUILT)
                if isinstance(built, talk.Failure):
                    raise _error(built)
            self._samples = ready.samples
            self.runtime_name = _printable(built.runtime)
            self._is_open = True
            process.while_waiting = None
            self._on_ready(ready.confinement)
        return process

    def _samples_fetched(self, process: Process) -> talk.Ready:
        """Wait for the owner's data source. Raises LocalError, StoppedError."""
        process.busy_with = f"the data source {self._settings.data}"
        try:
            found = _ready(process)
        except StoppedError:
            log.warning("%s was still at work when it was told to stop", process.busy_with)
            raise
        process.busy_with = "one step"
        return found

    def interrupt(self) -> None:
        """Have the present work end at its next step. For any thread."""
        process = self._process
        if process is not None:
            process.interrupt()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.end()
                self._process = None

    # ── the work ────────────────────────────────────────────────────────────────────────

    def train(
        self,
        weights: Mapping[str, Array],
        settings: Training,
        *,
        seed: int,
        on_step: Callable[[Progress], bool] = lambda _: True,
        optimiser_state: Mapping[str, Array] | None = None,
        part: Part = "all",
    ) -> Trained | None:
        """Do what `Trainer.train` does, with the same bits. Raises LocalError, PeerError.

        `on_step` hears of each step within 0.1 s or one step, whichever is longer; while it
        takes its time, the process goes no further than that. The optimiser's state comes back
        only if the task keeps it.
        """
        wire.check(weights, self.plan.task.weights)
        if part == "all":
            self.warm()
        kept = b""
        if self.plan.task.keep_optimiser_state and optimiser_state:
            kept = wire.encode(optimiser_state)
        asked = talk.Train(
            epochs=settings.epochs, learning_rate=settings.learning_rate,
            proximal_mu=settings.proximal_mu, clip_norm=settings.clip_norm, seed=seed,
            optimiser_bytes=len(kept), part=part,
        )  # fmt: skip
        started_s = time.monotonic()

        def answers(process: Process) -> Trained | None:
            return _Course(self, process, settings, on_step, started_s, part).follow()

        return self._ask(asked, (wire.encode(weights), kept), answers)

    def evaluate(self, weights: Mapping[str, Array], *, part: Part = "all") -> Evaluation:
        """Measure `weights` on the samples. Raises LocalError, PeerError."""
        wire.check(weights, self.plan.task.weights)

        def answers(process: Process) -> Evaluation | None:
            found: Any = talk.Alive()
            while isinstance(found, talk.Alive):
                found, _ = process.hear(_MEASURED)
            if isinstance(found, talk.Stopped):
                return None
            if isinstance(found, talk.Failure):
                raise _error(found)
            metrics = _metrics(process, found.metrics, self.plan.task)
            return Evaluation(part_size(self._samples, part), found.loss, metrics)

        found = self._ask(talk.Evaluate(part), (wire.encode(weights),), answers)
        if found is None:
            raise LocalError("the evaluation was stopped")
        return found

    def _ask(
        self, message: msgspec.Struct, blobs: Sequence[bytes], answers: Callable[[Process], T]
    ) -> T | None:
        """Say it, and return what `answers` makes of what comes back. None: interrupted."""
        try:
            try:
                return self._ask_once(message, blobs, answers)
            except ProcessEndedError as error:
                if not error.clean:
                    raise
            # It had waited for long enough, just as we came.
            return self._ask_once(message, blobs, answers)
        except StoppedError:
            return None

    def _ask_once(
        self, message: msgspec.Struct, blobs: Sequence[bytes], answers: Callable[[Process], T]
    ) -> T:
        process = self.open()
        process.begin()
        with self._deaths.counted():
            process.say(message, *blobs)
            found = answers(process)
        self._deaths.forget()
        return found


class _Course:
    """The course of one training, step by step, as the process tells it."""

    def __init__(
        self,
        trainer: SandboxedTrainer,
        process: Process,
        settings: Training,
        on_step: Callable[[Progress], bool],
        started_s: float,
        part: Part,
    ) -> None:
        self._trainer = trainer
        self._task = trainer.plan.task
        self._process = process
        self._on_step = on_step
        self._started_s = started_s
        self._examples = part_size(len(trainer), part)
        self._steps = settings.epochs * math.ceil(self._examples / self._task.batch_size)
        self._step = 0
        self._stopped = False
        # Exactly what `weights.encode` makes of these tensors: no more is taken in.
        slots = self._task.optimiser_state if self._task.keep_optimiser_state else ()
        specs = (self._task.weights, tuple(slot.tensor for slot in slots))
        self._blob_bytes_max = sum(
            64 + len(msgspec.msgpack.encode(each)) + sum(spec.nbytes for spec in each)
            for each in specs
        )

    def follow(self) -> Trained | None:
        """Until it is done; None when it was stopped."""
        process = self._process
        while True:
            message, blob = process.hear(_TRAINING, blob_bytes_max=self._blob_bytes_max)
            match message:
                case talk.Steps():
                    self._hear_of(message)
                case talk.Done():
                    return None if self._stopped else self._trained(message, blob)
                case talk.Stopped():
                    return None
                case talk.Failure():
                    raise _error(message)

    def _hear_of(self, steps: talk.Steps) -> None:
        if steps.last != self._step + len(steps.losses) or steps.last > self._steps:
            raise self._process.nonsense(f"step {steps.last} of {self._steps}")
        for loss in steps.losses:
            self._step += 1
            if not self._stopped and not self._on_step(Progress(self._step, self._steps, loss)):
                self._stopped = True
                self._process.stop()
        self._process.say(talk.Ack())

    def _trained(self, done: talk.Done, blob: memoryview) -> Trained:
        process, task = self._process, self._task
        if self._step != self._steps:
            raise process.nonsense(f"done at step {self._step} of {self._steps}")
        border = len(blob) - done.optimiser_bytes
        try:
            found = wire.decode(blob[: max(0, border)])
            wire.check(found, task.weights)
            kept = wire.decode(blob[border:]) if done.optimiser_bytes else {}
            wire.check(kept, [slot.tensor for slot in task.optimiser_state if kept])
        except PeerError as error:
            raise process.nonsense(str(error)) from None
        if not math.isfinite(done.loss):
            raise process.nonsense(f"a loss of {done.loss}")
        return Trained(
            weights=found, examples=self._examples, steps=self._steps, loss=done.loss,
            metrics=_metrics(process, done.metrics, task),
            seconds=min(done.seconds, time.monotonic() - self._started_s),
            optimiser_state=kept, runtime=self._trainer.runtime_name,
            peak_bytes=done.peak_bytes,
        )  # fmt: skip


def _start(settings: SandboxSettings, header: bytes) -> Process:
    process = Process(
        settings.command, memory_bytes=settings.memory_bytes, stall_s=settings.stall_s,
        stop_grace_s=settings.stop_grace_s,
    )  # fmt: skip
    load = talk.Load(
        task=header, data=settings.data, threads=settings.threads, prefer=settings.prefer,
        idle_s=settings.idle_s,
    )  # fmt: skip
    with contextlib.suppress(ProcessEndedError):  # whoever listens to it hears why
        process.say(load)
    return process


def _ready(process: Process) -> talk.Ready:
    found, _ = process.hear(_READY)
    if isinstance(found, talk.Failure):
        raise _error(found)
    return found  # type: ignore[no-any-return]


def _error(failure: talk.Failure) -> LocalError | PeerError:
    """What went wrong there, raised here; a log line stays one line."""
    sentence = _printable(failure.sentence)
    if failure.reason.isidentifier():
        return PeerError(failure.reason, sentence)
    return LocalError(sentence)


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)


def _metrics(process: Process, found: dict[str, float], task: Task) -> dict[str, float]:
    if set(found) != set(task.metrics):
        raise process.nonsense("metrics of another task")
    return {name: found[name] for name in task.metrics}
