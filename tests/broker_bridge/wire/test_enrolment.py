"""Enrolment: only the holder of the token gets in, under its own name, with its own keys."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Bundle, Contact, Credentials
from broker_bridge.wire.envelope import KemKey, SignKey, exchange_to, seal_message
from broker_bridge.wire.messages import (
    Configured,
    Enrol,
    EnrolSecret,
    FleetKey,
    ServerIdentity,
    Welcome,
)

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "enrolment-v1.json").read_text())

SEEDS = st.binary(min_size=32, max_size=32)
ROOT, SERVER_SIGN, SIGN, OTHER_SIGN = (SignKey.from_seed(bytes([n] * 32)) for n in (1, 2, 3, 4))
SERVER, DEVICE, EPHEMERAL, STRANGER = (KemKey.from_seed(bytes([n] * 32)) for n in (5, 6, 7, 8))
TLS_PUBLIC = bytes([9] * 32)
ANNA = Contact("demo", "anna", token=bytes([10] * 32))
CONFIGURED = Configured(
    device="anna", certificate_pem="PEM", certified_until=2, issued_at=1.5, fleet_epoch=1,
    fleet_key=bytes([11] * 32), former=FleetKey(epoch=0, key=bytes([12] * 32)),
)  # fmt: skip
IDENTITY = ServerIdentity(
    federation="demo", sequence=3, sign_public=SERVER_SIGN.public, kem_public=SERVER.public,
    issued_at=1.5,
)  # fmt: skip


def ask(contact: Contact = ANNA, **changes: Any) -> Enrol:
    known: dict[str, Any] = {
        "sign": SIGN, "kem": DEVICE, "tls_public": TLS_PUBLIC, "server_kem": SERVER.public,
        "ephemeral": EPHEMERAL, "software": "midge 0.1.0",
    }  # fmt: skip
    return enrolment.request(contact, **(known | changes))


def answer(contact: Contact = ANNA) -> Welcome:
    return enrolment.welcome(
        contact, CONFIGURED, device_kem=DEVICE.public, server_kem=SERVER, ephemeral=EPHEMERAL
    )


def refused(contact: Contact, enrol: Enrol) -> str:
    with pytest.raises(PeerError) as caught:
        enrolment.accept(contact, enrol, server_kem=SERVER)
    return caught.value.reason


# ── The request ─────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(SEEDS, SEEDS, SEEDS, SEEDS, SEEDS)
def test_a_request_opens_with_the_token_it_was_made_with(
    token: bytes, sign: bytes, kem: bytes, tls_public: bytes, ephemeral: bytes
) -> None:
    contact = replace(ANNA, token=token)
    enrol = ask(
        contact, sign=SignKey.from_seed(sign), kem=KemKey.from_seed(kem), tls_public=tls_public,
        ephemeral=KemKey.from_seed(ephemeral),
    )  # fmt: skip
    secret = enrolment.accept(contact, enrol, server_kem=SERVER)
    assert secret.sign_public == SignKey.from_seed(sign).public
    assert secret.tls_public == tls_public
    assert (enrol.device, enrol.kem_public) == ("anna", KemKey.from_seed(kem).public)


def test_the_frozen_enrolment_of_version_1_still_works_and_is_still_said() -> None:
    enrol: Enrol = messages.decode(bytes.fromhex(VECTORS["enrol"]), Enrol)
    assert enrolment.accept(ANNA, enrol, server_kem=SERVER).sign_public == SIGN.public
    welcome: Welcome = messages.decode(bytes.fromhex(VECTORS["welcome"]), Welcome)
    opened = enrolment.open_welcome(ANNA, welcome, kem=DEVICE, server_kem=SERVER.public)
    assert opened == CONFIGURED
    identity = bytes.fromhex(VECTORS["server identity"])
    assert enrolment.server_identity(ROOT.public, "demo", identity) == IDENTITY
    assert frozen() == VECTORS


def frozen() -> dict[str, str]:
    return {
        "enrol": messages.encode(ask()).hex(),
        "welcome": messages.encode(answer()).hex(),
        "server identity": enrolment.sign_server_identity(ROOT, IDENTITY).hex(),
    }


def test_a_request_cut_short_at_any_length_is_refused() -> None:
    enrol = ask()
    for n in range(len(enrol.sealed)):
        cut = msgspec.structs.replace(enrol, sealed=enrol.sealed[:n])
        assert refused(ANNA, cut) == "bad_seal"


def test_a_request_under_another_token_name_or_federation_is_refused() -> None:
    enrol = ask()
    assert refused(replace(ANNA, token=bytes(32)), enrol) == "bad_seal"
    assert refused(replace(ANNA, device="ben"), enrol) == "bad_seal"
    assert refused(replace(ANNA, federation="other"), enrol) == "bad_seal"


def test_a_key_put_in_place_of_the_devices_is_refused() -> None:
    swapped = msgspec.structs.replace(ask(), kem_public=STRANGER.public)
    assert refused(ANNA, swapped) == "bad_seal"


@settings(deadline=None)
@given(st.data())
def test_any_bit_flipped_in_a_request_is_refused(data: st.DataObject) -> None:
    enrol = ask()
    field = data.draw(st.sampled_from(["kem_public", "enc", "sealed"]))
    altered = bytearray(getattr(enrol, field))
    bit = data.draw(st.integers(0, 8 * len(altered) - 1))
    altered[bit // 8] ^= 1 << bit % 8
    forged = msgspec.structs.replace(enrol, **{field: bytes(altered)})
    assert refused(ANNA, forged) in {"bad_seal", "bad_key"}


def sealed_by_a_member(secret: EnrolSecret) -> Enrol:
    """What the holder of the token and of DEVICE could send if it lied inside the seal."""
    exchange = exchange_to(
        SERVER.public, ephemeral=EPHEMERAL, sender=DEVICE, info=b"midge v1 enrol", psk=ANNA.token,
        psk_id=ANNA.psk_id,
    )  # fmt: skip
    sealed = seal_message(exchange, b"midge v1 enrol", messages.encode(secret))
    return Enrol(device="anna", kem_public=DEVICE.public, enc=exchange.enc, sealed=sealed)


def test_a_signature_key_that_is_not_the_senders_own_is_refused() -> None:
    proofs = {
        "by another key": OTHER_SIGN.sign("enrol demo/anna", DEVICE.public),
        "over another key": SIGN.sign("enrol demo/anna", STRANGER.public),
        "for another device": SIGN.sign("enrol demo/ben", DEVICE.public),
        "for another use": SIGN.sign("join demo/anna", DEVICE.public),
        "none": b"",
    }
    for proof in proofs.values():
        lie = EnrolSecret(sign_public=SIGN.public, tls_public=TLS_PUBLIC, proof=proof, software="")
        assert refused(ANNA, sealed_by_a_member(lie)) == "bad_signature"


def test_a_server_key_of_low_order_is_refused() -> None:
    with pytest.raises(PeerError) as caught:
        ask(server_kem=bytes(32))
    assert caught.value.reason == "bad_key"


# ── The answer ──────────────────────────────────────────────────────────────────────────


def test_an_answer_opens_for_the_device_it_is_for_and_no_other() -> None:
    welcome = answer()
    assert enrolment.open_welcome(ANNA, welcome, kem=DEVICE, server_kem=SERVER.public) == CONFIGURED
    for contact, kem, server in (
        (ANNA, STRANGER, SERVER),
        (ANNA, DEVICE, STRANGER),
        (replace(ANNA, token=bytes(32)), DEVICE, SERVER),
        (replace(ANNA, device="ben"), DEVICE, SERVER),
    ):
        with pytest.raises(PeerError) as caught:
            enrolment.open_welcome(contact, welcome, kem=kem, server_kem=server.public)
        assert caught.value.reason == "bad_seal"


def test_a_request_sent_back_is_no_answer() -> None:
    enrol = ask()
    echo = Welcome(enc=enrol.enc, sealed=enrol.sealed)
    with pytest.raises(PeerError) as caught:
        enrolment.open_welcome(ANNA, echo, kem=DEVICE, server_kem=SERVER.public)
    assert caught.value.reason == "bad_seal"


# ── The server's identity ───────────────────────────────────────────────────────────────


def test_a_server_identity_needs_the_roots_signature_for_this_federation() -> None:
    signed = enrolment.sign_server_identity(ROOT, IDENTITY)
    assert enrolment.server_identity(ROOT.public, "demo", signed) == IDENTITY
    other = msgspec.structs.replace(IDENTITY, federation="other")
    for public, federation, forged in (
        (SERVER_SIGN.public, "demo", signed),
        (ROOT.public, "other", signed),
        (ROOT.public, "demo", signed[:-1]),
        (ROOT.public, "demo", enrolment.sign_server_identity(SERVER_SIGN, IDENTITY)),
        (ROOT.public, "demo", messages.signed(ROOT, "server-identity", "demo", other)),
    ):
        with pytest.raises(PeerError) as caught:
            enrolment.server_identity(public, federation, forged)
        assert caught.value.reason == "bad_signature"


# ── The bundle ──────────────────────────────────────────────────────────────────────────

BUNDLE = Bundle(
    federation="demo", device="anna", broker_host="localhost", broker_port=8883,
    root_public=ROOT.public.hex(), server_identity="00", token=ANNA.token.hex(),
    token_expires="2026-11-23T12:00+00:00", ca_pem="CA", bootstrap_certificate_pem="CERTIFICATE",
    bootstrap_key_pem="KEY",
)  # fmt: skip


def test_a_bundle_comes_back_as_it_was_written() -> None:
    assert Bundle.decode(BUNDLE.encode()) == BUNDLE


def test_a_bundle_for_midges_own_broker_is_what_older_devices_read() -> None:
    """They refuse a field that they do not know."""
    assert set(json.loads(BUNDLE.encode())) == {
        "midge_bundle", "federation", "device", "broker_host", "broker_port", "root_public",
        "server_identity", "token", "token_expires", "ca_pem", "bootstrap_certificate_pem",
        "bootstrap_key_pem",
    }  # fmt: skip


def test_a_bundle_carries_a_login_for_another_broker_and_shows_none_of_it() -> None:
    login = Credentials(username="anna", password="hush", key_pem="SECRET", client_id="{name}")
    bundle = msgspec.structs.replace(BUNDLE, broker=login)
    assert Bundle.decode(bundle.encode()) == bundle
    shown = repr([bundle, login, bundle.broker])
    assert "hush" not in shown
    assert "SECRET" not in shown
    forged = json.loads(bundle.encode())
    for change in ({"username": 1}, {"surprise": "x"}):
        forged["broker"] = change
        with pytest.raises(PeerError) as caught:
            Bundle.decode(json.dumps(forged).encode())
        assert caught.value.reason == "bad_bundle"


def test_a_bundle_cut_short_at_any_length_is_refused() -> None:
    whole = BUNDLE.encode().rstrip()
    for n in range(len(whole)):
        with pytest.raises(PeerError) as caught:
            Bundle.decode(whole[:n])
        assert caught.value.reason == "bad_bundle"


@pytest.mark.parametrize(
    "change",
    [{"midge_bundle": 2}, {"token": "00"}, {"token": "token"}, {"root_public": ""},
     {"server_identity": "xyz"}, {"surprise": 1}, {"broker_port": "8883"}],
)  # fmt: skip
def test_a_forged_bundle_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PeerError) as caught:
        Bundle.decode(json.dumps(msgspec.to_builtins(BUNDLE) | change).encode())
    assert caught.value.reason == "bad_bundle"


def test_no_secret_is_shown_where_a_bundle_or_contact_is_printed() -> None:
    shown = repr(BUNDLE) + repr(ANNA)
    assert ANNA.token.hex() not in shown
    assert repr(ANNA.token) not in shown
    assert "KEY" not in shown
