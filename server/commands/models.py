"""The versions of the global model: list them, export one."""

import contextlib
import json
from pathlib import Path

import click
import numpy as np

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from broker_bridge.wire import weights
from server import screen
from server.commands.options import DIR, JSON
from server.fleet.home import Home
from server.store.database import Database
from server.store.models import ModelFiles

__all__ = ["model"]


@click.group()
def model() -> None:
    """List and export the versions of the global model.

    \b
    Example:
      midge model export --dir fleet -o model.npz
    """


@model.command("list")
@DIR
@JSON
def model_list(folder: Path, as_json: bool) -> None:
    """List the models, newest first.

    \b
    Example:
      midge model list --dir fleet
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        found = tx.models(limit=1000)
    kept = set(ModelFiles(home.state / "models").versions())
    rows = [
        {"version": m.version, "round": m.round, "bytes": m.size_bytes, "digest": m.digest.hex(),
         "metrics": json.loads(m.metrics_json), "on_disk": m.version in kept}
        for m in found
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows))
    else:
        screen.table(["version", "round", "bytes", "metrics", "digest"],
                     [[r["version"], r["round"], r["bytes"], screen.brief(r["metrics"]),
                       str(r["digest"])[:12]] for r in rows])  # fmt: skip


@model.command("export")
@DIR
@click.option("--version", "number", type=int, help="Which; default: the newest.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False),
              help="An .npz file with one array for each tensor.")  # fmt: skip
def model_export(folder: Path, number: int | None, output: Path) -> None:
    """Write a model's weights to an .npz file.

    \b
    Example:
      midge model export --dir fleet -o model.npz
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        row = tx.latest_model() if number is None else tx.model(number)
    if row is None:
        raise LocalError("there is no such model; see `midge model list`")
    tensors = weights.decode(ModelFiles(home.state / "models").read(row.version, row.digest))
    if output.suffix != ".npz":
        raise LocalError(f"{output}: the name must end in .npz")
    with disk_errors(output), output.open("wb") as file:
        np.savez(file, **tensors)
    click.echo(f"wrote model {row.version} to {output}")
