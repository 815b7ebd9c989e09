"""The life of a device, command by command: a real mosquitto, a real server, real devices."""

import csv
import json

import pytest

from tests.fleets import MIDGE, TOPICS, wait_until


@pytest.fixture
def fleet(fleets):
    """A fleet whose broker is `midge broker`, and its server."""
    made = fleets()
    log = made.folder / "midge-broker.log"
    made.mosquitto = made._run(log, *MIDGE, "broker", "--dir", str(made.home.folder))
    made.mosquitto.wait_for("mosquitto listens on")
    made.start_server()
    return made


def asked(fleet, *arguments):
    done = fleet.midge("device", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shown(fleet, name):
    return next((row for row in asked(fleet, "list") if row["device"] == name), None)


def is_here(fleet, name):
    row = shown(fleet, name)
    return row and row["status"] == "enrolled" and row.get("presence", {}).get("state") == "ready"


def test_a_device_from_its_first_token_to_its_end(fleet):
    metrics = fleet.listen(TOPICS.metrics, who="server")

    def a_round(number, accepted):
        fleet.start_run(task="wearables", rounds=1, target=accepted, quorum=accepted)
        metrics.wait_for_json(TOPICS.metrics, round=number, state="closed", accepted=accepted)

    # Two at once, with a list of their bundles.
    listed = fleet.folder / "new.csv"
    asked(fleet, "add", "--count", "2", "--name", "ward-{}", "--csv", str(listed))
    names = [row["device"] for row in csv.DictReader(listed.read_text().splitlines())]
    assert len(names) == 2
    here, there = names
    programs = {
        name: fleet.device(name, "--bundle", str(fleet.home.bundle(name))) for name in names
    }
    for name in names:
        wait_until(lambda name=name: is_here(fleet, name), f"{name} is here")
    a_round(1, 2)
    facts = asked(fleet, "show", here)
    assert (facts["status"], facts["rounds"]) == ("enrolled", 1)
    assert facts["last_seen"] is not None

    # New keys without a visit.
    before = facts["fingerprint"]
    asked(fleet, "rotate", here)
    wait_until(lambda: asked(fleet, "show", here)["fingerprint"] != before, "it has new keys")
    wait_until(lambda: is_here(fleet, here), "it is back under them")
    a_round(2, 2)

    # Out for a while, and back.
    asked(fleet, "suspend", there)
    fleet.server.wait_for(f"{there} is suspended")
    a_round(3, 1)
    assert asked(fleet, "show", there)["rounds"] == 2
    asked(fleet, "resume", there)
    wait_until(lambda: is_here(fleet, there), "it is back")
    a_round(4, 2)

    # Gone for good, and its name with another board.
    asked(fleet, "remove", there)
    assert shown(fleet, there) is None
    programs[there].terminate()
    a_round(5, 1)
    again = asked(fleet, "add", there)
    fleet.device("another-board", "--bundle", again["bundle"])
    wait_until(lambda: is_here(fleet, there), "another board of that name")
    a_round(6, 2)
