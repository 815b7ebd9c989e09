"""A whole federation at log level debug: no secret is anywhere but in a file for its owner alone.

The fleet is made, devices are added, enrol, train and are measured, operators ask, and much is
done wrong; all with the umask 0, which forgives nothing. What was logged, printed, sent, shown
in the process list or left in a file is then searched for every secret there was: as it is, in
hexadecimal, in base64, and as Python would show it; half of one is as bad as the whole.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker_bridge.link.local_broker import LocalBroker
from device_client.cli import main as midge_device
from server.cli import main as midge
from tests.fleets import TOPICS, Fleet, files_below, typed

WORDS = "four words nobody guesses"
HALF = 16  # bytes: whoever knows so much of a key need not guess the rest
# Names under which secrets are written down, in JSON and in the database.
SECRET_FIELDS = re.compile(r".*(seed|fleet_key|psk|token|secret|_key_pem|round_key)")
# What others may read, and therefore holds no secret.
PUBLIC_FILES = re.compile(
    r"midge\.toml|device\.toml|.*\.task|.*\.npz|.*\.acl|mosquitto\.conf"
    r"|(ca|broker|server|operator)/(ca|broker|client|revoked)\.pem"
)


@dataclass
class Seen:
    """What a stranger, a colleague or a log archive gets to see, by where it was seen."""

    texts: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, where: str, data: bytes | str) -> None:
        self.texts.append((where, data.encode() if isinstance(data, str) else data))


@dataclass
class Work:
    """What the federation left behind."""

    fleet: Fleet
    seen: Seen
    secrets: dict[str, bytes] = field(repr=False)


# ── Which secrets there are ─────────────────────────────────────────────────────────────


def secrets_in_json(name: str, value: Any, key: str = "") -> Iterator[tuple[str, bytes]]:
    if isinstance(value, dict):
        for each, inner in value.items():
            yield from secrets_in_json(name, inner, each)
    elif isinstance(value, str) and SECRET_FIELDS.fullmatch(key):
        yield f"{key} in {name}", as_bytes(value)


def as_bytes(text: str) -> bytes:
    """A secret as it was before it was written into JSON."""
    if text.startswith("-----BEGIN"):
        return der(text)
    if re.fullmatch(r"([0-9a-f]{2}){16,}", text):
        return bytes.fromhex(text)
    return base64.b64decode(text, validate=True)


def der(pem: str) -> bytes:
    body = "".join(line for line in pem.splitlines() if not line.startswith("-----"))
    return base64.b64decode(body)


def inner_key(data: bytes) -> bytes:
    """The part of a private key in PKCS #8 that is secret: the last 32 bytes or those of the
    octet string; what stands before it is the same in every key.
    """
    if len(data) == 48:  # Ed25519, RFC 8410
        return data[16:]
    at = data.index(b"\x02\x01\x01\x04\x20") + 5  # RFC 5915, P-256
    return data[at : at + 32]


def secrets_on_disk(*folders: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path, text in (each for folder in folders for each in files_below(folder)):
        name = path.name
        if text.startswith(b"-----BEGIN PRIVATE KEY") or b"\n-----BEGIN PRIVATE KEY" in text:
            found[str(path)] = inner_key(der(text.decode()))
        elif path.suffix in (".json", ".bundle"):
            with contextlib.suppress(ValueError):
                for what, secret in secrets_in_json(str(path), json.loads(text)):
                    found[what] = inner_key(secret) if "pem" in what else secret
        elif name == "midge.db":
            found |= secrets_in_database(path)
    return found


def secrets_in_database(path: Path) -> dict[str, bytes]:
    queries = {
        "token": "SELECT device, secret FROM tokens",
        "psk": "SELECT name, psk FROM devices",
        "round key": "SELECT number, round_key FROM rounds WHERE round_key IS NOT NULL",
    }
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {f"{n} of {who}": s for n, q in queries.items() for who, s in db.execute(q)}


def forms(secret: bytes) -> Iterator[bytes]:
    """How half of a secret could show."""
    half = secret[:HALF]
    yield half
    yield half.hex().encode()
    yield half.hex().upper().encode()
    yield half.hex(":").encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):  # wherever in a longer text it begins
            text = encode(bytes(before) + half)
            yield text[4 if before else 0 : len(text) - 4]
    yield repr(half)[2:-1].encode()
    yield str(list(half))[1:-1].encode()


# ── The federation ──────────────────────────────────────────────────────────────────────


class ProcessList(threading.Thread):
    """Looks at what `ps` shows of all processes, again and again until it is stopped."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(daemon=True)
        self._seen = seen
        self._known: set[bytes] = set()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        data = (process / name).read_bytes()
                        if data not in self._known:
                            self._known.add(data)
                            self._seen.add(str(process / name), data)

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    before = os.umask(0)
    try:
        yield from a_federation(folder)
    finally:
        os.umask(before)


