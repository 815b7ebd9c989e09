import os
import socket
from pathlib import Path

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.systemd import Supervisor, unit_file


class Listening:
    """systemd's end: a real datagram socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self) -> list[list[str]]:
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["a path", "an abstract name"])
def address(request, tmp_path):
    return (
        str(tmp_path / "notify") if request.param == "a path" else f"@midge-{os.urandom(6).hex()}"
    )


@pytest.fixture
def systemd(address):
    listening = Listening(address)
    yield listening
    listening.close()


def environment(address: str, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": address} | more


def test_the_first_turn_of_the_loop_says_ready_and_further_turns_do_not(address, systemd):
    turn = Supervisor(environment(address)).watched(lambda: False)
    assert systemd.heard() == []
    assert [turn(), turn(), turn()] == [False, False, False]
    assert systemd.heard() == [["READY=1"]]


def test_a_turning_loop_gives_a_sign_of_life_four_times_in_the_watchdogs_time(address, systemd):
    clock = Clock()
    supervisor = Supervisor(environment(address, WATCHDOG_USEC="120000000"), clock=clock)
    turn = supervisor.watched(lambda: False)
    turn()
    assert systemd.heard() == [["READY=1", "WATCHDOG=1"]]
    clock.now += 29
    turn()
    assert systemd.heard() == []
    clock.now += 1
    turn()
    turn()
    assert systemd.heard() == [["WATCHDOG=1"]]


def test_a_loop_that_hangs_gives_none(address, systemd):
    clock = Clock()
    supervisor = Supervisor(environment(address, WATCHDOG_USEC="120000000"), clock=clock)
    supervisor.watched(lambda: False)()
    systemd.heard()
    clock.now += 3600
    assert systemd.heard() == []


def test_what_it_is_doing_is_told_once_and_on_one_line(address, systemd):
    doing = ["idle", "idle", "round 3\nREADY=0", "x" * 999]
    turn = Supervisor(environment(address)).watched(lambda: False, lambda: doing.pop(0))
    for _ in range(4):
        turn()
    assert systemd.heard() == [
        ["READY=1", "STATUS=idle"],
        ["STATUS=round 3 READY=0"],
        ["STATUS=" + "x" * 200],
    ]


def test_the_end_is_told_when_the_loop_hears_of_it(address, systemd):
    assert Supervisor(environment(address)).watched(lambda: True)()
    assert systemd.heard() == [["STOPPING=1"]]


@pytest.mark.parametrize(
    "watchdog",
    [
        {},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "9" * 400},
        {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
def test_a_watchdog_that_is_absent_another_processs_or_nonsense_is_not_fed(
    address, systemd, watchdog
):
    Supervisor(environment(address, **watchdog)).watched(lambda: False)()
    assert systemd.heard() == [["READY=1"]]


@pytest.mark.parametrize("where", ["", "/nowhere/at/all", "@nobody-listens-here"])
def test_a_supervisor_that_is_not_there_stops_nobody(where):
    turn = Supervisor({"NOTIFY_SOCKET": where, "WATCHDOG_USEC": "1000"}).watched(lambda: False)
    assert not turn()


def test_a_unit_starts_the_program_of_this_installation():
    text = unit_file("device_client", "midge-device.service", programs=Path("/srv/venv/bin"))
    assert "ExecStart=/srv/venv/bin/midge-device run " in text
    assert "/opt/midge" not in text


def test_a_unit_that_is_not_shipped_is_one_sentence():
    with pytest.raises(LocalError, match="install midge again"):
        unit_file("device_client", "other.service")
