"""A sealed update opens for the round, device and upload it was made for, and nowhere else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, Layout, Reassembler, seal_chunks
from broker_bridge.wire.envelope import ChunkKey, KemKey
from broker_bridge.wire.update import Binding, SealedUpdate, open_update, seal_update, update_key

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "update-v1.json").read_text())

ROUND, DEVICE, EPHEMERAL, STRANGER = (KemKey.from_seed(bytes([n] * 32)) for n in (1, 2, 3, 4))
PSK = bytes([5] * 32)
BINDING = Binding("demo", "anna", announcement=bytes([6] * 32), upload=b"upload-1")
MESSAGE = bytes(range(256)) * 8
PACKET_BYTES = 1_024


def seal(
    message: bytes = MESSAGE, binding: Binding = BINDING, ephemeral: KemKey = EPHEMERAL
) -> SealedUpdate:
    return seal_update(
        message, binding, round_key=ROUND.public, sender=DEVICE, psk=PSK, ephemeral=ephemeral,
        packet_bytes=PACKET_BYTES,
    )  # fmt: skip


SEALED = seal()


def key(**changes: Any) -> ChunkKey:
    known: dict[str, Any] = {"enc": SEALED.enc, "binding": BINDING, "round_key": ROUND}
    known |= {"sender": DEVICE.public, "psk": PSK}
    return update_key(**(known | changes))


def refused(chunks: tuple[bytes, ...], with_key: ChunkKey, tags: bytes) -> bool:
    with pytest.raises(PeerError) as caught:
        open_update(chunks, with_key, tags=tags)
    return caught.value.reason in {"bad_seal", "bad_chunk", "bad_version"}


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=5_000), st.binary(min_size=32, max_size=32))
def test_an_update_opens_as_it_was_sealed(message: bytes, seed: bytes) -> None:
    sealed = seal(message, ephemeral=KemKey.from_seed(seed))
    opened = open_update(sealed.chunks, key(enc=sealed.enc), tags=sealed.tags)
    assert opened == message
    assert sum(map(len, sealed.chunks)) == len(message) + CHUNK_OVERHEAD_BYTES * sealed.layout.count


def test_an_update_arrives_chunk_by_chunk() -> None:
    arriving = Reassembler(SEALED.layout, transfer=BINDING.upload, key=key())
    assert [arriving.add(chunk) for chunk in reversed(SEALED.chunks)] == [False, False, True]
    assert arriving.message() == MESSAGE


def test_the_frozen_update_of_version_1_still_opens_and_is_still_sealed() -> None:
    chunks = tuple(map(bytes.fromhex, VECTORS["chunks"]))
    tags = bytes.fromhex(VECTORS["tags"])
    assert open_update(chunks, key(enc=bytes.fromhex(VECTORS["enc"])), tags=tags) == MESSAGE
    assert (SEALED.enc, SEALED.chunks, SEALED.tags) == (EPHEMERAL.public, chunks, tags)


OTHERS = {
    "federation": {"binding": replace(BINDING, federation="demo2")},
    "device": {"binding": replace(BINDING, device="ben")},
    "announcement": {"binding": replace(BINDING, announcement=bytes(32))},
    "upload": {"binding": replace(BINDING, upload=b"upload-2")},
    "round key": {"round_key": STRANGER},
    "sender": {"sender": STRANGER.public},
    "token": {"psk": bytes([7] * 32)},
    "encapsulated key": {"enc": STRANGER.public},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_an_update_opens_under_no_other(change: dict[str, Any]) -> None:
    assert refused(SEALED.chunks, key(**change), SEALED.tags)


def test_a_border_between_federation_and_device_cannot_be_moved() -> None:
    one, other = Binding("a", "b-c", bytes(32), bytes(8)), Binding("a-b", "c", bytes(32), bytes(8))
    assert one.info != other.info
    assert one.psk_id != other.psk_id


def test_two_attempts_share_neither_key_nor_bytes() -> None:
    again = seal(ephemeral=STRANGER)
    assert refused(again.chunks, key(), again.tags)
    assert not set(SEALED.chunks) & set(again.chunks)


def test_an_update_cut_short_by_any_number_of_chunks_is_refused() -> None:
    for n in range(len(SEALED.chunks)):
        assert refused(SEALED.chunks[:n], key(), SEALED.tags)


def test_chunks_swapped_repeated_or_from_another_attempt_are_refused() -> None:
    first, second, third = SEALED.chunks
    mixed = seal(MESSAGE[::-1], ephemeral=STRANGER).chunks[1]
    for chunks in (
        (second, first, third),
        (first, first, third),
        (first, second, third, third),
        (first, mixed, third),
    ):
        assert refused(chunks, key(), SEALED.tags)


@settings(deadline=None)
@given(st.integers(0, 2), st.data())
def test_any_bit_flipped_is_refused(index: int, data: st.DataObject) -> None:
    altered = bytearray(SEALED.chunks[index])
    bit = data.draw(st.integers(0, 8 * len(altered) - 1))
    altered[bit // 8] ^= 1 << bit % 8
    chunks = (*SEALED.chunks[:index], bytes(altered), *SEALED.chunks[index + 1 :])
    assert refused(chunks, key(), SEALED.tags)


def test_another_message_under_the_same_key_is_not_what_was_committed_to() -> None:
    layout = Layout(len(MESSAGE), SEALED.layout.body_bytes)
    forged = tuple(seal_chunks(MESSAGE[::-1], layout, transfer=BINDING.upload, key=key()))
    assert refused(forged, key(), SEALED.tags)


def test_a_round_key_of_low_order_is_refused_before_anything_is_sealed() -> None:
    with pytest.raises(PeerError) as caught:
        seal_update(
            MESSAGE, BINDING, round_key=bytes(32), sender=DEVICE, psk=PSK, ephemeral=EPHEMERAL,
            packet_bytes=PACKET_BYTES,
        )  # fmt: skip
    assert caught.value.reason == "bad_key"
