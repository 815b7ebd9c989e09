"""Make a fleet."""

import json
from pathlib import Path

import click

from server.commands.options import JSON, PORT
from server.fleet.home import create

__all__ = ["init"]


_ROOT = """\
{path} is the root of trust. Devices know the server by its signature alone.
  for     new keys for the server, if these are stolen or old: midge keys rotate --root FILE
  where   two USB sticks in two drawers; not on this machine, nor in its backups
  stolen  whoever has it can pose as your server: make a new federation
  lost    all goes on, but the server's keys can never be replaced"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--federation", default="demo", show_default=True, help="Its name, in every topic.")
@click.option("--host", "hosts", multiple=True, default=("localhost", "127.0.0.1"),
              show_default=True, help="Where the broker is; repeat for more names.")  # fmt: skip
@click.option("--port", type=PORT, default=8883, show_default=True, help="The broker's port.")
@JSON
def init(folder: Path, federation: str, hosts: tuple[str, ...], port: int, as_json: bool) -> None:
    """Make a fleet in FOLDER: keys, a private CA, certificates, settings.

    \b
    Example:
      midge init fleet --host broker.example.org --host 192.168.1.10
    """
    create(folder, federation=federation, hosts=list(hosts), port=port)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "federation": federation}))
        return
    click.echo(f"made the fleet {federation!r} in {folder}")
    click.echo(_ROOT.format(path=folder / "offline" / "root.json"))
    click.echo(f"next: midge broker --dir {folder}")
