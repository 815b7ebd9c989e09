"""A whole fleet for one measurement: broker, server and devices as real processes.

The same commands that an operator types, in a temporary folder, on 127.0.0.1, with
mutual TLS and the ACL as shipped. Everything is stopped and removed at the end.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import free_port
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Command, RoundSummary
from broker_bridge.wire.topics import Topics
from server.fleet.home import Home

__all__ = ["DENSE100K", "Fleet", "Round", "one_sample", "stop", "until"]

DENSE100K = Path(__file__).parent / "tasks" / "dense100k.task"
_WAIT_S = 60.0


@dataclass(frozen=True)
class Round:
    """One closed round: what the server said of it, and when we heard so (monotonic)."""

    summary: RoundSummary
    heard_s: float


class Fleet:
    """Use as a context manager; then `add` devices and let them run `rounds`."""

    def __init__(self, *tasks: Path, settings: str = "") -> None:
        """`settings` is TOML that is appended to the server's midge.toml."""
        self._temporary = tempfile.TemporaryDirectory(prefix="midge-bench-")
        self.folder = Path(self._temporary.name)
        self.port = free_port()
        self._tasks = tasks
        self._settings = settings
        self._running: list[subprocess.Popen[bytes]] = []
        self.server: subprocess.Popen[bytes]
        self.broker: subprocess.Popen[bytes]

    def __enter__(self) -> "Fleet":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.command("midge", "init", self.home.folder, "--port", str(self.port))
        with (self.home.folder / "midge.toml").open("a") as file:
            file.write(self._settings)
        self.broker = self.start("broker", "midge", "broker", "--dir", self.home.folder)
        until(lambda: self._says(self.broker, "broker", "listens on"), "the broker to listen")
        tasks = [word for task in self._tasks for word in ("--task", str(task))]
        self.server = self.start("server", "midge", "server", "--dir", self.home.folder, *tasks)
        with self._operator() as link:
            link.subscribe([self.topics.srv])
            until(lambda: _said(link, b"online"), "the server to be online")

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            stop(process)
        self._temporary.cleanup()

    @property
    def home(self) -> Home:
        """The fleet's folder, as the server sees it."""
        return Home(self.folder / "fleet")

    @property
    def topics(self) -> Topics:
        """The topics of this federation."""
        return Topics("demo")

    # ── processes ───────────────────────────────────────────────────────────────────────

    def command(self, *words: object) -> str:
        """Run one of our commands to its end, and return what it printed."""
        done = subprocess.run(_argv(words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
        return done.stdout

    def start(self, name: str, *words: object) -> subprocess.Popen[bytes]:
        """Start one of our commands; what it says goes to NAME.log in the folder."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(_argv(words), stdout=log, stderr=log)
        self._running.append(process)
        return process

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def add(self, name: str) -> Path:
        """Make the bundle of a new device; return it."""
        self.command("midge", "device", "add", name, "--dir", self.home.folder)
        return self.home.bundle(name)

    def enrol(self, name: str) -> None:
        """Add a device and enrol it, without running it."""
        folder = self.folder / name
        self.command("midge-device", "enrol", self.add(name), "--dir", folder)

    def run_device(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Run a device, after adding and enrolling it if need be; return once it is ready."""
        folder = self.folder / name
        bundle = [] if folder.exists() else ["--bundle", self.add(name)]
        process = self.start(name, "midge-device", "run", "--dir", folder, *bundle, *options)
        with self._operator() as link:
            link.subscribe([self.topics.state(name)])
            until(
                lambda: self._says(process, name, "") and _said(link, b'"ready"'),
                f"{name} to be ready",
            )
        return process

    # ── rounds ──────────────────────────────────────────────────────────────────────────

    def rounds(self, count: int, *, task: str, wait_s: float = 300.0) -> list[Round]:
        """Start `count` rounds, and return each as it was closed."""
        closed: list[Round] = []
        command = Command(cmd="start", task=task, rounds=count, id=f"bench-{time.monotonic_ns()}")
        with self._operator() as link:
            link.subscribe([self.topics.metrics, self.topics.ctl_reply])
            _drain(link)  # the retained summary of an earlier run
            link.publish(self.topics.ctl, messages.encode_json(command))
            give_up = time.monotonic() + wait_s
            while len(closed) < count:
                event = link.receive(timeout_s=1.0)
                heard_s = time.monotonic()
                if isinstance(event, Message):
                    link.ack(event)
                    if event.topic == self.topics.metrics and not event.retained:
                        summary = messages.decode_json(event.payload, RoundSummary)
                        if summary.state != "closed":
                            raise RuntimeError(f"round {summary.round}: {summary.reason}")
                        closed.append(Round(summary, heard_s))
                if heard_s > give_up:
                    raise RuntimeError(f"no {count} rounds in {wait_s:g} s:\n{self.log('server')}")
        return closed

    @contextlib.contextmanager
    def _operator(self) -> Iterator[PahoLink]:
        link = PahoLink.open(
            "127.0.0.1", self.port, client_id=f"midge-operator-{time.monotonic_ns() % 10**8:x}",
            tls=self.home.tls("operator"), session_s=0,
        )  # fmt: skip
        try:
            yield link
        finally:
            link.close()

    def _says(self, process: subprocess.Popen[bytes], name: str, words: str) -> bool:
        """Whether a process has said `words`. Raises RuntimeError when it has ended."""
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended:\n{self.log(name)}")
        return words in self.log(name)


def one_sample(folder: Path) -> str:
    """Write the smallest data set for dense100k, and return it as `--data` wants it."""
    path = folder / "one-sample.npz"
    np.savez(path, x=np.ones((1, 999), np.float32), y=np.zeros(1, np.int32))
    return f"npz:{path}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process of ours to end, and wait for it."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _argv(words: Sequence[object]) -> list[str]:
    program, *rest = map(str, words)
    return [str(Path(sys.executable).with_name(program)), *rest]


def until(done: Callable[[], bool], what: str) -> None:
    """Wait for `done`. Raises RuntimeError when it takes a minute."""
    give_up = time.monotonic() + _WAIT_S
    while not done():
        if time.monotonic() > give_up:
            raise RuntimeError(f"waited {_WAIT_S:g} s for {what}")
        time.sleep(0.02)


def _said(link: PahoLink, words: bytes) -> bool:
    event = link.receive(timeout_s=0.2)
    if not isinstance(event, Message):
        return False
    link.ack(event)
    return words in event.payload


def _drain(link: PahoLink) -> None:
    while (event := link.receive(timeout_s=0.2)) is not None:
        if isinstance(event, Message):
            link.ack(event)
