"""How a device comes into the fleet: `midge device add`, `accept`."""

import json
import sys
import time
from pathlib import Path

import click

from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import fingerprint
from server.commands.answering import BY_HAND, HOURS, Answer, about_one, opened
from server.commands.login import broker_for, login_options
from server.commands.options import DIR, JSON
from server.fleet import additions
from server.fleet.broker_watch import by_hand as broker_by_hand
from server.fleet.broker_watch import has_heard, left_to_do
from server.fleet.census import find
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["device_accept", "device_add"]


@click.command("add")
@click.argument("name", required=False)
@DIR
@HOURS
@BY_HAND
@click.option("--count", type=click.IntRange(1, additions.COUNT_MAX), help="Add this many.")
@click.option("--name", "pattern", help="With --count: their names, such as 'ward-{:03}'.")
@click.option("--first", default=1, show_default=True, type=click.IntRange(0, 10**9),
              help="With --count: the first number.")  # fmt: skip
@click.option("--csv", "csv_path", type=click.Path(path_type=Path, dir_okay=False),
              help="With --count: where to list them; default: beside the bundles.")  # fmt: skip
@login_options
@JSON
def device_add(
    name: str | None,
    folder: Path,
    hours: float,
    by_hand: bool,
    count: int | None,
    pattern: str | None,
    first: int,
    csv_path: Path | None,
    as_json: bool,
    **login: str | None,
) -> None:
    """Make a bundle with a one-time token for a new device NAME, or for many.

    \b
    Example:
      midge device add ward-3 --dir fleet
      midge device add --count 200 --name 'ward-{:03}' --hours 72 --dir fleet
      midge device add ward-3 --broker-username ward-3 --broker-password-file ward-3.password
    """
    names = _names(name, count, pattern, first)
    with opened(folder) as (home, db):
        before = home.roster().epoch
        added = additions.add_many(home, db, names, now=time.time(), hours=hours, by_hand=by_hand,
                                   broker=broker_for(home, **login))  # fmt: skip
        after = home.roster().epoch
        told = after == before or has_heard(home, after)
        todo = "" if told else broker_by_hand(home, restart=True)
        if name is None:
            csv_path = csv_path or home.bundle(f"{names[0]}-to-{names[-1]}").with_suffix(".csv")
            additions.write_csv(csv_path, added)
    if as_json:
        found = [
            {"device": each.device, "bundle": str(each.bundle), "hours": hours,
             "expires": each.expires, "broker_run": todo}
            for each in added
        ]  # fmt: skip
        click.echo(json.dumps({"csv": str(csv_path), "devices": found} if name is None
                              else found[0]))  # fmt: skip
        return
    if not told:
        click.echo(f"the name was used before; {left_to_do('who had it', todo)}")
    if name is None:
        click.echo(f"wrote {len(added)} bundles, each a secret, and their list: {csv_path}")
    else:
        _say_next(added[0], hours=hours, by_hand=by_hand)


def _names(name: str | None, count: int | None, pattern: str | None, first: int) -> list[str]:
    """The one name, or those that the options make. Raises LocalError."""
    if name is not None and count is None and pattern is None:
        return [name]
    if name is None and count is not None and pattern is not None:
        return additions.names_from(pattern, count=count, first=first)
    raise LocalError(
        "say which: `midge device add ward-3`, or for many "
        "`midge device add --count 200 --name 'ward-{:03}'`"
    )


def _say_next(added: additions.Added, *, hours: float, by_hand: bool) -> None:
    """What was made, and what a person does with it."""
    path = added.bundle
    click.echo(f"wrote {path}: it holds a secret and enrols one device within {hours:g} hours")
    click.echo(f"next, on the device: midge-device run --bundle {path.name} --dir STATE --data …")
    if by_hand:
        click.echo(f"then, here: midge device accept {added.device}")


@about_one(
    "accept",
    click.option("--fingerprint", "given", help="What the device shows; without it you are asked."),
)
def device_accept(_home: Home, db: Database, name: str, *, given: str | None) -> Answer:
    """Let a device in that was added --by-hand, after comparing its fingerprint.

    \b
    Example:
      midge device accept ward-3 --fingerprint 15db-5a0a-96ec-1f0b --dir fleet
    """
    with db.reading() as tx:
        row = find(tx, name)
    if row.status != "waiting":
        raise LocalError(f"the device {name!r} does not wait: it is {row.status}")
    shown = fingerprint(row.sign_public)
    if given is None:
        _ask(name, shown)
    elif given.strip().lower() != shown:
        raise LocalError(
            f"the device that waits as {name!r} has the fingerprint {shown}, not {given}; if "
            f"the device shows another, somebody else holds its token: `midge device revoke "
            f"{name}`"
        )
    with db.transaction() as tx:
        now = tx.device(name)  # it may have been revoked while we were asking
        if now is None or (now.status, now.sign_public) != ("waiting", row.sign_public):
            raise LocalError(f"the device {name!r} has changed meanwhile; look again")
        tx.set_device_status(name, "enrolled")
        tx.count_fleet_change()
    return f"accepted {name}", {"status": "enrolled", "fingerprint": shown}


def _ask(name: str, shown: str) -> None:
    if not sys.stdin.isatty():
        raise LocalError(
            f"{name} waits with the fingerprint {shown}; if the device shows the same, say "
            f"--fingerprint {shown}"
        )
    click.echo(f"{name} waits with the fingerprint {shown}")
    if not click.confirm("does the device show the same"):
        raise LocalError(
            f"then somebody else holds its token: `midge device revoke {name}`, and add it anew"
        )
