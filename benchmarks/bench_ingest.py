"""Ingest: sealed updates through a real mosquitto into a durable, summed state, by size.

What is timed: from the first chunk sent to the last receipt heard. A receipt means that
the update was opened, checked and summed, and that it and its receipt are on the disk.
Server, broker and sender are processes of their own, as shipped: mutual TLS, ACL, QoS 1.

Beside it, in the same run and through the same broker from the same sender: a bare paho
subscriber that looks at nothing and keeps nothing; the same subscriber, answering each
update as a receipt does, which is the floor under whatever gives receipts; and, on one core
alone, opening the same chunks (XChaCha20-Poly1305), writing and syncing one file, and
copying memory. A fraction is that of one repeat, in which both had the same machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.bench_round import cpu_seconds
from benchmarks.fleet import DENSE100K, Fleet
from benchmarks.machine import Spread, header, is_quick, table
from broker_bridge.link.base import Message
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.task.taskfile import decode_task, encode_task
from broker_bridge.wire import batch, messages, weights
from broker_bridge.wire.envelope import ChunkKey, KemKey, random_bytes, sha256, verify
from broker_bridge.wire.messages import Ack, Announcement, Go, Init, Join, Need, Presence
from broker_bridge.wire.topics import DownTopic
from broker_bridge.wire.update import Binding, SealedUpdate, seal_update
from device_client.identity import Identity
from device_client.simulation.members import Members
from server.simulation.members import enrol_members

MB = 1_000_000
TARGET = 0.5
# Bytes of one update, and how many of them a repeat sends.
SIZES = ((10_000, 1500), (100_000, 400), (1_000_000, 60), (10_000_000, 8))
REPEATS = 15
ANSWER_BYTES = 130  # a receipt: its signature, and what it says
_SUBSCRIBER = f"""
import ssl, sys, threading, time
import paho.mqtt.client as mqtt
port, ca, cert, key, want = int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
answers, pending = "answer" in sys.argv, []
got = first = 0
done = threading.Event()
def on_message(client, userdata, message):
    global got, first
    if not got:
        first = time.perf_counter()
    got += 1
    if answers and message.topic.endswith("/last"):
        pending.append(client.publish(
            "midge/v1/answers/" + message.topic.split("/")[-2], bytes({ANSWER_BYTES}), 1))
    if got == want:
        print(time.perf_counter() - first, flush=True)
        done.set()
def on_connect(client, *_):
    client.subscribe("midge/v1/bare/#", 1)
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="bare", protocol=mqtt.MQTTv5)
client.tls_set(ca, cert, key)
client.on_message, client.on_connect = on_message, on_connect
client.on_subscribe = lambda *_: print("ready", flush=True)
client.connect("127.0.0.1", port)
client.loop_start()
done.wait(300)
for each in pending:
    each.wait_for_publish(30)
