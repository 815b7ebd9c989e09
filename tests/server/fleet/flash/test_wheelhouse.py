"""Wheels: exactly those that the lock names, fetched once, by one process at a time."""

import io
import sys
import zipfile

import pytest

from server.fleet.flash.targets import TARGETS, find_target
from server.fleet.flash.wheelhouse import own_wheel
from tests import cards
from tests.fleets import Program, wait_until

FETCH = """
import sys
from pathlib import Path
from server.fleet.flash.targets import find_target
from server.fleet.flash.wheelhouse import fetch
print(len(fetch(find_target("bookworm-arm64"), Path(sys.argv[1]))))
"""


def test_two_processes_that_fetch_at_once_get_all_of_them(tmp_path):
    target = find_target("bookworm-arm64")
    source = cards.wheels_or_skip(target) / target.name
    both = [
        Program(tmp_path / f"{number}.log", "env", f"PIP_FIND_LINKS={source}", "PIP_NO_INDEX=1",
                sys.executable, "-c", FETCH, str(tmp_path / "cache"))
        for number in range(2)
    ]  # fmt: skip
    for each in both:
        wait_until(lambda each=each: not each.is_running, "it has fetched")
    assert [each.log for each in both] == [f"{len(target.pinned())}\n"] * 2


def test_our_own_wheel_has_what_a_device_has_and_is_the_same_each_time():
    name, data = own_wheel()
    assert own_wheel() == (name, data)
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        names = wheel.namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {
        "broker_bridge", "device_client",
    }  # fmt: skip
    assert "device_client/midge-device.service" in names
    assert not [n for n in names if "__pycache__" in n or n.startswith("server/")]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_is_pinned_by_hash(target):
    pinned = target.pinned()
    assert {p.name for p in pinned} >= {"click", "msgspec", "numpy", "paho-mqtt", "pynacl"}
    assert all(p.version and p.hashes for p in pinned)
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for p in pinned for h in p.hashes)
