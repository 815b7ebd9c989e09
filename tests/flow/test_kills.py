"""Processes that die in the middle of a round, and the round that does not notice."""

import contextlib
import shutil
import socket
import time

import pytest

from broker_bridge.link.local_broker import LocalBroker, shipped_file
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.topics import UpTopic
from tests.broker_bridge.link.proxy import BUFFER_BYTES, Proxy
from tests.fleets import TOPICS, wait_until, write_samples

NAMES = ("ann", "ben")


@pytest.fixture
def undisturbed(worlds, tmp_path):
    """The models that two rounds of these devices make when nothing goes wrong."""

    def models(rounds):
        world = worlds()
        for name in NAMES:
            world.agent(name, data=write_samples(tmp_path / f"{name}.npz", seed=_seed(name)))
        world.settle()
        assert world.tell(cmd="start", rounds=rounds, target=2)["ok"]
        world.until(lambda: world.coordinator.run is None, "the run ends")
        folder = world.home.state / "models"
        return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

    return models


def _seed(name):
    return sum(name.encode())


def data_of(fleet, name):
    return write_samples(fleet.folder / f"{name}.npz", seed=_seed(name))


def test_a_server_killed_in_mid_round_finishes_it_with_the_same_bits(fleets, undisturbed):
    fleet = fleets().start()
    fleet.enrol(*NAMES)
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics)
    ann, ben = (fleet.device(name, data=data_of(fleet, name)) for name in NAMES)
    for name in NAMES:
        listener.wait_for_json(TOPICS.state(name), state="ready")
    ben.freeze()
    fleet.start_run(rounds=2, target=2)
    ann.wait_for("trained")
    wait_until(lambda: fleet.state_of("ann").get("detail") == "round 1: accepted", "a receipt")
    fleet.server.kill()
    assert "000002.weights" not in fleet.model_files()
    fleet.start_server()
    ben.thaw()
    listener.wait_for_json(TOPICS.metrics, round=2, state="closed")
    assert "going on with run 1" in fleet.server.log
    assert ann.log.count("trained") == 2, "an update with a receipt is not made again"
    assert fleet.model_files() == undisturbed(2)


def test_a_device_killed_while_training_makes_the_same_update(fleets, undisturbed):
    fleet = fleets().start()
    fleet.enrol(*NAMES)
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics)
    ann, ben = (fleet.device(name, data=data_of(fleet, name)) for name in NAMES)
    for name in NAMES:
        listener.wait_for_json(TOPICS.state(name), state="ready")
    ben.freeze()
    fleet.start_run(rounds=1, target=2)
    wait_until(lambda: fleet.state_of("ann").get("detail") == "round 1: accepted", "a receipt")
    ben.kill()
    fleet.device("ben", data=data_of(fleet, "ben"))
    listener.wait_for_json(TOPICS.metrics, round=1, state="closed")
    assert ann.is_running
    assert fleet.model_files() == undisturbed(1)


class Narrow(Proxy):
    """A line that goes dead after so many bytes from the device."""

    left = 1 << 60

    def _forward(self, source):
        from_device = next(iter(self._pairs), None) is source
        if from_device:
            with contextlib.suppress(OSError):
                self.left -= len(source.recv(BUFFER_BYTES, socket.MSG_PEEK))
            if self.left < 0:
                self.stalled = True
                return
        super()._forward(source)


def small_packets(fleet):
    """The same broker, taking packets of 2 kB: an update becomes many chunks."""
    text = shipped_file("mosquitto.conf").read_text()
    assert "max_packet_size 262144" in text
    shutil.copy(shipped_file("mosquitto.acl"), fleet.home.broker)
    fleet.broker = LocalBroker(
        fleet.home.broker, port=fleet.port, engine="mosquitto",
        conf_text=text.replace("max_packet_size 262144", "max_packet_size 2048"),
    )  # fmt: skip


def chunks_of(listener, name):
    """The chunks of a device's updates that reached the broker, in order: (upload, index)."""
    found = []
    for message in listener.hear():
        place = TOPICS.parse(message.topic)
        if isinstance(place, UpTopic) and (place.device, place.kind) == (name, "data"):
            header = chunk_header(message.payload)
            found.append((header.transfer, header.index, header.count))
    return found


