"""`midge-device infer` and `midge-device predict`: use the newest model on this device."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from broker_bridge.console import stop_on_signals
from broker_bridge.errors import LocalError
from broker_bridge.systemd import Supervisor
from device_client.model import Kind
from device_client.options import FOLDER
from device_client.prediction import LockedModel, serve

__all__ = ["infer", "predict"]

_KIND = click.option(
    "--model", "kind", type=click.Choice(["global", "personal"]),
    help="Default: the personal model if there is one, else the global one.",
)  # fmt: skip


@click.command()
@click.option("--input", "paths", multiple=True, required=True,
              type=click.Path(path_type=Path, dir_okay=False),
              help="An .npy file; one for each input of the task.")  # fmt: skip
@FOLDER
@_KIND
@click.option("--raw", is_flag=True, help="As the sensor gave it: prepare it as the task says.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def infer(
    paths: tuple[Path, ...], folder: Path, kind: Kind | None, raw: bool, as_json: bool
) -> None:
    """Ask the newest model about the samples in an .npy file.

    \b
    Example:
      midge-device infer --dir ./ward-3 --input window.npy
    """
    inputs = [_read(path) for path in paths]
    with LockedModel(folder, kind=kind) as model:
        output, labels = model.predict(inputs, raw=raw)
        found = {"model": model.version, "kind": model.kind, "label": labels,
                 "output": output.tolist()}  # fmt: skip
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"model {found['model']} ({found['kind']})")
    for number, row in enumerate(output):
        label = f"{labels[number]}  " if labels else ""
        click.echo(f"{number:4}  {label}{np.array2string(row, precision=4, threshold=10)}")


@click.command()
@FOLDER
@_KIND
@click.option("--socket", "path", type=click.Path(path_type=Path, dir_okay=False),
              help="Where to listen; default: predict.sock in the device's folder.")  # fmt: skip
def predict(folder: Path, kind: Kind | None, path: Path | None) -> None:
    """Answer other programs on this machine over a Unix socket, until stopped.

    A question is a line of JSON, and so is the answer; newer models are taken up by themselves.

    \b
    Example:
      midge-device predict --dir ./ward-3 &
      echo '{"input": [[0.1, 0.2, 0.3]]}' | nc -U ward-3/predict.sock
    """
    stopped = stop_on_signals()
    chosen = path or folder / "predict.sock"
    turning = Supervisor().watched(stopped.is_set)
    serve(folder, chosen, turning, kind=kind, ready=lambda: click.echo(f"answering on {chosen}"))


def _read(path: Path) -> NDArray[Any]:
    """One array, never unpickled."""
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise LocalError(f"{path} is not an .npy file of numbers: {error}") from None
    if not isinstance(found, np.ndarray):
        raise LocalError(f"{path} is not an .npy file: write one with numpy.save")
    return found
