"""`midge backup` and `midge restore`: a fleet in one file that only a passphrase opens."""

import json
import time
from datetime import datetime
from pathlib import Path

import click

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError
from server.commands.options import DIR, JSON
from server.fleet.backup import back_up, left_out
from server.fleet.backup import restore as restore_fleet
from server.fleet.home import Home

__all__ = ["backup", "restore"]

_PASSPHRASE = click.option(
    "--passphrase-file", type=click.Path(path_type=Path, dir_okay=False),
    help="Its first line is the passphrase; without it, you are asked.",
)  # fmt: skip


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@DIR
@_PASSPHRASE
@JSON
def backup(file: Path, folder: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Write the fleet's keys, settings, tasks, database and models, sealed, into FILE.

    The server may run meanwhile. The root key (offline/) is not in it: keep that apart.

    \b
    Example:
      midge backup fleet.backup --dir fleet
    """
    home = Home.find(folder)
    found = back_up(home, file, _passphrase(passphrase_file, twice=True), now=time.time())
    size, elsewhere = file.stat().st_size, [str(path) for path in left_out(home)]
    if as_json:
        click.echo(json.dumps(
            {"file": str(file), "bytes": size, "federation": found.federation,
             "round": found.round, "model": found.model, "devices": found.devices,
             "left_out": elsewhere}
        ))  # fmt: skip
        return
    click.echo(f"wrote {file}: {size:,} bytes, {found.devices} devices, up to round {found.round}")
    if elsewhere:
        click.echo(f"not in it, though midge.toml names it for the broker: {', '.join(elsewhere)}")
    click.echo("nobody can open it without the passphrase, you neither: keep that somewhere else")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--above", type=click.IntRange(0, 2**53 - 2**32), default=0,
    help="A round number that devices have seen, if this machine's clock is wrong.",
)  # fmt: skip
@_PASSPHRASE
@JSON
def restore(
    file: Path, folder: Path, above: int, passphrase_file: Path | None, as_json: bool
) -> None:
    """Make the fleet in the backup FILE again, in the new or empty FOLDER.

    Never let two servers of one federation run: stop the old one for good first.

    \b
    Example:
      midge restore fleet.backup /srv/fleet
    """
    words = _passphrase(passphrase_file, twice=False)
    made = restore_fleet(file, folder, words, now=time.time(), above=above)
    contents = made.contents
    if as_json:
        click.echo(json.dumps(
            {"folder": str(folder), "federation": contents.federation,
             "made_at": contents.made_at, "devices": contents.devices,
             "rounds_above": made.above, "tokens_void": made.tokens_void}
        ))  # fmt: skip
        return
    made_at = f"{datetime.fromtimestamp(contents.made_at).astimezone():%Y-%m-%d %H:%M %Z}"
    click.echo(f"restored the fleet {contents.federation!r} in {folder}, as it was on {made_at}")
    click.echo(f"the next round has a number above {made.above}, so that devices take it for new")
    click.echo(
        f"what happened since {made_at} is not in it: revoke again what was revoked, add again "
        "what was added, and rotate the server's keys again if they were"
    )


def _passphrase(path: Path | None, *, twice: bool) -> str:
    """From the file's first line, or from the person at the terminal."""
    if path is None:
        asked: str = click.prompt("Passphrase", hide_input=True, confirmation_prompt=twice)
        return asked
    with disk_errors(path):
        data = path.read_bytes()
    try:
        return data.decode().split("\n", 1)[0].rstrip("\r")
    except UnicodeDecodeError:
        raise LocalError(f"{path} is no text; write the passphrase into its first line") from None
