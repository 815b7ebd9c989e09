"""The in-memory link's own promises: trouble by seed, and no clock."""

import pytest

from broker_bridge.link.base import Connected, Disconnected, LinkLimits, Message
from broker_bridge.link.memory_link import MemoryBroker


def pair(**trouble):
    broker = MemoryBroker(**trouble)
    reader, writer = broker.connect("reader"), broker.connect("writer")
    reader.subscribe(["t"])
    assert isinstance(reader.receive(0), Connected)
    return broker, reader, writer


def received(reader, patience=100):
    got = []
    for _ in range(patience):
        event = reader.receive(1.0)
        if isinstance(event, Message):
            reader.ack(event)
            got.append(int(event.payload))
    return got


def send(writer, count):
    for i in range(count):
        writer.publish("t", b"%d" % i)


def test_a_calm_line_delivers_everything_once_and_in_order():
    _, reader, writer = pair()
    send(writer, 50)
    assert received(reader) == list(range(50))


def test_loss_drops_some_and_counts_them():
    broker, reader, writer = pair(seed=1, loss=0.3)
    send(writer, 100)
    got = received(reader, 200)
    assert 0 < broker.lost < 100
    assert len(got) == 100 - broker.lost
    assert got == sorted(got)


def test_repeat_brings_some_twice():
    _, reader, writer = pair(seed=1, repeat=0.3)
    send(writer, 100)
    got = received(reader, 300)
    assert set(got) == set(range(100))
    assert len(got) > 100


def test_reorder_lets_some_overtake():
    _, reader, writer = pair(seed=1, reorder=0.3)
    send(writer, 60)
    got = received(reader)
    assert sorted(got) == list(range(60))
    assert got != sorted(got)


def test_delay_takes_time_and_keeps_the_order():
    broker, reader, writer = pair(seed=1, delay=5.0)
    send(writer, 40)
    assert received(reader) == list(range(40))
    assert broker.now_s > 0.0


@pytest.mark.parametrize("seed", range(5))
def test_one_seed_is_one_story(seed):
    def story():
        _, reader, writer = pair(seed=seed, loss=0.2, repeat=0.2, delay=2.0, reorder=0.2)
        send(writer, 50)
        return received(reader)

    assert story() == story()


def test_different_seeds_are_different_stories():
    stories = set()
    for seed in range(5):
        _, reader, writer = pair(seed=seed, loss=0.5)
        send(writer, 40)
        stories.add(tuple(received(reader)))
    assert len(stories) == 5


def test_waiting_for_nothing_lets_time_pass_and_asking_does_not():
    broker, reader, _ = pair()
    assert reader.receive(0.0) is None
    assert broker.now_s == 0.0
    assert reader.receive(7.0) is None
    assert broker.now_s == 7.0


def test_a_reader_that_does_not_acknowledge_is_sent_no_more_than_its_window():
    _, reader, writer = pair(receive_max=4)
    send(writer, 10)
    held = [reader.receive(1.0) for _ in range(4)]
    assert reader.receive(1.0) is None
    reader.ack(held[0])
    assert reader.receive(1.0).payload == b"4"


def test_a_power_cut_is_a_link_thrown_away_and_a_new_one_under_its_name():
    broker, reader, writer = pair()
    send(writer, 3)
    assert reader.receive(1.0).payload == b"0"  # not acknowledged
    reborn = broker.connect("reader")
    assert reborn.receive(0) == Connected(reborn.limits, resumed=True)
    assert received(reborn) == [0, 1, 2]
    assert isinstance(reader.receive(0), Disconnected)
    assert reader.receive(5.0) is None


def test_a_dropped_link_comes_back_when_its_time_is_up():
    _, reader, writer = pair()
    reader.drop(away_s=60.0)
    assert isinstance(reader.receive(0), Disconnected)
    send(writer, 1)
    assert reader.receive(30.0) is None
    assert reader.receive(30.0) is None
    assert reader.receive(1.0) == Connected(reader.limits, resumed=True)
    assert received(reader) == [0]


def test_a_session_ends_after_its_time():
    broker = MemoryBroker()
    broker.connect("a", session_s=100).close()
    broker.advance(99)
    again = broker.connect("a", session_s=100)
    assert again.receive(0).resumed
    again.close()
    broker.advance(101)
    assert not broker.connect("a", session_s=100).receive(0).resumed


def test_a_broker_that_forgets_is_told_the_subscriptions_again():
    broker, reader, writer = pair()
    writer.publish("kept", b"x", retain=True)
    broker.restart(keep=False)
    assert broker.retained == {}
    assert isinstance(reader.receive(0), Disconnected)
    assert reader.receive(0) == Connected(reader.limits, resumed=False)
    writer.receive(0)
    send(writer, 2)
    assert writer.flush(1.0)
    assert received(reader) == [0, 1]


def test_a_broker_that_restarts_in_order_keeps_everything():
    broker, reader, writer = pair()
    send(writer, 2)
    broker.restart()
    assert isinstance(reader.receive(0), Disconnected)
    assert reader.receive(0).resumed
    assert received(reader) == [0, 1]


def test_the_limits_are_the_callers_to_choose():
    broker = MemoryBroker(limits=LinkLimits(packet_bytes_max=2000, inflight_max=2))
    link = broker.connect("a")
    assert link.room() == 2
    assert link.limits.packet_bytes_max == 2000
