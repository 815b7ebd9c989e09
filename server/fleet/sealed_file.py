"""A file that only a passphrase opens: what is written to it in a row is read again in a row.

    b"midge backup 1\\n" ‖ passes u32 ‖ memory in KiB u32 ‖ salt 16      the header, readable
    pieces of 65,536 bytes and one of 0 … 65,536, each sealed and 16 bytes longer

The key is Argon2id of the passphrase and a fresh salt, so it seals this file only; a piece is
sealed with its number as nonce, and the header and whether it is the last one bound to it.
So pieces cannot be changed, left out, added, moved or taken from another file, and a file that
was cut short is not taken for a whole one: `Reader` hands out a piece once it was verified,
and the end is the end only if `finish` says so.
"""

import struct
import unicodedata
from dataclasses import dataclass
from typing import BinaryIO

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.envelope import AEAD_TAG_BYTES, ChunkKey, passphrase_key, random_bytes

__all__ = ["PASSPHRASE_CHARS_MIN", "Cost", "Reader", "Writer"]

PASSPHRASE_CHARS_MIN = 12
_MAGIC = b"midge backup 1\n"
_COSTS = struct.Struct(">II")
_SALT_BYTES = 16
_PIECE_BYTES = 65_536
# What a file may ask of the machine that reads it.
_PASSES_MAX, _MEMORY_KIB_MAX = 16, 1024 * 1024


@dataclass(frozen=True)
class Cost:
    """Of one guess at the passphrase, for us and for whoever guesses: libsodium's "moderate"."""

    passes: int = 3
    memory_kib: int = 256 * 1024


class Writer:
    """Seals what is written, piece by piece. `finish` writes the last one."""

    def __init__(self, out: BinaryIO, passphrase: str, *, cost: Cost = Cost()) -> None:
        if len(passphrase) < PASSPHRASE_CHARS_MIN:
            raise LocalError(
                f"this passphrase is short; take at least {PASSPHRASE_CHARS_MIN} characters: "
                "four words that nobody would guess are good"
            )
        self._out = out
        salt = random_bytes(_SALT_BYTES)
        self._header = _MAGIC + _COSTS.pack(cost.passes, cost.memory_kib) + salt
        self._key = _key(passphrase, cost, salt)
        self._waiting = bytearray()
        self._index = 0
        out.write(self._header)

    def write(self, data: bytes) -> int:
        """Take `data`; return its length, as files do."""
        self._waiting += data
        while len(self._waiting) > _PIECE_BYTES:  # one is kept back: it may be the last
            self._seal(_PIECE_BYTES, last=False)
        return len(data)

    def finish(self) -> None:
        """Write what is still waiting, as the end."""
        self._seal(_PIECE_BYTES, last=True)

    def _seal(self, length: int, *, last: bool) -> None:
        piece = bytes(self._waiting[:length])
        del self._waiting[:length]
        self._out.write(self._key.seal(self._index, piece, self._header + bytes([last])))
        self._index += 1


class Reader:
    """Opens what `Writer` sealed. Raises LocalError that names the file, in one sentence."""

    def __init__(self, source: BinaryIO, passphrase: str, *, name: str) -> None:
        self._source = source
        self._name = name
        header = source.read(len(_MAGIC) + _COSTS.size + _SALT_BYTES)
        if not header.startswith(_MAGIC) or len(header) < len(_MAGIC) + _COSTS.size + _SALT_BYTES:
            raise LocalError(f"{name} is not a backup of midge; correct the path")
        cost = Cost(*_COSTS.unpack_from(header, len(_MAGIC)))
        if not (1 <= cost.passes <= _PASSES_MAX and 8 <= cost.memory_kib <= _MEMORY_KIB_MAX):
            raise LocalError(f"{name} was altered; take another copy of this backup")
        self._header = header
        self._key = _key(passphrase, cost, header[-_SALT_BYTES:])
        self._open = b""
        self._at = 0
        self._index = 0
        self._next = source.read(_PIECE_BYTES + AEAD_TAG_BYTES)
        self._ended = False

    def read(self, length: int) -> bytes:
        """Up to `length` bytes; none at the end."""
        found = bytearray()
        while len(found) < length and (self._at < len(self._open) or self._more()):
            part = self._open[self._at : self._at + length - len(found)]
            self._at += len(part)
            found += part
        return bytes(found)

    def finish(self) -> None:
        """Read to the end, to be sure that there is one."""
        while self._more():
            pass

    def _more(self) -> bool:
        """Open the next piece; False after the last."""
        if self._ended:
            return False
        sealed, self._next = self._next, self._source.read(_PIECE_BYTES + AEAD_TAG_BYTES)
        self._ended = not self._next
        try:
            self._open = self._key.open_(self._index, sealed, self._header + bytes([self._ended]))
        except PeerError:
            first = "the passphrase is wrong, or " if self._index == 0 else ""
            raise LocalError(
                f"{self._name}: {first}the file was altered or cut short; nothing was restored"
            ) from None
        self._index, self._at = self._index + 1, 0
        return True


def _key(passphrase: str, cost: Cost, salt: bytes) -> ChunkKey:
    # Composed: the same words typed on another keyboard are the same bytes.
    words = unicodedata.normalize("NFC", passphrase).encode()
    memory_bytes = cost.memory_kib * 1024
    return ChunkKey(passphrase_key(words, salt, passes=cost.passes, memory_bytes=memory_bytes))