def a_federation(folder: Path) -> Iterator[Work]:
    seen = Seen()
    secrets: dict[str, bytes] = {}
    folder.chmod(0o755)
    fleet = Fleet(folder, settings='log = "debug"')
    for task in (fleet.home.folder / "tasks").iterdir():
        task.chmod(0o644)  # a copy of what lies in the checkout, with whatever mode that has
    fleet.broker = LocalBroker(
        fleet.home.broker, port=fleet.port, engine="mosquitto", conf_more="log_type all\n"
    )
    processes = ProcessList(seen)
    processes.start()
    try:
        fleet.start()
        wire = fleet.listen("#", who="server")
        for name in ("ann", "ben"):
            ask(seen, fleet, "device", "add", name)
        bundles = {name: fleet.home.bundle(name).read_bytes() for name in ("ann", "ben")}
        secrets |= secrets_on_disk(fleet.home.folder)
        start_device(fleet, "ann")
        wire.wait_for_json(TOPICS.state("ann"), state="ready")
        fleet.start_run(task="wearables", rounds=2, target=2)
        wire.wait(lambda m: m.topic == TOPICS.round and m.payload, "a round is open")
        secrets |= secrets_on_disk(fleet.home.folder)
        assert any("round key" in name for name in secrets)
        start_device(fleet, "ben", role="evaluate")
        wire.wait_for_json(TOPICS.state("ben"), state="ready")
        done_right(seen, fleet)
        done_wrong(seen, fleet, bundles)
        ask(seen, fleet, "stop")
        secrets |= secrets_on_disk(fleet.home.folder, folder / "ann", folder / "ben")
        for program in fleet.programs:
            program.terminate()
        for message in wire.hear():
            seen.add(f"on the wire: {message.topic}", message.payload)
        fleet.broker.stop()
        for log in (*folder.glob("*.log"), *fleet.home.folder.rglob("*.log")):
            seen.add(str(log), log.read_bytes())
        yield Work(fleet, seen, secrets | {"passphrase": WORDS.encode()})
    finally:
        processes.stop()
        fleet.stop()


def start_device(fleet: Fleet, name: str, role: str = "train") -> None:
    bundle = fleet.home.bundle(name)
    fleet.device(name, "--bundle", str(bundle), "--log", "debug", role=role)


