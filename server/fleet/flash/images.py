"""Images of cards as they are downloaded: packed or not, looked into, unpacked, copied.

A copy is its owner's alone, since secrets are written into it, and is whole or is not there.
Every error is a LocalError.
"""

import contextlib
import lzma
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from broker_bridge.disk import disk_errors, owner_only
from broker_bridge.errors import LocalError
from server.fleet.flash.card import ImageCard, boot_part, this_time

__all__ = ["copy_image", "look_into", "unpacked"]

_BLOCK = 1 << 20


@contextlib.contextmanager
def look_into(image: Path) -> Iterator[ImageCard]:
    """An image's boot partition, for reading; of a packed image no more than that is unpacked.

    Raises LocalError.
    """
    if not _is_packed(image):
        yield ImageCard(image)
        return
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary, "boot.img")
        with _unpacking(image), image.open("rb") as raw, lzma.open(raw) as packed:
            end = boot_part(packed, str(image), whole=False).stop
            packed.seek(0)
            with this_time(part), part.open("xb") as out:
                _copy(packed, out, end)
        yield ImageCard(part, called=image, whole=False)


@contextlib.contextmanager
def unpacked(image: Path, target: Path) -> Iterator[Path]:
    """The image, unpacked to `target` for as long as this lasts if it is packed: it takes minutes.

    Raises LocalError.
    """
    if not _is_packed(image):
        yield image
        return
    with disk_errors(target):
        target.unlink(missing_ok=True)
    copy_image(image, target)
    try:
        yield target
    finally:
        target.unlink(missing_ok=True)


def copy_image(source: Path, target: Path) -> None:
    """Copy an image, unpacking .xz, and leave out what is zero; the copy is its owner's alone.

    A copy that is not whole does not stay. Raises LocalError.
    """
    packed = _is_packed(source)
    if target.exists():
        raise LocalError(f"{target} is there already; remove it, or say another --out")
    try:
        with (
            _unpacking(source),
            disk_errors(source),
            source.open("rb") as raw,
            this_time(target),
            open(target, "xb", opener=owner_only) as out,
        ):
            if packed:
                with lzma.open(raw) as unpacked:
                    _copy(unpacked, out)
            else:
                _copy(raw, out)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _is_packed(image: Path) -> bool:
    with disk_errors(image), image.open("rb") as raw:
        return raw.read(6) == b"\xfd7zXZ\x00"


@contextlib.contextmanager
def _unpacking(image: Path) -> Iterator[None]:
    try:
        yield
    except (lzma.LZMAError, EOFError):
        raise LocalError(f"{image} is damaged or cut short; download it again") from None


def _copy(source: "BinaryIO | lzma.LZMAFile", out: BinaryIO, end: int | None = None) -> None:
    """Copy all of it, or as far as `end`."""
    while block := source.read(_BLOCK if end is None else min(_BLOCK, end - out.tell())):
        if block.strip(b"\0"):
            out.write(block)
        else:
            out.seek(len(block), os.SEEK_CUR)  # a hole: an image is mostly empty
    out.truncate()
