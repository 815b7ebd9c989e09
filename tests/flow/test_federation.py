"""A whole federation of real processes over mosquitto with TLS and ACL, and its traces."""

import base64
import hashlib
import json
import re

import msgspec
import numpy as np
import pytest

from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import read_npz
from broker_bridge.task.taskfile import Training, decode_task
from broker_bridge.wire import weights
from broker_bridge.wire.topics import UpTopic
from device_client import identity as identities
from device_client.trainer import Trainer
from tests.fleets import FEDERATION, TASK, TOPICS, Fleet, wait_until

ROUNDS = 2
TRAINERS = ("ann", "ben")
NEVER_ON_A_DEVICE = {"tensorflow", "keras", "sqlalchemy", "cryptography", "rich", "server"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A federation that enrolled by bundle and trained two rounds, every message recorded."""
    fleet = Fleet(tmp_path_factory.mktemp("federation"), settings='log = "debug"')
    try:
        fleet.start()
        fleet.recorder = fleet.listen("#", who="server")
        for name in (*TRAINERS, "eve"):
            assert fleet.midge("device", "add", name).returncode == 0
        for name in (*TRAINERS, "eve"):
            fleet.device(
                name, "--bundle", str(fleet.home.bundle(name)), "--log", "debug",
                role="evaluate" if name == "eve" else "train", python=("-X", "importtime"),
            )  # fmt: skip
        for name in (*TRAINERS, "eve"):
            fleet.recorder.wait_for_json(TOPICS.state(name), state="ready")
        fleet.start_run(task="wearables", rounds=ROUNDS)
        fleet.recorder.wait_for_json(
            TOPICS.metrics, round=ROUNDS, state="closed", evaluated_by="devices"
        )
        yield fleet
    finally:
        fleet.stop()


# ── What comes out ──────────────────────────────────────────────────────────────────────


def trained_by(fleet, name: str, model, number: int):
    """What a device makes of a model, worked out again beside it."""
    plan, _ = decode_task(TASK.read_bytes())
    samples = read_npz(str(fleet.folder / f"{name}.npz"), plan.task)
    drawn = hashlib.sha256(f"{FEDERATION}/{name}".encode() + number.to_bytes(8, "big")).digest()
    defaults = plan.task.defaults
    training = Training(epochs=defaults.epochs, learning_rate=defaults.learning_rate)
    trained = Trainer(TaskRuntime(plan), samples).train(
        model, training, seed=int.from_bytes(drawn[:8], "big")
    )
    return {n: np.subtract(trained.weights[n], model[n], dtype=np.float32) for n in model}


def next_model(fleet, model, number: int):
    """The mean of all updates, in whole numbers of 2**-32, added to the model."""
    deltas = [trained_by(fleet, name, model, number) for name in TRAINERS]
    found = {}
    for name, old in model.items():
        total = sum(np.rint(d[name].astype(np.float64) * 2**32).astype(np.int64) for d in deltas)
        mean = (total.astype(np.float64) / len(deltas) * 2.0**-32).astype(np.float32)
        found[name] = (old.astype(np.float64) + mean).astype(np.float32)
    return found


def test_the_model_is_bit_for_bit_the_mean_of_what_the_devices_trained(done):
    _, model = decode_task(TASK.read_bytes())
    files = done.model_files()
    assert weights.encode(model) == files["000001.weights"]
    for number in range(1, ROUNDS + 1):
        model = next_model(done, model, number)
        assert weights.encode(model) == files[f"{number + 1:06d}.weights"]


def test_metrics_are_retained_json_that_a_person_can_read(done):
    listener = done.listen(TOPICS.metrics)
    found = listener.wait_for_json(TOPICS.metrics, round=ROUNDS)
    assert (found["state"], found["accepted"], found["invited"]) == ("closed", 2, 2)
    assert set(found["evaluation"]) == {"accuracy", "loss"}
    assert found["evaluation_examples"] == 48
    assert listener.messages[0].retained


def test_the_device_that_holds_its_data_out_sent_no_update(done):
    kinds = {
        (place.device, place.kind)
        for m in done.recorder.hear()
        if isinstance(place := TOPICS.parse(m.topic), UpTopic)
    }
    assert {("ann", "data"), ("ben", "data"), ("eve", "report")} <= kinds
    assert not {("eve", "data"), ("eve", "init"), ("eve", "join"), ("ann", "report")} & kinds


def test_nothing_was_refused_on_the_way(done):
    status = done.status()
    assert status["rejected"] == {}
    assert status["phase"] == "idle"


def test_a_devices_outbox_is_empty_after_its_receipt(done):
    for name in TRAINERS:
        outbox = done.folder / name / "outbox"  # the round may be over before it hears so
        wait_until(lambda outbox=outbox: not any(outbox.iterdir()), f"{name} has its receipt")


# ── What nobody else learns ─────────────────────────────────────────────────────────────


def plaintexts(fleet, others=("eve",)) -> dict[str, bytes]:
    """Everything that is to stay between server and devices, or on a device."""
    plan, model = decode_task(TASK.read_bytes())
    found = {f"model {name}": data for name, data in fleet.model_files().items()}
    found["task"] = plan.tflite
    for name in TRAINERS:
        delta = trained_by(fleet, name, model, 1)
        found[f"the update of {name}"] = weights.encode(delta)
    for name in (*TRAINERS, *others):
        with np.load(fleet.folder / f"{name}.npz") as file:
            found[f"the samples of {name}"] = file["x"].tobytes()
    return found


def shared_window(secret: bytes, said: bytes, size: int = 32) -> bytes | None:
    """A run of `size` bytes that is in both, if there is one."""
    if len(said) < size:
        return None
    heads = np.lib.stride_tricks.sliding_window_view(np.frombuffer(said, np.uint8), 8)
    known = np.lib.stride_tricks.sliding_window_view(np.frombuffer(secret, np.uint8), 8)
    present = np.isin(_as_numbers(heads), _as_numbers(known))
    for start in np.flatnonzero(present):
        window = said[start : start + size]
        if len(window) == size and window in secret:
            return window
    return None


def _as_numbers(rows):
    return np.ascontiguousarray(rows).view(np.uint64).reshape(-1)


def test_a_shared_window_is_found_wherever_it_lies():
    secret = bytes(range(256)) * 3
    assert shared_window(secret, b"??" + secret[101:133] + b"?") == secret[101:133]
    assert shared_window(secret, b"??" + secret[101:132] + b"?") is None


def test_the_broker_sees_no_model_no_task_no_update_and_no_sample(done):
    said = [m for m in done.recorder.hear() if m.payload]
    kinds = {m.topic.split("/")[3] for m in said}
    assert {"round", "task", "model", "up", "down", "dev", "metrics"} <= kinds
    payloads = b"".join(m.payload for m in said if len(m.payload) >= 32)
    assert len(payloads) > 4 * len(TASK.read_bytes()) / 3
    for what, secret in plaintexts(done).items():
        assert shared_window(secret, payloads) is None, what


def secrets_of(fleet) -> dict[str, bytes]:
    """Every key, token and shared secret of this federation."""
    found = {}
    keys = fleet.home.keys()
    found |= {"sign": keys.sign_seed, "kem": keys.kem_seed, "fleet key": keys.fleet_key}
    root = json.loads((fleet.home.folder / "offline" / "root.json").read_bytes())
    found["root"] = base64.b64decode(root["seed"])
    for name in (*TRAINERS, "eve"):
        own = identities.load(fleet.folder / name)
        seeds = msgspec.to_builtins(own.keys, builtin_types=(bytes,))
        found |= {f"{name} {what}": seed for what, seed in seeds.items()}
        found[f"{name} psk"] = own.psk
    assert all(len(secret) == 32 for secret in found.values())
    return found


def spellings(secret: bytes):
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield repr(secret).encode()[2:-1]
    for pad in range(3):  # base64, wherever it begins in a longer text
        middle = base64.b64encode(bytes(pad) + secret)[4:-4]
        yield middle
        yield middle.translate(bytes.maketrans(b"+/", b"-_"))


def test_nothing_secret_is_in_any_log_or_on_the_wire(done):
    logs = {p.name: p.read_bytes() for p in [*done.folder.glob("*.log"), done.broker.log_path]}
    for name in (*TRAINERS, "eve"):
        logs[f"{name} status"] = (done.folder / name / "status.json").read_bytes()
    assert {"server.log", "ann.log", "broker.log"} <= set(logs)
    assert all(logs.values())
    logs["wire"] = b"\n".join(m.payload for m in done.recorder.hear())
    for what, secret in secrets_of(done).items():
        for spelt in spellings(secret):
            for where, text in logs.items():
                assert spelt not in text, f"{what} is in {where}"


def test_a_secret_is_found_however_it_is_spelt():
    secret = hashlib.sha256(b"x").digest()
    for text in (secret.hex(), base64.b64encode(b"key:" + secret).decode(), repr(secret)):
        assert any(s in text.encode() for s in spellings(secret)), text


# ── What a device's process is ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*TRAINERS, "eve"])
def test_a_device_imports_nothing_that_does_not_belong_on_it(done, name):
    log = (done.folder / f"{name}.log").read_text()
    imported = {m.strip().split(".")[0] for m in re.findall(r"^import time:.*\|(.*)$", log, re.M)}
    assert {"device_client", "broker_bridge", "paho", "nacl", "numpy"} <= imported
    assert not imported & NEVER_ON_A_DEVICE
    assert not imported & {"tflite_runtime", "ai_edge_litert"}  # they are in another process


def test_secret_files_are_for_their_owner_alone(done):
    files = [done.home.folder / "keys" / "server.json", done.home.folder / "offline" / "root.json"]
    for name in TRAINERS:
        files += [done.folder / name / "identity.json", done.folder / name / "tls" / "device.key"]
        files.append(done.home.bundle(name))
    for path in files:
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_server_answers_json_to_whoever_listens(done):
    listener = done.listen(TOPICS.ctl_reply, TOPICS.srv)
    listener.wait_for_json(TOPICS.srv, state="online")
    done.publish(TOPICS.ctl, '{"cmd":"status","id":"mine"}')
    reply = listener.wait_for_json(TOPICS.ctl_reply, id="mine")
    assert reply["ok"]
    assert reply["status"]["model_version"] == ROUNDS + 1
    assert "error" not in reply
