"""What one connection teaches the next, without a broker and without waiting."""

from dataclasses import replace

import pytest

from broker_bridge.link.attempts import Attempts
from broker_bridge.link.failures import Failure
from broker_bridge.link.session_settings import SessionSettings

LOST = Failure("the connection was lost")
UNHEARD = Failure("hung up without a word", try_older_mqtt=True)


def attempts(**settings):
    """Of a session whose draws all come out at their longest."""
    known = {"host": "h", "port": 1, "client_id": "c", "random": lambda: 1.0}
    return Attempts(SessionSettings(**known | settings))


def ended(these, failure=LOST, *, greeted=False, lasted_s=0.0, carried_bytes=0):
    return these.ended(failure, greeted=greeted, lasted_s=lasted_s, carried_bytes=carried_bytes)


def test_each_wait_is_twice_as_long_up_to_the_longest():
    these = attempts(backoff_first_s=1.0, backoff_max_s=5.0)
    assert [ended(these) for _ in range(5)] == [(LOST, s) for s in (1.0, 2.0, 4.0, 5.0, 5.0)]


def test_half_of_each_wait_is_drawn():
    assert ended(attempts(backoff_first_s=8.0, random=lambda: 0.0)) == (LOST, 4.0)


@pytest.mark.parametrize("success", [{"lasted_s": 4.1}, {"carried_bytes": 16 * 1024}])
def test_after_a_connection_that_was_of_use_waits_begin_anew(success):
    these = attempts(backoff_first_s=1.0)
    assert [ended(these)[1] for _ in range(2)] == [1.0, 2.0]
    assert ended(these, greeted=True, **success) == (LOST, 1.0)


def test_a_long_time_without_an_answer_is_no_success():
    these = attempts(backoff_first_s=1.0)
    assert [ended(these, lasted_s=1000.0)[1] for _ in range(3)] == [1.0, 2.0, 4.0]


def test_whoever_is_thrown_out_again_and_again_is_told_of_a_copy():
    these = attempts()
    told = [ended(these, greeted=True)[0].reason for _ in range(4)]
    assert told[:2] == [LOST.reason] * 2
    assert all("a copy of this card or folder" in each for each in told[2:])
    assert ended(these, greeted=True, lasted_s=1e6)[0] == LOST


def test_a_broker_that_knows_no_mqtt_5_is_asked_again_at_once_and_from_then_on_in_3_1_1():
    these = attempts()
    these.version_refused()
    assert ended(these, UNHEARD) == (None, 0.0)
    assert these.protocol == "3.1.1"
    assert ended(these, greeted=True) == (LOST, 1.0)
    assert these.protocol == "3.1.1"


def test_mqtt_5_is_tried_again_where_it_was_not_refused_in_so_many_words():
    these = attempts()
    assert ended(these, UNHEARD) == (None, 0.0)
    assert ended(these, greeted=True) == (LOST, 1.0)
    assert these.protocol == "5.0"


def test_a_broker_that_answers_to_neither_is_waited_for():
    these = attempts()
    told = [ended(these, UNHEARD) for _ in range(4)]
    assert told == [(None, 0.0), (UNHEARD, 1.0), (None, 0.0), (UNHEARD, 2.0)]


@pytest.mark.parametrize("protocol", ["5.0", "3.1.1"])
def test_a_protocol_that_was_chosen_is_kept_to(protocol):
    these = attempts(protocol=protocol)
    assert ended(these, UNHEARD) == (UNHEARD, 1.0)
    these.version_refused()
    assert ended(these, replace(LOST, try_older_mqtt=True), greeted=True)[0] is not None
    assert these.protocol == protocol
