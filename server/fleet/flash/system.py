"""Which system is on a card, told from its boot partition.

    Raspberry Pi OS 13 trixie     cloud-init's user-data and meta-data lie there
    Raspberry Pi OS 12 bookworm   initramfs8 and kernel_2712.img, and no cloud-init
    32-bit images                 have kernel7.img or kernel.img; they bring kernel8.img too

The Python on the card's other partition is not looked at; install.sh does that, where it is.
"""

from dataclasses import dataclass

from broker_bridge.errors import LocalError
from server.fleet.flash.card import Card
from server.fleet.flash.targets import Target, find_target

__all__ = ["System", "is_customised", "recognise"]

_FIRMWARE = ("cmdline.txt", "config.txt")
_32_BIT = ("kernel.img", "kernel7.img", "kernel7l.img")
# What the image's own placeholder sets; anything else was put there by somebody.
_PLACEHOLDER = frozenset({"ssh_pwauth: false", "ssh_pwauth: true"})


@dataclass(frozen=True)
class System:
    """An operating system that a card may carry."""

    name: str
    target: Target
    cloud_init: bool


TRIXIE = System("Raspberry Pi OS 13 trixie, 64-bit (cloud-init)", find_target("trixie-arm64"), True)
BOOKWORM = System(
    "Raspberry Pi OS 12 bookworm, 64-bit (firstrun.sh)", find_target("bookworm-arm64"), False
)


def recognise(card: Card) -> System:
    """The system on `card`. Raises LocalError for one that midge cannot set up."""
    names = set(card.names())
    missing = [name for name in _FIRMWARE if name not in names]
    if missing:
        raise LocalError(
            f"{card.where} is no boot partition of a Raspberry Pi ({missing[0]} is not there); "
            "name the partition called bootfs"
        )
    if names & set(_32_BIT):
        raise LocalError(
            f"{card.where} has a 32-bit system, for which there is no TensorFlow Lite; use "
            "Raspberry Pi OS (64-bit), which runs on a Pi 3, 4, 5 and Zero 2 W"
        )
    if "kernel8.img" not in names:
        raise LocalError(
            f"{card.where} has a system that midge does not know (kernel8.img is not there); use "
            "Raspberry Pi OS Lite (64-bit), or install with `midge bundle` on the running Pi"
        )
    if {"user-data", "meta-data"} <= names:
        return TRIXIE
    if {"initramfs8", "kernel_2712.img"} <= names:
        return BOOKWORM
    raise LocalError(
        f"{card.where} has neither Raspberry Pi OS 12 (bookworm) nor 13 (trixie); midge needs "
        "their Python: use Raspberry Pi OS Lite (64-bit)"
    )


def is_customised(card: Card, system: System) -> bool:
    """Whether somebody, Raspberry Pi Imager perhaps, prepared the first boot already."""
    if not system.cloud_init:
        return "systemd.run=" in (card.read("cmdline.txt") or b"").decode(errors="replace")
    lines = (card.read("user-data") or b"").decode(errors="replace").splitlines()
    active = {line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")}
    return bool(active - _PLACEHOLDER)
