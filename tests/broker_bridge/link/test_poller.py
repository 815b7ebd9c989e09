"""Many links in one thread, against a real mosquitto. What each promises is in tests/contract."""

import time

import pytest

from broker_bridge.link.base import Connected, Message
from broker_bridge.link.poller import Poller
from broker_bridge.link.session_settings import SessionSettings
from tests.broker_bridge.link.reading import GIVE_UP_S, event_of

MANY = 200


@pytest.fixture
def poller():
    poller = Poller()
    yield poller
    poller.close()


def settings(port, name, **options):
    quick = {"backoff_first_s": 0.05, "backoff_max_s": 0.3} | options
    return SessionSettings(host="127.0.0.1", port=port, client_id=name, **quick)


def turn_until(poller, true):
    """Turn the poller until something is so; return every event that came, by link."""
    events = {}
    give_up = time.monotonic() + GIVE_UP_S
    while not true(events):
        assert time.monotonic() < give_up, events
        for link in poller.turn(0.1):
            while (event := link.receive(0)) is not None:
                if isinstance(event, Message):
                    link.ack(event)
                events.setdefault(link, []).append(event)
    return events


def all_connected(links):
    def true(events):
        return all(isinstance(events.get(each, [None])[-1], Connected) for each in links)

    return true


def test_two_hundred_links_in_one_thread_hear_what_each_is_told(plain_broker, poller):
    port = plain_broker().port
    links = [poller.open(settings(port, f"d{i}")) for i in range(MANY)]
    turn_until(poller, all_connected(links))
    for number, link in enumerate(links):
        link.subscribe([f"to/{number}"])
        link.publish(f"to/{number}", b"%d" % number)

    def heard(events):
        return all(any(isinstance(e, Message) for e in events.get(each, [])) for each in links)

    events = turn_until(poller, heard)
    for number, link in enumerate(links):
        assert {e.payload for e in events[link] if isinstance(e, Message)} == {b"%d" % number}


def test_after_the_broker_was_killed_all_come_back(plain_broker, poller):
    broker = plain_broker()
    links = [poller.open(settings(broker.port, f"d{i}")) for i in range(MANY)]
    turn_until(poller, all_connected(links))
    broker.kill()
    turn_until(poller, lambda events: len(events) == MANY)
    broker.start()
    turn_until(poller, all_connected(links))
    assert all(link.connections == 2 for link in links)


def test_a_link_that_is_cut_leaves_its_will_and_the_others_go_on(plain_broker, links, poller):
    port = plain_broker().port
    watcher = links(port, "watcher")
    watcher.subscribe(["will"])
    mortal = poller.open(settings(port, "mortal", will=Message("will", b"lost", retained=True)))
    other = poller.open(settings(port, "other"))
    turn_until(poller, all_connected([mortal, other]))
    poller.cut(mortal)
    assert event_of(watcher, Message).payload == b"lost"
    assert poller.links == {other}
    other.publish("here", b"")
    turn_until(poller, lambda _: other.room() == other.limits.inflight_max)


def test_a_bug_while_dialling_reaches_whoever_turns(poller):
    poller.open(SessionSettings(host=None, port=1, client_id="a"))
    with pytest.raises(ValueError, match="host"):
        turn_until(poller, lambda _: False)
