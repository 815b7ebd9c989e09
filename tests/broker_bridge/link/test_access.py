"""How one gets into a broker, from what settings say to what the broker hears."""

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker_bridge.config import load_config, overridden
from broker_bridge.errors import LinkError, LocalError
from broker_bridge.link.access import Access, Login, ca_pem, credentials
from broker_bridge.link.session_settings import SessionSettings
from broker_bridge.link.tls import TlsFiles
from broker_bridge.wire.enrolment import SYSTEM_CA

OWN = Access(host="localhost", port=1, tls=TlsFiles(Path("ca"), Path("own.pem"), Path("own.key")))


@pytest.fixture
def settings(tmp_path, pki):
    """A settings file, beside it a password and somebody else's certificate."""
    (tmp_path / "word").touch(mode=0o600)
    (tmp_path / "word").write_text("hush, hush\r\n")
    files = pki.files("ward-1")
    for name, path in (("ward-1.pem", files.certificate), ("ward-1.key", files.key)):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_bytes(path.read_bytes())
    return tmp_path / "midge.toml"


def with_login(settings, **login):
    return OWN.with_login(Login(**login), "ward-1", settings=settings, table="broker")


# ── Settings ────────────────────────────────────────────────────────────────────────────


def test_without_a_login_everything_is_as_at_midges_own_broker(settings):
    found = with_login(settings)
    assert (found.tls, found.username, found.password) == (OWN.tls, None, None)
    assert found.client_id == OWN.client_id


def test_a_user_name_takes_the_place_of_midges_certificate_and_another_certificate_does(settings):
    found = with_login(settings, username="{name}", password_file="word")
    assert (found.username, found.password) == ("ward-1", "hush, hush")
    assert (found.tls.certificate, found.tls.key) == (None, None)
    pair = {"certificate": "{name}.pem", "key": "{name}.key"}
    found = with_login(settings, **pair)
    assert found.tls.certificate == settings.parent / "ward-1.pem"
    assert found.username is None
    both = with_login(settings, username="x", **pair)
    assert (both.tls.key, both.username) == (settings.parent / "ward-1.key", "x")
    assert both.password is None, "some brokers want a name alone"


def test_another_ca_leaves_who_we_are_as_it_is(settings):
    assert with_login(settings, ca="other.pem").tls.ca == settings.parent / "other.pem"
    found = with_login(settings, ca="system")
    assert found.tls.ca is None
    assert found.tls.certificate == OWN.tls.certificate


def test_a_setting_that_lacks_its_other_half_is_refused_by_name(tmp_path):
    path = tmp_path / "login.toml"
    path.write_text('password_file = "x"')
    with pytest.raises(LocalError, match=r"password_file stands without username; name both"):
        load_config(path, Login)
    with pytest.raises(LocalError, match=r"--x: .*certificate and key belong together"):
        overridden(Login(), "--x", key="k")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644, 0o601])
def test_a_password_and_a_key_that_others_may_touch_are_refused(settings, mode):
    for name, login in (
        ("word", {"username": "x", "password_file": "word"}),
        ("ward-1.key", {"certificate": "ward-1.pem", "key": "ward-1.key"}),
    ):
        path = settings.parent / name
        path.chmod(mode)
        for use in (
            lambda login=login: with_login(settings, **login),
            lambda login=login: credentials(Login(**login), "ward-1", settings.parent),
        ):
            with pytest.raises(LocalError, match=f"chmod 600 {re.escape(str(path))}") as caught:
                use()
            assert "hush" not in str(caught.value)
        path.chmod(0o400)
        with_login(settings, **login)


# ── What a bundle carries ───────────────────────────────────────────────────────────────


def test_a_bundle_carries_what_the_files_hold_and_nothing_for_midges_own_broker(settings):
    folder = settings.parent
    assert credentials(Login(ca="system"), "ward-1", folder) is None
    found = credentials(Login(username="{name}", password_file="word"), "ward-1", folder)
    assert (found.username, found.password) == ("ward-1", "hush, hush")
    assert found.certificate_pem == found.key_pem == ""
    pair = Login(certificate="{name}.pem", key="{name}.key", client_id="{name}")
    found = credentials(pair, "ward-1", folder)
    assert found.certificate_pem.startswith("-----BEGIN CERTIFICATE")
    assert "PRIVATE KEY" in found.key_pem
    assert found.client_id == "{name}"
    assert not credentials(Login(client_id="{name}"), "ward-1", folder).says_who


