"""The updates of a round, from their chunks into its sum: what is judged, and when."""

import shutil
from contextlib import closing, nullcontext

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import PeerError
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire.weights import encode
from server.aggregation.exact import ExactSum
from server.events import Accept, Accepted, Refused
from tests.fleets import ROOT, World


@pytest.fixture
def world(tmp_path):
    with closing(World(tmp_path)) as made:
        made.a = made.hand("a")
        assert made.tell(cmd="start", target=2)["ok"]
        assert made.a.upload(made.a.delta()).status == "accepted"
        yield made


def test_an_update_that_has_a_receipt_is_not_judged_again(world):
    """Its norm may come out otherwise in the last bit, on another machine or another NumPy."""
    intake = world.ledger._open
    ((upload, incoming),) = intake.uploads.items()
    total = intake.sum.digest()
    intake.announcement = msgspec.structs.replace(intake.announcement, delta_bound=1e-9)
    with pytest.raises(PeerError, match="this round allows 1e-09"):
        intake.add(incoming.init)
    assert intake.sum.digest() == total
    intake._sum_again()
    assert intake.sum.digest() == total
    assert list(intake.uploads) == [upload]


# ── A group ─────────────────────────────────────────────────────────────────────────────

AIRCRAFT = ROOT / "examples" / "aircraft" / "aircraft.task"
WEIGHTS = decode_task(AIRCRAFT.read_bytes())[0].task.weights  # 10 kB: 24 are summed at once


def update_of(seed, *, scale=1e-3, last=None):
    rng = np.random.default_rng(seed)
    tensors = {s.name: rng.normal(0, scale, s.shape).astype(np.float32) for s in WEIGHTS}
    if last is not None:
        tensors[WEIGHTS[-1].name].reshape(-1)[-1] = last
    return encode(tensors)


def sent(hand, update, **changes):
    """An update that is complete in the intake: what is to be accepted."""
    init, sealed = hand.seal(hand.go(), update, **changes)
    hand.commit(init)
    for chunk in sealed.chunks:
        hand.world.ledger.put_chunk(hand.name, chunk)
    return Accept(hand.name, init)


BAD = {
    3: (update_of(3, last=np.nan), "not_finite: "),
    7: (update_of(7, scale=1e3), "out_of_bounds: "),
    12: (b"?" + update_of(12)[1:], "bad_weights: "),
    28: (update_of(28), "bad_seal: "),
}


def test_bad_updates_in_a_group_are_rejected_each_for_its_reason_and_the_others_accepted(worlds):
    world = worlds()
    shutil.copy(AIRCRAFT, world.home.folder / "tasks")
    hands = [world.hand(f"d{number}") for number in range(30)]
    assert world.tell(cmd="start", task="aircraft", target=31, quorum=1)["ok"]
    intake = world.ledger._open
    assert intake.sum.at_once == 24
    updates = [BAD[number][0] if number in BAD else update_of(number) for number in range(30)]
    changes = {number: {"examples": number + 1} for number in range(30)}
    changes[28] = {"tags": bytes(32)}
    group = [sent(hand, updates[n], **changes[n]) for n, hand in enumerate(hands)]

    results = world.ledger.accept(group, at_disk=nullcontext)

    alone = ExactSum(WEIGHTS, fraction_bits=intake.sum.fraction_bits)
    for number in sorted(set(range(30)) - set(BAD)):
        alone.add(updates[number], number + 1)
    assert intake.sum.digest() == alone.digest()
    assert [r for r in results if isinstance(r, Accepted)] == [
        Accepted(tuple(e.init.upload for number, e in enumerate(group) if number not in BAD))
    ]
    refused = {r.upload: r for r in results if isinstance(r, Refused)}
    assert len(refused) == len(BAD)
    for number, (_, begins) in BAD.items():
        said = refused[group[number].init.upload]
        with pytest.raises(PeerError) as caught:  # what is said of it alone, from the disk
            intake.add(group[number].init)
        assert (said.status, said.reason) == ("rejected", f"{caught.value.reason}: {caught.value}")
        assert said.reason.startswith(begins)
    intake._sum_again()
    assert intake.sum.digest() == alone.digest()
    assert intake._opened_bytes == 0
