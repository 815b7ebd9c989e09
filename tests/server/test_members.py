"""Who belongs to the fleet, as a running server knows it: a real database, real key files."""

from contextlib import closing
from dataclasses import replace

import pytest

from broker_bridge.errors import LocalError, PeerError
from server import members as module
from server.fleet import expulsion
from server.members import Members, check_member
from server.store.database import Database
from server.store.rows import Device
from tests.fleets import enrol_by_hand

NAMES = ("ann", "bob")


@pytest.fixture
def db(home, tmp_path):
    with closing(Database(home.database)) as db:
        for name in NAMES:
            enrol_by_hand(home, db, name, tmp_path / name)
        yield db


@pytest.fixture
def members(db, home, clock):
    made = Members(db, home, clock=clock)
    made.begin()
    return made


def set_status(db, name, status):
    """What `midge device suspend` and `resume` do."""
    with db.transaction() as tx:
        tx.set_device_status(name, status)
        tx.count_fleet_change()


def refusal(members, name):
    with pytest.raises(PeerError) as caught:
        members.member(name)
    return caught.value.reason


# ── Who is in ───────────────────────────────────────────────────────────────────────────


def test_an_enrolled_device_is_a_member_with_the_keys_of_the_database(members, db):
    with db.reading() as tx:
        assert members.member("ann") == tx.device("ann")


def test_a_stranger_is_nobody(members):
    assert refusal(members, "nobody") == "unknown_device"
    with pytest.raises(PeerError, match="'nobody'"):
        members.row("nobody")


@pytest.mark.parametrize("status", ["waiting", "suspended", "revoked", "removed"])
def test_who_is_not_enrolled_is_no_member_and_its_row_is_still_there(members, db, status):
    set_status(db, "ann", status)
    members.look(now=True)
    assert refusal(members, "ann") == "revoked_device"
    assert members.row("ann").status == status
    assert members.member("bob").name == "bob"


def test_a_check_names_the_device_and_what_it_is(db):
    with db.reading() as tx:
        device = tx.device("ann")
    check_member(device)
    with pytest.raises(PeerError, match="'ann' is suspended"):
        check_member(replace(device, status="suspended"))


def test_the_roster_has_the_last_word_over_an_old_database(home, db, clock):
    expulsion.expel(home, db, "ann", now=1.0)
    set_status(db, "ann", "enrolled")  # as a copy from before says
    members = Members(db, home, clock=clock)
    assert members.row("ann").status == "revoked"
    assert refusal(members, "ann") == "revoked_device"


def test_a_revoked_key_is_out_under_any_other_name(home, db, clock):
    with db.reading() as tx:
        ann = tx.device("ann")
    expulsion.expel(home, db, "ann", now=1.0)
    with db.transaction() as tx:
        tx.add_device(replace(ann, name="eve", status="enrolled"))
    assert refusal(Members(db, home, clock=clock), "eve") == "revoked_device"


def test_a_roster_that_cannot_be_believed_lets_no_server_begin(home, db, clock):
    expulsion.expel(home, db, "ann", now=1.0)
    path = home.folder / "keys" / "roster.json"
    path.write_bytes(path.read_bytes().replace(b"demo", b"dame", 1)[:-40])
    with pytest.raises(LocalError, match=r"roster\.json is damaged"):
        Members(db, home, clock=clock)


# ── What became of the fleet ────────────────────────────────────────────────────────────


def test_nothing_is_told_while_nothing_changed(members, clock):
    assert members.look(now=True) is None
    clock.s += 100
    assert members.look() is None


def test_who_was_out_at_the_beginning_is_told_of_to_nobody(home, db, clock):
    set_status(db, "ann", "suspended")
    members = Members(db, home, clock=clock)
    members.begin()
    set_status(db, "bob", "suspended")
    assert members.look(now=True).shut_out == {"bob": "suspended"}


def test_a_change_is_told_once(members, db):
    set_status(db, "ann", "suspended")
    change = members.look(now=True)
    assert (change.shut_out, change.is_anyone_back) == ({"ann": "suspended"}, False)
    assert members.look(now=True) is None


def test_one_who_is_out_in_another_way_is_told_again(members, db):
    set_status(db, "ann", "suspended")
    members.look(now=True)
    set_status(db, "ann", "revoked")
    assert members.look(now=True).shut_out == {"ann": "revoked"}


