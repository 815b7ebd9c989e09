"""A board with a card in it: qemu's virtual arm64 machine, 512 MB, a Cortex-A72.

As a Pi's firmware would, it takes kernel and command line from the card's boot partition at every
start. It has no clock that runs without power: it wakes up years ago. Of the network it reaches
one port, and nothing else: BROKER.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path

from server.fleet.flash.card import ImageCard
from tests.fleets import Program, wait_until
from tests.pi.debian import CannotFetchError

__all__ = ["BROKER", "Board"]

BROKER = ("10.0.2.100", 8883)
MEMORY_MB = 512
WAKES_UP = "2024-11-19T00:00:00"
# Everything in the journal is also said on the serial line, which is how it is heard here.
SAID = ("console=ttyAMA0", "systemd.journald.forward_to_console=1", "systemd.log_color=0")


class Board:
    """A machine and its card; off at first."""

    def __init__(self, image: Path, *, broker_port: int, folder: Path) -> None:
        self.card = ImageCard(image)
        self._image = image
        self._folder = folder
        self._port = broker_port
        self._starts = 0
        self._machine: Program | None = None

    def power_on(self) -> None:
        """Start it, as firmware does: kernel, first file system, command line from the card."""
        parts = {}
        for name in ("kernel8.img", "initramfs8"):
            parts[name] = self._folder / name
            parts[name].write_bytes(self.card.read(name) or b"")
        line = (self.card.read("cmdline.txt") or b"").decode().split()
        words = [word for word in line if not word.startswith("console=")] + list(SAID)
        relay = f"{sys.executable} {Path(__file__).with_name('relay.py')} {self._port}"
        self._starts += 1
        self._machine = Program(
            self._folder / f"qemu-{self._starts}.log", *_nicely(), _qemu(), "-no-reboot",
            "-machine", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", str(MEMORY_MB),
            "-nodefaults", "-display", "none", "-monitor", "none", "-rtc", f"base={WAKES_UP}",
            "-kernel", str(parts["kernel8.img"]), "-initrd", str(parts["initramfs8"]),
            "-append", " ".join(words), "-serial", f"file:{self.serial}",
            "-drive", f"file={self._image},if=none,format=raw,id=card",
            "-device", "virtio-blk-pci,drive=card", "-device", "virtio-rng-pci",
            "-netdev", f"user,id=net,restrict=on,guestfwd=tcp:{BROKER[0]}:{BROKER[1]}-cmd:{relay}",
            "-device", "virtio-net-pci,netdev=net,romfile=",
        )  # fmt: skip

    def cut_power(self) -> None:
        """SIGKILL: what the system has not written is lost."""
        if self._machine is not None:
            self._machine.kill()

    @property
    def serial(self) -> Path:
        """What this start said."""
        return self._folder / f"serial-{self._starts}.txt"

    @property
    def said(self) -> str:
        """All that this start has said so far."""
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    @property
    def is_on(self) -> bool:
        """Whether it runs. A system that reboots ends it: firmware is not emulated."""
        return self._machine is not None and self._machine.is_running

    def wait_for(self, pattern: str, what: str, give_up_s: float) -> "re.Match[str]":
        """Wait until it says what matches. Raises AssertionError, also when it goes off."""

        def heard() -> "re.Match[str] | None":
            time.sleep(0.2)
            found = re.search(pattern, self.said)
            assert found or self.is_on, f"the board went off before {what}:\n{self.said[-3000:]}"
            assert "in emergency mode" not in self.said, f"it cannot start:\n{self.said[-9000:]}"
            return found

        found = wait_until(heard, what, give_up_s)
        assert isinstance(found, re.Match)
        return found

    def wait_until_off(self, give_up_s: float) -> None:
        """Wait for a system that reboots."""

        def off() -> bool:
            time.sleep(0.2)
            return not self.is_on

        wait_until(off, "the system reboots", give_up_s)


def _qemu() -> str:
    found = shutil.which("qemu-system-aarch64")
    if found is None:
        raise CannotFetchError(
            "there is no qemu-system-aarch64 here: apt-get install qemu-system-arm"
        )
    return found


def _nicely() -> tuple[str, ...]:
    return ("nice", "-n", "19") if os.nice(0) < 19 else ()
