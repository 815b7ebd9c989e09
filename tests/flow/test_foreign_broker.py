"""A fleet at a broker that midge did not set up: another CA, passwords, other certificates.

The broker is mosquitto with the file that docs/brokers.md prints, passwords that
`mosquitto_passwd` wrote, and midge's mosquitto.acl; the fleet is real processes.
"""

import contextlib
import dataclasses
import json
import re
import secrets
import stat
import time
from pathlib import Path

import msgspec
import pytest

from broker_bridge.errors import LinkError, LocalError
from broker_bridge.wire.envelope import random_bytes
from device_client import identity as identities
from device_client.access import access_to_work
from device_client.cli import main as midge_device
from device_client.config import DeviceConfig
from server.cli import main as midge
from server.commands.bundle import What
from server.fleet import additions
from server.store.database import Database
from tests.company import Company
from tests.fleets import (
    TOPICS,
    Fleet,
    Listener,
    files_below,
    is_refusal,
    typed,
    wait_until,
)

LINES = """ca = "company-ca.pem"
username = "{name}"
password_file = "logins/{name}"
[broker.devices]
username = "{name}"
password_file = "logins/{name}"
"""
DEVICES = ("ann", "ben")


class Site:
    """A company's broker, and a fleet there whose server runs."""

    def __init__(self, folder):
        self.fleet = Fleet(folder)
        self.home = self.fleet.home.folder
        self.company = Company(folder / "company", port=self.fleet.port)
        self.fleet.broker = self.company.broker
        self.passwords = {}
        for name in ("midge-server", "midge-operator", "devices", *DEVICES):
            self.login(name)
        (self.home / "company-ca.pem").write_bytes(self.company.ca.read_bytes())
        self.company.settings(self.fleet, LINES)

    def login(self, name):
        self.passwords[name] = secrets.token_hex(16)
        self.company.add(name, self.passwords[name])
        return self.company.keep(self.home, name, self.passwords[name])

    def says(self, *command, **environment):
        return self.fleet.midge(*command, **environment)

    def device_says(self, *command, **environment):
        return typed(midge_device, *map(str, command), **environment)

    def access(self, name):
        """As an enrolled device gets in."""
        folder = self.fleet.folder / name
        found = identities.load(folder)
        return access_to_work(folder, found, DeviceConfig(), folder / "device.toml")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site"))
    try:
        made.fleet.start()
        yield made
    finally:
        made.fleet.stop()


@pytest.fixture(scope="module")
def at_work(site):
    """Two devices have enrolled and trained a round."""
    metrics = site.fleet.home.access("operator").open("listener", session_s=0, wait_s=20.0)
    for name in DEVICES:
        done = site.says("device", "add", name)
        assert done.returncode == 0, done.stderr
        bundle = str(site.fleet.home.bundle(name))
        site.fleet.device(name, "--bundle", bundle, "--log", "debug")
    heard = Listener(metrics, (TOPICS.metrics, TOPICS.all_states))
    try:
        for name in DEVICES:
            heard.wait_for_json(TOPICS.state(name), state="ready")
        done = site.says("start", "--task", "wearables", "--rounds", "1", "--target", "2")
        assert done.returncode == 0, done.stderr
        heard.wait_for_json(TOPICS.metrics, round=1, state="closed", accepted=2)
        yield site
    finally:
        metrics.close()


# ── All goes well ───────────────────────────────────────────────────────────────────────


def test_a_fleet_enrols_and_trains_with_passwords_at_a_broker_of_another_ca(at_work):
    """And each side's certificate of midge's own CA is never shown to it."""
    models = json.loads(at_work.says("model", "list", "--json").stdout)
    assert [each["version"] for each in models][-1] == 1
    for name in DEVICES:
        assert json.loads(at_work.says("device", "show", name, "--json").stdout)["rounds"] == 1
    assert not (at_work.fleet.folder / "ann" / "tls" / "device.pem").exists()


def test_a_bundle_for_such_a_broker_carries_its_ca_and_the_login_and_no_certificate(at_work):
    bundle = json.loads(at_work.fleet.home.bundle("ann").read_text())
    assert bundle["broker"]["username"] == "ann"
    assert bundle["broker"]["password"] == at_work.passwords["ann"]
    assert bundle["ca_pem"] == at_work.company.ca.read_text()
    assert bundle["bootstrap_certificate_pem"] == bundle["bootstrap_key_pem"] == ""


