"""A whole device, and everything that a broker or a stranger may put before it."""

import json

import pytest

from broker_bridge.link.base import Message
from broker_bridge.wire import blobs, messages, weights
from broker_bridge.wire.envelope import SignKey, random_bytes
from broker_bridge.wire.messages import Ack, Busy, Need
from device_client.participant import State
from tests.fleets import FEDERATION, TOPICS, wait_until, write_samples


@pytest.fixture
def data(tmp_path):
    return lambda name, **options: write_samples(tmp_path / f"{name}.npz", seed=1, **options)


@pytest.fixture
def device(world, data):
    """A device on line, in a fleet with one that is driven by hand."""
    agent = world.agent("ann", data=data("ann"))
    world.other = world.hand("ben")
    world.settle()
    return agent


def state_of(world, name="ann"):
    return json.loads(world.broker.retained[TOPICS.state(name)].payload)


def tell_device(world, topic, payload, *, retain=False):
    """Something comes in on a topic, from whoever may write there or not."""
    world.broker.route(Message(topic, payload, retain))
    hear(world)


def hear(world):
    """The device hears what there is; the server does not."""
    (agent,) = world.agents
    while True:
        event = agent._link.receive(0)
        agent.turn(event)
        if event is None:
            return


def uploading(world, agent):
    """A device that has sealed its update and waits, while the server hears nothing."""
    assert world.tell(cmd="start", target=2)["ok"]
    world.until(lambda: agent._participant.state is State.TRAINING, "it trains")

    def sealed():
        hear(world)
        return agent._participant.state is State.UPLOADING

    wait_until(sealed, "it is sealed")


def completes(world):
    """The round completes, with an update of the device in it."""
    number = world.announcement().round
    world.until(lambda: world.status().get("round", {}).get("accepted") == 1, "its update")
    assert world.other.upload(world.other.delta()).status == "accepted"
    assert (world.metrics()["round"], world.metrics()["accepted"]) == (number, 2)


class Held:
    """Work that waits until it is let go: a device that trains for as long as a test likes."""

    stopping = False

    def __init__(self):
        self.work = None

    def start(self, work):
        self.work = work

    def stop(self):
        return False

    def finished(self):
        return []


def states_heard(listener, name):
    found = []
    while (event := listener.receive(0)) is not None:
        if isinstance(event, Message) and event.topic == TOPICS.state(name):
            found.append(json.loads(event.payload)["state"])
    return found


def test_a_device_says_what_it_does_when_that_lasts(world, device):
    listener = world.broker.connect("listener")
    listener.subscribe([TOPICS.all_states])
    device._bench.background = Held()
    assert world.tell(cmd="start", target=2)["ok"]
    world.pass_time(0.1)
    assert states_heard(listener, "ann") == ["ready"]
    world.pass_time(0.5)
    assert states_heard(listener, "ann") == ["training"]
    world.pass_time(5)
    assert states_heard(listener, "ann") == []


def test_a_short_round_costs_one_word_about_it(world, device):
    listener = world.broker.connect("listener")
    listener.subscribe([TOPICS.all_states])
    assert world.tell(cmd="start", target=2)["ok"]
    completes(world)
    world.pass_time(1)
    assert states_heard(listener, "ann") == ["ready", "ready"]
    assert state_of(world)["detail"] == "round 1: accepted"


# ── Announcements ───────────────────────────────────────────────────────────────────────


def announced(world, key=None, *, federation=FEDERATION, **changes):
    found = {f: getattr(world.announcement(), f) for f in world.announcement().__struct_fields__}
    made = type(world.announcement())(**found | changes)
    return messages.signed(key or world.ledger.keys.sign, "round", federation, made)


@pytest.fixture
def between(world, device):
    """After a round, before the next."""
    assert world.tell(cmd="start", target=2)["ok"]
    first = world.broker.retained[TOPICS.round].payload
    completes(world)
    world.first = first
    return device


