"""Identity, keys and certificate of a device: new ones are on the disk before they are used."""

import msgspec
import pytest

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import PeerError
from broker_bridge.wire import enrolment, messages
from broker_bridge.wire.enrolment import Contact
from broker_bridge.wire.envelope import KemKey, SignKey, random_bytes
from broker_bridge.wire.messages import Configured, Refused, Renew, Renewal, ServerIdentity
from device_client import identity as identities
from device_client.events import RenewalAsked, RenewalRefused, Renewed
from device_client.identity import Identity, Keys
from device_client.journal import Journal
from device_client.outbox import Outbox
from device_client.papers import Papers
from tests.device_client.test_no_room import SmallDisk
from tests.device_client.test_outbox import update

NAME, FEDERATION = "ann", "demo"
SCOPE = f"{FEDERATION}/{NAME}"


class Office:
    """The server's side of the counter, with its own keys and the device's as it knows them."""

    def __init__(self):
        self.root, self.sign = SignKey.from_seed(random_bytes(32)), SignKey.from_seed(b"s" * 32)
        self.kem = KemKey.from_seed(b"k" * 32)
        self.psk = random_bytes(32)

    def enrols(self, keys):
        return Identity(
            federation=FEDERATION, device=NAME, broker_host="localhost", broker_port=1,
            root_public=self.root.public, server_sign=self.sign.public,
            server_kem=self.kem.public, keys=keys, psk=self.psk, fleet_epoch=1,
            fleet_key=b"1" * 32, ca_pem="", certificate_pem="the first", certified_until=100,
        )  # fmt: skip

    def signed(self, message):
        return messages.signed(self.sign, "cfg", SCOPE, message)

    def answer(self, question, keys, **changes):
        """What `keys` of the device open, as an answer to its signed question."""
        asked = read(question, keys)
        configured = Configured(
            **{"device": NAME, "certificate_pem": "", "certified_until": 100, "fleet_epoch": 1,
               "fleet_key": b"1" * 32} | changes
        )  # fmt: skip
        sealed = enrolment.welcome(
            Contact(FEDERATION, NAME, self.psk), configured, device_kem=keys.kem.public,
            server_kem=self.kem, ephemeral=KemKey.from_seed(random_bytes(32)), nonce=asked.nonce,
        )  # fmt: skip
        return self.signed(sealed)

    def identity(self, sequence, *, root=None, seed=b"t" * 32):
        """The server's keys, as the root signs them."""
        new = ServerIdentity(
            federation=FEDERATION, sequence=sequence, sign_public=SignKey.from_seed(seed).public,
            kem_public=self.kem.public, issued_at=0.0,
        )  # fmt: skip
        return enrolment.sign_server_identity(root or self.root, new)


def read(question, keys):
    return messages.opened(keys.sign.public, "renew", SCOPE, question, Renew)


@pytest.fixture
def office():
    return Office()


@pytest.fixture
def disk():
    return SmallDisk()


@pytest.fixture
def papers(tmp_path, office, disk):
    """Of a device that has enrolled just now."""
    keys = identities.pending_keys(tmp_path)
    identities.save(tmp_path, office.enrols(keys))
    return begun(tmp_path, disk)


def begun(folder, disk):
    """What a process begins with that finds this folder."""
    found = Papers(
        identities.load(folder), Journal(folder, disk=disk), Outbox(folder / "outbox", disk=disk),
        random=random_bytes, software="midge test",
    )  # fmt: skip
    found.folder = folder
    return found


def on_disk(papers):
    return identities.load(papers.folder)


def offered(papers):
    """The new keys that wait for the server's word."""
    return identities.offered_keys(papers.folder, papers.identity)


# ── What is newer ───────────────────────────────────────────────────────────────────────


def test_a_new_fleet_key_is_on_the_disk_when_the_device_hears_of_it(papers, office):
    question = papers.question(keys=False, attempt=1)
    answer = office.answer(question, papers.identity.keys, fleet_epoch=2, fleet_key=b"2" * 32)
    assert papers.hear(answer) == [Renewed(frozenset({1, 2}), keys=False)]
    assert on_disk(papers) == papers.identity
    assert papers.identity.fleet_keys == {1: b"1" * 32, 2: b"2" * 32}
    assert not papers.has_other_certificate


