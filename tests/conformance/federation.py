"""A whole federation in this process over a real broker, its every packet read on the way."""

import json
import time
from pathlib import Path
from typing import Any

from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.messages import Presence, ServerPresence
from device_client.agent import Agent
from tests.conformance.brokers import Broker, Version
from tests.conformance.wire import Said, Tap
from tests.fleets import TOPICS, Listener, World, wait_until, write_samples

NAMES = ("ann", "ben")
QUIET_S = 0.3


class Wires:
    """Connections to a broker, each over a tap of its own; the clock is the real one."""

    def __init__(
        self, port: int, *, protocol: Version, packet_bytes_max: int | None = None,
        inflight_max: int | None = None,
    ) -> None:  # fmt: skip
        self._port, self._protocol = port, protocol
        self._packet_bytes_max, self._inflight_max = packet_bytes_max, inflight_max
        self._began_s = time.monotonic()
        self.wills: dict[str, Message] = {}  # of those who connect without naming one
        self.open: list[tuple[str, PahoLink, Tap]] = []

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began_s

    def connect(self, name: str, *, will: Message | None = None, session_s: int = 600) -> PahoLink:
        tap = Tap(self._port)
        # Only the server is told how large a packet may be: it tells the devices.
        is_server = name == "midge-server"
        window = LIMITS.server_inflight_max if is_server else LIMITS.inflight_max
        link = PahoLink.open(
            "127.0.0.1", tap.port, client_id=name, will=will or self.wills.get(name),
            session_s=session_s, protocol=self._protocol, backoff_first_s=0.05,
            backoff_max_s=0.3, wait_s=30, inflight_max=self._inflight_max or window,
            packet_bytes_max=self._packet_bytes_max if is_server else None,
        )  # fmt: skip
        self.open.append((name, link, tap))
        return link

    def cut(self, link: PahoLink) -> None:
        """End a connection as a power cut does."""
        tap = next(tap for _, each, tap in self.open if each is link)
        tap.blocked = True
        tap.cut()

    def said(self) -> dict[str, Said]:
        """What each client said."""
        return {name: tap.said for name, _, tap in self.open}

    def close(self) -> None:
        for _, link, tap in self.open:
            link.close()
            tap.__exit__()


class Federation(World):
    """A `World` over a broker that was started for it alone."""

    server_will = Message(TOPICS.srv, messages.encode_json(ServerPresence(state="lost")), True)
    broker: Any
    engine = ""

    def __init__(
        self, folder: Path, broker: Broker, *, protocol: Version, packet_bytes_max: int,
        inflight_max: int | None = None,
    ) -> None:  # fmt: skip
        self.process = broker

        def wires(**_: Any) -> Any:
            return Wires(
                broker.port, protocol=protocol, packet_bytes_max=packet_bytes_max,
                inflight_max=inflight_max,
            )  # fmt: skip

        super().__init__(folder, make_broker=wires)
        assert self.link.flush(20), "what the server retained lies there"
        self.eye = Listener(
            self.broker.connect("eye"), (TOPICS.srv, TOPICS.all_states, TOPICS.all_up(0))
        )
        self.wait_for_state(TOPICS.srv, "online")

    def device(self, name: str) -> Agent:
        """A device whose samples depend on its name alone."""
        lost = Presence(state="lost", boot=1, role="train")
        state = Message(TOPICS.state(name), messages.encode_json(lost), True)
        self.broker.wills[name] = state
        return self.agent(name, data=samples(self.folder, name))

    def tell_raw(self, payload: bytes) -> dict[str, Any]:
        self.operator.publish(TOPICS.ctl, payload)
        found: list[Message] = []

        def answered() -> bool:
            found.extend(m for m in self.read_operator() if m.topic == TOPICS.ctl_reply)
            return bool(found)

        self.until(answered, "an answer")
        answer = json.loads(found[-1].payload)
        assert isinstance(answer, dict)
        return answer

    def wait_for_state(self, topic: str, state: str) -> Message:
        """Wait until the last word on `topic` is `state`."""

        def last() -> Message | None:
            words = [m for m in self.eye.hear() if m.topic == topic]
            is_it = bool(words) and json.loads(words[-1].payload)["state"] == state
            return words[-1] if is_it else None

        found = self.until(last, f"{state} on {topic}")
        assert isinstance(found, Message)
        return found

    def ready(self, *names: str) -> None:
        """Wait until the server knows these devices."""
        self.until(lambda: set(names) <= set(self.coordinator.online()), f"{names} are there")

    def finish(self) -> dict[str, bytes]:
        """Let the run end; return the models."""
        self.until(lambda: self.coordinator.run is None, "the run ends")
        return models(self)

    def alone(self, agent: Agent) -> None:
        """One turn of a device while the server does nothing."""
        agent.turn(agent._link.receive(0.01))

    def step(self, agent: Agent) -> None:
        """One turn of the server, and one of a device."""
        self.service.turn(self.link.receive(0.01))
        self.alone(agent)

    def power_cut(self, agent: Agent) -> None:
        """A device is gone without a word; its folder is left."""
        self.agents.remove(agent)
        self.broker.cut(agent._link)
        agent._stop("the test pulled the plug")

    def quiet(self, *agents: Agent) -> None:
        """Let the server, and these devices, take in all that is on its way."""
        until = time.monotonic() + QUIET_S
        while time.monotonic() < until:
            events = [self.link.receive(0.01), *(agent._link.receive(0.01) for agent in agents)]
            self.service.turn(events[0])
            for agent, event in zip(agents, events[1:], strict=True):
                agent.turn(event)
            if any(events):
                until = time.monotonic() + QUIET_S

    def chunks(self, name: str) -> list[tuple[bytes, int, int]]:
        """The chunks of updates that `name` sent, in order: upload, index, how many there are."""
        heads = [
            chunk_header(m.payload)
            for m in self.eye.hear()
            if m.topic == TOPICS.up(0, name, "data")
        ]
        return [(head.transfer, head.index, head.count) for head in heads]

    def close(self) -> None:
        super().close()
        self.broker.close()


def samples(folder: Path, name: str) -> str:
    """Made from the name alone."""
    return write_samples(folder / f"{name}.npz", seed=sum(name.encode()))


def models(world: World) -> dict[str, bytes]:
    """Every model file, by name."""
    folder = world.home.state / "models"
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def in_memory(folder: Path, *, rounds: int) -> dict[str, bytes]:
    """The models that these devices make over the in-memory link."""
    world = World(folder)
    for name in NAMES:
        world.agent(name, data=samples(folder, name))
    world.settle()
    assert world.tell(cmd="start", rounds=rounds, target=2)["ok"]
    wait_until(lambda: (world.settle(), world.coordinator.run is None)[1], "the run ends")
    found = models(world)
    world.close()
    return found
