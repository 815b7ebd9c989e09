"""Fleets for tests: in one process over an in-memory broker, or of real processes over mosquitto.

`World` is a real server and real or hand-made devices in this process: nothing is left
out but the wire. `Fleet` is a folder, a broker and processes, as an operator has them.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from broker_bridge.disk import REAL_DISK, Disk
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.local_broker import LocalBroker, free_port
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import enrolment, messages, weights
from broker_bridge.wire.envelope import KemKey, random_bytes, sha256, verify
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Busy,
    Go,
    Init,
    Join,
    Need,
    Refused,
    Renewal,
    Welcome,
)
from broker_bridge.wire.topics import DownTopic, Topics
from broker_bridge.wire.update import Binding, SealedUpdate, seal_update
from device_client import identity as identities
from device_client.agent import Agent
from device_client.data import load_samples
from device_client.identity import Identity
from device_client.journal import Journal
from device_client.trainer import Trainer
from server.cli import main as midge_main
from server.config import Rounds, ServerConfig
from server.coordinator import Coordinator
from server.events import Rules
from server.fleet.enrolment import Registrar, add_device
from server.fleet.home import Home, create
from server.ledger import Ledger
from server.quotas import Quotas, Shares
from server.service import Service
from server.store.database import Database

ROOT = Path(__file__).parents[1]
TASK = ROOT / "examples" / "wearables" / "wearables.task"
GIVE_UP_S = 60.0
FEDERATION = "demo"
TOPICS = Topics(FEDERATION)

MIDGE = [sys.executable, "-m", "server.cli"]
DEVICE = [sys.executable, "-m", "device_client.cli"]


def wait_until(true: Callable[[], Any], what: str, give_up_s: float = GIVE_UP_S) -> Any:
    """Wait until `true()` is, and return what it said."""
    until = time.monotonic() + give_up_s
    while True:
        is_over = time.monotonic() >= until  # before the last look, not after it
        found = true()
        if found:
            return found
        assert not is_over, f"gave up waiting: {what}"
        time.sleep(0.02)


def written_in(folder: Path) -> list[Path]:
    """The files in a folder where somebody is at work, but for those not yet whole."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".new")


def files_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file and what is in it; one that goes away meanwhile was never there."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in sorted(names) if not name.endswith(".new")):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.read_bytes()


