"""Renewal: new keys need the old ones, and an answer fits the one request that it is for."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.envelope import KemKey, SignKey
from broker_bridge.wire.messages import Renew, Renewal, RenewKeys, Welcome
from broker_bridge.wire.renewal import NONCE_BYTES, accept_keys, offer_keys
from tests.broker_bridge.wire.test_enrolment import ANNA, CONFIGURED, DEVICE, EPHEMERAL, SERVER

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "renewal-v1.json").read_text())

OLD, SERVER_SIGN, NEW, TLS, STRANGER = (SignKey.from_seed(bytes([n] * 32)) for n in range(1, 6))
NEW_KEM = KemKey.from_seed(bytes([20] * 32))
NONCE = bytes(range(NONCE_BYTES))
OFFER = offer_keys(ANNA.scope, sign=NEW, kem_public=NEW_KEM.public, tls=TLS)


def renew(keys: RenewKeys | None = OFFER) -> Renew:
    return Renew(nonce=NONCE, fleet_epoch=1, certified_until=2, software="midge 0.1.0", keys=keys)


def refused(keys: RenewKeys, scope: str = ANNA.scope) -> str:
    with pytest.raises(PeerError) as caught:
        accept_keys(scope, keys)
    return caught.value.reason


# ── The keys ────────────────────────────────────────────────────────────────────────────

SEEDS = st.binary(min_size=32, max_size=32)


@settings(deadline=None)
@given(SEEDS, SEEDS, SEEDS)
def test_keys_that_are_the_senders_own_are_taken(sign: bytes, kem: bytes, tls: bytes) -> None:
    offer = offer_keys(
        ANNA.scope, sign=SignKey.from_seed(sign), kem_public=KemKey.from_seed(kem).public,
        tls=SignKey.from_seed(tls),
    )  # fmt: skip
    if sign != tls:
        accept_keys(ANNA.scope, offer)


@settings(deadline=None)
@given(st.data())
def test_any_bit_flipped_in_new_keys_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([f.name for f in msgspec.structs.fields(RenewKeys)][1:]))
    altered = bytearray(getattr(OFFER, name))
    bit = data.draw(st.integers(0, 8 * len(altered) - 1))
    altered[bit // 8] ^= 1 << bit % 8
    assert refused(msgspec.structs.replace(OFFER, **{name: bytes(altered)})) == "bad_signature"


def test_keys_of_another_device_federation_or_use_are_refused() -> None:
    assert refused(OFFER, "demo/ben") == "bad_signature"
    assert refused(OFFER, "other/anna") == "bad_signature"
    swapped = msgspec.structs.replace(OFFER, sign_proof=OFFER.tls_proof, tls_proof=OFFER.sign_proof)
    assert refused(swapped) == "bad_signature"


def test_a_key_whose_secret_the_sender_has_not_is_refused() -> None:
    for name in ("sign_public", "tls_public"):
        stolen = msgspec.structs.replace(OFFER, **{name: STRANGER.public})
        assert refused(stolen) == "bad_signature"


def test_one_key_for_two_uses_is_refused() -> None:
    one = offer_keys(ANNA.scope, sign=NEW, kem_public=NEW_KEM.public, tls=NEW)
    assert refused(one) == "same_key"


# ── The request ─────────────────────────────────────────────────────────────────────────


def test_new_keys_that_another_than_the_present_key_signed_are_refused() -> None:
    for forger in (NEW, TLS, STRANGER):
        forged = messages.signed(forger, "renew", ANNA.scope, renew())
        with pytest.raises(PeerError) as caught:
            messages.opened(OLD.public, "renew", ANNA.scope, forged, Renew)
        assert caught.value.reason == "bad_signature"


def test_a_request_cut_short_at_any_length_is_refused() -> None:
    whole = messages.signed(OLD, "renew", ANNA.scope, renew())
    for n in range(len(whole)):
        with pytest.raises(PeerError):
            messages.opened(OLD.public, "renew", ANNA.scope, whole[:n], Renew)


# ── The answer ──────────────────────────────────────────────────────────────────────────


def answer(nonce: bytes = NONCE, kem: KemKey = NEW_KEM) -> Welcome:
    return enrolment.welcome(
        ANNA, CONFIGURED, device_kem=kem.public, server_kem=SERVER, ephemeral=EPHEMERAL, nonce=nonce
    )


def opened(welcome: Welcome, **changes: Any) -> Any:
    known: dict[str, Any] = {"kem": NEW_KEM, "server_kem": SERVER.public, "nonce": NONCE}
    return enrolment.open_welcome(ANNA, welcome, **(known | changes))


def test_an_answer_opens_for_the_request_that_it_is_for() -> None:
    assert opened(answer()) == CONFIGURED


@pytest.mark.parametrize(
    "changes", [{"nonce": bytes(NONCE_BYTES)}, {"nonce": b""}, {"kem": DEVICE}], ids=str
)
def test_an_answer_to_another_request_or_for_other_keys_does_not_open(changes: Any) -> None:
    with pytest.raises(PeerError) as caught:
        opened(answer(), **changes)
    assert caught.value.reason == "bad_seal"


def test_the_answer_to_an_enrolment_is_no_answer_to_a_renewal() -> None:
    with pytest.raises(PeerError):
        opened(answer(nonce=b""))


# ── Frozen ──────────────────────────────────────────────────────────────────────────────


def frozen() -> dict[str, str]:
    request = Renewal(sign_public=OLD.public, certified_until=2, keys=True, spread_s=1.5)
    return {
        "renew": messages.signed(OLD, "renew", ANNA.scope, renew(keys=None)).hex(),
        "renew with keys": messages.signed(OLD, "renew", ANNA.scope, renew()).hex(),
        "renewal": messages.signed(SERVER_SIGN, "cfg", ANNA.scope, request).hex(),
        "welcome": messages.encode(answer()).hex(),
    }


def test_the_frozen_renewal_of_version_1_still_works_and_is_still_said() -> None:
    signed = bytes.fromhex(VECTORS["renew with keys"])
    said: Renew = messages.opened(OLD.public, "renew", ANNA.scope, signed, Renew)
    assert said == renew()
    assert said.keys is not None
    accept_keys(ANNA.scope, said.keys)
    welcome: Welcome = messages.decode(bytes.fromhex(VECTORS["welcome"]), Welcome)
    assert opened(welcome) == CONFIGURED
    assert frozen() == VECTORS