def test_a_new_certificate_is_kept_and_known_to_be_another_than_the_links(papers, office):
    question = papers.question(keys=False, attempt=1)
    new = {"certificate_pem": "the second", "certified_until": 200}
    papers.hear(office.answer(question, papers.identity.keys, **new))
    assert papers.has_other_certificate
    assert (on_disk(papers).certificate_pem, on_disk(papers).certified_until) == ("the second", 200)


def test_an_answer_counts_for_one_of_our_last_questions_only(papers, office):
    question = papers.question(keys=False, attempt=1)
    answer = office.answer(question, papers.identity.keys)
    again = begun(papers.folder, papers._journal.disk)  # another life of the process: it asked not
    with pytest.raises(PeerError) as told:
        again.hear(answer)
    assert told.value.reason == "stale_answer"
    for _ in range(8):
        papers.question(keys=False, attempt=1)
    with pytest.raises(PeerError):
        papers.hear(answer)


def test_an_answer_that_comes_twice_changes_nothing_more(papers, office):
    question = papers.question(keys=False, attempt=1)
    answer = office.answer(question, papers.identity.keys, fleet_epoch=2)
    papers.hear(answer)
    after = papers.identity
    papers.hear(answer)
    assert papers.identity == after


def test_an_answer_older_than_the_last_one_does_not_bring_its_certificate_back(papers, office):
    """A broker that kept it could."""
    keys, answers = papers.identity.keys, []
    for number in (200, 300):
        question = papers.question(keys=False, attempt=1)
        new = {"certificate_pem": f"until {number}", "certified_until": number}
        answers.append(office.answer(question, keys, **new))
    papers.hear(answers[1])
    with pytest.raises(PeerError) as told:
        papers.hear(answers[0])
    assert told.value.reason == "stale_answer"
    assert on_disk(papers).certificate_pem == "until 300"


def test_what_the_server_did_not_sign_is_no_answer(papers, office):
    before = on_disk(papers)
    question = papers.question(keys=False, attempt=1)
    office.sign = SignKey.from_seed(random_bytes(32))
    with pytest.raises(PeerError):
        papers.hear(office.answer(question, papers.identity.keys))
    assert on_disk(papers) == papers.identity == before


# ── Keys of our own ─────────────────────────────────────────────────────────────────────


def test_new_keys_are_on_the_disk_before_the_server_hears_of_them(papers):
    before = papers.identity
    assert not papers.are_unsettled
    question = papers.question(keys=True, attempt=1)
    found = msgspec.json.decode((papers.folder / "renewing.json").read_bytes(), type=Keys)
    offer = read(question, before.keys).keys
    assert offer.sign_public == found.sign.public
    assert offer.kem_public == found.kem.public
    assert papers.are_unsettled
    assert papers.identity == on_disk(papers) == before, "they hold when the server says so"


def test_the_same_new_keys_are_offered_until_the_server_answers_also_after_a_power_cut(papers):
    papers.question(keys=True, attempt=1)
    first = offered(papers)
    again = begun(papers.folder, papers._journal.disk)
    assert again.are_unsettled
    again.question(keys=True, attempt=1)
    assert offered(again) == first


def test_every_second_question_is_signed_by_the_new_keys_in_case_they_hold_already(papers):
    papers.question(keys=True, attempt=1)
    assert read(papers.question(keys=True, attempt=2), offered(papers)).keys is None


def test_keys_that_hold_take_the_place_of_the_old_and_what_those_sealed_is_gone(papers, office):
    Outbox(papers.folder / "outbox").put(*update())
    question = papers.question(keys=True, attempt=1)
    new, old = offered(papers), papers.identity.keys
    told = papers.hear(office.answer(rewritten(question, old, new), new))
    assert told == [Renewed(frozenset({1}), keys=True)]
    assert on_disk(papers).keys == papers.identity.keys == new
    assert not papers.are_unsettled
    assert not (papers.folder / "renewing.json").exists()
    assert Outbox(papers.folder / "outbox").find() is None


