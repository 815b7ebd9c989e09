"""The fleet's folder: what `midge init` makes, once."""

import json
import subprocess

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.wire.enrolment import server_identity
from server.fleet.home import Home, create

PUBLIC = ("midge.toml", "ca.pem", "broker.pem", "client.pem", "revoked.pem", "mosquitto.acl")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "fleet"
    return create(folder, federation="ward", hosts=["broker.example", "10.0.0.7"], port=18883)


def test_what_was_made_is_found_again(home):
    found = Home.find(home.folder)
    assert found == home
    assert (found.config().federation, found.config().broker.port) == ("ward", 18883)
    assert found.config().broker.host == "broker.example"
    assert found.keys().federation == "ward"


def test_a_folder_that_is_no_fleet_is_named(tmp_path):
    with pytest.raises(LocalError, match="midge init"):
        Home.find(tmp_path)


def test_the_servers_keys_are_signed_by_the_root(home):
    keys = home.keys()
    identity = server_identity(keys.root_public, "ward", keys.identity)
    assert identity.sign_public == keys.sign.public
    assert identity.kem_public == keys.kem.public


def test_the_roots_secret_is_in_one_file_only(home):
    seed = json.loads((home.folder / "offline" / "root.json").read_text())["seed"]
    others = [p for p in home.folder.rglob("*") if p.is_file() and p.parent.name != "offline"]
    assert others
    for path in others:
        assert seed.encode() not in path.read_bytes(), path


def test_secrets_are_for_their_owner_alone(home):
    for path in home.folder.rglob("*"):
        public = path.name in PUBLIC
        assert public or path.stat().st_mode & 0o077 == 0, path


def test_nothing_secret_shows_when_it_is_printed(home):
    keys = home.keys()
    for secret in (keys.sign_seed, keys.kem_seed, keys.fleet_key):
        assert repr(secret)[2:-1] not in repr(keys)
        assert secret.hex() not in repr(keys)


def test_two_fleets_share_nothing(home, tmp_path):
    other = create(tmp_path / "other", federation="ward", hosts=["broker.example"], port=1)
    ours, theirs = home.keys(), other.keys()
    assert ours.sign_seed != theirs.sign_seed
    assert ours.fleet_key != theirs.fleet_key
    assert ours.root_public != theirs.root_public


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("something")
    with pytest.raises(LocalError, match="not empty"):
        create(tmp_path, federation="ward", hosts=["localhost"], port=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["", "Ward", "a/b", "+", "#", "a b", "x" * 41, "ä"])
def test_a_name_that_cannot_be_in_a_topic_is_refused(tmp_path, name):
    with pytest.raises(LocalError, match="cannot name a federation"):
        create(tmp_path / "new", federation=name, hosts=["localhost"], port=1)
    assert not (tmp_path / "new").exists()


def test_an_init_that_was_interrupted_is_no_fleet(tmp_path):
    made = create(tmp_path / "new", federation="ward", hosts=["localhost"], port=1)
    (made.folder / "midge.toml").unlink()  # it is written last
    with pytest.raises(LocalError, match="holds no fleet"):
        Home.find(made.folder)


def test_keys_that_are_damaged_are_named(tmp_path):
    made = create(tmp_path / "new", federation="ward", hosts=["localhost"], port=1)
    path = made.folder / "keys" / "server.json"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LocalError, match=r"server\.json is damaged"):
        made.keys()


def test_the_brokers_certificate_names_every_host(home):
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in",
         str(home.broker / "broker.pem")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "DNS:broker.example" in shown
    assert "IP Address:10.0.0.7" in shown
