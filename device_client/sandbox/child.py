"""The training process: fetch samples, lock the door, then run what somebody else wrote.

    python -m device_client.sandbox.child DESCRIPTOR PARENT MEMORY_BYTES

The agent starts it (`process`) and talks to it over one socket. Before the door is locked it
runs the owner's data source, with the owner's rights, and the runtime over a model of ours.
The plan's graph and the weights come in afterwards. It is started afresh, never forked, so
it never held the device's keys. It ends when the agent does, or after a while without work.
"""

import contextlib
import math
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, MidgeError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.task.runtime import TaskRuntime, warm_up
from broker_bridge.task.samples import Part, Samples
from broker_bridge.task.taskfile import Task, Training, decode_plan
from broker_bridge.wire import weights
from device_client.data import load_samples
from device_client.sandbox import confinement, talk
from device_client.sandbox.tiny_model import TINY_MODEL
from device_client.trainer import Progress, Trained, Trainer

__all__ = ["main"]

_HEARD = msgspec.msgpack.Decoder(
    talk.Load | talk.Build | talk.Train | talk.Evaluate | talk.Ack | talk.Stop
)
_SAY_EVERY_S = 0.05
_ALIVE_EVERY_S = 0.5
_STEPS_A_MESSAGE_MAX = 4096


class _OverError(Exception):
    """The agent is gone, or has had no work for a while."""


class _StoppedError(Exception):
    """The agent wants no more of this evaluation."""


