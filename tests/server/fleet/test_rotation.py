"""New keys and certificates for the fleet's own machines; whole or not at all."""

import contextlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from broker_bridge.disk import RealDisk
from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import random_bytes
from server.cli import main
from server.fleet import rotation
from server.fleet.expulsion import replace_operator
from server.fleet.home import Home, create
from server.fleet.keys import new_keys, read_root
from server.store.database import Database
from tests.fleets import is_refusal, typed

NOW = datetime.now(UTC)


@pytest.fixture
def home(tmp_path):
    return create(tmp_path / "fleet", federation="demo", hosts=["localhost", "127.0.0.1"], port=1)


def root_of(home: Home) -> Path:
    return home.folder / "offline" / "root.json"


def midge(home, *arguments):
    return typed(main, *arguments, "--dir", str(home.folder))


# ── The server's identity ───────────────────────────────────────────────────────────────


def test_a_new_identity_is_signed_by_the_root_and_numbered_on(home):
    before = home.keys()
    after = rotation.rotate_identity(home, root_of(home))
    assert after == home.keys()
    assert (before.said.sequence, after.said.sequence) == (1, 2)
    assert after.said.sign_public == after.sign.public != before.sign.public
    assert after.said.kem_public == after.kem.public != before.kem.public
    assert (after.fleet_key, after.fleet_epoch) == (before.fleet_key, before.fleet_epoch)


def test_the_root_of_another_fleet_is_refused_and_nothing_changes(home, tmp_path):
    before = home.keys()
    other, _ = new_keys("demo", random_bytes, now=1.0)
    path = tmp_path / "root.json"
    path.write_bytes(msgspec.json.encode(other))
    with pytest.raises(LocalError, match="another fleet"):
        rotation.rotate_identity(home, path)
    assert home.keys() == before


@pytest.mark.parametrize("content", [b"", b"{}", b"[[[", b'{"federation":"demo","seed":"AA=="}'])
def test_what_is_no_root_key_is_refused_in_one_sentence(home, tmp_path, content):
    path = tmp_path / "root.json"
    path.write_bytes(content)
    is_refusal(midge(home, "keys", "rotate", "--root", str(path)), "root.json", "no root key")
    is_refusal(midge(home, "keys", "rotate", "--root", str(tmp_path / "none.json")), "none.json")


class FailingDisk(RealDisk):
    """Says no at one call, as a disk does that is full or broken."""

    def __init__(self, point: int) -> None:
        self.calls, self.point = 0, point
        for name in ("open", "pwrite", "fchmod", "fsync", "rename"):
            setattr(self, name, self._counted(getattr(RealDisk, name)))

    def _counted(self, call):
        def counted(*arguments):
            self.calls += 1
            if self.calls == self.point:
                raise OSError(5, "input/output error")
            return call(*arguments)

        return counted


@pytest.mark.parametrize("change", ["identity", "epoch"])
def test_keys_are_changed_whole_or_not_at_all(home, change):
    def attempt(disk):
        if change == "epoch":
            return home.next_epoch(disk=disk)
        return rotation.rotate_identity(home, root_of(home), disk=disk)

    unharmed = FailingDisk(0)
    attempt(unharmed)
    assert unharmed.calls > 4
    for point in range(1, unharmed.calls + 1):
        before, disk = home.keys(), FailingDisk(point)
        with pytest.raises(LocalError):
            attempt(disk)
        now = home.keys()
        is_new = now.fleet_epoch > before.fleet_epoch or now.said.sequence > before.said.sequence
        assert now == before or (is_new and disk.calls > 4), point


def test_a_fleet_key_is_new_each_time_and_its_number_grows(home):
    found = [home.keys(), *(home.next_epoch() for _ in range(5))]
    assert [keys.fleet_epoch for keys in found] == [1, 2, 3, 4, 5, 6]
    assert len({keys.fleet_key for keys in found}) == 6
    assert {keys.sign_seed for keys in found} == {found[0].sign_seed}


# ── Certificates ────────────────────────────────────────────────────────────────────────


