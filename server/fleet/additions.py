"""Many devices at once: their names from a pattern, their bundles, and a list of them as CSV."""

import csv
import io
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from broker_bridge.disk import write_atomic
from broker_bridge.errors import LocalError
from server.config import Broker
from server.fleet.enrolment import add_device, broker_login, check_free, check_name
from server.fleet.expulsion import free_name
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["COUNT_MAX", "Added", "add", "add_many", "names_from", "write_csv"]

COUNT_MAX = 10_000
_PATTERN = re.compile(r"([a-z0-9-]*)\{(?::0?([1-9])d?)?\}([a-z0-9-]*)")


@dataclass(frozen=True)
class Added:
    """One device that may enrol now."""

    device: str
    bundle: Path
    expires: str  # ISO 8601, UTC


def names_from(pattern: str, *, count: int, first: int = 1) -> list[str]:
    """`ward-{:03}`, 2 ─► ward-001, ward-002. Raises LocalError."""
    found = _PATTERN.fullmatch(pattern)
    if found is None:
        raise LocalError(
            f"{pattern!r} is not a pattern of names; write one {{}} for the number, "
            "such as ward-{:03}"
        )
    before, digits, after = found.groups()
    numbers = range(first, first + count)
    return [f"{before}{number:0{int(digits or 1)}d}{after}" for number in numbers]


def add(
    home: Home, db: Database, name: str, *, now: float, hours: float, by_hand: bool,
    broker: Broker | None = None,
) -> Added:  # fmt: skip
    """Add one device; see `add_device`. `broker`: where it finds it, if not as in midge.toml."""
    with db.reading() as tx:
        check_name(name, hours)
        check_free(tx.device(name), name)
    free_name(home, db, name)  # for a name whose former holder was removed
    where = broker or home.config().broker
    path = add_device(home, db, name, broker=where, now=now, hours=hours, by_hand=by_hand)
    expires = datetime.fromtimestamp(now + hours * 3600, UTC).isoformat(timespec="minutes")
    return Added(name, path, expires)


def add_many(
    home: Home, db: Database, names: list[str], *, now: float, hours: float, by_hand: bool,
    broker: Broker | None = None,
) -> list[Added]:  # fmt: skip
    """Add them all, or none if one of the names cannot be used, or has no login at a broker that
    wants one. Raises LocalError."""
    where = broker or home.config().broker
    with db.reading() as tx:
        for name in names:
            check_name(name, hours)
            check_free(tx.device(name), name)
            broker_login(home, where, name)
    return [
        add(home, db, name, now=now, hours=hours, by_hand=by_hand, broker=where) for name in names
    ]


def write_csv(path: Path, added: list[Added]) -> None:
    """Write the list. It holds no secret, but says where the secrets are. Raises LocalError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["device", "bundle", "expires"])
    writer.writerows([each.device, str(each.bundle), each.expires] for each in added)
    write_atomic(path, text.getvalue().encode())
