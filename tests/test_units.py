"""The systemd units that are shipped: how far they shut a process in, as systemd sees it."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.fleets import ROOT

DEVICE = ROOT / "device_client" / "midge-device.service"
SERVER = ROOT / "server" / "midge-server.service"
BROKER = ROOT / "broker_bridge" / "link" / "mosquitto-dropin.conf"
ALL = [DEVICE, SERVER, BROKER]

# What Debian 12 ships with mosquitto 2.0.11, without its ExecStartPre lines' arguments.
DEBIANS = """\
[Unit]
Description=Mosquitto MQTT Broker
After=network.target

[Service]
Type=notify
NotifyAccess=main
ExecStart=/bin/true -c /etc/mosquitto/mosquitto.conf
ExecReload=/bin/kill -HUP $MAINPID
ExecStartPre=/bin/mkdir -m 740 -p /var/log/mosquitto
"""

analyses = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def systemd_analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout + done.stderr


def exposure(unit: Path) -> float:
    said = systemd_analyze("security", "--offline=true", str(unit))
    found = re.search(rf"Overall exposure level for {re.escape(unit.name)}: ([\d.]+)", said)
    assert found, said
    return float(found[1])


@pytest.fixture
def broker(tmp_path):
    """Debian's unit with our drop-in, as it lies on a machine."""
    folder = tmp_path / "mosquitto.service.d"
    folder.mkdir()
    (folder / "midge.conf").write_text(BROKER.read_text())
    unit = tmp_path / "mosquitto.service"
    unit.write_text(DEBIANS)
    return unit


@analyses
@pytest.mark.parametrize("unit", [DEVICE, SERVER], ids=lambda unit: unit.name)
def test_systemd_finds_the_exposure_of_our_processes_below_two(unit):
    assert exposure(unit) < 2.0


@analyses
def test_the_drop_in_brings_mosquitto_below_two_as_well(broker, tmp_path):
    bare = tmp_path / "bare.service"
    bare.write_text(DEBIANS)
    assert exposure(bare) > 9.0
    assert exposure(broker) < 2.0


@analyses
@pytest.mark.parametrize("unit", [DEVICE, SERVER], ids=lambda unit: unit.name)
def test_systemd_understands_every_line_of_a_unit(unit, tmp_path):
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text()))
    assert systemd_analyze("verify", str(copy)) == ""


@analyses
def test_systemd_understands_every_line_of_the_drop_in(broker):
    assert systemd_analyze("verify", str(broker)) == ""


@pytest.mark.parametrize("unit", ALL, ids=lambda unit: unit.name)
def test_no_unit_waits_for_the_network_and_each_is_started_again(unit):
    text = unit.read_text()
    assert "network-online" not in text
    assert {"Restart=always", "StartLimitIntervalSec=0"} <= set(text.splitlines())
    assert re.search(r"(?m)^MemoryMax=", text)


@pytest.mark.parametrize("unit", [DEVICE, SERVER], ids=lambda unit: unit.name)
def test_a_hung_loop_is_noticed_and_no_folder_but_its_own_is_written(unit):
    lines = unit.read_text().splitlines()
    assert {"Type=notify", "NotifyAccess=main", "ProtectSystem=strict", "UMask=0077"} <= set(lines)
    assert any(line.startswith("WatchdogSec=") for line in lines)
    written = [line for line in lines if re.match(r"(StateDirectory|ReadWritePaths)=", line)]
    assert len(written) == 1


def test_the_units_are_in_the_wheel():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = shipped["tool"]["setuptools"]["package-data"]["*"]
    assert all(any(unit.match(pattern) for pattern in patterns) for unit in ALL)
