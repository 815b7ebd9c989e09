"""A card's boot partition: a mounted folder, or a file with the image of a whole card.

Both are written without root. An image's partition is found in its partition table and
written with mtools, in place; nothing is mounted. What these do not do: write to a raw
device. `rpi-imager` and `dd` do that, and ask the right questions first.

Names are paths below the partition's root, with `/`. Every error is a LocalError.
"""

import contextlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from broker_bridge.disk import DiskFullError, disk_errors
from broker_bridge.errors import LocalError

__all__ = ["Card", "FolderCard", "ImageCard", "boot_part", "open_card", "this_time"]

_SECTOR = 512
_FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})


class Card(Protocol):
    """What is asked of a boot partition."""

    @property
    def where(self) -> str:
        """How a person calls it."""

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, in lower case; none if there is no such folder."""

    def read(self, name: str) -> bytes | None:
        """What is in a file; None if there is none."""

    def check_room(self, files: Mapping[str, bytes]) -> None:
        """Refuse a card that cannot take these files, as far as that can be told."""

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, with the folders they are in, over what is there."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, and folders with all that is in them, where they are there."""


def open_card(boot: Path | None, image: Path | None) -> Card:
    """The card in a mounted folder or in an image. Raises LocalError."""
    if (boot is None) == (image is None):
        raise LocalError("say either --boot FOLDER, a card that is mounted, or --image FILE")
    return FolderCard(boot) if boot is not None else ImageCard(image or Path())


class FolderCard:
    """A boot partition that is mounted here."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise LocalError(f"{folder} is no folder; put the card in, and name its boot partition")
        self._folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self._folder)

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder."""
        place = self._folder / folder
        with disk_errors(place):
            return sorted(p.name.lower() for p in place.iterdir()) if place.is_dir() else []

    def read(self, name: str) -> bytes | None:
        """What is in a file."""
        path = self._folder / name
        with disk_errors(path):
            return path.read_bytes() if path.is_file() else None

    def check_room(self, files: Mapping[str, bytes]) -> None:
        """Refuse a card that is full, or that this user may not write."""
        with disk_errors(self._folder):
            room = shutil.disk_usage(self._folder).free
        _check_room(files, room, self.where)
        if not os.access(self._folder, os.W_OK):
            raise LocalError(
                f"{self.where} cannot be written: slide the card's lock, mount it for writing, or "
                "give this user the right to"
            )

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files."""
        for name, data in files.items():
            path = self._folder / name
            with this_time(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Not write_atomic: a FAT file has no mode to set.
                path.write_bytes(data)
        os.sync()

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders."""
        for name in names:
            path = self._folder / name
            with disk_errors(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        os.sync()


class ImageCard:
    """The first partition of a card's image, written in place with mtools."""

    def __init__(self, image: Path, *, called: Path | None = None, whole: bool = True) -> None:
        """`called`: how a person knows it, if this is a copy. `whole`: no partition is missing."""
        if shutil.which("mcopy") is None:
            raise LocalError(
                "images are written with mtools, which is not here: install it "
                "(apt-get install mtools, brew install mtools), or write the card and say --boot"
            )
        self.where = str(called or image)
        with disk_errors(image), image.open("rb") as file:
            offset = boot_part(file, self.where, whole=whole).start
        self._place = f"{image}@@{offset}"

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder."""
        done = self._run("mdir", "-b", f"::/{folder}")
        lines = done.stdout.decode(errors="replace").splitlines() if done.returncode == 0 else []
        return sorted(line.removesuffix("/").rsplit("/", 1)[-1].lower() for line in lines if line)

    def read(self, name: str) -> bytes | None:
        """What is in a file."""
        folder, _, last = name.rpartition("/")
        if last.lower() not in self.names(folder):
            return None
        return self._must("mcopy", "-n", f"::/{name}", "-").stdout

    def check_room(self, files: Mapping[str, bytes]) -> None:
        """Refuse an image whose boot partition is full."""
        said = self._must("mdir", "::/").stdout.decode(errors="replace")
        if room := re.search(r"([\d ]+) bytes free", said):
            _check_room(files, int(room[1].replace(" ", "")), self.where)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files."""
        with tempfile.TemporaryDirectory() as temporary:
            for name, data in files.items():
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            # -s goes into folders; -D o overwrites what has the name and asks nothing.
            tops = [str(Path(temporary, top)) for top in sorted({n.split("/")[0] for n in files})]
            self._must("mcopy", "-s", "-n", "-o", "-D", "o", *tops, "::/")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders."""
        for name in names:
            folder, _, last = name.rpartition("/")
            if last.lower() in self.names(folder):
                self._must("mdeltree", f"::/{name}")

    def _must(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        done = self._run(command, *arguments)
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="replace").split())[:300]
            if "No space left on device" in said:  # not the card: that is "Disk full"
                raise LocalError(f"{self.where}: the disk that it lies on is full; make room there")
            raise LocalError(
                f"{self.where}: {command} says: {said or 'nothing'}; use a fresh copy of the "
                "image, with room on its boot partition"
            )
        return done

    def _run(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        # Images of foreign makes have geometries that mtools would refuse.
        environment = os.environ | {"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null"}
        return subprocess.run(
            [command, "-i", self._place, *arguments], capture_output=True, check=False,
            stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip


def boot_part(file: "BinaryIO | lzma.LZMAFile", where: str, *, whole: bool = True) -> range:
    """Where the first partition lies, in bytes: the table of the classic MBR.

    `whole`: all partitions must be there. Raises LocalError.
    """
    head = file.read(_SECTOR)
    if len(head) < _SECTOR or head[510:] != b"\x55\xaa":
        raise LocalError(f"{where} is not the image of a card: it has no partition table")
    kind = head[446 + 4]
    parts = [struct.unpack_from("<II", head, 446 + 16 * n + 8) for n in range(4)]
    start, size = parts[0]
    if whole:
        file.seek(start * _SECTOR)
    if kind not in _FAT_TYPES or (whole and file.read(_SECTOR)[510:] != b"\x55\xaa"):
        raise LocalError(
            f"{where}: its first partition is not a boot partition of a Raspberry Pi (FAT); "
            "use an image of Raspberry Pi OS"
        )
    if whole and max(sum(part) for part in parts) * _SECTOR > file.seek(0, os.SEEK_END):
        raise LocalError(
            f"{where} is cut short: it ends before its last partition does; copy it again"
        )
    return range(start * _SECTOR, (start + size) * _SECTOR)


def _check_room(files: Mapping[str, bytes], room: int, where: str) -> None:
    needed = sum(len(data) + 4096 for data in files.values())
    if needed > room:
        raise LocalError(
            f"{where} has room for {room / 1e6:.0f} MB and this needs {needed / 1e6:.0f}; make room"
        )


@contextlib.contextmanager
def this_time(path: Path) -> Iterator[None]:
    """As disk_errors; but nothing goes on by itself here when there is room again."""
    try:
        with disk_errors(path):
            yield
    except DiskFullError:
        raise LocalError(f"{path}: there is no more room; make some, and try again") from None
