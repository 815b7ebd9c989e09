"""`midge device revoke` is killed before every file that it opens or renames: all or nothing."""

import os
import shutil
import signal
import sys
from contextlib import closing

import pytest

from server.fleet import expulsion
from server.fleet.home import Home, create
from server.store.database import Database
from tests.fleets import enrol_by_hand

POINTS_LEAST = 8


@pytest.fixture
def before(tmp_path):
    """A fleet with one device in it."""
    home = create(tmp_path / "before", federation="demo", hosts=["localhost"], port=1)
    with closing(Database(home.database)) as db:
        enrol_by_hand(home, db, "ann", tmp_path / "ann")
        db.checkpoint()
    return home.folder


def revoke(home):
    with closing(Database(home.database)) as db:
        expulsion.expel(home, db, "ann", now=1.0)


def killed_at(home, point):
    """Revoke in a process that ends at this point; False when it got to its end before."""
    child = os.fork()
    if child == 0:
        seen = [0]

        def strike(event, args):
            if event == "os.rename" or (event == "open" and str(home.folder) in str(args[0])):
                seen[0] += 1
                if seen[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        try:
            revoke(home)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def is_out(home):
    """Whether the device is out everywhere; that it is out somewhere only is a failure."""
    roster = home.roster()
    with closing(Database(home.database)) as db, db.reading() as tx:
        status = tx.device("ann").status
    listed = home.authority().revocation_number((home.broker / "revoked.pem").read_bytes())
    denied = "user ann\n" in (home.broker / "mosquitto.acl").read_text()
    found = (roster.epoch, status, home.keys().fleet_epoch, listed, denied)
    assert found in [(0, "enrolled", 1, 0, False), (1, "revoked", 2, 1, True)], found
    return roster.epoch == 1


def test_a_command_that_is_killed_anywhere_is_finished_by_whoever_looks_next(before, tmp_path):
    point, outcomes = 1, []
    while True:
        home = Home(shutil.copytree(before, tmp_path / f"at-{point}"))
        if not killed_at(home, point):
            break
        with closing(Database(home.database)) as db:
            expulsion.complete(home, db)
        outcomes.append(is_out(home))
        revoke(home)
        assert is_out(home)
        point += 1
    assert is_out(home)
    assert len(outcomes) >= POINTS_LEAST
    assert outcomes == sorted(outcomes)  # nothing of it, and from one point on all of it
    assert set(outcomes) == {False, True}
