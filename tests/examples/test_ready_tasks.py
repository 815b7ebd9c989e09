"""The task files that are shipped: their data fits, they learn, and they can be built again."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Plan, decode_task
from broker_bridge.wire.weights import Tensors
from device_client.data import load_samples
from device_client.trainer import Trainer
from examples.simulate import FLEETS, federate

EXAMPLES = Path("examples")


@cache
def shipped(name: str) -> tuple[Plan, Tensors]:
    return decode_task((EXAMPLES / name / f"{name}.task").read_bytes())


@cache
def samples_of(name: str, device: int) -> Samples:
    return load_samples(FLEETS[name]().devices[device], shipped(name)[0].task)


@pytest.mark.parametrize("name", ["wearables", "digits"])
def test_every_device_of_the_example_has_data_that_fits(name: str) -> None:
    counts = [len(samples_of(name, i)) for i in range(len(FLEETS[name]().devices))]
    assert min(counts) > 100


@pytest.mark.parametrize(
    ("name", "rounds", "reached"), [("wearables", 4, 0.75), ("digits", 12, 0.75)]
)
def test_the_example_learns_what_no_device_knows_alone(
    name: str, rounds: int, reached: float
) -> None:
    plan, weights = shipped(name)
    fleet, runtime = FLEETS[name](), TaskRuntime(plan)
    trainers = [Trainer(runtime, samples_of(name, i)) for i in range(len(fleet.devices))]
    models = federate(trainers, weights, plan.task.defaults, rounds, 0)
    test = load_samples(fleet.test, plan.task)
    assert runtime.evaluate(models[-1], test).metrics["accuracy"] > reached


@pytest.mark.parametrize("name", ["wearables", "digits"])
def test_the_shipped_task_builds_again_and_behaves_the_same(name: str, tmp_path: Path) -> None:
    out = tmp_path / "again.task"
    command = [sys.executable, "-m", "server.tasks.cli", "build"]
    subprocess.run([*command, str(EXAMPLES / name / "model.py"), "-o", str(out)], check=True)
    plan, weights = shipped(name)
    again, weights_again = decode_task(out.read_bytes())
    for tensor in weights:
        np.testing.assert_array_equal(weights[tensor], weights_again[tensor])
    assert plan.task.defaults == again.task.defaults
    assert plan.task.label_names == again.task.label_names
    data = samples_of(name, 0)
    few = Samples(tuple(x[:75] for x in data.inputs), data.labels[:75])
    first, second = (
        Trainer(TaskRuntime(p), few).train(weights, plan.task.defaults, seed=1)
        for p in (plan, again)
    )
    assert first is not None
    assert second is not None
    for tensor in weights:
        np.testing.assert_allclose(first.weights[tensor], second.weights[tensor], atol=1e-6)


def test_a_person_that_is_not_there_is_named() -> None:
    with pytest.raises(Exception, match="there is no person 11"):
        load_samples("examples/wearables/source.py:person?id=11", shipped("wearables")[0].task)
