"""`midge flash verify`, `undo`, `doctor`: a card that midge wrote, looked at again."""

import json
from pathlib import Path

import click

from broker_bridge import checkup
from broker_bridge.errors import LocalError
from server.commands.bundle import FILE, FOLDER
from server.commands.options import JSON
from server.fleet.flash import flashing
from server.fleet.flash.card import Card, open_card
from server.fleet.flash.diagnosis import diagnose

__all__ = ["BOOT", "IMAGE", "doctor", "undo", "verify"]

BOOT = click.option("--boot", type=FOLDER, help="A card's boot partition that is mounted here.")
IMAGE = click.option("--image", type=FILE, help="An image of Raspberry Pi OS, .img or .img.xz.")


@click.command("verify")
@BOOT
@IMAGE
@JSON
def verify(boot: Path | None, image: Path | None, as_json: bool) -> None:
    """Compare a card with what midge wrote on it.

    \b
    Example:
      midge flash verify --boot /media/me/bootfs
    """
    card = _there(boot, image)
    found = flashing.manifest(card)
    if found is None:
        raise LocalError(f"midge wrote nothing on {card.where}; write it with `midge flash`")
    other = flashing.differences(card, found)
    booted = card.read("midge/log/install.txt") is not None
    if as_json:
        facts = {"device": found.device, "files": len(found.wrote), "different": other,
                 "booted": booted}  # fmt: skip
        click.echo(json.dumps(facts))
    elif booted:
        click.echo(f"{found.device} has booted from this card; ask `midge flash doctor` about it")
    elif not other:
        click.echo(f"{found.device}: all {len(found.wrote)} files are as they were written")
    if other and not booted:
        more = (
            f" and {len(other) - 1} more are not as they were" if other[1:] else " is not as it was"
        )
        raise LocalError(f"{card.where}: {other[0]}{more} written; flash it again")


@click.command("undo")
@BOOT
@IMAGE
@JSON
def undo(boot: Path | None, image: Path | None, as_json: bool) -> None:
    """Take everything of midge off a card, and put back what was there.

    \b
    Example:
      midge flash undo --boot /media/me/bootfs
    """
    card = _there(boot, image)
    booted = card.read("midge/log/install.txt") is not None
    found = flashing.undo(card)
    if as_json:
        click.echo(json.dumps({"device": found.device, "restored": found.kept, "booted": booted}))
    elif booted:
        click.echo(
            f"the boot partition is as it was before midge; {found.device} has booted from this "
            "card, and what it installed is still on it: write the whole image for a fresh start"
        )
    else:
        click.echo(
            f"{card.where} is as it was before midge; the token for {found.device} is still good"
        )


@click.command("doctor")
@BOOT
@IMAGE
@JSON
def doctor(boot: Path | None, image: Path | None, as_json: bool) -> None:
    """Read from a card what happened on its device, and say what to do.

    \b
    Example:
      midge flash doctor --boot /media/me/bootfs
    """
    findings = list(diagnose(_there(boot, image)))
    checkup.show(findings, as_json=as_json)
    click.get_current_context().exit(checkup.exit_code(findings))


def _there(boot: Path | None, image: Path | None) -> Card:
    if image is not None and image.suffix == ".xz":
        raise LocalError(f"{image} is packed, so midge wrote nothing into it; name the .img")
    return open_card(boot, image)