client.disconnect()
"""


@dataclass(frozen=True)
class Ready:
    """An update that waits for the start."""

    identity: Identity
    init: Init
    sealed: SealedUpdate


def task_of(size: int, folder: Path) -> Path:
    """Write a task whose update has `size` bytes; its network is another's and is never run."""
    plan, _ = decode_task(DENSE100K.read_bytes())
    tensors = {"w": np.zeros((size - 40) // 4, np.float32)}
    data = weights.encode(tensors)
    task = msgspec.structs.replace(
        plan.task, name=f"size{size}", weights=weights.specs_of(tensors), trainable_count=1,
        weights_digest=sha256(data).hex(), weights_bytes=len(data), optimiser_state=(),
    )  # fmt: skip
    path = folder / f"size{size}.task"
    path.write_bytes(encode_task(task, plan.tflite, data))
    return path


class Sender:
    """Plays many devices over one connection, with their keys."""

    def __init__(self, fleet: Fleet, identities: Sequence[Identity]) -> None:
        self.fleet = fleet
        self.topics = fleet.topics
        self.identities = {each.device: each for each in identities}
        self.link = PahoLink.open(
            "127.0.0.1", fleet.port, client_id="sender", tls=fleet.home.tls("server"),
            session_s=0, send_queue_bytes_max=1 << 30,
        )  # fmt: skip
        self.link.subscribe([self.topics.round, "midge/v1/demo/down/+/+", self.topics.ctl_reply])
        self.announcement: Announcement | None = None
        self.digest = b""
        self.server_sign = identities[0].server_sign

    def show(self) -> None:
        """Be there, so that a round can open."""
        presence = messages.encode_json(Presence(state="ready", boot=1))
        self.link.publish(self.topics.state(next(iter(self.identities))), presence, retain=True)

    def hear(self, timeout_s: float = 30.0) -> tuple[str, object] | None:
        """The next message that says something: a device and what it was told, or a round."""
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            event = self.link.receive(0.2)
            if not isinstance(event, Message):
                continue
            self.link.ack(event)
            if event.topic == self.topics.ctl_reply:
                return "", json.loads(event.payload)
            if event.topic == self.topics.round:
                payload = verify(self.server_sign, "round demo", event.payload)
                self.announcement = messages.decode(payload, Announcement)
                self.digest = sha256(payload)
                continue
            place = self.topics.parse(event.topic)
            assert isinstance(place, DownTopic)
            if place.kind == "ack":
                return place.device, messages.decode(batch.split(event.payload).payload, Ack)
            kinds = {"go": Go, "need": Need}
            return place.device, messages.decode(event.payload[64:], kinds[place.kind])
        return None

    def command(self, **fields: object) -> None:
        """Send a command and wait for its reply."""
        self.link.publish(self.topics.ctl, json.dumps(fields).encode())
        while (heard := self.hear()) is not None:
            if heard[0] == "":
                assert heard[1]["ok"], heard  # type: ignore[index]
                return
        raise RuntimeError("the server did not answer")

    def prepare(self, size: int, count: int) -> list[Ready]:
        """Open a round, join it `count` times, and seal as many updates."""
        self.announcement = None
        self.command(
            cmd="start", task=f"size{size}", rounds=1, target=count + 1, quorum=1, deadline_s=3000
        )
        while self.announcement is None or self.announcement.state != "open":
            self.hear(0.3)
        names = list(self.identities)[:count]
        gos = self._ask(names, "join", Join(
            round=self.announcement.round, announcement=self.digest, samples=10,
            packet_bytes_max=61_440, inflight_max=20,
        ))  # fmt: skip
        noise = np.random.default_rng(1).normal(0, 1e-3, (size - 40) // 4).astype(np.float32)
        update = weights.encode({"w": noise})
        ready = [self._seal(self.identities[name], go, update) for name, go in gos.items()]
        self._ask_each({r.identity.device: r.init for r in ready}, "init")
        return ready

    def _seal(self, identity: Identity, go: object, update: bytes) -> Ready:
        assert isinstance(go, Go)
        assert self.announcement is not None
        sealed = seal_update(
            update, Binding("demo", identity.device, self.digest, go.upload),
            round_key=self.announcement.round_key, sender=identity.keys.kem, psk=identity.psk,
            ephemeral=KemKey.from_seed(random_bytes(32)), packet_bytes=go.packet_bytes,
        )  # fmt: skip
        init = Init(
            round=go.round, announcement=self.digest, upload=go.upload, enc=sealed.enc,
            total_bytes=len(update), body_bytes=sealed.layout.body_bytes, tags=sealed.tags,
            examples=10, train_s=0.1, metrics={"loss": 1.0},
        )  # fmt: skip
        return Ready(identity, init, sealed)

    def _ask(self, names: list[str], kind: str, message: object) -> dict[str, object]:
        return self._ask_each(dict.fromkeys(names, message), kind)

    def _ask_each(self, asked: dict[str, object], kind: str) -> dict[str, object]:
        """Send a signed message for each device; return what each was told."""
        answers: dict[str, object] = {}
        for start in range(0, len(asked), 500):
            some = dict(list(asked.items())[start : start + 500])
            for name, message in some.items():
                identity = self.identities[name]
                signed = messages.signed(identity.keys.sign, kind, identity.scope, message)
                self.link.publish(self.topics.up(0, name, kind), signed)
            while not some.keys() <= answers.keys():
                heard = self.hear()
                assert heard is not None, f"{len(answers)} of {len(asked)} answers to {kind}"
                answers[heard[0]] = heard[1]
        return answers

    def send(self, ready: list[Ready]) -> float:
        """Send every chunk of every update; return the seconds until the last receipt.

        What the receipts say is looked at afterwards: that is the devices' work, not the server's.
        """
        said: dict[str, bytes] = {}
        chunks = [
            (self.topics.up(0, r.identity.device, "data"), chunk)
            for r in ready
            for chunk in r.sealed.chunks
        ]
        started = time.perf_counter()
        self._publish(chunks)
        while len(said) < len(ready):
            event = self.link.receive(30.0)
            assert event is not None, f"{len(said)} of {len(ready)} receipts"
            if isinstance(event, Message):
                self.link.ack(event)
                said[event.topic] = event.payload
        taken = time.perf_counter() - started
        for each in ready:
            self._check_receipt(each, said[self.topics.down(each.identity.device, "ack")])
        return taken

    def _check_receipt(self, ready: Ready, signed: bytes) -> None:
        ack = messages.opened(self.server_sign, "ack", ready.identity.scope, signed, Ack)
        assert (ack.upload, ack.status) == (ready.init.upload, "accepted"), ack

    def _publish(self, chunks: list[tuple[str, bytes]]) -> None:
        for topic, chunk in chunks:
            while not self.link.room():
                self.link.flush(0.001)
            self.link.publish(topic, chunk)

    def bare(self, ready: list[Ready]) -> float:
        """Send the same chunks to a bare subscriber; return its seconds from first to last."""
        chunks = _bare_chunks(ready)
        with self._subscriber(len(chunks)) as process:
            self._publish(chunks)
            assert process.stdout is not None
            return float(process.stdout.readline())

    def answered(self, ready: list[Ready]) -> float:
        """The same, answering each update; return our seconds until the last answer."""
        chunks = _bare_chunks(ready)
        self.link.subscribe(["midge/v1/answers/+"])
        with self._subscriber(len(chunks), "answer"):
            started = time.perf_counter()
            self._publish(chunks)
            heard: set[str] = set()
            while len(heard) < len(ready):
                event = self.link.receive(30.0)
                assert event is not None, f"{len(heard)} of {len(ready)} answers"
                if isinstance(event, Message):
                    self.link.ack(event)
                    if event.topic.startswith("midge/v1/answers/"):
                        heard.add(event.topic)
            taken = time.perf_counter() - started
        self.link.unsubscribe(["midge/v1/answers/+"])
        return taken

    def _subscriber(self, want: int, *more: str) -> subprocess.Popen[str]:
        tls = self.fleet.home.tls("server")
        command = [sys.executable, "-c", _SUBSCRIBER, str(self.fleet.port), str(tls.ca),
                   str(tls.certificate), str(tls.key), str(want), *more]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        return process


def _bare_chunks(ready: list[Ready]) -> list[tuple[str, bytes]]:
    return [
        (f"midge/v1/bare/{i}/{'last' if chunk is r.sealed.chunks[-1] else 'more'}", chunk)
        for i, r in enumerate(ready)
        for chunk in r.sealed.chunks
    ]


# ── One core alone ──────────────────────────────────────────────────────────────────────


def opening_rate() -> float:
    """Bytes a second that one core decrypts, in chunks as they travel."""
    key, header_, body = ChunkKey(bytes(32)), bytes(24), bytes(61_000)
    sealed = [key.seal(i, body, header_) for i in range(500)]
    started = time.perf_counter()
    for i, each in enumerate(sealed):
        key.open_(i, each, header_)
    return 500 * len(body) / (time.perf_counter() - started)


def copy_rate() -> float:
    """Bytes a second that one core copies, 64 MB at a time."""
    source, target = np.ones(8 * MB), np.empty(8 * MB)
    started = time.perf_counter()
    for _ in range(10):
        np.copyto(target, source)
    return 10 * source.nbytes / (time.perf_counter() - started)


def disk_rate(folder: Path) -> float:
    """Bytes a second that go into one file of 64 MB, synced at its end."""
    data, path = os.urandom(64 * MB), folder / "disk"
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
    taken = time.perf_counter() - started
    path.unlink()
    return len(data) / taken


def slots_rate(folder: Path, at_once: int) -> float:
    """Bytes a second that go into a file in slots of 12 KiB, so many in a call, a sync for 256."""
    slot, path = bytes(12 * 1024), folder / "slots"
    started = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, 2048, at_once):
            os.pwritev(file.fileno(), [slot] * at_once, first * len(slot))
            if (first + at_once) % 256 == 0:
                os.fdatasync(file.fileno())
    taken = time.perf_counter() - started
    path.unlink()
    return 2048 * len(slot) / taken


# ── The table ───────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """What was measured of one size, in MB/s, repeat by repeat."""

    size: int
    ours: list[float]
    bare: list[float]
    answered: list[float]
    cpu_s: list[float]

    def fraction_of(self, others: list[float]) -> Spread:
        """What midge reached of what the others did in the same repeat."""
        return Spread.of([ours / other for ours, other in zip(self.ours, others, strict=True)])


def measure(sizes: Sequence[tuple[int, int]], repeats: int) -> list[Row]:
    """Run every size in one fleet, midge and bare paho in turn."""
    with tempfile.TemporaryDirectory(prefix="midge-bench-") as temporary:
        tasks = [task_of(size, Path(temporary)) for size, _ in sizes]
        with Fleet(*tasks) as fleet:
            members = Members.read(enrol_members(fleet.home, max(count for _, count in sizes)))
            identities = [members.identity(member) for member in members.members]
            sender = Sender(fleet, identities)
            try:
                sender.show()
                return [_measure_size(sender, size, count, repeats) for size, count in sizes]
            finally:
                sender.link.close()


def _measure_size(sender: Sender, size: int, count: int, repeats: int) -> Row:
    row = Row(size, [], [], [], [])
    for _ in range(repeats):
        ready = sender.prepare(size, count)
        sealed_mb = sum(len(c) for r in ready for c in r.sealed.chunks) / MB
        before = cpu_seconds([sender.fleet.server.pid])
        row.ours.append(sealed_mb / sender.send(ready))
        row.cpu_s.append((cpu_seconds([sender.fleet.server.pid]) - before) / count)
        sender.command(cmd="stop")
        row.bare.append(sealed_mb / sender.bare(ready))
        row.answered.append(sealed_mb / sender.answered(ready))
    return row


def main() -> None:
    """Print the tables."""
    header("Ingest: sealed, through mosquitto, opened, checked, summed, on disk, receipted")
    sizes = [(size, max(4, count // 4)) for size, count in SIZES] if is_quick() else SIZES
    rows = []
    for row in measure(sizes, 2 if is_quick() else REPEATS):
        ours, bare, floor = Spread.of(row.ours), Spread.of(row.bare), Spread.of(row.answered)
        rows.append([
            f"{row.size:,} bytes", f"{ours.median * MB / row.size:,.1f}", ours.text(digits=1),
            bare.text(digits=1), row.fraction_of(row.bare).text(digits=2),
            floor.text(digits=1), row.fraction_of(row.answered).text(digits=2),
            f"{Spread.of(row.cpu_s).median * 1000:,.2f} ms",
        ])  # fmt: skip
    table(["one update", "updates/s", "midge, MB/s", "bare paho, MB/s", "fraction",
           "paho that answers, MB/s", "fraction", "server CPU an update"], rows)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="midge-bench-") as folder:
        table(
            ["one core alone", "MB/s"],
            [["opening chunks", f"{opening_rate() / MB:,.0f}"],
             ["copying memory", f"{copy_rate() / MB:,.0f}"],
             ["one file, written and synced", f"{disk_rate(Path(folder)) / MB:,.0f}"],
             ["slots of 12 KiB, each in a call", f"{slots_rate(Path(folder), 1) / MB:,.0f}"],
             ["slots of 12 KiB, 256 in a call", f"{slots_rate(Path(folder), 256) / MB:,.0f}"]],
        )  # fmt: skip
    print(f"  target: fraction of bare paho ≥ {TARGET}\n")


if __name__ == "__main__":
    main()
