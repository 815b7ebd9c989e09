"""One update on its way: sealed by a device for one round, opened by the server.

The key of an update is exported from an HPKE exchange (RFC 9180, AuthPSK) between the
device and the round's key. The exchange is bound to the announcement's digest, the
federation, the device and the upload, so an update sealed for one round, model or set
of settings opens nowhere else. Each attempt has a fresh `ephemeral`: a new key, so no
nonce is used twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from broker_bridge.errors import PeerError
from broker_bridge.wire.chunks import Layout, open_chunk, seal_chunks, tags_digest
from broker_bridge.wire.envelope import ChunkKey, KemKey, exchange_from, exchange_to

__all__ = ["Binding", "SealedUpdate", "open_update", "seal_update", "update_key"]

_EXPORT = b"midge v1 update chunks"


@dataclass(frozen=True)
class Binding:
    """What an update belongs to. Both ends know it before they start."""

    federation: str
    device: str
    announcement: bytes  # SHA-256 of the announcement's payload
    upload: bytes

    @property
    def info(self) -> bytes:
        """The HPKE `info`: fixed-length parts first, so that no two bindings read alike."""
        return self.announcement + self.upload + f"{self.federation}/{self.device}".encode()

    @property
    def psk_id(self) -> bytes:
        """The HPKE `psk_id`: whose secret it is."""
        return f"midge v1 {self.federation}/{self.device}".encode()


@dataclass(frozen=True)
class SealedUpdate:
    """What a device stores and sends."""

    enc: bytes
    layout: Layout
    chunks: tuple[bytes, ...]

    @property
    def tags(self) -> bytes:
        """The digest over all chunks that `Init` commits to."""
        return tags_digest(self.chunks)


def seal_update(
    message: bytes,
    binding: Binding,
    *,
    round_key: bytes,
    sender: KemKey,
    psk: bytes,
    ephemeral: KemKey,
    packet_bytes: int,
) -> SealedUpdate:
    """Seal `message` to the holder of `round_key`, cut for MQTT packets of `packet_bytes`.

    Raises PeerError `bad_key` when the announced round key is not a usable point.
    """
    exchange = exchange_to(
        round_key, ephemeral=ephemeral, sender=sender, info=binding.info, psk=psk,
        psk_id=binding.psk_id,
    )  # fmt: skip
    layout = Layout.for_packets(len(message), packet_bytes)
    key = ChunkKey(exchange.export(_EXPORT))
    chunks = tuple(seal_chunks(message, layout, transfer=binding.upload, key=key))
    return SealedUpdate(exchange.enc, layout, chunks)


def update_key(
    enc: bytes, binding: Binding, *, round_key: KemKey, sender: bytes, psk: bytes
) -> ChunkKey:
    """The key that opens the chunks of an update. Raises PeerError `bad_key`."""
    exchange = exchange_from(
        enc, receiver=round_key, sender=sender, info=binding.info, psk=psk, psk_id=binding.psk_id
    )
    return ChunkKey(exchange.export(_EXPORT))


def open_update(chunks: Iterable[bytes], key: ChunkKey, *, tags: bytes) -> bytes:
    """Return the message in all `chunks`, in order.

    Raises PeerError `bad_seal`: altered, incomplete, or not what the device signed.
    """
    whole = tuple(chunks)
    if tags_digest(whole) != tags:
        raise PeerError("bad_seal", "the chunks are not those that the device committed to")
    return b"".join(open_chunk(chunk, key) for chunk in whole)
