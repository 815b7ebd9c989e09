"""The envelope: RFC 9180's own vectors, another implementation, and every forgery we could name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey, KEMKeyPair

from broker_bridge.errors import PeerError
from broker_bridge.wire import envelope
from broker_bridge.wire.envelope import (
    AEAD_TAG_BYTES,
    ChunkKey,
    Exchange,
    KemKey,
    SignKey,
    blob_key,
    exchange_from,
    exchange_to,
    fingerprint,
    open_message,
    random_bytes,
    seal_message,
    sha256,
    verify,
)

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS = json.loads((FOLDER / "envelope-v1.json").read_text())
RFC_9180 = json.loads((FOLDER / "rfc9180.json").read_text())["vectors"]

SEEDS = st.binary(min_size=32, max_size=32)
TEXTS = st.binary(max_size=60)
SECRETS = st.binary(min_size=32, max_size=48)

SIGN = SignKey.from_seed(bytes([1] * 32))
SERVER = KemKey.from_seed(bytes([2] * 32))
DEVICE = KemKey.from_seed(bytes([3] * 32))
EPHEMERAL = KemKey.from_seed(bytes([4] * 32))
STRANGER = KemKey.from_seed(bytes([5] * 32))
BOUND: dict[str, Any] = {"info": b"round 7", "psk": bytes([6] * 32), "psk_id": b"demo/anna"}


def flipped(data: bytes, bit: int) -> bytes:
    altered = bytearray(data)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


# ── RFC 9180 ────────────────────────────────────────────────────────────────────────────


def vector_name(vector: dict[str, Any]) -> str:
    return f"{['', 'PSK', 'Auth', 'AuthPSK'][vector['mode']]} aead {vector['aead_id']:#06x}"


EVERY_VECTOR = pytest.mark.parametrize("vector", RFC_9180, ids=vector_name)


class Vector:
    """One test vector, as the arguments of `exchange_to` and `exchange_from`."""

    def __init__(self, vector: dict[str, Any]) -> None:
        def hexed(name: str) -> bytes:
            return bytes.fromhex(vector.get(name, ""))

        self.receiver = KemKey.from_seed(hexed("skRm"))
        self.ephemeral = KemKey.from_seed(hexed("skEm"))
        self.sender = KemKey.from_seed(hexed("skSm")) if "skSm" in vector else None
        self.bound: dict[str, Any] = {
            "info": hexed("info"),
            "psk": hexed("psk"),
            "psk_id": hexed("psk_id"),
            "aead": vector["aead_id"],
        }

    def to(self) -> Exchange:
        return exchange_to(
            self.receiver.public, ephemeral=self.ephemeral, sender=self.sender, **self.bound
        )

    def from_(self, enc: bytes) -> Exchange:
        sender = self.sender.public if self.sender else None
        return exchange_from(enc, receiver=self.receiver, sender=sender, **self.bound)


@EVERY_VECTOR
def test_public_keys_are_those_of_the_rfc(vector: dict[str, Any]) -> None:
    for secret, public in (("skRm", "pkRm"), ("skEm", "pkEm"), ("skSm", "pkSm")):
        if secret in vector:
            key = KemKey.from_seed(bytes.fromhex(vector[secret]))
            assert key.public.hex() == vector[public]


@EVERY_VECTOR
def test_the_shared_secret_is_that_of_the_rfc(vector: dict[str, Any]) -> None:
    v = Vector(vector)
    receiver = v.receiver.public
    shared, context = v.ephemeral.shared(receiver), v.ephemeral.public + receiver
    if v.sender is not None:
        shared, context = shared + v.sender.shared(receiver), context + v.sender.public
    assert envelope._kem_secret(shared, context).hex() == vector["shared_secret"]


@EVERY_VECTOR
def test_both_ends_export_what_the_rfc_exports(vector: dict[str, Any]) -> None:
    to = Vector(vector).to()
    from_ = Vector(vector).from_(bytes.fromhex(vector["enc"]))
    assert to.enc.hex() == vector["enc"]
    assert to._exporter_secret.hex() == vector["exporter_secret"]
    for export in vector["exports"]:
        context = bytes.fromhex(export["exporter_context"])
        assert to.export(context, export["L"]).hex() == export["exported_value"]
        assert from_.export(context, export["L"]).hex() == export["exported_value"]


def test_every_mode_is_tried_with_every_aead_of_the_rfc() -> None:
    tried = {(v["mode"], v["aead_id"]) for v in RFC_9180}
    assert tried == {(mode, aead) for mode in (1, 2, 3) for aead in (1, 2, envelope.EXPORT_ONLY)}


# ── Another implementation ──────────────────────────────────────────────────────────────

PYHPKE = CipherSuite.new(
    KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.EXPORT_ONLY
)  # fmt: skip


def theirs(key: KemKey) -> Any:
    return KEMKey.from_pyca_cryptography_key(X25519PrivateKey.from_private_bytes(key.seed))


def theirs_public(public: bytes) -> Any:
    return KEMKey.from_pyca_cryptography_key(X25519PublicKey.from_public_bytes(public))


@settings(deadline=None, max_examples=25)
@given(SEEDS, SEEDS, SEEDS, TEXTS, SECRETS, st.binary(min_size=1, max_size=40), TEXTS)
def test_another_implementation_exports_what_we_export(
    us: bytes, them: bytes, seed: bytes, info: bytes, psk: bytes, psk_id: bytes, context: bytes
) -> None:
    sender, receiver, ephemeral = map(KemKey.from_seed, (us, them, seed))
    ours = exchange_to(
        receiver.public, ephemeral=ephemeral, sender=sender, info=info, psk=psk, psk_id=psk_id
    )
    other = PYHPKE.create_recipient_context(
        ours.enc, theirs(receiver), info, theirs_public(sender.public), psk, psk_id
    )
    assert other.export(context, 32) == ours.export(context)


@settings(deadline=None, max_examples=25)
@given(SEEDS, SEEDS, SEEDS, TEXTS, SECRETS, st.binary(min_size=1, max_size=40), TEXTS)
def test_we_export_what_another_implementation_exports(
    us: bytes, them: bytes, seed: bytes, info: bytes, psk: bytes, psk_id: bytes, context: bytes
) -> None:
    sender, receiver, ephemeral = map(KemKey.from_seed, (them, us, seed))
    pair = KEMKeyPair(theirs(ephemeral), theirs_public(ephemeral.public))
    enc, other = PYHPKE.create_sender_context(
        theirs_public(receiver.public), info, theirs(sender), psk, psk_id, pair
    )
    ours = exchange_from(
        enc, receiver=receiver, sender=sender.public, info=info, psk=psk, psk_id=psk_id
    )
    assert ours.export(context) == other.export(context, 32)


# ── Exchanges ───────────────────────────────────────────────────────────────────────────


def test_nothing_that_an_exchange_is_bound_to_may_differ() -> None:
    arguments: dict[str, Any] = {"receiver": SERVER, "sender": DEVICE.public, **BOUND}
    theirs = exchange_to(SERVER.public, ephemeral=EPHEMERAL, sender=DEVICE, **BOUND)
    assert exchange_from(theirs.enc, **arguments).export(b"x") == theirs.export(b"x")
    changes: list[dict[str, Any]] = [
        {"receiver": STRANGER},
        {"sender": STRANGER.public},
        {"sender": None},
        {"info": b"round 8"},
        {"psk": bytes([7] * 32)},
        {"psk_id": b"demo/ben"},
        {"psk": b"", "psk_id": b""},
        {"aead": 1},
    ]
    for change in changes:
        other = exchange_from(theirs.enc, **{**arguments, **change})
        assert other.export(b"x") != theirs.export(b"x")
    assert theirs.export(b"y") != theirs.export(b"x")


@settings(deadline=None)
@given(st.integers(0, 255))
def test_any_bit_flipped_in_enc_gives_another_key_or_none(bit: int) -> None:
    ours = exchange_to(SERVER.public, ephemeral=EPHEMERAL, sender=DEVICE, **BOUND)
    sealed = seal_message(ours, b"test", b"message")
    theirs = exchange_from(
        flipped(ours.enc, bit), receiver=SERVER, sender=DEVICE.public, **BOUND
    )  # fmt: skip
    with pytest.raises(PeerError, match="altered"):
        open_message(theirs, b"test", sealed)


# Points of low order, and their twins with the bit set that X25519 ignores.
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("high_bit", [0, 255], ids=["", "high bit"])
@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_point_of_low_order_is_refused_wherever_a_peer_could_put_it(
    point: str, high_bit: int
) -> None:
    low = flipped(bytes.fromhex(point), high_bit) if high_bit else bytes.fromhex(point)
    enc = EPHEMERAL.public
    attempts: list[Callable[[], Exchange]] = [
        lambda: exchange_to(low, ephemeral=EPHEMERAL),
        lambda: exchange_to(low, ephemeral=EPHEMERAL, sender=DEVICE, **BOUND),
        lambda: exchange_from(low, receiver=SERVER),
        lambda: exchange_from(enc, receiver=SERVER, sender=low, **BOUND),
    ]
    for attempt in attempts:
        with pytest.raises(PeerError) as caught:
            attempt()
        assert caught.value.reason == "bad_key"


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_a_public_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(PeerError) as caught:
        exchange_from(bytes([9] * length), receiver=SERVER)
    assert caught.value.reason == "bad_key"


def test_a_secret_without_its_id_is_our_own_mistake() -> None:
    halves: list[dict[str, Any]] = [{"psk": bytes(32)}, {"psk_id": b"id"}]
    for half in halves:
        with pytest.raises(ValueError, match="come together"):
            exchange_to(SERVER.public, ephemeral=EPHEMERAL, **half)


# ── Sealed messages and chunks ──────────────────────────────────────────────────────────

EXCHANGE = exchange_to(SERVER.public, ephemeral=EPHEMERAL, sender=DEVICE, **BOUND)
SEALED = seal_message(EXCHANGE, b"test", b"a message")


def refused(exchange: Exchange, purpose: bytes, sealed: bytes) -> bool:
    with pytest.raises(PeerError) as caught:
        open_message(exchange, purpose, sealed)
    return caught.value.reason == "bad_seal"


@settings(deadline=None)
@given(SEEDS, TEXTS, st.binary(max_size=500))
def test_a_sealed_message_opens_at_the_other_end(seed: bytes, purpose: bytes, text: bytes) -> None:
    ephemeral = KemKey.from_seed(seed)
    to = exchange_to(SERVER.public, ephemeral=ephemeral, sender=DEVICE, **BOUND)
    from_ = exchange_from(to.enc, receiver=SERVER, sender=DEVICE.public, **BOUND)
    sealed = seal_message(to, purpose, text)
    assert open_message(from_, purpose, sealed) == text
    assert len(sealed) == len(text) + AEAD_TAG_BYTES


def test_any_bit_flipped_in_a_sealed_message_is_refused() -> None:
    assert all(refused(EXCHANGE, b"test", flipped(SEALED, n)) for n in range(8 * len(SEALED)))


def test_a_sealed_message_cut_short_at_any_length_is_refused() -> None:
    assert all(refused(EXCHANGE, b"test", SEALED[:n]) for n in range(len(SEALED)))


def test_a_message_sealed_for_one_purpose_opens_for_no_other() -> None:
    assert refused(EXCHANGE, b"tests", SEALED)
    assert refused(EXCHANGE, b"", SEALED)


KEY = ChunkKey(bytes([8] * 32))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), TEXTS, TEXTS, st.data())
def test_a_chunk_opens_only_whole_in_its_place_and_under_its_header(
    index: int, body: bytes, header: bytes, data: st.DataObject
) -> None:
    sealed = KEY.seal(index, body, header)
    assert KEY.open_(index, sealed, header) == body
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    for place, altered, under in (
        (index, flipped(sealed, bit), header),
        (index + 1, sealed, header),
        (index, sealed, header + b"\0"),
        (index, sealed[:-1], header),
    ):
        with pytest.raises(PeerError) as caught:
            KEY.open_(place, altered, under)
        assert caught.value.reason == "bad_seal"


@settings(deadline=None)
@given(SEEDS, SEEDS, st.integers(1, 2**30), st.integers(1, 2**30))
def test_two_layouts_of_one_blob_never_share_a_key(
    fleet_key: bytes, digest: bytes, one: int, other: int
) -> None:
    same = blob_key(fleet_key, digest, one) == blob_key(fleet_key, digest, other)
    assert same == (one == other)


def test_two_blobs_or_two_fleets_never_share_a_key() -> None:
    key = blob_key(bytes(32), sha256(b"model"), 1_000)
    assert key != blob_key(bytes(32), sha256(b"task"), 1_000)
    assert key != blob_key(bytes([1] * 32), sha256(b"model"), 1_000)


# ── Signatures ──────────────────────────────────────────────────────────────────────────

SIGNED = SIGN.sign("test", b"a payload")


def unsigned(public: bytes, kind: str, signed: bytes) -> bool:
    with pytest.raises(PeerError) as caught:
        verify(public, kind, signed)
    return caught.value.reason == "bad_signature"


@settings(deadline=None)
@given(SEEDS, st.binary(max_size=500))
def test_what_was_signed_is_what_is_verified(seed: bytes, payload: bytes) -> None:
    key = SignKey.from_seed(seed)
    assert verify(key.public, "test", key.sign("test", payload)) == payload


def test_any_bit_flipped_in_a_signed_thing_is_refused() -> None:
    assert all(unsigned(SIGN.public, "test", flipped(SIGNED, n)) for n in range(8 * len(SIGNED)))


def test_a_signed_thing_cut_short_at_any_length_is_refused() -> None:
    assert all(unsigned(SIGN.public, "test", SIGNED[:n]) for n in range(len(SIGNED)))


def test_a_signature_for_one_kind_is_no_signature_for_another() -> None:
    assert unsigned(SIGN.public, "tests", SIGNED)
    # Nor may the border between kind and payload be moved.
    moved = SIGN.sign("test a", b"payload")
    assert unsigned(SIGN.public, "test", moved[:64] + b"a" + moved[64:])


def test_the_key_that_would_sign_everything_is_refused() -> None:
    identity = b"\x01" + bytes(31)  # the neutral point: S = 0, R = identity fits any message
    assert unsigned(identity, "test", identity + bytes(32) + b"any payload")


def test_the_other_encoding_of_a_true_signature_is_refused() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(SIGNED[32:64], "little") + order
    assert unsigned(SIGN.public, "test", SIGNED[:32] + s.to_bytes(32, "little") + SIGNED[64:])


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_verification_key_of_another_length_verifies_nothing(length: int) -> None:
    assert unsigned(bytes(length), "test", SIGNED)


# ── Keys ────────────────────────────────────────────────────────────────────────────────


def test_no_secret_is_shown_where_a_key_is_printed() -> None:
    secret = bytes([0xEE] * 32)
    keys = (SignKey.from_seed(secret), KemKey.from_seed(secret), ChunkKey(secret), EXCHANGE)
    shown = " ".join(map(repr, keys))
    for form in (repr(secret), secret.hex(), "\\xee", EXCHANGE._exporter_secret.hex()):
        assert form not in shown


def test_a_key_is_made_again_from_its_seed() -> None:
    assert SignKey.from_seed(SIGN.seed).public == SIGN.public
    assert KemKey.from_seed(DEVICE.seed).public == DEVICE.public
    with pytest.raises(ValueError, match="32 bytes"):
        KemKey.from_seed(bytes(31))


def test_random_bytes_are_not_the_same_twice() -> None:
    assert random_bytes(32) != random_bytes(32)


def test_the_frozen_bytes_of_version_1_are_still_made() -> None:
    assert frozen() == VECTORS


def frozen() -> dict[str, str]:
    blob = blob_key(bytes([7] * 32), sha256(b"model"), 1_000)
    return {
        "sign public": SIGN.public.hex(),
        "fingerprint": fingerprint(SIGN.public),
        "signed": SIGNED.hex(),
        "kem public": DEVICE.public.hex(),
        "enc": EXCHANGE.enc.hex(),
        "exported": EXCHANGE.export(b"test").hex(),
        "sealed message": SEALED.hex(),
        "chunk 258": KEY.seal(258, b"a body", b"a header").hex(),
        "blob chunk 0": blob.seal(0, b"a body", b"a header").hex(),
    }
