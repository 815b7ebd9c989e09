"""What every Link does, on every engine. Read `broker_bridge/link/base.py` beside it."""

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Disconnected, Link, Message
from tests.conformance.capabilities import CAPABILITIES
from tests.contract import engines

GIVE_UP_S = 20.0
QUIET_S = 0.25  # how long nothing must come before we believe that nothing comes

# The same in the table of docs/brokers.md, where it is also shown that it is so.
IOTCORE_LACKS = {"retained again": f"iotcore: {CAPABILITIES['again'].lacks['iotcore']}"}


@pytest.fixture(
    scope="module",
    params=["memory", "mosquitto-5.0", "mosquitto-3.1.1", "polled", "nats", "iotcore"],
)
def running(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broker")
    if request.param == "memory":
        yield lambda: engines.MemoryEngine()
    elif request.param == "nats":
        with engines.nats(folder) as port:
            yield lambda: engines.PahoEngine(port, protocol="auto", lacks={})
    elif request.param == "iotcore":
        pytest.importorskip("iotcore")
        with engines.broker(folder, "iotcore") as port:
            yield lambda: engines.PahoEngine(port, protocol="auto", lacks=IOTCORE_LACKS)
    elif request.param == "polled":
        with engines.broker(folder, "mosquitto") as port:
            yield lambda: engines.PolledEngine(port)
    else:
        with engines.broker(folder, "mosquitto") as port:
            protocol = request.param.removeprefix("mosquitto-")
            yield lambda: engines.PahoEngine(port, protocol=protocol, lacks={})


@pytest.fixture
def engine(running):
    engine = running()
    yield engine
    engine.close()


def connected(engine, name=None, **options):
    """A link whose first event has been seen."""
    link = engine.connect(name or engine.unique(), **options)
    assert isinstance(link.receive(GIVE_UP_S), Connected)
    return link


def listening(engine, *filters, **options):
    """A link that is subscribed: a message to itself has come back."""
    link = connected(engine, **options)
    echo = engine.unique()
    link.subscribe([*filters, echo])
    settle(link, echo)
    return link


def settle(link, echo):
    """Wait until a message to ourselves comes back, and for every copy we had to send."""
    sent = got = 0
    while got == 0 or got < sent:
        if got == 0:
            link.publish(echo, b"echo")
            sent += 1
        event = link.receive(1.0)
        if isinstance(event, Message):
            assert event.topic == echo
            link.ack(event)
            got += 1
        assert sent < GIVE_UP_S


def drain(link, quiet_s=QUIET_S):
    """Every message until it is quiet, acknowledged."""
    got = []
    while isinstance(event := link.receive(quiet_s), Message):
        link.ack(event)
        got.append(event)
    assert event is None, event
    return got


def take(link, count, *, ack=True):
    """The next `count` messages; changes of the connection are passed over."""
    got = []
    while len(got) < count:
        event = link.receive(GIVE_UP_S)
        assert event is not None, f"only {len(got)} of {count} messages came: {got}"
        if isinstance(event, Message):
            got.append(event)
            if ack:
                link.ack(event)
    return got


def take_without_copies(link, count, before=()):
    """Payloads until there are `count` different ones, those of `before` among them.

    A broker may send again what was not acknowledged for a while, as a slow machine's is not.
    """
    got = dict.fromkeys(before)
    while len(got) < count:
        (message,) = take(link, 1)
        got.setdefault(message.payload)
    return list(got)


def topics_of(link, count):
    """Those of the next `count` messages, and of what comes behind them."""
    return {message.topic for message in [*take(link, count), *drain(link)]}


def wait_until(link, kind):
    while not isinstance(event := link.receive(GIVE_UP_S), kind):
        assert event is not None, f"no {kind.__name__} came"
    return event


def test_it_is_a_link(engine):
    assert isinstance(engine.connect(engine.unique()), Link)


def test_the_first_event_says_connected_and_a_new_name_has_no_session(engine):
    link = engine.connect(engine.unique())
    event = link.receive(GIVE_UP_S)
    assert isinstance(event, Connected)
    assert not event.resumed
    assert event.limits == link.limits
    assert link.limits.packet_bytes_max >= LIMITS.packet_bytes_min
    assert 1 <= link.limits.inflight_max <= LIMITS.inflight_max


@pytest.mark.parametrize(
    "payload", [b"", bytes(range(256)), b"x" * 50_000], ids=["empty", "all-bytes", "large"]
)
def test_a_publish_arrives_byte_for_byte(engine, payload):
    topic = engine.unique()
    reader, writer = listening(engine, topic), connected(engine)
    writer.publish(topic, payload)
    (message,) = take(reader, 1)
    assert (message.topic, message.payload, message.retained) == (topic, payload, False)


def test_messages_of_one_publisher_keep_their_order_while_the_line_is_good(engine):
    topic = engine.unique()
    reader, writer = listening(engine, topic), connected(engine)
    for i in range(200):
        writer.publish(topic, b"%d" % i)
    assert take_without_copies(reader, 200) == [b"%d" % i for i in range(200)]


def test_a_plus_stands_for_one_level_and_a_hash_for_the_rest(engine):
    root = engine.unique()
    plus, rest = listening(engine, f"{root}/+/x"), listening(engine, f"{root}/a/#")
    writer = connected(engine)
    for tail in ("a/x", "b/x", "a/b/x", "a", "c"):
        writer.publish(f"{root}/{tail}", b"")
    assert writer.flush(GIVE_UP_S)
    assert topics_of(plus, 2) == {f"{root}/a/x", f"{root}/b/x"}
    assert topics_of(rest, 3) == {f"{root}/a/x", f"{root}/a/b/x", f"{root}/a"}


def test_a_late_subscriber_gets_the_last_retained_message_marked_as_such(engine):
    topic = engine.unique()
    writer = connected(engine)
    writer.publish(topic, b"old", retain=True)
    writer.publish(topic, b"new", retain=True)
    assert writer.flush(GIVE_UP_S)
    late = connected(engine)
    late.subscribe([topic])
    (message,) = take(late, 1)
    assert (message.payload, message.retained) == (b"new", True)


def test_subscribing_again_sends_the_retained_message_again(engine):
    engine.needs("retained again")
    topic = engine.unique()
    link = connected(engine)
    link.publish(topic, b"kept", retain=True)
    assert link.flush(GIVE_UP_S)
    for _ in range(2):
        link.subscribe([topic])
        assert [m.payload for m in take(link, 1)] == [b"kept"]


def test_an_empty_retained_message_clears_the_topic(engine):
    topic = engine.unique()
    writer = connected(engine)
    writer.publish(topic, b"something", retain=True)
    writer.publish(topic, b"", retain=True)
    assert writer.flush(GIVE_UP_S)
    late = listening(engine, topic)
    assert drain(late) == []


def test_after_unsubscribe_nothing_comes(engine):
    topic, other = engine.unique(), engine.unique()
    reader, writer = listening(engine, topic, other), connected(engine)
    reader.unsubscribe([topic])
    settled = engine.unique()
    reader.subscribe([settled])
    settle(reader, settled)
    writer.publish(topic, b"no")
    writer.publish(other, b"yes")
    assert [m.payload for m in take(reader, 1)] == [b"yes"]
    assert drain(reader) == []


def test_a_session_keeps_what_came_while_its_owner_was_away(engine):
    name, topic = engine.unique(), engine.unique()
    listening(engine, topic, name=name).close()
    writer = connected(engine)
    for i in range(50):
        writer.publish(topic, b"%d" % i)
    assert writer.flush(GIVE_UP_S)
    back = engine.connect(name)
    event = back.receive(GIVE_UP_S)
    assert isinstance(event, Connected)
    assert event.resumed
    assert set(take_without_copies(back, 50)) == {b"%d" % i for i in range(50)}


def test_a_client_without_a_session_leaves_nothing_behind(engine):
    name, topic = engine.unique(), engine.unique()
    listening(engine, topic, name=name, session_s=0).close()
    writer = connected(engine)
    writer.publish(topic, b"unheard")
    assert writer.flush(GIVE_UP_S)
    back = engine.connect(name, session_s=0)
    assert back.receive(GIVE_UP_S) == Connected(back.limits, resumed=False)
    assert drain(back) == []


def test_an_unacknowledged_message_comes_again_on_the_next_connection(engine):
    topic = engine.unique()
    reader, writer = listening(engine, topic), connected(engine)
    writer.publish(topic, b"precious")
    take(reader, 1, ack=False)
    engine.drop(reader)
    wait_until(reader, Connected)
    assert [m.payload for m in take(reader, 1)] == [b"precious"]


def test_an_acknowledged_message_does_not_come_again(engine):
    name, topic = engine.unique(), engine.unique()
    reader, writer = listening(engine, topic, name=name), connected(engine)
    writer.publish(topic, b"done")
    take(reader, 1)
    reader.flush(5.0)
    drain(reader)  # the acknowledgement is on its way before the goodbye
    reader.close()
    back = connected(engine, name)
    assert drain(back) == []


def test_an_acknowledgement_from_an_earlier_connection_does_no_harm(engine):
    topic = engine.unique()
    reader, writer = listening(engine, topic), connected(engine)
    writer.publish(topic, b"first")
    (old,) = take(reader, 1, ack=False)
    engine.drop(reader)
    wait_until(reader, Connected)
    reader.ack(old)
    writer.publish(topic, b"second")
    assert set(take_without_copies(reader, 2)) == {b"first", b"second"}
    reader.ack(old)
    writer.publish(topic, b"third")
    assert [m.payload for m in take(reader, 1)] == [b"third"]


def test_the_will_of_a_client_that_vanishes_is_published_and_retained(engine):
    topic = engine.unique()
    watcher = listening(engine, topic)
    mortal = connected(engine, will=Message(topic, b"lost", retained=True))
    engine.drop(mortal, stay_away=True)
    assert [m.payload for m in take(watcher, 1)] == [b"lost"]
    late = connected(engine)
    late.subscribe([topic])
    (message,) = take(late, 1)
    assert (message.payload, message.retained) == (b"lost", True)


def test_the_will_of_a_client_that_says_goodbye_is_not_published(engine):
    topic = engine.unique()
    watcher = listening(engine, topic)
    connected(engine, will=Message(topic, b"lost")).close()
    assert drain(watcher) == []


def test_a_lost_connection_is_told_and_mended_with_subscriptions_and_queue(engine):
    topic, answer = engine.unique(), engine.unique()
    link, other = listening(engine, topic), listening(engine, answer)
    engine.drop(link, stay_away=True)  # or it might be back before we have looked
    link.publish(answer, b"written while away")
    assert isinstance(wait_until(link, Disconnected).reason, str)
    engine.let_back(link)
    wait_until(link, Connected)
    assert [m.payload for m in take(other, 1)] == [b"written while away"]
    other.publish(topic, b"still there?")
    assert [m.payload for m in take(link, 1)] == [b"still there?"]


def test_a_subscription_made_while_away_holds_after_the_reconnect(engine):
    topic = engine.unique()
    link, writer = connected(engine), connected(engine)
    engine.drop(link, stay_away=True)
    wait_until(link, Disconnected)
    link.subscribe([topic])
    engine.let_back(link)
    wait_until(link, Connected)
    echo = engine.unique()
    link.subscribe([echo])
    settle(link, echo)
    writer.publish(topic, b"heard")
    assert [m.payload for m in take(link, 1)] == [b"heard"]


def test_flush_waits_for_the_broker_and_gives_the_room_back(engine):
    link = connected(engine)
    assert link.room() == link.limits.inflight_max
    for _ in range(100):
        link.publish(engine.unique(), b"x" * 1000)
    assert link.flush(GIVE_UP_S)
    assert link.room() == link.limits.inflight_max


def test_what_is_published_together_goes_out_at_its_end(engine):
    heard = listening(engine, "together/#")
    link = connected(engine)
    with link.together():
        for number in range(3):
            link.publish(f"together/{number}", b"%d" % number)
    assert take_without_copies(heard, 3) == [b"0", b"1", b"2"]


def test_while_much_is_done_together_the_network_goes_on_and_so_does_a_flush(engine):
    heard = listening(engine, "many/#")
    link = connected(engine)
    with link.together():
        for number in range(40):
            link.publish(f"many/{number}", b"%d" % number)
        early = take_without_copies(heard, 10)
        assert link.flush(GIVE_UP_S)
    all_of_them = take_without_copies(heard, 40, before=early)
    assert set(all_of_them) == {b"%d" % number for number in range(40)}


def test_many_small_and_large_messages_at_once_come_whole_and_in_order(engine):
    """Whatever the pieces are in which they are written and read."""
    heard = listening(engine, "sizes")
    link = connected(engine)
    sizes = [0, *[1, 5_000, 3, 60_000, 17, 2] * 9]
    payloads = [bytes([number]) * size for number, size in enumerate(sizes)]
    with link.together():
        for each in payloads:
            while not link.room():
                link.flush(0.01)
            link.publish("sizes", each)
    assert take_without_copies(heard, len(payloads)) == payloads


def test_without_a_connection_there_is_no_room_and_flush_says_so(engine):
    link = connected(engine)
    engine.drop(link, stay_away=True)
    wait_until(link, Disconnected)
    link.publish(engine.unique(), b"waits")
    assert link.room() == 0
    assert not link.flush(0.1)


def test_a_packet_larger_than_the_broker_takes_is_refused_and_the_link_lives_on(engine):
    topic = engine.unique()
    link = listening(engine, topic)
    with pytest.raises(LinkError, match="smaller chunks"):
        link.publish(topic, bytes(link.limits.packet_bytes_max))
    link.publish(topic, b"small")
    assert [m.payload for m in take(link, 1)] == [b"small"]


def test_the_largest_packet_that_is_allowed_goes_through(engine):
    topic = engine.unique()
    link = listening(engine, topic)
    payload = bytes(link.limits.packet_bytes_max - len(topic) - 16)
    link.publish(topic, payload)
    assert [m.payload for m in take(link, 1)] == [payload]


def test_a_full_send_queue_refuses_instead_of_growing(engine):
    link = connected(engine)
    engine.drop(link, stay_away=True)
    wait_until(link, Disconnected)
    for _ in range(LIMITS.send_queue_messages_max):
        link.publish("a", b"")
    with pytest.raises(LinkError, match="flush"):
        link.publish("a", b"")


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b"])
def test_a_topic_that_no_broker_takes_is_a_bug_of_the_caller(engine, topic):
    with pytest.raises(ValueError, match="not a topic"):
        connected(engine).publish(topic, b"")


@pytest.mark.parametrize("wrong", ["", "a#", "a/#/b", "a+/b", "++", "a\0b"])
def test_a_filter_that_no_broker_takes_is_a_bug_of_the_caller(engine, wrong):
    with pytest.raises(ValueError, match="not a filter"):
        connected(engine).subscribe([wrong])


def test_wake_ends_a_receive_early(engine):
    link = connected(engine)
    link.wake()
    assert link.receive(GIVE_UP_S) is None


def test_a_closed_link_takes_no_publish_and_may_be_closed_again(engine):
    link = connected(engine)
    link.close()
    link.close()
    with pytest.raises(LinkError, match="closed"):
        link.publish("a", b"")


def test_what_was_published_before_close_is_sent(engine):
    topic = engine.unique()
    reader, writer = listening(engine, topic), connected(engine)
    for i in range(100):
        writer.publish(topic, b"%d" % i)
    writer.close()
    assert len(take_without_copies(reader, 100)) == 100


def test_a_second_client_with_the_same_name_takes_over(engine):
    name, topic = engine.unique(), engine.unique()
    first = listening(engine, topic, name=name)
    engine.drop(first, stay_away=True)
    second = engine.connect(name)
    assert wait_until(second, Connected).resumed
    second.publish(topic, b"mine now")
    while take(second, 1)[0].payload != b"mine now":
        pass  # what the first had not acknowledged in time comes again


def test_bytes_are_counted_in_both_directions(engine):
    topic = engine.unique()
    link = listening(engine, topic)
    sent, received = link.bytes_sent, link.bytes_received
    link.publish(topic, b"x" * 1000)
    take(link, 1)
    assert link.bytes_sent - sent == link.bytes_received - received == len(topic) + 1000
