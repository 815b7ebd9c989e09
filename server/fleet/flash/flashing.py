"""Writing a card so that its first boot makes a device of it; checking that; taking it away.

`write` promises that what was there before can be had back (midge/.orig), that everything
written was read back and is the same, and that a card it refuses is untouched.

    midge/.orig/NAME            what a file of the image said before
    midge/.orig/manifest.json   what was written, by hash, and what was kept
    midge/log/                  what the device leaves for `midge flash doctor`
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from broker_bridge.errors import LocalError
from server.fleet.flash import firstboot
from server.fleet.flash.card import Card
from server.fleet.flash.firstboot import Login, Wifi
from server.fleet.flash.parcel import file_of_ours
from server.fleet.flash.system import System, is_customised, recognise

__all__ = [
    "LOGS",
    "Manifest",
    "Settings",
    "boot_files",
    "check_card",
    "differences",
    "manifest",
    "undo",
    "write",
]

FOLDER = "midge"
LOGS = ("log/firstrun.txt", "log/install.txt", "log/agent.txt")
_ORIGINALS = f"{FOLDER}/.orig"
_MANIFEST = f"{_ORIGINALS}/manifest.json"
_TOUCHED = ("cmdline.txt", "user-data", "network-config", "meta-data", "firstrun.sh")
_ON_CARDS = (
    "first-boot.sh", "midge-first-boot.service", "report.sh", "midge-report.service",
    "midge-report.timer",
)  # fmt: skip
Name = Annotated[str, Meta(min_length=1, max_length=255)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is wanted of a card. `instance`: new for each time that a card is written."""

    device: str
    instance: str
    wifi: Wifi | None = None
    login: Login | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What midge did to a card."""

    device: str
    system: str
    made_at: int  # seconds since 1970
    token_expires: str
    kept: list[Name]  # files of the image whose first content is in .orig
    wrote: dict[Name, str]  # SHA-256 by name


def check_card(card: Card, *, replace: bool) -> System:
    """The system on a card that may be written. Raises LocalError."""
    system = recognise(card)
    if manifest(card) is None and not replace and is_customised(card, system):
        raise LocalError(
            f"the first boot of {card.where} was prepared already, by Raspberry Pi Imager perhaps; "
            "say --replace to put midge's in its place (name, wifi and login come from the options "
            "here), or let it boot and install there with `midge bundle`"
        )
    return system


def boot_files(
    card: Card, system: System, settings: Settings, parcel: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Every file that goes on the card, by name."""
    files = {f"{FOLDER}/{name}": data for name, data in parcel.items()}
    files |= {f"{FOLDER}/{name}": file_of_ours(name) for name in _ON_CARDS}
    country = settings.wifi.country if settings.wifi else None
    old = (card.read("cmdline.txt") or b"").decode(errors="replace")
    texts = {
        "cmdline.txt": firstboot.command_line(old, system.cloud_init, settings.instance, country)
    }
    if system.cloud_init:
        texts["user-data"] = firstboot.user_data(settings.device, settings.login)
        texts["network-config"] = firstboot.network_config(settings.wifi)
        texts["meta-data"] = firstboot.meta_data(settings.instance)
    else:
        texts["firstrun.sh"] = firstboot.firstrun(settings.device, settings.wifi, settings.login)
    return files | {name: text.encode() for name, text in texts.items()}


def write(
    card: Card, system: System, settings: Settings, files: Mapping[str, bytes], *,
    made_at: int, token_expires: str,
) -> Manifest:  # fmt: skip
    """Write `files` to the card and read them back. Raises LocalError."""
    before = manifest(card)
    kept = _kept(card, before)
    found = Manifest(
        device=settings.device, system=system.name, made_at=made_at, token_expires=token_expires,
        kept=sorted(kept), wrote={name: _digest(data) for name, data in files.items()},
    )  # fmt: skip
    originals = {f"{_ORIGINALS}/{name}": data for name, data in kept.items()}
    originals[_MANIFEST] = json.dumps(msgspec.to_builtins(found), indent=1).encode() + b"\n"
    # What was there before midge is on the card at every moment, also while it is written anew.
    old = [f"{FOLDER}/{name}" for name in card.names(FOLDER)]
    card.remove([name for name in old if name != _ORIGINALS])
    # The way back first; what makes the card boot into midge last.
    card.write(originals)
    card.write({name: data for name, data in files.items() if name.startswith(f"{FOLDER}/")})
    card.write({name: data for name, data in files.items() if not name.startswith(f"{FOLDER}/")})
    for name, data in (originals | dict(files)).items():
        if card.read(name) != data:
            raise LocalError(
                f"{card.where}: {name} reads back otherwise than it was written; "
                "the card is failing or full: use another"
            )
    return found


def _kept(card: Card, before: Manifest | None) -> dict[str, bytes]:
    """The image's own files as they were before midge came for the first time."""
    if before is not None:
        found = {name: card.read(f"{_ORIGINALS}/{name}") for name in before.kept}
    else:
        found = {name: card.read(name) for name in _TOUCHED}
    return {name: data for name, data in found.items() if data is not None}


def manifest(card: Card) -> Manifest | None:
    """What midge wrote on the card; None if nothing. Raises LocalError if it is damaged."""
    data = card.read(_MANIFEST)
    if data is None:
        return None
    try:
        found = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LocalError(
            f"{card.where}: {_MANIFEST} is damaged ({error}); write the image to the card anew"
        ) from None
    # The card may come from anywhere, and these names are read, written and removed.
    paths = [name.split("/") for name in found.wrote]
    shown = (found.device, found.system, found.token_expires, *found.wrote)
    if not all(text.isprintable() for text in shown):
        raise LocalError(f"{card.where}: {_MANIFEST} was not written by midge")
    if not set(found.kept) <= set(_TOUCHED) or any({"", ".."} & set(path) for path in paths):
        raise LocalError(f"{card.where}: {_MANIFEST} names files that midge never writes")
    return found


def differences(card: Card, found: Manifest) -> list[str]:
    """The names of files that are not as they were written."""
    return [
        name
        for name, digest in found.wrote.items()
        if (data := card.read(name)) is None or _digest(data) != digest
    ]


def undo(card: Card) -> Manifest:
    """Make the card what it was before midge. Raises LocalError if midge was never there."""
    found = manifest(card)
    if found is None:
        raise LocalError(f"midge wrote nothing on {card.where}; there is nothing to undo")
    originals = {name: card.read(f"{_ORIGINALS}/{name}") for name in found.kept}
    lost = [name for name, data in originals.items() if data is None]
    if lost:
        raise LocalError(
            f"{card.where}: the copy of {lost[0]} is gone; write the image to the card anew"
        )
    card.write({name: data for name, data in originals.items() if data is not None})
    card.remove([name for name in _TOUCHED if name not in originals and name in found.wrote])
    card.remove([FOLDER])
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
