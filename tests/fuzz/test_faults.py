"""What fuzzing found: each fault by name, in the smallest input that showed it."""

import base64
import json
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from broker_bridge.config import load_config
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Disconnected
from broker_bridge.link.session_settings import SessionSettings
from broker_bridge.task.samples import preprocess
from broker_bridge.task.taskfile import Standardise, Task, Window, decode_plan, decode_task
from broker_bridge.wire.enrolment import Bundle
from broker_bridge.wire.messages import Presence
from device_client import identity as identities
from device_client import model as models
from device_client.config import DeviceConfig
from device_client.journal import Journal
from server.fleet.backup import restore
from server.fleet.home import Home
from server.fleet.sealed_file import Cost, Writer
from tests.broker_bridge.task.test_samples import TASK
from tests.fleets import TASK as WEARABLES
from tests.fuzz.answering import CONNACK_5, Driven, follow, listener
from tests.fuzz.contents import TFLITE, task_seeds
from tests.fuzz.targets import TARGETS


def planned(**changes: Any) -> bytes:
    """A plan whose header says something else."""
    header = json.loads(task_seeds()[2][1:]) | changes
    data = json.dumps(header).encode()
    return b"midge-task 1\n" + len(data).to_bytes(4, "little") + data + TFLITE


# ── Tasks ───────────────────────────────────────────────────────────────────────────────


def test_a_task_header_nested_too_deep_is_refused() -> None:
    deep = b'{"preprocessing":[{"x":' + b"[" * 5000 + b"]" * 5000 + b"}]}"
    with pytest.raises(PeerError, match="unreadable header"):
        decode_plan(b"midge-task 1\n" + len(deep).to_bytes(4, "little") + deep)


def test_a_recording_with_other_channels_than_the_task_standardises_is_refused() -> None:
    task: Task = msgspec.structs.replace(TASK, preprocessing=(Standardise((0.5,) * 6, (2.0,) * 6),))
    for channels in (1, 5):
        with pytest.raises(LocalError, match=f"has {channels} channels"):
            preprocess(task, np.zeros((9, channels), np.float32))


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([Window(2**62, 1)], "longer than any recording"),
        ([Window(50, 1), Window(50, 1)], "into windows once"),
    ],
)
def test_windows_that_would_take_all_memory_are_refused(steps: list[Window], why: str) -> None:
    with pytest.raises(PeerError, match=why):
        decode_plan(planned(preprocessing=msgspec.to_builtins(steps)))


# ── Settings ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_a_setting_that_python_cannot_read_is_one_sentence(tmp_path: Path, value: str) -> None:
    path = tmp_path / "device.toml"
    path.write_text(f"threads = {value}")
    with pytest.raises(LocalError, match="is not valid TOML"):
        load_config(path, DeviceConfig)


# ── Files that a card gives back wrong ──────────────────────────────────────────────────

BUNDLE: dict[str, Any] = json.loads(TARGETS["bundle"].seeds()[0])


@pytest.mark.parametrize(
    "change",
    [{"broker_port": 0}, {"broker_port": 2**31}, {"device": "-"}, {"device": "a/b"},
     {"federation": "x" * 41}, {"federation": "+"}],
)  # fmt: skip
def test_a_bundle_with_an_impossible_port_or_name_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PeerError) as caught:
        Bundle.decode(json.dumps(BUNDLE | change).encode())
    assert caught.value.reason == "bad_bundle"


DAMAGE = [b"\xca\xca", b"[" * 5000, b'{"round":\xff}', b""]


@pytest.mark.parametrize("damage", [*DAMAGE, b'{"round":-1}', b'{"round":9007199254740993}'])
def test_a_damaged_list_of_rounds_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "rounds.json").write_bytes(damage)
    with pytest.raises(LocalError, match="is damaged"):
        Journal(tmp_path).memory()


@pytest.mark.parametrize("damage", [b"9" * 5000, b"9" * 17, b"-1", b"\xff", "٣".encode()])
def test_a_damaged_count_of_starts_begins_again(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "boots").write_bytes(damage)
    assert Journal(tmp_path).boot() == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_that_was_shown_is_none(tmp_path: Path, damage: bytes) -> None:
    journal = Journal(tmp_path)
    journal.show(Presence(state="ready", boot=3, role="train"))
    assert (journal.shown() or {})["state"] == "ready"
    (tmp_path / "status.json").write_bytes(damage)
    assert journal.shown() is None


