"""The devices of this process, and the loop that turns them.

A cut ends a device's connection without a word, and the device starts again from its folder a
while later.
"""

import contextlib
import heapq
import itertools
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker_bridge.link.base import Connected, Message
from broker_bridge.link.poller import PolledLink, Poller
from broker_bridge.link.session_settings import SessionSettings
from broker_bridge.link.tls import client_context
from broker_bridge.task.taskfile import Plan
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import client_id
from broker_bridge.wire.messages import Blob, Presence
from broker_bridge.wire.topics import Topics
from device_client import events as ev
from device_client import identity as identities
from device_client.agent import Agent
from device_client.identity import Identity
from device_client.journal import Journal
from device_client.participant import State
from device_client.simulation.fate import Fate
from device_client.simulation.members import Members
from device_client.simulation.pretence import FastTrainer, PacedBackground
from device_client.trainer import LocalTrainer

__all__ = ["Swarm"]

_BLOBS_SHARED_MAX = 4
_OPENED_A_TURN_MAX = 10  # a TLS context takes a millisecond or two to make


class SimulatedAgent(Agent):
    """A device that shares the bytes of task and model with its neighbours in the process."""

    shared: dict[bytes, bytes]

    def _fetched(self, kind: str, blob: Blob, content: bytes) -> list[ev.Event]:
        content = self.shared.setdefault(blob.digest, content)
        while len(self.shared) > _BLOBS_SHARED_MAX:
            self.shared.pop(next(iter(self.shared)))
        return super()._fetched(kind, blob, content)


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
        round_ = agent.round
        self.background.takes_s = fate.train_for_s(name, round_)
        agent.turn(event)
        round_ = agent.round
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