def rewritten(question, old, new):
    """The server took the new keys: it answers the same question as if they had signed it."""
    return messages.signed(new.sign, "renew", SCOPE, read(question, old))


def test_an_update_stays_in_the_outbox_while_the_keys_stay(papers, office):
    init, sealed = update()
    Outbox(papers.folder / "outbox").put(init, sealed)
    question = papers.question(keys=False, attempt=1)
    papers.hear(office.answer(question, papers.identity.keys, fleet_epoch=2))
    assert Outbox(papers.folder / "outbox").find() == init


def test_new_keys_that_the_card_damaged_make_room_for_others(papers):
    papers.question(keys=True, attempt=1)
    (papers.folder / "renewing.json").write_bytes(b"\xff")
    assert not papers.are_unsettled
    papers.question(keys=True, attempt=1)
    assert papers.are_unsettled


# ── What the server wants ───────────────────────────────────────────────────────────────


def test_the_server_may_ask_for_what_is_still_ours_and_an_old_request_is_none(papers, office):
    mine = papers.identity.keys.sign.public
    asked = Renewal(sign_public=mine, certified_until=100, keys=True, spread_s=9.0)
    assert papers.hear(office.signed(asked)) == [RenewalAsked(keys=True, spread_s=9.0)]
    for other in ({"certified_until": 99}, {"sign_public": b"x" * 32}):
        assert papers.hear(office.signed(msgspec.structs.replace(asked, **other))) == []


def test_a_refusal_is_told_in_the_servers_words(papers, office, caplog):
    told = papers.hear(office.signed(Refused(reason="the device is suspended")))
    assert told == [RenewalRefused("the device is suspended")]
    assert any("the device is suspended" in said for said in caplog.messages)


# ── The server's own keys ───────────────────────────────────────────────────────────────


def test_newer_keys_of_the_server_take_the_place_of_ours_if_the_root_signed_them(papers, office):
    with pytest.raises(PeerError):
        papers.hear_server(office.identity(1, root=SignKey.from_seed(random_bytes(32))))
    assert papers.hear_server(office.identity(1))
    assert on_disk(papers) == papers.identity
    assert papers.identity.server_sequence == 1


def test_the_same_keys_again_and_older_ones_are_no_news_and_nothing_is_written(papers, office):
    papers.hear_server(office.identity(2))
    written = (papers.folder / "identity.json").stat().st_mtime_ns
    assert not papers.hear_server(office.identity(2))
    assert not papers.hear_server(office.identity(1, seed=b"u" * 32))
    assert (papers.folder / "identity.json").stat().st_mtime_ns == written
    with pytest.raises(PeerError, match="two servers"):
        papers.hear_server(office.identity(2, seed=b"u" * 32))


# ── A disk that is full ─────────────────────────────────────────────────────────────────


def test_what_cannot_be_written_down_is_not_used_and_is_taken_when_there_is_room(
    papers, office, disk
):
    before = papers.identity
    question = papers.question(keys=False, attempt=1)
    answer = office.answer(question, before.keys, fleet_epoch=2, fleet_key=b"2" * 32)
    disk.full = "identity.json"
    for hears, news in ((papers.hear, answer), (papers.hear_server, office.identity(1))):
        with pytest.raises(DiskFullError):
            hears(news)
        assert papers.identity == on_disk(papers) == before
    disk.full = "nothing is full"
    assert papers.hear(answer) == [Renewed(frozenset({1, 2}), keys=False)]
    assert papers.hear_server(office.identity(1))
    assert on_disk(papers) == papers.identity


def test_keys_that_cannot_be_written_down_are_not_offered(papers, disk):
    disk.full = "renewing.json"
    with pytest.raises(DiskFullError):
        papers.question(keys=True, attempt=1)
    assert not papers.are_unsettled
