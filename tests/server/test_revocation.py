"""A device is revoked while a server runs: what it may still do, and what is left of it."""

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Busy, Go, NeedBlob, Refused, Renew, Report, Welcome
from server.fleet.expulsion import expel
from server.store.database import Database
from tests.fleets import TOPICS

GIVEN = {"ann": 0.01, "ben": -0.02, "eve": 0.05}


@pytest.fixture
def three(worlds):
    """Makes worlds with a round open for three, of whom some gave an update already."""

    def make(*gave):
        world = worlds(rounds={"deadline_s": 60.0, "quorum": 1})
        hands = {name: world.hand(name) for name in GIVEN}
        assert world.tell(cmd="start", task="wearables", rounds=1, target=3)["ok"]
        for name in gave:
            give(hands[name])
        return world, hands

    return make


def give(hand):
    assert hand.upload(hand.delta(GIVEN[hand.name]), examples=7).status == "accepted"


def revoke(world, name, **options):
    """What `midge device revoke` does, in a process of its own."""
    db = Database(world.home.database)
    try:
        return expel(world.home, db, name, now=world.now(), **options)
    finally:
        db.close()


def model(world):
    """The bytes of the model that the round made at its deadline."""
    world.pass_time(61.0)
    assert world.metrics()["state"] == "closed"
    path = world.ledger._models.path(world.ledger.model_version)
    return path.read_bytes()


@pytest.fixture
def without_eve(three):
    """The model of a round that eve was never in."""
    world, _ = three("ann", "ben")
    return model(world)


def receipts(world):
    with world.ledger.db.reading() as tx:
        return {each.device: each.status for each in tx.receipts(tx.highest_round())}


# ── The open round ──────────────────────────────────────────────────────────────────────


def test_an_accepted_update_is_taken_out_to_the_last_bit(three, without_eve):
    world, hands = three("eve", "ann")
    revoke(world, "eve")
    world.pass_time(1.1)
    assert receipts(world) == {"eve": "withdrawn", "ann": "accepted"}
    give(hands["ben"])
    assert world.status()["round"]["accepted"] == 2
    assert model(world) == without_eve
    assert world.metrics()["accepted"] == 2


def test_an_update_that_is_uploading_is_dropped(three, without_eve):
    world, hands = three("ann")
    eve = hands["eve"]
    init, sealed = eve.seal(eve.go(), eve.delta(GIVEN["eve"]))
    eve.commit(init)
    eve.send(sealed, [0])
    revoke(world, "eve")
    world.pass_time(1.1)
    assert eve.send(sealed) == []
    assert world.ledger._spool.uploads() == {
        r.upload for r in _all_receipts(world) if r.device == "ann"
    }
    give(hands["ben"])
    assert model(world) == without_eve


def _all_receipts(world):
    with world.ledger.db.reading() as tx:
        return tx.receipts(tx.highest_round())


def test_a_round_that_closes_before_the_server_has_looked_closes_without_it(three, without_eve):
    world, hands = three("eve", "ann")
    revoke(world, "eve")
    give(hands["ben"])  # the third of three: the round would close now
    assert world.status()["phase"] == "open"
    assert receipts(world)["eve"] == "withdrawn"
    assert model(world) == without_eve


def test_only_the_revoked_device_gave_anything(three):
    world, _ = three("eve")
    revoke(world, "eve")
    world.pass_time(61.0)
    assert world.metrics()["state"] == "abandoned"
    assert "0 updates at the deadline" in world.metrics()["reason"]


@pytest.mark.parametrize("gave", [("eve", "ann"), ("ann", "eve")])
def test_a_server_that_died_before_it_heard_goes_on_without_it(three, without_eve, gave):
    """SIGKILL after the command's last word, and before the server's first."""
    world, hands = three(*gave)
    world.kill_server()
    revoke(world, "eve")
    world.start_server()
    assert receipts(world) == {"eve": "withdrawn", "ann": "accepted"}
    hands["ben"].show("ready")
    give(hands["ben"])
    assert model(world) == without_eve


def test_a_server_that_died_after_it_wrote_that_down_goes_on_without_it(three, without_eve):
    """SIGKILL between the receipt and the sum: the sum is made of what has a receipt."""
    world, hands = three("eve", "ann")
    revoke(world, "eve")
    with world.ledger.db.transaction() as tx:
        tx.withdraw(1, "eve", at=1.0, reason="revoked")
    world.kill_server()
    world.start_server()
    give(hands["ben"])
    assert model(world) == without_eve


