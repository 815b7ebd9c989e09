"""The machines of a simulated federation: a disk that outlives its processes, and a process.

A process is the real server or the real device. It ends by a Crash, which may strike at
any point, or by an error of its own that a supervisor would restart it after (LocalError).
Anything else that it raises is a bug, and goes through.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from broker_bridge.disk import DiskFullError, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.link.base import Message
from broker_bridge.link.memory_link import MemoryLink
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Presence, ServerPresence
from broker_bridge.wire.topics import SERVER, Topics
from device_client import identity as identities
from device_client.agent import Agent
from device_client.eligibility import Verdict
from device_client.events import Memory
from device_client.identity import Identity
from device_client.journal import Journal
from server.config import Aggregation, Rounds, ServerConfig
from server.coordinator import Coordinator
from server.events import Rules
from server.fleet.enrolment import Registrar
from server.fleet.home import Home, ServerKeys
from server.ledger import Ledger
from server.service import Service
from server.store.spool import Spool
from tests.simulation.disk import Crash, SimulatedDatabase, SimulatedDisk
from tests.simulation.network import LARGE_PACKET_BYTES, WatchedBroker
from tests.simulation.weather import Mischief, Weather
from tests.simulation.work import LaterBackground, SimulatedTrainer, Trainings, task_file

__all__ = ["Device", "Machine", "Parts", "Server"]

DEADLINE_S = 60.0
UPDATE_PACKET_BYTES = 1024
FEDERATION = "sim"
TASK = task_file()


@dataclass(frozen=True)
class Parts:
    """The classes that a federation is made of; a test puts a broken one in."""

    ledger: Callable[..., Ledger] = Ledger
    service: Callable[..., Service] = Service
    coordinator: Callable[..., Coordinator] = Coordinator
    agent: Callable[..., Agent] = Agent


class Machine:
    """A computer that runs one process again and again."""

    def __init__(self, name: str, broker: WatchedBroker, weather: Weather, parts: Parts) -> None:
        self.name = name
        self.weather = weather
        self.parts = parts
        self.broker = broker
        self.draw = random.Random(f"{name} {weather.seed}")
        self.mischief = Mischief(name, weather, self.draw, lambda: broker.now_s)
        self.disk = SimulatedDisk(self.draw, self.mischief.strike)
        self.up_at_s = 0.0
        self.wall_jump_s = 0.0
        self.ended: list[str] = []  # how each process ended
        self.link: MemoryLink | None = None
        self._booted_s = 0.0

    @property
    def is_up(self) -> bool:
        return self.link is not None

    def monotonic(self) -> float:
        """A clock that never goes back, and starts again with the machine."""
        return self.broker.now_s - self._booted_s

    def wall(self) -> float:
        """A clock that somebody may set."""
        return 1_790_000_000.0 + self.broker.now_s + self.wall_jump_s

    def turn(self) -> bool:
        """One turn of the process, or its start; say whether it heard anything."""
        self.broker.strike, self.mischief.armed = self.mischief.strike, True
        try:
            if self.link is None:
                if self.broker.now_s < self.up_at_s or not self.broker.is_here:
                    return False
                self._booted_s = self.broker.now_s
                self.link = self.connect()
                self.boot()
                return True
            event = self.link.receive(0)
            self.step(event)
            return event is not None
        except Crash as crash:
            self.mischief.armed = False
            drawn = self.draw.random() < 0.5
            self.crash(str(crash), power=drawn if crash.power is None else crash.power)
        except LocalError as error:
            self.mischief.armed = False
            self.end(error)
        finally:
            self.mischief.armed = False
        return True

    def crash(self, why: str, *, power: bool) -> None:
        """The process is gone, and with `power` the kernel as well."""
        self.ended.append(f"{why}{', power' if power else ''}")
        self.disk.power_cut() if power else self.disk.kill()
        self.away()

    def end(self, error: LocalError) -> None:
        """The process ended by itself, with a sentence; its supervisor starts another."""
        self.ended.append(f"{type(error).__name__}: {error}")
        self.disk.kill()
        self.away()

    def away(self) -> None:
        if self.link is not None:
            self.link.drop(away_s=1e9)
        self.link = None
        self.up_at_s = self.broker.now_s + self.draw.uniform(0.5, 8.0)

    def connect(self) -> MemoryLink:
        raise NotImplementedError

    def boot(self) -> None:
        raise NotImplementedError

    def step(self, event: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class _Home(Home):
    """A fleet's folder whose keys are drawn, and kept in memory: the newest is the last."""

    made: list[ServerKeys]

    def keys(self) -> ServerKeys:
        return self.made[-1]

    def renew_fleet_key(self, draw: Callable[[int], bytes]) -> None:
        """What `Home.next_epoch` does, whether or not a server runs."""
        self.made.append(self.keys().with_next_fleet_key(draw, now=0.0))