def test_certificates_are_renewed_for_the_keys_and_names_that_they_had(home):
    before = {name: facts for name, _, facts in rotation.certificates(home)}
    keys = {p: p.read_bytes() for p in home.folder.rglob("*-key.pem")}
    later = NOW + timedelta(days=800)
    with contextlib.closing(Database(home.database)) as db:
        done = dict(rotation.renew_certificates(home, db, now=later))
    assert set(done) == {"broker", "server", "operator"}
    for name, path, facts in rotation.certificates(home):
        assert facts.name == before[name].name
        assert facts.hosts == before[name].hosts
        if name != "ca":
            assert facts.expires > later + timedelta(days=800)
            assert facts.serial != before[name].serial
            assert home.authority().issued(path.read_bytes())
    assert {p: p.read_bytes() for p in home.folder.rglob("*-key.pem")} == keys


def test_an_operator_is_replaced_with_all_the_certificates_that_he_had(home):
    before = {name: facts for name, _, facts in rotation.certificates(home)}["operator"]
    with contextlib.closing(Database(home.database)) as db:
        between = dict(rotation.renew_certificates(home, db, now=NOW))["operator"]
        roster = replace_operator(home, db, now=NOW)
    assert {f"{before.serial:x}", f"{between.serial:x}"} <= set(roster.serials)


def test_a_certificate_of_another_ca_is_not_renewed(home, tmp_path):
    other = create(tmp_path / "other", federation="demo", hosts=["localhost"], port=1)
    with pytest.raises(LocalError, match="not from this fleet's CA"):
        home.authority().renew((other.broker / "broker.pem").read_bytes(), now=NOW)


# ── The commands ────────────────────────────────────────────────────────────────────────


def test_show_says_what_there_is_and_no_secret(home):
    shown = midge(home, "keys", "show")
    facts = json.loads(midge(home, "keys", "show", "--json").stdout)
    assert [key["key"] for key in facts["keys"]] == [
        "root", "server signs", "server opens", "fleet key",
    ]  # fmt: skip
    assert [key["days"] for key in facts["keys"]] == [None, 0, 0, 0]
    assert [c["certificate"] for c in facts["certificates"]] == [
        "ca", "broker", "server", "operator",
    ]  # fmt: skip
    keys, root = home.keys(), read_root(root_of(home))
    text = shown.stdout + json.dumps(facts)
    for secret in (keys.sign_seed, keys.kem_seed, keys.fleet_key, root.seed):
        assert secret.hex() not in text
    assert "PRIVATE" not in text


def test_rotate_says_the_new_number_and_fingerprint(home):
    done = midge(home, "keys", "rotate", "--root", str(root_of(home)), "--json")
    assert json.loads(done.stdout)["number"] == 2
    facts = json.loads(midge(home, "keys", "show", "--json").stdout)
    assert facts["keys"][1]["fingerprint"] == json.loads(done.stdout)["fingerprint"]
    assert "drawer" in midge(home, "keys", "rotate", "--root", str(root_of(home))).stdout


def test_a_new_fleet_key_can_be_had_by_a_command(home):
    done = midge(home, "keys", "new-fleet-key", "--json")
    assert json.loads(done.stdout) == {"number": 2}
    assert home.keys().fleet_epoch == 2
    assert "key 3" in midge(home, "keys", "new-fleet-key").stdout


def test_renew_certificates_says_until_when(home):
    done = midge(home, "keys", "renew-certificates", "--json")
    found = json.loads(done.stdout)["certificates"]
    assert [c["certificate"] for c in found] == ["broker", "server", "operator"]
    assert all(c["days_left"] >= 824 for c in found)
    assert "restart" in midge(home, "keys", "renew-certificates").stdout


def test_a_key_file_from_before_ages_were_kept_is_still_read(home):
    path = home.folder / "keys" / "server.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k != "fleet_since"}
    path.write_text(json.dumps(old))
    facts = json.loads(midge(home, "keys", "show", "--json").stdout)
    assert facts["keys"][-1]["days"] is None


def test_nothing_secret_shows_when_keys_are_printed(home):
    keys, root = home.keys(), read_root(root_of(home))
    shown = repr(keys) + repr(root) + str(keys)
    assert repr(root.seed)[2:-1] not in shown
    assert repr(keys.fleet_key)[2:-1] not in shown