def test_an_update_that_cannot_be_read_any_more_is_left_out_all_the_same(three, without_eve):
    world, hands = three("eve", "ann")
    upload = next(r.upload for r in _all_receipts(world) if r.device == "eve")
    for index in range(3):
        world.ledger._spool.forget(upload, index)
    revoke(world, "eve")
    world.pass_time(1.1)
    give(hands["ben"])
    assert model(world) == without_eve


# ── Afterwards ──────────────────────────────────────────────────────────────────────────


def test_a_revoked_device_is_refused_whatever_it_says(three):
    world, hands = three()
    eve = hands["eve"]
    init, sealed = eve.seal(eve.go(), eve.delta())
    revoke(world, "eve")
    world.pass_time(1.1)
    (answer,) = eve.join()
    assert (type(answer), answer.retry_after_s) == (Busy, -1)
    assert "is revoked" in answer.reason
    report = Report(round=1, model_version=1, examples=1, metrics={})
    need = NeedBlob(kind="model", digest=world.announcement().model.digest)
    for kind, message in (("init", init), ("report", report), ("need", need)):
        assert eve.say(kind, eve.sign(kind, message)) == []
    assert eve.send(sealed) == []
    eve.show("ready")
    world.settle()
    assert world.rejected()["revoked_device"] == 5
    assert not world.coordinator.knows("eve")
    renew = Renew(nonce=b"n" * 16, fleet_epoch=1, certified_until=0, software="test")
    signed = world.service._renewals.answer("eve", eve.sign("renew", renew), has_upload=False)
    server = world.ledger.keys.sign.public
    said = messages.opened(server, "cfg", eve.identity.scope, signed, Welcome | Refused)
    assert "was revoked" in said.reason


def test_a_revoked_devices_last_word_is_wiped_from_the_broker(three):
    world, _ = three()
    assert TOPICS.state("eve") in world.broker.retained
    revoke(world, "eve")
    world.pass_time(1.1)
    assert TOPICS.state("eve") not in world.broker.retained
    assert world.status()["devices"]["online"] == 2


def test_the_others_get_a_new_fleet_key_and_the_open_round_goes_on_under_its_own(three):
    world, hands = three("eve")
    before = world.announcement().fleet_epoch
    revoke(world, "eve")
    world.pass_time(1.1)
    assert world.announcement().fleet_epoch == before
    give(hands["ann"])
    assert world.ledger.keys.fleet_epoch == before + 1
    world.pass_time(61.0)
    assert world.tell(cmd="start", task="wearables", rounds=1)["ok"]
    world.settle()
    assert world.announcement().fleet_epoch == before + 1


def test_a_database_from_before_does_not_let_it_in_again(three):
    world, hands = three()
    world.ledger.db.checkpoint()
    backup = world.home.database.read_bytes()
    revoke(world, "eve")
    world.kill_server()
    for path in world.home.state.glob("midge.db*"):
        path.unlink()
    world.home.database.write_bytes(backup)
    world.start_server()
    with world.ledger.db.reading() as tx:
        assert tx.device("eve").status == "enrolled"  # nothing has asked the roster but the loop
    assert isinstance(hands["eve"].join()[-1], Busy)
    assert world.rejected()["revoked_device"] >= 1
    assert isinstance(hands["ann"].join()[-1], Go)


def test_a_device_that_was_never_there_cannot_be_revoked(world):
    with pytest.raises(LocalError, match="no device 'nobody'"):
        revoke(world, "nobody")


# ── Suspended ───────────────────────────────────────────────────────────────────────────


def set_status(world, name, status):
    with world.ledger.db.transaction() as tx:
        tx.set_device_status(name, status)
        tx.count_fleet_change()
    world.pass_time(1.1)


def test_a_suspended_device_is_kept_out_until_it_may_come_back(three):
    world, hands = three("eve")
    set_status(world, "ben", "suspended")
    (answer,) = hands["ben"].join()
    assert (answer.retry_after_s, "is suspended" in answer.reason) == (-1, True)
    assert receipts(world) == {"eve": "accepted"}
    assert world.status()["devices"]["online"] == 2
    set_status(world, "ben", "enrolled")
    assert world.status()["devices"]["online"] == 3  # its retained presence was read again
    assert isinstance(hands["ben"].join()[-1], Go | Busy)


def test_the_upload_of_a_suspended_device_is_refused(three):
    world, hands = three("eve")
    ben = hands["ben"]
    init, sealed = ben.seal(ben.go(), ben.delta())
    ben.commit(init)
    set_status(world, "ben", "suspended")
    (answer,) = ben.listen()
    assert (answer.status, "suspended" in answer.reason) == ("rejected", True)
    assert ben.send(sealed) == []
    assert receipts(world) == {"eve": "accepted", "ben": "rejected"}
