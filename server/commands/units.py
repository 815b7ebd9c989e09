"""`midge unit`: the systemd files for the server and for the broker."""

import click

from broker_bridge.systemd import unit_file

__all__ = ["unit"]


@click.group()
def unit() -> None:
    """Print what systemd needs to run the server or the broker, sandboxed.

    \b
    Example:
      midge unit server | sudo tee /etc/systemd/system/midge-server.service
    """


@unit.command("server")
def server() -> None:
    """Print midge-server.service, which starts the midge that prints it.

    \b
    Example:
      midge unit server | sudo tee /etc/systemd/system/midge-server.service
    """
    click.echo(unit_file("server", "midge-server.service"), nl=False)


@unit.command("broker")
def broker() -> None:
    """Print a drop-in that shuts Debian's mosquitto.service in.

    \b
    Example:
      midge unit broker | sudo tee /etc/systemd/system/mosquitto.service.d/midge.conf
    """
    click.echo(unit_file("broker_bridge.link", "mosquitto-dropin.conf"), nl=False)
