"""A task or a model in chunks that the broker retains for the whole fleet.

Sealed under the fleet key, so the broker keeps what it cannot read; named by digest in
the signed announcement, so a member who knows the fleet key still cannot forge one.
"""

from collections.abc import Iterator

from broker_bridge.errors import PeerError
from broker_bridge.wire.chunks import Layout, Reassembler, seal_chunks
from broker_bridge.wire.envelope import blob_key, sha256
from broker_bridge.wire.messages import Blob

__all__ = ["collector", "describe", "finish", "seal_blob"]


def describe(content: bytes, *, packet_bytes: int) -> Blob:
    """Say how `content` will lie on a broker that takes packets of `packet_bytes`."""
    layout = Layout.for_packets(len(content), packet_bytes)
    return Blob(digest=sha256(content), total_bytes=len(content), body_bytes=layout.body_bytes)


def seal_blob(content: bytes, blob: Blob, *, fleet_key: bytes) -> Iterator[bytes]:
    """Yield the chunks of `content`, in order of their topics."""
    key = blob_key(fleet_key, blob.digest, blob.body_bytes)
    return seal_chunks(content, blob.layout, transfer=blob.transfer, key=key)


def collector(blob: Blob, *, fleet_key: bytes) -> Reassembler:
    """Something to `add` the chunks of `blob` to. Raises PeerError `bad_size`."""
    key = blob_key(fleet_key, blob.digest, blob.body_bytes)
    return Reassembler(blob.layout, transfer=blob.transfer, key=key)


def finish(blob: Blob, reassembler: Reassembler) -> bytes:
    """Return the content once complete. Raises PeerError `bad_digest` if it is another."""
    content = reassembler.message()
    if sha256(content) != blob.digest:
        raise PeerError("bad_digest", "a task or model is not the one that was announced")
    return content
