"""How a device goes out of the fleet: `midge device revoke`, `remove`, `replace`."""

import time

from server.commands.answering import BY_HAND, HOURS, Answer, about_one
from server.commands.login import broker_for, login_options
from server.fleet import additions
from server.fleet.broker_watch import by_hand as broker_by_hand
from server.fleet.broker_watch import has_heard, left_to_do
from server.fleet.census import find
from server.fleet.enrolment import broker_login
from server.fleet.expulsion import expel
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["device_remove", "device_replace", "device_revoke"]


@about_one("revoke")
def device_revoke(home: Home, db: Database, name: str) -> Answer:
    """Shut a device out, for good: its keys, its certificates, its update in the open round.

    The others get a new fleet key.

    \b
    Example:
      midge device revoke ward-3 --dir fleet
    """
    with db.reading() as tx:
        known = tx.device(name)
        if known is not None and known.status == "removed":
            find(tx, name)
    expel(home, db, name, now=time.time())
    return _broker_told(home, name, f"revoked {name}", status="revoked")


@about_one("remove")
def device_remove(home: Home, db: Database, name: str) -> Answer:
    """Revoke a device and take it off the lists; its name may be added again.

    \b
    Example:
      midge device remove ward-3 --dir fleet
    """
    expel(home, db, name, now=time.time(), status="removed")
    home.bundle(name).unlink(missing_ok=True)
    return _broker_told(home, name, f"removed {name}", status="removed")


@about_one("replace", HOURS, BY_HAND, login_options)
def device_replace(
    home: Home, db: Database, name: str, *, hours: float, by_hand: bool, **login: str | None
) -> Answer:
    """Revoke the keys of a device, and make a bundle for a new board of the same name.

    \b
    Example:
      midge device replace ward-3 --dir fleet
    """
    now, broker = time.time(), broker_for(home, **login)
    broker_login(home, broker, name)  # what is wrong with it is said before anybody is out
    expel(home, db, name, now=now, status="removed")
    added = additions.add(home, db, name, now=now, hours=hours, by_hand=by_hand, broker=broker)
    text = f"revoked the former {name}; wrote {added.bundle}, for one board in {hours:g} hours"
    return _broker_told(
        home, name, text, restart=True, status="added", bundle=str(added.bundle), hours=hours
    )


def _broker_told(
    home: Home, name: str, text: str, *, restart: bool = False, **found: object
) -> Answer:
    """Wait until the broker goes by the roster as it is now, or say how to make it."""
    told = has_heard(home, home.roster().epoch)
    todo = "" if told else broker_by_hand(home, restart=restart)
    epoch = home.keys().fleet_epoch
    more = [
        f"the others get a new fleet key, epoch {epoch}",
        "the broker goes by it" if told else left_to_do(name, todo),
    ]
    found |= {"fleet_epoch": epoch, "broker_told": told, "broker_run": todo}
    return "\n".join([text, *more]), found
