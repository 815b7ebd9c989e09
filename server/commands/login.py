"""Options that say, for one bundle, what a device shows to a broker of somebody else's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from broker_bridge.config import overridden
from broker_bridge.link.access import Login
from server.config import Broker
from server.fleet.home import Home

__all__ = ["broker_for", "login_options"]

_FILE = click.Path(dir_okay=False)
_OPTIONS = (
    click.option("--broker-username", "username",
                 help="Its user name at a broker that midge did not set up; {name}: its own name."),
    click.option("--broker-password-file", "password_file", type=_FILE,
                 help="The file, mode 0600, with its password there in the only line."),
    click.option("--broker-certificate", "certificate", type=_FILE,
                 help="Its client certificate (PEM) for such a broker."),
    click.option("--broker-key", "key", type=_FILE, help="The key of that certificate, mode 0600."),
)  # fmt: skip


def login_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options, which `broker_for` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def broker_for(home: Home, **given: str | None) -> Broker:
    """The broker of midge.toml, with what the options say in the place of [broker.devices].

    Raises LocalError for options that do not go together.
    """
    broker = home.config().broker
    if not any(given.values()):
        return broker
    files = {
        name: str(Path(value).absolute()) if value and name != "username" else value
        for name, value in given.items()
    }
    kept = Login(ca=broker.devices.ca, client_id=broker.devices.client_id)
    return msgspec.structs.replace(broker, devices=overridden(kept, "command line", **files))
