"""The updates of a round, from their chunks into its sum: what is judged, and when."""

from contextlib import closing

import msgspec
import pytest

from broker_bridge.errors import PeerError
from tests.fleets import World


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
