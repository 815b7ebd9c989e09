"""Blobs: what the broker retains opens for the fleet, and is what was announced."""

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import blobs
from broker_bridge.wire.chunks import seal_chunks
from broker_bridge.wire.envelope import blob_key
from broker_bridge.wire.messages import Blob

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "blobs-v1.json").read_text())

FLEET_KEY, OLD_FLEET_KEY = bytes([1] * 32), bytes([2] * 32)
CONTENT = bytes(range(256)) * 8
BLOB = blobs.describe(CONTENT, packet_bytes=1_024)
CHUNKS = tuple(blobs.seal_blob(CONTENT, BLOB, fleet_key=FLEET_KEY))
PACKETS = st.integers(LIMITS.packet_bytes_min, LIMITS.packet_bytes_max)


def reason(blob: Blob, chunk: bytes, fleet_key: bytes = FLEET_KEY) -> str:
    with pytest.raises(PeerError) as caught:
        blobs.collector(blob, fleet_key=fleet_key).add(chunk)
    return caught.value.reason


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=5_000), PACKETS, st.randoms(use_true_random=False))
def test_a_blob_comes_back_in_any_order(content: bytes, packet_bytes: int, order: Random) -> None:
    blob = blobs.describe(content, packet_bytes=packet_bytes)
    chunks = list(blobs.seal_blob(content, blob, fleet_key=FLEET_KEY))
    order.shuffle(chunks)
    collector = blobs.collector(blob, fleet_key=FLEET_KEY)
    assert [collector.add(chunk) for chunk in chunks][-1]
    assert blobs.finish(blob, collector) == content


def test_the_frozen_chunks_of_version_1_still_open_and_are_still_made() -> None:
    frozen = tuple(map(bytes.fromhex, VECTORS["chunks"]))
    collector = blobs.collector(BLOB, fleet_key=FLEET_KEY)
    for chunk in frozen:
        collector.add(chunk)
    assert blobs.finish(BLOB, collector) == CONTENT
    assert frozen == CHUNKS


def test_the_same_blob_is_the_same_chunks_after_a_restart() -> None:
    again = blobs.describe(CONTENT, packet_bytes=1_024)
    assert tuple(blobs.seal_blob(CONTENT, again, fleet_key=FLEET_KEY)) == CHUNKS


def test_the_same_blob_cut_otherwise_shares_no_key() -> None:
    other = blobs.describe(CONTENT, packet_bytes=1_025)
    collector = blobs.collector(BLOB, fleet_key=FLEET_KEY)
    relabelled = seal_chunks(
        CONTENT, BLOB.layout, transfer=BLOB.transfer,
        key=blob_key(FLEET_KEY, other.digest, other.body_bytes),
    )  # fmt: skip
    with pytest.raises(PeerError, match="altered"):
        collector.add(next(relabelled))


def test_a_chunk_cut_short_at_any_length_is_refused() -> None:
    chunk = CHUNKS[-1]
    assert {reason(BLOB, chunk[:n]) for n in range(len(chunk))} == {"bad_chunk"}


def test_who_holds_an_old_fleet_key_opens_nothing() -> None:
    assert reason(BLOB, CHUNKS[0], OLD_FLEET_KEY) == "bad_seal"


def test_a_chunk_of_the_model_before_is_told_from_a_forged_one() -> None:
    before = blobs.describe(CONTENT[::-1], packet_bytes=1_024)
    chunk = next(blobs.seal_blob(CONTENT[::-1], before, fleet_key=FLEET_KEY))
    assert reason(BLOB, chunk) == "other_transfer"


def test_a_member_who_knows_the_fleet_key_cannot_forge_what_was_announced() -> None:
    key = blob_key(FLEET_KEY, BLOB.digest, BLOB.body_bytes)
    collector = blobs.collector(BLOB, fleet_key=FLEET_KEY)
    for chunk in seal_chunks(CONTENT[::-1], BLOB.layout, transfer=BLOB.transfer, key=key):
        collector.add(chunk)
    with pytest.raises(PeerError) as caught:
        blobs.finish(BLOB, collector)
    assert caught.value.reason == "bad_digest"


def test_a_blob_of_more_chunks_than_we_hold_is_refused() -> None:
    vast = Blob(digest=BLOB.digest, total_bytes=LIMITS.chunks_max + 1, body_bytes=1)
    with pytest.raises(PeerError) as caught:
        blobs.collector(vast, fleet_key=FLEET_KEY)
    assert caught.value.reason == "bad_size"
