"""Certificates and keys of the fleet's machines that are damaged or gone, and what helps then."""

import contextlib
import json
import os
import shutil
import signal
import sys
from datetime import UTC, datetime, timedelta

import pytest

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.tls import TlsFiles
from server.cli import main
from server.fleet.authority import Authority
from server.fleet.certificates import is_issued_by, read_certificate, write_private, write_public
from server.fleet.enrolment import Registrar
from server.fleet.home import Home, create
from server.fleet.machines import check_usable, machines
from server.fleet.repair import repair
from server.fleet.rotation import renew_certificates
from server.store.database import Database
from tests.fleets import MIDGE, Fleet, enrol_by_hand, is_refusal, run, typed

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A fleet as it should be, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    home = create(folder / "fleet", federation="demo", hosts=["localhost", "127.0.0.1"], port=1)
    typed(main, "device", "add", "ward-1", "--dir", str(home.folder))
    return home.folder


@pytest.fixture
def home(whole, tmp_path):
    return Home(shutil.copytree(whole, tmp_path / "fleet"))


def midge(home, *arguments):
    return typed(main, *arguments, "--dir", str(home.folder))


def mend(home, *, hosts=(), now=NOW):
    with contextlib.closing(Database(home.database)) as db:
        return list(repair(home, db, hosts=hosts, now=now))


def files_of(home):
    """All keys and certificates."""
    found = [*home.folder.rglob("*.pem"), *home.folder.glob("keys/*.json")]
    return {p.relative_to(home.folder).as_posix(): p.read_bytes() for p in found}


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def is_well(home):
    """Whether each machine can use its files, and the CA certified them."""
    ca = home.authority().certificate
    return all(not each.fault_in_fleet(ca, NOW) for each in machines(home.folder))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "damaged": cut,
    "damaged by zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
}
CERTIFICATES = {"broker": "broker/broker.pem", "server": "server/client.pem",
                "status": "operator/client.pem"}  # fmt: skip
KEYS = {command: name.replace(".pem", "-key.pem") for command, name in CERTIFICATES.items()}


# ── What is said ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*CERTIFICATES.items(), *KEYS.items()], ids=lambda n: n[1])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_who_needs_a_damaged_file_names_it_and_the_command_that_helps(home, name, damage):
    command, path = name[0], home.folder / name[1]
    DAMAGES[damage](path)
    told = f"{path} is {damage}; `midge keys repair --dir {home.folder}` makes it again"
    is_refusal(midge(home, command), told)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize("command", ["broker", "server", "status", "device add w", "keys show"])
def test_a_damaged_ca_certificate_is_named_by_all_who_need_it(home, command, damage):
    path = home.folder / "ca" / "ca.pem"
    DAMAGES[damage](path)
    is_refusal(midge(home, *command.split()), f"{path} is {damage}; `midge keys repair")


@pytest.mark.parametrize("name", ["ca/ca-key.pem", "keys/server.json"])
@pytest.mark.parametrize(("damage", "word"), [("missing", "lost"), ("damaged", "damaged")])
def test_what_nobody_can_make_again_is_said_with_where_to_get_it(home, name, damage, word):
    DAMAGES[damage](home.folder / name)
    before = files_of(home)
    told = (f"{name} is {word}", "midge restore", f"copy {name} from there", "midge init")
    is_refusal(midge(home, "device", "add", "ward-2"), *told)
    if "ca" in name:
        (home.folder / "ca" / "ca.pem").unlink()
        before.pop("ca/ca.pem")
        is_refusal(midge(home, "keys", "repair"), *told)
    assert files_of(home) == before


def test_the_ca_key_comes_back_from_a_backup_as_the_sentence_says(home, tmp_path):
    words = tmp_path / "words"
    words.write_text("four words nobody guesses\n")
    with_words = ("--passphrase-file", str(words))
    assert midge(home, "backup", str(tmp_path / "a.backup"), *with_words).returncode == 0
    (home.folder / "ca" / "ca-key.pem").unlink()
    other = tmp_path / "other"
    done = typed(main, "restore", str(tmp_path / "a.backup"), str(other), *with_words)
    assert done.returncode == 0, done.stderr
    shutil.copy(other / "ca" / "ca-key.pem", home.folder / "ca")
    assert midge(home, "device", "add", "ward-2").returncode == 0


