"""What a card's first boot reads, judged by the programs that read it: trixie's own.

cloud-init's schema knows every key of user-data, and netplan makes of network-config what
the system would use. Neither is installed here: they run from another Debian's folder.
"""

import platform
import subprocess
from pathlib import Path

import pytest

from server.fleet.flash.firstboot import Login, Wifi, network_config, user_data, wifi
from tests.pi.debian import CannotFetchError, fetch_root, may_not_skip

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB it's: #ann"
NETWORKS = [
    None,
    wifi("Ward 3: #1 {x} é", "correct horse", country="GB"),
    wifi("Ward", "", country="DE", hidden=True),
    wifi("- [yes]", "correct: #horse", country="FR"),
]


@pytest.fixture(scope="module")
def trixie() -> Path:
    if platform.machine() != "x86_64":
        pytest.skip(f"Debian's amd64 programs do not run on {platform.machine()}")
    try:
        return fetch_root("trixie", "amd64", ("python3.13", "cloud-init", "netplan.io"))
    except CannotFetchError as error:
        if may_not_skip():
            raise
        pytest.skip(f"no cloud-init and netplan to judge with: {error}")


def run(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of the other Debian with its own C library."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    where = {"PYTHONHOME": f"{root}/usr", "PYTHONPATH": f"{root}/usr/lib/python3/dist-packages"}
    return subprocess.run(
        [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries), *command],
        capture_output=True, text=True, check=False, env=where,
    )  # fmt: skip


def judged(root: Path, text: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    path = folder / "user-data"
    path.write_text(text)
    program = str(root / "usr/bin/cloud-init")
    return run(root, str(root / "usr/bin/python3.13"), "-S", program, "schema", "-c", str(path))


@pytest.mark.parametrize("who", [None, Login("pi", KEY)], ids=["nobody", "a login"])
def test_cloud_init_knows_every_key_of_user_data(
    trixie: Path, who: Login | None, tmp_path: Path
) -> None:
    done = judged(trixie, user_data("ward-3", who), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cloud_init_finds_a_wrong_key(trixie: Path, tmp_path: Path) -> None:
    text = user_data("ward-3", None).replace("hostname:", "hostnam:")
    assert judged(trixie, text, tmp_path).returncode == 1


def _ssid(text: str) -> str:
    """The name in a file of wpa_supplicant, where P"…" has the escapes of printf."""
    (line,) = (line.strip() for line in text.splitlines() if line.strip().startswith("ssid="))
    quoted = line.removeprefix("ssid=P").strip('"')
    return quoted.encode("latin-1", "backslashreplace").decode("unicode_escape")


@pytest.mark.parametrize("joined", NETWORKS)
def test_netplan_joins_the_network_that_was_meant(
    trixie: Path, joined: Wifi | None, tmp_path: Path
) -> None:
    plan = tmp_path / "etc/netplan/50-cloud-init.yaml"
    plan.parent.mkdir(parents=True)
    plan.write_text(network_config(joined))
    plan.chmod(0o600)
    generate = str(trixie / "usr/libexec/netplan/generate")
    done = run(trixie, generate, "--root-dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    made = [path.read_text() for path in (tmp_path / "run").rglob("wpa-wlan0.conf")]
    if joined is None:
        assert made == []
    else:
        assert _ssid(made[0]) == joined.ssid
        assert (f"psk={joined.psk}" if joined.psk else "key_mgmt=NONE") in made[0]
        assert f"country={joined.country}" in made[0]
    plan.write_text(network_config(joined).replace("dhcp4: true", "dhcp4: maybe"))
    assert run(trixie, generate, "--root-dir", str(tmp_path)).returncode == 1
