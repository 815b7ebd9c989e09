"""`midge simulate`: a fleet of thousands on one machine, over a real broker.

Enrols made-up devices in bulk, starts a few processes of `device_client.simulation` with
them, and runs rounds as any operator would. Broker and server are those of the fleet if
they run, else they are started for the time being. What is measured is what the machine
says of the processes, and what the server says of its rounds.

The bulk enrolment is for simulation only: it makes the secrets that a real device makes
itself, keeps them in the fleet's folder `simulated/`, and marks the devices as simulated.
"""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import LocalBroker, free_port, shipped_file
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.poller import raise_file_limit
from broker_bridge.wire import messages
from broker_bridge.wire.enrolment import server_identity
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, SignKey, random_bytes
from broker_bridge.wire.messages import Command, Reply, RoundSummary
from broker_bridge.wire.topics import OPERATOR, Topics
from server import screen
from server.config import ServerConfig
from server.fleet.home import Home, create
from server.store.database import Database
from server.store.rows import Device

__all__ = ["Members", "Simulation", "enrol_members", "simulate"]

_MEMBERS_FILE = "members.msgpack"
_SOFTWARE = "simulated"
_PATIENCE_S = 120.0  # without any progress


# ── Enrolment in bulk ───────────────────────────────────────────────────────────────────


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """The secrets of one simulated device. `repr` shows none."""

    device: str
    sign_seed: bytes
    kem_seed: bytes
    tls_seed: bytes
    psk: bytes
    certificate_pem: str

    def __repr__(self) -> str:
        return f"Member({self.device})"


class Members(msgspec.Struct, frozen=True, kw_only=True):
    """What `device_client.simulation` reads."""

    federation: str
    broker_host: str
    broker_port: int
    root_public: bytes
    server_sign: bytes
    server_kem: bytes
    fleet_epoch: int
    fleet_key: bytes
    ca_pem: str
    members: list[Member]


