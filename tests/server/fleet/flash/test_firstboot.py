"""What the first boot reads: right for cloud-init and the shell, whatever a person typed."""

import json
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.errors import LocalError
from server.fleet.flash.firstboot import (
    Login,
    Wifi,
    command_line,
    firstrun,
    login,
    meta_data,
    network_config,
    user_data,
    wifi,
)

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB ann's key"
NET = Wifi("Ward 3", "GB", "ab" * 32)
OLD = "console=tty1 root=PARTUUID=4e639091-02 rootwait resize\n"


def test_the_key_of_a_network_is_that_of_the_standard():
    # IEEE 802.11-2020, J.4.2: the test vectors.
    first, second = (
        wifi("IEEE", "password", country="gb"),
        wifi("ThisIsASSID", "ThisIsAPassword", country="de"),
    )
    assert first.psk == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert second.psk == "0dc0d6eb90555ed6419756b9a15ec3e3209b63df707dd508d14581f8982721af"
    assert (first.country, second.country) == ("GB", "DE")
    assert first.psk not in repr(first)


@pytest.mark.parametrize(
    ("ssid", "passphrase", "country", "words"),
    [
        ("", "12345678", "GB", "network's name"),
        ("n" * 33, "12345678", "GB", "network's name"),
        ('5"GHz', "12345678", "GB", "without quotes"),
        ("two\nlines", "12345678", "GB", "network's name"),
        ("Ward 3", "1234567", "GB", "8 to 63"),
        ("Ward 3", "pässword", "GB", "8 to 63"),
        ("Ward 3", "12345678", "", "--wifi-country"),
        ("Ward 3", "12345678", "GBR", "--wifi-country"),
    ],
)
def test_a_network_that_cannot_work_is_refused(ssid, passphrase, country, words):
    with pytest.raises(LocalError, match=words):
        wifi(ssid, passphrase, country=country)


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("root user", KEY, "user's name"),
        ("", KEY, "user's name"),
        ("pi", "-----BEGIN OPENSSH PRIVATE KEY-----", "public key"),
        ("pi", KEY + "\n" + KEY, "public key"),
    ],
)
def test_a_login_that_cannot_work_is_refused(name, key, words):
    with pytest.raises(LocalError, match=words):
        login(name, key)


def test_the_command_line_stays_one_line_and_ours_replaces_what_was_of_its_kind():
    once = command_line(OLD, True, "midge-1", "GB")
    again = command_line(once, True, "midge-2", None)
    assert once == OLD.strip() + " cfg80211.ieee80211_regdom=GB ds=nocloud;i=midge-1\n"
    assert again == OLD.strip() + " ds=nocloud;i=midge-2\n"
    run = command_line(OLD, False, "midge-1", None)
    assert run.endswith(
        " systemd.run=/boot/firmware/firstrun.sh systemd.run_success_action=reboot "
        "systemd.unit=kernel-command-line.target\n"
    )
    assert command_line(run, False, "midge-1", None) == run
    # What firstrun.sh does to it when it is through.
    done = subprocess.run(
        ["sed", r"s| systemd\.[^ ]*||g"], input=run, capture_output=True, text=True, check=True
    )
    assert done.stdout == OLD


def test_the_same_instance_is_named_in_both_places():
    assert "i=midge-7\n" in command_line(OLD, True, "midge-7", None)
    assert meta_data("midge-7") == "dsmode: local\ninstance-id: midge-7\n"


def test_user_data_names_the_device_and_starts_the_service_only():
    text = user_data("ward-3-pi-07", None)
    assert text.startswith("#cloud-config\n")
    assert 'hostname: "ward-3-pi-07"' in text
    assert "midge-first-boot.service" in text
    assert "user:" not in text
    assert "ssh" not in text


def test_a_login_has_a_key_and_no_password():
    text = user_data("ward", Login("pi", KEY))
    assert "lock_passwd: true" in text
    assert json.dumps(KEY) in text
    assert "[systemctl, enable, --now, ssh]" in text
    assert "passwd:" not in text.replace("lock_passwd:", "")


def test_a_cable_works_beside_wifi_and_an_open_network_says_so():
    assert "wifis" not in network_config(None)
    closed = network_config(NET)
    assert "eth0" in closed
    assert '"Ward 3":\n          password: "' + "ab" * 32 in closed
    assert 'regulatory-domain: "GB"' in closed
    assert "hidden" not in closed
    opened = network_config(Wifi("Ward 3", "GB", "", hidden=True))
    assert "hidden: true" in opened
    assert "key-management: none" in opened
    assert "password" not in opened


shell_text = st.text(
    st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=32
)


@given(ssid=shell_text, key=shell_text)
def test_whatever_a_person_typed_reaches_the_shell_as_one_word(ssid, key):
    text = firstrun("ward-3", Wifi(ssid, "GB", "ab" * 32), Login("pi", key))
    lines = [line.strip() for line in text.splitlines() if "imager_custom" in line]
    words = subprocess.run(
        ["sh", "-c", "\n".join("printf '%s\\0' " + line for line in lines)],
        capture_output=True, check=True,
    ).stdout.decode().split("\0")  # fmt: skip
    assert [ssid, "ab" * 32, "GB"] == words[5:8]
    assert words[-2] == key


@pytest.mark.parametrize("joined", [None, NET])
@pytest.mark.parametrize("who", [None, Login("pi", KEY)])
def test_firstrun_is_a_script_that_shells_accept(joined, who):
    text = firstrun("ward-3", joined, who)
    for shell in ("sh", "dash", "bash"):
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=text, text=True, check=True)
    # The braces: all of it is read before the file is overwritten.
    assert text.index("{\n") < text.index("dd if=/dev/zero") < text.index("\n}")
    assert text.rstrip().splitlines()[-2].strip() == "exit 0"
