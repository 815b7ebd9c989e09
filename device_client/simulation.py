"""Many devices in one process, each with the code that runs on a device: for `midge simulate`.

Everything is real but the training, the disk's patience and the number of threads: each
device has its own keys, certificate, connection, agent, journal and outbox. `fast`
training returns seeded noise after a seeded time; `real` is the trainer of `midge-device`.
Seeds decide who trains slowly and who loses power when: a cut ends the connection without
a word, and the device starts again from its folder a while later.

The identities come from a file that the server's side made in bulk. That is for simulation
only: it knows the secrets that a real device makes itself and shows nobody.

Prints one line of JSON a second; ends on SIGTERM.
"""

import contextlib
import hashlib
import heapq
import itertools
import json
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.console import run_command, show_log, stop_on_signals
from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.link.base import Connected, Message
from broker_bridge.link.paho_session import SessionSettings
from broker_bridge.link.poller import PolledLink, Poller, raise_file_limit
from broker_bridge.link.tls import client_context
from broker_bridge.task.runtime import Evaluation, TaskRuntime
from broker_bridge.task.samples import Part
from broker_bridge.task.taskfile import Plan, Training
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import client_id
from broker_bridge.wire.messages import Blob, Presence
from broker_bridge.wire.topics import Topics
from device_client import events as ev
from device_client import identity as identities
from device_client.agent import Agent
from device_client.data import load_samples
from device_client.identity import Identity, Keys
from device_client.journal import Journal
from device_client.participant import State
from device_client.trainer import Progress, Trained, Trainer
from device_client.workbench import LocalTrainer, Work

__all__ = ["Fate", "Members", "Swarm", "main"]

Array = NDArray[Any]
_BLOBS_SHARED_MAX = 4
_OPENED_A_TURN_MAX = 10  # a TLS context takes a millisecond or two to make
_NOISE_VALUES = 1 << 16
_MOMENTS = (State.JOINING, State.FETCHING, State.TRAINING, State.UPLOADING)


# ── Who there is ────────────────────────────────────────────────────────────────────────


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What belongs to one device. `repr` shows no secret."""

    device: str
    sign_seed: bytes
    kem_seed: bytes
    tls_seed: bytes
    psk: bytes
    certificate_pem: str

    def __repr__(self) -> str:
        return f"Member({self.device})"


class Members(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file that `midge simulate` writes: what all have in common, then each."""

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

    @classmethod
    def read(cls, path: Path) -> "Members":
        """Read the file. Raises LocalError."""
        with disk_errors(path):
            data = path.read_bytes()
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise LocalError(f"{path} is no file of simulated devices: {error}") from None

    def identity(self, member: Member) -> Identity:
        """The identity of one of them, as an enrolled device has it."""
        common = {
            name: getattr(self, name)
            for name in self.__struct_fields__
            if name in Identity.__struct_fields__
        }
        keys = Keys(member.sign_seed, member.kem_seed, member.tls_seed)
        return Identity(
            device=member.device, keys=keys, psk=member.psk,
            certificate_pem=member.certificate_pem, **common,
        )  # fmt: skip


# ── What happens to whom ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fate:
    """Draws what happens to a device in a round. One seed, one story."""

    seed: int = 0
    drop: float = 0.0  # the share that loses power once in each round it takes part in
    slow: float = 0.0  # the share that trains for `slow_s`
    train_s: float = 0.5
    slow_s: float = 20.0
    away_s: float = 10.0

    def draw(self, device: str, round_: int, what: str) -> float:
        """A number in [0, 1)."""
        text = f"{self.seed} {device} {round_} {what}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / (1 << 48)

    def cut_at(self, device: str, round_: int) -> State | None:
        """In which state the power goes, if it does."""
        if self.draw(device, round_, "drop") >= self.drop:
            return None
        return _MOMENTS[int(self.draw(device, round_, "moment") * len(_MOMENTS))]

    def train_for_s(self, device: str, round_: int) -> float:
        """How long training takes."""
        if self.draw(device, 0, "slow") < self.slow:
            return self.slow_s
        return self.train_s * (0.5 + self.draw(device, round_, "train"))