def write_samples(path: Path, *, seed: int, rows: int = 48, labels: int = 7) -> str:
    """Make a data source that fits the wearables task, and return how to name it."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 50, 6)).astype(np.float32)
    np.savez(path, x=x, y=draw.integers(0, labels, size=rows).astype(np.int32))
    return f"npz:{path}"


def enrol_by_hand(home: Home, db: Database, name: str, folder: Path) -> Identity:
    """Everything that enrolment does but the broker."""
    now = time.time()
    bundle = identities.read_bundle(
        add_device(home, db, name, broker=home.config().broker, now=now)
    )
    keys = identities.pending_keys(folder)
    contact = identities.contact(bundle)
    server = enrolment.server_identity(
        bytes.fromhex(bundle.root_public), bundle.federation, bytes.fromhex(bundle.server_identity)
    )
    asked = enrolment.request(
        contact, sign=keys.sign, kem=keys.kem, tls_public=keys.tls_public,
        server_kem=server.kem_public, ephemeral=KemKey.from_seed(random_bytes(32)), software="test",
    )  # fmt: skip
    signed = Registrar(home, db, lambda: now).answer(name, messages.encode(asked))
    welcome = messages.opened(server.sign_public, "cfg", contact.scope, signed, messages.Welcome)
    configured = enrolment.open_welcome(
        contact, welcome, kem=keys.kem, server_kem=server.kem_public
    )
    identity = identities.enrolled(bundle, keys, configured)
    identities.save(folder, identity)
    return identity


# ── In one process ──────────────────────────────────────────────────────────────────────


class World:
    """A server over an in-memory broker whose clock is the broker's."""

    server_will = Message(TOPICS.srv, b"", True)

    def __init__(
        self,
        folder: Path,
        *,
        rounds: dict[str, Any] | None = None,
        shares: Shares | None = None,
        make_broker: Callable[..., MemoryBroker] = MemoryBroker,
        **broker: Any,
    ):
        # A test says in a moment what takes an hour in the field, so its devices may.
        self.shares = shares or Shares(control_per_minute=1e6, repeats_max=1000)
        self.folder = folder
        self.home = create(folder / "fleet", federation=FEDERATION, hosts=["localhost"], port=1)
        shutil.copy(TASK, self.home.folder / "tasks")
        self.broker = make_broker(seed=1, **broker)
        self.config = ServerConfig(rounds=Rounds(**(rounds or {})))
        self.operator = self.broker.connect("midge-operator")
        self.operator.subscribe([TOPICS.ctl_reply, TOPICS.metrics])
        self.agents: list[Agent] = []
        self.start_server()

    def start_server(self) -> None:
        self.link = self.broker.connect("midge-server", will=self.server_will)
        self.ledger = self.make_ledger()
        rounds = self.config.rounds
        rules = Rules(
            target=rounds.target, quorum=rounds.quorum, deadline_s=rounds.deadline_s,
            abandoned_max=rounds.abandoned_max, evaluation_wait_s=rounds.evaluation_wait_s,
            packet_bytes_max=min(LIMITS.packet_bytes_max, self.link.limits.packet_bytes_max),
        )  # fmt: skip
        self.coordinator = Coordinator(federation=FEDERATION, rules=rules)
        registrar = Registrar(self.home, self.ledger.db, time.time)
        self.service = Service(
            self.link, self.ledger, self.coordinator, registrar, quotas=Quotas(self.shares),
            clock=lambda: self.broker.now_s,
        )  # fmt: skip
        self.service.begin()
        self.settle()

    def make_ledger(self) -> Ledger:
        return Ledger(self.home, self.config, clock=self.now)

    def kill_server(self) -> None:
        """Leave everything as it is, as a power cut would."""
        self.link.drop(away_s=1e9)
        self.ledger.close()

    def now(self) -> float:
        return 1_790_000_000.0 + self.broker.now_s

    def settle(self) -> None:
        """Let everything that was said be heard and answered."""
        quiet = 0
        while quiet < 2:
            event = self.link.receive(0)
            self.service.turn(event)
            heard = event is not None
            for agent in self.agents:
                event = agent._link.receive(0)
                agent.turn(event)
                heard = heard or event is not None
            quiet = 0 if heard else quiet + 1

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Settle again and again, while devices train, until something is so."""

        def look() -> Any:
            self.settle()
            return true()

        return wait_until(look, what)

    def pass_time(self, seconds: float) -> None:
        self.broker.advance(seconds)
        self.settle()

    def tell(self, **command: Any) -> dict[str, Any]:
        """Publish a command as an operator does; return the reply."""
        return self.tell_raw(json.dumps(command).encode())

    def tell_raw(self, payload: bytes) -> dict[str, Any]:
        self.operator.publish(TOPICS.ctl, payload)
        self.settle()
        replies = [m for m in self.read_operator() if m.topic == TOPICS.ctl_reply]
        return json.loads(replies[-1].payload) if replies else {}

    def read_operator(self) -> list[Message]:
        found = []
        while (event := self.operator.receive(0)) is not None:
            if isinstance(event, Message):
                self.operator.ack(event)
                found.append(event)
        return found

    def status(self) -> dict[str, Any]:
        return self.tell(cmd="status")["status"]

    def rejected(self) -> dict[str, int]:
        return self.status()["rejected"]

    def metrics(self) -> dict[str, Any]:
        return json.loads(self.broker.retained[TOPICS.metrics].payload)

    def announcement(self) -> Announcement:
        payload = verify(
            self.ledger.keys.sign.public, f"round {FEDERATION}",
            self.broker.retained[TOPICS.round].payload,
        )  # fmt: skip
        return messages.decode(payload, Announcement)

    def enrol(self, name: str) -> Identity:
        return enrol_by_hand(self.home, self.ledger.db, name, self.folder / name)

    def hand(self, name: str, *, role: str = "train", identity: Identity | None = None) -> "Hand":
        """An enrolled device that a test drives by hand, on line."""
        hand = Hand(self, identity or self.enrol(name))
        hand.show("ready", role=role)
        self.settle()
        return hand

    def agent(
        self, name: str, *, data: str = "", role: str = "train", disk: Disk = REAL_DISK,
        **parts: Any,
    ) -> Agent:  # fmt: skip
        """A whole device in this process; also one that was there before, after a restart.

        `parts` replace what it is made of: how it trains, say.
        """
        identity = identities.load(self.folder / name) or self.enrol(name)
        parts.setdefault(
            "load", lambda plan: Trainer(TaskRuntime(plan), load_samples(data, plan.task))
        )
        agent = Agent(
            identity,
            self.broker.connect(name),
            journal=Journal(self.folder / name, disk=disk),
            role=role,
            boot=1,
            clock=lambda: self.broker.now_s,
            draw=lambda: 0.5,
            **parts,
        )
        agent.begin()
        self.agents.append(agent)
        return agent

    def close(self) -> None:
        for agent in self.agents:
            agent._stop("the test is over")
        self.ledger.close()


_HEARD = {"go": Go | Busy, "need": Need, "ack": Ack, "cfg": Welcome | Refused | Renewal}


class Hand:
    """A device whose every message a test writes itself, with real keys and the real wire code."""

    def __init__(self, world: World, identity: Identity) -> None:
        self.world = world
        self.identity = identity
        self.name = identity.device
        self.link = world.broker.connect(
            self.name, will=Message(TOPICS.state(self.name), _presence("lost", "train"), True)
        )
        self.link.subscribe([TOPICS.all_down(self.name)])
        self.heard: list[Any] = []

    def show(self, state: str, *, role: str = "train") -> None:
        self.link.publish(TOPICS.state(self.name), _presence(state, role), retain=True)

    def say(self, kind: str, payload: bytes) -> list[Any]:
        """Publish raw bytes; return what the server answered."""
        self.link.publish(TOPICS.up(0, self.name, kind), payload)
        return self.listen()

    def sign(self, kind: str, message: Any) -> bytes:
        return messages.signed(self.identity.keys.sign, kind, self.identity.scope, message)

    def listen(self) -> list[Any]:
        """What the server said to this device since the last time."""
        self.world.settle()
        new = []
        while (event := self.link.receive(0)) is not None:
            if not isinstance(event, Message):
                continue
            self.link.ack(event)
            place = TOPICS.parse(event.topic)
            if isinstance(place, DownTopic):
                types = _HEARD[place.kind]
                new.append(
                    messages.opened(
                        self.identity.server_sign,
                        place.kind,
                        self.identity.scope,
                        event.payload,
                        types,
                    )
                )
        self.heard += new
        return new

    @property
    def digest(self) -> bytes:
        """Of the open round's announcement."""
        return sha256(messages.encode(self.world.announcement()))

    def join(self, **changes: Any) -> list[Any]:
        join = Join(
            **{
                "round": self.world.announcement().round, "announcement": self.digest,
                "samples": 10, "packet_bytes_max": 8192, "inflight_max": 20,
            }
            | changes
        )  # fmt: skip
        return self.say("join", self.sign("join", join))

    def go(self) -> Go:
        """Join, and be let in."""
        answers = self.join()
        assert isinstance(answers[-1], Go), answers
        return answers[-1]

    def delta(self, fill: float = 0.01) -> dict[str, Any]:
        """An update of the right shape."""
        task, _ = decode_task(TASK.read_bytes())
        return {s.name: np.full(s.shape, fill, np.float32) for s in task.task.weights}

    def seal(
        self, go: Go, update: dict[str, Any] | bytes, **changes: Any
    ) -> tuple[Init, SealedUpdate]:
        """A commit and its chunks; `changes` replace fields of the commit."""
        data = update if isinstance(update, bytes) else encode_raw(update)
        sealed = seal_update(
            data,
            Binding(FEDERATION, self.name, go.announcement, go.upload),
            round_key=self.world.announcement().round_key,
            sender=self.identity.keys.kem,
            psk=self.identity.psk,
            ephemeral=KemKey.from_seed(random_bytes(32)),
            packet_bytes=go.packet_bytes,
        )
        init = Init(
            **{
                "round": go.round, "announcement": go.announcement, "upload": go.upload,
                "enc": sealed.enc, "total_bytes": len(data),
                "body_bytes": sealed.layout.body_bytes, "tags": sealed.tags, "examples": 10,
                "train_s": 0.1, "metrics": {"loss": 1.0},
            }
            | changes
        )  # fmt: skip
        return init, sealed

    def commit(self, init: Init) -> list[Any]:
        return self.say("init", self.sign("init", init))

    def send(self, sealed: SealedUpdate, indices: Any = None) -> list[Any]:
        for index in range(sealed.layout.count) if indices is None else indices:
            self.link.publish(TOPICS.up(0, self.name, "data"), sealed.chunks[index])
        return self.listen()

    def upload(self, update: dict[str, Any] | bytes, **changes: Any) -> Ack:
        """Join, commit and send an update; return the receipt."""
        init, sealed = self.seal(self.go(), update, **changes)
        answers = self.commit(init)
        if not answers or not isinstance(answers[-1], Ack):
            answers = self.send(sealed)
        assert isinstance(answers[-1], Ack), answers
        return answers[-1]


