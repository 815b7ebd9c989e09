"""`midge demo`: a whole federation on this machine."""

from pathlib import Path

import click

from broker_bridge.link.local_broker import Engine
from server.commands.options import JSON

__all__ = ["demo"]


@click.command()
@click.option("--rounds", default=20, show_default=True, help="The most rounds to run.")
@click.option("--accuracy", default=0.85, show_default=True, help="The target that ends the run.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False),
              help="Work in this new folder and leave it there.")  # fmt: skip
@click.option("--broker", "engine", type=click.Choice(["mosquitto", "iotcore"]),
              help="Which broker to start; default: the best one there is.")  # fmt: skip
@click.option("--plain", is_flag=True, help="Plain lines, as when not on a terminal.")
@JSON
def demo(
    rounds: int,
    accuracy: float,
    keep: Path | None,
    engine: Engine | None,
    plain: bool,
    as_json: bool,
) -> None:
    """Run a whole federation on this machine: ten people's smartwatches, real broker, mutual TLS.

    \b
    Example:
      midge demo --rounds 5
    """
    from server.demo.story import run_demo

    run_demo(
        rounds=rounds, accuracy=accuracy, keep=keep, engine=engine, plain=plain, as_json=as_json
    )
