"""`midge-device doctor` beside a real mosquitto: a healthy device, and each broken thing."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta

import pytest

from broker_bridge.checkup import exit_code
from broker_bridge.task.taskfile import decode_task, encode_plan
from device_client import identity as identities
from device_client.cli import main
from device_client.doctor import examine
from tests.fleets import TASK, Fleet, typed, write_samples

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A broker that runs, and a device that has enrolled, fetched its task and has data."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    fleet.enrol("ward-1")
    try:
        fleet.broker.start()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def device(fleet, tmp_path):
    """A copy of the device's folder, for a test to damage."""
    folder = tmp_path / "ward-1"
    shutil.copytree(fleet.folder / "ward-1", folder)
    plan, _ = decode_task(TASK.read_bytes())
    (folder / "tasks").mkdir()
    (folder / "tasks" / "0.plan").write_bytes(encode_plan(plan.task, plan.tflite))
    source = write_samples(tmp_path / "samples.npz", seed=1)
    (folder / "device.toml").write_text(f'data = "{source}"\n')
    return folder


def of(findings, check):
    found = [f for f in findings if f.check == check]
    return next((f for f in found if f.level != "ok"), found[0])


def broken(findings):
    return {f.check for f in findings if f.level != "ok"}


def look(folder, now=NOW, **options):
    return list(examine(folder, now, **options))


# ── Healthy ─────────────────────────────────────────────────────────────────────────────


def test_a_healthy_device_is_all_ok(device):
    findings = look(device)
    assert broken(findings) == set(), findings
    assert {
        "clock", "disk", "versions", "secrets", "settings", "enrolment", "rounds", "sandbox",
        "data", "cert ca", "cert device", "broker", "broker limits", "access rules",
    } == {f.check for f in findings}  # fmt: skip
    assert "48 samples fit the task 'wearables'" in of(findings, "data").found


def test_the_command_exits_with_0_and_speaks_json(device):
    done = typed(main, "doctor", "--dir", str(device), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["worst"] == "ok"
    assert done.stderr == ""


def test_the_highest_round_and_an_update_that_waits_are_told(device):
    (device / "rounds.json").write_text('{"round":7,"done":true}')
    (device / "outbox").mkdir()
    findings = look(device)
    assert "highest seen is 7 (done)" in of(findings, "rounds").found
    assert of(findings, "outbox").found == "empty"


# ── Broken, one thing at a time ─────────────────────────────────────────────────────────


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    done = typed(main, "doctor", "--dir", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "there is no folder" in done.stderr


def test_a_device_that_never_enrolled_is_told_how(tmp_path):
    findings = look(tmp_path)
    assert of(findings, "enrolment").level == "problem"
    assert "midge-device enrol" in of(findings, "enrolment").advice


def test_an_enrolment_that_was_never_answered_is_seen(tmp_path):
    identities.pending_keys(tmp_path)
    assert "never answered" in of(look(tmp_path), "enrolment").found


def test_a_damaged_identity_does_not_end_the_report(device):
    (device / "identity.json").write_bytes(b"\xff")
    findings = look(device)
    assert "is damaged" in of(findings, "enrolment").found
    assert of(findings, "data").level == "ok"


def test_data_that_does_not_fit_the_task_is_named(device, tmp_path):
    source = write_samples(tmp_path / "labels.npz", seed=1, labels=9)
    found = of(look(device, data=source), "data")
    assert found.level == "problem"
    assert "labels" in found.found


def test_data_that_is_not_there_and_data_that_nobody_named_are_told_apart(device):
    assert of(look(device, data="npz:/no/such.npz"), "data").level == "problem"
    (device / "device.toml").write_text("")
    assert of(look(device), "data").level == "warning"
    assert exit_code(look(device)) == 1


def test_data_is_not_tried_before_a_task_was_fetched(device):
    shutil.rmtree(device / "tasks")
    found = of(look(device), "data")
    assert (found.level, "no task was fetched yet" in found.found) == ("ok", True)


def test_a_damaged_task_is_named(device):
    (device / "tasks" / "0.plan").write_bytes(b"damage")
    assert of(look(device), "data").level == "problem"


def test_a_wrong_setting_is_named_and_the_rest_is_looked_at(device):
    (device / "device.toml").write_text("threads = 0\n")
    findings = look(device)
    assert "threads" in of(findings, "settings").found
    assert of(findings, "broker").level == "ok"


def test_damaged_rounds_are_a_problem(device):
    (device / "rounds.json").write_bytes(b"\xff\xff")
    assert "rounds" in broken(look(device))


def test_a_damaged_update_is_a_warning_and_stays_where_it_is(device):
    (device / "outbox").mkdir()
    (device / "outbox" / "update.sealed").write_bytes(b"damage")
    found = of(look(device), "outbox")
    assert (found.level, "update.sealed" in found.found) == ("warning", True)
    assert (device / "outbox" / "update.sealed").read_bytes() == b"damage"


def test_an_expired_certificate_is_named_with_how_to_get_another(device):
    findings = look(device, NOW + timedelta(days=900))
    assert broken(findings) == {"cert device"}
    assert "midge device replace" in of(findings, "cert device").advice


def test_a_clock_that_is_behind_what_the_server_said_is_a_warning_and_no_more(device):
    findings = look(device, datetime(1970, 1, 1, tzinfo=UTC))
    assert broken(findings) == {"clock"}
    assert of(findings, "clock").level == "warning"
    assert "1970" in of(findings, "clock").found
    assert of(findings, "cert device").level == "ok"


def test_keys_that_others_may_read_are_a_problem(device):
    os.chmod(device / "identity.json", 0o640)
    assert "chmod 600" in of(look(device), "secrets").advice


def test_a_broker_that_is_not_there_is_one_problem(device):
    (device / "device.toml").write_text((device / "device.toml").read_text() + "broker_port = 1\n")
    assert broken(look(device)) == {"broker"}
