"""The life of a device, one command for each step: docs/operating.md.

Each works on the fleet's folder, whether or not server and broker run; a server that runs
looks once a second whether anything was changed.
"""

import json
import time
from pathlib import Path

import click

from broker_bridge.errors import LocalError
from server import screen
from server.commands.answering import NAME, Answer, about_one, opened
from server.commands.joining import device_accept, device_add
from server.commands.leaving import device_remove, device_replace, device_revoke
from server.commands.options import DIR, JSON
from server.fleet.census import Entry, census, find, presences
from server.fleet.home import Home
from server.store.database import Database
from server.store.rows import DeviceStatus

__all__ = ["device"]


@click.group()
def device() -> None:
    """The life of a device: from `add` to `remove`.

    \b
    Example:
      midge device add ward-3 --dir fleet
    """


# ── Looking ─────────────────────────────────────────────────────────────────────────────


@device.command("list")
@DIR
@click.option("--status", type=click.Choice(["waiting", "enrolled", "suspended", "revoked"]),
              help="Only these.")  # fmt: skip
@JSON
def device_list(folder: Path, status: DeviceStatus | None, as_json: bool) -> None:
    """List the devices: who they are, when they were seen, how long their keys last.

    \b
    Example:
      midge device list --dir fleet --json
    """
    now = time.time()
    with opened(folder) as (home, db):
        found = census(db, status=status)
        said = presences(home) if found else {}
    rows = [each.json((said or {}).get(each.name), now) for each in found]
    if as_json:
        click.echo(json.dumps(rows))
        return
    columns = ("device", "status", "says", "last seen", "rounds", "software", "keys",
               "certificate", "fingerprint")  # fmt: skip
    screen.table(columns, [_cells(each, now) for each in rows])
    if said is None:
        click.echo("(the broker does not answer, so nobody knows what they say now)")


def _cells(row: dict[str, object], now: float) -> list[object]:
    says = row.get("presence")
    until, since = row.get("certified_until"), row.get("keys_since")
    return [
        row["device"],
        row["status"] + (" (to rotate)" if row.get("wanted") else ""),  # type: ignore[operator]
        says["state"] if isinstance(says, dict) else "-",
        screen.ago(row.get("last_seen")),
        row.get("rounds", "-"),
        row.get("software", "-"),
        "-" if since is None else screen.ago(since),
        f"{(until - now) / 86_400:.0f} d left" if isinstance(until, float) else "-",
        row.get("fingerprint", "-"),
    ]


@device.command("show")
@NAME
@DIR
@JSON
def device_show(name: str, folder: Path, as_json: bool) -> None:
    """Say all that is known of one device.

    \b
    Example:
      midge device show ward-3 --dir fleet
    """
    now = time.time()
    with opened(folder) as (home, db):
        entry = _entry(db, name)
        said = presences(home)
    found = entry.json((said or {}).get(name), now)
    if as_json:
        click.echo(json.dumps(found))
        return
    for key in ("last_seen", "keys_since", "enrolled_at"):
        if key in found:
            found[key] = screen.ago(found[key])
    for key in ("certified_until", "token_expires"):
        if isinstance(found.get(key), float):
            left = (float(str(found[key])) - now) / 86_400
            found[key] = f"in {left:.1f} days" if left > 0 else "it is over"
    screen.facts({key.replace("_", " "): value for key, value in found.items() if value != ""})


def _entry(db: Database, name: str) -> Entry:
    for each in census(db):
        if each.name == name:
            return each
    raise LocalError(f"there is no device {name!r}; see `midge device list`")


# ── Steering ────────────────────────────────────────────────────────────────────────────


@about_one("rotate")
def device_rotate(_home: Home, db: Database, name: str) -> Answer:
    """Ask a device for new keys; it makes them when it is next heard of.

    \b
    Example:
      midge device rotate ward-3 --dir fleet
    """
    with db.transaction() as tx:
        row = find(tx, name)
        if row.status not in ("enrolled", "suspended"):
            raise LocalError(f"the device {name!r} is {row.status}; only an enrolled one rotates")
        tx.set_device_wanted(name, "rotate")
        tx.count_fleet_change()
    text = f"{name} will be asked for new keys as soon as it is heard of"
    return text, {"wanted": "rotate"}


@about_one("suspend")
def device_suspend(_home: Home, db: Database, name: str) -> Answer:
    """Keep a device out of rounds until `resume`. It keeps its keys, and what it has learnt.

    \b
    Example:
      midge device suspend ward-3 --dir fleet
    """
    _set(db, name, "enrolled", "suspended")
    text = f"suspended {name}; it may come back: midge device resume {name}"
    return text, {"status": "suspended"}


@about_one("resume")
def device_resume(_home: Home, db: Database, name: str) -> Answer:
    """Let a suspended device take part again.

    \b
    Example:
      midge device resume ward-3 --dir fleet
    """
    _set(db, name, "suspended", "enrolled")
    return f"{name} takes part again", {"status": "enrolled"}


def _set(db: Database, name: str, before: DeviceStatus, after: DeviceStatus) -> None:
    with db.transaction() as tx:
        row = find(tx, name)
        if row.status == "revoked":
            raise LocalError(
                f"the device {name!r} was revoked, for good; for a new board of this name: "
                f"`midge device replace {name}`"
            )
        if row.status not in (before, after):
            raise LocalError(f"the device {name!r} is {row.status}; only one that is {before} can")
        if row.status != after:
            tx.set_device_status(name, after)
            tx.count_fleet_change()


for _command in (
    device_add, device_accept, device_rotate, device_suspend, device_resume, device_revoke,
    device_replace, device_remove,
):  # fmt: skip
    device.add_command(_command)
