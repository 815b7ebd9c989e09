"""Which faults strike a simulated federation, when, and how often: all drawn from the seed.

Swarm testing: each seed has some kinds of faults and not others, so that no kind hides
another. All of them end at `until_s`; what follows must go well.
"""

import errno
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.disk import Crash

__all__ = ["OUTAGE_S", "Mischief", "Weather"]

YEAR_S = 365 * 86_400.0
OUTAGE_S = 300.0  # five minutes without a broker

# Where the disk may say no, and with what.
NEEDS_ROOM = frozenset({"create", "write", "mkdir", "commit"})
CHANGES = NEEDS_ROOM | {"rename", "unlink", "fsync", "checkpoint"}
READS = frozenset({"open", "read"})


@dataclass
class Span:
    """From when to when something is so, and for whom."""

    start_s: float
    end_s: float
    machine: str

    def covers(self, machine: str, now_s: float) -> bool:
        return self.machine == machine and self.start_s <= now_s < self.end_s


@dataclass
class Weather:
    """One seed's conditions."""

    seed: int
    devices: int
    rounds: int
    target: int
    quorum: int
    optimiser: str
    runs: int = 1
    deadline_s: float = 60.0
    evaluators: int = 0
    large: bool = False  # whether each update has a file of its own in the spool
    whole: bool = False  # whether each update comes in one chunk
    knows_room: bool = False  # whether the server can ask how much room its disk has
    sick: float = 0.0  # how often a training fails for want of data
    training_s: float = 5.0
    start_s: float = 0.0
    until_s: float = 0.0
    loss: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    crash: dict[str, float] = field(default_factory=dict)
    eio: dict[str, float] = field(default_factory=dict)
    full: list[Span] = field(default_factory=list)
    read_only: list[Span] = field(default_factory=list)
    events: list[tuple[float, str, str]] = field(default_factory=list)

    @classmethod
    def calm(cls, seed: int = 0, *, devices: int = 3, rounds: int = 2) -> "Weather":
        """No faults at all."""
        return cls(seed, devices, rounds, target=0, quorum=1, optimiser="fedavg")

    @classmethod
    def of(cls, seed: int) -> "Weather":
        """The weather of a seed."""
        draw = random.Random(f"weather {seed}")
        devices = draw.randint(2, 5)
        self = cls(
            seed, devices, rounds=draw.randint(2, 3),
            target=draw.choice((0, 0, devices, max(1, devices - 1))), quorum=1,
            optimiser=draw.choice(("fedavg", "fedavg", "fedadam")),
            training_s=draw.choice((1.0, 10.0, 40.0)), start_s=draw.uniform(0.0, 20.0),
            until_s=draw.uniform(20.0, 180.0),
        )  # fmt: skip
        machines = ["server", *(f"d{n}" for n in range(devices))]

        def some(chance: float = 0.4) -> bool:
            return draw.random() < chance

        def moment() -> float:
            return draw.uniform(0.0, self.until_s)

        self.runs = 1 + some(0.2)
        self.evaluators = int(some(0.25))
        self.knows_room = some(0.5)
        self.large = some(0.5)
        self.whole = random.Random(f"whole {seed}").random() < 0.5
        self.sick = 0.02
        self.loss = draw.uniform(0, 0.3) if some() else 0.0
        self.repeat = draw.uniform(0, 0.3) if some() else 0.0
        self.delay = draw.uniform(0, 5.0) if some() else 0.0
        self.reorder = draw.uniform(0, 0.5) if some() else 0.0
        for machine in machines:
            self.crash[machine] = 10 ** draw.uniform(-3, -1.3) if some() else 0.0
            self.eio[machine] = 10 ** draw.uniform(-4, -2) if some(0.2) else 0.0
            for kind in (self.full, self.read_only):
                if some(0.2):
                    start_s = moment()
                    kind.append(Span(start_s, start_s + draw.uniform(1, 40), machine))
        for event, chance in _EVENTS.items():
            while some(chance):
                self.events.append((moment(), event, draw.choice(machines)))
        if some(0.04):
            self.events.append((moment(), "outage", "server"))
            self.until_s += OUTAGE_S
        self.events.sort()
        return self


# What happens at a moment of its own, and how likely there is one more of it.
_EVENTS = {
    "amnesia": 0.2,
    "away": 0.2,
    "drop": 0.3,
    "kill": 0.3,
    "power": 0.3,
    "replay": 0.5,
    "clock": 0.3,
    "limits": 0.15,
    "pause": 0.15,
    "resume": 0.15,
    "stop": 0.03,
    "copy": 0.3,
    "rewind": 0.15,
    "corrupt": 0.4,
    "revoke": 0.1,
    "epoch": 0.25,
}


class Mischief:
    """What strikes one machine: asked at every point of its way."""

    def __init__(
        self, machine: str, weather: Weather, draw: random.Random, now: Callable[[], float]
    ) -> None:
        self.machine = machine
        self.armed = False  # only while the machine's own process runs
        self.points = 0
        self.once: list[tuple[str, str, BaseException]] = []  # at the next such point and name
        self.at: dict[int, BaseException] = {}  # what to raise at points of these numbers
        self._weather = weather
        self._draw = draw
        self._now = now
        self._crash = weather.crash.get(machine, 0.0)
        self._eio = weather.eio.get(machine, 0.0)

    @property
    def is_full(self) -> bool:
        """Whether the machine's disk has no room now."""
        now_s = self._now()
        full = any(s.covers(self.machine, now_s) for s in self._weather.full)
        return full and not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether all faults are over."""
        return self._now() >= self._weather.until_s

    def strike(self, point: str, name: str) -> None:
        """Raise Crash or OSError, or do nothing."""
        if not self.armed:
            return
        self.points += 1
        fault = self.at.get(self.points) or self._planned(point, name)
        if fault is not None and (isinstance(fault, Crash) or point in CHANGES | READS):
            raise fault
        now_s = self._now()
        if now_s >= self._weather.until_s:
            return
        if point not in READS and self._draw.random() < self._crash:
            raise Crash(f"{self.machine} at {point}")
        if point in CHANGES and any(s.covers(self.machine, now_s) for s in self._weather.read_only):
            raise OSError(errno.EROFS, "read-only file system")
        if self.is_full and (
            point in NEEDS_ROOM or (point == "fsync" and self._draw.random() < 0.2)
        ):
            raise OSError(errno.ENOSPC, "no space left on device")
        if (point in CHANGES or point in READS) and self._draw.random() < self._eio:
            raise OSError(errno.EIO, "input/output error")

    def _planned(self, point: str, name: str) -> BaseException | None:
        for plan in self.once:
            if point == plan[0] and re.search(plan[1], name):
                self.once.remove(plan)
                return plan[2]
        return None
