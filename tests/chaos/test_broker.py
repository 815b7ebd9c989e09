"""A broker that dies, forgets, stays away or drops what it cannot hold: no receipt is revoked."""

import shutil
import socket
import time
from contextlib import closing

import pytest

from broker_bridge.link.local_broker import LocalBroker, find_mosquitto, shipped_file
from server.store.database import Database
from tests.fleets import MIDGE, TOPICS, wait_until

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")

NAMES = ("ann", "ben")


def broker_with(fleet, **options):
    """The shipped broker with other options."""
    lines = shipped_file("mosquitto.conf").read_text().splitlines()
    shutil.copy(shipped_file("mosquitto.acl"), fleet.home.broker)
    kept = [line for line in lines if line.split(" ")[0] not in options]
    assert len(kept) == len(lines) - len(options)
    text = "\n".join(kept + [f"{name} {value}" for name, value in options.items()])
    fleet.broker = LocalBroker(
        fleet.home.broker, port=fleet.port, engine="mosquitto", conf_text=text
    )


def begun(fleet, **command):
    """A fleet in the middle of a round: ann's update has its receipt, ben is frozen."""
    fleet.start()
    fleet.enrol(*NAMES)
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics, TOPICS.srv, TOPICS.round)
    fleet.ann, fleet.ben = (fleet.device(name) for name in NAMES)
    for name in NAMES:
        listener.wait_for_json(TOPICS.state(name), state="ready")
    fleet.ben.freeze()
    fleet.start_run(**({"rounds": 1, "target": 2, "quorum": 2} | command))
    fleet.ann.wait_for("accepted")
    return listener


def receipts(fleet):
    """Of every round so far."""
    with closing(Database(fleet.home.database)) as db, db.reading() as tx:
        numbers = [r.number for r in tx.rounds_of(1)]
        return {(n, r.device, r.upload, r.status) for n in numbers for r in tx.receipts(n)}


def latest_round(fleet):
    with closing(Database(fleet.home.database)) as db, db.reading() as tx:
        return max(r.number for r in tx.rounds_of(1))


def test_a_broker_that_was_killed_and_wiped_gets_everything_back_and_the_round_ends(fleets):
    fleet = fleets()
    begun(fleet)
    before = receipts(fleet)
    fleet.broker.kill()
    (fleet.home.broker / "midge.db").unlink(missing_ok=True)
    fleet.broker.start()
    # Somebody new, who knows nothing but what is retained.
    newcomer = fleet.listen(
        TOPICS.all_states, TOPICS.metrics, TOPICS.srv, TOPICS.round, TOPICS.all_tasks,
        TOPICS.all_models, who="server",
    )  # fmt: skip
    newcomer.wait_for_json(TOPICS.srv, state="online")
    for topic in (TOPICS.round, TOPICS.task(0), TOPICS.model(0)):
        newcomer.wait(lambda message, topic=topic: message.topic == topic, topic)
    fleet.ben.thaw()
    newcomer.wait_for_json(TOPICS.metrics, round=1, state="closed", accepted=2)
    assert before <= receipts(fleet)
    assert fleet.ann.log.count("trained") == 1


def test_a_broker_that_keeps_nothing_over_a_restart(fleets):
    """Mosquitto as it comes: no persistence."""
    fleet = fleets()
    broker_with(fleet, persistence="false")
    begun(fleet)
    before = receipts(fleet)
    fleet.broker.restart()
    fleet.ben.thaw()
    wait_until(lambda: "round 1 closed" in fleet.server.log, "the round ends")
    assert before <= receipts(fleet)
    assert len(fleet.model_files()) == 2


def test_a_broker_that_is_away_for_long_ends_no_round_before_its_time(fleets):
    fleet = fleets()
    begun(fleet)
    fleet.broker.kill()
    fleet.ben.thaw()
    time.sleep(12)  # longer than a device waits for an answer, and several tries to reconnect
    assert fleet.server.is_running
    fleet.broker.start()
    wait_until(lambda: "round 1 closed" in fleet.server.log, "the round ends", 120)
    assert fleet.ann.log.count("trained") == 1


def test_a_broker_that_is_away_past_the_deadline_costs_that_round_and_no_receipt(fleets):
    fleet = fleets()
    begun(fleet, deadline_s=8)
    fleet.broker.kill()
    # On a slow machine the first receipt may be of a later round than the first.
    before, number = receipts(fleet), latest_round(fleet)
    assert before
    wait_until(lambda: f"round {number} abandoned" in fleet.server.log, "the deadline")
    fleet.ben.thaw()
    time.sleep(9)  # another deadline long: no round is begun that nobody hears of
    assert f"round {number + 1}" not in fleet.server.log
    assert receipts(fleet) == before
    fleet.broker.start()
    wait_until(lambda: f"round {number + 1} closed" in fleet.server.log, "the next round", 120)


def test_a_broker_at_its_queue_limit_drops_messages_and_the_round_ends(fleets):
    """It tells the sender "success" all the same."""
    fleet = fleets()
    broker_with(
        fleet, max_queued_messages="2", max_queued_bytes="5000", max_inflight_messages="2",
        max_packet_size="4096",
    )  # fmt: skip
    fleet.start()
    fleet.enrol(*NAMES)
    for name in NAMES:
        fleet.device(name)
    wait_until(lambda: fleet.state_of("ben").get("state") == "ready", "ben is there")
    wait_until(lambda: fleet.state_of("ann").get("state") == "ready", "ann is there")
    fleet.start_run(rounds=1, target=2, quorum=2)
    wait_until(lambda: "round 1 closed: 2 updates" in fleet.server.log, "the round ends", 180)


def test_a_broker_whose_midge_was_killed_is_not_left_behind_to_hold_its_port(fleets):
    fleet = fleets()
    command = (*MIDGE, "broker", "--dir", str(fleet.home.folder), "--port", str(fleet.port))
    first = fleet._run(fleet.folder / "first.log", *command)
    first.wait_for("listens on")
    first.kill()
    held = f"port {fleet.port}"
    wait_until(lambda: not is_held(fleet.port), f"{held} is free")
    second = fleet._run(fleet.folder / "second.log", *command)
    second.wait_for("listens on")


def is_held(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