class FastTrainer:
    """Training that costs nothing: the update is noise, the same for the same seed."""

    _noise = np.random.default_rng(7).normal(0, 1e-3, 2 * _NOISE_VALUES).astype(np.float32)

    def __init__(self, examples: int) -> None:
        self._examples = examples

    def __len__(self) -> int:
        """How many samples it claims."""
        return self._examples

    def train(
        self,
        weights: Mapping[str, Array],
        settings: Training,
        *,
        seed: int,
        on_step: Callable[[Progress], bool],
        optimiser_state: Mapping[str, Array] | None = None,  # noqa: ARG002 - noise has none
        part: Part = "all",  # noqa: ARG002 - nor samples
    ) -> Trained | None:
        """The weights and some noise."""
        start = seed % _NOISE_VALUES
        noise = self._noise[start : start + _NOISE_VALUES]
        new = {
            name: array + np.resize(noise, array.shape) if array.dtype == np.float32 else array
            for name, array in weights.items()
        }
        loss = 1.0 + start / _NOISE_VALUES
        if not on_step(Progress(1, 1, loss)):
            return None
        return Trained(new, self._examples, settings.epochs, loss, {}, 0.0)

    def evaluate(
        self,
        weights: Mapping[str, Array],
        *,
        part: Part = "all",  # noqa: ARG002
    ) -> Evaluation:
        """A made-up loss."""
        return Evaluation(self._examples, 1.0 + 0.0 * len(weights), {})


