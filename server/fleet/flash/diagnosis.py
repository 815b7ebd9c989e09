"""Reading a card that came back from a device: how far it got, and what to do.

A report of findings in the order of a first boot; the first that is not ok is where to
look. It reads the card and changes nothing. What a card says is text from a stranger: it
is shortened and made printable.
"""

import re
from collections.abc import Iterator

from broker_bridge.checkup import Finding
from server.fleet.flash.card import Card
from server.fleet.flash.flashing import FOLDER, Manifest, differences, manifest
from server.fleet.flash.system import recognise

__all__ = ["diagnose"]

_ENROLLED = re.compile(r"enrolled already, as ([a-z0-9-]+):")  # as install.sh says it
_LINES_MAX = 12
_LINE_CHARS_MAX = 200


def diagnose(card: Card) -> Iterator[Finding]:
    """What the card shows. Raises LocalError if it is no card that midge can read."""
    system = recognise(card)
    yield Finding("system", "ok", system.name)
    found = manifest(card)
    if found is None:
        yield Finding(
            "midge", "problem", "midge has written nothing here", "write it with `midge flash`"
        )
        return
    yield Finding("device", "ok", f"{found.device}, token until {found.token_expires}")
    first = f"{FOLDER}/first-boot.sh"
    installed = _text(card, "log/install.txt")
    if installed is None:
        yield from _never_installed(card, found)
        return
    yield from _installation(installed, waiting=card.read(first) is not None)
    yield from _who(installed, found)
    if installed[-1:] != ["result: installed"]:
        return
    yield from _secrets(card)
    yield from _report(_text(card, "log/agent.txt"))


def _never_installed(card: Card, found: Manifest) -> Iterator[Finding]:
    changed = [name for name in differences(card, found) if name != "cmdline.txt"]
    started = _text(card, "log/firstrun.txt") is not None
    if started:
        yield Finding(
            "first boot", "warning", "the first boot began, and the second has installed nothing",
            "give it five minutes with power; then look at its screen for what systemd says",
        )  # fmt: skip
    elif changed:
        yield Finding(
            "first boot", "problem", f"{changed[0]} is not as it was written",
            "write the card again: `midge flash`",
        )  # fmt: skip
    else:
        yield Finding(
            "first boot", "problem", "the device has not booted from this card, or not far enough",
            "look at its green LED: dark or regular blinks mean no boot (power, wrong image, bad "
            "card); if it boots, wait five minutes before you take the card out",
        )  # fmt: skip


def _installation(lines: list[str], *, waiting: bool) -> Iterator[Finding]:
    said = [line.removeprefix("midge: ") for line in lines if line.startswith("midge: ")]
    if lines[-1:] == ["result: installed"]:
        yield Finding("installation", "ok", lines[0])
        for line in said:
            if "clock" in line:
                yield Finding("clock", "warning", line, "harmless once it has a network")
    elif lines[-1:] and lines[-1].startswith("result:"):
        reason = said[-1] if said else lines[-1]
        what, _, advice = reason.partition("; ")
        yield Finding("installation", "problem", what, advice or "see midge/log/install.txt")
    else:
        then = "it is tried again at the next boot" if waiting else "write the card again"
        yield Finding("installation", "problem", "it was cut off in the middle", then)


def _who(lines: list[str], found: Manifest) -> Iterator[Finding]:
    """Whether the device was somebody else before, which it then still is."""
    for line in lines:
        before = _ENROLLED.search(line)
        if before is not None and before[1] != found.device:
            yield Finding(
                "identity", "problem", f"it was enrolled before, as {before[1]}, and still is",
                "write the whole image to the card, or remove what is there first: on the device, "
                "`sudo /opt/midge/uninstall.sh --purge`; then flash it again",
            )  # fmt: skip


def _secrets(card: Card) -> Iterator[Finding]:
    if card.read(f"{FOLDER}/device.bundle") is not None:
        yield Finding(
            "secrets", "warning", "the one-time token is still on the boot partition",
            f"remove {FOLDER}/device.bundle by hand",
        )  # fmt: skip
    else:
        yield Finding("secrets", "ok", "taken off the boot partition")


def _report(lines: list[str] | None) -> Iterator[Finding]:
    if not lines:
        yield Finding(
            "report", "warning", "the device has not reported yet",
            "it does so two minutes after a boot; put the card back and wait",
        )  # fmt: skip
        return
    words = [word.partition("=") for word in lines[0].split()]
    state = {name: value for name, equals, value in words if equals}
    said = [line.removeprefix("agent ") for line in lines if line.startswith("agent ")]
    last = said[-1] if said else "the agent has said nothing"
    if state.get("addresses", "none") == "none":
        yield Finding(
            "network", "problem", "the device has no address",
            "plug in a cable, or check the wifi's name, passphrase and country and flash again",
        )  # fmt: skip
    else:
        yield Finding("network", "ok", f"address {state['addresses']}")
    if state.get("enrolled") == "yes":
        yield Finding("enrolment", "ok", "enrolled")
    else:
        yield Finding(
            "enrolment", "problem", f"not enrolled; its last words: {last}",
            "check that broker and server run, that the device reaches the broker's address, and "
            "that the token has not expired",
        )  # fmt: skip
    if state.get("service") not in ("active", "activating"):
        yield Finding(
            "service", "problem", f"{state.get('service', 'unknown')}; its last words: {last}",
            "do what that sentence says",
        )  # fmt: skip


def _text(card: Card, name: str) -> list[str] | None:
    data = card.read(f"{FOLDER}/{name}")
    if data is None:
        return None
    lines = data[-65536:].decode(errors="replace").splitlines()
    return [
        "".join(c if c.isprintable() else "?" for c in line)[:_LINE_CHARS_MAX]
        for line in (*lines[:2], *lines[2:][-_LINES_MAX:])
    ]
