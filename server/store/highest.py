"""The highest round number that was ever opened, in a small file beside the database.

It is written after the database's commit and before the round is announced, so no device has
seen a round that it does not know. A database that knows less has lost its log, or is an old
copy (server/old_copy.py, decision 0140). It is a second witness, never needed: a file that is
missing or damaged claims nothing, and is written anew.
"""

import contextlib
import hashlib
import logging
import re
from pathlib import Path

from broker_bridge.disk import REAL_DISK, Disk, write_atomic

__all__ = ["HighestRound", "from_line", "to_line"]

log = logging.getLogger("midge.server")

_LINE = re.compile(rb"(0|[1-9][0-9]{0,15}) [0-9a-f]{16}\n")


def to_line(number: int) -> bytes:
    """`41 a1d5…`: the number and half of a SHA-256, so that a flipped bit is no other number.

    Whoever can write here can write the database, too: this is against bad disks only.
    """
    digits = str(number).encode()
    check = hashlib.sha256(b"midge highest round " + digits).hexdigest()[:16]
    return digits + b" " + check.encode() + b"\n"


def from_line(line: bytes) -> int | None:
    """The number in what `to_line` made; None if it is anything else."""
    match = _LINE.fullmatch(line)
    if match is None or to_line(int(match[1])) != line:
        return None
    return int(match[1])


class HighestRound:
    """The file. One process writes it."""

    def __init__(self, path: Path, *, disk: Disk = REAL_DISK) -> None:
        self.path = path
        self._disk = disk
        self._known: int | None = None  # until it was read

    @property
    def known(self) -> int:
        """The number in the file; 0: it claims nothing."""
        if self._known is None:
            self._known = self._read()
        return self._known

    def note(self, number: int) -> None:
        """Return once the disk has `number`, or had a higher one.

        Raises DiskFullError or LocalError; then the file is as it was, or as it should be.
        """
        if number > self.known:
            write_atomic(self.path, to_line(number), disk=self._disk)
            self._known = number

    def _read(self) -> int:
        found = None
        with contextlib.suppress(OSError):
            if not self._disk.exists(self.path):
                return 0
            found = from_line(self._disk.read(self.path))
        if found is None:
            log.warning(
                "%s cannot be read, so it cannot tell whether the database lost rounds; it is "
                "written anew, and everything goes on", self.path,
            )  # fmt: skip
        return found or 0
