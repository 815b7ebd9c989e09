"""`midge simulate`: thousands of devices on this machine."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

from broker_bridge.errors import LocalError
from broker_bridge.link.local_broker import free_port, shipped_file
from server import screen
from server.commands.options import JSON
from server.fleet.home import Home, create

__all__ = ["simulate"]


@click.command()
@click.option("--devices", type=click.IntRange(1, 50_000), default=100, show_default=True)
@click.option("--drop", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="The share that loses power in each round it takes part in.")  # fmt: skip
@click.option("--slow", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="The share that trains for --slow-s seconds.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Who drops out, and who is slow.")
@click.option("--dir", "folder", type=click.Path(path_type=Path, file_okay=False),
              help="A fleet that gets them; default: a new one, gone at the end.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--cohort", type=click.IntRange(min=1),
              help="Updates that make a round; default: a tenth, at least ten.")  # fmt: skip
@click.option("--deadline", "deadline_s", default=300.0, show_default=True,
              help="Seconds for one round.")  # fmt: skip
@click.option("--task", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="A task file; default: the wearables example.")  # fmt: skip
@click.option("--train", default="fast", show_default=True,
              help="fast: noise; or a data source, as for `midge-device run`.")  # fmt: skip
@click.option("--train-s", default=0.5, show_default=True, help="Seconds that fast training takes.")
@click.option("--slow-s", default=20.0, show_default=True, help="The same for slow devices.")
@click.option("--away-s", default=10.0, show_default=True, help="Seconds without power.")
@click.option(
    "--processes", type=click.IntRange(1, 64), help="Default: one for each core, 4 at most."
)
@click.option(
    "--plain", is_flag=True, help="Devices without TLS, over a port on this machine only."
)
@click.option("--storm", is_flag=True, help="At the end kill the broker, and time the return.")
@JSON
def simulate(
    devices: int, drop: float, slow: float, seed: int, folder: Path | None, rounds: int,
    cohort: int | None, deadline_s: float, task: Path | None, train: str, train_s: float,
    slow_s: float, away_s: float, processes: int | None, plain: bool, storm: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run thousands of simulated devices on this machine, with real connections.

    \b
    Example:
      midge simulate --devices 1000 --drop 0.1 --slow 0.05 --seed 7 --rounds 3
    """
    from server.simulation.fleet import Options, run_simulation

    options = Options(
        devices=devices, processes=processes or min(4, os.cpu_count() or 1, devices),
        rounds=rounds, cohort=cohort or min(devices, max(10, devices // 10)),
        deadline_s=deadline_s, task=task or _wearables(), train=train, plain=plain, storm=storm,
        fate={"seed": seed, "drop": drop, "slow": slow, "train_s": train_s, "slow_s": slow_s,
              "away_s": away_s},
    )  # fmt: skip
    say: Callable[[str], None] = (lambda _: None) if as_json else click.echo
    with ExitStack() as stack:
        home = _fleet(folder, stack)
        found = run_simulation(home, options, say)
    if as_json:
        click.echo(json.dumps(found))
    else:
        screen.facts(found)


def _wearables() -> Path:
    path = shipped_file("mosquitto.conf").parent / "examples" / "wearables" / "wearables.task"
    if not path.is_file():
        raise LocalError("no task: say --task FILE, made by `midge task build`")
    return path


def _fleet(folder: Path | None, stack: ExitStack) -> Home:
    """The fleet in `folder`, or a new one there, or a new one that is gone at the end."""
    if folder is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="midge-fleet-")))
    if (folder / "midge.toml").is_file():
        return Home(folder)
    return create(folder, federation="demo", hosts=["127.0.0.1", "localhost"], port=free_port())
