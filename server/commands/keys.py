"""`midge keys`: what keys there are and how old, and new ones for the server."""

import contextlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from broker_bridge.link.inspection import DAYS_WARNING
from broker_bridge.wire.envelope import fingerprint
from server import screen
from server.commands.options import DIR, JSON
from server.fleet import broker_watch, expulsion, rotation
from server.fleet import repair as repairing
from server.fleet.certificates import CertificateFacts
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["keys"]

_OLD_DAYS = 365  # the age at which keys should be replaced: docs/operating.md


@click.group()
def keys() -> None:
    """Show and replace the server's keys and certificates.

    \b
    Example:
      midge keys show --dir fleet
    """


@keys.command("show")
@DIR
@JSON
def show(folder: Path, as_json: bool) -> None:
    """Say what keys and certificates there are, how old, and when they end. No secret is shown.

    \b
    Example:
      midge keys show --dir fleet --json
    """
    home = Home.find(folder)
    now = time.time()
    held = [_key(key, now) for key in rotation.keys_of(home.keys())]
    known = [_certificate(name, facts, now) for name, _, facts in rotation.certificates(home)]
    if as_json:
        click.echo(json.dumps({"keys": held, "certificates": known}))
        return
    screen.table(
        ["key", "number", "fingerprint", "age", ""],
        [[k["key"], k["number"], k["fingerprint"] or "-", _age(k), _advice(k)] for k in held],
    )
    click.echo()
    screen.table(
        ["certificate", "ends", "days left", ""],
        [[c["certificate"], str(c["ends"])[:10], c["days_left"], _shortness(c)] for c in known],
    )


@keys.command("rotate")
@DIR
@click.option(
    "--root",
    "root",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The root key: root.json, from its drawer.",
)
@JSON
def rotate(folder: Path, root: Path, as_json: bool) -> None:
    """Give the server new keys, signed by the federation's root.

    A running server takes them up within a second or two, and devices follow when they next
    hear from the broker. Bundles made before still enrol.

    \b
    Example:
      midge keys rotate --dir fleet --root /media/usb/root.json
    """
    said = rotation.rotate_identity(Home.find(folder), root).said
    shown = fingerprint(said.sign_public)
    if as_json:
        click.echo(json.dumps({"number": said.sequence, "fingerprint": shown}))
        return
    click.echo(f"the server has new keys: number {said.sequence}, fingerprint {shown}")
    click.echo(f"put {root} back into its drawer, and back up {folder / 'keys'}")


@keys.command("new-fleet-key")
@DIR
@JSON
def new_fleet_key(folder: Path, as_json: bool) -> None:
    """Make a new fleet key, as every revocation does. Members fetch it by themselves.

    Tasks and models of the next round on are sealed under it; an open round keeps its own.

    \b
    Example:
      midge keys new-fleet-key --dir fleet
    """
    number = Home.find(folder).next_epoch().fleet_epoch
    click.echo(json.dumps({"number": number}) if as_json else f"the fleet has key {number}")


@keys.command("renew-certificates")
@DIR
@JSON
def renew_certificates(folder: Path, as_json: bool) -> None:
    """Certify broker, server and operator again. Their keys stay. (Devices renew by themselves.)

    \b
    Example:
      midge keys renew-certificates --dir fleet
    """
    now = time.time()
    home, moment = Home.find(folder), datetime.fromtimestamp(now, UTC)
    with contextlib.closing(Database(home.database)) as db:
        done = rotation.renew_certificates(home, db, now=moment)
    found = [_certificate(name, facts, now) for name, facts in done]
    if as_json:
        click.echo(json.dumps({"certificates": found}))
        return
    for each in found:
        click.echo(f"{each['certificate']}: until {str(each['ends'])[:10]}")
    click.echo("restart the broker and the server: they read their certificates when they start")


@keys.command("repair")
@DIR
@click.option("--host", "hosts", multiple=True,
              help="A name that the broker's certificate must have; repeat for more.")  # fmt: skip
@JSON
def repair(folder: Path, hosts: tuple[str, ...], as_json: bool) -> None:
    """Make again what is lost, damaged or expired of the certificates and keys on this machine.

    What is good stays as it is. Devices notice nothing. The CA's key and the server's own keys
    cannot be made again: they come from a backup.

    \b
    Example:
      midge keys repair --dir fleet --host broker.example.org
    """
    home, found = Home.find(folder), []
    with contextlib.closing(Database(home.database)) as db:
        for each in repairing.repair(home, db, hosts=hosts, now=datetime.now(UTC)):
            found.append({"was": each.was, "done": each.done})
            if not as_json:  # at once: what comes next may not work
                click.echo(f"{each.was}: {each.done}")
    if as_json:
        click.echo(json.dumps({"repaired": found}))
    elif found:
        click.echo(
            "restart the broker and the server: they read their certificates when they start"
        )
        click.echo(f"where you run mosquitto yourself, copy {home.broker}/*.pem there again")
    else:
        click.echo("nothing to repair: all of it is there, fits and is valid")


@keys.command("replace-operator")
@DIR
@JSON
def replace_operator(folder: Path, as_json: bool) -> None:
    """Give the operator a new certificate, and have the broker turn the old one away.

    \b
    Example:
      midge keys replace-operator --dir fleet
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db:
        roster = expulsion.replace_operator(home, db, now=datetime.now(UTC))
    told = broker_watch.has_heard(home, roster.epoch)
    todo = "" if told else broker_watch.by_hand(home, restart=True)
    if as_json:
        click.echo(json.dumps({"broker_told": told, "broker_run": todo}))
        return
    click.echo(f"made a new certificate in {home.folder / 'operator'}; the old one is revoked")
    click.echo("the broker goes by it" if told else
               broker_watch.left_to_do("the operator", todo))  # fmt: skip


def _certificate(name: str, facts: CertificateFacts, now: float) -> dict[str, object]:
    return {
        "certificate": name,
        "ends": facts.expires.isoformat(),
        "days_left": int((facts.expires.timestamp() - now) / 86_400),
        "hosts": list(facts.hosts),
    }


def _key(key: rotation.HeldKey, now: float) -> dict[str, object]:
    return {
        "key": key.name,
        "number": key.number,
        "fingerprint": key.fingerprint,
        "since": datetime.fromtimestamp(key.since, UTC).isoformat() if key.since else None,
        "days": int((now - key.since) / 86_400) if key.since else None,
    }


def _shortness(certificate: dict[str, object]) -> str:
    left = certificate["days_left"]
    if not isinstance(left, int) or left >= DAYS_WARNING:
        return ""
    is_ca = certificate["certificate"] == "ca"
    return "make a new fleet" if is_ca else "midge keys renew-certificates"


def _age(key: dict[str, object]) -> str:
    return "-" if key["days"] is None else f"{key['days']} days"


def _advice(key: dict[str, object]) -> str:
    days = key["days"]
    is_old = isinstance(days, int) and days > _OLD_DAYS
    return "midge keys rotate" if is_old and str(key["key"]).startswith("server") else ""