class _Line:
    """The socket to the agent, which is trusted."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._socket = socket.socket(fileno=descriptor)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def say(self, message: msgspec.Struct, *blobs: Any) -> None:
        for part in talk.frame(message, *blobs):
            self._socket.sendall(part)

    def has_news(self, within_s: float = 0.0) -> bool:
        return bool(self._poll.poll(within_s * 1000))

    def hear(self) -> tuple[Any, memoryview]:
        return talk.read_frame(
            self._read,
            _HEARD,
            head_bytes_max=LIMITS.task_header_bytes_max + 64 * 1024,
            blob_bytes_max=4 * LIMITS.model_bytes_max,
        )

    def _read(self, length: int) -> bytearray:
        found = bytearray(length)
        rest = memoryview(found)
        while rest:
            got = self._socket.recv_into(rest)
            if not got:
                raise _OverError
            rest = rest[got:]
        return found


class _Worker:
    """Everything behind the locked door."""

    def __init__(self, line: _Line, load: talk.Load, samples: Samples | None) -> None:
        self._line = line
        self._load = load
        self._samples = samples
        self._trainer: Trainer | None = None
        self._keeps_state = False
        self._losses: list[float] = []
        self._said_s = 0.0
        self._unread = False  # whether the agent has yet to read our last `Steps`

    def serve(self) -> None:
        """Do what the agent asks until it has nothing for a while. Raises _OverError."""
        while self._line.has_news(self._load.idle_s):
            message, blob = self._line.hear()
            try:
                self._do(message, blob)
            except MemoryError:
                self._fail(
                    LocalError(
                        "the memory that training may take is used up: take a task with smaller "
                        "batches, or set memory_mb higher in device.toml"
                    )
                )
            except MidgeError as error:
                self._fail(error)
            except (_OverError, ConnectionError):
                raise
            except Exception as error:  # whatever somebody else's graph makes a library say
                self._fail(LocalError(f"the task does not run here: {_said(error)}"))
        raise _OverError

    def _do(self, message: Any, blob: memoryview) -> None:
        match message:
            case talk.Build() if self._samples is not None:
                plan = decode_plan(bytes(blob))
                runtime = TaskRuntime(
                    plan, num_threads=self._load.threads, prefer=self._load.prefer
                )
                self._keeps_state = plan.task.keep_optimiser_state
                self._trainer = Trainer(runtime, self._samples)
                self._line.say(talk.Built(runtime=runtime.runtime_name))
            case talk.Train() if self._trainer is not None:
                self._train(self._trainer, message, blob)
            case talk.Evaluate() if self._trainer is not None:
                self._evaluate(self._trainer, message.part, blob)
            # `Ack` and `Stop` that crossed our last word mean nothing any more.

    def _evaluate(self, trainer: Trainer, part: Part, blob: memoryview) -> None:
        self._said_s = time.monotonic()
        try:
            found = trainer.evaluate(weights.decode(blob), self._batch_done, part=part)
        except _StoppedError:
            self._line.say(talk.Stopped())
        else:
            self._line.say(talk.Measured(loss=found.loss, metrics=found.metrics))

    def _batch_done(self) -> None:
        while self._line.has_news():
            if self._is_told_to_stop():
                raise _StoppedError
        if time.monotonic() - self._said_s >= _ALIVE_EVERY_S:
            self._said_s = time.monotonic()
            self._line.say(talk.Alive())

    def _train(self, trainer: Trainer, asked: talk.Train, blob: memoryview) -> None:
        border = len(blob) - asked.optimiser_bytes
        kept = weights.decode(blob[border:]) if asked.optimiser_bytes else None
        settings = Training(
            epochs=asked.epochs, learning_rate=asked.learning_rate,
            proximal_mu=asked.proximal_mu, clip_norm=asked.clip_norm,
        )  # fmt: skip
        self._losses, self._said_s, self._unread = [], time.monotonic(), False
        trained = trainer.train(
            weights.decode(blob[:border]), settings, seed=asked.seed, on_step=self._step_done,
            optimiser_state=kept, part=asked.part,
        )  # fmt: skip
        if trained is None:
            self._line.say(talk.Stopped())
        else:
            self._say_done(trained)

    def _step_done(self, progress: Progress) -> bool:
        self._losses.append(progress.loss)
        while self._line.has_news():
            if self._is_told_to_stop():
                return False
        last = progress.step == progress.steps
        late = time.monotonic() - self._said_s >= _SAY_EVERY_S
        if not (last or late or len(self._losses) >= _STEPS_A_MESSAGE_MAX):
            return True
        while self._unread:  # the agent may take its time: that is how training pauses
            if self._is_told_to_stop():
                return False
        self._line.say(talk.Steps(last=progress.step, losses=self._losses))
        self._losses, self._said_s, self._unread = [], time.monotonic(), True
        return True

    def _is_told_to_stop(self) -> bool:
        message, _ = self._line.hear()
        if isinstance(message, talk.Ack):
            self._unread = False
        return isinstance(message, talk.Stop)

    def _say_done(self, trained: Trained) -> None:
        kept = weights.encode(_plain(trained.optimiser_state)) if self._keeps_state else b""
        done = talk.Done(
            loss=trained.loss, metrics=trained.metrics, seconds=trained.seconds,
            peak_bytes=confinement.peak_bytes(), optimiser_bytes=len(kept),
        )  # fmt: skip
        self._line.say(done, weights.encode(_plain(trained.weights)), kept)

    def _fail(self, error: MidgeError) -> None:
        self._line.say(_failure(error))


def _plain(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(array) for name, array in arrays.items()}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _failure(error: MidgeError) -> talk.Failure:
    reason = error.reason if isinstance(error, PeerError) else ""
    return talk.Failure(sentence=str(error)[:2000], reason=reason[:40])


def _samples(load: talk.Load) -> Samples | None:
    """The owner's samples, by the owner's code. None when there is no task to fit them to."""
    if not load.task:
        return None
    return load_samples(load.data, msgspec.json.decode(load.task, type=Task))


def _use_what_is_loaded_late() -> None:
    """Draw numbers once, as training will: nothing can be imported behind the locked door."""
    np.random.Generator(np.random.PCG64(1)).permutation(2)
    np.random.SeedSequence([1, 2]).generate_state(1, np.uint64)
    np.isfinite(np.zeros(1, np.float32)).all()
    math.isfinite(float(np.linalg.norm(np.ones(1))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The runtime says on standard error that it made a delegate, at each start."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main() -> None:
    """Serve the agent that started this process; end without a word when it is over."""
    descriptor, parent, memory_bytes = map(int, sys.argv[1:4])
    memory_bytes = confinement.begin(parent=parent, memory_bytes=memory_bytes)
    os.environ.pop("PYTHONPATH", None)  # it was for us alone
    line = _Line(descriptor)
    try:
        _serve(line, memory_bytes)
    except (_OverError, ConnectionError):
        os._exit(0)


def _serve(line: _Line, memory_bytes: int) -> None:
    load, _ = line.hear()
    try:
        with _quiet():
            warm_up(TINY_MODEL, num_threads=load.threads, prefer=load.prefer)
        _use_what_is_loaded_late()
        samples = _samples(load)
    except (MidgeError, MemoryError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            error = LocalError(
                f"the samples do not fit into the {memory_bytes // 1_000_000:,} MB that training "
                "may take: give out fewer, or set memory_mb higher in device.toml"
            )
        line.say(_failure(error))
        raise _OverError from None
    held = confinement.lock(
        keep=(line.descriptor, *(samples.descriptors if samples is not None else ())),
        threads=load.threads > 1,
        memory_bytes=memory_bytes,
    )
    line.say(talk.Ready(samples=0 if samples is None else len(samples), confinement=held))
    _Worker(line, load, samples).serve()


if __name__ == "__main__":
    main()
