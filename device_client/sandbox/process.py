"""One training process, from its start to its end, as the agent sees it: a stranger.

Promises that nothing it does or fails to do holds the agent up for longer than it was told
to wait, that it is gone after `end`, and a sentence for each way of dying. What it says is
bounded before it is read. It is started by exec, with no descriptor but one socket.
"""

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from broker_bridge.errors import LocalError, PeerError
from device_client.sandbox import talk

__all__ = ["COMMAND", "Process", "ProcessEndedError", "StoppedError"]

COMMAND = (sys.executable, "-P", "-m", "device_client.sandbox.child")
_HEAD_BYTES_MAX = 128 * 1024
_NOT_FOR_IT = (
    "CREDENTIALS_DIRECTORY",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
)

_CLOSED_GRACE_S = 2.0
_LOOK_EVERY_S = 1.0

# The rest of the sentence, by the signal that ended the process.
_DEATHS: dict[int, str] = {
    signal.SIGKILL: "was killed (SIGKILL), as Linux does when memory runs out; free some, or "
    "lower memory_mb in device.toml to be told so earlier",
    signal.SIGSYS: "was ended by the sandbox (SIGSYS): it tried what training never needs; do not "
    "trust this task, unless the data source left a thread running that did it",
}


class ProcessEndedError(LocalError):
    """It is gone, by itself or because we ended it. `clean`: it only had no work for a while."""

    def __init__(self, sentence: str, *, clean: bool = False) -> None:
        super().__init__(sentence)
        self.clean = clean


class StoppedError(Exception):
    """It was told to stop and did not answer in time; it is gone."""


