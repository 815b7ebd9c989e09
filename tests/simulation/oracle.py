"""What must be so, whatever struck: checked at every publish, every turn and at the end.

The oracle shares no code with what it judges where that would make the judgement empty:
sums are made again from the trainings with Python's integers, in the order of the receipts.
"""

from collections import defaultdict
from typing import Any

import msgspec
import numpy as np

from broker_bridge.link.base import Message
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire import batch, messages, weights
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.envelope import sha256
from broker_bridge.wire.messages import Ack, Announcement, Busy, Go, Init, Join
from broker_bridge.wire.topics import DownTopic, Topics, UpTopic
from server.aggregation.optimisers import FedAdam, FedAvg, ServerOptimiser
from server.store.rows import Model, Round
from tests.simulation.machines import FEDERATION, TASK, Device, Server
from tests.simulation.work import Trainings

__all__ = ["Oracle", "ViolationError"]

SIGNATURE_BYTES = 64
REJECTS_KINDS_MAX = 201


class ViolationError(AssertionError):
    """A promise was broken."""


def demand(true: Any, sentence: str) -> None:
    if not true:
        raise ViolationError(sentence)


class Oracle:
    """Watches one federation."""

    def __init__(self, server: Server, devices: list[Device], trainings: Trainings) -> None:
        self._server = server
        self._devices = {device.name: device for device in devices}
        self._trainings = trainings
        self._topics = Topics(FEDERATION)
        self._opened: dict[int, bytes] = {}
        self._unnoted: list[str] = []  # announced before the file of the highest round knew
        self._opened_s: dict[int, float] = {}
        self._ended: set[int] = set()
        self._highest = 0
        self._said: dict[str, int] = defaultdict(int)
        self._encs: dict[bytes, bytes] = {}
        self._sealed: dict[tuple[Any, ...], bytes] = {}
        self._blobs: dict[tuple[Any, ...], set[bytes]] = defaultdict(set)
        self._promised: set[tuple[int, str, bytes]] = set()
        self.revoked: dict[str, int] = {}  # by device: the newest round that had ended by then
        self._barred: dict[str, int] = {}  # by device: the first fleet key that it must not have
        self._epochs_s: dict[int, float] = {}  # when a fleet key was first announced
        self.story: list[str] = []
        self.receipts = 0

    # ── at every publish ────────────────────────────────────────────────────────────────

    def observe(self, message: Message) -> None:
        """Judge what somebody just said."""
        match self._topics.parse(message.topic):
            case "round":
                self._announced(message.payload)
            case "task" | "model" if message.payload:
                header = chunk_header(message.payload)
                if header.count > 1:
                    key = (header.transfer, header.count, header.index, len(message.payload))
                    self._once_for_each_fleet_key(key, message.payload)
            case UpTopic(device=device, kind="data"):
                header = chunk_header(message.payload)
                key = (self._encs[header.transfer], header.index)
                self._tell(f"{device} sends chunk {header.index} of {header.transfer.hex()}")
                self._once(key, message.payload)
            case UpTopic(device=device, kind="join" | "init" as kind):
                types: Any = Join if kind == "join" else Init
                self._asked(device, messages.decode(message.payload[SIGNATURE_BYTES:], types))
            case DownTopic(device, "ack"):
                ack: Ack = messages.decode(batch.split(message.payload).payload, Ack)
                self._tell(f"server tells {device}: {ack.status} {ack.upload.hex()} {ack.reason}")
                if ack.status == "accepted":
                    self._promised.add((ack.round, device, ack.upload))
            case DownTopic(device, "go"):
                go: Any = messages.decode(message.payload[SIGNATURE_BYTES:], Go | Busy)
                self._tell(f"server tells {device}: {type(go).__name__} {go}")
            case _:
                self._tell(f"{message.topic} {message.payload[:120]!r}")

    def _announced(self, signed: bytes) -> None:
        payload = signed[SIGNATURE_BYTES:]
        said: Announcement = messages.decode(payload, Announcement)
        self._tell(f"server announces round {said.round} {said.state}, model {said.model_version}")
        demand(said.round >= self._highest, f"round {said.round} after round {self._highest}")
        noted, coordinator = self._noted(), self._server.coordinator
        has_room = coordinator is None or not coordinator._trouble
        if noted < said.round and has_room:  # without room a start goes on with what is open
            self._unnoted.append(f"round {said.round}, when that file might know {noted}")
        self._highest = said.round
        self._epochs_s.setdefault(said.fleet_epoch, self._server.broker.now_s)
        if said.state == "closed":
            self._ended.add(said.round)
            return
        digest = sha256(payload)
        demand(said.round not in self._ended, f"round {said.round} was opened again after its end")
        if said.round not in self._opened:
            self._opened_s[said.round] = self._server.broker.now_s
        same = self._opened.setdefault(said.round, digest) == digest
        demand(same, f"round {said.round} was opened in two ways")

    def _noted(self) -> int:
        """The highest round that the server's second file would know if the power went now."""
        line = self._server.disk.durable(self._server.home.state / "highest-round")
        return 0 if line is None else int(line.split()[0])

    def _asked(self, device: str, said: Join | Init) -> None:
        self._tell(f"{device} says {type(said).__name__} for round {said.round}")
        known = self._devices[device].remembered()
        demand(known.round >= said.round, f"{device} speaks of a round it may forget")
        demand(said.round >= self._said[device], f"{device} went back to round {said.round}")
        self._said[device] = said.round
        if isinstance(said, Init):
            self._encs[said.upload] = said.enc

    def _once(self, key: tuple[Any, ...], sealed: bytes) -> None:
        """One key and nonce, one ciphertext."""
        demand(self._sealed.setdefault(key, sealed) == sealed, "a nonce was used twice")

    def _once_for_each_fleet_key(self, key: tuple[Any, ...], sealed: bytes) -> None:
        """The same content is one ciphertext under each fleet key there was."""
        found = self._blobs[key]
        found.add(sealed)
        demand(len(found) <= len(self._server.home.made), "a nonce was used twice")

    def _tell(self, what: str) -> None:
        self.story.append(f"{self._server.broker.now_s:8.2f}  {what}")

    # ── at every turn ───────────────────────────────────────────────────────────────────

    def check_bounds(self) -> None:
        """What is held is no more than the devices there are can account for."""
        server, most = self._server, len(self._devices)
        if server.ledger is None or server.coordinator is None:
            return
        open_round = server.ledger._open
        update_bytes = len(server.ledger.model_bytes) + 1000
        held = server.ledger._spool.bytes_held
        demand(open_round is None or len(open_round.uploads) <= most, "more uploads than devices")
        demand(held <= most * update_bytes, f"{held} bytes in the spool")
        this = server.coordinator._round
        demand(this is None or this.places <= most, "more places than devices")
        demand(len(server.coordinator.rejects) <= REJECTS_KINDS_MAX, "too many kinds of rejects")

    # ── when somebody is shut out ───────────────────────────────────────────────────────

    def shut_out(self, device: str) -> None:
        """From now on no model may hold anything of this device."""
        with self._server.database.database.reading() as tx:
            this, highest = tx.current_round(), tx.highest_round()
        self._barred.setdefault(device, self._server.home.keys().fleet_epoch)
        self.revoked.setdefault(device, highest if this is None else this.number - 1)

    def _is_shut_out(self, device: str, number: int) -> bool:
        return device in self.revoked and number > self.revoked[device]

    # ── at the end ──────────────────────────────────────────────────────────────────────

    def check_end(self) -> None:
        """The models are those of an undisturbed run, and every receipt is in them."""
        with self._server.database.database.reading() as tx:
            last = tx.latest_run()
            demand(
                last is not None and last.id <= self._server.weather.runs, "a start began two runs"
            )
            rounds = [r for run in range(1, last.id + 1) for r in tx.rounds_of(run)]
            receipts = {r.number: tx.receipts(r.number, status="accepted") for r in rounds}
            models = {m.version: m for m in tx.models(limit=1000)}
        demand(not self._unnoted, f"announced before the second file knew: {self._unnoted}")
        demand(all(r.round_key is None for r in rounds), "the key of a round outlived it")
        kept = {(r.round, r.device, r.upload) for rs in receipts.values() for r in rs}
        self.receipts = len(kept)
        for number, device, _ in kept:
            demand(not self._is_shut_out(device, number), f"{device} was revoked, and is counted "
                   f"in round {number}")  # fmt: skip
        for number, device, upload in self._promised - kept:
            if self._is_shut_out(device, number):
                continue
            raise ViolationError(f"{device} has a receipt for {upload.hex()} in round {number}; "
                            "the server has not")  # fmt: skip
        self._follow(rounds, receipts, models)
        self._check_fleet_keys()
        demand(all(r.fleet_key is None for r in rounds), "a round's fleet key outlived it")
        spool = self._server.disk.names(self._server.home.state / "spool")
        demand(not spool, f"the spool still holds {spool}")
        for this in rounds:
            spared = self._opened_s.get(this.number, 0.0) > self._server.weather.until_s + 20.0
            demand(not spared or this.status == "closed", f"round {this.number} was spared all "
                   "faults, and abandoned all the same")  # fmt: skip

    def _check_fleet_keys(self) -> None:
        """Everybody has the newest one that was announced a while ago; who was revoked has none
        that is newer than that."""
        newest = max(self._epochs_s, default=0)
        said_s = max(self._epochs_s.get(newest, 0.0), self._server.weather.until_s)
        for name, device in self._devices.items():
            has = device.fleet_epoch()
            if name in self._barred:
                demand(has < self._barred[name], f"{name} was revoked, and has fleet key {has}")
            elif self._server.broker.now_s > said_s + 60.0:
                demand(has >= newest, f"{name} never got fleet key {newest}")

    def _follow(self, rounds: list[Round], receipts: Any, models: dict[int, Model]) -> None:
        _, model = decode_task(TASK)
        optimiser: ServerOptimiser = (
            FedAdam(learning_rate=1.0)
            if self._server.config.aggregation.optimiser == "fedadam"
            else FedAvg(learning_rate=1.0)
        )
        state = optimiser.init(weights.specs_of(model))
        self._check_model(models[1], model)
        for this in rounds:
            if this.model_after is None:
                continue
            demand(receipts[this.number], f"round {this.number} closed without an update")
            mean = self._mean(model, receipts[this.number])
            model, state = optimiser.apply(model, mean, state)
            self._check_model(models[this.model_after], model)

    def _mean(self, model: Any, receipts: Any) -> dict[str, Any]:
        """Σ w·rint(Δ·2^F) / Σ w · 2^-F, with integers that have no end."""
        scale, total = 2**32, sum(r.examples for r in receipts)
        sums = {name: [0] * array.size for name, array in model.items()}
        for receipt in receipts:
            number = int(msgspec.json.decode(receipt.metrics_json)["training"])
            device, new = self._trainings.done[number]
            demand(device == receipt.device, f"{receipt.device} is counted for {device}")
            for name, into in sums.items():
                delta = np.subtract(new[name], model[name], dtype=np.float32).reshape(-1)
                for place, value in enumerate(delta.tolist()):
                    into[place] += receipt.examples * round(value * scale)
        return {
            name: np.array([float(s) / float(total) / scale for s in into], np.float32).reshape(
                model[name].shape
            )
            for name, into in sums.items()
        }

    def _check_model(self, row: Model, model: Any) -> None:
        found = self._server.disk.read(
            self._server.home.state / f"models/{row.version:06d}.weights"
        )
        demand(sha256(found) == row.digest, f"model {row.version} is not what its row says")
        demand(found == weights.encode(model), f"model {row.version} is not the exact mean")