def enrol_members(home: Home, count: int) -> Path:
    """Make `count` enrolled devices, those made before among them; return the file that says who.

    For simulation only: a real device makes its keys itself and enrols over the broker.
    """
    path = home.folder / "simulated" / _MEMBERS_FILE
    with disk_errors(path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    members = (
        msgspec.msgpack.decode(path.read_bytes(), type=Members).members if path.exists() else []
    )
    members = members[:count]
    now = time.time()
    authority, moment = home.authority(), datetime.fromtimestamp(now, UTC)
    with contextlib.closing(Database(home.database)) as db, db.transaction() as tx:
        for number in range(len(members), count):
            name = f"sim-{number:05d}"
            keys = [random_bytes(KEY_BYTES) for _ in range(4)]
            tls_public = SignKey.from_seed(keys[2]).public
            tx.add_device(
                Device(
                    name=name, sign_public=SignKey.from_seed(keys[0]).public,
                    kem_public=KemKey.from_seed(keys[1]).public, tls_public=tls_public,
                    psk=keys[3], software=_SOFTWARE, enrolled_at=now,
                )
            )  # fmt: skip
            certificate = authority.issue_for_public_key(tls_public, name, now=moment)
            members.append(
                Member(
                    device=name, sign_seed=keys[0], kem_seed=keys[1], tls_seed=keys[2],
                    psk=keys[3], certificate_pem=certificate.decode(),
                )
            )  # fmt: skip
    keys_ = home.keys()
    server = server_identity(keys_.root_public, keys_.federation, keys_.identity)
    broker = home.config().broker
    found = Members(
        federation=keys_.federation, broker_host=broker.host, broker_port=broker.port,
        root_public=keys_.root_public, server_sign=server.sign_public,
        server_kem=server.kem_public, fleet_epoch=keys_.fleet_epoch, fleet_key=keys_.fleet_key,
        ca_pem=authority.certificate.decode(), members=members,
    )  # fmt: skip
    write_atomic(path, msgspec.msgpack.encode(found))
    return path


# ── Processes ───────────────────────────────────────────────────────────────────────────


@dataclass
class Usage:
    """What a process has cost so far."""

    cpu_s: float = 0.0
    rss_bytes: int = 0
    rss_peak_bytes: int = 0

    @classmethod
    def of(cls, pid: int) -> "Usage":
        """By the kernel's account; zeros where it keeps none."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return cls()
        ticks = int(fields[11]) + int(fields[12])
        sizes = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line
        }
        return cls(
            ticks / os.sysconf("SC_CLK_TCK"),
            int(sizes.get("VmRSS", 0)) * 1024,
            int(sizes.get("VmHWM", 0)) * 1024,
        )


@dataclass
class Swarms:
    """The processes that hold the devices, and what each said last."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    said: dict[int, dict[str, Any]] = field(default_factory=dict)

    def start(self, command: list[str], log: Path) -> None:
        """Start one more."""
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=_root(),
            )  # fmt: skip
        self.processes.append(process)
        threading.Thread(target=self._listen, args=[process], daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                self.said[process.pid] = json.loads(line)

    def sum(self, what: str) -> float:
        """A number over all of them."""
        return sum(float(each.get(what, 0)) for each in list(self.said.values()))

    def counts(self, what: str) -> dict[str, int]:
        """Counts by name over all of them."""
        found: Counter[str] = Counter()
        for each in list(self.said.values()):
            found.update(each.get(what, {}))
        return dict(found)

    def hear_again(self) -> None:
        """Wait until each has spoken, once: what they said before is from before."""
        self.said.clear()
        give_up = time.monotonic() + 30.0
        while len(self.said) < len(self.processes) and time.monotonic() < give_up:
            self.check()
            time.sleep(0.05)

    def check(self) -> None:
        """Raise LocalError when one has ended by itself."""
        for process in self.processes:
            if process.poll() is not None:
                raise LocalError(f"a process with simulated devices ended: {process.args!r}")

    def stop(self) -> None:
        """End them all."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _root() -> Path:
    """Where `python -m` finds our packages."""
    return Path(__file__).resolve().parents[1]


# ── The simulation ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    devices: int
    processes: int
    rounds: int
    cohort: int
    deadline_s: float
    task: Path
    fate: dict[str, float]
    train: str
    plain: bool
    storm: bool


class Simulation:
    """One fleet under load. Use as a context manager."""

    def __init__(self, home: Home, options: Options, *, say: Callable[[str], None]) -> None:
        self.home = home
        self.options = options
        self.config: ServerConfig = home.config()
        self.topics = Topics(self.config.federation)
        self.swarms = Swarms()
        self.broker: LocalBroker | None = None
        self.server: subprocess.Popen[bytes] | None = None
        self._say = say
        self._stack = ExitStack()
        self._logs = home.folder / "simulated"

    def __enter__(self) -> "Simulation":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        count = self.options.devices
        started = time.monotonic()
        members = enrol_members(self.home, count)
        self._say(f"{count} devices enrolled in bulk in {time.monotonic() - started:.1f} s")
        port = self.config.broker.port
        if not _listens(self.config.broker.host, port):
            raise_file_limit(count)  # the broker inherits it
            self.broker = LocalBroker(
                self.home.broker, port=port, engine="mosquitto", conf_more=self._more()
            )
            self._stack.callback(self._stop_broker)
            self.broker.start()
        if not _is_locked(self.home):
            self._start_server()
        self._eye = PahoLink.open(
            self.config.broker.host, port, client_id=f"{OPERATOR}-{random_bytes(4).hex()}",
            tls=self.home.tls("operator"), session_s=0,
        )  # fmt: skip
        self._stack.callback(self._eye.close)
        self._eye.subscribe([self.topics.metrics, self.topics.ctl_reply])
        self.status()
        self._stack.callback(self.swarms.stop)
        for number in range(self.options.processes):
            self.swarms.start(self._command(members, number), self._logs / f"devices-{number}.log")

    @property
    def _plain_port(self) -> int:
        return self.config.broker.port + 1 if self.options.plain else 0

    def _more(self) -> str:
        """A listener that lets anyone on this machine in, under any name: for scale only."""
        if not self._plain_port:
            return ""
        return f"listener {self._plain_port} 127.0.0.1\nallow_anonymous true\n"

    def _stop_broker(self) -> None:
        if self.broker is not None:
            self.broker.stop()

    def _start_server(self) -> None:
        log = self._stack.enter_context((self._logs / "server.log").open("ab"))
        self.server = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "server", "--dir",
             str(self.home.folder.absolute()), "--task", str(self.options.task.absolute())],
            stdout=log, stderr=log, cwd=_root(),
        )  # fmt: skip
        self._stack.callback(_end, self.server)

    def _command(self, members: Path, number: int) -> list[str]:
        options = self.options
        command = [
            sys.executable, "-m", "device_client.simulation", str(members.absolute()),
            "--from", str(number), "--step", str(options.processes),
            "--fate", json.dumps(options.fate), "--train", options.train,
        ]  # fmt: skip
        return [*command, "--plain-port", str(self._plain_port)] if options.plain else command

    # ── looking ─────────────────────────────────────────────────────────────────────────

    def ask(self, **fields: Any) -> Reply:
        """Send a command; return the server's reply. Raises LinkError, LocalError."""
        command = Command(id=random_bytes(8).hex(), **fields)
        give_up, asked = time.monotonic() + 60.0, 0.0
        while time.monotonic() < give_up:
            if time.monotonic() - asked > 5.0:
                asked = time.monotonic()
                self._eye.publish(self.topics.ctl, messages.encode_json(command))
            message = self._look(0.2)
            if message is None or message.topic != self.topics.ctl_reply:
                continue
            with contextlib.suppress(PeerError):
                reply = messages.decode_json(message.payload, Reply)
                if reply.id == command.id:
                    if not reply.ok:
                        raise LocalError(reply.error or "the server refused")
                    return reply
        raise LinkError("the server does not answer; see simulated/server.log in the fleet")

    def status(self) -> dict[str, Any]:
        """What the server says of itself."""
        return dict(self.ask(cmd="status").status or {})

    def _look(self, timeout_s: float) -> Message | None:
        event = self._eye.receive(timeout_s)
        if not isinstance(event, Message):
            return None
        self._eye.ack(event)
        return event

    def _online(self) -> int:
        return int(self.status()["devices"]["online"])

    def wait_until_connected(self) -> float:
        """Wait until every device is, by its own account and the server's; return the seconds."""
        started = best_at = time.monotonic()
        best = -1
        while True:
            self.swarms.check()
            connected = int(self.swarms.sum("connected"))
            online = self._online() if connected >= self.options.devices else 0
            if online >= self.options.devices:
                return time.monotonic() - started
            if connected + online > best:
                best, best_at = connected + online, time.monotonic()
            if time.monotonic() - best_at > _PATIENCE_S:
                raise LinkError(f"only {connected} of {self.options.devices} devices connected")
            time.sleep(0.2)

    # ── doing ───────────────────────────────────────────────────────────────────────────

    def rounds(self) -> Iterator[RoundSummary]:
        """Run the rounds that were asked for; yield each as it ends."""
        options = self.options
        self.ask(
            cmd="start", task=options.task.stem, rounds=options.rounds, target=options.cohort,
            deadline_s=options.deadline_s,
        )  # fmt: skip
        ended, give_up = 0, time.monotonic() + options.deadline_s + 60
        while ended < options.rounds:
            self.swarms.check()
            if time.monotonic() > give_up:
                raise LinkError("no round ended in time; see simulated/server.log in the fleet")
            message = self._look(0.5)
            if message is None or message.topic != self.topics.metrics or message.retained:
                continue
            summary = messages.decode_json(message.payload, RoundSummary)
            ended += 1
            give_up = time.monotonic() + options.deadline_s + 60
            yield summary

    def storm(self) -> float:
        """Kill the broker and start it again; return the seconds until every device is back."""
        if self.broker is None:
            raise LocalError("the broker is not ours to kill; run without --storm")
        self.broker.kill()
        started = time.monotonic()
        self.broker.start()
        # What the processes said before they noticed is not an answer.
        while self.swarms.sum("connected") >= self.options.devices:
            time.sleep(0.1)
            if time.monotonic() - started > 30:
                break
        while self.swarms.sum("connected") < self.options.devices:
            self.swarms.check()
            if time.monotonic() - started > 10 * _PATIENCE_S:
                raise LinkError("the devices did not come back")
            time.sleep(0.1)
        return time.monotonic() - started

    def usage(self) -> dict[str, dict[str, Any]]:
        """What each part has cost so far, where it is ours."""
        found: dict[str, dict[str, Any]] = {}
        if self.server is not None:
            found["server"] = asdict(Usage.of(self.server.pid))
        if self.broker is not None and self.broker.pid is not None:
            found["broker"] = asdict(Usage.of(self.broker.pid))
        found["devices"] = {
            "cpu_s": self.swarms.sum("cpu_s"), "rss_bytes": int(self.swarms.sum("rss_bytes"))
        }  # fmt: skip
        return found


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _is_locked(home: Home) -> bool:
    """Whether a server runs for this fleet."""
    path = home.state / "server.lock"
    with disk_errors(path), path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ── The command ─────────────────────────────────────────────────────────────────────────


@click.command()
@click.option("--devices", type=click.IntRange(1, 50_000), default=100, show_default=True)
@click.option("--drop", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="The share that loses power in each round it takes part in.")  # fmt: skip
@click.option("--slow", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="The share that trains for --slow-s seconds.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Who drops out, and who is slow.")
@click.option("--dir", "folder", type=click.Path(path_type=Path, file_okay=False),
              help="A fleet that gets them; default: a new one, gone at the end.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--cohort", type=click.IntRange(min=1),
              help="Updates that make a round; default: a tenth, at least ten.")  # fmt: skip
@click.option("--deadline", "deadline_s", default=300.0, show_default=True,
              help="Seconds for one round.")  # fmt: skip
@click.option("--task", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="A task file; default: the wearables example.")  # fmt: skip
@click.option("--train", default="fast", show_default=True,
              help="fast: noise; or a data source, as for `midge-device run`.")  # fmt: skip
@click.option("--train-s", default=0.5, show_default=True, help="Seconds that fast training takes.")
@click.option("--slow-s", default=20.0, show_default=True, help="The same for slow devices.")
@click.option("--away-s", default=10.0, show_default=True, help="Seconds without power.")
@click.option(
    "--processes", type=click.IntRange(1, 64), help="Default: one for each core, 4 at most."
)
@click.option(
    "--plain", is_flag=True, help="Devices without TLS, over a port on this machine only."
)
@click.option("--storm", is_flag=True, help="At the end kill the broker, and time the return.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def simulate(
    devices: int, drop: float, slow: float, seed: int, folder: Path | None, rounds: int,
    cohort: int | None, deadline_s: float, task: Path | None, train: str, train_s: float,
    slow_s: float, away_s: float, processes: int | None, plain: bool, storm: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run thousands of simulated devices on this machine, with real connections.

    \b
    Example:
      midge simulate --devices 1000 --drop 0.1 --slow 0.05 --seed 7 --rounds 3
    """
    options = Options(
        devices=devices, processes=processes or min(4, os.cpu_count() or 1, devices),
        rounds=rounds, cohort=cohort or min(devices, max(10, devices // 10)),
        deadline_s=deadline_s, task=task or _wearables(), train=train, plain=plain, storm=storm,
        fate={"seed": seed, "drop": drop, "slow": slow, "train_s": train_s, "slow_s": slow_s,
              "away_s": away_s},
    )  # fmt: skip
    say: Callable[[str], None] = (lambda _: None) if as_json else click.echo
    with ExitStack() as stack:
        home = _fleet(folder, stack)
        found = run_simulation(home, options, say)
    if as_json:
        click.echo(json.dumps(found))
    else:
        screen.facts(found)


def run_simulation(home: Home, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it; return what was measured."""
    with Simulation(home, options, say=say) as running:
        connect_s = running.wait_until_connected()
        say(f"{options.devices} devices are connected after {connect_s:.1f} s")
        at_rest = running.usage()
        before = time.monotonic()
        ended = []
        for summary in running.rounds() if options.rounds else ():
            say(screen.summary_line(summary))
            ended.append(summary)
        rounds_s = time.monotonic() - before
        running.swarms.hear_again()
        found: dict[str, Any] = {
            "devices": options.devices,
            "cohort": options.cohort,
            "connect_s": round(connect_s, 2),
            "rounds_s": round(rounds_s, 2),
            "rounds": [msgspec.to_builtins(summary) for summary in ended],
            "cuts": int(running.swarms.sum("cuts")),
            "rejected_by_devices": running.swarms.counts("rejects"),
            "rejected_by_server": running.status()["rejected"],
            "at_rest": at_rest,
            "after_rounds": running.usage(),
        }
        if options.storm:
            say("the broker is killed, and started again")
            found["storm_s"] = round(running.storm(), 2)
            say(f"{options.devices} devices are back after {found['storm_s']:.1f} s")
            found["after_storm"] = running.usage()
    return found


def _wearables() -> Path:
    path = shipped_file("mosquitto.conf").parent / "examples" / "wearables" / "wearables.task"
    if not path.is_file():
        raise LocalError("no task: say --task FILE, made by `midge task build`")
    return path


def _fleet(folder: Path | None, stack: ExitStack) -> Home:
    """The fleet in `folder`, or a new one there, or a new one that is gone at the end."""
    if folder is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="midge-fleet-")))
    if (folder / "midge.toml").is_file():
        return Home(folder)
    return create(folder, federation="demo", hosts=["127.0.0.1", "localhost"], port=free_port())
