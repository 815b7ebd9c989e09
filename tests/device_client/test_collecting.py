"""Task and model on their way from a broker: whole and true, or not taken."""

import pytest

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Message
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.wire import blobs
from broker_bridge.wire.messages import Blob
from broker_bridge.wire.topics import Topics
from device_client.collecting import Collected, Collecting

TOPICS = Topics("demo")
KEY = b"f" * 32
MODEL = bytes(range(256)) * 12
OTHER = MODEL[::-1]


class Shelf:
    """A broker that retains a task and a model, and a device that fetches."""

    def __init__(self):
        self.broker = MemoryBroker(seed=1)
        self.link = self.broker.connect("ann")
        self.server = self.broker.connect("midge-server")
        self.collecting = Collecting(TOPICS)

    def lay_out(self, kind, content, *, key=KEY):
        """Retain it, as the server does; what to ask for."""
        topic = TOPICS.task if kind == "task" else TOPICS.model
        blob = blobs.describe(content, packet_bytes=1024)
        for index, chunk in enumerate(blobs.seal_blob(content, blob, fleet_key=key)):
            self.server.publish(topic(index), chunk, retain=True)
        return blob

    def chunks(self):
        """What came in since the last look: (kind, chunk) each."""
        found = []
        while (event := self.link.receive(0)) is not None:
            if isinstance(event, Message):
                self.link.ack(event)
                found.append((TOPICS.parse(event.topic), event.payload))
        return found

    def take_all(self):
        return [self.collecting.take(self.link, kind, chunk) for kind, chunk in self.chunks()]


@pytest.fixture
def shelf():
    return Shelf()


def test_a_model_is_whole_with_its_last_chunk_and_not_before(shelf):
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    *before, last = shelf.take_all()
    assert before == ["more"] * (blob.layout.count - 1)
    assert last == Collected("model", blob, MODEL)
    assert blob.layout.count > 2


def test_chunks_may_come_twice_and_in_any_order(shelf):
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    kinds_and_chunks = shelf.chunks()
    assert shelf.collecting.missing() == {"model": list(range(blob.layout.count))}
    for kind, chunk in [*reversed(kinds_and_chunks[1:]), *kinds_and_chunks[1:]]:
        assert shelf.collecting.take(shelf.link, kind, chunk) == "more"
    assert shelf.collecting.missing() == {"model": [0]}
    assert shelf.collecting.take(shelf.link, *kinds_and_chunks[0]).content == MODEL


def test_task_and_model_come_side_by_side(shelf):
    wanted = {"task": shelf.lay_out("task", OTHER), "model": shelf.lay_out("model", MODEL)}
    for kind, blob in wanted.items():
        shelf.collecting.begin(kind, blob, fleet_key=KEY)
        shelf.collecting.ask(shelf.link, kind)
    found = {each.kind: each.content for each in shelf.take_all() if isinstance(each, Collected)}
    assert found == {"task": OTHER, "model": MODEL}


def test_what_nobody_waits_for_is_no_news_and_nothing_is_asked_for(shelf):
    shelf.lay_out("model", MODEL)
    shelf.collecting.ask(shelf.link, "model")
    assert shelf.chunks() == []
    assert shelf.collecting.take(shelf.link, "model", b"anything") is None


def test_what_is_whole_is_not_waited_for_any_more_and_its_topics_are_left(shelf):
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    shelf.take_all()
    assert shelf.collecting.missing() == {}
    shelf.lay_out("model", OTHER)
    assert shelf.chunks() == [], "a device pays for each byte"


def test_whoever_stops_waiting_leaves_the_topics(shelf):
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    kind, chunk = shelf.chunks()[0]
    shelf.collecting.stop(shelf.link, "task", "model")
    assert shelf.collecting.take(shelf.link, kind, chunk) is None
    shelf.lay_out("model", OTHER)
    assert shelf.chunks() == []


def test_a_chunk_of_the_version_before_is_passed_over(shelf):
    shelf.lay_out("model", OTHER)
    shelf.link.subscribe([TOPICS.all_models])
    kind, old = shelf.chunks()[0]
    blob = shelf.lay_out("model", MODEL)
    new = shelf.chunks()
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    assert shelf.collecting.take(shelf.link, kind, old) is None
    for kind, chunk in new:
        last = shelf.collecting.take(shelf.link, kind, chunk)
    assert last.content == MODEL


def test_a_newer_model_takes_the_place_of_one_that_is_half_here(shelf):
    first = shelf.lay_out("model", OTHER)
    shelf.collecting.begin("model", first, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    for kind, chunk in shelf.chunks()[:-1]:
        shelf.collecting.take(shelf.link, kind, chunk)
    second = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", second, fleet_key=KEY)
    assert shelf.take_all()[-1] == Collected("model", second, MODEL)


@pytest.mark.parametrize("length", range(0, 60, 7))
def test_a_chunk_that_is_cut_short_is_refused_and_waited_for_on(shelf, length):
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    (kind, first), *others = shelf.chunks()
    with pytest.raises(PeerError):
        shelf.collecting.take(shelf.link, kind, first[:length])
    for each in [*others, (kind, first)]:
        last = shelf.collecting.take(shelf.link, *each)
    assert last.content == MODEL


def test_a_chunk_that_the_broker_altered_is_refused_and_the_true_one_taken(shelf):
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    (kind, first), *others = shelf.chunks()
    for each in others:
        shelf.collecting.take(shelf.link, *each)
    altered = first[:-1] + bytes([first[-1] ^ 1])
    with pytest.raises(PeerError) as told:
        shelf.collecting.take(shelf.link, kind, altered)
    assert told.value.reason == "bad_seal"
    assert shelf.collecting.take(shelf.link, kind, first).content == MODEL


def test_what_a_member_forged_is_refused_when_it_is_whole_and_begun_from_the_start(shelf):
    """Who knows the fleet key can seal chunks under the announced name; the digest tells."""
    true = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", true, fleet_key=KEY)
    *before, last = blobs.seal_blob(OTHER, true, fleet_key=KEY)
    for chunk in before:
        assert shelf.collecting.take(shelf.link, "model", chunk) == "more"
    with pytest.raises(PeerError) as told:
        shelf.collecting.take(shelf.link, "model", last)
    assert told.value.reason == "bad_digest"
    assert shelf.collecting.missing() == {"model": list(range(true.layout.count))}
    shelf.collecting.ask(shelf.link, "model")
    assert shelf.take_all()[-1].content == MODEL


def test_chunks_under_another_fleet_key_are_refused(shelf):
    blob = shelf.lay_out("model", MODEL, key=b"g" * 32)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    with pytest.raises(PeerError):
        shelf.take_all()


def test_what_nobody_can_send_is_refused_and_changes_nothing(shelf):
    impossible = Blob(digest=b"d" * 32, total_bytes=LIMITS.chunks_max + 1, body_bytes=1)
    with pytest.raises(PeerError) as told:
        shelf.collecting.begin("model", impossible, fleet_key=KEY)
    assert told.value.reason == "bad_size"
    assert shelf.collecting.missing() == {}
    blob = shelf.lay_out("model", MODEL)
    shelf.collecting.begin("model", blob, fleet_key=KEY)
    shelf.collecting.ask(shelf.link, "model")
    with pytest.raises(PeerError):
        shelf.collecting.begin("model", impossible, fleet_key=KEY)
    assert shelf.take_all()[-1].content == MODEL
