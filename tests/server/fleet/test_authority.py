"""The certificate authority, checked with OpenSSL's own verifier where it can be."""

import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from broker_bridge.errors import LocalError
from server.fleet.authority import Authority, check_device_name
from server.fleet.certificates import read_certificate, write_private, write_public

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def ca():
    return Authority.create("midge test", now=NOW)


def openssl_verifies(tmp_path, ca, certificate, *, purpose, at=NOW, chain=b""):
    (tmp_path / "ca.pem").write_bytes(ca.certificate)
    (tmp_path / "chain.pem").write_bytes(chain or ca.certificate)
    (tmp_path / "leaf.pem").write_bytes(certificate)
    answer = subprocess.run(
        [
            "openssl",
            "verify",
            "-x509_strict",
            "-attime",
            str(int(at.timestamp())),
            "-untrusted",
            str(tmp_path / "chain.pem"),
            "-purpose",
            purpose,
            "-CAfile",
            str(tmp_path / "ca.pem"),
            str(tmp_path / "leaf.pem"),
        ],
        capture_output=True,
        check=False,
    )
    return answer.returncode == 0


def test_openssl_accepts_each_certificate_for_its_purpose_and_for_no_other(ca, tmp_path):
    broker = ca.issue_for_broker(["broker.example"], now=NOW).certificate
    device = ca.issue_with_new_key("ward-3", now=NOW).certificate
    assert openssl_verifies(tmp_path, ca, broker, purpose="sslserver")
    assert not openssl_verifies(tmp_path, ca, broker, purpose="sslclient")
    assert openssl_verifies(tmp_path, ca, device, purpose="sslclient")
    assert not openssl_verifies(tmp_path, ca, device, purpose="sslserver")


def test_a_certificate_of_another_ca_is_not_ours(ca, tmp_path):
    stranger = Authority.create("midge test", now=NOW)
    theirs = stranger.issue_with_new_key("ward-3", now=NOW).certificate
    assert not openssl_verifies(tmp_path, ca, theirs, purpose="sslclient")
    assert not ca.issued(theirs)
    assert stranger.issued(theirs)


def test_a_device_cannot_sign_further_certificates(ca, tmp_path):
    device = ca.issue_with_new_key("ward-3", now=NOW)
    rogue = Authority.load(device.certificate, device.key)
    forged = rogue.issue_with_new_key("ward-4", now=NOW).certificate
    assert not openssl_verifies(tmp_path, ca, forged, purpose="sslclient", chain=device.certificate)


def test_certificates_begin_a_day_early_and_end_when_asked(ca):
    facts = read_certificate(ca.issue_with_new_key("ward-3", now=NOW, days=30).certificate)
    assert facts.name == "ward-3"
    assert facts.valid_from == NOW - timedelta(days=1)
    assert facts.expires == NOW + timedelta(days=30)
    assert not facts.is_ca


def test_the_backdate_is_the_callers_to_choose(ca):
    issued = ca.issue_with_new_key("ward-3", now=NOW, backdate=timedelta(days=400))
    assert read_certificate(issued.certificate).valid_from == NOW - timedelta(days=400)


def test_a_certificate_outside_its_dates_is_refused_by_openssl(ca, tmp_path):
    device = ca.issue_with_new_key("ward-3", now=NOW, days=30).certificate
    late, early = NOW + timedelta(days=31), NOW - timedelta(days=2)
    assert not openssl_verifies(tmp_path, ca, device, purpose="sslclient", at=late)
    assert not openssl_verifies(tmp_path, ca, device, purpose="sslclient", at=early)


def test_the_ca_lasts_twenty_years_and_may_not_sign_other_cas(ca):
    facts = read_certificate(ca.certificate)
    assert facts.is_ca
    assert facts.expires > NOW + timedelta(days=19 * 365)


