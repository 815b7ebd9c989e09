"""Lines that break, go dead or crawl between a device and the broker, over a relay of our own."""

import contextlib
import socket
import time
from collections import Counter

import pytest

from broker_bridge.link.local_broker import find_mosquitto
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.topics import UpTopic
from tests.broker_bridge.link.proxy import Proxy
from tests.chaos.test_broker import broker_with
from tests.fleets import TOPICS, wait_until

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")


class Line(Proxy):
    """A line with a speed and a length, both ways together."""

    bytes_per_s = 1e9
    cut_every_bytes = 1 << 60
    carried = 0
    cuts = 0

    def _forward(self, source):
        with contextlib.suppress(OSError):
            length = len(source.recv(512, socket.MSG_PEEK))
            time.sleep(length / self.bytes_per_s)
            self.carried += length
            if self.carried // self.cut_every_bytes > self.cuts:
                self.cuts += 1
                self.cut()
                return
        self._forward_some(source)

    def _forward_some(self, source):
        """As the base, but no more at once than a slow line carries."""
        with self._lock:
            target = self._pairs.get(source)
        if target is None:
            return
        with contextlib.suppress(OSError):
            data = source.recv(512)
            if data:
                target.sendall(data)
                return
        with self._lock:
            for each in (source, target):
                self._pairs.pop(each, None)
                each.close()


@pytest.fixture
def behind(fleets):
    """A fleet whose one device is behind a line: `(fleet, line, recorder, device)`."""
    with contextlib.ExitStack() as lines:

        def make(*options):
            fleet = fleets()
            broker_with(fleet, max_packet_size="2048")  # an update is many chunks
            fleet.start()
            fleet.enrol("ann")
            line = lines.enter_context(Line(fleet.port))
            recorder = fleet.listen(TOPICS.all_up(0), TOPICS.all_states, who="server")
            (fleet.folder / "ann" / "device.toml").write_text("keepalive_s = 10\n")
            device = fleet.device("ann", "--broker", f"127.0.0.1:{line.port}", *options)
            recorder.wait_for_json(TOPICS.state("ann"), state="ready")
            return fleet, line, recorder, device

        yield make


def chunks(recorder):
    """How often each chunk reached the broker."""
    found = Counter()
    for message in recorder.hear():
        place = TOPICS.parse(message.topic)
        if isinstance(place, UpTopic) and place.kind == "data":
            header = chunk_header(message.payload)
            found[header.transfer, header.index, header.count] += 1
    return found


def closed(fleet, give_up_s=120.0):
    wait_until(lambda: "round 1 closed: 1 updates" in fleet.server.log, "the round ends", give_up_s)


def all_there_about_once(recorder, repeats_max):
    """One upload; every chunk came; few came twice."""

    def all_there():
        found = chunks(recorder)
        counts = {count for _, _, count in found}
        return found if len({index for _, index, _ in found}) == max(counts) else None

    found = wait_until(all_there, "every chunk was recorded")
    assert len({upload for upload, _, _ in found}) == 1
    ((_, _, count), *_) = found
    assert {index for _, index, _ in found} == set(range(count))
    assert found.total() - count <= repeats_max, found


def test_a_line_that_breaks_again_and_again_in_mid_chunk_costs_only_what_was_on_its_way(behind):
    fleet, line, recorder, device = behind()
    line.cut_every_bytes = 60_000
    fleet.start_run(rounds=1)
    closed(fleet)
    assert line.cuts >= 3
    assert device.log.count("trained") == 1
    # What was sent and not acknowledged goes again: up to the broker's window for each cut.
    all_there_about_once(recorder, repeats_max=20 * line.cuts)


def test_a_line_that_goes_dead_is_given_up_and_the_upload_goes_on_over_another(behind):
    fleet, line, recorder, device = behind()
    line.cut_every_bytes = 1 << 60
    start = line.carried
    line.bytes_per_s = 20_000  # slow enough to be caught in the act
    fleet.start_run(rounds=1)
    wait_until(lambda: chunks(recorder).total() > 3 or line.carried - start > 150_000, "uploading")
    line.stalled = True
    wait_until(lambda: "connection lost" in device.log, "the device notices")
    line.cut()
    line.bytes_per_s = 1e9
    line.stalled = False
    closed(fleet)
    assert device.log.count("trained") == 1
    all_there_about_once(recorder, repeats_max=20)


def test_a_line_of_20_kbit_s_carries_an_update(behind):
    fleet, line, recorder, device = behind()
    fleet.start_run(rounds=1)
    device.wait_for("round 1: training")
    line.bytes_per_s = 2500
    closed(fleet, 240)
    assert device.log.count("connection lost") == 0
    all_there_about_once(recorder, repeats_max=0)
