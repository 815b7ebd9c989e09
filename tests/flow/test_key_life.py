"""Real processes over a real broker: server and devices change their keys, and die on the way."""

import contextlib
import random
import time

from device_client import identity as identities
from server.fleet import rotation
from server.fleet.enrolment import add_device
from server.store.database import Database
from tests.fleets import DEVICE, TOPICS, run, wait_until


def identity_of(fleet, name):
    found = identities.load(fleet.folder / name)
    assert found is not None
    return found


def row(fleet, name):
    with contextlib.closing(Database(fleet.home.database)) as db, db.reading() as tx:
        return tx.device(name)


def agree(fleet, name, before):
    """Whether the device has new keys, and the server the same."""
    keys, known = identity_of(fleet, name).keys, row(fleet, name)
    public = (keys.sign.public, keys.kem.public, keys.tls_public)
    same = public == (known.sign_public, known.kem_public, known.tls_public)
    return same and keys != before and not (fleet.folder / name / "renewing.json").exists()


def a_round(fleet, accepted):
    listener = fleet.listen(TOPICS.metrics)
    fleet.start_run(target=accepted)
    found = listener.wait(
        lambda m: m.topic == TOPICS.metrics and not m.retained and m.payload, "the round ends"
    )
    assert b'"state":"closed"' in found.payload


def test_server_and_device_change_all_their_keys_while_they_run(fleet):
    fleet.enrol("ann")
    with contextlib.closing(Database(fleet.home.database)) as db:
        broker = fleet.home.config().broker
        bundle = add_device(fleet.home, db, "late", broker=broker, now=time.time())
    ann = fleet.device("ann")
    ann.wait_for("connected to the broker")
    before = identity_of(fleet, "ann")

    root = str(fleet.home.folder / "offline" / "root.json")
    assert fleet.midge("keys", "rotate", "--root", root).returncode == 0
    ann.wait_for("the server has new keys, number 2")
    assert fleet.midge("device", "rotate", "ann").returncode == 0
    ann.wait_for("new keys")
    wait_until(lambda: agree(fleet, "ann", before.keys), "both have the new keys")
    wait_until(lambda: ann.log.count("connected to the broker") >= 2, "it uses its certificate")
    fleet.home.next_epoch()
    a_round(fleet, 1)
    wait_until(lambda: identity_of(fleet, "ann").fleet_epoch == 2, "it has the new fleet key")
    after = identity_of(fleet, "ann")
    assert after.certificate_pem != before.certificate_pem
    assert after.server_sequence == 2

    # A bundle from before the server's keys changed still lets its device in.
    done = run(*DEVICE, "enrol", str(bundle), "--dir", str(fleet.folder / "late"))
    assert done.returncode == 0, done.stderr
    assert identity_of(fleet, "late").server_sign == fleet.home.keys().sign.public


def test_a_device_and_a_server_that_are_killed_while_keys_change_find_each_other(fleet):
    fleet.enrol("ann")
    before, draw = identity_of(fleet, "ann").keys, random.Random(5)
    with contextlib.closing(Database(fleet.home.database)) as db, db.transaction() as tx:
        tx.set_device_wanted("ann", "rotate")
        tx.count_fleet_change()
    ann = fleet.device("ann")
    for _ in range(2):
        ann.wait_for("connected to the broker")
        time.sleep(draw.uniform(0.0, 0.4))
        fleet.server.kill()
        ann.kill()
        fleet.start_server()
        ann = fleet.device("ann")
    wait_until(lambda: agree(fleet, "ann", before), "both have the new keys")
    a_round(fleet, 1)


def test_renewed_certificates_let_everybody_in(fleet):
    fleet.enrol("ann")
    assert fleet.midge("keys", "renew-certificates").returncode == 0
    fleet.server.terminate()
    fleet.broker.stop()
    fleet.broker.start()
    fleet.start_server()
    fleet.device("ann")
    a_round(fleet, 1)
    found = {name: facts for name, _, facts in rotation.certificates(fleet.home)}
    assert found["broker"].hosts == ("localhost", "127.0.0.1")