def test_a_kept_model_whose_version_is_no_number_counts_as_none(tmp_path: Path) -> None:
    plan, weights = decode_task(WEARABLES.read_bytes())
    models.keep(tmp_path, "global", plan, weights, version=7, number=1)
    assert models.kept(tmp_path, "global") == 7
    path = tmp_path / "model" / "global.task"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"model":"7"', b'"model":"?"'))
    assert path.read_bytes() != data
    assert models.kept(tmp_path, "global") is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_identity_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(damage)
    with pytest.raises(LocalError, match="is damaged"):
        identities.load(tmp_path)


@pytest.mark.parametrize("key", ["sign_seed", "kem_seed", "tls_seed"])
def test_a_key_of_the_wrong_length_is_damage(tmp_path: Path, key: str) -> None:
    keys = dict.fromkeys(
        ("sign_seed", "kem_seed", "tls_seed"), base64.b64encode(b"k" * 32).decode()
    )
    (tmp_path / "enrolling.json").write_text(json.dumps(keys))
    identities.pending_keys(tmp_path)
    (tmp_path / "enrolling.json").write_text(json.dumps(keys | {key: "AQE="}))
    with pytest.raises(LocalError, match="is damaged"):
        identities.pending_keys(tmp_path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_for_tls_are_written_anew_from_the_identity(
    tmp_path: Path, damage: bytes
) -> None:
    identity = msgspec.json.decode(TARGETS["journal"].seeds()[2][1:], type=identities.Identity)
    files = identities.tls_files(tmp_path, identity)
    whole = [path.read_bytes() for path in (tmp_path / "tls").iterdir()]
    for path in (tmp_path / "tls").iterdir():
        path.write_bytes(damage)
    assert identities.tls_files(tmp_path, identity) == files
    assert [path.read_bytes() for path in (tmp_path / "tls").iterdir()] == whole
    (tmp_path / "tls" / "ca.pem").unlink()
    (tmp_path / "tls" / "ca.pem").mkdir()
    with pytest.raises(LocalError, match=r"ca\.pem: this is a folder"):
        identities.tls_files(tmp_path, identity)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_keys_of_the_server_are_one_sentence(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "server.json").write_bytes(damage)
    with pytest.raises(LocalError, match="is damaged"):
        Home(tmp_path).keys()


@pytest.mark.parametrize("inside", [b"", b"no archive", bytes(512), b"keys/a".ljust(512, b"\0")])
def test_a_backup_that_holds_no_whole_archive_is_one_sentence(
    tmp_path: Path, inside: bytes
) -> None:
    words = "four words nobody guesses"
    with (tmp_path / "one.backup").open("wb") as out:
        writer = Writer(out, words, cost=Cost(passes=1, memory_kib=8))
        writer.write(inside)
        writer.finish()
    with pytest.raises(LocalError, match="made by another midge"):
        restore(tmp_path / "one.backup", tmp_path / "fleet", words, now=0.0)
    assert not any((tmp_path / "fleet").iterdir())


# ── What a broker may not do ────────────────────────────────────────────────────────────


def heard_from(answer: bytes) -> tuple[Driven, int]:
    """A session whose broker gave this answer, and the bytes of Python's heap it took."""
    link = Driven(SessionSettings(host="127.0.0.1", port=listener().getsockname()[1],
                                  client_id="fuzz", protocol="5.0"))  # fmt: skip
    this = link._begin()
    link._dial(this)
    peer, _ = listener().accept()
    tracemalloc.start()
    with peer:
        peer.sendall(answer)
        peer.shutdown(socket.SHUT_WR)
        follow(link, this)
    link._end(this)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return link, peak


def why(link: Driven) -> str:
    news = link.receive(0)
    assert isinstance(news, Disconnected), news
    return news.reason


def test_a_broker_that_takes_packets_too_small_for_us_is_refused() -> None:
    link, _ = heard_from(bytes.fromhex("2008000005270000000a"))
    assert "at most 10 bytes, and midge needs 1024; raise its limit" in why(link)
    assert link.limits.packet_bytes_max >= LIMITS.packet_bytes_min


def test_a_broker_that_announces_a_packet_of_256_mb_is_given_no_memory_for_it() -> None:
    link, peak = heard_from(CONNACK_5 + b"\x30\xff\xff\xff\x7f" + bytes(1000))
    assert "a packet of more than 1048576 bytes" in why(link)
    assert peak < 1 << 20


def test_a_broker_that_sends_qos_2_is_hung_up_on() -> None:
    link, _ = heard_from(CONNACK_5 + b"\x34\x08\x00\x01a\x00\x09\x00hi")
    assert "a message of QoS 2" in why(link)
