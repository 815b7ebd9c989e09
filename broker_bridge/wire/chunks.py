"""Cut a message into chunks, each sealed, and put chunks back together.

Chunks may arrive late, twice, out of order, or forged. A chunk is opened before
anything is kept, so a forged one cannot take the place of a true one, and
whatever a stranger makes us hold is bounded first.

Layout of a chunk: header (24 bytes, below), then the ciphertext with its 16-byte
tag. The header is the associated data and the index is the nonce, so a chunk
opens only at its own place in its own transfer.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.envelope import AEAD_TAG_BYTES, ChunkKey

__all__ = [
    "CHUNK_OVERHEAD_BYTES",
    "TRANSFER_ID_BYTES",
    "ChunkHeader",
    "Layout",
    "Reassembler",
    "bitmap_of",
    "chunk_header",
    "missing_in",
    "open_chunk",
    "seal_chunks",
    "tags_digest",
]

_HEADER = struct.Struct("<2sBB8sIII")  # magic, version, 0, transfer, index, count, 0
_MAGIC = b"mg"
_VERSION = 1
TRANSFER_ID_BYTES = 8
CHUNK_OVERHEAD_BYTES = _HEADER.size + AEAD_TAG_BYTES


class ChunkHeader(msgspec.Struct, frozen=True):
    """Which chunk of which transfer this is."""

    transfer: bytes
    index: int
    count: int

    def encode(self) -> bytes:
        """Return the 24 bytes that go before the ciphertext."""
        return _HEADER.pack(_MAGIC, _VERSION, 0, self.transfer, self.index, self.count, 0)

    def open_(self, chunk: bytes, key: ChunkKey) -> bytes:
        """Return the body of the chunk that this is the header of. Raises PeerError `bad_seal`."""
        return key.open_(self.index, chunk[_HEADER.size :], chunk[: _HEADER.size])


def chunk_header(chunk: bytes) -> ChunkHeader:
    """Read a chunk's header. Raises PeerError `bad_chunk`."""
    if len(chunk) < CHUNK_OVERHEAD_BYTES:
        raise PeerError("bad_chunk", "a chunk is cut short")
    magic, version, spare, transfer, index, count, spare_too = _HEADER.unpack_from(chunk)
    if magic != _MAGIC:
        raise PeerError("bad_chunk", "these bytes are not a chunk")
    if version != _VERSION:
        raise PeerError("bad_version", f"a chunk of version {version}; this is version {_VERSION}")
    if not index < count <= LIMITS.chunks_max or spare or spare_too:
        raise PeerError("bad_chunk", "a chunk's header contradicts itself")
    return ChunkHeader(transfer, index, count)


@dataclass(frozen=True)
class Layout:
    """How `total_bytes` are cut into bodies of `body_bytes`; the last one is shorter."""

    total_bytes: int
    body_bytes: int

    def __post_init__(self) -> None:
        if self.total_bytes < 1 or self.body_bytes < 1 or self.count > LIMITS.chunks_max:
            raise PeerError("bad_size", "a transfer of impossible size")

    @classmethod
    def for_packets(cls, total_bytes: int, packet_bytes: int) -> "Layout":
        """Cut so that each MQTT packet, headers and all, is at most `packet_bytes`."""
        return cls(total_bytes, packet_bytes - LIMITS.packet_overhead_bytes - CHUNK_OVERHEAD_BYTES)

    @cached_property
    def count(self) -> int:
        """How many chunks."""
        return -(-self.total_bytes // self.body_bytes)

    def start(self, index: int) -> int:
        """Where the body of chunk `index` starts in the message."""
        return index * self.body_bytes

    def size(self, index: int) -> int:
        """How long the body of chunk `index` is."""
        return min(self.body_bytes, self.total_bytes - self.start(index))

    def check(self, header: ChunkHeader, chunk: bytes) -> None:
        """Raise PeerError `bad_chunk` unless the chunk fits this layout exactly."""
        if (
            header.count != self.count
            or len(chunk) != self.size(header.index) + CHUNK_OVERHEAD_BYTES
        ):
            raise PeerError("bad_chunk", "a chunk does not fit its transfer")


def seal_chunks(
    message: bytes, layout: Layout, *, transfer: bytes, key: ChunkKey
) -> Iterator[bytes]:
    """Yield each chunk of `message`, sealed. One `key` seals one message, once."""
    for index in range(layout.count):
        header = ChunkHeader(transfer, index, layout.count).encode()
        start = layout.start(index)
        yield header + key.seal(index, message[start : start + layout.body_bytes], header)


def open_chunk(chunk: bytes, key: ChunkKey) -> bytes:
    """Return a chunk's body. Raises PeerError `bad_chunk` or `bad_seal`."""
    return chunk_header(chunk).open_(chunk, key)


def tags_digest(chunks: Iterable[bytes]) -> bytes:
    """SHA-256 over the authentication tags of all chunks, in order: what the sender signs."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk[-AEAD_TAG_BYTES:])
    return digest.digest()


class Reassembler:
    """Collect the chunks of one transfer in memory. Holds at most its layout's bytes."""

    def __init__(self, layout: Layout, *, transfer: bytes, key: ChunkKey) -> None:
        self.layout = layout
        self.transfer = transfer
        self._key = key
        self._bodies: dict[int, bytes] = {}

    def add(self, chunk: bytes) -> bool:
        """Take one chunk; say whether the message is complete.

        Raises PeerError when the chunk is not of this transfer or was altered.
        """
        header = chunk_header(chunk)
        if header.transfer != self.transfer:
            raise PeerError("other_transfer", "a chunk of another transfer")
        self.layout.check(header, chunk)
        if header.index not in self._bodies:  # MQTT may deliver twice: the first true one stays
            self._bodies[header.index] = header.open_(chunk, self._key)
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return len(self._bodies) == self.layout.count

    @property
    def held(self) -> int:
        """How many chunks are there."""
        return len(self._bodies)

    def missing(self) -> list[int]:
        """The indices of the chunks that are not there, in order."""
        return [i for i in range(self.layout.count) if i not in self._bodies]

    def message(self) -> bytes:
        """The whole message. Only once `complete`."""
        return b"".join(self._bodies[i] for i in range(self.layout.count))


def bitmap_of(indices: Iterable[int], count: int) -> bytes:
    """A bitmap of `count` bits with `indices` set, least significant bit first."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << (index % 8)
    return bytes(bits)


def missing_in(bitmap: bytes, count: int) -> list[int]:
    """The indices set in a `bitmap_of`. Raises PeerError when its length is wrong."""
    if len(bitmap) != -(-count // 8):
        raise PeerError("bad_bitmap", "a bitmap of the wrong length")
    return [i for i in range(count) if bitmap[i // 8] >> (i % 8) & 1]
