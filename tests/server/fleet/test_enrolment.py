"""Who is let into a fleet, and what the others get."""

import sqlite3
from contextlib import closing

import msgspec
import pytest

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.envelope import KemKey, random_bytes
from broker_bridge.wire.messages import Refused, Welcome
from device_client import identity as identities
from server.fleet.certificates import read_certificate
from server.fleet.enrolment import Registrar, add_device
from server.fleet.home import create
from server.fleet.roster import Expelled
from server.store.database import Database

NOW = 1_790_000_000.0


class Office:
    """A fleet with a clock that a test sets."""

    def __init__(self, folder):
        self.home = create(folder / "fleet", federation="demo", hosts=["localhost"], port=1)
        self.db = Database(self.home.database)
        self.now = NOW
        self.registrar = Registrar(self.home, self.db, lambda: self.now)

    def add(self, name="ward-3", **options):
        path = add_device(
            self.home, self.db, name, broker=self.home.config().broker, now=self.now, **options
        )
        return identities.read_bundle(path)

    def request(self, bundle, keys, **changes):
        contact = identities.contact(bundle)
        return enrolment.request(
            contact, sign=keys.sign, kem=keys.kem, tls_public=keys.tls_public,
            server_kem=self.home.keys().kem.public,
            ephemeral=KemKey.from_seed(random_bytes(32)), software="test",
        )  # fmt: skip

    def ask(self, bundle, keys, *, topic=None):
        payload = messages.encode(self.request(bundle, keys))
        signed = self.registrar.answer(topic or bundle.device, payload)
        contact = identities.contact(bundle)
        key = self.home.keys().sign.public
        return messages.opened(key, "cfg", contact.scope, signed, Welcome | Refused)

    def open_(self, bundle, keys, welcome):
        return enrolment.open_welcome(
            identities.contact(bundle), welcome, kem=keys.kem,
            server_kem=self.home.keys().kem.public,
        )  # fmt: skip

    def rows(self):
        with closing(sqlite3.connect(self.home.database)) as db:
            return "\n".join(db.iterdump())


@pytest.fixture
def office(tmp_path):
    made = Office(tmp_path)
    yield made
    made.db.close()


def test_a_device_with_a_token_becomes_a_member(office):
    bundle, keys = office.add(), identities.new_keys()
    configured = office.open_(bundle, keys, office.ask(bundle, keys))
    assert configured.device == "ward-3"
    assert configured.fleet_key == office.home.keys().fleet_key
    facts = read_certificate(configured.certificate_pem.encode())
    assert facts.name == "ward-3"
    with office.db.reading() as tx:
        row = tx.device("ward-3")
    assert (row.sign_public, row.kem_public, row.tls_public) == (
        keys.sign.public, keys.kem.public, keys.tls_public,
    )  # fmt: skip
    assert row.psk == bytes.fromhex(bundle.token)


def test_the_same_keys_again_get_the_same_answer(office):
    """A lost answer or a power cut: the device asks again, and nothing changes."""
    bundle, keys = office.add(), identities.new_keys()
    first = office.open_(bundle, keys, office.ask(bundle, keys))
    before = office.rows()
    again = office.open_(bundle, keys, office.ask(bundle, keys))
    assert (again.fleet_key, again.fleet_epoch) == (first.fleet_key, first.fleet_epoch)
    assert office.rows() == before


def test_the_same_keys_get_it_also_when_the_token_has_expired_since(office):
    bundle, keys = office.add(hours=1), identities.new_keys()
    office.ask(bundle, keys)
    office.now += 100 * 3600
    assert isinstance(office.ask(bundle, keys), Welcome)


def test_a_used_token_is_refused_to_other_keys(office):
    bundle = office.add()
    office.ask(bundle, identities.new_keys())
    before = office.rows()
    answer = office.ask(bundle, identities.new_keys())
    assert isinstance(answer, Refused)
    assert "used by other keys" in answer.reason
    assert office.rows() == before


def test_an_expired_token_is_refused(office):
    bundle = office.add(hours=1)
    office.now += 3601
    answer = office.ask(bundle, identities.new_keys())
    assert isinstance(answer, Refused)
    assert "midge device add ward-3" in answer.reason
    with office.db.reading() as tx:
        assert tx.device("ward-3") is None


