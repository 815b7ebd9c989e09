"""Whether a folder holds a fleet that we may use; if not, one sentence: why, and what to do."""

import os
import pwd
import shlex
from pathlib import Path

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError

__all__ = ["check_fleet"]


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


def _check_ours(folder: Path) -> None:
    """Its secrets are for its owner alone. Whoever else may write there, as root may, would leave
    files behind that the server cannot read.
    """
    owner = folder.stat().st_uid if folder.exists() else os.geteuid()
    if owner == os.geteuid():
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    raise LocalError(
        f"{folder} belongs to the user {name}, and so do its secrets; run this as that user: "
        f"`sudo -u {shlex.quote(name)} midge …`"
    )


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
