"""The signed list of those who were shut out: what it keeps, and what it is not fooled by."""

import json

import msgspec
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import SignKey
from server.fleet.home import create
from server.fleet.roster import Expelled, Roster

WARD = Expelled(device="ward-3", keys=(b"s" * 32, b"k" * 32, b"t" * 32), serials=("a1",), at=5.0)
NONE = Roster(federation="demo")


@pytest.fixture
def home(tmp_path):
    return create(tmp_path / "fleet", federation="demo", hosts=["localhost"], port=1)


def test_a_fleet_from_which_nobody_was_shut_out_has_an_empty_roster(home):
    assert home.roster() == NONE


def test_what_was_written_is_read(home):
    roster = NONE.expelling(WARD, fleet_epoch=2)
    home.set_roster(roster)
    assert home.roster() == roster
    assert (roster.epoch, roster.fleet_epoch, roster.closed) == (1, 2, ("ward-3",))
    assert roster.serials == ("a1",)


def test_a_key_is_known_again_under_whatever_name(home):
    roster = NONE.expelling(WARD, fleet_epoch=2)
    for key in WARD.keys:
        assert roster.has_revoked([b"n" * 32, key])
    assert not roster.has_revoked([b"n" * 32])


def test_the_same_device_twice_is_one(home):
    once = NONE.expelling(WARD, fleet_epoch=2)
    assert once.expelling(WARD, fleet_epoch=3) is once


def test_a_certificate_that_came_to_light_later_is_added(home):
    once = NONE.expelling(WARD, fleet_epoch=2)
    more = msgspec.structs.replace(WARD, serials=("a1", "b2"))
    assert once.expelling(more, fleet_epoch=3).serials == ("a1", "b2")


def test_a_name_that_is_opened_again_ends_the_connections_of_its_former_holder(home):
    shut = NONE.expelling(WARD, fleet_epoch=2)
    opened = shut.opening("ward-3")
    assert (opened.closed, opened.cuts, opened.epoch) == ((), 1, 2)
    assert opened.has_revoked(WARD.keys)
    assert opened.serials == shut.serials
    assert shut.opening("ward-4") is shut


def test_a_roster_that_was_altered_is_refused_in_one_sentence(home):
    home.set_roster(NONE.expelling(WARD, fleet_epoch=2))
    path = home.folder / "keys" / "roster.json"
    good = path.read_bytes()
    for index in range(0, len(good), 7):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
        with pytest.raises(LocalError, match=r"roster\.json is damaged"):
            home.roster()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(LocalError, match=r"roster\.json is damaged"):
            home.roster()


def test_a_roster_of_another_federation_or_signed_by_a_stranger_is_refused(home, tmp_path):
    other = create(tmp_path / "other", federation="other", hosts=["localhost"], port=1)
    other.set_roster(Roster(federation="other"))
    path = home.folder / "keys" / "roster.json"
    path.write_bytes((other.folder / "keys" / "roster.json").read_bytes())
    with pytest.raises(LocalError, match="damaged"):
        home.roster()
    home.set_roster(NONE)
    file = json.loads(path.read_bytes())
    forged = SignKey.from_seed(b"x" * 32).sign("roster demo", msgspec.json.encode(NONE))
    path.write_bytes(msgspec.json.encode(file | {"roster": forged}))
    with pytest.raises(LocalError, match="damaged"):
        home.roster()


def test_a_new_fleet_key_changes_nothing_else(home):
    before = home.keys()
    after = home.next_epoch()
    assert home.keys() == after
    assert (after.fleet_epoch, after.sign_seed) == (before.fleet_epoch + 1, before.sign_seed)
    assert after.fleet_key != before.fleet_key
