"""One federation from start to end, in virtual time, with the weather of its seed."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.wire.enrolment import sign_server_identity
from broker_bridge.wire.envelope import KemKey, SignKey
from broker_bridge.wire.messages import ServerIdentity
from broker_bridge.wire.topics import Topics
from device_client import identity as identities
from device_client.identity import Identity
from server.fleet.home import ServerKeys
from server.store.rows import Device as DeviceRow
from tests.simulation.disk import SimulatedDatabase
from tests.simulation.machines import FEDERATION, Device, Machine, Parts, Server
from tests.simulation.network import LARGE_PACKET_BYTES, PACKET_BYTES, WatchedBroker
from tests.simulation.oracle import Oracle, ViolationError, demand
from tests.simulation.weather import OUTAGE_S, YEAR_S, Weather
from tests.simulation.work import Trainings

__all__ = ["Federation", "Outcome", "simulate"]

TURNS_MAX = 200_000


@dataclass(frozen=True)
class Outcome:
    """How a federation ended."""

    seed: int
    status: str  # of the run: done or failed
    rounds: int
    receipts: int
    ended: int  # processes
    points: int  # at which something could strike
    virtual_s: float
    fingerprint: str  # of everything that was said


class Operator:
    """Starts one run, and asks again until it is answered."""

    def __init__(self, broker: WatchedBroker, command: dict[str, object], start_s: float) -> None:
        self._broker = broker
        self._link = broker.connect("midge-operator")
        self._topics = Topics(FEDERATION)
        self._link.subscribe([self._topics.ctl_reply])
        self._command = command
        self._ask_at_s = start_s
        self._attempt = 0
        self.resume_at_s = 1e9
        self._resumed = False
        self.answered = False

    def turn(self) -> bool:
        event = self._link.receive(0)
        if isinstance(event, Message):
            self._link.ack(event)
            self._hear(json.loads(event.payload))
        if not self.answered and self._broker.now_s >= self._ask_at_s:
            self._ask_at_s = self._broker.now_s + 5.0
            data = json.dumps(self._command | {"id": f"start-{self._attempt}"}).encode()
            self._link.publish(self._topics.ctl, data)
        if self._broker.now_s >= self.resume_at_s:
            self.resume_at_s = self._broker.now_s + 5.0
            self._resumed = True  # an earlier one may still be answered before it
            self.say("resume")
        return event is not None

    def say(self, command: str) -> None:
        self._link.publish(self._topics.ctl, json.dumps({"cmd": command}).encode())

    def _hear(self, reply: dict[str, object]) -> None:
        if reply.get("cmd") == "resume" and self._resumed:
            self.resume_at_s = 1e9
        if reply.get("id") != f"start-{self._attempt}":
            return
        if reply["ok"] or " is open" in str(reply["error"]):
            self.answered = True
        else:
            self._attempt += 1

    def start_again(self) -> None:
        """Begin another run."""
        self.answered, self._attempt = False, self._attempt + 1


class Federation:
    """A server, its devices, their broker, and an operator who starts a run."""

    def __init__(self, weather: Weather, parts: Parts | None = None) -> None:
        parts = parts or Parts()
        self.weather = weather
        self.draw = random.Random(f"federation {weather.seed}")
        self.broker = WatchedBroker(
            draw=self.draw, loss=weather.loss, repeat=weather.repeat, delay=weather.delay,
            reorder=weather.reorder,
        )  # fmt: skip
        if weather.whole:
            self.broker.limits = LinkLimits(LARGE_PACKET_BYTES, 20)
        trainings = Trainings()
        keys, identities_ = _keys(weather, self.draw.randbytes)
        self.server = Server(self.broker, weather, parts, keys)
        _enrol(self.server.database, identities_)
        self.devices = [
            Device(each.device, self.broker, weather, parts, each, trainings)
            for each in identities_
        ]
        self.machines: list[Machine] = [self.server, *self.devices]
        self.oracle = Oracle(self.server, self.devices, trainings)
        self.broker.observe = self.oracle.observe
        command: dict[str, object] = {
            "cmd": "start", "rounds": weather.rounds, "quorum": weather.quorum,
            "deadline_s": weather.deadline_s,
        }  # fmt: skip
        self.operator = Operator(
            self.broker,
            command | ({"target": weather.target} if weather.target else {}),
            weather.start_s,
        )
        self._ahead = list(weather.events)
        self._calm = False
        self._ended_s = 1e9

    def run(self) -> Outcome:
        """Let it happen. Raises ViolationError, or whatever a process raised that it must not."""
        step_s = 0.25
        for _ in range(TURNS_MAX):
            heard = self.operator.turn()
            for machine in self.draw.sample(self.machines, len(self.machines)):
                heard = machine.turn() or heard
                self.oracle.check_bounds()
            if heard:
                step_s = 0.25
                continue
            if self._over():
                self.oracle.check_end()
                return self._outcome()
            self._happen(step_s)
            step_s = min(step_s * 2, 2.0)
        raise ViolationError("it never came to rest")

    def _happen(self, step_s: float) -> None:
        """Let time pass, and do what is due."""
        self.broker.advance(step_s)
        now_s = self.broker.now_s
        while self._ahead and self._ahead[0][0] <= now_s:
            _, event, name = self._ahead.pop(0)
            self._strike(event, next(m for m in self.machines if m.name == name))
        if not self._calm and now_s >= self.weather.until_s:
            self._calm = True
            self.broker.calm()
            self.operator.resume_at_s = now_s + 5.0
        last = self.server.ended[-1] if self.server.ended else "nothing"
        demand(now_s < self._patience_s, f"it goes on long after the last fault; {last}")

    @property
    def _patience_s(self) -> float:
        """One round may have been spoilt; the rest have no excuse."""
        # A target that cannot be reached any more is waited for until the deadline.
        round_s = 60.0 + (self.weather.deadline_s if self.oracle.revoked else 0.0)
        return (
            self.weather.until_s
            + self.weather.deadline_s
            + round_s * self.weather.rounds * self.weather.runs
            + 60.0
        )

    def _strike(self, event: str, machine: Machine) -> None:
        self.oracle._tell(f"── {event} {machine.name}")
        match event:
            case "amnesia":
                self.broker.leave(self.draw.uniform(0, 10), keep=False)
            case "away":
                away_s = min(self.draw.uniform(0, 60), self.weather.until_s - self.broker.now_s)
                self.broker.leave(away_s, keep=self.draw.random() < 0.5)
            case "outage":
                self.broker.leave(OUTAGE_S, keep=self.draw.random() < 0.5)
            case "drop" if machine.link is not None:
                machine.link.drop(away_s=self.draw.uniform(0, 20))
            case "kill" | "power" if machine.is_up:
                machine.crash(event, power=event == "power")
            case "copy":
                self.broker.copy()
            case "rewind":
                self.broker.rewind(self.draw.uniform(0, 10))
            case "corrupt":
                self.broker.corrupt()
            case "pause" | "resume" | "stop":
                self.operator.say(event)
            case "limits":
                packet_bytes = self.draw.choice((1300, PACKET_BYTES, LARGE_PACKET_BYTES))
                self.broker.limits = LinkLimits(packet_bytes, 20)
                self.broker.leave(1.0, keep=self.draw.random() < 0.5)
            case "replay":
                self.broker.replay()
            case "revoke" if isinstance(machine, Device) and self._can_spare(machine):
                self.revoke(machine.name)
            case "epoch":
                self.server.home.renew_fleet_key(self.draw.randbytes)
            case "clock":
                machine.wall_jump_s = self.draw.uniform(-10 * YEAR_S, 10 * YEAR_S)

    def _can_spare(self, device: Device) -> bool:
        """Whether a trainer is left without this one: a run of nobody would never end."""
        left = {d.name for d in self.devices if d.role == "train"} - {*self.oracle.revoked}
        return len(left - {device.name}) >= 1

    def revoke(self, name: str) -> None:
        """What `midge device revoke` leaves in the database, whether or not a server runs."""
        with self.server.database.database.transaction() as tx:
            tx.set_device_status(name, "revoked")
            tx.count_fleet_change()
        self.server.home.renew_fleet_key(self.draw.randbytes)
        self.oracle.shut_out(name)

    def _over(self) -> bool:
        """Whether the faults and the run are over, and every device has heard so."""
        if not self._calm or not self.server.is_up or not self.operator.answered:
            return False
        with self.server.database.database.reading() as tx:
            run = tx.latest_run()
        if run is None or run.status not in ("done", "failed", "stopped"):
            return False
        if run.id < self.weather.runs:
            self.operator.start_again()
            return False
        self._ended_s = min(self._ended_s, self.broker.now_s)
        return self.broker.now_s >= self._ended_s + 3.0  # what a full disk put off is done by now

    def _outcome(self) -> Outcome:
        with self.server.database.database.reading() as tx:
            run = tx.latest_run()
            assert run is not None
            rounds = [r for number in range(1, run.id + 1) for r in tx.rounds_of(number)]
        story = "\n".join(self.oracle.story)
        return Outcome(
            self.weather.seed, run.status, len(rounds), self.oracle.receipts,
            sum(len(m.ended) for m in self.machines),
            sum(m.mischief.points for m in self.machines), self.broker.now_s,
            hashlib.sha256(story.encode()).hexdigest(),
        )  # fmt: skip


def simulate(seed: int, parts: Parts | None = None) -> Outcome:
    """Run one seed."""
    return Federation(Weather.of(seed), parts).run()


def _keys(weather: Weather, draw: Callable[[int], bytes]) -> tuple[ServerKeys, list[Identity]]:
    root, sign, kem, fleet_key = (draw(32) for _ in range(4))
    said = ServerIdentity(
        federation=FEDERATION, sign_public=SignKey.from_seed(sign).public,
        kem_public=KemKey.from_seed(kem).public, issued_at=0.0,
    )  # fmt: skip
    server = ServerKeys(
        federation=FEDERATION, sign_seed=sign, kem_seed=kem,
        root_public=SignKey.from_seed(root).public,
        identity=sign_server_identity(SignKey.from_seed(root), said), fleet_epoch=1,
        fleet_key=fleet_key,
    )  # fmt: skip
    return server, [
        Identity(
            federation=FEDERATION, device=f"d{number}", broker_host="broker", broker_port=1,
            root_public=server.root_public, server_sign=server.sign.public,
            server_kem=server.kem.public, keys=identities.new_keys(draw), psk=draw(32),
            fleet_epoch=1, fleet_key=fleet_key, ca_pem="", certificate_pem="",
        )
        for number in range(weather.devices)
    ]  # fmt: skip


def _enrol(database: SimulatedDatabase, found: list[Identity]) -> None:
    with database.database.transaction() as tx:
        for each in found:
            tx.add_device(
                DeviceRow(
                    name=each.device,
                    sign_public=each.keys.sign.public,
                    kem_public=each.keys.kem.public,
                    tls_public=each.keys.tls_public,
                    psk=each.psk,
                    enrolled_at=0.0,
                )
            )