def test_a_forged_announcement_is_ignored(world, between):
    stranger = SignKey.from_seed(random_bytes(32))
    before = between._participant.memory
    for forged in (
        announced(world, stranger, round=9, state="open"),
        announced(world, world.other.identity.keys.sign, round=9, state="open"),
        announced(world, federation="other", round=9, state="open"),
    ):
        tell_device(world, TOPICS.round, forged, retain=True)
    assert between._participant.memory == before
    assert between.rejects == {"bad_signature": 3}


def test_a_replayed_announcement_is_ignored(world, between):
    before = between._participant.memory
    tell_device(world, TOPICS.round, world.first, retain=True)
    assert between._participant.memory == before
    assert between._participant.state is State.IDLE


def test_an_announcement_older_than_the_last_is_ignored(world, between):
    tell_device(world, TOPICS.round, announced(world, round=0, state="open"), retain=True)
    assert between._participant.round == 1
    assert between._participant.state is State.IDLE


def test_an_announcement_of_another_federation_is_ignored(world, between):
    other = messages.signed(
        world.ledger.keys.sign, "round", FEDERATION,
        _replaced(world.announcement(), federation="other", round=9, state="open"),
    )  # fmt: skip
    tell_device(world, TOPICS.round, other)
    assert between.rejects == {"other_federation": 1}
    assert between._participant.round == 1


def _replaced(message, **changes):
    return type(message)(**{f: getattr(message, f) for f in message.__struct_fields__} | changes)


def test_an_announcement_cut_short_is_ignored(world, between):
    whole = announced(world, round=9, state="open")
    for length in range(1, len(whole), 7):
        tell_device(world, TOPICS.round, whole[:length])
    assert between._participant.round == 1
    assert set(between.rejects) == {"bad_signature"}


# ── Messages that are said to come from the server ──────────────────────────────────────


def signed(world, kind, message, *, key=None, scope="demo/ann"):
    return messages.signed(key or world.ledger.keys.sign, kind, scope, message)


def test_a_forged_receipt_is_ignored(world, device):
    uploading(world, device)
    upload = device._outbox.load().upload
    ack = Ack(round=1, upload=upload, status="accepted")
    forgeries = [
        signed(world, "ack", ack, key=SignKey.from_seed(random_bytes(32))),
        signed(world, "ack", ack, key=world.other.identity.keys.sign),
        signed(world, "ack", ack, scope="demo/ben"),  # true, and said to another
        signed(world, "go", ack),  # true, and of another kind
    ]
    for forged in forgeries:
        tell_device(world, TOPICS.down("ann", "ack"), forged)
    assert device._participant.state is State.UPLOADING
    assert device._outbox.load() is not None
    assert device.rejects == {"bad_signature": 4}
    completes(world)


def test_a_receipt_for_another_upload_is_ignored(world, device):
    uploading(world, device)
    ack = Ack(round=1, upload=b"another!", status="accepted")
    tell_device(world, TOPICS.down("ann", "ack"), signed(world, "ack", ack))
    assert device._outbox.load() is not None
    completes(world)


def test_a_forged_busy_does_not_send_a_device_away(world, device):
    assert world.tell(cmd="start", target=2)["ok"]
    busy = Busy(round=1, retry_after_s=-1, reason="go away")
    stranger = SignKey.from_seed(random_bytes(32))
    tell_device(world, TOPICS.down("ann", "go"), signed(world, "go", busy, key=stranger))
    completes(world)


def test_a_bitmap_of_the_wrong_length_does_not_stop_a_device(world, device):
    uploading(world, device)
    need = Need(upload=device._outbox.load().upload, bitmap=b"\xff" * 500)
    tell_device(world, TOPICS.down("ann", "need"), signed(world, "need", need))
    assert device.rejects == {"bad_bitmap": 1}
    completes(world)


@pytest.mark.parametrize("payload", [b"", b"\x00" * 10, b"x" * 70_000], ids=len)
def test_garbage_does_not_stop_a_device(world, device, payload):
    for topic in (TOPICS.round, TOPICS.down("ann", "go"), TOPICS.down("ann", "need"),
                  TOPICS.down("ann", "ack"), TOPICS.down("ann", "cfg"), TOPICS.task(0),
                  TOPICS.model(0), "midge/v1/demo/nonsense"):  # fmt: skip
        tell_device(world, topic, payload)
    assert world.tell(cmd="start", target=2)["ok"]
    completes(world)


