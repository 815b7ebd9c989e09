"""Options that several commands share."""

from pathlib import Path

import click

from broker_bridge.errors import LocalError

__all__ = ["DIR", "JSON", "PORT", "host_port"]

DIR = click.option(
    "--dir", "folder", envvar="MIDGE_DIR",
    type=click.Path(path_type=Path, file_okay=False, readable=False),  # said better by Home.find
    default=Path("fleet"), show_default=True, help="The fleet's folder.",
)  # fmt: skip
PORT = click.IntRange(1, 65_535)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def host_port(address: str) -> tuple[str, int]:
    """Take HOST:PORT apart. Raises LocalError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise LocalError(f"{address!r} is not HOST:PORT; write for example localhost:8883")
    return host, int(port)
