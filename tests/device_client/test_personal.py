"""A model trained on for one device's own programs: better on what it has not seen, or not kept."""

import logging

import numpy as np
import pytest

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples, part_of, part_size
from broker_bridge.task.taskfile import decode_plan, decode_task, encode_plan
from broker_bridge.wire import weights as wire
from device_client import model as models
from device_client.participant import State
from device_client.sandbox.trainer import Sandbox, SandboxSettings
from device_client.trainer import Trainer
from device_client.workbench import Workbench
from tests.fleets import DEVICE, TASK, run, wait_until, write_samples


class Now:
    """Work that is done where it is begun."""

    stopping = False

    def start(self, work):
        self.events = work()

    def stop(self):
        return False

    def finished(self):
        return []


@pytest.fixture(scope="module")
def task():
    return decode_task(TASK.read_bytes())


def plan_bytes(plan):

    return encode_plan(plan.task, plan.tflite)


def bench_on(folder, task, samples):
    plan, weights = task
    bench = Workbench(
        folder, scope="demo/ann", background=Now(),
        load=lambda plan: Trainer(TaskRuntime(plan), samples),
    )  # fmt: skip
    bench.use_task(plan_bytes(plan))
    bench.use_model(b"m", wire.encode(weights))
    bench.keep(version=3, number=2)
    return bench


def learnable(rows=200, labels=1):
    """Samples of which a model can learn something: few labels, and the same ones each time."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(rows, 50, 6)).astype(np.float32)
    return Samples((x,), draw.integers(0, labels, size=rows).astype(np.int32))


def test_the_parts_of_the_samples_are_the_same_each_time_and_meet_nowhere():
    samples = Samples((np.arange(100.0)[:, None],), np.arange(100))
    most, rest = part_of(samples, "most"), part_of(samples, "rest")
    assert (len(most), len(rest)) == (80, 20)
    assert sorted([*most.labels, *rest.labels]) == list(range(100))
    assert list(part_of(samples, "rest").labels) == list(rest.labels)
    everything = rest.inputs[0][np.arange(20)]
    np.testing.assert_array_equal(everything[:, 0], rest.labels)
    assert part_of(samples, "all") is samples


def test_few_samples_are_divided_as_far_as_they_can_be():
    assert (part_size(2, "most"), part_size(2, "rest")) == (1, 1)
    with pytest.raises(LocalError, match="too few"):
        part_size(1, "rest")
    assert part_size(1_000_000, "rest") == 2000


def test_a_personal_model_that_does_better_is_kept(tmp_path, task):
    bench = bench_on(tmp_path, task, learnable())
    bench.personalise(2, 3, epochs=2)
    assert models.kept(tmp_path, "personal") == 3
    assert models.Model.open(tmp_path).kind == "personal"
    plan, _ = decode_task((tmp_path / "model" / "personal.task").read_bytes())
    assert decode_plan(plan_bytes(task[0])).task.weights == plan.task.weights


def test_a_personal_model_that_does_no_better_is_not_kept(tmp_path, task, caplog):
    """Labels that nothing explains: what is learned from most of them is no good on the rest."""
    draw = np.random.default_rng(3)
    samples = Samples(
        (np.repeat(draw.normal(size=(1, 50, 6)), 100, axis=0).astype(np.float32),),
        np.where(np.isin(np.arange(100), _rest_rows()), 1, 2).astype(np.int32),
    )
    with caplog.at_level(logging.INFO, logger="midge.device"):
        bench_on(tmp_path, task, samples).personalise(2, 3, epochs=3)
    assert models.kept(tmp_path, "personal") is None
    assert "not kept" in caplog.text


def _rest_rows():
    labels = np.arange(100)
    return part_of(Samples((labels[:, None],), labels), "rest").labels


def test_a_newer_global_model_takes_the_place_of_a_personal_one(tmp_path, task):
    bench = bench_on(tmp_path, task, learnable())
    bench.personalise(2, 3, epochs=2)
    bench.keep(version=4, number=3)
    assert models.kept(tmp_path, "personal") is None
    assert models.Model.open(tmp_path).version == 4


def test_what_is_sent_is_not_trained_from_the_personal_model(tmp_path, task):
    bench = bench_on(tmp_path, task, learnable())
    bench.personalise(2, 3, epochs=2)
    assert bench.take_update(10.0) is None
    assert bench.has_model(b"m")


def test_the_locked_process_trains_on_a_part_with_the_same_bits(tmp_path, task):
    plan, weights = task
    source = write_samples(tmp_path / "ann.npz", seed=1, rows=100)
    with np.load(tmp_path / "ann.npz") as file:
        here = Trainer(TaskRuntime(plan), Samples((file["x"],), file["y"]))
    sandbox = Sandbox(SandboxSettings(source))
    try:
        there = sandbox.load(plan)
        for part in ("most", "rest"):
            settings = plan.task.defaults
            found = there.train(weights, settings, seed=1, part=part)
            expected = here.train(weights, settings, seed=1, part=part)
            assert wire.encode(found.weights) == wire.encode(expected.weights)
            assert found.examples == expected.examples == part_size(100, part)
            assert there.evaluate(weights, part=part).examples == part_size(100, part)
    finally:
        sandbox.close()


def test_after_a_round_a_device_makes_the_model_its_own(world, tmp_path):
    data = write_samples(tmp_path / "ann.npz", seed=1, rows=100, labels=1)
    agent = world.agent("ann", data=data, keeps_model=True, personal_epochs=2)
    other = world.hand("ben")
    assert world.tell(cmd="start", target=2)["ok"]
    world.until(lambda: world.status()["round"]["accepted"] == 1, "its update")
    assert other.upload(other.delta(0.0)).status == "accepted"
    folder = world.folder / "ann"
    world.until(lambda: models.kept(folder, "personal") == 2, "the personal model")
    assert agent.state is State.IDLE


def test_a_round_comes_before_a_personal_model(world, tmp_path):
    data = write_samples(tmp_path / "ann.npz", seed=1, rows=400, labels=1)
    agent = world.agent("ann", data=data, keeps_model=True, personal_epochs=1000)
    other = world.hand("ben")
    assert world.tell(cmd="start", target=2, rounds=1)["ok"]
    world.until(lambda: world.status()["round"]["accepted"] == 1, "its update")
    assert other.upload(other.delta(0.0)).status == "accepted"
    world.until(lambda: agent._bench._is_personalising, "it trains for itself")
    assert world.tell(cmd="start", target=2, rounds=1)["ok"]
    world.until(lambda: world.status()["round"]["accepted"] == 1, "its update of the next round")


def test_a_real_device_with_personalisation_on_keeps_a_personal_model(fleet):
    fleet.enrol("ann")
    ann = fleet.device("ann", "--set", "personal_epochs=3")
    ann.wait_for("connected")
    fleet.start_run(task="wearables", rounds=1, target=1, quorum=1)
    ann.wait_for("trained on for this device")
    kept = "kept" if ": kept" in ann.log else "not kept"
    folder = fleet.folder / "ann"
    wait_until(lambda: (models.kept(folder, "personal") == 2) is (kept == "kept"), kept)
    np.save(folder / "x.npy", np.zeros((1, 50, 6), np.float32))
    done = run(*DEVICE, "infer", "--dir", str(folder), "--input", str(folder / "x.npy"))
    assert done.returncode == 0, done.stderr
