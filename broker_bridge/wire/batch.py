"""One signature for messages that come about together.

What is signed is the root of a Merkle tree; each message carries its own audit path to
the root, so that it is checked alone, offline, by whoever was not told of the others. The
tree, its paths and their check are those of Certificate Transparency (RFC 9162, section
2.1); Roughtime signs its answers in the same way. An entry of the tree is exactly what a
signature for that message alone would sign: its kind, and with it its device, is in there.

    signature (64) ‖ entry (1) ‖ last (1) ‖ path (32 for each node) ‖ payload

`entry` is the number of this entry of the tree, from 0, and `last` that of its last one.
How many nodes the path has follows from these two, so there is one way to cut the bytes.
The signature is over `last` ‖ root, under a kind of its own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from broker_bridge.errors import PeerError
from broker_bridge.wire.envelope import SIGNATURE_BYTES, SignKey, domain, sha256, verify

__all__ = ["Parts", "sign_together", "split", "verify_one_of"]

_KIND = "batch"
_HASH_BYTES = 32
_PATH_AT = SIGNATURE_BYTES + 2
_LEAF, _NODE = b"\x00", b"\x01"

# Entries under one signature. A byte could count 256; but twice as many would spare each
# message a fifth of a microsecond, and cost it 32 bytes on the way (decision 0136).
_ENTRIES_MAX = 64


class Parts(NamedTuple):
    """What a message of a batch is made of; nothing of it is believed yet."""

    signature: bytes
    entry: int
    last: int
    path: tuple[bytes, ...]
    payload: bytes


def sign_together(key: SignKey, items: Sequence[tuple[str, bytes]]) -> list[bytes]:
    """Sign each (kind, payload) of `items`, with a signature for every 64; in the same order."""
    return [
        signed
        for start in range(0, len(items), _ENTRIES_MAX)
        for signed in _signed(key, items[start : start + _ENTRIES_MAX])
    ]


def _signed(key: SignKey, items: Sequence[tuple[str, bytes]]) -> Iterator[bytes]:
    root, paths = _tree([domain(kind) + payload for kind, payload in items])
    last = bytes([len(items) - 1])
    signature = key.sign(_KIND, last + root)[:SIGNATURE_BYTES]
    for entry, (path, (_, payload)) in enumerate(zip(paths, items, strict=True)):
        yield b"".join((signature, bytes([entry]), last, path, payload))


def verify_one_of(public: bytes, kind: str, data: bytes) -> bytes:
    """Return the payload of one of what `sign_together` made. Raises PeerError `bad_signature`."""
    parts = split(data)
    root = _root_from(parts, sha256(_LEAF + domain(kind) + parts.payload))
    verify(public, _KIND, parts.signature + bytes([parts.last]) + root)
    return parts.payload


def split(data: bytes) -> Parts:
    """Cut a message of a batch into its parts. Raises PeerError `bad_signature`."""
    if len(data) < _PATH_AT:
        raise PeerError("bad_signature", "a message of a batch is cut short")
    entry, last = data[SIGNATURE_BYTES], data[SIGNATURE_BYTES + 1]
    if entry > last:
        raise PeerError("bad_signature", "a message that is beyond the end of its batch")
    payload_at = _PATH_AT + _HASH_BYTES * _path_nodes(entry, last)
    if len(data) < payload_at:
        raise PeerError("bad_signature", "the path of a message of a batch is cut short")
    path = tuple(data[at : at + _HASH_BYTES] for at in range(_PATH_AT, payload_at, _HASH_BYTES))
    return Parts(data[:SIGNATURE_BYTES], entry, last, path, data[payload_at:])


# ── The tree ────────────────────────────────────────────────────────────────────────────


def _tree(entries: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """RFC 9162, 2.1.1 and 2.1.3.1: the root over one or more entries, and each entry's path.

    Level by level: an odd last node moves up as it is, which splits at the largest power of
    two, as the RFC does. A path is what is beside the node, then the path of what is above.
    """
    levels = [[sha256(_LEAF + entry) for entry in entries]]
    while len(levels[-1]) > 1:
        levels.append(_above(levels[-1]))
    (root,), paths = levels.pop(), [b""]
    for level in reversed(levels):
        level.append(b"")  # beside an odd last node is nothing
        paths = [level[i ^ 1] + paths[i >> 1] for i in range(len(level) - 1)]
    return root, paths


def _above(level: list[bytes]) -> list[bytes]:
    ends = len(level) & ~1
    above = [sha256(_NODE + level[i] + level[i + 1]) for i in range(0, ends, 2)]
    return above + level[ends:]


def _root_from(parts: Parts, node: bytes) -> bytes:
    """RFC 9162, 2.1.3.2: the root to which this path leads from the hash of a leaf."""
    index, last, beside = parts.entry, parts.last, iter(parts.path)
    while last:
        if index & 1:
            node = sha256(_NODE + next(beside) + node)
        elif index < last:
            node = sha256(_NODE + node + next(beside))
        index, last = index >> 1, last >> 1
    return node


def _path_nodes(index: int, last: int) -> int:
    count = 0
    while last:
        count += index < last or index & 1
        index, last = index >> 1, last >> 1
    return count
