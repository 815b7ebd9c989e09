"""The parts that run: a fleet's folder, the broker, the server, and a process for each person."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from broker_bridge.errors import LinkError, LocalError
from broker_bridge.link.local_broker import Engine, LocalBroker, free_port, shipped_file
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire.topics import SERVER
from server.demo.traffic import Traffic
from server.fleet.enrolment import add_device
from server.fleet.home import Home, create
from server.store.database import Database

__all__ = ["HELD_OUT", "TRAINING", "Stage", "examples", "set_up", "start_broker_and_server",
           "start_people", "wait"]  # fmt: skip

TRAINING = (1, 2, 3, 4, 5, 6, 7, 8)
HELD_OUT = (9, 10)


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
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=examples().parents[1],
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


def examples() -> Path:
    """The folder of the wearables example. Raises LocalError where it was not shipped."""
    folder = shipped_file("mosquitto.conf").parent / "examples" / "wearables"
    if not (folder / "wearables.task").is_file():
        raise LocalError(
            f"the demo needs {folder}; run `make demo` in a checkout of midge's source"
        )
    return folder


def set_up(where: Path, stack: ExitStack, say: Callable[[str], None]) -> Stage:
    """Make a fleet in a new folder."""
    started = time.monotonic()
    port = free_port()
    home = create(where / "fleet", federation="demo", hosts=["localhost", "127.0.0.1"], port=port)
    stage = Stage(where, home, port, stack, say)
    stage.phases["keys and certificates"] = round(time.monotonic() - started, 2)
    say(f"made a private CA, server keys and settings in {where / 'fleet'}")
    return stage


def start_broker_and_server(stage: Stage, task_path: Path, engine: Engine | None) -> PahoLink:
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


def start_people(stage: Stage, eye: PahoLink, traffic: Traffic) -> None:
    """Start a device process for each person; each makes its keys and enrols."""
    with stage.phase("ten devices enrol"):
        config = stage.home.config().broker
        db = Database(stage.home.database)
        for person in TRAINING + HELD_OUT:
            name = f"person-{person}"
            bundle = add_device(stage.home, db, name, broker=config, now=time.time())
            stage.start(
                "device_client.cli", name, "run", "--dir", str(stage.folder / name),
                "--bundle", str(bundle), "--data", f"{examples()}/source.py:person?id={person}",
                "--role", "train" if person in TRAINING else "evaluate",
            )  # fmt: skip
        db.close()
        wanted = len(TRAINING) + len(HELD_OUT)
        wait(stage, eye, traffic, lambda: traffic.count("ready") == wanted, "devices to enrol")
    stage.say(
        f"{wanted} devices made their own keys and enrolled: {len(TRAINING)} train, "
        f"{len(HELD_OUT)} hold their data out"
    )


def wait(
    stage: Stage, eye: PahoLink, traffic: Traffic, ready: Callable[[], bool], what: str
) -> None:
    """Watch until it is `ready`. Raises LinkError after a minute."""
    until = time.monotonic() + 60
    while not ready():
        if time.monotonic() > until:
            raise LinkError(f"waited a minute for {what}; see the logs in {stage.folder}")
        traffic.look(eye, 0.2)
