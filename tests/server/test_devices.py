"""The life of a device, command by command, on a folder where nothing runs."""

import csv
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.envelope import KemKey, random_bytes
from device_client import identity as identities
from server.fleet import expulsion
from server.fleet.certificates import read_certificate
from server.fleet.enrolment import Registrar
from server.fleet.home import Home
from server.store.database import Database
from server.store.rows import Receipt, Round, Run
from tests.fleets import FEDERATION, TOPICS, Fleet, enrol_by_hand, is_refusal


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """A fleet with one device, and one that was added; for commands that change nothing."""
    made = Fleet(tmp_path_factory.mktemp("settled"))
    made.enrol("ann")
    made.midge("device", "add", "new")
    yield made
    made.stop()


def asked(fleet, *arguments):
    """The JSON that a command answers."""
    done = fleet.midge("device", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def row(fleet, name):
    with closing(Database(fleet.home.database)) as db, db.reading() as tx:
        return tx.device(name)


def changes(fleet):
    with closing(Database(fleet.home.database)) as db, db.reading() as tx:
        return tx.fleet_changes()


def wait_at_the_door(fleet, name):
    """Enrol with a token that was given --by-hand; return the keys that wait."""
    fleet.midge("device", "add", name, "--by-hand")
    bundle, keys = identities.read_bundle(fleet.home.bundle(name)), identities.new_keys()
    asked = enrolment.request(
        identities.contact(bundle), sign=keys.sign, kem=keys.kem, tls_public=keys.tls_public,
        server_kem=fleet.home.keys().kem.public, ephemeral=KemKey.from_seed(random_bytes(32)),
        software="test",
    )  # fmt: skip
    with closing(Database(fleet.home.database)) as db:
        Registrar(fleet.home, db, time.time).answer(name, messages.encode(asked))
    return keys


# ── In ──────────────────────────────────────────────────────────────────────────────────


def test_many_devices_are_added_at_once_with_a_list_of_their_bundles(fleet):
    found = asked(fleet, "add", "--count", "3", "--name", "ward-{:03}", "--hours", "72")
    names = ["ward-001", "ward-002", "ward-003"]
    assert [each["device"] for each in found["devices"]] == names
    with open(found["csv"], newline="") as file:
        listed = list(csv.DictReader(file))
    assert [each["device"] for each in listed] == names
    for each in listed:
        bundle = identities.read_bundle(fleet.home.bundle(each["device"]))
        assert str(fleet.home.bundle(each["device"])) == each["bundle"]
        assert bundle.token_expires == each["expires"]
        assert bundle.token not in Path(found["csv"]).read_text()
    assert [each["status"] for each in asked(fleet, "list")] == ["added"] * 3


def test_of_many_devices_none_is_added_when_one_cannot_be(fleet):
    fleet.enrol("ward-2")
    refused = fleet.midge("device", "add", "--count", "3", "--name", "ward-{}")
    is_refusal(refused, "'ward-2'", "enrolled already")
    assert not fleet.home.bundle("ward-1").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add"], ["--count 200"]),
        (["add", "a", "--count", "3", "--name", "b-{}"], ["say which"]),
        (["add", "--count", "3"], ["say which"]),
        (["add", "--name", "b-{}"], ["say which"]),
        (["add", "--count", "3", "--name", "ward"], ["'ward'", "ward-{:03}"]),
        (["add", "--count", "3", "--name", "{0.__class__}"], ["not a pattern"]),
        (["add", "--count", "3", "--name", "Ward-{}"], ["not a pattern"]),
        (["add", "--count", "0", "--name", "a-{}"], ["--count"]),
        (["accept", "ann"], ["'ann' does not wait", "enrolled"]),
        (["accept", "nobody"], ["no device 'nobody'", "midge device list"]),
        (["show", "nobody"], ["no device 'nobody'"]),
        (["list", "--status", "lost"], ["lost", "revoked"]),
        (["rotate", "nobody"], ["no device 'nobody'"]),
        (["rotate", "new"], ["'new' was added and has not enrolled"]),
        (["suspend", "nobody"], ["no device 'nobody'"]),
        (["resume", "new"], ["'new' was added"]),
        (["revoke", "nobody"], ["no device 'nobody'"]),
        (["remove", "nobody"], ["no device 'nobody'"]),
        (["replace", "nobody"], ["no device 'nobody'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_gets_one_sentence_and_changes_nothing(settled, arguments, words):
    before = changes(settled)
    is_refusal(settled.midge("device", *arguments), *words)
    assert changes(settled) == before


def test_whoever_waits_is_let_in_after_his_fingerprint_was_compared(fleet):
    keys = wait_at_the_door(fleet, "ward-3")
    is_refusal(fleet.midge("device", "accept", "ward-3"), keys.fingerprint, "--fingerprint")
    wrong = fleet.midge("device", "accept", "ward-3", "--fingerprint", "0000-0000-0000-0000")
    is_refusal(wrong, keys.fingerprint, "midge device revoke ward-3")
    assert row(fleet, "ward-3").status == "waiting"
    found = asked(fleet, "accept", "ward-3", "--fingerprint", keys.fingerprint)
    assert found == {
        "device": "ward-3", "status": "enrolled", "fingerprint": keys.fingerprint
    }  # fmt: skip
    assert row(fleet, "ward-3").status == "enrolled"


# ── Looking ─────────────────────────────────────────────────────────────────────────────


def test_an_update_of_the_open_round_is_when_its_device_was_last_seen(fleet):
    fleet.enrol("ann")
    run = Run(
        task_name="t", task_digest=b"", rounds_total=1, target=1, quorum=1, deadline_s=1.0,
        started_at=0.0,
    )  # fmt: skip
    this = Round(number=7, run_id=1, announcement=b"", round_key=b"", model_before=0, opened_at=0.0)
    at = time.time() + 60
    receipt = Receipt(
        upload=b"u", round=7, device="ann", init=b"", status="accepted", examples=1, at=at
    )
    with closing(Database(fleet.home.database)) as db:
        with db.transaction() as tx:
            tx.add_run(run)
            tx.open_round(this)
        before = asked(fleet, "show", "ann")
        assert (before["last_seen"] < at, before["last_round"]) == (True, 0)
        with db.transaction() as tx:
            tx.add_accepted([receipt])
        open_, row_ = asked(fleet, "show", "ann"), row(fleet, "ann")
        assert (open_["last_seen"], open_["last_round"], row_.last_round) == (at, 7, 0)
        with db.transaction() as tx:
            tx.close_round(7, model_after=1, closed_at=at, summary_json="{}")
    assert asked(fleet, "show", "ann") == open_
    assert (row(fleet, "ann").last_seen, row(fleet, "ann").last_round) == (at, 7)


def test_a_device_is_shown_with_all_that_is_known_of_it(fleet):
    fleet.enrol("ann")
    identity = identities.load(fleet.folder / "ann")
    found = asked(fleet, "show", "ann")
    assert (found["device"], found["status"], found["rounds"]) == ("ann", "enrolled", 0)
    assert found["fingerprint"] == identity.keys.fingerprint
    assert found["certified_until"] > found["keys_since"] > 0
    assert asked(fleet, "list") == [found]
    assert asked(fleet, "list", "--status", "suspended") == []
    text = fleet.midge("device", "show", "ann").stdout
    assert identity.keys.fingerprint in text
    assert "days" in text
    assert identity.psk.hex() not in text
    assert "broker does not answer" in fleet.midge("device", "list").stdout


# ── Steering ────────────────────────────────────────────────────────────────────────────


def test_a_device_is_suspended_and_comes_back(fleet):
    fleet.enrol("ann")
    before = changes(fleet)
    assert asked(fleet, "suspend", "ann") == {"device": "ann", "status": "suspended"}
    assert row(fleet, "ann").status == "suspended"
    assert asked(fleet, "suspend", "ann")["status"] == "suspended"
    assert asked(fleet, "resume", "ann")["status"] == "enrolled"
    assert row(fleet, "ann").status == "enrolled"
    assert changes(fleet) == before + 2
    assert fleet.home.roster().epoch == 0


def test_a_device_is_asked_for_new_keys(fleet):
    fleet.enrol("ann")
    before = changes(fleet)
    assert asked(fleet, "rotate", "ann") == {"device": "ann", "wanted": "rotate"}
    assert (row(fleet, "ann").wanted, changes(fleet)) == ("rotate", before + 1)


# ── Out ─────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_device_is_out_everywhere(fleet):
    fleet.enrol("ann", "ben")
    before = fleet.home.keys()
    found = asked(fleet, "revoke", "ann")
    assert (found["status"], found["broker_told"], found["fleet_epoch"]) == ("revoked", False, 2)
    for word in ("revoked.pem", "mosquitto.acl", "/etc/mosquitto/midge/", "systemctl reload"):
        assert word in found["broker_run"]
    assert row(fleet, "ann").status == "revoked"
    assert fleet.home.keys().fleet_key != before.fleet_key
    roster, ann = fleet.home.roster(), row(fleet, "ann")
    assert roster.has_revoked([ann.sign_public])
    assert roster.has_revoked([ann.kem_public])
    assert roster.has_revoked([ann.tls_public])
    assert not roster.has_revoked([row(fleet, "ben").sign_public])
    with closing(Database(fleet.home.database)) as db, db.reading() as tx:
        assert set(roster.serials) == {each.serial for each in tx.certificates("ann")}
        assert len(roster.serials) == 2  # the bundle's own certificate too
    acl = (fleet.home.broker / "mosquitto.acl").read_text()
    assert "user ann\ntopic deny #" in acl
    assert "user ben" not in acl


def test_to_revoke_twice_is_to_revoke_once(fleet):
    fleet.enrol("ann")
    asked(fleet, "revoke", "ann")
    files = sorted((fleet.home.folder / "keys").iterdir()) + sorted(fleet.home.broker.iterdir())
    before = {path: path.read_bytes() for path in files}, changes(fleet)
    asked(fleet, "revoke", "ann")
    assert ({path: path.read_bytes() for path in files}, changes(fleet)) == before


def test_what_is_revoked_stays_revoked(fleet):
    fleet.enrol("ann")
    asked(fleet, "revoke", "ann")
    for command in ("resume", "suspend"):
        is_refusal(fleet.midge("device", command, "ann"), "for good", "device replace ann")
    is_refusal(fleet.midge("device", "rotate", "ann"), "revoked")
    is_refusal(fleet.midge("device", "accept", "ann"), "revoked")
    is_refusal(fleet.midge("device", "add", "ann"), "device replace ann")


def test_a_token_that_was_never_used_can_be_revoked(fleet):
    asked(fleet, "add", "ann")
    bundle = identities.read_bundle(fleet.home.bundle("ann"))
    assert asked(fleet, "revoke", "ann")["fleet_epoch"] == 1  # it never had the present one
    with closing(Database(fleet.home.database)) as db, db.reading() as tx:
        assert tx.token("ann") is None
    assert bundle.device in fleet.home.roster().closed
    assert len(fleet.home.roster().serials) == 1


def test_a_removed_device_is_gone_and_its_name_may_be_added_again(fleet):
    fleet.enrol("ann")
    old = row(fleet, "ann")
    assert asked(fleet, "remove", "ann")["status"] == "removed"
    assert asked(fleet, "list") == []
    is_refusal(fleet.midge("device", "show", "ann"), "no device 'ann'")
    is_refusal(fleet.midge("device", "revoke", "ann"), "no device 'ann'")
    assert "systemctl restart" in asked(fleet, "add", "ann")["broker_run"]
    (fleet.folder / "ann" / "identity.json").unlink()
    with closing(Database(fleet.home.database)) as db:
        enrol_by_hand(fleet.home, db, "ann", fleet.folder / "ann-2")
    assert row(fleet, "ann").status == "enrolled"
    assert fleet.home.roster().has_revoked([old.sign_public])
    assert fleet.home.roster().closed == ()


def test_a_board_is_replaced_by_another_of_the_same_name(fleet):
    fleet.enrol("ann")
    old = row(fleet, "ann")
    found = asked(fleet, "replace", "ann")
    assert "systemctl restart" in found["broker_run"]
    bundle = identities.read_bundle(fleet.home.bundle("ann"))
    assert (bundle.device, found["bundle"]) == ("ann", str(fleet.home.bundle("ann")))
    assert fleet.home.roster().has_revoked([old.sign_public])
    assert fleet.home.roster().closed == ()
    assert asked(fleet, "list", "--status", "revoked") == []
    assert row(fleet, "ann").status == "removed"
    fresh = identities.read_bundle(fleet.home.bundle("ann"))
    assert fresh.bootstrap_certificate_pem not in fleet.home.roster().serials


def test_an_operator_who_left_is_turned_away_and_the_next_one_is_not(fleet):
    folder = fleet.home.folder / "operator"
    before = read_certificate((folder / "client.pem").read_bytes())
    done = fleet.midge("keys", "replace-operator", "--json")
    assert done.returncode == 0, done.stderr
    assert "systemctl restart" in json.loads(done.stdout)["broker_run"]
    after = read_certificate((folder / "client.pem").read_bytes())
    assert fleet.home.roster().serials == (f"{before.serial:x}",)
    assert (after.name, after.serial != before.serial) == (before.name, True)
    assert fleet.home.keys().fleet_epoch == 1  # he never had the fleet key by it
    fleet.broker.start()
    assert fleet.listen(TOPICS.srv) is not None
    assert fleet.midge("keys", "replace-operator").returncode == 0
    assert len(fleet.home.roster().serials) == 2


def test_an_older_database_does_not_readmit_anybody(fleet):
    fleet.enrol("ann", "ben")
    with closing(Database(fleet.home.database)) as db:
        db.checkpoint()
    backup = fleet.home.database.read_bytes()
    asked(fleet, "revoke", "ann")
    for path in fleet.home.state.glob("midge.db*"):
        path.unlink()
    fleet.home.database.write_bytes(backup)
    assert row(fleet, "ann").status == "enrolled"
    with closing(Database(fleet.home.database)) as db:
        expulsion.complete(fleet.home, db)
    assert row(fleet, "ann").status == "revoked"
    assert row(fleet, "ben").status == "enrolled"


def test_nor_does_a_database_from_before_its_keys_were_rotated(fleet):
    fleet.enrol("ann")
    with closing(Database(fleet.home.database)) as db:
        db.checkpoint()
        backup = fleet.home.database.read_bytes()
        with db.transaction() as tx:
            new = replace(tx.device("ann"), sign_public=b"n" * 32, kem_public=b"e" * 32,
                          tls_public=b"w" * 32)  # fmt: skip
            tx.add_device(new)
    asked(fleet, "revoke", "ann")
    for path in fleet.home.state.glob("midge.db*"):
        path.unlink()
    fleet.home.database.write_bytes(backup)
    with closing(Database(fleet.home.database)) as db:
        expulsion.complete(fleet.home, db)
    assert row(fleet, "ann").status == "revoked"


def test_an_older_roster_is_not_believed(fleet):
    fleet.enrol("ann", "ben")
    asked(fleet, "revoke", "ben")
    path = fleet.home.folder / "keys" / "roster.json"
    older = path.read_bytes()
    asked(fleet, "revoke", "ann")
    for data in (older, None):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        is_refusal(fleet.midge("server"), "roster.json", "older than the database")


def test_a_command_that_was_killed_half_way_is_finished_by_the_next(fleet):
    """After each step: what is on the disk then, and then everything else."""
    fleet.enrol("ann", "ben")
    with closing(Database(fleet.home.database)) as db:
        for name in ("ann", "ben"):
            asked(fleet, "suspend", name)
        with db.reading() as tx:
            who = expulsion._expelled(tx, "ann", 1.0)
        home = Home(fleet.home.folder)
        home.set_roster(home.roster().expelling(who, fleet_epoch=2))
        assert row(fleet, "ann").status == "suspended"  # killed here: only the roster knows
        expulsion.complete(home, db)
        assert row(fleet, "ann").status == "revoked"
        assert home.keys().fleet_epoch == 2
        assert "user ann" in (home.broker / "mosquitto.acl").read_text()
        count = changes(fleet)
        expulsion.complete(home, db)
        assert changes(fleet) == count
        (home.broker / "revoked.pem").unlink()  # or the disk lost what was not yet synced
        (home.broker / "mosquitto.acl").write_text("")
        expulsion.complete(home, db)
        ca = home.authority()
        assert ca.revocation_number((home.broker / "revoked.pem").read_bytes()) == 1
        assert "user ann" in (home.broker / "mosquitto.acl").read_text()
    assert home.roster().federation == FEDERATION
