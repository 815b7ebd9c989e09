"""How tests read from a link: with patience, and without counting on luck."""

import contextlib
import time

from broker_bridge.link.base import Connected, Disconnected, Message

GIVE_UP_S = 20.0


def event_of(link, kind):
    """The next event of `kind`; others are passed over."""
    while not isinstance(event := link.receive(GIVE_UP_S), kind):
        assert event is not None, f"no {kind.__name__} came"
    return event


def reason_of(link):
    """Why there is no connection, for a link that was opened without waiting for one."""
    with contextlib.closing(link):
        return event_of(link, Disconnected).reason


def cut_and_back(link, cut):
    """Do `cut`, which ends the connection, and wait for the next one.

    A change nobody looked at in time gives way to a later one: on a busy machine, that there
    was no connection for a moment may never be told.
    """
    before = link.connections
    cut()
    until = time.monotonic() + GIVE_UP_S
    while link.connections == before:
        assert time.monotonic() < until, "it never came back"
        time.sleep(0.005)


def messages_until(link, payload, *, ack=True):
    """Every message up to the one with `payload`, which is left out."""
    got = []
    while (message := event_of(link, Message)).payload != payload:
        got.append(message)
        if ack:
            link.ack(message)
    link.ack(message)
    return got


def subscribed(link, *filters, echo):
    """Subscribe, and wait until the broker has done it: a message to `echo` comes back."""
    link.subscribe([*filters, echo])
    sent = got = 0
    until = time.monotonic() + GIVE_UP_S
    while got == 0 or got < sent:
        assert time.monotonic() < until, f"{got} of {sent} echoes came"
        if got == 0:
            link.publish(echo, b"subscribed")
            sent += 1
        event = link.receive(1.0)
        while isinstance(event, Connected | Disconnected):
            event = link.receive(1.0)
        if event is not None:
            link.ack(event)
            got += event.topic == echo  # what was retained comes too, and before
    return link