def test_the_doctor_sees_a_key_that_is_lost_or_does_not_fit(home):
    (home.folder / "server" / "client-key.pem").unlink()
    shutil.copy(home.folder / "operator" / "client-key.pem", home.broker / "broker-key.pem")
    (home.folder / "ca" / "ca-key.pem").unlink()
    found = {
        each["check"]: each for each in json.loads(midge(home, "doctor", "--json").stdout)["checks"]
    }
    assert "client-key.pem is missing" in found["cert server"]["found"]
    assert "is not the certificate of" in found["cert broker"]["found"]
    assert "midge keys repair" in found["cert broker"]["advice"]
    assert "ca-key.pem is lost" in found["cert ca"]["found"]
    assert "midge restore" in found["cert ca"]["advice"]


# ── What is made again ──────────────────────────────────────────────────────────────────


def test_what_is_good_stays_as_it_is(home):
    before = files_of(home)
    assert mend(home) == []
    assert files_of(home) == before
    assert "nothing to repair" in midge(home, "keys", "repair").stdout


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CERTIFICATES.values())
def test_a_certificate_is_made_again_for_the_key_that_is_there(home, name, damage):
    before = files_of(home)
    DAMAGES[damage](home.folder / name)
    done = mend(home)
    assert [str(home.folder / name) in each.was for each in done] == [True]
    after = files_of(home)
    assert {n for n in after if after[n] != before[n]} == {name}
    assert is_well(home)
    assert read_certificate(after[name]).name == (
        read_certificate(before[name]).name if "client" in name else "localhost"
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", KEYS.values())
def test_a_key_that_is_gone_is_made_anew_with_its_certificate(home, name, damage):
    before = files_of(home)
    DAMAGES[damage](home.folder / name)
    left = (home.folder / name).read_bytes() if damage != "missing" else None
    mend(home)
    after = files_of(home)
    certificate = name.replace("-key", "")
    assert {n for n in before if after[n] != before[n]} == {name, certificate}
    assert is_well(home)
    old, new = read_certificate(before[certificate]), read_certificate(after[certificate])
    assert (old.name, old.hosts) == (new.name, new.hosts)
    assert (home.folder / name).stat().st_mode & 0o777 == 0o600
    aside = home.folder / f"{name}.damaged"
    assert (aside.read_bytes() if aside.exists() else None) == left
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        noted = {each.serial for each in tx.certificates(old.name)}
    assert f"{old.serial:x}" in noted  # so that it can be revoked


def test_expired_certificates_are_made_again_for_their_keys(home):
    before = files_of(home)
    done = mend(home, now=NOW + timedelta(days=900))
    assert [("expired on" in each.was, "key stays" in each.done) for each in done] == [
        (True,) * 2
    ] * 3
    after = files_of(home)
    assert {n for n in after if after[n] != before[n]} == set(CERTIFICATES.values())


def test_a_certificate_of_another_ca_or_of_another_key_is_made_again(home, tmp_path):
    other = Authority.create("midge demo", now=NOW)
    strange = other.issue_for_server(now=NOW)
    write_public(home.folder / "server" / "client.pem", strange.certificate)
    write_private(home.folder / "server" / "client-key.pem", strange.key)
    shutil.copy(home.folder / "operator" / "client.pem", home.broker / "broker.pem")
    assert len(mend(home)) == 2
    assert is_well(home)


def test_a_certificate_of_another_machine_is_made_again_in_its_name(home):
    for name in ("client.pem", "client-key.pem"):
        shutil.copy(home.folder / "operator" / name, home.folder / "server" / name)
    (done,) = mend(home)
    assert "is that of midge-operator" in done.was
    facts = read_certificate((home.folder / "server" / "client.pem").read_bytes())
    assert facts.name == "midge-server"


@pytest.mark.parametrize("moment", [datetime(1970, 1, 2, tzinfo=UTC), NOW + timedelta(days=9000)])
def test_nothing_is_certified_by_a_clock_that_cannot_be_right(home, moment):
    before = files_of(home)
    with contextlib.closing(Database(home.database)) as db:
        for attempt in (
            lambda: list(repair(home, db, hosts=["new.example.org"], now=moment)),
            lambda: renew_certificates(home, db, now=moment),
        ):
            with pytest.raises(LocalError, match="set that clock"):
                attempt()
    assert files_of(home) == before


@pytest.mark.parametrize("kind", ["encrypted", "of another kind"])
def test_a_key_that_midge_did_not_make_is_not_touched(home, kind):
    path = home.folder / "operator" / "client-key.pem"
    make = ["-algorithm", "ED25519"] if kind == "of another kind" else [
        "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-aes-128-cbc", "-pass",
        "pass:words",
    ]  # fmt: skip
    assert run("openssl", "genpkey", *make, "-out", str(path)).returncode == 0
    before = files_of(home)
    is_refusal(midge(home, "keys", "repair"), str(path), "move this one away")
    assert files_of(home) == before


def test_the_brokers_names_are_those_of_its_certificate_and_those_that_are_asked_for(home):
    def names():
        return set(read_certificate((home.broker / "broker.pem").read_bytes()).hosts)

    assert mend(home, hosts=["localhost"]) == []
    (done,) = mend(home, hosts=["broker.example.org"])
    assert "names localhost, 127.0.0.1 only" in done.was
    assert names() == {"localhost", "127.0.0.1", "broker.example.org"}
    settings = home.folder / "midge.toml"
    settings.write_text(settings.read_text().replace('"localhost"', '"broker.example.com"'))
    cut(home.broker / "broker.pem")
    (done,) = mend(home)
    assert names() == {"broker.example.com", "localhost", "127.0.0.1"}
    assert "broker.example.com" in done.done  # for a person to see what is left out


@pytest.mark.parametrize("where", ["broker", "bundle"])
def test_the_ca_certificate_is_copied_from_where_else_it_lies(home, where):
    before = files_of(home)
    cut(home.folder / "ca" / "ca.pem")
    if where == "bundle":
        (home.broker / "ca.pem").unlink()
    else:
        (home.folder / "bundles" / "ward-1.bundle").write_text("{}")
    assert "copied" in mend(home)[0].done
    assert files_of(home) == before


def test_a_ca_certificate_that_lies_nowhere_is_made_again_and_all_that_it_certified_stays(home):
    before = files_of(home)
    for path in (home.folder / "ca" / "ca.pem", home.broker / "ca.pem",
                 home.folder / "bundles" / "ward-1.bundle"):  # fmt: skip
        path.unlink()
    mend(home)
    after = files_of(home)
    assert {n for n in after if after[n] != before[n]} == {"ca/ca.pem", "broker/ca.pem"}
    for name in CERTIFICATES.values():
        assert is_issued_by(before[name], after["ca/ca.pem"])
    assert read_certificate(after["ca/ca.pem"]).is_ca


def test_no_ca_is_made_for_a_key_that_certified_nobody_here(home):
    for path in (home.folder / "ca" / "ca.pem", home.broker / "ca.pem",
                 home.folder / "bundles" / "ward-1.bundle"):  # fmt: skip
        path.unlink()
    write_private(home.folder / "ca" / "ca-key.pem", Authority.create("x", now=NOW).key)
    before = files_of(home)
    is_refusal(midge(home, "keys", "repair"), "ca-key.pem is the key of another CA", "restore")
    assert files_of(home) == before


def test_what_the_broker_reads_is_made_again_from_the_roster(home):
    assert midge(home, "device", "revoke", "ward-1").returncode == 0
    cut(home.broker / "revoked.pem")
    (home.broker / "mosquitto.acl").unlink()
    (home.broker / "ca.pem").write_text("")
    assert json.loads(midge(home, "keys", "repair", "--json").stdout)["repaired"][0]["done"]
    listed = home.authority().revocation_number((home.broker / "revoked.pem").read_bytes())
    assert listed == home.roster().epoch == 1
    assert "user ward-1" in (home.broker / "mosquitto.acl").read_text()
    check_usable(home.folder, "broker")


def killed_at(home, point):
    """Repair in a process that gets SIGKILL before it opens or renames its n-th file."""
    child = os.fork()
    if child == 0:
        seen = [0]

        def strike(event, args):
            if event == "os.rename" or (event == "open" and str(args[0]).endswith(".new")):
                seen[0] += 1
                if seen[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        try:
            mend(home)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_repair_that_is_killed_anywhere_is_finished_by_the_next(whole, tmp_path):
    point = 1
    while True:
        home = Home(shutil.copytree(whole, tmp_path / f"at-{point}"))
        cut(home.folder / "ca" / "ca.pem")
        cut(home.broker / "broker.pem")
        (home.folder / "server" / "client-key.pem").unlink()
        cut(home.folder / "operator" / "client-key.pem")
        good = (home.broker / "broker-key.pem").read_bytes()
        killed = killed_at(home, point)
        mend(home)
        assert is_well(home)
        assert (home.broker / "broker-key.pem").read_bytes() == good
        if not killed:
            break
        point += 1
    assert point > 10


# ── With a real broker ──────────────────────────────────────────────────────────────────


def test_a_fleet_that_lost_all_of_it_runs_again_and_its_devices_notice_nothing(tmp_path):
    fleet = Fleet(tmp_path)
    home = fleet.home
    try:
        fleet.enrol("ann")
        former = tmp_path / "former-ca.pem"
        shutil.copy(home.folder / "ca" / "ca.pem", former)
        for name in (*CERTIFICATES.values(), *KEYS.values()):
            (home.folder / name).unlink()
        cut(home.folder / "ca" / "ca.pem")
        cut(home.broker / "ca.pem")
        shutil.rmtree(home.folder / "bundles")
        done = fleet.midge("keys", "repair")
        assert done.returncode == 0, done.stderr
        assert "restart the broker and the server" in done.stdout
        assert (home.folder / "ca" / "ca.pem").read_bytes() != former.read_bytes()
        fleet.start()
        assert fleet.status()["phase"] == "idle"
        device = fleet.device("ann")  # which has the former CA's certificate, and its own under it
        device.wait_for("connected")
        files = home.tls("operator")
        PahoLink.open("localhost", fleet.port, client_id="eye", session_s=0, wait_s=10.0,
                      tls=TlsFiles(former, files.certificate, files.key)).close()  # fmt: skip
    finally:
        fleet.stop()


def test_a_fleet_without_its_ca_key_goes_on_and_certifies_nobody(tmp_path):
    fleet = Fleet(tmp_path)
    try:
        fleet.enrol("ann")
        (fleet.home.folder / "ca" / "ca-key.pem").unlink()
        fleet.start()
        fleet.device("ann").wait_for("connected")
        assert fleet.status()["phase"] == "idle"
        assert fleet.server.is_running
    finally:
        fleet.stop()


def test_a_device_is_refused_and_the_server_goes_on_while_the_ca_key_is_lost(home, tmp_path):
    key = home.folder / "ca" / "ca-key.pem"
    with contextlib.closing(Database(home.database)) as db:
        identity = enrol_by_hand(home, db, "bob", tmp_path / "bob")
        aside = key.rename(tmp_path / "aside")
        office = Registrar(home, db, lambda: NOW.timestamp() + 900 * 86_400)
        with db.reading() as tx:
            device = tx.device("bob")
        with pytest.raises(PeerError, match="cannot certify anybody now"):
            office.certificate_for(device)
        aside.rename(key)
        pem, _ = office.certificate_for(device)
    assert read_certificate(pem.encode()).name == identity.device


def test_an_expired_broker_is_told_with_what_helps(tmp_path):
    fleet = Fleet(tmp_path)
    try:
        issued = fleet.home.authority().issue_for_broker(
            ["localhost"], now=NOW - timedelta(days=900)
        )
        write_public(fleet.home.broker / "broker.pem", issued.certificate)
        write_private(fleet.home.broker / "broker-key.pem", issued.key)
        log = tmp_path / "broker.log"
        broker = fleet._run(log, *MIDGE, "broker", "--dir", str(fleet.home.folder))
        broker.wait_for("expired on")
        broker.wait_for("mosquitto listens on")
        assert "midge keys renew-certificates" in broker.said
        is_refusal(fleet.midge("status"), "certificate has expired")
        assert fleet.midge("keys", "renew-certificates").returncode == 0
        assert broker.terminate() == 0
        fleet.start()
    finally:
        fleet.stop()
