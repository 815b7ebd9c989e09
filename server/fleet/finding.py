"""Whether a folder holds a fleet that we may use; if not, one sentence: why, and what to do."""

import os
import pwd
import shlex
from pathlib import Path

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError

__all__ = ["check_fleet", "check_place"]


def check_fleet(folder: Path) -> None:
    """Raise LocalError unless there is a fleet, it is ours, and its database is there."""
    with disk_errors(folder):
        _check_ours(folder)
        if not (folder / "midge.toml").is_file():
            raise _no_fleet(folder)
        database = folder / "state" / "midge.db"
        is_there = database.exists() and database.stat().st_size > 0
        if not is_there and _was_at_work(folder):  # an empty one would know nobody
            raise LocalError(
                f"{database} is gone, and with it every device and model of this fleet; put "
                "it back, or make the fleet again with `midge restore` in another folder"
            )


def check_place(folder: Path) -> None:
    """Raise LocalError unless a fleet can be made in `folder`: new or empty, and ours."""
    with disk_errors(folder):
        owner = _other_owner(folder)
        if owner is not None:
            raise LocalError(
                f"{folder} belongs to the user {owner}, who alone could use a fleet there; choose "
                f"a new folder, {folder / 'fleet'} for example, or run this as that user"
            )
        if folder.exists() and any(folder.iterdir()):
            raise LocalError(f"{folder} is not empty; choose a new folder, nothing was changed")


def _check_ours(folder: Path) -> None:
    """Its secrets are for its owner alone. Whoever else may write there, as root may, would leave
    files behind that the server cannot read.
    """
    owner = _other_owner(folder)
    if owner is not None:
        raise LocalError(
            f"{folder} belongs to the user {owner}, and so do its secrets; run this as that user: "
            f"`sudo -u {shlex.quote(owner)} midge …`"
        )


def _other_owner(folder: Path) -> str | None:
    """The name of the user whose folder this is; None if it is ours, or not there."""
    owner = folder.stat().st_uid if folder.exists() else os.geteuid()
    if owner == os.geteuid():
        return None
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"#{owner}"


def _no_fleet(folder: Path) -> LocalError:
    if (folder / "keys" / "server.json").exists():
        anew = "if `midge init` was cut off here, remove the folder and make it again, else "
        return LocalError(
            f"{folder} holds no fleet: it has keys and no midge.toml; "
            f"{'' if _was_at_work(folder) else anew}put that file back (a line with the "
            "`federation`, and your [broker], will do)"
        )
    return LocalError(f"{folder} holds no fleet; make one with `midge init {folder}`, or say --dir")


def _was_at_work(folder: Path) -> bool:
    """Whether there are traces of what only a fleet with a database leaves."""
    traces = [*folder.glob("bundles/*"), *folder.glob("state/models/*")]
    return bool(traces) or (folder / "keys" / "roster.json").exists()