def test_no_password_is_in_a_log_a_list_of_processes_an_answer_or_an_open_file(at_work):
    shown = {}
    for command in (["doctor", "--json"], ["status"], ["device", "list", "--json"],
                    ["device", "show", "ann"], ["keys", "show", "--json"]):  # fmt: skip
        done = at_work.says(*command)
        shown[str(command)] = done.stdout + done.stderr
    for command in (["status", "--json"], ["doctor"]):
        done = at_work.device_says(*command, "--dir", at_work.fleet.folder / "ann")
        shown[f"device {command}"] = done.stdout + done.stderr
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            shown[str(path)] = path.read_bytes().decode(errors="replace")
    for path in at_work.fleet.folder.rglob("*.log"):
        shown[str(path)] = path.read_text(errors="replace")
    assert any("ann.log" in place for place in shown)
    assert any("server.log" in place for place in shown)
    shown["repr"] = repr(
        [at_work.access("ann"), identities.load(at_work.fleet.folder / "ann"),
         identities.read_bundle(at_work.fleet.home.bundle("ann")),
         at_work.fleet.home.access("server")]
    )  # fmt: skip
    leaks = [place for place, text in shown.items()
             if any(word in text for word in at_work.passwords.values())]  # fmt: skip
    assert leaks == []
    words = [word.encode() for word in at_work.passwords.values()]
    places = [at_work.home, at_work.fleet.folder / "ann"]
    files = [each for place in places for each in files_below(place)]
    holding = [path for path, data in files if any(word in data for word in words)]
    assert {"ann.bundle", "identity.json", "midge-server"} <= {path.name for path in holding}
    assert [path for path in holding if stat.S_IMODE(path.stat().st_mode) != 0o600] == []


def test_both_doctors_know_who_we_are_there(at_work):
    found = json.loads(at_work.says("doctor", "--json").stdout)["checks"]
    by_name = {}
    for each in found:
        by_name.setdefault(each["check"], []).append(each)
    assert [each["level"] for each in by_name["login"]] == ["ok", "ok"]
    assert "'midge-server'" in by_name["login"][0]["found"]
    for check in ("broker", "strangers", "access rules", "retained", "secrets"):
        assert {each["level"] for each in by_name[check]} == {"ok"}, by_name[check]
    assert "cert broker" not in by_name
    assert "cert server" not in by_name
    folder = at_work.fleet.folder / "ann"
    done = at_work.device_says("doctor", "--dir", folder, "--json")
    checks = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    assert checks["login"]["found"] == "this device is 'ann' to localhost"
    for check in ("login", "cert ca", "broker", "access rules"):
        assert checks[check]["level"] == "ok", checks[check]


# ── What the broker's rules hold ────────────────────────────────────────────────────────


def test_a_password_of_ones_own_gives_no_right_to_speak_as_another(at_work):
    with contextlib.closing(at_work.access("ann").open("ann", session_s=0, wait_s=20.0)) as link:
        link.publish(TOPICS.up(0, "ann", "join"), b"")
        assert link.flush(20.0)
        assert not link.refused
        link.publish(TOPICS.up(0, "ben", "join"), b"")
        assert link.flush(20.0)
        assert link.refused


def test_to_revoke_ends_with_what_a_person_does_at_the_broker(at_work):
    at_work.login("gone")
    assert at_work.says("device", "add", "gone").returncode == 0
    done = at_work.says("device", "revoke", "gone")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert "your broker does not hear of it" in last
    assert "gone" in last
    assert "mosquitto" not in done.stdout, "there is no line to run there"
    at_work.login("too")
    assert at_work.says("device", "add", "too").returncode == 0
    said = json.loads(at_work.says("device", "revoke", "too", "--json").stdout)
    assert (said["broker_told"], said["broker_run"]) == (False, "")


# ── Certificates of another CA ──────────────────────────────────────────────────────────


