"""`midge-device`, as a person types it: what it answers, and what it says to mistakes."""

import contextlib
import json
import shutil
import time

import click
import pytest

from broker_bridge.link.local_broker import free_port
from device_client.cli import device, main
from server.fleet.enrolment import add_device
from server.store.database import Database
from tests.cards import plainly
from tests.fleets import (
    DEVICE,
    Fleet,
    commands_in,
    is_refusal,
    run,
    typed,
    wait_until,
    write_samples,
)

ALL = list(commands_in(device))


def said(*arguments):
    return typed(main, *(str(a) for a in arguments))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("served"))
    try:
        yield fleet.start()
    finally:
        fleet.stop()


@pytest.fixture
def alone(tmp_path):
    """A fleet of which nothing runs, with one device that has enrolled."""
    fleet = Fleet(tmp_path)
    fleet.enrol("ann")
    yield fleet
    fleet.stop()


def bundle_of(fleet, name, *, now=None, hours=24.0):
    with contextlib.closing(Database(fleet.home.database)) as db:
        return add_device(
            fleet.home, db, name, broker=fleet.home.config().broker,
            now=time.time() if now is None else now, hours=hours,
        )  # fmt: skip


@pytest.mark.parametrize(("path", "command"), ALL, ids=["-".join(p) or "device" for p, _ in ALL])
def test_every_command_has_help_with_an_example(path, command):
    words = " ".join(("midge-device", *path))
    with click.Context(command, info_name=words) as context:
        text = command.get_help(context)
    assert words in text.partition("Example:")[2], text


def test_the_commands_that_were_promised_are_there():
    assert {"enrol", "run", "status"} <= {" ".join(path) for path, _ in ALL}


