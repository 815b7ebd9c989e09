"""The real server and the real device under a supervisor that listens as systemd does."""

import socket

import pytest

from tests.fleets import wait_until


class Supervising:
    """A notify socket; what was said to it is kept."""

    def __init__(self, path):
        self.path = path
        self.lines = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))

    def has_heard(self, line):
        while True:
            try:
                self.lines += self._socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return line in self.lines

    def close(self):
        self._socket.close()


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    listening = Supervising(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(listening.path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield listening
    listening.close()


def test_a_server_says_when_it_serves_that_it_turns_and_when_it_ends(fleets, systemd):
    fleet = fleets().start()
    wait_until(lambda: systemd.has_heard("READY=1"), "the server is ready")
    wait_until(lambda: systemd.has_heard("STATUS=waiting for a start"), "what it is doing")
    systemd.lines.clear()
    wait_until(lambda: systemd.has_heard("WATCHDOG=1"), "a further sign of life")
    assert fleet.server.terminate() == 0
    assert systemd.has_heard("STOPPING=1")


def test_a_device_is_ready_though_no_broker_answers(fleets, systemd):
    fleet = fleets()
    fleet.enrol("ward-1")
    device = fleet.device("ward-1")
    wait_until(lambda: systemd.has_heard("READY=1"), "the device is ready")
    wait_until(lambda: systemd.has_heard("STATUS=idle"), "what it is doing")
    systemd.lines.clear()
    wait_until(lambda: systemd.has_heard("WATCHDOG=1"), "a further sign of life")
    assert device.terminate() == 0
