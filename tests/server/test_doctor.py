"""`midge doctor` beside a real mosquitto: a healthy fleet, and one test for each broken thing."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker_bridge.checkup import exit_code
from broker_bridge.link.local_broker import LocalBroker, shipped_file
from broker_bridge.link.paho_link import PahoLink
from server.cli import main
from server.doctor import examine
from server.fleet.certificates import write_private, write_public
from tests.fleets import ROOT, TOPICS, Fleet, typed

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A fleet as it should be, its root key in a drawer, and a broker that runs."""
    fleet = Fleet(tmp_path_factory.mktemp("healthy"))
    put_away(fleet)
    fleet.enrol("ward-1")
    try:
        fleet.broker.start()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def alone(tmp_path):
    """A fleet of a test's own, whose broker does not run yet."""
    fleet = Fleet(tmp_path)
    put_away(fleet)
    yield fleet
    fleet.stop()


def put_away(fleet):
    (fleet.home.folder / "offline" / "root.json").unlink()


def look(fleet, now=NOW):
    return list(examine(fleet.home, now))


def of(findings, check):
    """The one finding of a check that is not ok, or the only one there is."""
    found = [f for f in findings if f.check == check]
    return next((f for f in found if f.level != "ok"), found[0])


def broken(findings):
    return {f.check for f in findings if f.level != "ok"}


def with_other_broker(fleet, change):
    """Start the fleet's broker with a changed mosquitto.conf."""
    text = shipped_file("mosquitto.conf").read_text()
    changed = change(text)
    assert changed != text
    shutil.copy(shipped_file("mosquitto.acl"), fleet.home.broker)
    fleet.broker = LocalBroker(fleet.home.broker, port=fleet.port, engine="mosquitto",
                               conf_text=changed)  # fmt: skip
    fleet.broker.start()


# ── Healthy ─────────────────────────────────────────────────────────────────────────────


def test_a_healthy_fleet_is_all_ok(healthy):
    findings = look(healthy)
    assert broken(findings) == set(), findings
    assert {
        "clock", "disk", "versions", "mosquitto", "secrets", "root key", "keys", "cert ca",
        "cert broker", "cert server", "cert operator", "database", "settings", "tasks", "broker",
        "broker limits", "strangers", "access rules", "retained", "persistence",
    } == {f.check for f in findings}  # fmt: skip
    assert "262,144 bytes, 200 in flight" in of(findings, "broker limits").found
    assert "wearables" in of(findings, "tasks").found


