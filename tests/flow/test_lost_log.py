"""A server that was killed, and whose database came back without its log."""

import json
from pathlib import Path

from tests.fleets import TOPICS, wait_until


def of_a_round_above_2(message):
    if message.topic != TOPICS.metrics:
        return False
    summary = json.loads(message.payload)
    return summary["round"] > 2 and (summary["state"], summary["accepted"]) == ("closed", 1)


def test_a_server_killed_in_mid_round_says_that_the_log_of_its_database_is_lost_and_goes_on(fleets):
    fleet = fleets(settings="[rounds]\nevaluation_wait_s = 0.1")
    fleet.enrol("ann")
    fleet.start()
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics, TOPICS.round)
    ann = fleet.device("ann")
    listener.wait_for_json(TOPICS.state("ann"), state="ready")
    fleet.start_run(rounds=1, target=1)
    listener.wait_for_json(TOPICS.metrics, round=1, state="closed")
    models = fleet.model_files()
    ann.freeze()
    fleet.start_run(rounds=1, target=1)
    fleet.server.wait_for("round 2 is open")
    fleet.server.kill()
    log = Path(f"{fleet.home.database}-wal")
    assert log.stat().st_size > 0
    log.unlink()
    Path(f"{fleet.home.database}-shm").unlink(missing_ok=True)
    fleet.start_server()
    assert "its log is lost: it knows of no round above 1, and round 2 was opened" in (
        fleet.server.log
    )
    ann.thaw()
    # The log held the end of the first run as well.
    wait_until(lambda: "run" not in fleet.status(), "the first run ends again")
    fleet.start_run(rounds=1, target=1)
    listener.wait(of_a_round_above_2, "a round that ann takes for new")
    assert models.items() <= fleet.model_files().items()