class Process:
    """Started by one thread of the agent, used by one at a time; `interrupt` is for any."""

    def __init__(
        self, command: Sequence[str], *, memory_bytes: int, stall_s: float, stop_grace_s: float
    ) -> None:
        """Raises LocalError when it cannot be started."""
        self._stall_s = stall_s
        self._line, theirs = socket.socketpair()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for each in (self._line, self._wake_reader, self._wake_writer):
            each.setblocking(False)
        self._stop_grace_s = stop_grace_s
        # Asked every second while we wait, by whoever must not wait in silence; True: give up.
        self.while_waiting: Callable[[], bool] | None = None
        self.busy_with = "one step"  # what it is silent over
        self._give_up_s = math.inf  # when a process that was told to stop is ended
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble = ""
        started = threading.Event()
        # Linux ends a child with the *thread* that started it (PR_SET_PDEATHSIG): this one
        # lives for as long as the child.
        self._keeper = threading.Thread(
            target=self._keep, args=(command, memory_bytes, theirs, started),
            name="midge-sandbox", daemon=True,
        )  # fmt: skip
        self._keeper.start()
        started.wait()
        if self._process is None:
            self._keeper.join()
            self._close()
            raise LocalError(f"the training process cannot be started: {self._trouble}")

    def _keep(
        self,
        command: Sequence[str],
        memory_bytes: int,
        theirs: socket.socket,
        started: threading.Event,
    ) -> None:
        number = theirs.fileno()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(number), str(os.getpid()), str(memory_bytes)],
                    stdin=subprocess.DEVNULL, pass_fds=[number], env=_environment(),
                    start_new_session=True,  # Ctrl-C is for the agent, which then ends this
                )  # fmt: skip
        except OSError as error:
            self._trouble = str(error)
            return
        finally:
            started.set()
        self._process.wait()
        self._ended.set()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process is not None  # noqa: S101 - it could be started
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was not yet seen to end."""
        return not self._ended.is_set()

    # ── talking ─────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """New work: forget interruptions of what was before."""
        self._give_up_s = math.inf
        with contextlib.suppress(OSError):
            self._wake_reader.recv(4096)

    def say(self, message: msgspec.Struct, *blobs: Any) -> None:
        """Send a message. Raises ProcessEndedError, StoppedError."""
        until_s = time.monotonic() + self._stall_s
        for part in talk.frame(message, *blobs):
            rest = memoryview(part)
            while rest:
                try:
                    rest = rest[self._line.send(rest) :]
                except BlockingIOError:
                    self._wait(select.POLLOUT, until_s)
                except OSError:
                    raise self._gone() from None

    def hear(
        self, decoder: "msgspec.msgpack.Decoder[Any]", *, blob_bytes_max: int = 0
    ) -> tuple[Any, memoryview]:
        """Return what it says next.

        Raises ProcessEndedError (also when it was silent for too long, or talked nonsense)
        and StoppedError.
        """
        until_s = time.monotonic() + self._stall_s
        try:
            return talk.read_frame(
                lambda length: self._read(length, until_s), decoder,
                head_bytes_max=_HEAD_BYTES_MAX, blob_bytes_max=blob_bytes_max,
            )  # fmt: skip
        except PeerError as error:
            raise self.nonsense(str(error)) from None

    def stop(self) -> None:
        """Tell it to end the present work at its next step, or be ended a while later."""
        if self._give_up_s == math.inf:
            self._give_up_s = time.monotonic() + self._stop_grace_s
            self.say(talk.Stop())

    def interrupt(self) -> None:
        """Do the same from another thread, without waiting."""
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"!")

    def _read(self, length: int, until_s: float) -> bytearray:
        found = bytearray(length)
        rest = memoryview(found)
        while rest:
            try:
                got = self._line.recv_into(rest)
            except BlockingIOError:
                self._wait(select.POLLIN, until_s)
                continue
            except OSError:
                raise self._gone() from None
            if not got:
                raise self._gone()
            rest = rest[got:]
        return found

    def _wait(self, what: int, until_s: float) -> None:
        """Return when the line is ready, an interruption was passed on, or a second is over."""
        waiting = select.poll()
        waiting.register(self._line, what)
        waiting.register(self._wake_reader, select.POLLIN)
        now_s = time.monotonic()
        if now_s >= self._give_up_s:
            self.end()
            raise StoppedError
        if now_s >= until_s:
            self.end()
            raise ProcessEndedError(
                f"the training process gave no sign of life for {self._stall_s:g} s and was ended; "
                f"if {self.busy_with} takes that long here, set stall_s higher in device.toml"
            )
        left_s = min(until_s, self._give_up_s) - now_s
        if self.while_waiting is not None:
            left_s = min(left_s, _LOOK_EVERY_S)
            if self.while_waiting():
                self.end()
                raise StoppedError
        ready = dict(waiting.poll(1000 * left_s + 1))
        if self._wake_reader.fileno() in ready:
            self._wake_reader.recv(4096)
            if what == select.POLLOUT:  # in the middle of a frame: there is no other way
                self.end()
                raise StoppedError
            self.stop()

    # ── the end ─────────────────────────────────────────────────────────────────────────

    def end(self) -> None:
        """Kill it, if it is there, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
        self._keeper.join()
        self._close()

    def nonsense(self, what: str) -> ProcessEndedError:
        """End it for an answer that no training process of ours gives."""
        self.end()
        return ProcessEndedError(
            f"the training process answered nonsense ({what}) and was ended; do not trust this task"
        )

    def _gone(self) -> ProcessEndedError:
        """Why the line is closed. A process that closes it and lives on is ended."""
        self._ended.wait(_CLOSED_GRACE_S)
        self.end()
        code = 0 if self._process is None else self._process.returncode
        if code >= 0:
            return ProcessEndedError(
                f"the training process ended by itself (exit code {code}); "
                "what it said is above in the log",
                clean=code == 0,
            )
        name = _signal_name(-code)
        ending = _DEATHS.get(
            -code,
            f"crashed ({name}): the model, the runtime or the data source does not work on "
            "this machine; tell whoever built the task",
        )
        return ProcessEndedError(f"the training process {ending}")

    def _close(self) -> None:
        for each in (self._line, self._wake_reader, self._wake_writer):
            each.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """What the owner's data source may need; our own secrets and systemd's are not in it.

    It finds the modules that this process would find. One thread for numpy's linear algebra,
    which training does not use: each thread would cost memory and start before the door locks.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
    folders = [folder or os.getcwd() for folder in sys.path]
    return {"OPENBLAS_NUM_THREADS": "1"} | kept | {"PYTHONPATH": os.pathsep.join(folders)}
