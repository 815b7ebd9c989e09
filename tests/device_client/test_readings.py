"""Readings are taken from real files in a folder that looks as a kernel's does."""

import os
import stat
from datetime import datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from device_client.eligibility import Rules
from device_client.readings import take_readings

NOW = datetime(2026, 11, 22, 3, 30)
ASKING = Rules(throttled=False, metered=False)  # whatever costs a command


@pytest.fixture
def machine(tmp_path):
    """A root folder; `put` writes one of its files."""

    class Machine:
        root = tmp_path / "root"
        folder = tmp_path

        def put(self, path, text):
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def read(self, **rules):
            return take_readings(
                self.folder, replace(ASKING, **rules), root=self.root, now=lambda: NOW,
                command=lambda words: self.said.get(words[0]),
            )  # fmt: skip

    made = Machine()
    made.root.mkdir()
    made.said = {}
    return made


def test_a_machine_that_says_nothing_is_on_mains_and_otherwise_unknown(machine):
    found = machine.read()
    assert (found.mains, found.battery, found.temperature_c) == (True, None, None)
    assert (found.throttled, found.load, found.memory_bytes) == (None, None, None)
    assert (found.network, found.metered, found.samples) == (None, None, None)
    assert found.clock == NOW.time()
    assert found.disk_bytes > 0


@pytest.mark.parametrize(("online", "mains"), [("1\n", True), ("0\n", False)])
def test_a_charger_says_whether_it_is_plugged_in(machine, online, mains):
    machine.put("sys/class/power_supply/AC/type", "Mains\n")
    machine.put("sys/class/power_supply/AC/online", online)
    machine.put("sys/class/power_supply/BAT0/type", "Battery\n")
    machine.put("sys/class/power_supply/BAT0/capacity", "57\n")
    assert (machine.read().mains, machine.read().battery) == (mains, 0.57)


def test_of_two_batteries_the_emptier_counts(machine):
    for name, level in (("BAT0", "80"), ("BAT1", "20")):
        machine.put(f"sys/class/power_supply/{name}/type", "Battery")
        machine.put(f"sys/class/power_supply/{name}/capacity", level)
    assert machine.read().battery == 0.2
    assert machine.read().mains is None  # a battery, and nobody says what charges it


def test_the_hottest_zone_counts(machine):
    machine.put("sys/class/thermal/thermal_zone0/temp", "48312\n")
    machine.put("sys/class/thermal/thermal_zone1/temp", "71500\n")
    machine.put("sys/class/thermal/thermal_zone2/temp", "broken")
    assert machine.read().temperature_c == 71.5


@pytest.mark.parametrize(
    ("said", "throttled"),
    [("throttled=0x0", False), ("throttled=0x50000", False), ("throttled=0x50005", True),
     ("throttled=0x4", True), ("nonsense", None), ("throttled=", None)],
)  # fmt: skip
def test_vcgencmd_says_whether_the_processor_is_throttled_now(machine, said, throttled):
    machine.said["vcgencmd"] = said
    assert machine.read().throttled is throttled


def test_load_is_for_each_core_and_memory_is_what_could_be_had(machine):
    machine.put("proc/loadavg", "3.00 1.00 0.50 2/100 4242\n")
    machine.put("proc/meminfo", "MemTotal: 948304 kB\nMemAvailable:  512000 kB\n")
    assert machine.read().load == 3.0 / os.cpu_count()
    assert machine.read().memory_bytes == 512_000 * 1024


def test_the_network_is_that_of_the_cheapest_default_route(machine):
    machine.put(
        "proc/net/route",
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        "wwan0 00000000 010200C0 0003 0 0 700 00000000 0 0 0\n"
        "wlan0 00000000 010200C0 0003 0 0 600 00000000 0 0 0\n"
        "eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n",
    )
    assert machine.read().network == "wlan0"


def test_a_network_of_ipv6_alone_is_one(machine):
    zero, gateway = "0" * 32, "fe80" + "0" * 27 + "1"
    machine.put(
        "proc/net/ipv6_route",
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
        f"{zero} 00 {zero} 00 {gateway} 00000400 00000001 00000000 00000003 eth1\n",
    )
    assert machine.read().network == "eth1"


@pytest.mark.parametrize(
    ("said", "metered"),
    [("yes", True), ("no", False), ("yes (guessed)", True), ("no (guessed)", False),
     ("unknown", None), ("", None)],
)  # fmt: skip
def test_network_manager_says_whether_the_network_is_metered(machine, said, metered):
    machine.put("proc/net/route", "Iface\neth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n")
    machine.said["nmcli"] = said + "\n"
    assert machine.read().metered is metered


def test_a_file_that_a_user_makes_is_seen(machine, tmp_path):
    busy = tmp_path / "in-use"
    assert not machine.read(unless_file=str(busy)).file_is_there
    busy.touch()
    assert machine.read(unless_file=str(busy)).file_is_there


def test_damaged_files_are_as_if_they_were_not_there(machine):
    for path in ("proc/loadavg", "proc/meminfo", "proc/net/route", "proc/net/ipv6_route"):
        (machine.root / path).parent.mkdir(parents=True, exist_ok=True)
        (machine.root / path).write_bytes(b"\xff\xfe nonsense\n\x00" * 3)
    found = machine.read()
    assert (found.load, found.memory_bytes, found.network) == (None, None, None)


def test_commands_are_run_only_for_rules_that_need_them(machine):
    asked = []
    take_readings(machine.folder, Rules(), root=machine.root, command=asked.append)
    assert asked == []


def test_this_very_machine_has_a_load_and_memory(tmp_path):
    found = take_readings(tmp_path, ASKING)
    assert found.load is not None
    assert found.memory_bytes > 0


def test_a_command_that_hangs_or_fails_says_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in (("vcgencmd", "sleep 60"), ("nmcli", "exit 3")):
        script = Path(folder / name)
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    found = take_readings(tmp_path, ASKING)
    assert (found.throttled, found.metered) == (None, None)
