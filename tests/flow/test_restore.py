"""A fleet goes on from a backup, on another machine, with devices that have seen more than it."""

import json
import shutil

from server.cli import main as midge
from server.fleet.home import Home
from tests.fleets import TOPICS, is_refusal, typed

WORDS = "four words nobody guesses"


def closed(message):
    """The summary of a closed round; None for anything else."""
    if message.topic != TOPICS.metrics or not message.payload:
        return None
    said = json.loads(message.payload)
    return said if said["state"] == "closed" else None


def test_a_fleet_goes_on_after_a_restore_from_a_backup_older_than_its_last_round(fleets, tmp_path):
    fleet = fleets().start()
    watching = fleet.listen(TOPICS.metrics)
    (tmp_path / "words").write_text(WORDS)
    words = ("--passphrase-file", str(tmp_path / "words"))
    backup, elsewhere = tmp_path / "fleet.backup", tmp_path / "elsewhere"
    fleet.enrol("ann", "ben")
    for name in ("ann", "ben"):
        fleet.device(name)

    # The backup is made in the middle of a run, while the server works.
    fleet.start_run(task="wearables", rounds=10_000, target=2)
    watching.wait(closed, "a first round")
    done = fleet.midge("backup", str(backup), *words, "--json")
    assert done.returncode == 0, done.stderr
    newest = json.loads(done.stdout)["round"]
    lost = closed(watching.wait(lambda m: (closed(m) or {}).get("round", 0) > newest, "more"))

    # The machine burns down. What is left: the backup, the broker, and devices further on.
    assert fleet.server.terminate() == 0
    burnt = fleet.home.folder
    for folder in ("state", "keys", "ca"):
        shutil.rmtree(burnt / folder)
    is_refusal(typed(midge, "restore", str(backup), str(burnt), *words), "is not empty")
    done = typed(midge, "restore", str(backup), str(elsewhere), *words, "--json")
    assert done.returncode == 0, done.stderr
    above = json.loads(done.stdout)["rounds_above"]

    # The run that was open goes on by itself, in rounds that are new to the devices.
    fleet.home = Home(elsewhere)
    fleet.start_server()
    after = closed(
        watching.wait(lambda m: (closed(m) or {}).get("round", 0) > lost["round"] + 1000, "new")
    )
    assert after["round"] > above
    assert after["model_version"] > above
    assert after["accepted"] == 2