def encode_raw(tensors: dict[str, Any]) -> bytes:
    """`weights.encode`; it takes NaN and infinity, which a hostile device may well send."""
    return weights.encode(tensors)


def _presence(state: str, role: str) -> bytes:
    return json.dumps({"v": 1, "state": state, "boot": 1, "role": role}).encode()


# ── Real processes ──────────────────────────────────────────────────────────────────────


class Program:
    """A process whose output goes to a file, below that of the one before it."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log_path = log
        with log.open("ab") as out:
            self._begins_at = out.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        self.pid = self._process.pid

    @property
    def log(self) -> str:
        """All that is in the file, also of processes before this one."""
        return self.log_path.read_text(errors="replace")

    @property
    def said(self) -> str:
        """What this process has said."""
        return self.log_path.read_bytes()[self._begins_at :].decode(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, text: str, give_up_s: float = GIVE_UP_S) -> None:
        """Wait until this process has said `text`; those before it do not count."""

        def over() -> bool:
            ended = not self.is_running  # first: its last words may be those
            return text in self.said or ended

        with contextlib.suppress(AssertionError):
            wait_until(over, text, give_up_s)
        assert text in self.said, f"never said {text!r}:\n{self.log}"

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self._process.terminate()
        return self._process.wait(GIVE_UP_S)

    def kill(self) -> None:
        """SIGKILL: no instruction more."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)