def test_a_new_token_makes_the_old_one_void(office):
    old, new = office.add(), office.add()
    with pytest.raises(PeerError) as caught:
        office.ask(old, identities.new_keys())
    assert caught.value.reason == "bad_seal"
    assert isinstance(office.ask(new, identities.new_keys()), Welcome)


def test_a_wrong_token_gets_no_answer(office):
    bundle = msgspec.structs.replace(office.add(), token=random_bytes(32).hex())
    with pytest.raises(PeerError) as caught:
        office.ask(bundle, identities.new_keys())
    assert caught.value.reason == "bad_seal"


def test_a_token_is_good_for_its_own_name_only(office):
    office.add("ward-4")
    stolen = msgspec.structs.replace(office.add("ward-3"), device="ward-4")
    with pytest.raises(PeerError) as caught:
        office.ask(stolen, identities.new_keys())
    assert caught.value.reason == "bad_seal"


def test_an_enrolment_on_another_devices_topic_gets_no_answer(office):
    office.add("ward-4")
    with pytest.raises(PeerError) as caught:
        office.ask(office.add("ward-3"), identities.new_keys(), topic="ward-4")
    assert caught.value.reason == "other_device"


def test_an_unknown_device_gets_no_answer(office):
    bundle = msgspec.structs.replace(office.add(), device="nobody")
    with pytest.raises(PeerError) as caught:
        office.ask(bundle, identities.new_keys())
    assert caught.value.reason == "unknown_device"


def test_keys_of_another_cannot_be_enrolled_as_ones_own(office):
    """Who holds a token but not the signing key that it names gets nothing."""
    bundle, keys, others = office.add(), identities.new_keys(), identities.new_keys()
    mixed = msgspec.structs.replace(keys, kem_seed=others.kem_seed)
    request = office.request(bundle, mixed)
    wrong = msgspec.structs.replace(request, kem_public=keys.kem.public)
    with pytest.raises(PeerError):
        office.registrar.answer("ward-3", messages.encode(wrong))


def test_an_enrolment_cut_short_is_refused_at_every_length(office):
    payload = messages.encode(office.request(office.add(), identities.new_keys()))
    before = office.rows()
    for length in range(len(payload)):
        with pytest.raises(PeerError):
            office.registrar.answer("ward-3", payload[:length])
    assert office.rows() == before


def test_a_welcome_opens_for_its_device_only(office):
    bundle, keys = office.add(), identities.new_keys()
    welcome = office.ask(bundle, keys)
    with pytest.raises(PeerError):
        office.open_(bundle, identities.new_keys(), welcome)
    other = msgspec.structs.replace(bundle, token=random_bytes(32).hex())
    with pytest.raises(PeerError):
        office.open_(other, keys, welcome)


def test_a_forged_welcome_does_not_verify(office):
    bundle, keys = office.add(), identities.new_keys()
    payload = messages.encode(office.request(bundle, keys))
    signed = bytearray(office.registrar.answer("ward-3", payload))
    for index in (0, 63, 64, len(signed) - 1):
        forged = bytes(signed[:index]) + bytes([signed[index] ^ 1]) + bytes(signed[index + 1 :])
        with pytest.raises(PeerError):
            messages.opened(
                office.home.keys().sign.public, "cfg", "demo/ward-3", forged, Welcome | Refused
            )


def test_a_revoked_device_does_not_get_the_fleet_key_by_asking_again(office):
    bundle, keys = office.add(), identities.new_keys()
    office.ask(bundle, keys)
    with office.db.transaction() as tx:
        tx.set_device_status("ward-3", "revoked")
    answer = office.ask(bundle, keys)
    assert isinstance(answer, Refused)
    assert "was revoked" in answer.reason


def test_keys_on_the_roster_are_refused_by_a_database_that_never_heard_of_it(office):
    """A backup from before the revocation is put back: the keys are known all the same."""
    bundle, keys = office.add(), identities.new_keys()
    public = (keys.sign.public, keys.kem.public, keys.tls_public)
    gone = Expelled(device="ward-9", keys=public, serials=(), at=NOW)
    roster = office.home.roster().expelling(gone, fleet_epoch=2)
    office.home.set_roster(roster)
    answer = office.ask(bundle, keys)
    assert isinstance(answer, Refused)
    assert "was revoked" in answer.reason
    with office.db.reading() as tx:
        assert tx.device("ward-3") is None


