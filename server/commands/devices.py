"""The life of a device, one command for each step: docs/operating.md.

Each works on the fleet's folder, whether or not server and broker run; a server that runs
looks once a second whether anything was changed.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import fingerprint
from server import screen
from server.commands.options import DIR, JSON
from server.fleet import additions
from server.fleet.broker_watch import by_hand as broker_by_hand
from server.fleet.broker_watch import has_heard
from server.fleet.census import Entry, census, find, presences
from server.fleet.enrolment import TOKEN_HOURS
from server.fleet.expulsion import expel
from server.fleet.home import Home
from server.fleet.roster import Roster
from server.store.database import Database
from server.store.rows import DeviceStatus

__all__ = ["device"]

_NAME = click.argument("name")
_HOURS = click.option(
    "--hours", default=float(TOKEN_HOURS), show_default=True,
    help="How long the one-time token lives.",
)  # fmt: skip
_BY_HAND = click.option(
    "--by-hand", is_flag=True, help="Wait for `midge device accept` before it gets in."
)


@click.group()
def device() -> None:
    """The life of a device: from `add` to `remove`.

    \b
    Example:
      midge device add ward-3 --dir fleet
    """


@contextlib.contextmanager
def _fleet(folder: Path) -> Iterator[tuple[Home, Database]]:
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db:
        yield home, db


# ── In ──────────────────────────────────────────────────────────────────────────────────


@device.command("add")
@click.argument("name", required=False)
@DIR
@_HOURS
@_BY_HAND
@click.option("--count", type=click.IntRange(1, additions.COUNT_MAX), help="Add this many.")
@click.option("--name", "pattern", help="With --count: their names, such as 'ward-{:03}'.")
@click.option("--first", default=1, show_default=True, type=click.IntRange(0, 10**9),
              help="With --count: the first number.")  # fmt: skip
@click.option("--csv", "csv_path", type=click.Path(path_type=Path, dir_okay=False),
              help="With --count: where to list them; default: beside the bundles.")  # fmt: skip
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
) -> None:
    """Make a bundle with a one-time token for a new device NAME, or for many.

    \b
    Example:
      midge device add ward-3 --dir fleet
      midge device add --count 200 --name 'ward-{:03}' --hours 72 --dir fleet
    """
    if (name is None) == (count is None) or (count is None) != (pattern is None):
        raise LocalError(
            "say which: `midge device add ward-3`, or for many "
            "`midge device add --count 200 --name 'ward-{:03}'`"
        )
    names = [name] if name is not None else []
    if count is not None and pattern is not None:
        names = additions.names_from(pattern, count=count, first=first)
    with _fleet(folder) as (home, db):
        before = home.roster()
        added = additions.add_many(home, db, names, now=time.time(), hours=hours, by_hand=by_hand)
        opened = home.roster()
        told = opened.epoch == before.epoch or has_heard(home, opened.epoch)
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
    if todo:
        click.echo(f"the name was used before; if you run mosquitto yourself, run there: {todo}")
    if name is None:
        click.echo(f"wrote {len(added)} bundles, each a secret, and their list: {csv_path}")
        return
    path = added[0].bundle
    click.echo(f"wrote {path}: it holds a secret and enrols one device within {hours:g} hours")
    click.echo(f"next, on the device: midge-device run --bundle {path.name} --dir STATE --data …")
    if by_hand:
        click.echo(f"then, here: midge device accept {name}")


@device.command("accept")
@_NAME
@DIR
@click.option("--fingerprint", "given", help="What the device shows; without it you are asked.")
@JSON
def device_accept(name: str, folder: Path, given: str | None, as_json: bool) -> None:
    """Let a device in that was added --by-hand, after comparing its fingerprint.

    \b
    Example:
      midge device accept ward-3 --fingerprint 15db-5a0a-96ec-1f0b --dir fleet
    """
    with _fleet(folder) as (_, db):
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
    _say(as_json, f"accepted {name}", device=name, status="enrolled", fingerprint=shown)


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
    with _fleet(folder) as (home, db):
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
@_NAME
@DIR
@JSON
def device_show(name: str, folder: Path, as_json: bool) -> None:
    """Say all that is known of one device.

    \b
    Example:
      midge device show ward-3 --dir fleet
    """
    now = time.time()
    with _fleet(folder) as (home, db):
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


@device.command("rotate")
@_NAME
@DIR
@JSON
def device_rotate(name: str, folder: Path, as_json: bool) -> None:
    """Ask a device for new keys; it makes them when it is next heard of.

    \b
    Example:
      midge device rotate ward-3 --dir fleet
    """
    with _fleet(folder) as (_, db), db.transaction() as tx:
        row = find(tx, name)
        if row.status not in ("enrolled", "suspended"):
            raise LocalError(f"the device {name!r} is {row.status}; only an enrolled one rotates")
        tx.set_device_wanted(name, "rotate")
        tx.count_fleet_change()
    text = f"{name} will be asked for new keys as soon as it is heard of"
    _say(as_json, text, device=name, wanted="rotate")


@device.command("suspend")
@_NAME
@DIR
@JSON
def device_suspend(name: str, folder: Path, as_json: bool) -> None:
    """Keep a device out of rounds until `resume`. It keeps its keys, and what it has learnt.

    \b
    Example:
      midge device suspend ward-3 --dir fleet
    """
    _set(folder, name, "enrolled", "suspended")
    text = f"suspended {name}; it may come back: midge device resume {name}"
    _say(as_json, text, device=name, status="suspended")


@device.command("resume")
@_NAME
@DIR
@JSON
def device_resume(name: str, folder: Path, as_json: bool) -> None:
    """Let a suspended device take part again.

    \b
    Example:
      midge device resume ward-3 --dir fleet
    """
    _set(folder, name, "suspended", "enrolled")
    _say(as_json, f"{name} takes part again", device=name, status="enrolled")


def _set(folder: Path, name: str, before: DeviceStatus, after: DeviceStatus) -> None:
    with _fleet(folder) as (_, db), db.transaction() as tx:
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


# ── Out ─────────────────────────────────────────────────────────────────────────────────


@device.command("revoke")
@_NAME
@DIR
@JSON
def device_revoke(name: str, folder: Path, as_json: bool) -> None:
    """Shut a device out, for good: its keys, its certificates, its update in the open round.

    The others get a new fleet key.

    \b
    Example:
      midge device revoke ward-3 --dir fleet
    """
    with _fleet(folder) as (home, db):
        with db.reading() as tx:
            known = tx.device(name)
            if known is not None and known.status == "removed":
                find(tx, name)
        roster = expel(home, db, name, now=time.time())
        _tell_broker(home, roster, as_json, f"revoked {name}", device=name, status="revoked")


@device.command("remove")
@_NAME
@DIR
@JSON
def device_remove(name: str, folder: Path, as_json: bool) -> None:
    """Revoke a device and take it off the lists; its name may be added again.

    \b
    Example:
      midge device remove ward-3 --dir fleet
    """
    with _fleet(folder) as (home, db):
        roster = expel(home, db, name, now=time.time(), status="removed")
        home.bundle(name).unlink(missing_ok=True)
        _tell_broker(home, roster, as_json, f"removed {name}", device=name, status="removed")


@device.command("replace")
@_NAME
@DIR
@_HOURS
@_BY_HAND
@JSON
def device_replace(name: str, folder: Path, hours: float, by_hand: bool, as_json: bool) -> None:
    """Revoke the keys of a device, and make a bundle for a new board of the same name.

    \b
    Example:
      midge device replace ward-3 --dir fleet
    """
    with _fleet(folder) as (home, db):
        now = time.time()
        expel(home, db, name, now=now, status="removed")
        added = additions.add(home, db, name, now=now, hours=hours, by_hand=by_hand)
        text = f"revoked the former {name}; wrote {added.bundle}, for one board in {hours:g} hours"
        _tell_broker(home, home.roster(), as_json, text, restart=True, device=name, status="added",
                     bundle=str(added.bundle), hours=hours)  # fmt: skip


def _tell_broker(
    home: Home, roster: Roster, as_json: bool, text: str, *, restart: bool = False, **found: object
) -> None:
    """Wait until the broker goes by the roster, or say how to make it."""
    told = has_heard(home, roster.epoch)
    todo = "" if told else broker_by_hand(home, restart=restart)
    more = [f"the others get a new fleet key, epoch {home.keys().fleet_epoch}"]
    more.append("the broker goes by it" if told else
                f"if you run mosquitto yourself, run there: {todo}")  # fmt: skip
    keys = {"fleet_epoch": home.keys().fleet_epoch, "broker_told": told, "broker_run": todo}
    _say(as_json, "\n".join([text, *more]), **found, **keys)


def _say(as_json: bool, text: str, **found: object) -> None:
    click.echo(json.dumps(found) if as_json else text)