class Fleet:
    """A fleet's folder, its broker, its server and its devices, on a free port."""

    def __init__(self, folder: Path, *, settings: str = "", also_at: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.port = free_port()
        self.home = create(
            folder / "fleet", federation=FEDERATION, hosts=["localhost", "127.0.0.1", *also_at],
            port=self.port,
        )  # fmt: skip
        shutil.copy(TASK, self.home.folder / "tasks")
        if settings:
            (self.home.folder / "midge.toml").write_text(
                f"{settings}\n[broker]\nhost = 'localhost'\nport = {self.port}\n"
            )
        self.broker = LocalBroker(self.home.broker, port=self.port, engine="mosquitto")
        self.server: Program | None = None
        self.programs: list[Program] = []
        self.links: list[PahoLink] = []

    def start(self) -> "Fleet":
        self.broker.start()
        self.start_server()
        return self

    def start_server(self, *options: str) -> Program:
        log = self.folder / "server.log"
        self.server = self._run(log, *MIDGE, "server", "--dir", str(self.home.folder), *options)
        self.server.wait_for("the server is online")
        assert self.server.is_running, self.server.log
        return self.server

    def enrol(self, *names: str) -> None:
        """Let devices in without a broker: their folders are as after `midge-device enrol`."""
        with contextlib.closing(Database(self.home.database)) as db:
            for name in names:
                enrol_by_hand(self.home, db, name, self.folder / name)

    def device(
        self,
        name: str,
        *options: str,
        data: str | None = None,
        role: str = "train",
        python: tuple[str, ...] = (),
    ) -> Program:
        """Run a device; its samples depend on its name alone. `python`: the interpreter's flags."""
        source = data or self.samples(name)
        return self._run(
            self.folder / f"{name}.log", sys.executable, *python, "-m", "device_client.cli", "run",
            "--dir", str(self.folder / name), "--data", source, "--role", role, *options,
        )  # fmt: skip

    def samples(self, name: str) -> str:
        seed = int.from_bytes(sha256(name.encode())[:4], "big")
        return write_samples(self.folder / f"{name}.npz", seed=seed)

    def _run(self, log: Path, *command: str) -> Program:
        program = Program(log, *command)
        self.programs.append(program)
        return program

    def midge(self, *arguments: str, **options: str) -> Any:
        """Run one of the operator's commands on this fleet."""
        return typed(midge_main, *arguments, "--dir", str(self.home.folder), **options)

    def publish(self, topic: str, payload: str, *options: str) -> None:
        """What an operator types: mosquitto_pub."""
        done = run("mosquitto_pub", *self._client(), "-q", "1", "-t", topic, "-m", payload,
                   *options)  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start_run(self, **command: Any) -> None:
        self.publish(TOPICS.ctl, json.dumps({"cmd": "start"} | command))

    def _client(self) -> list[str]:
        files = self.home.tls("operator")
        return ["--cafile", str(files.ca), "--cert", str(files.certificate), "--key",
                str(files.key), "-h", "localhost", "-p", str(self.port)]  # fmt: skip

    def listen(self, *filters: str, who: str = "operator") -> "Listener":
        """Subscribe with the operator's or the server's certificate, and record from now on."""
        link = PahoLink.open(
            "localhost", self.port, client_id=f"listener-{len(self.links)}",
            tls=self.home.tls(who), session_s=0, wait_s=GIVE_UP_S,
        )  # fmt: skip
        self.links.append(link)
        return Listener(link, filters)

    def state_of(self, name: str) -> dict[str, Any]:
        """What a device last wrote down for `midge-device status`."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.folder / name / "status.json").read_text())
            assert isinstance(found, dict)
            return found
        return {}

    def model_files(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in written_in(self.home.state / "models")}

    def status(self) -> dict[str, Any]:
        """What the server says of itself, once it comes to answering."""

        def answer() -> dict[str, Any] | None:
            done = self.midge("status", "--json")
            return json.loads(done.stdout) if done.returncode == 0 else None

        found = wait_until(answer, "the server answers")
        assert isinstance(found, dict)
        return found

    def stop(self) -> None:
        for link in self.links:
            link.close()
        for program in self.programs:
            program.kill()
        self.broker.stop()


class Listener:
    """Everything that came in on some topics."""

    def __init__(self, link: PahoLink, filters: tuple[str, ...]) -> None:
        self._link = link
        self.messages: list[Message] = []
        link.subscribe(list(filters))
        # What is said from here on is heard: nobody could wait for what came before.
        wait_until(lambda: all(link._filters.values()), f"the broker takes {filters}")

    def hear(self) -> list[Message]:
        """All messages so far."""
        while (event := self._link.receive(0.0)) is not None:
            if isinstance(event, Message):
                self._link.ack(event)
                self.messages.append(event)
        return self.messages

    def wait(
        self, is_it: Callable[[Message], Any], what: str, give_up_s: float = GIVE_UP_S
    ) -> Message:
        """Wait for a message that is it."""

        def found() -> Message | None:
            return next((m for m in self.hear() if is_it(m)), None)

        message = wait_until(found, what, give_up_s)
        assert isinstance(message, Message)
        return message

    def wait_for_json(self, topic: str, **fields: Any) -> dict[str, Any]:
        """Wait for a JSON message on `topic` that holds these fields."""

        def fits(message: Message) -> bool:
            if message.topic != topic or not message.payload:
                return False
            said = json.loads(message.payload)
            return all(said.get(name) == value for name, value in fields.items())

        found = json.loads(self.wait(fits, f"{fields} on {topic}").payload)
        assert isinstance(found, dict)
        return found


def run(*command: str, give_up_s: float = GIVE_UP_S, **options: Any) -> Any:
    """Run a command to its end."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=give_up_s, check=False, cwd=ROOT,
        stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip


def typed(main: Callable[[], None], *arguments: str, **environment: str) -> Any:
    """Run `main` as the command that it is, in a process of its own.

    A fork: the real exit code and the real standard error, without importing everything anew.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os._exit(_as_a_command(main, arguments, environment, out.fileno(), err.fileno()))
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), *texts)


def _as_a_command(
    main: Callable[[], None], arguments: tuple[str, ...], environment: dict[str, str], out: int,
    err: int,
) -> int:  # fmt: skip
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.argv = ["command", *arguments]
    os.environ.update(environment)
    logging.root.handlers.clear()
    code: Any = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        with contextlib.suppress(ValueError):
            sys.stderr.flush()
    return code if isinstance(code, int) else 0


def is_refusal(done: Any, *words: str) -> None:
    """A person's mistake gets one sentence on standard error, and exit code 2."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("midge"), done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def commands_in(group: Any, path: tuple[str, ...] = ()) -> Any:
    """Every command of a click tree, with the words that lead to it."""
    yield path, group
    for name, command in sorted(getattr(group, "commands", {}).items()):
        yield from commands_in(command, (*path, name))