# ── Mistakes ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["enrol"], ["BUNDLE", "midge-device enrol --help"]),
        (["enrol", "no.bundle", "--dir", "{}/new"], ["no.bundle", "correct the path"]),
        (["status", "--dir", "{}/new"], ["no enrolled device", "midge-device enrol"]),
        (["run", "--dir", "{}/new", "--data", "npz:{}/s.npz"], ["no enrolled device"]),
        (["run", "--dir", "{}/ann"], ["--data", "device.toml"]),
        (["run", "--dir", "{}/ann", "--data", "npz:/no/such.npz"], ["/no/such.npz"]),
        (["run", "--dir", "{}/ann", "--data", "csv:/no/such"], ["/no/such"]),
        (["run", "--dir", "{}/ann", "--data", "samples"], ["'samples'", "write npz:FILE"]),
        (["run", "--dir", "{}/ann", "--data", "/no/such.py:person?id=3"], ["/no/such.py"]),
        (["run", "--dir", "{}/ann", "--data", "npz:{}/s.npz", "--role", "watch"], ["evaluate"]),
        (["run", "--dir", "{}/ann", "--data", "npz:{}/s.npz", "--log", "loud"], ["info"]),
        (["run", "--dir", "{}/ann", "--data", "npz:{}/s.npz", "--broker", "here"], ["HOST:PORT"]),
        (["run", "--dir", "{}/ann", "--data", "npz:{}/s.npz", "--broker", "h:99999"], ["65535"]),
        (["run", "--dir", "{}/ann", "--config", "{}/no.toml"], ["no.toml", "correct the path"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_gets_one_sentence(alone, arguments, words):
    write_samples(alone.folder / "s.npz", seed=1)
    is_refusal(said(*(a.format(alone.folder) for a in arguments)), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data = \n", ["device.toml", "TOML", "line 1"]),
        ('dta = "npz:x"\n', ["'dta'", "allowed are", "data"]),
        ("threads = 0\n", ["threads", ">= 1"]),
        ('role = "both"\n', ["'both'", "train, evaluate"]),
    ],
)
def test_settings_that_are_wrong_are_named(alone, text, words):
    (alone.folder / "ann" / "device.toml").write_text(text)
    is_refusal(said("run", "--dir", alone.folder / "ann"), *words)


def test_a_bundle_that_is_cut_short_is_refused(alone, tmp_path):
    whole = bundle_of(alone, "ben").read_bytes()
    cut = tmp_path / "cut.bundle"
    cut.write_bytes(whole[: len(whole) // 2])
    is_refusal(said("enrol", cut, "--dir", tmp_path / "ben"), "cut.bundle", "copy it whole")


def test_a_bundle_of_another_device_is_refused_for_a_folder_in_use(alone):
    path = bundle_of(alone, "ben")
    is_refusal(said("enrol", path, "--dir", alone.folder / "ann"), "demo/ann", "demo/ben")


def test_an_identity_that_is_damaged_is_named(alone):
    path = alone.folder / "ann" / "identity.json"
    path.write_bytes(path.read_bytes()[:100])
    is_refusal(said("status", "--dir", alone.folder / "ann"), "identity.json", "backup")


def test_a_broker_that_is_not_there_is_named(alone, tmp_path):
    path = bundle_of(alone, "ben")
    done = said("enrol", path, "--dir", tmp_path / "ben", "--wait", "0.5")
    is_refusal(_last_line(done), f"localhost:{alone.port}")


def test_a_server_that_is_not_running_is_named(alone, tmp_path):
    alone.broker.start()
    path = bundle_of(alone, "ben")
    is_refusal(said("enrol", path, "--dir", tmp_path / "ben", "--wait", "2"), "midge server")


def _last_line(done):
    done.stderr = done.stderr.splitlines()[-1] + "\n"
    return done


def test_an_expired_token_is_named(served, tmp_path):
    path = bundle_of(served, "late", now=time.time() - 100, hours=0.01)
    is_refusal(said("enrol", path, "--dir", tmp_path / "late"), "expired", "midge device add late")


def test_a_used_token_is_refused_to_other_keys(served, tmp_path):
    path = bundle_of(served, "twice")
    assert said("enrol", path, "--dir", tmp_path / "first").returncode == 0
    is_refusal(said("enrol", path, "--dir", tmp_path / "second"), "used by other keys")


def test_a_bundle_in_whose_place_there_is_a_newer_one_is_named(served, tmp_path):
    old = tmp_path / "old.bundle"
    shutil.copy(bundle_of(served, "again"), old)
    new = bundle_of(served, "again")
    done = said("enrol", old, "--dir", tmp_path / "again", "--wait", "1")
    is_refusal(done, "a newer bundle was made for again, and this one is void")
    assert said("enrol", new, "--dir", tmp_path / "again").returncode == 0


def test_a_folder_of_another_user_is_opened_with_sudo(alone):
    folder = alone.folder / "ann"
    folder.chmod(0)
    try:
        for command in ("status", "doctor"):
            done = run(*plainly(), *DEVICE, command, "--dir", str(folder))
            is_refusal(done, "the device's own", "put sudo before")
    finally:
        folder.chmod(0o700)


# ── Answers ─────────────────────────────────────────────────────────────────────────────


def test_a_device_enrols_once_and_says_who_it_is(served, tmp_path):
    path, folder = bundle_of(served, "ward-3"), tmp_path / "ward-3"
    done = said("enrol", path, "--dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert first["device"] == "ward-3"
    assert json.loads(said("enrol", path, "--dir", folder, "--json").stdout) == first
    assert said("status", "--dir", folder).stdout.count(first["fingerprint"]) == 1


def test_keys_that_got_no_answer_are_sent_again(served, tmp_path):
    """The power went between request and answer: the token was used, by the same keys."""
    path, folder = bundle_of(served, "cut-off"), tmp_path / "cut-off"
    assert said("enrol", path, "--dir", folder).returncode == 0
    keys = json.loads((folder / "identity.json").read_text())["keys"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "enrolling.json").write_text(json.dumps(keys))
    assert said("enrol", path, "--dir", folder).returncode == 0
    assert json.loads((folder / "identity.json").read_text())["keys"] == keys
    assert not (folder / "enrolling.json").exists()


def test_a_bundle_in_the_devices_folder_is_erased_once_it_has_enrolled(served):
    folder = served.folder / "tidy"
    folder.mkdir()
    inside, elsewhere = folder / "device.bundle", bundle_of(served, "tidy")
    shutil.copy(elsewhere, inside)
    # Another name of the same file: what was in it is gone, not only what it was called.
    (served.folder / "same-file").hardlink_to(inside)
    device = served.device("tidy", "--bundle", str(inside))
    device.wait_for("has done its work, and is erased")
    assert not inside.exists()
    assert set((served.folder / "same-file").read_bytes()) == {0}
    assert not (folder / "tls-bootstrap").exists()
    assert elsewhere.exists(), "a person's own file is not ours to remove"
    # An older version left it there: the next start removes it, and needs it no more.
    device.terminate()
    shutil.copy(elsewhere, inside)
    device = served.device("tidy", "--bundle", str(inside))
    wait_until(lambda: served.state_of("tidy").get("state") == "ready", "it is back")
    assert not inside.exists()
    assert said("doctor", "--dir", folder, "--data", served.samples("tidy")).returncode == 0


def test_a_bundle_that_is_not_the_one_it_enrolled_with_is_kept(served, tmp_path):
    folder = tmp_path / "ward-4"
    assert said("enrol", bundle_of(served, "ward-4"), "--dir", folder).returncode == 0
    other = folder / "device.bundle"
    shutil.copy(bundle_of(served, "ward-5"), other)
    before = other.read_bytes()
    refused = said("enrol", other, "--dir", folder)
    is_refusal(refused, "belongs to demo/ward-4")
    device = served.device("ward-4", "--dir", str(folder), "--bundle", str(other))
    device.wait_for("connected to the broker")
    assert other.read_bytes() == before


def test_a_device_that_has_neither_keys_nor_bundle_says_so(alone, tmp_path):
    source = write_samples(tmp_path / "s.npz", seed=1)
    done = said("run", "--dir", tmp_path / "new", "--bundle", tmp_path / "none", "--data", source)
    is_refusal(done, "no enrolled device", "none is not there", "midge-device enrol")


def test_status_is_json_that_says_what_the_device_does(served, tmp_path):
    served.enrol("busy")
    served.device("busy")
    wait_until(lambda: served.state_of("busy").get("state") == "ready", "it is ready")
    found = json.loads(
        run(*DEVICE, "status", "--dir", str(served.folder / "busy"), "--json").stdout
    )
    assert found["state"]["state"] == "ready"
    assert found["rounds"] == {"highest": 0, "done": False}
    assert found["outbox"] is None
    assert "Traceback" not in (served.folder / "busy.log").read_text()


def below(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def test_status_changes_nothing_and_leaves_a_damaged_update_to_the_agent(alone):
    """It threw it away, and said that the outbox is empty."""
    folder = alone.folder / "ann"
    outbox = folder / "outbox" / "update.sealed"
    assert json.loads(said("status", "--dir", folder, "--json").stdout)["outbox"] is None
    assert not outbox.parent.exists(), "it made a folder"
    outbox.parent.mkdir()
    outbox.write_bytes(b"mgoutbx1 and then the card gave nothing more")
    before = below(folder)
    done = said("status", "--dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["outbox"]["damaged"]
    assert f"{outbox}: the update in it is damaged" in found
    assert found in said("status", "--dir", folder).stdout
    assert below(folder) == before
    device = alone.device("ann")
    device.wait_for(f"{outbox}: the update in it is damaged; it is thrown away")
    wait_until(lambda: not outbox.exists(), "it is thrown away")
    device.terminate()
    assert device.log.count("damaged") == 1


def test_a_settings_file_with_comments_is_left_for_the_owner(served):
    served.enrol("owned")
    served.device("owned")
    path = served.folder / "owned" / "device.toml"
    wait_until(path.exists, "the settings file")
    text = path.read_text()
    assert "# keepalive_s = 60" in text
    assert all(not line or line.startswith(("#", "[")) for line in text.splitlines())


def test_a_device_waits_for_its_broker_however_long(alone):
    device = alone.device("ann", "--broker", f"127.0.0.1:{free_port()}")
    device.wait_for("start the broker there or correct the port")
    assert device.is_running
    assert device.terminate() == 0


def test_a_second_agent_for_one_device_is_refused(alone):
    first = alone.device("ann")
    first.wait_for("start the broker there or correct the port")
    source = alone.samples("ann")
    done = said("run", "--dir", alone.folder / "ann", "--data", source)
    is_refusal(done, "runs in", "already", "systemctl stop midge-device")
    first.kill()  # and nothing is left that keeps the next one out
    second = alone.device("ann")
    wait_until(lambda: second.log.count("correct the port") > 1, "it runs")


def test_a_device_that_waits_for_enrolment_stops_when_asked(alone, tmp_path):
    alone.broker.start()
    path = bundle_of(alone, "ben")
    device = alone.device("ben", "--bundle", str(path))
    wait_until((alone.folder / "ben" / "enrolling.json").exists, "it made its keys")
    assert device.terminate() != 2
    assert "Traceback" not in device.log


def test_the_broker_of_another_fleet_is_not_believed(served, tmp_path):
    other = Fleet(tmp_path)
    other.enrol("ann")
    device = other.device("ann", "--broker", f"localhost:{served.port}")
    try:
        device.wait_for("is not who it should be")
        assert device.is_running
    finally:
        other.stop()
