"""Who a device is, on disk: whole or not there, and for its owner alone."""

import json

import msgspec
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.wire.enrolment import Credentials
from broker_bridge.wire.messages import Configured
from device_client import identity as identities
from server.fleet.enrolment import add_device
from server.fleet.home import create
from server.store.database import Database
from tests.fleets import enrol_by_hand


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    home = create(folder / "fleet", federation="demo", hosts=["localhost"], port=1)
    db = Database(home.database)
    yield home, db
    db.close()


@pytest.fixture
def enrolled(fleet, tmp_path, request):
    name = f"d{abs(hash(request.node.name)) % 10**8}"
    return tmp_path / name, enrol_by_hand(*fleet, name, tmp_path / name)


def bundle(fleet, name):
    home, db = fleet
    return add_device(home, db, name, broker=home.config().broker, now=1e9)


def test_an_identity_comes_back_as_it_was_saved(enrolled):
    folder, identity = enrolled
    assert identities.load(folder) == identity
    assert not (folder / "enrolling.json").exists()


def test_a_device_that_never_enrolled_has_none(tmp_path):
    assert identities.load(tmp_path) is None


@pytest.mark.parametrize("more", [{}, {"tomorrow": {"key": 1}}])
def test_an_identity_of_a_newer_version_is_not_called_damaged(enrolled, more):
    """After a downgrade it said: remove it and enrol anew. That would have cost the keys."""
    folder, _ = enrolled
    path = folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2} | more))
    with pytest.raises(LocalError, match=r"identity\.json was written by a newer midge") as told:
        identities.load(folder)
    assert "remove" not in str(told.value)


def test_every_secret_is_for_its_owner_alone(enrolled):
    folder, identity = enrolled
    identities.tls_files(folder, identity)
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_nothing_secret_shows_when_it_is_printed(enrolled):
    _, identity = enrolled
    shown = repr(identity) + repr(identity.keys) + str(identity)
    for secret in (identity.psk, identity.fleet_key, identity.keys.sign_seed,
                   identity.keys.kem_seed, identity.keys.tls_seed):  # fmt: skip
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


def test_keys_are_on_the_disk_before_they_are_used_and_the_same_after_a_power_cut(tmp_path):
    first = identities.pending_keys(tmp_path / "new")
    assert identities.pending_keys(tmp_path / "new") == first
    assert identities.pending_keys(tmp_path / "other") != first


def test_an_identity_that_is_cut_short_is_an_error_at_every_length(enrolled):
    folder, _ = enrolled
    path = folder / "identity.json"
    whole = path.read_bytes()
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(LocalError, match=r"identity\.json is damaged"):
            identities.load(folder)


def test_tls_files_are_written_again_when_they_are_gone_or_wrong(enrolled):
    folder, identity = enrolled
    files = identities.tls_files(folder, identity)
    key = files.key.read_bytes()
    files.key.unlink()
    files.certificate.write_text("not a certificate")
    again = identities.tls_files(folder, identity)
    assert again.key.read_bytes() == key
    assert again.certificate.read_text() == identity.certificate_pem


def test_the_key_for_tls_is_the_one_that_was_certified(enrolled):
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )
    from cryptography.x509 import load_pem_x509_certificate

    folder, identity = enrolled
    key = load_pem_private_key(identities.tls_files(folder, identity).key.read_bytes(), None)
    certificate = load_pem_x509_certificate(identity.certificate_pem.encode())
    public = certificate.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) == public
    assert public == identity.keys.tls_public


def test_a_bundle_that_is_cut_short_is_an_error_at_every_length(fleet, tmp_path):
    whole = bundle(fleet, "cut").read_bytes()
    path = tmp_path / "cut.bundle"
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(LocalError, match="copy it whole"):
            identities.read_bundle(path)


@pytest.mark.parametrize("field", ["root_public", "server_identity", "federation"])
def test_a_bundle_whose_server_is_not_the_roots_is_refused(fleet, tmp_path, field):
    text = bundle(fleet, "forged").read_text()
    read = identities.read_bundle(fleet[0].bundle("forged"))
    value = getattr(read, field)
    wrong = ("0" if value[0] != "0" else "1") + value[1:] if field != "federation" else "other"
    path = tmp_path / "forged.bundle"
    path.write_text(text.replace(value, wrong))
    with pytest.raises(LocalError, match=r"forged\.bundle"):
        identities.read_bundle(path)


def test_a_bundle_shows_no_secret_when_it_is_printed(fleet):
    read = identities.read_bundle(bundle(fleet, "shown"))
    assert read.token not in repr(read)
    assert "PRIVATE" not in repr(read)


def test_an_identity_for_midges_own_broker_is_what_it_was_before_there_were_others(enrolled):
    folder, _ = enrolled
    assert "broker" not in json.loads((folder / "identity.json").read_bytes())


def test_a_login_for_another_broker_stays_through_a_renewal_and_shows_its_own_files(enrolled):
    folder, before = enrolled
    login = Credentials(username="x", password="hush", certificate_pem="C", key_pem="K")
    identity = msgspec.structs.replace(before, ca_pem="system", broker=login)
    identities.save(folder, identity)
    assert identities.load(folder) == identity
    assert "hush" not in repr(identity)
    answer = Configured(
        device=identity.device, certificate_pem="NEW", certified_until=5, issued_at=9e9,
        fleet_epoch=2, fleet_key=bytes(32),
    )  # fmt: skip
    after = identities.renewed(identity, answer, identity.keys)
    assert (after.broker, after.certificate_pem) == (login, "NEW")
    files = identities.tls_files(folder, after)
    assert (files.ca, files.floor_s) == (None, 9e9)
    assert (files.certificate.read_text(), files.key.read_text()) == ("C", "K")
    nameless = msgspec.structs.replace(after, broker=Credentials(username="x", password="hush"))
    files = identities.tls_files(folder, nameless)
    assert (files.certificate, files.key) == (None, None)
