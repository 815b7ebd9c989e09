"""A member that turned against the rest: what it may pull, and what it may not.

It has keys of its own and the fleet key, and follows the protocol where that serves it.
What it says against the protocol is tried message by message in tests/server/test_service.py.
"""

import numpy as np
import pytest

from broker_bridge.wire.messages import Ack, Busy
from broker_bridge.wire.topics import Topics
from tests.fleets import TOPICS, write_samples

BOUND = 2.0
WEIGHT_MAX = 40


@pytest.fixture
def arena(worlds):
    """A round of three with a bound on what one update may weigh and how far it may reach."""
    world = worlds(rounds={"delta_bound": BOUND, "weight_max": WEIGHT_MAX, "deadline_s": 600.0})
    world.a, world.b, world.evil = (world.hand(n) for n in ("a", "b", "evil"))
    assert world.tell(cmd="start", target=3, quorum=2)["ok"]
    return world


def l2_norm(tensors):
    return float(np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in tensors.values())))


def model_of(world):
    return {name: array.copy() for name, array in world.ledger.model.items()}


def far(device, norm):
    """An update that points one way with all its might."""
    update = device.delta(1.0)
    scale = np.float32(norm / l2_norm(update))
    return {name: (array * scale).astype(np.float32) for name, array in update.items()}


def honest(world, fill=0.001):
    for device in (world.a, world.b):
        assert device.upload(device.delta(fill), examples=10).status == "accepted"


def test_a_hostile_update_pulls_the_model_no_further_than_its_share_of_the_bound(arena):
    before = model_of(arena)
    reached = far(arena.evil, BOUND * 0.999)
    assert arena.evil.upload(reached, examples=WEIGHT_MAX).status == "accepted"
    honest(arena)
    arena.settle()
    moved = {n: arena.ledger.model[n].astype(np.float64) - before[n] for n in before}
    share = WEIGHT_MAX / (WEIGHT_MAX + 20)
    own = l2_norm({n: (a * 1.0).astype(np.float32) for n, a in moved.items()})
    rest = l2_norm(arena.a.delta(0.001))
    assert own <= share * BOUND + (1 - share) * rest + 1e-5


@pytest.mark.parametrize(
    ("norm", "examples"),
    [(BOUND * 1.001, 10), (1e6, 10), (1e30, 10), (1.0, WEIGHT_MAX + 1), (1.0, 2**53), (1.0, 0)],
)
def test_an_update_beyond_the_announced_bounds_counts_for_nothing(arena, norm, examples):
    total = arena.ledger._open.sum.digest()
    assert arena.evil.upload(far(arena.evil, norm), examples=examples).status == "rejected"
    assert arena.ledger._open.sum.digest() == total


def test_a_device_counts_once_in_a_round_however_often_it_uploads(arena):
    assert arena.evil.upload(far(arena.evil, 1.0)).status == "accepted"
    total = arena.ledger._open.sum.digest()
    for _ in range(10):
        (answer,) = arena.evil.join()
        assert isinstance(answer, Ack | Busy), answer
    assert arena.ledger._open.sum.digest() == total
    assert arena.status()["round"]["accepted"] == 1
    honest(arena)
    assert arena.metrics()["accepted"] == 3


def test_a_device_cannot_upload_as_another(arena):
    """It knows everything but the other's keys: the topic, the round, the upload id."""
    init, sealed = arena.evil.seal(arena.a.go(), far(arena.evil, 1.0))
    arena.evil.link.publish(TOPICS.up(0, "a", "init"), arena.evil.sign("init", init))
    for chunk in sealed.chunks:
        arena.evil.link.publish(TOPICS.up(0, "a", "data"), chunk)
    arena.settle()
    assert arena.status()["round"]["accepted"] == 0
    assert arena.rejected()["bad_signature"] == 1
    honest(arena)
    arena.pass_time(601)
    assert arena.metrics()["accepted"] == 2


def test_an_update_for_another_round_or_federation_counts_for_nothing(arena):
    go = arena.evil.go()
    total = arena.ledger._open.sum.digest()
    for changes in ({"round": go.round + 1}, {"announcement": b"x" * 32}):
        init, sealed = arena.evil.seal(go, far(arena.evil, 1.0), **changes)
        arena.evil.commit(init)
        arena.evil.send(sealed)
    other = Topics("other")
    arena.evil.link.publish(other.up(0, "evil", "init"), b"x" * 100)
    arena.settle()
    assert arena.ledger._open.sum.digest() == total
    assert arena.status()["round"]["accepted"] == 0


def test_an_upload_at_a_byte_a_second_holds_up_nobody(arena):
    """It sends a chunk a minute: the others' round ends with them, and it is let go."""
    init, sealed = arena.evil.seal(arena.evil.go(), far(arena.evil, 1.0))
    arena.evil.commit(init)
    honest(arena)
    for index in range(9):
        arena.evil.send(sealed, [index])
        arena.pass_time(65)
    arena.pass_time(60)
    assert (arena.metrics()["state"], arena.metrics()["accepted"]) == ("closed", 2)
    assert not any((arena.home.state / "spool").iterdir())


def test_a_device_that_lies_about_its_loss_changes_no_weight(arena):
    before = model_of(arena)
    lies = {"metrics": {"loss": -1e38}, "train_s": 1e8}
    assert arena.evil.upload(arena.evil.delta(0.001), examples=10, **lies).status == "accepted"
    honest(arena)
    for name, array in arena.ledger.model.items():
        np.testing.assert_allclose(array - before[name], 0.001, atol=1e-6)


def test_a_member_cannot_announce_a_round(arena, tmp_path):
    """It has the fleet key, and may write where it likes on a broker without an ACL."""
    other = arena.agent("other", data=write_samples(tmp_path / "other.npz", seed=1))
    arena.settle()
    before = other._participant.memory
    forged = arena.evil.sign("round", arena.announcement())
    arena.evil.link.publish(TOPICS.round, forged, retain=True)
    arena.settle()
    assert other._participant.memory == before
    assert other.rejects["bad_signature"] == 1