def test_a_device_enrols_with_a_certificate_of_the_companys_ca_that_its_system_trusts(at_work):
    folder, home = at_work.fleet.folder / "cat", at_work.home
    at_work.company.certify("cat", home / "logins")
    broker = at_work.fleet.home.config().broker
    devices = msgspec.structs.replace(
        broker.devices, ca="system", username="", password_file="",
        certificate="logins/{name}.pem", key="logins/{name}.key", client_id="{name}",
    )  # fmt: skip
    broker = msgspec.structs.replace(broker, port=at_work.company.port_2, devices=devices)
    with contextlib.closing(Database(at_work.fleet.home.database)) as db:
        added = additions.add(at_work.fleet.home, db, "cat", now=time.time(), hours=1,
                              by_hand=False, broker=broker)  # fmt: skip
    assert json.loads(added.bundle.read_text())["ca_pem"] == "system"
    trusting = {"SSL_CERT_FILE": str(at_work.company.ca), "SSL_CERT_DIR": "/nonexistent"}
    done = at_work.device_says("enrol", added.bundle, "--dir", folder, "--wait", "20", **trusting)
    assert done.returncode == 0, done.stderr
    access = at_work.access("cat")
    assert access.tls.certificate.read_text() == (home / "logins" / "cat.pem").read_text()
    assert stat.S_IMODE(access.tls.key.stat().st_mode) == 0o600
    done = at_work.device_says("doctor", "--dir", folder, "--json", **trusting)
    checks = {each["check"]: each["level"] for each in json.loads(done.stdout)["checks"]}
    assert (checks["cert device"], checks["broker"], checks["access rules"]) == ("ok", "ok", "ok")
    assert "cert ca" not in checks
    # Another system does not trust that CA; one without any says so.
    none = {"SSL_CERT_FILE": "/nonexistent", "SSL_CERT_DIR": "/nonexistent"}
    other = {"SSL_CERT_FILE": str(home / "ca" / "ca.pem"), "SSL_CERT_DIR": "/nonexistent"}
    for trust, words in ((none, "trusts no CA"), (other, "not who it should be")):
        done = at_work.device_says("doctor", "--dir", folder, "--json", **trust)
        checks = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
        assert words in checks["broker"]["found"], checks["broker"]


def test_the_operator_gets_in_with_a_certificate_of_the_companys_ca(at_work, changed):
    for name in ("midge-server", "midge-operator"):
        at_work.company.certify(name, at_work.home / "logins")
    pair = 'certificate = "logins/{name}.pem"\nkey = "logins/{name}.key"\n'
    lines = f'ca = "company-ca.pem"\n{pair}[broker.devices]\n{pair}'
    at_work.company.settings(at_work.fleet, lines, port=at_work.company.port_2)
    assert at_work.says("status").returncode == 0
    found = json.loads(at_work.says("doctor", "--json").stdout)["checks"]
    levels = {each["check"]: each["level"] for each in found}
    for check in ("cert server", "cert operator", "strangers", "access rules", "retained"):
        assert levels[check] == "ok", found
    at_work.company.settings(at_work.fleet, 'ca = "company-ca.pem"', port=at_work.company.port_2)
    is_refusal(at_work.says("status"), "refused our client certificate", "one that this broker")


def test_an_enrolled_device_moves_to_another_broker_by_its_own_settings(at_work, tmp_path):
    """Its bundle was for a broker of midge's own; device.toml takes it to the company's."""
    own = Fleet(tmp_path)
    own.enrol("dan")
    folder = own.folder / "dan"
    at_work.company.certify("dan", folder)
    (folder / "company-ca.pem").write_bytes(at_work.company.ca.read_bytes())
    (folder / "device.toml").write_text(
        f'broker_port = {at_work.company.port_2}\n[broker]\nca = "company-ca.pem"\n'
        'certificate = "{name}.pem"\nkey = "{name}.key"\n'
    )
    done = at_work.device_says("doctor", "--dir", folder, "--json")
    checks = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    for check in ("cert ca", "cert device", "broker", "access rules"):
        assert checks[check]["level"] == "ok", checks[check]
    (folder / "dan.key").chmod(0o640)
    done = at_work.device_says("doctor", "--dir", folder, "--json")
    checks = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    assert "others on this machine may read the key" in checks["login"]["found"]


# ── What is wrong is said, with what to change ──────────────────────────────────────────


@pytest.fixture
def changed(at_work):
    """The fleet's folder with another midge.toml, and passwords, for one test."""
    path = at_work.home / "midge.toml"
    before = {each: each.read_bytes() for each in [path, *(at_work.home / "logins").iterdir()]}
    yield path
    for each, data in before.items():
        each.write_bytes(data)
        if each != path:
            each.chmod(0o600)