def test_the_server_and_the_operator_have_names_that_no_device_can_get(ca):
    assert read_certificate(ca.issue_for_server(now=NOW).certificate).name == "midge-server"
    assert read_certificate(ca.issue_for_operator(now=NOW).certificate).name == "midge-operator"
    key = SigningKey.generate().verify_key.encode()
    for name in ("midge-server", "midge-operator", "midge-x"):
        with pytest.raises(LocalError, match="belong to the server"):
            ca.issue_with_new_key(name, now=NOW)
        with pytest.raises(LocalError, match="belong to the server"):
            ca.issue_for_public_key(key, name, now=NOW)


@pytest.mark.parametrize(
    "name",
    ["", "+", "#", "a/b", "a+", "Ward", "a b", "-a", "a-", "ä", "a\n", "a" * 41, "a\0b", "$x"],
)
def test_a_name_that_would_open_other_topics_gets_no_certificate(ca, name):
    with pytest.raises(LocalError, match="device's name"):
        ca.issue_with_new_key(name, now=NOW)


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True))
def test_plain_names_are_fine(name):
    if not name.startswith("midge-"):
        check_device_name(name)


def test_a_device_keeps_its_own_ed25519_key(ca, tmp_path):
    public = SigningKey.generate().verify_key.encode()
    certificate = ca.issue_for_public_key(public, "ward-3", now=NOW)
    assert openssl_verifies(tmp_path, ca, certificate, purpose="sslclient")
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-pubkey"], input=certificate, capture_output=True, check=True
    ).stdout
    assert (
        ssl.PEM_cert_to_DER_cert(  # a public key's PEM ends in its 32 bytes
            shown.decode().replace("PUBLIC KEY", "CERTIFICATE")
        )[-32:]
        == public
    )


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
def test_a_key_of_the_wrong_length_is_refused(ca, key):
    with pytest.raises(LocalError, match="32 bytes"):
        ca.issue_for_public_key(key, "ward-3", now=NOW)


def test_serial_numbers_differ(ca):
    serials = {
        read_certificate(ca.issue_with_new_key("a", now=NOW).certificate).serial for _ in range(20)
    }
    assert len(serials) == 20


def test_the_brokers_certificate_names_hosts_and_addresses(ca):
    issued = ca.issue_for_broker(["broker.local", "192.168.1.7", "::1"], now=NOW)
    assert read_certificate(issued.certificate).hosts == ("broker.local", "192.168.1.7", "::1")
    with pytest.raises(LocalError, match="must name a host"):
        ca.issue_for_broker([], now=NOW)
    with pytest.raises(LocalError, match="neither"):
        ca.issue_for_broker(["brücke"], now=NOW)


def test_a_ca_survives_its_files(ca):
    again = Authority.load(ca.certificate, ca.key)
    assert ca.issued(again.issue_with_new_key("ward-3", now=NOW).certificate)


def test_a_ca_key_of_another_ca_is_noticed(ca):
    other = Authority.create("other", now=NOW)
    with pytest.raises(LocalError, match="does not belong"):
        Authority.load(ca.certificate, other.key)


@pytest.mark.parametrize("pem", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_pem_is_said_to_be_none(ca, pem):
    with pytest.raises(LocalError, match="PEM"):
        read_certificate(pem)
    with pytest.raises(LocalError, match="PEM"):
        Authority.load(pem, ca.key)
    with pytest.raises(LocalError, match="PEM"):
        Authority.load(ca.certificate, pem)
    assert not ca.issued(pem)


def test_a_time_without_a_zone_is_a_bug(ca):
    with pytest.raises(ValueError, match="zone"):
        ca.issue_with_new_key("a", now=datetime(2026, 1, 1))


def test_keys_are_written_for_their_owner_only_and_replace_what_was_there(tmp_path, ca):
    path = tmp_path / "ca-key.pem"
    write_private(path, b"old")
    write_private(path, ca.key)
    assert path.read_bytes() == ca.key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_public(tmp_path / "ca.pem", ca.certificate)
    assert stat.S_IMODE((tmp_path / "ca.pem").stat().st_mode) == 0o644
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ca-key.pem", "ca.pem"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LocalError, match="nowhere"):
        write_private(tmp_path / "nowhere" / "key.pem", b"")