def test_a_bundle_says_a_ca_in_pem_or_that_the_devices_system_knows_it(settings, pki):
    folder = settings.parent
    (folder / "ca.pem").write_bytes(pki.ca.certificate)
    assert ca_pem("", folder, own="OWN") == "OWN"
    assert ca_pem("system", folder, own="OWN") == SYSTEM_CA
    assert ca_pem("ca.pem", folder, own="OWN").encode() == pki.ca.certificate
    with pytest.raises(LocalError, match="holds no CA certificate"):
        ca_pem("word", folder, own="OWN")
    with pytest.raises(LocalError, match="does not exist"):
        ca_pem("nowhere.pem", folder, own="OWN")


def test_a_password_is_in_no_repr(settings):
    login = Login(username="x", password_file="word")
    access = with_login(settings, username="x", password_file="word")
    session = SessionSettings(host="h", port=1, client_id="c", username="x", password="hush, hush")
    shown = repr([login, access, session, credentials(login, "ward-1", settings.parent)])
    assert "hush" not in shown


# ── What the broker hears ───────────────────────────────────────────────────────────────


class OneAnswer:
    """A TLS port that answers each CONNECT with the same bytes, and keeps what it was sent."""

    def __init__(self, pki, answer):
        self._answer = answer
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pki.folder / "broker.pem", pki.folder / "broker-key.pem")
        self.ca = TlsFiles(pki.folder / "ca.pem")
        self.heard = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                line, _ = self._listening.accept()
                with self._context.wrap_socket(line, server_side=True) as line:
                    self.heard = line.recv(4096)
                    line.sendall(self._answer)

    def close(self):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


REFUSALS = [  # MQTT 3.1.1 §3.2.2.3 and 5.0 §3.2.2.2
    ("3.1.1", b"\x20\x02\x00\x04"),
    ("3.1.1", b"\x20\x02\x00\x05"),
    ("5.0", b"\x20\x03\x00\x86\x00"),
    ("5.0", b"\x20\x03\x00\x87\x00"),
]


@pytest.mark.parametrize(("protocol", "answer"), REFUSALS)
def test_a_refused_password_is_named_in_both_protocols_with_where_to_change_it(
    protocol, answer, pki
):
    with contextlib.closing(OneAnswer(pki, answer)) as broker:
        access = Access(
            host="127.0.0.1", port=broker.port, tls=broker.ca, username="ward-1", password="hush",
            advice="correct [broker] in midge.toml",
        )  # fmt: skip
        with pytest.raises(LinkError) as caught:
            access.open("ward-1", wait_s=20.0, protocol=protocol)
        said = str(caught.value)
        assert "refused the user name 'ward-1' or its password (" in said
        assert said.endswith("; correct [broker] in midge.toml")
        assert "hush" not in said
        nameless = Access(host="127.0.0.1", port=broker.port, tls=broker.ca)
        with pytest.raises(LinkError, match=r"would not let 'ward-1-[0-9a-f]{12}' in"):
            nameless.open("ward-1", wait_s=20.0, protocol=protocol)


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [("{name}-{random}", rb"ward-1-[0-9a-f]{12}"), ("{name}", rb"ward-1"),
     ("acme:{random}", rb"acme:[0-9a-f]{12}")],
)  # fmt: skip
def test_a_broker_with_rules_about_client_ids_gets_one_that_it_likes(pattern, shown, pki):
    heard = []
    with contextlib.closing(OneAnswer(pki, b"\x20\x02\x00\x05")) as broker:
        access = Access(host="127.0.0.1", port=broker.port, tls=broker.ca, client_id=pattern)
        for seed in (b"a", b"a", None, None):
            with pytest.raises(LinkError):
                access.open("ward-1", seed=seed, wait_s=20.0, protocol="3.1.1")
            size = int.from_bytes(broker.heard[12:14], "big")
            heard.append(broker.heard[14 : 14 + size])
    assert all(re.fullmatch(shown, each) for each in heard), heard
    assert heard[0] == heard[1], "who comes back to a session keeps his name"
    if "{random}" in pattern:
        assert len(set(heard)) == 3


def test_a_machine_that_trusts_nobody_says_so_and_one_that_does_trusts_whom_it_names(pki):
    """In processes of their own: OpenSSL reads these variables."""
    code = (
        "from broker_bridge.link.tls import *\n"
        "try: print(len(client_context(TlsFiles(None)).get_ca_certs()))\n"
        "except Exception as error: print(error)"
    )

    def asked(file):
        env = os.environ | {"SSL_CERT_FILE": str(file), "SSL_CERT_DIR": "/nonexistent"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                              check=True, timeout=60)  # fmt: skip
        return done.stdout.strip()

    assert asked(pki.folder / "ca.pem") == "1"
    assert "this machine trusts no CA" in asked("/nonexistent")
