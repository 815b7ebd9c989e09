"""An owner who answers many messages in a row, and the network, which rests meanwhile."""

import threading

import pytest

from broker_bridge.link.base import Link
from broker_bridge.link.memory_link import MemoryBroker
from tests.broker_bridge.link.reading import GIVE_UP_S, messages_until, subscribed

FED = "midge/v1/demo"
BEFORE_THE_NETWORK_LOOKS_BY_ITSELF_S = 10.0  # which it does every 15 s


@pytest.fixture
def pair(plain_broker, links):
    """The owner, and somebody whom it hears and who hears it."""
    port = plain_broker().port
    owner = subscribed(links(port, "owner"), f"{FED}/to/#", echo=f"{FED}/echo/owner")
    other = subscribed(links(port, "other"), f"{FED}/from/#", echo=f"{FED}/echo/other")
    return owner, other


def said(number):
    return str(number).encode()


def test_what_is_said_together_goes_out_in_order_and_more_than_the_broker_takes_at_once(pair):
    owner, other = pair
    with owner.together():
        for number in range(100):
            owner.publish(f"{FED}/from/owner", said(number))
    owner.publish(f"{FED}/from/owner", b"end")
    assert [m.payload for m in messages_until(other, b"end")] == [said(n) for n in range(100)]


def test_what_is_acknowledged_together_makes_room_for_more(pair):
    owner, other = pair
    for number in range(100):  # five times as many as may be on their way unacknowledged
        other.publish(f"{FED}/to/owner", said(number))
    got = []
    while len(got) < 100:
        event = owner.receive(GIVE_UP_S)
        with owner.together():
            while event is not None:
                got.append(event.payload)
                owner.ack(event)
                event = owner.receive(0)
    assert got == [said(n) for n in range(100)]


def test_an_owner_that_stays_together_is_heard_and_hears_all_the_same(pair):
    """Or the broker would give it up for lost."""
    owner, other = pair
    with owner.together():
        other.publish(f"{FED}/to/owner", b"are you there?")
        asked = owner.receive(GIVE_UP_S)
        assert asked.payload == b"are you there?"
        owner.publish(f"{FED}/from/owner", b"yes")
        assert owner.flush(GIVE_UP_S)
    assert messages_until(other, b"yes") == []


def test_what_is_said_in_a_long_step_does_not_wait_for_its_end(pair):
    owner, other = pair
    with owner.together():
        owner.publish(f"{FED}/from/owner", b"meanwhile")
        event = other.receive(BEFORE_THE_NETWORK_LOOKS_BY_ITSELF_S)
        assert event is not None
        assert event.payload == b"meanwhile"


def test_the_owner_may_wait_for_the_network_while_it_waits_for_something_else(pair):
    """The turn was given twice: RuntimeError, or the network lost it in the middle of its work."""
    owner, other = pair
    with owner.together():
        with owner.apart():
            owner.publish(f"{FED}/from/owner", b"before")
            assert owner.flush(GIVE_UP_S)
        owner.publish(f"{FED}/from/owner", b"after")
    assert [m.payload for m in messages_until(other, b"after")] == [b"before"]


def test_while_the_owner_waits_for_something_else_the_network_goes_on(pair):
    owner, other = pair
    with owner.together():
        owner.publish(f"{FED}/from/owner", b"before")
        with owner.apart():
            assert messages_until(other, b"before") == []
        owner.publish(f"{FED}/from/owner", b"after")
    assert messages_until(other, b"after") == []


def test_a_failure_inside_leaves_the_network_its_turn(pair):
    owner, other = pair
    with pytest.raises(KeyError), owner.together(), owner.apart():
        raise KeyError
    with pytest.raises(KeyError), owner.together():
        raise KeyError
    owner.publish(f"{FED}/from/owner", b"still here")
    assert messages_until(other, b"still here") == []
    with owner.together():  # nor does the owner wait for itself
        pass


def test_apart_alone_changes_nothing(pair):
    owner, other = pair
    with owner.apart():
        owner.publish(f"{FED}/from/owner", b"alone")
    assert messages_until(other, b"alone") == []


def test_a_link_can_be_closed_while_its_owner_is_together(pair):
    owner, _ = pair
    with owner.together():
        closing = threading.Thread(target=owner.close)
        closing.start()
        closing.join(GIVE_UP_S)
        assert not closing.is_alive()


def test_in_memory_each_goes_out_as_it_comes():
    link: Link = MemoryBroker(seed=1).connect("owner")
    with link.together(), link.apart():
        link.publish(f"{FED}/from/owner", b"x")