def ask(seen: Seen, fleet: Fleet, *command: str) -> None:
    """An operator's command; what it prints is seen."""
    done = fleet.midge(*command)
    seen.add(f"midge {' '.join(command)}", done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


def done_right(seen: Seen, fleet: Fleet) -> None:
    words = fleet.folder / "words"
    words.touch(0o600)
    words.chmod(0o600)
    words.write_text(WORDS)
    for command in (
        ["status", "--json"], ["status"], ["device", "list", "--json"], ["device", "list"],
        ["device", "show", "ann", "--json"], ["device", "show", "ann"], ["doctor", "--json"],
        ["doctor"], ["model", "list", "--json"], ["device", "add", "eve", "--json"],
        ["backup", str(fleet.folder / "a.backup"), "--passphrase-file", str(words)],
    ):  # fmt: skip
        ask(seen, fleet, *command)
    samples = fleet.samples("ann")
    for question in (["status", "--json"], ["status"], ["doctor", "--data", samples, "--json"]):
        done = typed(midge_device, *question, "--dir", str(fleet.folder / "ann"))
        seen.add(f"midge-device {' '.join(question)}", done.stdout + done.stderr)


def done_wrong(seen: Seen, fleet: Fleet, bundles: dict[str, bytes]) -> None:
    """Used, expired and damaged bundles; every file with a key, cut short and mistyped."""
    away = fleet.folder / "wrong"
    away.mkdir(0o700)
    ann = bundles["ann"]
    other_token = ann.replace(b'"token":"', b'"token":"zz')
    no_key = ann.replace(b"-----BEGIN", b"-----BEGAN")
    for number, data in enumerate([ann, ann[:-200], other_token, no_key]):
        path = away / f"{number}.bundle"
        path.write_bytes(data)
        path.chmod(0o600)
        folder = away / f"device-{number}"
        done = typed(midge_device, "enrol", str(path), "--dir", str(folder), "--wait", "3")
        seen.add(f"midge-device enrol, number {number}", done.stdout + done.stderr)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    for folder, name, main, command in with_keys(fleet):
        for damage in (cut_short, with_other_types):
            copy = away / "copy"
            shutil.copytree(folder, copy, ignore=AT_WORK)
            (copy / name).write_bytes(damage((folder / name).read_bytes()))
            done = typed(main, *command, "--dir", str(copy))
            seen.add(f"{command} with a damaged {name}", done.stdout + done.stderr)
            assert "Traceback" not in done.stderr, done.stderr
            shutil.rmtree(copy)


# What comes and goes while it is copied: server and device are at work there.
AT_WORK = shutil.ignore_patterns("spool", "models", "outbox", "*.new", "*.sock")


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_other_types(data: bytes) -> bytes:
    """Each text one character longer, so that it is base64 no more; each number a text."""
    return re.sub(rb":(\d)", rb':"\1"', re.sub(rb':"(.)', rb':"\1\1', data))


def with_keys(fleet: Fleet) -> Iterator[tuple[Path, str, Any, list[str]]]:
    """Files that hold keys, and a command that reads each."""
    home = fleet.home.folder
    yield home, "keys/server.json", midge, ["device", "add", "new", "--json"]
    yield home, "ca/ca-key.pem", midge, ["device", "add", "new"]
    yield home, "operator/client-key.pem", midge, ["status"]
    yield fleet.folder / "ann", "identity.json", midge_device, ["status", "--json"]


# ── What is seen of it ──────────────────────────────────────────────────────────────────


def found_in(data: bytes, secrets: dict[str, bytes]) -> list[str]:
    return [name for name, secret in secrets.items() if any(f in data for f in forms(secret))]


def test_the_search_finds_a_secret_in_each_form_it_may_take():
    secret = bytes(range(100, 132))
    shown = [
        secret, secret.hex(), secret.hex().upper(), secret.hex(":"), base64.b64encode(secret),
        base64.b64encode(b"x" + secret), base64.b64encode(b"xy" + secret), repr(secret),
        str(list(secret)), secret[:HALF], json.dumps({"k": base64.b64encode(secret).decode()}),
    ]  # fmt: skip
    for each in shown:
        data = b"before " + (each if isinstance(each, bytes) else each.encode()) + b" after"
        assert found_in(data, {"it": secret}) == ["it"], each
    assert found_in(bytes(range(100, 110)), {"it": secret}) == []


def test_every_kind_of_secret_was_looked_for(work):
    names = " ".join(work.secrets)
    for kind in (
        "root.json", "sign_seed", "kem_seed", "tls_seed", "fleet_key", "token of ann", "psk of ann",
        "round key", "ca-key.pem", "broker-key.pem", "client-key.pem", "bootstrap_key_pem",
        "device.key", "passphrase",
    ):  # fmt: skip
        assert kind in names, kind
    assert all(len(secret) >= HALF for secret in work.secrets.values())


def test_no_log_message_error_or_process_list_shows_a_secret(work):
    places = " ".join(where for where, _ in work.seen.texts)
    for kind in ("broker.log", "server.log", "ann.log", "cmdline", "environ", "damaged", "enrol",
                 "on the wire", "midge status --json", "doctor"):  # fmt: skip
        assert kind in places, kind
    leaks = {
        where: names for where, data in work.seen.texts if (names := found_in(data, work.secrets))
    }
    assert leaks == {}


def test_every_file_with_a_secret_is_for_its_owner_alone_and_so_is_every_folder(work):
    folders = (work.fleet.home.folder, work.fleet.folder / "ann", work.fleet.folder / "ben")
    wrong = []
    for root in folders:
        for path in (root, *sorted(root.rglob("*"))):
            mode = path.stat().st_mode & 0o777
            if path.is_dir():
                wrong += [(str(path), oct(mode))] if mode != 0o700 else []
            elif mode & 0o077 and (
                not PUBLIC_FILES.fullmatch(path.relative_to(root).as_posix())
                or found_in(path.read_bytes(), work.secrets)
                or mode & 0o022
            ):
                wrong.append((str(path), oct(mode)))
    assert wrong == []


def test_the_tools_of_this_test_would_notice_a_file_that_others_may_read(work):
    assert typed(midge, "--version").returncode == 0
    key = work.fleet.home.folder / "keys" / "server.json"
    assert found_in(key.read_bytes(), work.secrets)
    assert not PUBLIC_FILES.fullmatch("keys/server.json")
