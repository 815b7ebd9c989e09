"""A device whose training process dies or hangs says so and goes on: the next round works."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from device_client.sandbox.trainer import Sandbox, SandboxSettings
from tests.device_client.test_agent import state_of
from tests.fleets import wait_until, write_samples

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")


@pytest.fixture(params=[3_000])
def sandbox(tmp_path, request):
    source = write_samples(tmp_path / "ann.npz", seed=1, rows=request.param)
    made = Sandbox(SandboxSettings(source))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("how", "words"),
    [(signal.SIGKILL, "was killed"), (signal.SIGSEGV, "crashed (SIGSEGV)"),
     (signal.SIGSTOP, "no sign of life")],
)  # fmt: skip
def test_a_crash_takes_the_training_process_and_not_the_device(sandbox, world, how, words):
    agent = world.agent("ann", load=sandbox.load)
    world.settle()
    hits = []

    def hit(progress):
        if not hits:
            hits.append(agent._bench._trainer.pid)
            # To start may take long on a busy machine; who is stopped now says nothing more.
            agent._bench._trainer._process._stall_s = 1.5
            os.kill(hits[0], how)

    agent._bench._on_progress = hit
    assert world.tell(cmd="start", target=1)["ok"]
    world.until(lambda: words in agent._participant.detail, "it says what happened")
    world.pass_time(1)
    assert words in state_of(world)["detail"]
    assert world.tell(cmd="stop")["ok"]
    assert world.tell(cmd="start", target=1, rounds=1)["ok"]
    world.until(lambda: world.metrics()["round"] == 2, "the next round is closed")
    assert world.metrics()["accepted"] == 1
    assert agent._bench._trainer.pid not in hits


@pytest.mark.parametrize("sandbox", [20_000], indirect=True)
def test_a_device_that_leaves_a_round_ends_its_training_and_keeps_the_process(sandbox, world):
    agent = world.agent("ann", load=sandbox.load)
    world.settle()
    seen = []
    agent._bench._on_progress = seen.append
    assert world.tell(cmd="start", target=1)["ok"]
    world.until(lambda: seen, "it trains")
    pid = agent._bench._trainer.pid
    assert world.tell(cmd="stop")["ok"]
    world.settle()
    assert not agent._bench.background._thread
    assert agent._bench._trainer.pid == pid
    assert agent._bench._trainer.evaluate(agent._bench._model[1]).examples == 20_000


def children(pid):
    found = Path(f"/proc/{pid}/task").glob("*/children")
    pids = []
    for file in found:
        with contextlib.suppress(OSError):  # a thread that has ended since
            pids += map(int, file.read_text().split())
    return pids


def test_midge_device_trains_in_a_locked_process_and_ends_it(fleet):
    fleet.enrol("ann")
    device = fleet.device("ann")
    device.wait_for("connected")
    assert fleet.midge("start", "--rounds", "1", "--target", "1").returncode == 0
    device.wait_for("accepted")
    (child,) = children(device.pid)
    status = Path(f"/proc/{child}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "locked in by seccomp" in device.log
    os.kill(child, signal.SIGKILL)
    assert fleet.midge("start", "--rounds", "1", "--target", "1").returncode == 0
    wait_until(lambda: device.log.count("accepted") == 2, "the next round")
    (child,) = children(device.pid)
    assert device.terminate() == 0
    wait_until(lambda: not Path(f"/proc/{child}").exists(), "it is gone with the device")
