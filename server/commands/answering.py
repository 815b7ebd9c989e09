"""What the commands about devices share: a fleet's folder with its database, and an answer."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import click

from server.fleet.enrolment import TOKEN_HOURS
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["BY_HAND", "HOURS", "NAME", "opened", "say"]

NAME = click.argument("name")
HOURS = click.option(
    "--hours", default=float(TOKEN_HOURS), show_default=True,
    help="How long the one-time token lives.",
)  # fmt: skip
BY_HAND = click.option(
    "--by-hand", is_flag=True, help="Wait for `midge device accept` before it gets in."
)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[tuple[Home, Database]]:
    """The fleet in a folder, and its database. Raises LocalError."""
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db:
        yield home, db


def say(as_json: bool, text: str, **found: object) -> None:
    """Answer a person, or a script."""
    click.echo(json.dumps(found) if as_json else text)