def test_the_command_prints_a_line_for_each_check_and_exits_with_0(healthy):
    done = typed(main, "doctor", "--dir", str(healthy.home.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())


def test_the_command_prints_json_for_scripts(healthy):
    done = typed(main, "doctor", "--dir", str(healthy.home.folder), "--json")
    said = json.loads(done.stdout)
    assert said["worst"] == "ok"
    assert {"check", "level", "found", "advice"} == set(said["checks"][0])


def test_a_look_leaves_nothing_behind(healthy):
    before = sorted(p for p in healthy.home.folder.rglob("*") if "broker" not in p.parts)
    look(healthy)
    after = sorted(p for p in healthy.home.folder.rglob("*") if "broker" not in p.parts)
    assert after == before
    link = PahoLink.open("localhost", healthy.port, client_id="reader", session_s=0,
                         tls=healthy.home.tls("server"))  # fmt: skip
    mark = TOPICS.up(0, "midge-test", "join")
    link.subscribe(["midge/v1/demo/#"])
    link.publish(mark, b"")
    event = None
    while getattr(event, "topic", None) != mark:
        event = link.receive(20.0)
        assert event is not None
        assert not getattr(event, "retained", False), event
    link.close()


# ── Broken, one thing at a time ─────────────────────────────────────────────────────────


def test_a_root_key_that_stayed_is_a_warning_and_exit_code_1(healthy):
    path = healthy.home.folder / "offline" / "root.json"
    path.touch(mode=0o600)
    try:
        done = typed(main, "doctor", "--dir", str(healthy.home.folder))
    finally:
        path.unlink()
    assert done.returncode == 1
    assert "warning  root key" in done.stdout
    assert "drawer" in done.stdout


def test_certificates_that_have_expired_are_named(healthy):
    findings = look(healthy, NOW + timedelta(days=900))
    assert broken(findings) == {"cert broker", "cert server", "cert operator"}
    assert "expired on" in of(findings, "cert broker").found
    assert of(findings, "cert broker").advice
    assert exit_code(findings) == 2


def test_certificates_that_end_within_a_month_are_warnings(healthy):
    findings = look(healthy, NOW + timedelta(days=825 - 20))
    assert broken(findings) == {"cert broker", "cert server", "cert operator"}
    assert exit_code(findings) == 1


@pytest.mark.parametrize("now", [datetime(1970, 1, 1, tzinfo=UTC), NOW - timedelta(days=3)])
def test_a_clock_before_the_federation_was_made_is_a_problem(healthy, now):
    findings = look(healthy, now)
    assert "before this federation was made" in of(findings, "clock").found
    assert "set-ntp" in of(findings, "clock").advice
    assert exit_code(findings) == 2


def test_a_clock_decades_ahead_is_a_problem(healthy):
    assert of(look(healthy, NOW.replace(year=NOW.year + 30, day=1)), "clock").level == "problem"


def test_an_operator_whose_certificate_expired_is_told_so_by_date_and_by_broker(alone):
    alone.broker.start()
    issued = alone.home.authority().issue_for_operator(now=NOW - timedelta(days=900))
    folder = alone.home.folder / "operator"
    write_public(folder / "client.pem", issued.certificate)
    write_private(folder / "client-key.pem", issued.key)
    findings = look(alone)
    assert broken(findings) == {"cert operator", "broker"}
    assert "refused our client certificate" in of(findings, "broker").found


def test_a_broker_that_cannot_be_reached_is_one_problem(alone):
    findings = look(alone)
    assert broken(findings) == {"broker"}
    assert "nothing listens at" in of(findings, "broker").found
    assert "start the broker" in of(findings, "broker").advice


def test_a_broker_without_access_rules_is_seen(alone):
    with_other_broker(alone, lambda text: text.replace("acl_file ", "#acl_file "))
    findings = look(alone)
    assert broken(findings) == {"access rules"}
    assert "mosquitto.acl" in of(findings, "access rules").advice
    assert exit_code(findings) == 2


def test_a_broker_that_lets_strangers_in_is_seen(alone):
    with_other_broker(
        alone,
        lambda text: (
            text.replace("require_certificate true", "require_certificate false")
            .replace("use_identity_as_username true", "use_identity_as_username false")
            .replace("allow_anonymous false", "allow_anonymous true")
            .replace("acl_file ", "#acl_file ")
        ),
    )
    findings = look(alone)
    assert broken(findings) == {"strangers", "access rules"}
    assert "require_certificate true" in of(findings, "strangers").advice


def test_a_broker_with_small_packets_and_no_persistence_is_seen(alone):
    with_other_broker(
        alone,
        lambda text: text.replace("max_packet_size 262144", "max_packet_size 8192").replace(
            "persistence true", "persistence false"
        ),
    )
    findings = look(alone)
    assert broken(findings) == {"broker limits", "persistence"}
    assert "max_packet_size" in of(findings, "broker limits").advice
    assert exit_code(findings) == 1


def test_a_broker_that_retains_nothing_is_seen(alone):
    with_other_broker(alone, lambda text: text + "\nretain_available false\n")
    findings = look(alone)
    assert "retained" in broken(findings)


def test_a_secret_that_others_may_read_is_named(healthy):
    path = healthy.home.folder / "keys" / "server.json"
    path.chmod(0o644)
    try:
        found = of(look(healthy), "secrets")
    finally:
        path.chmod(0o600)
    assert found.level == "problem"
    assert f"chmod 600 {path}" in found.advice


def test_a_damaged_task_and_no_task_at_all_are_told_apart(healthy):
    path = healthy.home.folder / "tasks" / "wearables.task"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1])
        assert "wearables.task" in of(look(healthy), "tasks").found
        assert of(look(healthy), "tasks").level == "problem"
        path.unlink()
        assert of(look(healthy), "tasks").level == "warning"
    finally:
        path.write_bytes(whole)


def test_held_out_samples_that_are_not_there_are_named(alone):
    path = alone.home.folder / "midge.toml"
    path.write_text(path.read_text().replace('# npz = "held-out.npz"', 'npz = "/no/such.npz"'))
    assert "/no/such.npz" in of(look(alone), "tasks").found


def test_settings_that_are_wrong_do_not_end_the_report(healthy):
    path = healthy.home.folder / "midge.toml"
    text = path.read_text()
    path.write_text(text + "\n[broken]\n")
    try:
        findings = look(healthy)
    finally:
        path.write_text(text)
    assert "'broken'" in of(findings, "settings").found
    assert of(findings, "cert broker").level == "ok"


def test_keys_of_another_federation_are_seen(alone):
    path = alone.home.folder / "midge.toml"
    path.write_text(path.read_text().replace('"demo"', '"other"'))
    assert "'other'" in of(look(alone), "keys").found


# ── Disks, in a namespace of their own ──────────────────────────────────────────────────

MOUNT = 'mount -t tmpfs -o "$1" midge-test "$2" && shift 2 && exec "$@"'


def on_a_disk(options, fleet):
    """`midge doctor --json` where the fleet's state is on a file system mounted so."""
    state = fleet.home.state
    probe = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", options, str(state)]
    try:
        tried = subprocess.run([*probe, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare(1), of Linux")
    if tried.returncode:
        pytest.skip(f"needs a mount namespace: {tried.stderr.decode().strip()}")
    done = subprocess.run(
        [*probe, sys.executable, "-m", "server.cli", "doctor", "--dir", str(fleet.home.folder),
         "--json"],
        capture_output=True, text=True, check=False, cwd=Path(ROOT),
    )  # fmt: skip
    return done.returncode, [c for c in json.loads(done.stdout)["checks"] if c["check"] == "disk"]


def test_a_read_only_disk_is_a_problem(alone):
    code, found = on_a_disk("ro,size=4m", alone)
    assert code == 2
    assert "read-only" in found[0]["found"] + found[0]["advice"]


def test_a_disk_without_room_in_memory_is_a_problem_and_a_warning(alone):
    code, found = on_a_disk("size=4m", alone)
    assert code == 2
    assert {f["level"] for f in found} == {"problem", "warning"}
    assert any("tmpfs" in f["found"] for f in found)
    assert any("MiB free" in f["found"] for f in found)
