"""`midge`: the operator's command. Make a fleet, run its broker and server, start rounds.

Each command is in `server/commands/` or beside what it runs; here they come together.
"""

from importlib.metadata import version

import click

from broker_bridge.console import run_command
from server.commands.backup import backup, restore
from server.commands.broker import broker
from server.commands.bundle import bundle
from server.commands.demo import demo
from server.commands.devices import device
from server.commands.flash import flash
from server.commands.fleet import init
from server.commands.keys import keys
from server.commands.models import model
from server.commands.rounds import pause, resume, start, status, stop, watch
from server.commands.serving import server_command
from server.commands.simulate import simulate
from server.commands.units import unit
from server.doctor import doctor
from server.tasks.cli import task

__all__ = ["main", "midge"]

_COMMANDS = (
    init, broker, server_command, device, keys,
    flash, bundle, start, stop, pause, resume, status, watch,
    model, task, demo, simulate, doctor, unit, backup, restore,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("midge"), prog_name="midge")
def midge() -> None:
    """Federated training over the MQTT broker you already run.

    \b
    Example:
      midge init fleet
      midge broker --dir fleet &
      midge server --dir fleet --task wearables.task &
      midge device add ward-3 --dir fleet
      midge start --dir fleet --rounds 10
    """


for _command in _COMMANDS:
    midge.add_command(_command)


def main() -> None:
    """Run `midge`."""
    run_command(midge, "midge")


if __name__ == "__main__":
    main()
