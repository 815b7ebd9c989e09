"""How tests read from a link: with patience, and without counting on luck."""

from broker_bridge.link.base import Connected, Disconnected, Message

GIVE_UP_S = 20.0


def event_of(link, kind):
    """The next event of `kind`; others are passed over."""
    while not isinstance(event := link.receive(GIVE_UP_S), kind):
        assert event is not None, f"no {kind.__name__} came"
    return event


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
    while got == 0 or got < sent:
        if got == 0:
            link.publish(echo, b"subscribed")
            sent += 1
        event = link.receive(1.0)
        while isinstance(event, Connected | Disconnected):
            event = link.receive(1.0)
        if event is not None:
            link.ack(event)
            got += event.topic == echo  # what was retained comes too, and before
        assert sent < GIVE_UP_S
    return link
