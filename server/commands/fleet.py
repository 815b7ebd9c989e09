"""A fleet: make it, run its broker, add devices to it, list them."""

import contextlib
import json
import time
from pathlib import Path

import click

from broker_bridge.console import stop_on_signals
from broker_bridge.errors import LocalError
from broker_bridge.link.local_broker import LocalBroker
from server import screen
from server.commands.options import DIR, JSON, PORT
from server.fleet.enrolment import TOKEN_HOURS, add_device
from server.fleet.home import Home, create
from server.store.database import Database

__all__ = ["broker", "device", "init"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--federation", default="demo", show_default=True, help="Its name, in every topic.")
@click.option("--host", "hosts", multiple=True, default=("localhost", "127.0.0.1"),
              show_default=True, help="Where the broker is; repeat for more names.")  # fmt: skip
@click.option("--port", type=PORT, default=8883, show_default=True, help="The broker's port.")
@JSON
def init(folder: Path, federation: str, hosts: tuple[str, ...], port: int, as_json: bool) -> None:
    """Make a fleet in FOLDER: keys, a private CA, certificates, settings.

    \b
    Example:
      midge init fleet --host broker.example.org --host 192.168.1.10
    """
    create(folder, federation=federation, hosts=list(hosts), port=port)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "federation": federation}))
        return
    click.echo(f"made the fleet {federation!r} in {folder}")
    click.echo(f"move {folder / 'offline' / 'root.json'} off this machine: it is the root of trust")
    click.echo(f"next: midge broker --dir {folder}")


@click.command()
@DIR
@click.option("--bind", default="127.0.0.1", show_default=True,
              help="Address to listen on; 0.0.0.0 lets devices on the network in.")  # fmt: skip
@click.option("--port", type=PORT, help="Port; default: as in midge.toml.")
def broker(folder: Path, bind: str, port: int | None) -> None:
    """Run a broker for the fleet: mosquitto with midge's mosquitto.conf.

    \b
    Example:
      midge broker --dir fleet --bind 0.0.0.0
    """
    home = Home.find(folder)
    stopped = stop_on_signals()
    chosen = port or home.config().broker.port
    with LocalBroker(home.broker, port=chosen, bind=bind) as running:
        click.echo(f"{running.engine} listens on {bind}:{chosen}, log in {running.log_path}")
        if running.lacks:
            click.echo(running.lacks)
        while running.is_running and not stopped.wait(0.5):
            pass
        if not stopped.is_set():
            raise LocalError(f"the broker stopped by itself; see {running.log_path}")


@click.group()
def device() -> None:
    """Add devices to the fleet, and list them.

    \b
    Example:
      midge device add ward-3 --dir fleet
    """


@device.command("add")
@click.argument("name")
@DIR
@click.option("--hours", default=float(TOKEN_HOURS), show_default=True,
              help="How long the one-time token lives.")  # fmt: skip
@JSON
def device_add(name: str, folder: Path, hours: float, as_json: bool) -> None:
    """Make a bundle with a one-time token for a new device NAME.

    \b
    Example:
      midge device add ward-3 --dir fleet
    """
    home = Home.find(folder)
    with contextlib.closing(Database(home.database)) as db:
        path = add_device(home, db, name, broker=home.config().broker, now=time.time(), hours=hours)
    if as_json:
        click.echo(json.dumps({"device": name, "bundle": str(path), "hours": hours}))
        return
    click.echo(f"wrote {path}: it holds a secret and enrols one device within {hours:g} hours")
    click.echo(f"next, on the device: midge-device run --bundle {path.name} --dir STATE --data …")


@device.command("list")
@DIR
@JSON
def device_list(folder: Path, as_json: bool) -> None:
    """List the devices that have enrolled.

    \b
    Example:
      midge device list --dir fleet --json
    """
    home = Home.find(folder)
    found = []
    with contextlib.closing(Database(home.database)) as db, db.reading() as tx:
        page = tx.devices(limit=500)
        while page:
            found += page
            page = tx.devices(after=page[-1].name, limit=500)
    rows = [
        {"device": d.name, "status": d.status, "last_round": d.last_round,
         "last_seen": d.last_seen, "software": d.software}
        for d in found
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows))
    else:
        screen.table(["device", "status", "last round", "last seen", "software"],
                     [[r["device"], r["status"], r["last_round"], screen.ago(r["last_seen"]),
                       r["software"]] for r in rows])  # fmt: skip
