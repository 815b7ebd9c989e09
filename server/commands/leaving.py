"""How a device goes out of the fleet: `midge device revoke`, `remove`, `replace`."""

import time
from pathlib import Path

import click

from server.commands.answering import BY_HAND, HOURS, NAME, opened, say
from server.commands.login import broker_for, login_options
from server.commands.options import DIR, JSON
from server.fleet import additions
from server.fleet.broker_watch import by_hand as broker_by_hand
from server.fleet.broker_watch import has_heard, left_to_do
from server.fleet.census import find
from server.fleet.enrolment import broker_login
from server.fleet.expulsion import expel
from server.fleet.home import Home
from server.fleet.roster import Roster

__all__ = ["device_remove", "device_replace", "device_revoke"]


@click.command("revoke")
@NAME
@DIR
@JSON
def device_revoke(name: str, folder: Path, as_json: bool) -> None:
    """Shut a device out, for good: its keys, its certificates, its update in the open round.

    The others get a new fleet key.

    \b
    Example:
      midge device revoke ward-3 --dir fleet
    """
    with opened(folder) as (home, db):
        with db.reading() as tx:
            known = tx.device(name)
            if known is not None and known.status == "removed":
                find(tx, name)
        roster = expel(home, db, name, now=time.time())
        _tell_broker(home, roster, as_json, f"revoked {name}", device=name, status="revoked")


@click.command("remove")
@NAME
@DIR
@JSON
def device_remove(name: str, folder: Path, as_json: bool) -> None:
    """Revoke a device and take it off the lists; its name may be added again.

    \b
    Example:
      midge device remove ward-3 --dir fleet
    """
    with opened(folder) as (home, db):
        roster = expel(home, db, name, now=time.time(), status="removed")
        home.bundle(name).unlink(missing_ok=True)
        _tell_broker(home, roster, as_json, f"removed {name}", device=name, status="removed")


@click.command("replace")
@NAME
@DIR
@HOURS
@BY_HAND
@login_options
@JSON
def device_replace(
    name: str, folder: Path, hours: float, by_hand: bool, as_json: bool, **login: str | None
) -> None:
    """Revoke the keys of a device, and make a bundle for a new board of the same name.

    \b
    Example:
      midge device replace ward-3 --dir fleet
    """
    with opened(folder) as (home, db):
        now, broker = time.time(), broker_for(home, **login)
        broker_login(home, broker, name)  # what is wrong with it is said before anybody is out
        expel(home, db, name, now=now, status="removed")
        added = additions.add(home, db, name, now=now, hours=hours, by_hand=by_hand, broker=broker)
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
    more.append("the broker goes by it" if told else left_to_do(str(found["device"]), todo))
    keys = {"fleet_epoch": home.keys().fleet_epoch, "broker_told": told, "broker_run": todo}
    say(as_json, "\n".join([text, *more]), **found, **keys)