# ── Models and tasks ────────────────────────────────────────────────────────────────────


def tampered(world, how):
    """The broker gives out another model than the one that was announced."""
    topic, said = TOPICS.model(0), world.broker.retained[TOPICS.model(0)]
    blob = world.announcement().model
    chunk = {
        "altered": said.payload[:-1] + bytes([said.payload[-1] ^ 1]),
        "cut short": said.payload[:-1],
        "garbage": random_bytes(len(said.payload)),
        "another": next(
            iter(blobs.seal_blob(bytes(blob.total_bytes), blob, fleet_key=random_bytes(32)))
        ),
    }[how]
    world.broker.retained[topic] = Message(topic, chunk, True)


@pytest.mark.parametrize("how", ["altered", "cut short", "garbage", "another"])
def test_a_model_that_the_broker_altered_is_not_trained_on(world, device, how):
    device._link.drop(away_s=1.0)
    assert world.tell(cmd="start", target=2, quorum=1)["ok"]
    tampered(world, how)
    world.pass_time(2)
    world.until(lambda: device._participant.state is State.FETCHING, "it fetches")
    world.until(lambda: device.rejects, "it is refused")
    assert device._participant.state is State.FETCHING
    world.pass_time(30)  # it asks, and the server retains the true one again
    completes(world)


def test_a_model_forged_by_a_member_is_not_trained_on(world, device):
    """Who knows the fleet key can seal chunks; the digest in the announcement tells."""
    device._link.drop(away_s=1.0)
    assert world.tell(cmd="start", target=2, quorum=1)["ok"]
    forged = weights.encode({n: a * 0 for n, a in world.ledger.model.items()})
    blob = world.announcement().model
    assert len(forged) == blob.total_bytes
    sealed = blobs.seal_blob(forged, blob, fleet_key=world.other.identity.fleet_key)
    for index, chunk in enumerate(sealed):
        world.broker.retained[TOPICS.model(index)] = Message(TOPICS.model(index), chunk, True)
    world.pass_time(2)
    world.until(lambda: device.rejects, "it is refused")
    assert device.rejects == {"bad_digest": 1}
    world.pass_time(30)
    completes(world)


# ── Data ────────────────────────────────────────────────────────────────────────────────


def test_labels_out_of_range_are_said_and_the_device_goes_on(world, data):
    agent = world.agent("odd", data=data("odd", labels=9))
    world.settle()
    world.other = world.hand("ben")
    assert world.tell(cmd="start", target=1, quorum=1, rounds=2)["ok"]
    world.until(lambda: agent._participant.memory.done, "it gives up")
    world.pass_time(1)
    assert "is outside 0 … 6" in state_of(world, "odd")["detail"]
    assert agent._participant.memory.done
    assert world.other.upload(world.other.delta()).status == "accepted"
    world.until(lambda: agent._participant.round == 2, "it hears of the next round")
    assert world.status()["devices"]["online"] == 2


def test_a_data_source_that_is_gone_is_said_in_words_that_fit(world):
    path = "/nowhere/" + "x" * 600 + ".npz"
    agent = world.agent("odd", data=f"npz:{path}")
    world.settle()
    assert world.tell(cmd="start", target=1, quorum=1)["ok"]
    world.until(lambda: agent._participant.memory.done, "it gives up")
    world.pass_time(1)
    assert state_of(world, "odd")["detail"].startswith("cannot read /nowhere/")
    assert world.rejected() == {}, "the server can read it"


def test_a_device_that_stops_says_so(world, device):
    calls = iter([False, False, True])
    device.run(lambda: next(calls))
    assert state_of(world)["state"] == "sleeping"


def test_a_device_that_crashes_is_not_waited_for(world, device):
    class BugError(Exception):
        pass

    def stopped():
        raise BugError

    with pytest.raises(BugError):
        device.run(stopped)
    assert state_of(world)["state"] == "sleeping"
