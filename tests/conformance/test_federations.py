"""The same federation on every broker: the same bits, whatever dies in between."""

import pytest

from broker_bridge.link.memory_link import MemoryBroker
from device_client.config import DeviceConfig
from device_client.participant import State
from server.config import ServerConfig
from tests.conformance.brokers import ENGINES, PACKET_BYTES_MAX
from tests.conformance.capabilities import lacks
from tests.conformance.federation import NAMES, Federation, in_memory, models, samples
from tests.fleets import TOPICS, World, wait_until

ROUNDS = 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return in_memory(tmp_path_factory.mktemp("memory"), rounds=ROUNDS)


@pytest.fixture(params=ENGINES)
def federation(request, tmp_path):
    engine = request.param
    make, protocol = ENGINES[engine]
    (tmp_path / "broker").mkdir()
    broker = make(tmp_path / "broker")
    broker.start()
    made = []

    def start(**options):
        made.append(
            Federation(
                tmp_path, broker, protocol=protocol, packet_bytes_max=PACKET_BYTES_MAX, **options
            )
        )
        made[-1].engine = engine
        return made[-1]

    yield start
    for each in made:
        each.close()
    broker.stop()


def begin(world, *, rounds=ROUNDS):
    assert world.tell(cmd="start", rounds=rounds, target=2)["ok"]


def test_rounds_end_with_the_same_bits_and_a_late_device_is_served_by_the_broker_alone(
    federation, undisturbed
):
    world = federation()
    world.device("ann")
    world.ready("ann")
    begin(world)
    world.until(lambda: world.coordinator.status()["round"]["invited"] == 1, "ann is in")
    late = world.device("ben")
    # Event by event: on a busy machine all that it fetches may be here at once.
    wait_until(lambda: (world.step(late), late.state is State.FETCHING)[1], "it was let in")
    # From here on the server is silent: task and model lie on the broker.
    wait_until(lambda: (world.alone(late), late.state is State.TRAINING)[1], "it has both")
    assert world.finish() == undisturbed
    keeps_to_the_limits_of_every_broker(world)


def keeps_to_the_limits_of_every_broker(world):
    """Those of AWS IoT Core are the narrowest we know; docs/brokers.md lists them."""
    said = world.broker.said()
    assert {"midge-server", "midge-operator", *NAMES} <= set(said)
    for name, this in said.items():
        assert this.qos == {1}, name
        assert not this.packet_types & {5, 6, 7}, "PUBREC, PUBREL and PUBCOMP are of QoS 2"
        assert this.largest_packet_bytes <= PACKET_BYTES_MAX, name
        assert this.most_filters_in_a_packet <= 8, name
        assert this.most_unacknowledged <= 20, name
        assert all(30 <= each <= 1200 for each in this.keepalives_s), name
        for text in this.topics | this.filters:
            assert text.count("/") <= 6, text
            assert not text.startswith(("$", "/")), text
            assert len(text.encode()) <= 256, text
            assert "." not in text, f"{text} is one level on nats-server, where a dot is another"
    assert len(said["midge-server"].filters) == 3
    assert {len(said[name].filters) for name in NAMES} == {5}


def test_keep_alives_suit_the_narrowest_broker_unless_somebody_sets_them():
    for default in (ServerConfig().broker.keepalive_s, DeviceConfig().keepalive_s):
        assert 30 <= default <= 1200


def test_a_device_killed_in_mid_upload_is_lost_and_sends_only_what_is_missing(federation):
    world = federation(inflight_max=2)
    ann = world.device("ann")
    world.ready("ann")
    assert world.tell(cmd="start", rounds=1, target=1)["ok"]
    wait_until(lambda: (world.step(ann), ann.state is State.UPLOADING)[1], "it uploads")
    sent = ann._link.bytes_sent
    wait_until(
        lambda: (world.step(ann), ann._link.bytes_sent - sent > PACKET_BYTES_MAX)[1],
        "more than a chunk is on its way",
    )
    wait_until(lambda: len(world.chunks("ann")) >= 2, "the broker has two of them")
    world.power_cut(ann)
    lost = world.wait_for_state(TOPICS.state("ann"), "lost")
    assert b'"boot":1' in lost.payload
    world.quiet()
    before = world.chunks("ann")
    count = before[0][2]
    assert 0 < len(before) < count
    back = world.device("ann")
    if lacks(world.engine, "resume"):
        world.quiet(back)
        assert back.state is State.IDLE, "it has not heard of the round"
        world.service._board.announce(world.service._board.announced)
    world.finish()
    after = world.chunks("ann")
    assert len({upload for upload, _, _ in after}) == 1, "the same upload"
    assert sorted(index for _, index, _ in after) == list(range(count)), "each chunk once"


def test_a_server_that_vanishes_is_lost_and_one_that_comes_back_goes_on(federation, undisturbed):
    world = federation()
    world.device("ann")
    world.ready("ann")
    begin(world)
    world.until(lambda: world.coordinator.status()["round"]["accepted"] == 1, "a receipt")
    world.broker.cut(world.link)
    world.ledger.close()
    lost = wait_until(
        lambda: next((m for m in world.eye.hear() if b"lost" in m.payload), None), "its will"
    )
    assert lost.topic == TOPICS.srv
    world.start_server()
    world.wait_for_state(TOPICS.srv, "online")
    world.device("ben")
    assert world.finish() == undisturbed


def test_a_broker_killed_in_mid_round_costs_nothing_but_time(federation, undisturbed):
    world = federation()
    world.device("ann")
    world.ready("ann")
    begin(world)
    world.until(lambda: world.coordinator.status()["round"]["accepted"] == 1, "a receipt")
    world.process.kill()
    world.process.start()
    world.device("ben")
    assert world.finish() == undisturbed


class Rabbit(MemoryBroker):
    """Sends nothing retained for a filter with a wildcard, as RabbitMQ's documentation says."""

    def subscribe(self, client_id, filters):
        everything = self.retained
        for each in filters:
            self.retained = {} if "+" in each or "#" in each else everything
            super().subscribe(client_id, [each])
        self.retained = everything


def test_a_broker_that_retains_nothing_for_wildcards_costs_time_and_the_same_bits_come_out(
    tmp_path, undisturbed
):
    world = World(tmp_path, make_broker=Rabbit)
    for name in NAMES:
        world.agent(name, data=samples(tmp_path, name))
    world.settle()
    begin(world)

    def later():
        world.pass_time(1.0)
        return world.coordinator.run is None

    wait_until(later, "the run ends")
    assert models(world) == undisturbed
    world.close()
