"""What was dropped is counted by reason and written down now and then: a real ledger on a disk."""

import logging
from collections import Counter
from contextlib import closing

import pytest

from broker_bridge.errors import PeerError
from server.config import ServerConfig
from server.ledger import Ledger
from server.rejects import Rejects
from tests.fleets import TOPICS

TOPIC = TOPICS.up(0, "ann", "join")


@pytest.fixture
def ledger(home):
    with closing(Ledger(home, ServerConfig(), clock=lambda: 1.79e9)) as made:
        yield made


@pytest.fixture
def rejects(ledger, clock):
    return Rejects(Counter(), ledger, clock=clock)


def drop(rejects, reason, times=1):
    for _ in range(times):
        rejects.count(PeerError(reason, "a sentence about it"), TOPIC)


def written(ledger):
    with ledger.db.reading() as tx:
        return dict(tx.rejects())


def test_each_message_is_counted_under_its_reason_for_all_who_read_the_counts(ledger, clock):
    counts = Counter()
    rejects = Rejects(counts, ledger, clock=clock)
    drop(rejects, "bad_signature", 3)
    drop(rejects, "replay")
    assert counts == {"bad_signature": 3, "replay": 1}


def test_a_flood_of_one_reason_is_logged_ever_more_rarely(rejects, caplog):
    with caplog.at_level(logging.INFO, "midge.server"):
        drop(rejects, "bad_signature", 1000)
        drop(rejects, "replay")
    told = [line for line in caplog.messages if "bad_signature" in line]
    assert [int(line.rpartition(": ")[2].split()[0]) for line in told] == [2**n for n in range(10)]
    assert TOPIC in told[0]
    assert "a sentence about it" in told[0]
    assert len(caplog.messages) == len(told) + 1


def test_reasons_without_number_are_counted_together(ledger, clock):
    counts = Counter()
    rejects = Rejects(counts, ledger, clock=clock)
    for n in range(1000):
        drop(rejects, f"reason-{n}")
    assert len(counts) <= 201
    assert counts["other"] == 800
    assert sum(counts.values()) == 1000


def test_counts_are_written_down_once_a_minute(rejects, ledger, clock):
    drop(rejects, "replay", 2)
    clock.s = 59.0
    rejects.keep_now_and_then()
    assert written(ledger) == {}
    clock.s = 60.0
    rejects.keep_now_and_then()
    assert written(ledger) == {"replay": 2}
    drop(rejects, "replay")
    clock.s = 119.0
    rejects.keep_now_and_then()
    assert written(ledger) == {"replay": 2}
    clock.s = 120.0
    rejects.keep_now_and_then()
    assert written(ledger) == {"replay": 3}


def test_what_was_written_down_is_not_added_twice(rejects, ledger):
    drop(rejects, "replay", 5)
    for _ in range(3):
        rejects.keep()
    assert written(ledger) == {"replay": 5}


def test_what_others_count_is_written_down_too(ledger, clock):
    counts = Counter()
    rejects = Rejects(counts, ledger, clock=clock)
    counts["too_fast"] += 7  # as the coordinator does
    drop(rejects, "replay")
    rejects.keep()
    assert written(ledger) == {"too_fast": 7, "replay": 1}


def test_counting_goes_on_where_it_was_after_a_restart(rejects, ledger, clock):
    drop(rejects, "replay", 5)
    rejects.keep()
    counts = Counter()
    again = Rejects(counts, ledger, clock=clock)
    again.restore()
    assert counts == {"replay": 5}
    again.keep()
    assert written(ledger) == {"replay": 5}
    drop(again, "replay")
    again.keep()
    assert written(ledger) == {"replay": 6}


def test_what_was_dropped_before_the_restore_is_not_lost_by_it(ledger, clock):
    before = Rejects(Counter(), ledger, clock=clock)
    drop(before, "replay", 5)
    before.keep()
    rejects = Rejects(counts := Counter(), ledger, clock=clock)
    drop(rejects, "early")
    rejects.restore()
    rejects.keep()
    assert counts == {"replay": 5, "early": 1}
    assert written(ledger) == {"replay": 5, "early": 1}


def set_read_only(ledger, value):
    with closing(ledger.db._engine.raw_connection()) as connection:
        connection.cursor().execute(f"PRAGMA query_only={value}")


def test_a_database_that_says_no_costs_no_count_and_no_server(rejects, ledger, caplog):
    drop(rejects, "replay", 2)
    set_read_only(ledger, "ON")
    rejects.keep()
    assert "not written down" in caplog.text
    set_read_only(ledger, "OFF")
    assert written(ledger) == {}
    drop(rejects, "replay")
    rejects.keep()
    assert written(ledger) == {"replay": 3}