@pytest.mark.parametrize("protocol", ["5.0", "3.1.1"])
def test_a_wrong_password_is_one_sentence_that_names_what_to_change(at_work, changed, protocol):
    (at_work.home / "logins" / "midge-operator").write_text("not it\n")
    with pytest.raises(LinkError) as caught:
        at_work.fleet.home.access("operator").open(
            "midge-operator", session_s=0, wait_s=20.0, protocol=protocol
        )
    said = str(caught.value)
    assert re.search(r"refused the user name 'midge-operator' or its password \(Not auth", said)
    assert said.endswith(f"correct [broker.operator] in {changed}")
    assert "not it" not in said
    is_refusal(at_work.says("status"), "refused the user name 'midge-operator'", "midge.toml")


def test_a_device_with_a_wrong_password_is_told_where_to_change_it(at_work, tmp_path):
    path = at_work.login("eve")
    path.write_text("not hers\n")
    bundle = json.loads(at_work.says("device", "add", "eve", "--json").stdout)["bundle"]
    done = at_work.device_says("enrol", bundle, "--dir", tmp_path / "eve", "--wait", "20")
    is_refusal(done, "refused the user name 'eve'", "[broker.devices]", "midge device add")
    folder = tmp_path / "ann"
    identities.save(folder_of(folder), identities.load(at_work.fleet.folder / "ann"))
    (folder / "device.toml").write_text(
        '[broker]\nusername = "ann"\npassword_file = "broker.password"\n'
    )
    (folder / "broker.password").touch(mode=0o600)
    (folder / "broker.password").write_text("nor this")
    done = at_work.device_says("doctor", "--dir", folder, "--json")
    checks = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    assert "refused the user name 'ann'" in checks["broker"]["found"]
    assert checks["broker"]["advice"] == f"correct [broker] in {folder / 'device.toml'}"
    running = at_work.fleet.device("ann-moved", "--dir", str(folder))
    running.wait_for(f"correct [broker] in {folder / 'device.toml'}")
    assert "refused the user name 'ann'" in running.log
    assert running.terminate() == 0, "it waits for a person, and ends when asked to"
    assert "nor this" not in running.log
    (folder / "broker.password").write_text(at_work.passwords["ann"])
    done = at_work.device_says("doctor", "--dir", folder, "--json")
    checks = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    assert checks["broker"]["level"] == "ok"


def folder_of(path):
    path.mkdir(parents=True)
    return path


def test_a_password_file_that_is_missing_open_to_others_or_no_password_is_refused(at_work, changed):
    path = at_work.home / "logins" / "midge-operator"
    words = path.read_bytes()
    path.chmod(0o644)
    is_refusal(at_work.says("status"), str(path), "others on this machine may read", "chmod 600")
    path.chmod(0o600)
    for wrong in (b"", b"\n", b"two\nlines\n", b"\xff\xfe"):
        path.write_bytes(wrong)
        is_refusal(at_work.says("status"), str(path))
    path.unlink()
    is_refusal(at_work.says("status"), str(path), "no such file")
    found = json.loads(at_work.says("doctor", "--json").stdout)["checks"]
    login = [each for each in found if each["check"] == "login" and each["level"] != "ok"]
    assert str(path) in login[0]["found"]
    path.touch(mode=0o600)
    path.write_bytes(words)
    assert at_work.says("status").returncode == 0


def test_no_bundle_is_made_without_what_its_device_needs(at_work, changed):
    before = sorted(at_work.home.glob("bundles/*"))
    is_refusal(at_work.says("device", "add", "fay"), "logins/fay", "no such file")
    at_work.company.keep(at_work.home, "ward-1", "first")
    is_refusal(at_work.says("device", "add", "--count", "2", "--name", "ward-{}"), "logins/ward-2")
    is_refusal(at_work.says("flash", "--count", "2", "--name", "ward-{}", "--image", "none.img",
                            "--broker", "192.0.2.7:8883"), "logins/ward-2")  # fmt: skip
    at_work.company.settings(at_work.fleet, LINES.partition("[broker.devices]")[0])
    is_refusal(at_work.says("device", "add", "fay"), "[broker.devices]", "--broker-username")
    assert sorted(at_work.home.glob("bundles/*")) == before
    other = at_work.company.keep(at_work.home, "other", "a word")
    done = at_work.says("device", "add", "fay", "--broker-username", "pool-7",
                        "--broker-password-file", str(other))  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(at_work.fleet.home.bundle("fay").read_text())["broker"]
    assert (made["username"], made["password"]) == ("pool-7", "a word")
    is_refusal(at_work.says("device", "add", "fay", "--broker-key", str(other)),
               "certificate and key belong together")  # fmt: skip


