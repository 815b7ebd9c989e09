"""`midge task`: build a task from a Keras model, look at it, verify it, try it.

TensorFlow is imported by `build` and `verify` only, when they run.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from broker_bridge.console import run_command
from broker_bridge.errors import LocalError
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Task
from server.tasks import checks, curve, field
from server.tasks.files import read_task, write_task

__all__ = ["task"]

_SOURCES = "npz:FILE, csv:FOLDER, store:FILE, module:function or FILE.py:function"
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def task() -> None:
    """Turn a Keras model into a task that devices can train.

    A model file is Python: a function `model()` that returns a Keras model.

    \b
    Example:
      midge task build my_model.py -o my.task
      midge task inspect my.task
      midge task verify my_model.py my.task --data npz:samples.npz
      midge task try my.task --data npz:samples.npz --epochs 5
    """


@task.command()
@click.argument("model", type=_FILE)
@click.option("-o", "--output", type=_FILE, help="Default: the model's name with .task.")
@click.option(
    "--function", default="model", show_default=True, help="The function in MODEL that returns it."
)
@click.option("--name", help="The task's name; default: the file's.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Samples in one training step; default 16."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the local data in a round; default 1."
)
@click.option("--learning-rate", type=float, help="Default: the optimiser's.")
@click.option("--proximal-mu", type=float, help="Weight of the FedProx term; default 0: off.")
@click.option(
    "--clip-norm",
    type=float,
    help="Bound on the gradient's norm; 0: off. Default: the optimiser's.",
)
@click.option("--loss", help="A Keras loss by name, if the model is not compiled.")
@click.option("--optimiser", help="A Keras optimiser by name, if the model is not compiled.")
@click.option("--metric", "metrics", multiple=True, help="A Keras metric by name; repeatable.")
@click.option("--label-name", "label_names", multiple=True, help="One for each class, in order.")
@click.option("--licence", help="A line on where model and data come from.")
@click.option("--keep-optimiser-state", is_flag=True, default=None,
              help="The device goes on with its optimiser's state in the next round.")  # fmt: skip
def build(model: Path, output: Path | None, function: str, **given: Any) -> None:
    """Build the task of the Keras model that MODEL's function returns, and check it.

    What is not said here is taken from the file's `options`, then from the compiled model.

    \b
    Example:
      midge task build my_model.py -o my.task --batch-size 16 --licence "our own data"
    """
    network, options, exporter = _load(model, function)
    named = {name: value for name, value in given.items() if value not in (None, ())}
    data = exporter.build_task(network, dataclasses.replace(options, **named))
    output = output or model.with_suffix(".task")
    write_task(output, data)
    plan, _ = read_task(output)
    click.echo(f"{output}: {plan.task.parameters} parameters, {len(data)} bytes")
    for name, value in plan.task.versions.items():
        click.echo(f"  {name} {value}")


@task.command()
@click.argument("file", type=_FILE)
@click.option("--measure/--no-measure", default=True, show_default=True,
              help="Train a few steps here to measure memory and time.")  # fmt: skip
@click.option("--dir", "folder", type=click.Path(path_type=Path, file_okay=False),
              help="A fleet's folder: add what its connected devices measured.")  # fmt: skip
@click.option("--device", help="Of this device alone; needs --dir.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(
    file: Path, measure: bool, folder: Path | None, device: str | None, as_json: bool
) -> None:
    """Print what the task in FILE costs: bytes, memory, time for each step.

    A device's figures are of its last training; it keeps them in its state on the broker.

    \b
    Example:
      midge task inspect my.task
      midge task inspect my.task --dir fleet --device ward-3
    """
    if device is not None and folder is None:
        raise LocalError("say with --dir which fleet that device is in")
    plan, weights = read_task(file)
    facts = _facts(plan.task)
    # First: whether there is such a fleet is known at once.
    devices = None if folder is None else field.read_devices(folder, device=device)
    if measure:
        facts["measured on this machine"] = {}
        for name in checks.installed_runtimes():
            steps = checks.random_steps(plan.task, 1)
            result = checks.run_on_device(
                plan, weights, steps, plan.task.defaults, runtime=name, repeat=20
            )
            facts["measured on this machine"][result.runtime] = {
                "load_ms": round(result.load_ms, 2),
                "step_ms": round(statistics.median(result.step_ms), 3),
                "peak_mb": round(result.peak_mb, 1),
            }
    if devices is not None:
        facts["measured on devices"] = field.figures(devices, plan)
    _show(facts, as_json=as_json)
    if devices is not None and not as_json and not facts["measured on devices"]:
        click.echo(f"    {field.why_none(devices, plan)}")


@task.command()
@click.argument("model", type=_FILE)
@click.argument("file", type=_FILE)
@click.option("--data", help=f"Your samples: {_SOURCES}. Default: random ones.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1, 100),
              help="Training steps to compare.")  # fmt: skip
@click.option("--function", default="model", show_default=True,
              help="The function in MODEL that returns the model.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(
    model: Path, file: Path, data: str | None, steps: int, function: str, as_json: bool
) -> None:
    """Train MODEL in Keras and FILE in the device runtimes, and print every difference.

    MODEL is the Python file that the task in FILE was built from. Differences are relative to
    what training changed; above 1e-4 the task is refused.

    \b
    Example:
      midge task verify my_model.py my.task --data npz:samples.npz
    """
    plan, _ = read_task(file)
    network, options, exporter = _load(model, function)
    from server.tasks.selfcheck import check_task

    subject = exporter.subject_of(network, options, plan.task)
    batches = _batches(file, plan.task, data, steps) if data else None
    found = check_task(plan, subject, steps=batches or checks.random_steps(plan.task, steps))
    _show(found, as_json=as_json)
    if not as_json:
        click.echo("every tensor trains as in Keras")


@task.command(name="try")
@click.argument("file", type=_FILE)
@click.option("--data", required=True, help=f"Your samples: {_SOURCES}.")
@click.option("--test", help="Samples to measure the result on, if you have some.")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the data; default: as in the task."
)
@click.option("--learning-rate", type=float, help="Default: as in the task.")
@click.option("--seed", default=1, show_default=True, help="Order of samples and noise.")
@click.option("--picture", type=_FILE, help="Write the learning curve to this .svg file.")
def try_command(file: Path, data: str, picture: Path | None, **given: Any) -> None:
    """Train FILE here as one device would, and draw its learning curve.

    \b
    Example:
      midge task try my.task --data npz:samples.npz --epochs 10 --picture curve.svg
    """
    command = [sys.executable, "-m", "device_client.cli", "try", str(file), "--data", data]
    for name, value in given.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    # Standard error is the terminal's: the device's progress bar and its error sentence.
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode != 0:
        raise click.exceptions.Exit(done.returncode)
    facts = json.loads(done.stdout)
    losses = facts.pop("curve")
    _show(facts, as_json=False)
    click.echo(f"loss by epoch: {losses[0]:.3f} {curve.blocks(losses)} {losses[-1]:.3f}")
    if picture is not None:
        picture.write_text(curve.svg(losses, title=f"{facts['task']}: loss by epoch"), "utf-8")
        click.echo(f"the curve is in {picture}")


def _load(model: Path, function: str) -> tuple[Any, Any, Any]:
    """Return (Keras model, its options, the exporter module)."""
    if not model.is_file():  # known without waiting for TensorFlow
        raise LocalError(f"there is no Python file {model}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # TensorFlow 2.21 with oneDNN corrupts memory in the gradient of a 1 x 1 convolution of
    # stride 2: the process dies in Keras' half of the check.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from server.tasks import exporter
    except ImportError as error:
        raise LocalError(
            f"TensorFlow is needed for this ({error}): pip install 'midge[export]'"
        ) from None
    network, options = exporter.load_model_file(str(model), function)
    return network, options, exporter


def _batches(file: Path, about: Task, data: str, count: int) -> list[Samples]:
    """Return the first batches of the data, read by the device's own code."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "samples.npz")
        command = [sys.executable, "-m", "device_client.data", str(file), data, out]
        done = subprocess.run(command, stderr=subprocess.PIPE, check=False, text=True)
        if done.returncode != 0:
            raise LocalError(done.stderr.strip().splitlines()[-1])
        with np.load(out, allow_pickle=False) as arrays:
            found = dict(arrays)
    inputs = [found[f"x{i}"] for i in range(len(about.inputs))]
    weights = found.get("sample_weight", np.ones(len(found["y"]), np.float32))
    size = about.batch_size
    return [
        Samples(
            tuple(x[i : i + size] for x in inputs), found["y"][i : i + size], weights[i : i + size]
        )
        for i in range(0, min(len(weights), count * size), size)
    ]


def _facts(about: Task) -> dict[str, Any]:
    travels = sum(spec.nbytes for spec in about.weights)
    return {
        "name": about.name,
        "description": about.description,
        "licence": about.licence,
        "inputs": {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in about.inputs},
        "label": f"{about.label.dtype}{list(about.label.shape)} in {about.label_range}",
        "label_names": list(about.label_names),
        "loss": about.loss,
        "metrics": list(about.metrics),
        "optimiser": about.optimiser,
        "batch_size": about.batch_size,
        "defaults": {
            name: getattr(about.defaults, name)
            for name in ("epochs", "learning_rate", "proximal_mu", "clip_norm")
        },
        "parameters": about.parameters,
        "trainable tensors": about.trainable_count,
        "statistics tensors": len(about.weights) - about.trainable_count,
        "bytes down each round": travels,
        "bytes up each round": travels,
        "bytes of the plan, once": about.tflite_bytes,
        "operations": about.operations,
        "versions": about.versions,
    }


def _show(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, inner in value.items():
                click.echo(f"    {key:28} {_brief(inner)}")
        elif value not in ("", [], None):
            click.echo(f"{name:28} {_brief(value)}")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_brief, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_command(task, "midge task")