class Server(Machine):
    """The server's machine."""

    def __init__(
        self, broker: WatchedBroker, weather: Weather, parts: Parts, keys: ServerKeys
    ) -> None:
        super().__init__("server", broker, weather, parts)
        self.database = SimulatedDatabase(self.draw, self.mischief.strike)
        self.home = _Home(Path("/fleet"), [keys])
        self.config = ServerConfig(
            federation=FEDERATION,
            rounds=Rounds(deadline_s=DEADLINE_S),
            aggregation=Aggregation(optimiser=weather.optimiser),  # type: ignore[arg-type]
        )
        self.disk.mkdir(self.home.folder / "tasks")
        self.disk.mkdir(self.home.state)
        write_atomic(self.home.folder / "tasks" / "dice.task", TASK, disk=self.disk)
        self.disk.sync_all()
        self.ledger: Ledger | None = None
        self.service: Service | None = None
        self.coordinator: Coordinator | None = None

    def connect(self) -> MemoryLink:
        topic = Topics(FEDERATION).srv
        will = Message(topic, messages.encode_json(ServerPresence(state="lost")), True)
        return self.broker.connect(SERVER, will=will)

    def boot(self) -> None:
        db = self.database.database
        self.ledger = self.parts.ledger(
            self.home, self.config, clock=self.wall, random=self.draw.randbytes, disk=self.disk,
            db=db, free_bytes=self._free_bytes if self.weather.knows_room else None,
        )  # fmt: skip
        if self.weather.large:  # as if these small updates were large ones
            self.ledger._spool = Spool(self.home.state / "spool", disk=self.disk)
        packet_bytes = LARGE_PACKET_BYTES if self.weather.whole else UPDATE_PACKET_BYTES
        rules = Rules(deadline_s=DEADLINE_S, evaluation_wait_s=5.0, packet_bytes_max=packet_bytes)
        self.coordinator = self.parts.coordinator(federation=FEDERATION, rules=rules)
        registrar = Registrar(self.home, db, self.wall, self.draw.randbytes)
        self.service = self.parts.service(
            self.link, self.ledger, self.coordinator, registrar, clock=self.monotonic
        )
        self.service.begin()

    def _free_bytes(self, _: Path) -> int:
        return 0 if self.mischief.is_full else 2**40

    def step(self, event: Any) -> None:
        assert self.service is not None
        try:
            self.service.turn(event)
        except DiskFullError as error:
            raise AssertionError(f"a full disk ended the server: {error}") from error

    def away(self) -> None:
        super().away()
        self.database.crash()
        self.ledger = self.service = self.coordinator = None


class Device(Machine):
    """A device's machine, enrolled."""

    def __init__(
        self, name: str, broker: WatchedBroker, weather: Weather, parts: Parts,
        identity: Identity, trainings: Trainings,
    ) -> None:  # fmt: skip
        super().__init__(name, broker, weather, parts)
        self.trainings = trainings
        self.role: Literal["train", "evaluate"] = (
            "train" if int(name[1:]) >= weather.evaluators else "evaluate"
        )
        self.folder = Path("/device")
        self.disk.mkdir(self.folder)
        identities.save(self.folder, identity, disk=self.disk)
        self.disk.sync_all()
        self.agent: Agent | None = None
        self._boots = 0

    def connect(self) -> MemoryLink:
        topic = Topics(FEDERATION).state(self.name)
        will = messages.encode_json(Presence(state="lost", boot=self._boots, role=self.role))
        return self.broker.connect(self.name, will=Message(topic, will, True))

    def boot(self) -> None:
        identity = identities.load(self.folder, disk=self.disk)
        assert identity is not None, "the identity is gone"
        journal = Journal(self.folder, disk=self.disk)
        boots = journal.boot()
        assert boots >= self._boots, "starts were forgotten"
        self._boots = boots
        self.agent = self.parts.agent(
            identity, self.link, journal=journal, boot=boots, clock=self.monotonic,
            load=lambda _: SimulatedTrainer(self.name, self.trainings, fails=self._fails),
            draw=self.draw.random, role=self.role,
            background=LaterBackground(self.monotonic, self._training_s),
            random=self.draw.randbytes, judged=self._judged,
            keeps_model=self.weather.seed % 2 == 0,
        )  # fmt: skip
        self.agent.begin()

    def step(self, event: Any) -> None:
        assert self.agent is not None
        self.agent.turn(event)

    def away(self) -> None:
        super().away()
        self.agent = None

    def _fails(self) -> bool:
        return not self.mischief.is_over and self.draw.random() < self.weather.sick

    def _judged(self, samples: int | None) -> list[Verdict]:
        """In one seed of three, the owner's rules are against it now and then, for 30 s."""
        if self.weather.seed % 3 or self.mischief.is_over:
            return []
        die = random.Random(f"{self.weather.seed} {self.name} {self.broker.now_s // 30}").random()
        return [Verdict("not now", "the owner needs it", die >= 0.15, network=die < 0.05)]

    def _training_s(self) -> float:
        return self.draw.uniform(0.0, self.weather.training_s)

    def fleet_epoch(self) -> int:
        """The newest fleet key that this device would still have if the power went now."""
        data = self.disk.durable(self.folder / "identity.json")
        assert data is not None, "the identity is gone"
        return msgspec.json.decode(data, type=Identity).fleet_epoch

    def remembered(self) -> Memory:
        """What this device would still know of rounds if the power went now."""
        data = self.disk.durable(self.folder / "rounds.json")
        return Memory() if data is None else msgspec.json.decode(data, type=Memory)