def test_a_card_or_a_file_that_installs_a_device_carries_its_login_too(at_work):
    at_work.company.keep(at_work.home, "kim", "a word of kim's")
    what = What(at_work.fleet.home, data="", own=(), role="train", task_cache=False, days=1.0,
                by_hand=False, made=None, address="192.0.2.7:8883", wheels=None)  # fmt: skip
    bundle = json.loads(what.token("kim", time.time())[0])
    assert (bundle["broker_host"], bundle["broker"]["password"]) == ("192.0.2.7", "a word of kim's")


def test_settings_that_contradict_themselves_are_refused(at_work, changed):
    for lines, words in (
        ('password_file = "logins/x"', "password_file stands without username"),
        ('certificate = "x.pem"', "certificate and key belong together"),
        ('password = "secret"', "there is no setting 'broker.password'"),
        ('[broker.devices]\nkey = "x.key"', "certificate and key belong together"),
    ):
        at_work.company.settings(at_work.fleet, lines)
        done = at_work.says("status")
        is_refusal(done, words)
        assert "secret" not in done.stderr
    at_work.company.settings(at_work.fleet, LINES)
    is_refusal(at_work.says("broker"), "a broker of somebody else's")


def test_who_shares_a_password_can_speak_as_another_and_is_not_believed(at_work):
    """The broker's rules cannot tell devices apart then; signatures can, and rules for the rest."""
    before = json.loads(at_work.says("status", "--json").stdout)["rejected"]
    own = at_work.access("ann")
    shared = dataclasses.replace(own, username="devices", password=at_work.passwords["devices"])
    with contextlib.closing(shared.open("thief", session_s=0, wait_s=20.0)) as link:
        for topic in (TOPICS.round, TOPICS.ctl, TOPICS.down("ann", "ack")):
            link.publish(topic, b"")
            assert link.flush(20.0)
        assert link.refused == 3, "what is the server's or the operator's stays theirs"
        link.publish(TOPICS.up(0, "ann", "join"), random_bytes(200))
        assert link.flush(20.0)
        assert link.refused == 3

    def counted():
        now = json.loads(at_work.says("status", "--json").stdout)["rejected"]
        return sum(now.values()) > sum(before.values())

    wait_until(counted, "the forged word is counted")


def test_a_backup_takes_the_logins_along_and_says_what_it_leaves_out(at_work, changed, tmp_path):
    words = tmp_path / "words"
    words.write_text("four words nobody guesses\n")
    outside = tmp_path / "outside.password"
    outside.touch(mode=0o600)
    outside.write_text("elsewhere")
    at_work.company.settings(
        at_work.fleet,
        LINES + f'[broker.operator]\nusername = "midge-operator"\npassword_file = "{outside}"\n',
    )
    file, restored = tmp_path / "a.backup", tmp_path / "restored"
    done = at_work.says("backup", str(file), "--passphrase-file", str(words))
    assert done.returncode == 0, done.stderr
    assert str(outside) in done.stdout
    done = typed(midge, "restore", str(file), str(restored), "--passphrase-file", str(words))
    assert done.returncode == 0, done.stderr
    kept = restored / "logins" / "midge-server"
    assert kept.read_bytes() == (at_work.home / "logins" / "midge-server").read_bytes()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_a_key_of_another_certificate_is_refused_before_a_bundle_is_made(at_work, tmp_path):
    for name in ("gil", "hal"):
        at_work.company.certify(name, tmp_path)
    done = at_work.says("device", "add", "gil", "--broker-certificate", str(tmp_path / "gil.pem"),
                        "--broker-key", str(tmp_path / "hal.key"))  # fmt: skip
    is_refusal(done, "does not belong to the certificate")
    with pytest.raises(LocalError):
        identities.read_bundle(at_work.fleet.home.bundle("gil"))
