"""`midge broker`: run mosquitto for the fleet, and keep it up to date with who was shut out."""

from datetime import UTC, datetime
from pathlib import Path

import click

from broker_bridge.console import stop_on_signals
from broker_bridge.errors import LocalError
from broker_bridge.link.local_broker import LocalBroker
from server.commands.options import DIR, PORT
from server.fleet.broker_watch import follow, followed, say_heard
from server.fleet.expulsion import keep_broker_files
from server.fleet.home import Home
from server.fleet.machines import check_usable, ends, machine

__all__ = ["broker"]


@click.command()
@DIR
@click.option("--bind", default="127.0.0.1", show_default=True,
              help="Address to listen on; 0.0.0.0 lets devices on the network in.")  # fmt: skip
@click.option("--port", type=PORT, help="Port; default: as in midge.toml.")
def broker(folder: Path, bind: str, port: int | None) -> None:
    """Run a broker for the fleet: mosquitto with midge's mosquitto.conf.

    It hears of `midge device revoke` by itself.

    \b
    Example:
      midge broker --dir fleet --bind 0.0.0.0
    """
    home = Home.find(folder)
    where = home.config().broker
    if where.is_foreign:
        raise LocalError(
            f"midge.toml says how to log in at {where.host}, a broker of somebody else's, and "
            "`midge broker` knows no such logins; take them out of [broker] to run midge's own"
        )
    check_usable(home.folder, "broker")
    _warn_of_end(home)
    stopped = stop_on_signals()
    chosen = port or where.port
    heard = keep_broker_files(home)
    running = LocalBroker(home.broker, port=chosen, bind=bind, shipped_acl=False, tied=True)
    trouble = ""
    with followed(home), running:
        say_heard(home, heard)
        click.echo(f"{running.engine} listens on {bind}:{chosen}, log in {running.log_path}")
        if running.lacks:
            click.echo(running.lacks)
        while running.is_running and not stopped.wait(0.25):
            try:
                heard, trouble = follow(home, running, heard), ""
            except LocalError as error:  # it goes on as it is, and says so once
                if str(error) != trouble:
                    click.echo(f"midge: {error}", err=True)
                trouble = str(error)
        if not stopped.is_set():
            raise LocalError(f"the broker stopped by itself; see {running.log_path}")


def _warn_of_end(home: Home) -> None:
    """Only a warning: this machine's clock may be wrong, and then all is well."""
    ended = ends(machine(home.folder, "broker").certificate, datetime.now(UTC))
    if ended:
        click.echo(
            f"midge: {ended}, so nobody comes in; `midge keys renew-certificates`, then start this "
            "again (or set this machine's clock)", err=True,
        )  # fmt: skip
