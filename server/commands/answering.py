"""What the commands about devices share: a fleet's folder with its database, and an answer."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from server.commands.options import DIR, JSON
from server.fleet.enrolment import TOKEN_HOURS
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["BY_HAND", "HOURS", "NAME", "Answer", "about_one", "opened"]

Answer = tuple[str, dict[str, object]]  # for a person; for a script, beside the device's name

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


def about_one(
    command: str, *options: Callable[..., Any]
) -> Callable[[Callable[..., Answer]], click.Command]:
    """Make the command `command NAME`, with --dir, these options and --json, of what it does.

    That is called with the fleet's folder, its database, the name and the options, says what it
    does in its docstring, and returns its answer.
    """

    def decorate(do: Callable[..., Answer]) -> click.Command:
        @functools.wraps(do)
        def run(name: str, folder: Path, as_json: bool, **given: Any) -> None:
            with opened(folder) as (home, db):
                text, found = do(home, db, name, **given)
            click.echo(json.dumps({"device": name} | found) if as_json else text)

        made: Callable[..., None] = run
        for option in reversed((NAME, DIR, *options, JSON)):
            made = option(made)
        return click.command(command)(made)

    return decorate
