"""Optimiser state starts fresh in each round, or is kept on the device: as the task says."""

import msgspec
import numpy as np
import pytest

from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import decode_task, encode_plan
from broker_bridge.wire import weights
from broker_bridge.wire.envelope import sha256
from broker_bridge.wire.messages import Settings
from device_client.data import load_samples
from device_client.trainer import Trainer
from device_client.workbench import Workbench
from tests.fleets import TASK, write_samples

PLAN, WEIGHTS = decode_task(TASK.read_bytes())
MODEL = weights.encode(WEIGHTS)


class AtOnce:
    """Work is done where it is begun."""

    stopping = False

    def start(self, work):
        self.done = work()

    def stop(self):
        return False

    def finished(self):
        return []


@pytest.fixture
def trained_twice(tmp_path):
    """Two rounds from the same model, of a task that keeps its optimiser state or does not."""
    source = write_samples(tmp_path / "samples.npz", seed=1)

    def load(plan):
        return Trainer(TaskRuntime(plan), load_samples(source, plan.task))

    def twice(*, keeps, forget_between=False):
        task = msgspec.structs.replace(PLAN.task, keep_optimiser_state=keeps)
        bench = Workbench(tmp_path / "bench", scope="demo/ann", load=load, background=AtOnce())
        found = []
        for number in (1, 2):
            bench.use_task(encode_plan(task, PLAN.tflite))
            bench.use_model(sha256(MODEL), MODEL)
            bench.train(number, Settings(epochs=1, learning_rate=0.05))
            found.append(bench.take_update(1e9)[0])
            if forget_between:
                bench.use_task(encode_plan(PLAN.task, PLAN.tflite))
        return found

    return twice


def test_a_round_starts_with_a_fresh_optimiser(trained_twice):
    _, second = trained_twice(keeps=False)
    _, after_another_task = trained_twice(keeps=True, forget_between=True)
    for name, array in second.weights.items():
        np.testing.assert_array_equal(array, after_another_task.weights[name])


def test_a_task_that_keeps_its_optimiser_state_goes_on_with_it(trained_twice):
    _, fresh = trained_twice(keeps=False)
    first, second = trained_twice(keeps=True)
    assert any(array.any() for array in first.optimiser_state.values())
    assert any((second.weights[name] != fresh.weights[name]).any() for name in fresh.weights)