def test_a_suspended_device_does_not_get_the_fleet_key_by_asking_again(office):
    bundle, keys = office.add(), identities.new_keys()
    office.ask(bundle, keys)
    with office.db.transaction() as tx:
        tx.set_device_status("ward-3", "suspended")
    answer = office.ask(bundle, keys)
    assert isinstance(answer, Refused)
    assert "is suspended" in answer.reason


def test_whoever_is_to_be_accepted_by_hand_waits_and_hears_how(office):
    bundle, keys = office.add(by_hand=True), identities.new_keys()
    answer = office.ask(bundle, keys)
    assert isinstance(answer, Refused)
    assert keys.fingerprint in answer.reason
    assert "midge device accept ward-3" in answer.reason
    with office.db.transaction() as tx:
        assert tx.device("ward-3").status == "waiting"
        tx.set_device_status("ward-3", "enrolled")
    assert isinstance(office.ask(bundle, keys), Welcome)
    assert isinstance(office.ask(bundle, identities.new_keys()), Refused)


def test_every_certificate_is_noted_and_the_same_keys_get_the_same(office):
    bundle, keys = office.add(), identities.new_keys()
    first = office.open_(bundle, keys, office.ask(bundle, keys))
    again = office.open_(bundle, keys, office.ask(bundle, keys))
    assert again.certificate_pem == first.certificate_pem
    serials = {
        f"{read_certificate(pem.encode()).serial:x}"
        for pem in (bundle.bootstrap_certificate_pem, first.certificate_pem)
    }
    with office.db.reading() as tx:
        assert {each.serial for each in tx.certificates("ward-3")} == serials
        row = tx.device("ward-3")
    facts = read_certificate(first.certificate_pem.encode())
    assert row.certificate_serial == f"{facts.serial:x}"
    assert row.certified_until == facts.expires.timestamp()
    assert row.keys_since == NOW


def test_the_same_keys_get_another_certificate_when_theirs_is_near_its_end(office):
    bundle, keys = office.add(), identities.new_keys()
    first = office.open_(bundle, keys, office.ask(bundle, keys))
    office.now += 800 * 86_400
    later = office.open_(bundle, keys, office.ask(bundle, keys))
    assert later.certificate_pem != first.certificate_pem


def test_a_new_board_with_the_name_of_a_revoked_one_enrols_with_a_new_token(office):
    old, keys = office.add(), identities.new_keys()
    office.ask(old, keys)
    with office.db.transaction() as tx:
        tx.set_device_status("ward-3", "removed")
    new, others = office.add(), identities.new_keys()
    assert isinstance(office.ask(new, others), Welcome)
    with office.db.reading() as tx:
        assert tx.device("ward-3").sign_public == others.sign.public
        assert tx.device("ward-3").status == "enrolled"
    with pytest.raises(PeerError):  # the old card's token is void
        office.ask(old, keys)


def test_a_revoked_name_is_not_added_again_by_mistake(office):
    office.ask(office.add(), identities.new_keys())
    with office.db.transaction() as tx:
        tx.set_device_status("ward-3", "revoked")
    with pytest.raises(LocalError, match="midge device replace ward-3"):
        office.add()


def test_a_device_that_is_enrolled_is_not_added_again(office):
    office.ask(office.add(), identities.new_keys())
    with pytest.raises(LocalError, match="enrolled already"):
        office.add()


@pytest.mark.parametrize("name", ["midge-server", "midge-operator", "midge-broker", "A", "a/b", ""])
def test_names_that_are_not_a_devices_are_refused(office, name):
    with pytest.raises(LocalError):
        office.add(name)
    assert list((office.home.folder / "bundles").iterdir()) == []


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_token_lives_for_a_time_that_makes_sense(office, hours):
    with pytest.raises(LocalError, match="hours"):
        office.add(hours=hours)


def test_the_bundles_certificate_lasts_little_longer_than_its_token(office):
    facts = read_certificate(office.add(hours=30).bootstrap_certificate_pem.encode())
    assert facts.name == "ward-3"
    assert 30 * 3600 <= facts.expires.timestamp() - NOW <= 48 * 3600


def test_a_bundle_is_for_its_owner_alone(office):
    office.add()
    assert office.home.bundle("ward-3").stat().st_mode & 0o077 == 0