def test_somebody_who_is_back_is_said_to_be(members, db):
    set_status(db, "ann", "suspended")
    members.look(now=True)
    set_status(db, "ann", "enrolled")
    change = members.look(now=True)
    assert (change.shut_out, change.is_anyone_back) == ({}, True)
    assert members.member("ann").name == "ann"


def test_two_changes_between_two_looks_are_both_told(members, db):
    set_status(db, "ann", "suspended")
    members.look(now=True)
    set_status(db, "ann", "enrolled")
    set_status(db, "bob", "revoked")
    change = members.look(now=True)
    assert (change.shut_out, change.is_anyone_back) == ({"bob": "revoked"}, True)


def test_it_looks_once_a_second_and_at_once_when_asked(members, db, clock):
    set_status(db, "ann", "suspended")
    clock.s += 1.0
    assert members.look() is not None
    set_status(db, "bob", "suspended")
    clock.s += 0.9
    assert members.look() is None
    clock.s += 0.2
    assert members.look().shut_out == {"bob": "suspended"}


def test_it_is_time_for_a_look_a_second_after_the_last_also_after_one_that_failed(
    members, home, db, clock
):
    clock.s += 1.0
    assert members.is_due
    (home.folder / "keys" / "roster.json").write_bytes(b"not a roster")
    set_status(db, "ann", "suspended")
    with pytest.raises(LocalError):
        members.look()
    assert not members.is_due
    clock.s += 1.0
    assert members.is_due


def test_a_revocation_by_a_command_is_seen_with_its_roster(members, home, db):
    assert members.member("ann")
    expulsion.expel(home, db, "ann", now=1.0)
    assert members.look(now=True).shut_out == {"ann": "revoked"}
    set_status(db, "ann", "enrolled")  # nor does the database bring it back from here on
    members.look(now=True)
    assert refusal(members, "ann") == "revoked_device"


# ── What was read a moment ago ──────────────────────────────────────────────────────────


def test_a_row_is_read_again_after_a_minute_or_when_it_is_forgotten(members, db, clock):
    assert members.member("ann")
    with db.transaction() as tx:
        tx.set_device_status("ann", "suspended")  # and nobody said that the fleet changed
    assert members.member("ann")
    members.forget("bob")
    assert members.member("ann")
    members.forget("ann")
    assert refusal(members, "ann") == "revoked_device"
    with db.transaction() as tx:
        tx.set_device_status("ann", "enrolled")
    clock.s += 61
    assert members.member("ann")


def test_a_change_of_the_fleet_forgets_every_row(members, db):
    assert members.member("ann")
    with db.transaction() as tx:
        tx.set_device_status("ann", "suspended")
    set_status(db, "bob", "suspended")
    members.look(now=True)
    assert refusal(members, "ann") == "revoked_device"


def test_a_stranger_who_enrols_is_known_at_once(members, home, db, tmp_path):
    assert refusal(members, "cleo") == "unknown_device"
    enrol_by_hand(home, db, "cleo", tmp_path / "cleo")
    assert members.member("cleo").name == "cleo"


def test_strangers_cannot_fill_the_memory_nor_can_members(members, db, monkeypatch):
    for n in range(1000):
        refusal(members, f"stranger-{n}")
    assert len(members._known) == 0
    monkeypatch.setattr(module, "_KNOWN_MAX", 3)
    with db.reading() as tx:
        ann = tx.device("ann")
    with db.transaction() as tx:
        for n in range(10):
            tx.add_device(replace(ann, name=f"d-{n}", sign_public=bytes([n]) * 32))
    for n in range(10):
        members.member(f"d-{n}")
        assert len(members._known) <= 3
    assert isinstance(members.member("d-0"), Device)


def test_a_roster_that_cannot_be_read_is_read_at_a_later_look(members, home, db, clock):
    path = home.folder / "keys" / "roster.json"
    good = path.read_bytes() if path.exists() else None
    set_status(db, "ann", "suspended")
    path.write_bytes(b"not a roster")
    with pytest.raises(LocalError, match=r"roster\.json"):
        members.look(now=True)
    path.unlink() if good is None else path.write_bytes(good)
    assert members.look(now=True).shut_out == {"ann": "suspended"}
