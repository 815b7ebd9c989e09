"""One fleet under load: started, watched, run, and measured."""

import contextlib
import fcntl
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import LocalBroker
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.poller import raise_file_limit
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import random_bytes
from broker_bridge.wire.messages import Command, Reply, RoundSummary
from broker_bridge.wire.topics import OPERATOR, Topics
from server import screen
from server.config import ServerConfig
from server.fleet.home import Home
from server.simulation.members import enrol_members
from server.simulation.processes import PACKAGES, Swarms, Usage, end

__all__ = ["Options", "Simulation", "run_simulation"]

_PATIENCE_S = 120.0  # without any progress


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
            stdout=log, stderr=log, cwd=PACKAGES,
        )  # fmt: skip
        self._stack.callback(end, self.server)

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