class PacedBackground:
    """Work that is done at once, when its time has come."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work: Work | None = None
        self.takes_s = 0.0
        self.due_s = 0.0

    def start(self, work: Work) -> None:
        """Do `work` in `takes_s`."""
        self._work, self.due_s = work, self._clock() + self.takes_s

    def stop(self) -> bool:
        """Forget the work."""
        stopped, self._work = self._work is not None, None
        return stopped

    @property
    def stopping(self) -> bool:
        """Never: what was begun is done."""
        return False

    @property
    def waits(self) -> bool:
        """Whether there is work to do at `due_s`."""
        return self._work is not None

    def finished(self) -> list[ev.Event]:
        """Do the work, if it is time."""
        if self._work is None or self._clock() < self.due_s:
            return []
        work, self._work = self._work, None
        return work()


class SimulatedAgent(Agent):
    """A device that shares the bytes of task and model with its neighbours in the process."""

    shared: dict[bytes, bytes]

    def _fetched(self, kind: str, blob: Blob, content: bytes) -> list[ev.Event]:
        content = self.shared.setdefault(blob.digest, content)
        while len(self.shared) > _BLOBS_SHARED_MAX:
            self.shared.pop(next(iter(self.shared)))
        return super()._fetched(kind, blob, content)


# ── One device ──────────────────────────────────────────────────────────────────────────


class Device:
    """A device's folder and certificate, and, while it has power, its agent and link."""

    def __init__(self, swarm: "Swarm", identity: Identity) -> None:
        self.swarm = swarm
        self.identity = identity
        self.agent: SimulatedAgent | None = None
        self.link: PolledLink | None = None
        self.background = PacedBackground(swarm.clock)
        self.connected = False
        self.next_s = 0.0  # when it is to be turned, message or not; 0: never
        self._folder = swarm.folder / identity.device
        self._folder.mkdir(exist_ok=True, mode=0o700)
        self._settings = self._link_settings()
        self._cut_in = 0  # the round in which the power went last

    def _link_settings(self) -> SessionSettings:
        swarm, identity = self.swarm, self.identity
        files = None if swarm.plain_port else identities.tls_files(self._folder, identity)
        draws = random.Random(f"{swarm.fate.seed} {identity.device}")  # noqa: S311 - a simulation
        return SessionSettings(
            host="127.0.0.1" if swarm.plain_port else identity.broker_host,
            port=swarm.plain_port or identity.broker_port,
            client_id=client_id(identity.device, identity.keys.tls_seed),
            username=identity.device if swarm.plain_port else None,
            tls=None if files is None else client_context(files),
            will=Message(
                swarm.topics.state(identity.device),
                messages.encode_json(Presence(state="lost", boot=1)), retained=True,
            ),
            random=draws.random,
        )  # fmt: skip

    def start(self) -> None:
        """Have power: begin as a process does that finds this folder."""
        swarm = self.swarm
        journal = Journal(self._folder)
        self.link = swarm.poller.open(self._settings)
        swarm.devices[self.link] = self
        self.agent = SimulatedAgent(
            self.identity, self.link, journal=journal, load=swarm.load, boot=journal.boot(),
            clock=swarm.clock, draw=self._settings.random, background=self.background,
        )  # fmt: skip
        self.agent.shared = swarm.shared
        self.agent.begin()

    def cut(self) -> None:
        """Lose power, and have it again after a while."""
        assert self.agent is not None  # noqa: S101 - only a device that runs is cut
        assert self.link is not None  # noqa: S101
        swarm = self.swarm
        swarm.rejects.update(self.agent.rejects)
        swarm.cuts += 1
        swarm.devices.pop(self.link)
        swarm.poller.cut(self.link)
        self.background.stop()
        self.agent = self.link = None
        self.connected = False
        share = swarm.fate.draw(self.identity.device, self._cut_in, "away")
        self.wake_at(swarm.clock() + swarm.fate.away_s * (0.5 + share))

    def turn(self) -> None:
        """Everything that has come, then the time."""
        if self.agent is None or self.link is None:
            self.start()
            return
        while (event := self.link.receive(0)) is not None:
            self.connected = isinstance(event, Connected | Message)
            if self._turn(event):
                return
        self._turn(None)

    def _turn(self, event: Any) -> bool:
        """One turn of the agent; whether the power went with it."""
        agent = self.agent
        assert agent is not None  # noqa: S101 - see `turn`
        fate, name = self.swarm.fate, self.identity.device
        round_ = agent._participant.round
        self.background.takes_s = fate.train_for_s(name, round_)
        agent.turn(event)
        round_ = agent._participant.round
        if self._cut_in < round_ and agent.state is fate.cut_at(name, round_):
            self._cut_in = round_
            self.cut()
            return True
        if agent.state is State.IDLE:
            self.next_s = 0.0
        else:
            now = self.swarm.clock()
            due_s = self.background.due_s if self.background.waits else now + 1.0
            self.wake_at(min(max(due_s, now), now + 1.0))
        return False

    def wake_at(self, at_s: float) -> None:
        """Be turned then."""
        if self.next_s == 0.0 or at_s < self.next_s or self.next_s <= self.swarm.clock():
            self.next_s = at_s
            self.swarm.wake_at(at_s, self)


# ── All of them ─────────────────────────────────────────────────────────────────────────


