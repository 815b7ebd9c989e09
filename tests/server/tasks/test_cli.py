"""`midge task` as a person uses it, and as a person gets it wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from broker_bridge.task.taskfile import decode_task

MODEL = """
import keras

def model():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,), name="sensor"), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), metrics=["accuracy"])
    return model

def bare():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])

def broken():
    raise RuntimeError("no such weights")

def nothing():
    return 5

class Choosing(keras.layers.Layer):
    def call(self, x):
        return x if x[0, 0] > 0 else -x

def choosing():
    inputs = keras.Input((4,))
    return keras.Model(inputs, Choosing()(inputs))

def spoilt():
    spoilt = model()
    spoilt.layers[0].kernel.assign(spoilt.layers[0].kernel * float("nan"))
    return spoilt
"""
TASK = "examples/digits/digits.task"


def midge_task(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.tasks.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "my_model.py"
    file.write_text(MODEL)
    return file


@pytest.fixture(scope="module")
def built(model_file: Path) -> Path:
    done = midge_task(
        "build", str(model_file), "--batch-size", "8", "--learning-rate", "0.1", "--epochs", "3",
        "--label-name", "a", "--label-name", "b", "--label-name", "c", "--licence", "our own",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checked with tflite-runtime 2.14.0" in done.stdout
    return model_file.with_suffix(".task")


def test_build_writes_what_it_was_told(built: Path) -> None:
    task = decode_task(built.read_bytes())[0].task
    assert task.name == "my_model"
    assert task.batch_size == 8
    assert task.defaults.epochs == 3
    assert task.defaults.learning_rate == pytest.approx(0.1)
    assert task.label_names == ("a", "b", "c")
    assert task.licence == "our own"
    assert [spec.name for spec in task.inputs] == ["sensor"]


def test_an_uncompiled_model_is_completed_on_the_command_line(
    model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bare.task"
    done = midge_task(
        "build", str(model_file), "--function", "bare", "-o", str(out), "--loss", "mse",
        "--optimiser", "adam", "--metric", "mae",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert decode_task(out.read_bytes())[0].task.metrics == ("mae",)


def test_verify_compares_on_the_users_own_data(
    model_file: Path, built: Path, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    data = tmp_path / "samples.npz"
    np.savez(data, x=draw.normal(size=(20, 4)), y=draw.integers(0, 3, 20))
    done = midge_task("verify", str(model_file), str(built), "--data", f"npz:{data}", "--json")
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout).values():
        assert max(found.values()) < 1e-4
        assert len(found) == 2 + 3  # two tensors; loss, evaluation, output


def test_verify_refuses_a_task_of_another_model(model_file: Path) -> None:
    done = midge_task("verify", str(model_file), TASK)
    assert done.returncode == 2
    assert "the task 'digits' is of another model" in done.stderr


def test_inspect_prints_costs_without_tensorflow() -> None:
    done = midge_task("inspect", TASK, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["parameters"] == 21546
    assert facts["bytes up each round"] == 4 * 21546
    assert facts["operations"]["CONV_2D"] == 2
    assert facts["operations"]["TRANSPOSE_CONV"] == 1
    for measured in facts["measured on this machine"].values():
        assert measured["step_ms"] > 0
        assert measured["peak_mb"] > 10


def test_try_trains_and_draws_the_curve(tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    done = midge_task(
        "try", TASK, "--data", "examples/digits/source.py:device?id=1", "--epochs", "3",
        "--test", "examples/digits/source.py:test", "--picture", str(picture),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss by epoch:" in done.stdout
    assert picture.read_text().startswith("<svg")


def test_inspect_and_try_never_import_tensorflow() -> None:
    code = (
        "import sys; sys.argv = ['x']; import server.tasks.cli; "
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build", "/no/such/model.py"], "there is no Python file /no/such/model.py"),
        (["build", "{}", "--function", "missing"], "has no function 'missing' that returns"),
        (["build", "{}", "--function", "broken"], "failed: RuntimeError: no such weights"),
        (["build", "{}", "--function", "nothing"], "nothing() returned int, not a Keras model"),
        (["build", "{}", "--function", "bare"], "has no loss: compile it with one"),
        (["build", "{}", "--function", "choosing"], "Choosing\n"),
        (["build", "{}", "--function", "spoilt"], "'sequential/dense/kernel' starts as NaN"),
        (["build", "{}", "--learning-rate", "nan"], "learning_rate is nan: give a number from 0"),
        (["build", "{}", "--label-name", "one"], "1 label names, and the model tells 3 classes"),
        (["build", "{}", "--loss", "huh"], "there is no loss 'huh'"),
        (["build", "{}", "-o", "/no/such/folder/x.task"], "/no/such/folder/x.task"),
        (["inspect", "/no/such.task"], "/no/such.task: "),
        (["inspect", "README.md"], "README.md: this is not a midge task"),
        (["try", TASK, "--data", "npz:/no/such.npz"], "cannot read /no/such.npz"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    model_file: Path, arguments: list[str], sentence: str
) -> None:
    done = midge_task(*(argument.format(model_file) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