def test_a_device_killed_in_mid_upload_sends_only_what_is_missing(fleets):
    fleet = fleets()
    small_packets(fleet)
    fleet.start()
    fleet.enrol("ann")
    recorder = fleet.listen(TOPICS.all_up(0), TOPICS.all_states, TOPICS.metrics, who="server")
    with Narrow(fleet.port) as line:
        first = fleet.device("ann", "--broker", f"127.0.0.1:{line.port}")
        recorder.wait_for_json(TOPICS.state("ann"), state="ready")
        line.left = 60_000  # one window of chunks goes through, the next does not
        fleet.start_run(rounds=1)
        wait_until(lambda: line.stalled, "the line goes dead in mid upload")
        first.kill()
    wait_until(lambda: quiet(recorder, "ann"), "what was on its way arrives")
    before = chunks_of(recorder, "ann")
    count = before[0][2]
    assert 0 < len(before) < count
    (sealed,) = (fleet.folder / "ann" / "outbox").iterdir()
    kept = sealed.read_bytes()

    second = fleet.device("ann")
    recorder.wait_for_json(TOPICS.metrics, round=1, state="closed")
    after = chunks_of(recorder, "ann")
    assert len({upload for upload, _, _ in after}) == 1, "the same upload"
    assert sorted(index for _, index, _ in after) == list(range(count)), "each chunk once"
    assert second.log.count("trained") == first.log.count("trained") == 1
    for message in recorder.hear():
        place = TOPICS.parse(message.topic)
        if isinstance(place, UpTopic) and place.kind == "data":
            assert message.payload in kept, "the same bytes"


def quiet(listener, name):
    """Whether some chunks came, and no more come."""
    before = len(chunks_of(listener, name))
    time.sleep(0.3)
    return before == len(chunks_of(listener, name)) > 0


def test_a_device_asked_to_stop_says_so_and_leaves_in_order(fleet):
    fleet.enrol("ann")
    listener = fleet.listen(TOPICS.all_states)
    device = fleet.device("ann")
    listener.wait_for_json(TOPICS.state("ann"), state="ready")
    assert device.terminate() == 0
    listener.wait_for_json(TOPICS.state("ann"), state="sleeping")
    states = [m for m in listener.hear() if b"lost" in m.payload]
    assert states == [], "the will of a device that said goodbye is not published"


def test_a_device_that_is_killed_is_lost_and_comes_back_under_a_new_boot(fleet):
    fleet.enrol("ann")
    listener = fleet.listen(TOPICS.all_states)
    device = fleet.device("ann")
    assert listener.wait_for_json(TOPICS.state("ann"), state="ready")["boot"] == 1
    device.kill()
    assert listener.wait_for_json(TOPICS.state("ann"), state="lost")["boot"] == 1
    fleet.device("ann")
    listener.wait_for_json(TOPICS.state("ann"), state="ready", boot=2)


def test_a_server_asked_to_stop_says_so_and_one_that_is_killed_is_lost(fleet):
    listener = fleet.listen(TOPICS.srv)
    listener.wait_for_json(TOPICS.srv, state="online")
    assert fleet.server.terminate() == 0
    listener.wait_for_json(TOPICS.srv, state="offline")
    fleet.start_server()
    fleet.server.kill()
    listener.wait_for_json(TOPICS.srv, state="lost")


def test_a_device_whose_data_does_not_fit_says_so_and_the_others_go_on(fleet):
    fleet.enrol("ann", "ben", "odd")
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics)
    wrong = write_samples(fleet.folder / "wrong.npz", seed=1, labels=9)
    odd = fleet.device("odd", data=wrong)
    for name in NAMES:
        fleet.device(name)
    for name in (*NAMES, "odd"):
        listener.wait_for_json(TOPICS.state(name), state="ready")
    fleet.start_run(rounds=2, target=2)
    listener.wait_for_json(TOPICS.metrics, round=2, accepted=2)
    said = listener.wait(
        lambda m: m.topic == TOPICS.state("odd") and b"is outside 0" in m.payload, "its state"
    )
    assert b"row" in said.payload
    assert odd.is_running
    assert "Traceback" not in odd.log
