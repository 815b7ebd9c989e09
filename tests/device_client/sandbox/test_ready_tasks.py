"""The six ready tasks train locked in, in both runtimes, and to the same bits as outside.

The same bits also show that the runtime chose the same kernels: it reads /proc for that.
"""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from broker_bridge.task.runtime import RUNTIMES
from broker_bridge.task.taskfile import Training, decode_task
from broker_bridge.wire import weights
from broker_bridge.wire.envelope import sha256
from device_client.sandbox.trainer import Sandbox, SandboxSettings
from server.tasks.checks import random_steps
from tests.fleets import ROOT

NAMES = ("wearables", "digits", "keyboard", "mnist", "turbines", "aircraft")
MODULES = {"tflite-runtime": "tflite_runtime", "ai-edge-litert": "ai_edge_litert"}

FREE = """
import json, sys
from pathlib import Path
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import read_npz
from broker_bridge.task.taskfile import Training, decode_task
from broker_bridge.wire import weights
from broker_bridge.wire.envelope import sha256
from device_client.trainer import Trainer
folder, runtime, *names = sys.argv[1:]
found = {}
for name in names:
    plan, model = decode_task(Path(f"examples/{name}/{name}.task").read_bytes())
    samples = read_npz(f"{folder}/{name}.npz", plan.task)
    trainer = Trainer(TaskRuntime(plan, prefer=runtime), samples)
    trained = trainer.train(model, Training(epochs=2, learning_rate=0.01), seed=1)
    found[name] = sha256(weights.encode(trained.weights)).hex()
print(json.dumps(found))
"""


def task_of(name):
    return decode_task((ROOT / "examples" / name / f"{name}.task").read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random samples that fit each task, three batches and a half."""
    made = tmp_path_factory.mktemp("samples")
    for name in NAMES:
        task = task_of(name)[0].task
        parts = random_steps(task, 4)
        inputs = zip(*(part.inputs for part in parts), strict=True)
        arrays = {
            spec.name: np.concatenate(each) for spec, each in zip(task.inputs, inputs, strict=True)
        }
        np.savez(made / f"{name}.npz", y=np.concatenate([p.labels for p in parts]), **arrays)
    return made


@cache
def trained_freely(folder, runtime):
    done = subprocess.run(
        [sys.executable, "-c", FREE, str(folder), runtime, *NAMES],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_ready_task_trains_locked_in_as_it_does_outside(folder, name, runtime):
    pytest.importorskip(MODULES[runtime], reason=f"{runtime} is not installed")
    plan, model = task_of(name)
    sandbox = Sandbox(SandboxSettings(f"npz:{folder}/{name}.npz", prefer=runtime))
    try:
        trainer = sandbox.load(plan)
        assert trainer.runtime_name.startswith(runtime)
        trained = trainer.train(model, Training(epochs=2, learning_rate=0.01), seed=1)
        measured = trainer.evaluate(trained.weights)
    finally:
        sandbox.close()
    assert sha256(weights.encode(trained.weights)).hex() == trained_freely(folder, runtime)[name]
    assert measured.examples == trained.examples