class Swarm:
    """The devices of this process, and the loop that turns them."""

    def __init__(
        self,
        members: Members,
        folder: Path,
        *,
        fate: Fate,
        load: Callable[[Plan], LocalTrainer] | None = None,
        plain_port: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.fate = fate
        self.plain_port = plain_port
        self.clock = clock
        self.topics = Topics(members.federation)
        self.poller = Poller()
        self.devices: dict[PolledLink, Device] = {}
        self.shared: dict[bytes, bytes] = {}
        self.rejects: Counter[str] = Counter()
        self.cuts = 0
        self.everyone: list[Device] = []
        self.load = load or self._load_fast
        self._members = members
        self._waiting = iter(members.members)
        self._timers: list[tuple[float, int, Device]] = []
        self._order = itertools.count()

    def _load_fast(self, plan: Plan) -> LocalTrainer:
        return FastTrainer(10 + len(plan.task.name) % 90)

    def wake_at(self, at_s: float, device: Device) -> None:
        """Turn this device at `at_s`."""
        heapq.heappush(self._timers, (at_s, next(self._order), device))

    def turn(self, timeout_s: float) -> None:
        """One turn of the loop."""
        opened = self._open_some()
        now = self.clock()
        if opened:
            timeout_s = 0.0
        elif self._timers:
            timeout_s = min(timeout_s, max(0.0, self._timers[0][0] - now))
        for link in self.poller.turn(timeout_s):
            device = self.devices.get(link)
            if device is not None:
                device.turn()
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            at_s, _, device = heapq.heappop(self._timers)
            if at_s == device.next_s:
                device.next_s = 0.0
                device.turn()

    def _open_some(self) -> int:
        opened = 0
        for member in itertools.islice(self._waiting, _OPENED_A_TURN_MAX):
            device = Device(self, self._members.identity(member))
            self.everyone.append(device)
            device.start()
            opened += 1
        return opened

    def status(self) -> dict[str, Any]:
        """Where everybody is, and what this process costs."""
        states = Counter(d.agent.state.value for d in self.everyone if d.agent is not None)
        rejects = self.rejects + Counter(
            {r: n for d in self.everyone if d.agent for r, n in d.agent.rejects.items()}
        )
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "devices": len(self._members.members),
            "connected": sum(d.connected for d in self.everyone),
            "states": dict(states),
            "cuts": self.cuts,
            "rejects": dict(rejects),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "rss_bytes": _rss_bytes(),
        }

    def close(self) -> None:
        """Leave without a word to each: the broker publishes their wills."""
        for link in list(self.poller.links):
            self.poller.cut(link)
        self.poller.close()


def _rss_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextlib.contextmanager
def _folder(given: Path | None, devices: int) -> Iterator[Path]:
    """Where the devices' folders are; in memory, where there is room: each has its own disk."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield given
        return
    import tempfile

    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of our own in it
    needed = devices * 200_000
    fits = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(prefix="midge-sim-", dir=memory if fits else None) as found:
        yield Path(found)


@click.command()
@click.argument("members", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--from", "first", default=0, help="The first of them to run here.")
@click.option("--step", default=1, help="And every so many after it.")
@click.option("--state", type=click.Path(path_type=Path, file_okay=False),
              help="Where to keep their folders; default: in memory, gone at the end.")  # fmt: skip
@click.option("--fate", "fate_json", default="{}", help="The fields of Fate, as JSON.")
@click.option("--train", default="fast", help="fast, or where each finds samples, as for `run`.")
@click.option("--plain-port", default=0, help="A port of this machine without TLS; 0: use TLS.")
@click.option("--log", default="error")
def simulate(
    members: Path, first: int, step: int, state: Path | None, fate_json: str, train: str,
    plain_port: int, log: str,
) -> None:  # fmt: skip
    """Run simulated devices. `midge simulate` starts this."""
    show_log(log)
    stopped = stop_on_signals()
    found = Members.read(members)
    mine = msgspec.structs.replace(found, members=found.members[first::step])
    raise_file_limit(len(mine.members))
    fate = msgspec.convert(json.loads(fate_json), Fate)
    load = None if train == "fast" else _real(train)
    with _folder(state, len(mine.members)) as folder:
        swarm = Swarm(mine, folder, fate=fate, load=load, plain_port=plain_port)
        try:
            _run(swarm, stopped.is_set)
        finally:
            swarm.close()


def _real(data: str) -> Callable[[Plan], LocalTrainer]:
    def load(plan: Plan) -> Trainer:
        return Trainer(TaskRuntime(plan, num_threads=1), load_samples(data, plan.task))

    return load


def _run(swarm: Swarm, stopped: Callable[[], bool]) -> None:
    said_s = 0.0
    while not stopped():
        swarm.turn(0.25)
        if swarm.clock() - said_s >= 1.0:
            said_s = swarm.clock()
            print(json.dumps(swarm.status()), flush=True)


def main() -> None:
    """Run the simulated devices of one process."""
    run_command(simulate, "midge-simulate")


if __name__ == "__main__":
    main()
