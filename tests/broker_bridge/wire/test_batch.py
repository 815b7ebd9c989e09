"""One signature for many: the tree of RFC 9162, and every way to make it say what it does not."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import batch, messages
from broker_bridge.wire.batch import sign_together, split, verify_one_of
from broker_bridge.wire.envelope import SignKey, verify
from broker_bridge.wire.messages import Ack, Need
from broker_bridge.wire.topics import Topics

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "batch-v1.json").read_text())
KEY, STRANGER = SignKey.from_seed(bytes([1] * 32)), SignKey.from_seed(bytes([2] * 32))
HEAD_BYTES = 66


def said(count: int) -> list[tuple[str, bytes]]:
    return [(f"ack demo/d-{n}", f"payload {n}".encode()) for n in range(count)]


def refused(kind: str, data: bytes, public: bytes = KEY.public) -> bool:
    with pytest.raises(PeerError) as caught:
        verify_one_of(public, kind, data)
    return caught.value.reason == "bad_signature"


# ── RFC 9162, word for word ─────────────────────────────────────────────────────────────


def half(count: int) -> int:
    """The largest power of two smaller than `count`."""
    return 1 << (count - 1).bit_length() - 1


def mth(entries: list[bytes]) -> bytes:
    """2.1.1, Merkle Tree Hash."""
    if len(entries) == 1:
        return sha256(b"\x00" + entries[0]).digest()
    k = half(len(entries))
    return sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def path(m: int, entries: list[bytes]) -> list[bytes]:
    """2.1.3.1, PATH."""
    if len(entries) == 1:
        return []
    k = half(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


def leads(m: int, size: int, entry: bytes, nodes: list[bytes], root: bytes) -> bool:
    """2.1.3.2, verifying an inclusion proof."""
    fn, sn, r = m, size - 1, sha256(b"\x00" + entry).digest()
    for p in nodes:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = sha256(b"\x01" + p + r).digest()
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            r = sha256(b"\x01" + r + p).digest()
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r == root


# The leaves and roots by which implementations of Certificate Transparency compare themselves.
CT_LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(1, 9))
def test_the_roots_are_those_of_certificate_transparency(count: int) -> None:
    root, _ = batch._tree(CT_LEAVES[:count])
    assert root.hex() == CT_ROOTS[count - 1]


@pytest.mark.parametrize("count", [*range(1, 34), 63, 64, 65, 100, 127, 128, 129, 255, 256])
def test_a_tree_of_any_size_is_the_one_that_the_rfc_defines(count: int) -> None:
    entries = [bytes([n]) * (n % 5) for n in range(count)]
    root, paths = batch._tree(entries)
    assert root == mth(entries)
    for m, found in enumerate(paths):
        nodes = path(m, entries)
        assert found == b"".join(nodes)
        assert leads(m, count, entries[m], nodes, root)


def by_the_rfc(items: list[tuple[str, bytes]], m: int) -> bytes:
    """A message of a batch as docs/protocol.md describes it, made with nothing of ours."""
    entries = [b"midge v1 " + kind.encode() + b"\0" + payload for kind, payload in items]
    last = bytes([len(items) - 1])
    signature = KEY._key.sign(b"midge v1 batch\0" + last + mth(entries)).signature
    return signature + bytes([m]) + last + b"".join(path(m, entries)) + items[m][1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 63, 64])
def test_what_is_signed_together_is_what_the_page_describes(count: int) -> None:
    items = said(count)
    assert sign_together(KEY, items) == [by_the_rfc(items, m) for m in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 100, 255, 256])
def test_a_batch_that_another_program_made_is_verified_up_to_256(count: int) -> None:
    items = said(count)
    for m in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
        kind, payload = items[m]
        assert verify_one_of(KEY.public, kind, by_the_rfc(items, m)) == payload


# ── What is signed together ─────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(max_size=60), max_size=140))
def test_each_comes_back_in_its_place_and_for_its_device_alone(payloads: list[bytes]) -> None:
    items = [(f"ack demo/d-{n}", payload) for n, payload in enumerate(payloads)]
    signed = sign_together(KEY, items)
    assert [
        verify_one_of(KEY.public, kind, data)
        for (kind, _), data in zip(items, signed, strict=True)
    ] == payloads  # fmt: skip
    for (kind, _), data in zip(items[1:], signed, strict=False):
        assert refused(kind, data)


def test_64_share_a_signature_and_no_more() -> None:
    assert sign_together(KEY, []) == []
    for count, signatures in ((1, 1), (64, 1), (65, 2), (200, 4)):
        signed = sign_together(KEY, said(count))
        assert len({split(data).signature for data in signed}) == signatures


def test_one_alone_costs_two_bytes_and_64_cost_32_for_each_doubling() -> None:
    (kind, payload), *_ = items = said(64)
    alone = KEY.sign(kind, payload)
    for doublings in range(7):
        signed = sign_together(KEY, items[: 1 << doublings])[0]
        assert len(signed) == len(alone) + 2 + 32 * doublings


# ── What is not ─────────────────────────────────────────────────────────────────────────

ITEMS = said(6)
SIGNED = sign_together(KEY, ITEMS)
EACH = pytest.mark.parametrize("m", range(len(ITEMS)))


def joined(parts: batch.Parts, **changes: object) -> bytes:
    parts = parts._replace(**changes)  # type: ignore[arg-type]
    head = parts.signature + bytes([parts.entry, parts.last])
    return head + b"".join(parts.path) + parts.payload


@EACH
def test_any_bit_flipped_in_one_of_a_batch_is_refused(m: int) -> None:
    kind, data = ITEMS[m][0], SIGNED[m]
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        assert refused(kind, bytes(altered))


@EACH
def test_one_of_a_batch_that_is_cut_or_lengthened_is_refused(m: int) -> None:
    kind, data = ITEMS[m][0], SIGNED[m]
    assert all(refused(kind, data[:n]) for n in range(len(data)))
    assert refused(kind, data + b"\0")
    assert refused(kind, data[:HEAD_BYTES] + bytes(32) + data[HEAD_BYTES:])


@EACH
def test_it_fits_no_other_device_kind_or_key(m: int) -> None:
    kind, data = ITEMS[m][0], SIGNED[m]
    others = [other for other, _ in ITEMS if other != kind]
    for other in [*others, kind[:-1], kind + "0", kind.replace("ack", "go"), "ack", "batch", ""]:
        assert refused(other, data)
    assert refused(kind, data, STRANGER.public)


@EACH
def test_it_cannot_be_moved_to_another_entry_or_a_tree_of_another_size(m: int) -> None:
    kind, parts = ITEMS[m][0], split(SIGNED[m])
    for entry in {*range(256)} - {parts.entry}:
        assert refused(kind, joined(parts, entry=entry))
    for last in {*range(256)} - {parts.last}:
        assert refused(kind, joined(parts, last=last))


def test_the_path_or_the_signature_of_another_batch_is_refused() -> None:
    other = sign_together(KEY, [(kind, payload + b"!") for kind, payload in ITEMS])
    for (kind, _), data, others in zip(ITEMS, SIGNED, other, strict=True):
        ours, theirs = split(data), split(others)
        for part in ("signature", "path", "payload"):
            assert refused(kind, joined(ours, **{part: getattr(theirs, part)}))


def test_the_path_of_another_entry_is_refused() -> None:
    for (kind, _), data in zip(ITEMS, SIGNED, strict=True):
        for other in set(SIGNED) - {data}:
            assert refused(kind, joined(split(data), path=split(other).path))


@pytest.mark.parametrize("kind", ["", "ack demo/d-0", "batch"])
def test_an_inner_node_is_no_entry(kind: str) -> None:
    """What is hashed for a node begins with another byte than what is hashed for an entry."""
    parts = split(sign_together(KEY, said(4))[0])
    entries = [b"midge v1 " + kind.encode() + b"\0" + payload for kind, payload in said(4)]
    under = [sha256(b"\x00" + entry).digest() for entry in entries[:2]]
    for payload in (b"".join(under), b"\x01" + b"".join(under)):
        for last in (0, 1, 2, 3):
            raised = parts._replace(entry=0, last=last, path=parts.path[1:], payload=payload)
            assert refused(kind, joined(raised))


def test_the_signature_of_a_batch_is_no_signature_of_a_message_and_the_reverse() -> None:
    kind, payload = ITEMS[0]
    alone = KEY.sign(kind, payload)
    assert refused(kind, alone)
    assert refused(kind, alone[:64] + b"\0\0" + payload)
    parts = split(SIGNED[0])
    root, _ = batch._tree([b"midge v1 " + k.encode() + b"\0" + p for k, p in ITEMS])
    signed_root = parts.signature + bytes([parts.last]) + root
    assert verify(KEY.public, "batch", signed_root) == bytes([parts.last]) + root
    for other in (kind, "go demo/d-0", "round demo", "batch demo", "batch demo/d-0"):
        with pytest.raises(PeerError):
            verify(KEY.public, other, signed_root)
        with pytest.raises(PeerError):
            verify(KEY.public, other, SIGNED[0])


@settings(deadline=None, max_examples=300)
@given(st.one_of(
    st.binary(max_size=400),
    st.builds(lambda a, n, b: a + n + b, st.binary(min_size=64, max_size=64),
              st.binary(min_size=2, max_size=2), st.binary(max_size=300)),
    st.builds(lambda m, at, put: SIGNED[m][:at] + put + SIGNED[m][at + len(put):],
              st.integers(0, 5), st.integers(0, 180), st.binary(min_size=1, max_size=70)),
))  # fmt: skip
def test_whatever_else_arrives_is_refused_as_badly_signed(data: bytes) -> None:
    if data not in SIGNED:
        assert refused(ITEMS[0][0], data)


# ── Receipts ────────────────────────────────────────────────────────────────────────────

ACK = Ack(round=7, upload=b"upload 8", status="accepted")


def test_a_receipt_is_signed_so_also_alone_and_nothing_else_is() -> None:
    alone = messages.signed(KEY, "ack", "demo/a", ACK)
    assert messages.signed_together(KEY, "ack", [("demo/a", ACK)]) == [alone]
    assert messages.opened(KEY.public, "ack", "demo/a", alone, Ack) == ACK
    need = Need(upload=b"upload 8", bitmap=b"\1")
    assert verify(KEY.public, "need demo/a", messages.signed(KEY, "need", "demo/a", need))
    with pytest.raises(ValueError, match="a signature of its own"):
        messages.signed_together(KEY, "need", [("demo/a", need)])


def test_the_longest_receipt_fits_the_smallest_packet() -> None:
    scope, topics = f"{'f' * 40}/{'d' * 40}", Topics("f" * 40)
    ack = Ack(round=2**53, upload=bytes(8), status="rejected", reason="x" * 500, retry_after_s=0.1)
    for data in messages.signed_together(KEY, "ack", [(scope, ack)] * 64):
        mqtt_bytes = 3 + 2 + len(topics.down("d" * 40, "ack")) + 2  # and no properties
        assert mqtt_bytes + len(data) <= LIMITS.packet_bytes_min


def test_receipts_that_are_signed_together_open_for_their_own_devices() -> None:
    receipts = [(f"demo/d-{n}", Ack(round=7, upload=bytes([n] * 8), status="late"))
                for n in range(5)]  # fmt: skip
    signed = messages.signed_together(KEY, "ack", receipts)
    for n, (scope, receipt) in enumerate(receipts):
        assert messages.opened(KEY.public, "ack", scope, signed[n], Ack) == receipt
        for other in signed[:n] + signed[n + 1 :]:
            with pytest.raises(PeerError, match="signature"):
                messages.opened(KEY.public, "ack", scope, other, Ack)


def test_the_frozen_bytes_of_version_1_are_still_made() -> None:
    assert frozen() == VECTORS
    for n, data in enumerate(VECTORS["seven"]):
        assert verify_one_of(KEY.public, said(7)[n][0], bytes.fromhex(data)) == said(7)[n][1]


def frozen() -> dict[str, object]:
    return {
        "sign public": KEY.public.hex(),
        "one": sign_together(KEY, said(1))[0].hex(),
        "seven": [data.hex() for data in sign_together(KEY, said(7))],
        "sixty-four, the last": sign_together(KEY, said(64))[63].hex(),
        "a receipt": messages.signed(KEY, "ack", "demo/anna", ACK).hex(),
    }
