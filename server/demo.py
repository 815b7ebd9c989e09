"""`midge demo`: a whole federation on one machine, from keys to the closing table.

Everything is real: a private CA, mutual TLS and ACL, the broker, one server process and
ten device processes, one for each person in examples/wearables. Eight train; two hold
their data out and only measure. Nothing here does what a fleet could not do: it runs
the same commands, and watches the broker's traffic as the broker itself could.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import Engine, LocalBroker, free_port, shipped_file
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Command, Presence, RoundSummary, Until
from broker_bridge.wire.topics import SERVER, DeviceState, DownTopic, Topics, UpTopic
from server import screen
from server.fleet.enrolment import add_device
from server.fleet.home import Home, create
from server.store.database import Database

__all__ = ["run_demo"]

TRAINING = (1, 2, 3, 4, 5, 6, 7, 8)
HELD_OUT = (9, 10)
_WINDOW_BYTES = 32  # how much plaintext in a row would count as readable


@dataclass
class Traffic:
    """Everything the broker carries, as the broker sees it."""

    topics: Topics
    up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    retained_bytes: int = 0
    sealed: list[bytes] = field(default_factory=list)
    states: dict[str, Presence] = field(default_factory=dict)
    summaries: list[RoundSummary] = field(default_factory=list)
    server_online: bool = False
    joined: set[str] = field(default_factory=set)
    sealed_by: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def take(self, message: Message) -> None:
        """Look at one message."""
        size = len(message.payload) + len(message.topic)
        try:
            place = self.topics.parse(message.topic)
        except PeerError:
            return
        match place:
            case UpTopic(device=device, kind=kind):
                self.up[device] += size
                self.sealed.append(message.payload)
                if kind == "join":
                    self.joined.add(device)
                if kind == "init":
                    self.sealed_by.add(device)
            case DownTopic(device=device, kind=kind):
                self.down[device] += size
                if kind == "ack":
                    self.done.add(device)
            case "task" | "model":
                self.retained_bytes += size
                self.sealed.append(message.payload)
            case DeviceState(device) if message.payload:
                self.states[device] = messages.decode_json(message.payload, Presence)
            case "metrics" if not message.retained:
                self.summaries.append(messages.decode_json(message.payload, RoundSummary))
                self.joined, self.sealed_by, self.done = set(), set(), set()
            case "srv":
                self.server_online = b'"online"' in message.payload

    def count(self, *states: str) -> int:
        """How many devices are in one of these states."""
        return sum(p.state in states for p in self.states.values())

    @property
    def bytes_total(self) -> int:
        """Payloads and topics published."""
        return sum(self.up.values()) + sum(self.down.values()) + self.retained_bytes


@dataclass
class Stage:
    """The running parts of the demo, and how long each phase took."""

    folder: Path
    home: Home
    port: int
    processes: ExitStack
    say: Callable[[str], None]
    phases: dict[str, float] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the demo."""
        started = time.monotonic()
        yield
        self.phases[name] = round(time.monotonic() - started, 2)

    def start(self, module: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of our own commands as a process of its own, ended with the demo."""
        log = self.processes.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=_examples().parents[1],
        )  # fmt: skip
        self.running.append(process)
        return process

    def end(self) -> None:
        """Ask every process to end, then wait for all of them."""
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        for process in self.running:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_demo(
    *,
    rounds: int,
    accuracy: float,
    keep: Path | None,
    engine: Engine | None,
    plain: bool,
    as_json: bool,
) -> None:
    """Run the demo and print its table. Raises LocalError when a part will not start."""
    task_path = _examples() / "wearables.task"
    with ExitStack() as stack:
        where = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="midge-demo-")))
        view = screen.progress(plain=plain or as_json, quiet=as_json)
        stage = _set_up(where, stack, view.line)
        traffic = Traffic(Topics("demo"))
        eye = _broker_and_server(stage, task_path, engine)
        stack.callback(eye.close)
        _people(stage, eye, traffic)
        with stage.phase("rounds"), view:
            reason = _rounds(stage, eye, traffic, view, rounds=rounds, accuracy=accuracy)
        view.line(reason)
        with stage.phase("baselines"):
            view.line("training each person alone, and all pooled in one place, to compare")
            alone, pooled = _baselines(task_path, epochs=_epochs(task_path, traffic))
        with stage.phase("looking for plaintext"):
            readable = _readable(stage.home, task_path, traffic.sealed)
        result = _result(stage, traffic, alone, pooled, readable)
    if as_json:
        print(json.dumps(result))
    else:
        _table(result)


# ── the stage ───────────────────────────────────────────────────────────────────────────


def _examples() -> Path:
    folder = shipped_file("mosquitto.conf").parent / "examples" / "wearables"
    if not (folder / "wearables.task").is_file():
        raise LocalError(
            f"the demo needs {folder}; run `make demo` in a checkout of midge's source"
        )
    return folder


def _set_up(where: Path, stack: ExitStack, say: Callable[[str], None]) -> Stage:
    started = time.monotonic()
    port = free_port()
    home = create(where / "fleet", federation="demo", hosts=["localhost", "127.0.0.1"], port=port)
    stage = Stage(where, home, port, stack, say)
    stage.phases["keys and certificates"] = round(time.monotonic() - started, 2)
    say(f"made a private CA, server keys and settings in {where / 'fleet'}")
    return stage


def _broker_and_server(stage: Stage, task_path: Path, engine: Engine | None) -> PahoLink:
    """Start both; return a link that sees what the broker sees."""
    with stage.phase("broker and server"):
        broker = LocalBroker(stage.home.broker, port=stage.port, engine=engine)
        stage.processes.enter_context(broker)
        how = "TLS" if broker.lacks else "mutual TLS and ACL"
        stage.say(f"{broker.engine} listens on 127.0.0.1:{stage.port} with {how}")
        if broker.lacks:
            stage.say(broker.lacks)
        eye = PahoLink.open(
            "localhost", stage.port, client_id=f"{SERVER}-eye", tls=stage.home.tls("server"),
            session_s=0,
        )  # fmt: skip
        eye.subscribe(["midge/v1/demo/#"])
        stage.processes.callback(stage.end)
        stage.start(
            "server.cli", "server", "server", "--dir", str(stage.home.folder),
            "--task", str(task_path),
        )  # fmt: skip
    return eye


def _people(stage: Stage, eye: PahoLink, traffic: Traffic) -> None:
    """Start a device process for each person; each makes its keys and enrols."""
    with stage.phase("ten devices enrol"):
        config = stage.home.config().broker
        db = Database(stage.home.database)
        for person in TRAINING + HELD_OUT:
            name = f"person-{person}"
            bundle = add_device(stage.home, db, name, broker=config, now=time.time())
            stage.start(
                "device_client.cli", name, "run", "--dir", str(stage.folder / name),
                "--bundle", str(bundle), "--data", f"{_examples()}/source.py:person?id={person}",
                "--role", "train" if person in TRAINING else "evaluate",
            )  # fmt: skip
        db.close()
        wanted = len(TRAINING) + len(HELD_OUT)
        _wait(stage, eye, traffic, lambda: traffic.count("ready") == wanted, "devices to enrol")
    stage.say(
        f"{wanted} devices made their own keys and enrolled: {len(TRAINING)} train, "
        f"{len(HELD_OUT)} hold their data out"
    )


def _wait(
    stage: Stage, eye: PahoLink, traffic: Traffic, ready: Callable[[], bool], what: str
) -> None:
    until = time.monotonic() + 60
    while not ready():
        if time.monotonic() > until:
            raise LinkError(f"waited a minute for {what}; see the logs in {stage.folder}")
        _look(eye, traffic, 0.2)


def _look(eye: PahoLink, traffic: Traffic, timeout_s: float) -> bool:
    event = eye.receive(timeout_s)
    if isinstance(event, Message):
        traffic.take(event)
        eye.ack(event)
    return event is not None


# ── the rounds ──────────────────────────────────────────────────────────────────────────


def _rounds(
    stage: Stage,
    eye: PahoLink,
    traffic: Traffic,
    view: screen.Progress,
    *,
    rounds: int,
    accuracy: float,
) -> str:
    """Start a run as any operator would, show it, and say why it ended."""
    command = Command(
        cmd="start", id="demo", task="wearables", rounds=rounds, until=Until(accuracy=accuracy)
    )
    _wait(stage, eye, traffic, lambda: traffic.server_online, "the server")
    data = messages.encode_json(command)
    view.line(f"mosquitto_pub -t {traffic.topics.ctl} -m '{data.decode()}'")
    eye.publish(traffic.topics.ctl, data)
    shown, quiet_since = 0, time.monotonic()
    while True:
        if _look(eye, traffic, 0.1):
            quiet_since = time.monotonic()
        if time.monotonic() - quiet_since > 120:
            raise LinkError(f"nothing happened for two minutes; see the logs in {stage.folder}")
        last = traffic.summaries[-1] if traffic.summaries else None
        view.show(
            round_number=(last.round + 1) if last else 1,
            rounds=rounds,
            joined=len(traffic.joined),
            training=len(traffic.joined - traffic.sealed_by),
            uploaded=len(traffic.done),
            accuracy=(last.evaluation.get("accuracy") if last else None),
            sent_bytes=traffic.bytes_total,
        )
        if last is None or len(traffic.summaries) == shown:
            continue
        shown = len(traffic.summaries)
        view.line(screen.summary_line(last))
        if last.evaluation.get("accuracy", 0.0) >= accuracy:
            return f"the model reached accuracy {accuracy:g} on people it has never seen"
        if last.state == "abandoned" or last.round >= rounds:
            return f"{last.round} rounds are done; accuracy {accuracy:g} was not reached"


# ── to compare ──────────────────────────────────────────────────────────────────────────


def _epochs(task_path: Path, traffic: Traffic) -> int:
    """As many epochs as the federation trained, so that all have seen their data as often."""
    plan, _ = decode_task(task_path.read_bytes())
    return plan.task.defaults.epochs * len(traffic.summaries)


def _baselines(task_path: Path, *, epochs: int) -> tuple[list[float], float]:
    """The accuracy on held-out people of each person alone, and of all pooled in one place."""
    jobs = [f"person?id={person}" for person in TRAINING]
    jobs.append(f"people?ids={','.join(str(p) for p in TRAINING)}")
    source = f"{_examples()}/source.py"
    test = f"{source}:people?ids={','.join(str(p) for p in HELD_OUT)}"
    found: list[float] = []
    at_once = max(1, os.cpu_count() or 1)
    # The longest first, and as many at a time as there are processors.
    waiting = [jobs[-1], *jobs[:-1]]
    running: list[tuple[str, subprocess.Popen[str]]] = []
    accuracies: dict[str, float] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            running.append((job, _try(task_path, f"{source}:{job}", test, epochs)))
        job, process = running.pop(0)
        out, err = process.communicate()
        if process.returncode:
            raise LocalError(f"a comparison failed: {err.strip()}")
        accuracies[job] = float(json.loads(out)["test"]["accuracy"])
    found = [accuracies[job] for job in jobs[:-1]]
    return found, accuracies[jobs[-1]]


def _try(task_path: Path, data: str, test: str, epochs: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "device_client.cli", "try", str(task_path), "--data", data,
        "--test", test, "--epochs", str(epochs), "--json",
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=_examples().parents[1],
    )  # fmt: skip


def _readable(home: Home, task_path: Path, sealed: list[bytes]) -> int:
    """How many samples of the task, the models and so the updates the broker could have read.

    Looks for windows of the plaintext in everything that went through the broker.
    """
    haystack = b"".join(sealed)
    plan, _ = decode_task(task_path.read_bytes())
    plaintexts = [plan.tflite]
    plaintexts += [p.read_bytes() for p in sorted((home.state / "models").glob("*.weights"))]
    found = 0
    for plain in plaintexts:
        step = max(_WINDOW_BYTES, len(plain) // 8)
        for start in range(0, len(plain) - _WINDOW_BYTES, step):
            window = plain[start : start + _WINDOW_BYTES]
            found += any(window) and window in haystack
    return found


# ── the closing table ───────────────────────────────────────────────────────────────────


def _result(
    stage: Stage, traffic: Traffic, alone: list[float], pooled: float, readable: int
) -> dict[str, Any]:
    closed = [s for s in traffic.summaries if s.state == "closed"]
    if not closed:
        raise LocalError(f"no round was completed; see the logs in {stage.folder}")
    people = [f"person-{p}" for p in TRAINING]
    rounds = len(closed)
    return {
        "rounds": rounds,
        "accuracy": {
            "federated": closed[-1].evaluation.get("accuracy", 0.0),
            "alone_mean": sum(alone) / len(alone),
            "alone_best": max(alone),
            "pooled": pooled,
        },
        "bytes_per_device_and_round": {
            "up": sum(traffic.up[p] for p in people) // len(people) // rounds,
            "down": sum(traffic.down[p] for p in people) // len(people) // rounds
            + traffic.retained_bytes // rounds,
            "update_float32": closed[-1].update_bytes,
        },
        "seconds_per_round": {
            "total": sum(s.round_s for s in closed) / rounds,
            "training": sum(s.train_s_max for s in closed) / rounds,
        },
        "broker": {
            "sealed_bytes_seen": sum(len(p) for p in traffic.sealed),
            "plaintext_windows_found": readable,
        },
        "phases_s": stage.phases,
        "held_out_samples": closed[-1].evaluation_examples,
    }


def _table(result: dict[str, Any]) -> None:
    accuracy, size = result["accuracy"], result["bytes_per_device_and_round"]
    seconds, broker = result["seconds_per_round"], result["broker"]
    found = broker["plaintext_windows_found"]
    seen = screen.human_bytes(broker["sealed_bytes_seen"])
    rows = [
        ["accuracy, federated", f"{accuracy['federated']:.3f}",
         f"8 people, {result['rounds']} rounds, on {result['held_out_samples']} samples of 2 more"],
        ["accuracy, alone", f"{accuracy['alone_mean']:.3f}",
         f"mean of 8 people, each for itself (best {accuracy['alone_best']:.3f})"],
        ["accuracy, pooled", f"{accuracy['pooled']:.3f}", "all 8 people's data in one place"],
        ["up, per device and round", screen.human_bytes(size["up"]),
         f"raw float32 update: {screen.human_bytes(size['update_float32'])}"],
        ["down, per device and round", screen.human_bytes(size["down"]),
         "the model once, and the task once in all"],
        ["time per round", f"{seconds['total']:.2f} s",
         f"of it training {seconds['training']:.2f} s (the slowest device)"],
        ["what the broker could read", "nothing" if not found else f"{found} PIECES",
         f"no piece of task, model or update in {seen} sealed bytes it carried"],
    ]  # fmt: skip
    screen.table(["", "", ""], rows, title="closing table")
