"""What midge says to systemd: ready, still turning, and what it is doing; and the unit files.

The protocol is sd_notify(3): datagrams of `NAME=VALUE` lines to the socket that
NOTIFY_SOCKET names. Without that variable (another supervisor, a terminal) all of it is
silent. The sign of life comes from the loop itself, once for each turn that is due, so a
loop that hangs is noticed and started again; nothing else in the process says it.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from broker_bridge.errors import LocalError

__all__ = ["Supervisor", "unit_file"]

_SHIPPED_PROGRAMS = "/opt/midge/bin"
_STATUS_CHARS_MAX = 200


class Supervisor:
    """Whoever started this process and wants to hear from it."""

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID as systemd sets them."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._alive_s = _watchdog_s(environment) / 4  # so one lost datagram costs nothing
        self._clock = clock
        self._next_s = 0.0
        self._is_ready = False
        self._said = ""

    def watched(
        self, stopped: Callable[[], bool], status: Callable[[], str] = lambda: ""
    ) -> Callable[[], bool]:
        """`stopped`, for a loop that asks it once a turn; each time it asks, this says so.

        The first turn means that the loop is ready. `status` is a line for `systemctl status`.
        """

        def asked() -> bool:
            ends = stopped()
            self._turned(status(), ends=ends)
            return ends

        return asked

    def _turned(self, status: str, *, ends: bool) -> None:
        if not self._address:
            return
        lines = []
        if ends:
            lines.append("STOPPING=1")
        elif not self._is_ready:
            self._is_ready = True
            lines.append("READY=1")
        if status and status != self._said:
            self._said = status
            lines.append("STATUS=" + " ".join(status.split())[:_STATUS_CHARS_MAX])
        now = self._clock()
        if self._alive_s and now >= self._next_s:
            self._next_s = now + self._alive_s
            lines.append("WATCHDOG=1")
        if lines:
            self._send("\n".join(lines))

    def _send(self, text: str) -> None:
        # "@" is how a name in the abstract namespace is written down.
        address = "\0" + self._address[1:] if self._address[:1] == "@" else self._address
        # A supervisor that does not listen is no reason to end: it will ask by its watchdog.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line,
        ):
            line.setblocking(False)
            line.sendto(text.encode(), address)


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """How often systemd wants to hear from this process; 0: not at all."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0  # meant for our parent
    text = environment.get("WATCHDOG_USEC", "0")
    return int(text) / 1e6 if text.isdecimal() and len(text) < 16 else 0.0


def unit_file(package: str, name: str, *, programs: Path | None = None) -> str:
    """The unit file `name` that is shipped in `package`, starting the program that runs now.

    `programs`: the folder of the commands, if not the one that this command is in.
    """
    try:
        text = resources.files(package).joinpath(name).read_text("utf-8")
    except OSError:
        raise LocalError(f"{name} is missing from this installation; install midge again") from None
    return text.replace(_SHIPPED_PROGRAMS, str(programs or Path(sys.argv[0]).absolute().parent))
